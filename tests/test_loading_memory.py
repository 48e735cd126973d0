"""Loading holds the finished layers and one layer more, never the BF16 model: watched from outside, on a 2 GB checkpoint."""

import json
import sys

import ml_dtypes
import numpy as np
import pytest
from memory_probe import watch_loading
from safetensors.numpy import save_file

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="private memory is read from /proc"),
]

MB = 1_000_000
HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 2048, 8192, 15, 8192
LARGEST_LAYER = 2 * INTERMEDIATE * HIDDEN  # gate_up, in elements


@pytest.fixture(scope="module")
def big_checkpoint(tmp_path_factory):
    """About 2 GB of BF16 weights whose data begins at an odd byte: an aligned view could be aliased, which would hide a copy."""
    folder = tmp_path_factory.mktemp("big")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(2 * INTERMEDIATE * HIDDEN, dtype=np.float32).astype(ml_dtypes.bfloat16)

    def weight(*shape):
        return noise[: np.prod(shape)].reshape(shape)

    weight_map = {}

    def save(name, tensors):
        save_file(tensors, folder / name)
        misalign(folder / name)
        weight_map.update(dict.fromkeys(tensors, name))

    save(
        "rest.safetensors",
        {"model.embed_tokens.weight": weight(VOCAB, HIDDEN), "model.norm.weight": weight(HIDDEN)},
    )
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        tensors = {f"{layer}self_attn.{x}_proj.weight": weight(HIDDEN, HIDDEN) for x in "qkvo"}
        tensors |= {f"{layer}mlp.{x}_proj.weight": weight(INTERMEDIATE, HIDDEN) for x in ("gate", "up")}
        tensors |= {f"{layer}mlp.down_proj.weight": weight(HIDDEN, INTERMEDIATE)}
        tensors |= {f"{layer}{x}_layernorm.weight": weight(HIDDEN) for x in ("input", "post_attention")}
        save(f"layer{i}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert 1.9e9 < sum(file.stat().st_size for file in folder.iterdir()) < 2.3e9
    return folder


def misalign(file):
    """Pad the header of a safetensors file with spaces until its data begins at an odd byte."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    pad = 1 if length % 2 == 0 else 2
    file.write_bytes(
        (length + pad).to_bytes(8, "little") + content[8 : 8 + length] + b" " * pad + content[8 + length :]
    )


def bound(held):
    """The quantized model, its largest layer in BF16 and in FP32, and 400 MB for compiled code and allocators."""
    return held["bytes_after"] + LARGEST_LAYER * (2 + 4) + 400 * MB


@pytest.mark.parametrize("scheme", ["fp8_per_tensor", "fp8_per_block"])
def test_peak_private_memory_is_the_result_and_one_layer(big_checkpoint, scheme):
    probe = watch_loading(big_checkpoint, scheme)
    print(f"{scheme}: peak {probe.above_idle / MB:.0f} MB above idle, bound {bound(probe.held) / MB:.0f}, {probe.held}")
    assert probe.above_idle <= bound(probe.held)


def test_keeping_a_bf16_copy_would_be_seen(big_checkpoint):
    """The negative control: the same bound does not hold once a BF16 copy of the model is kept."""
    probe = watch_loading(big_checkpoint, "fp8_per_tensor", mode="keep")
    assert probe.above_idle > bound(probe.held)
