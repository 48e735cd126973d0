"""A checkpoint that is quantized already is recognised, from its configuration or from its tensors
alone."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from fp8jax.checkpoints.folder import Checkpoint, CheckpointError

BF16 = np.zeros((4, 4), ml_dtypes.bfloat16)
F8 = np.zeros((4, 4), ml_dtypes.float8_e4m3fn)
I8 = np.zeros((4, 4), np.int8)
I32 = np.zeros((4, 4), np.int32)
ONE = np.ones(1, np.float32)


def opened(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder)


DECLARED = {
    "fp8 block": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "fp8 with blocks of [128, 128]",
    ),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, ": fp8;"),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "config_groups": {}},
        "compressed-tensors",
    ),
    "old compressed-tensors": (
        {"format": "float-quantized", "config_groups": {}},
        "compressed-tensors",
    ),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "modelopt"),
    "old modelopt": ({"quant_algo": "FP8"}, "modelopt"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "gptq"),
    "awq": ({"quant_method": "awq", "bits": 4}, "awq"),
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
    "old bitsandbytes": ({"load_in_8bit": True}, "bitsandbytes"),
    "unheard of": ({"quant_method": "qq9"}, "qq9"),
    "nameless": ({"bits": 4}, "a format that gives no quant_method"),
}


@pytest.mark.parametrize("case", DECLARED)
@pytest.mark.parametrize("place", ["quantization_config", "compression_config", "text_config"])
def test_a_declared_format_is_named(case: str, place: str, tmp_path: Path):
    quantization, expected = DECLARED[case]
    config = {
        place: {"quantization_config": quantization} if place == "text_config" else quantization
    }
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, config, {"x.weight": BF16}).require_unquantized()
    assert expected in str(caught.value)
    assert place in str(caught.value)
    assert "starts from BF16 or FP16" in str(caught.value)
    assert "remove that entry" in str(caught.value)  # because nothing stored confirms it


@pytest.mark.parametrize(
    "file, expected",
    [
        ("hf_quant_config.json", "modelopt"),
        ("quantize_config.json", "gptq"),
        ("quant_config.json", "awq"),
    ],
)
def test_a_file_that_a_quantizer_left_names_the_format(file: str, expected: str, tmp_path: Path):
    (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{file}: {expected}"):
        opened(tmp_path, {}, {"x.weight": BF16}).require_unquantized()


STORED = {
    "block scales": ({"x.weight": F8, "x.weight_scale_inv": ONE}, "fp8 with block scales"),
    "weight_scale": (
        {"x.weight": F8, "x.weight_scale": ONE},
        "as compressed-tensors and modelopt write",
    ),
    "int8 weight_scale": (
        {"x.weight": I8, "x.weight_scale": ONE},
        "is int8 with the scale x.weight_scale",
    ),
    "scale": ({"x.weight": F8, "x.scale": ONE}, "fp8 with .scale"),
    "qscale_weight": ({"x.weight": F8, "x.qscale_weight": ONE}, "fp8 with .qscale_weight"),
    "stacked experts": (
        {"x.gate_up_proj": F8, "x.gate_up_proj_scale_inv": ONE},
        "fp8 with block scales",
    ),
    "no scale": ({"x.weight": F8}, "is float8_e4m3fn without a scale"),
    "e5m2": ({"x.weight": np.zeros(4, ml_dtypes.float8_e5m2)}, "is float8_e5m2 without a scale"),
    "gptq": ({"x.qweight": I32, "x.qzeros": I32, "x.scales": ONE}, "gptq or awq"),
    "packed": ({"x.weight_packed": I32, "x.weight_scale": ONE}, "compressed-tensors"),
    "nvfp4": (
        {"x.weight": I8.view(np.uint8), "x.weight_scale": F8, "x.weight_scale_2": ONE},
        "modelopt",
    ),
    "bitsandbytes 4": ({"x.weight": I8.view(np.uint8), "x.weight.absmax": ONE}, "bitsandbytes"),
    "bitsandbytes 8": ({"x.weight": I8, "x.SCB": ONE}, "bitsandbytes"),
    "mxfp4": (
        {"x.down_proj_blocks": I8.view(np.uint8), "x.down_proj_scales": I8.view(np.uint8)},
        "mxfp4",
    ),
}


@pytest.mark.parametrize("case", STORED)
def test_quantized_tensors_are_recognised_when_the_config_says_nothing(case: str, tmp_path: Path):
    tensors, expected = STORED[case]
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, {}, {"model.norm.weight": BF16, **tensors}).require_unquantized()
    assert expected in str(caught.value)
    assert "starts from BF16 or FP16" in str(caught.value)
    assert "remove that entry" not in str(caught.value)


PLAIN = {
    "bf16": ({}, {"x.weight": BF16, "x.bias": BF16}),
    "fp16 and float32": ({}, {"x.weight": BF16.astype(np.float16), "norm.weight": ONE}),
    "null": ({"quantization_config": None}, {"x.weight": BF16}),
    "empty": ({"quantization_config": {}}, {"x.weight": BF16}),
    "an integer buffer": ({}, {"x.weight": BF16, "x.position_ids": I8, "x.attention_scale": ONE}),
}


@pytest.mark.parametrize("case", PLAIN)
def test_a_plain_checkpoint_passes(case: str, tmp_path: Path):
    opened(tmp_path, *PLAIN[case]).require_unquantized()
