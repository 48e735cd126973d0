"""Telling whether a checkpoint is quantized already, and in which format.

Online quantization starts from BF16 or FP16. An FP8, GPTQ or AWQ checkpoint given by mistake must
not end in a list of two thousand unknown tensors, so its format is recognised and named. There are
two witnesses, and either is enough:

    what is declared    config.json: quantization_config (or compression_config),
                        or a file that a quantizer leaves
    what is stored      names that only packed formats use,
                        or 8-bit weights, most with a scale beside them

The declaration alone is not trusted to be there (ModelOpt writes another file, hand-made
conversions none), and the tensors alone do not name the format well.

    format                     weight            beside it
    fp8, block scales          F8_E4M3 [n, k]    weight_scale_inv [⌈n/128⌉, ⌈k/128⌉]
    compressed-tensors         F8_E4M3 or I8     weight_scale [1] | [n, 1] | [⌈n/128⌉, ⌈k/128⌉]
                               4 bits            weight_packed
    modelopt                   F8_E4M3           weight_scale, input_scale
                               4 bits            weight_scale_2
    gptq, awq                  qweight I32       qzeros, scales
    bitsandbytes               U8 or I8          weight.absmax | SCB

Source: the tensor names that vLLM and transformers read for each `quant_method`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8jax.checkpoints.safetensors_file import TensorInfo, shown

# Name endings that one format alone writes.
PACKED_NAMES = {
    ".weight_packed": "compressed-tensors",
    ".weight_scale_2": "modelopt",
    ".qweight": "gptq or awq",
    ".qzeros": "gptq or awq",
    ".weight.absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    "_proj_blocks": "mxfp4",
}
# Files that announce a format without a word in config.json.
QUANTIZER_FILES = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}


def declared_format(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Returns the format that the configuration files declare, with the place that does; None if
    there is none."""
    text_config = config.get(
        "text_config"
    )  # where models that also see images keep the language model
    for where, holder in [
        ("", config),
        ("text_config.", text_config if isinstance(text_config, dict) else {}),
    ]:
        for key in ("quantization_config", "compression_config"):
            if holder.get(key):
                return f"config.json, {where}{key}: {_name_of(holder[key])}"
    for file, name in QUANTIZER_FILES.items():
        if (folder / file).is_file():
            return f"{file}: {name}"
    return None


def stored_format(tensors: Mapping[str, TensorInfo]) -> str | None:
    """Returns the format that the tensors give away, with the first one that does; None if all are
    plain."""
    for name in tensors:
        for ending, format_name in PACKED_NAMES.items():
            if name.endswith(ending):
                return f"tensor {shown(name)}: {format_name}"
    for name, info in tensors.items():
        dtype = info.dtype.name
        is_weight = dtype.startswith(("float8_e4m3", "float8_e5m2")) or (
            dtype in ("int8", "uint8") and name.endswith(".weight")
        )
        if is_weight:
            layer = name.rpartition(".")[0]
            scales = {
                f"{name}_scale_inv": "fp8 with block scales",
                f"{name}_scale": (
                    "8 bits with weight_scale, as compressed-tensors and modelopt write"
                ),
                f"{layer}.scale": "fp8 with .scale",
                f"{layer}.qscale_weight": "fp8 with .qscale_weight",
            }
            scale = next((scale for scale in scales if scale in tensors), None)
            beside = (
                f"with the scale {shown(scale)} ({scales[scale]})" if scale else "without a scale"
            )
            return f"tensor {shown(name)} is {dtype} {beside}"
    return None


def _name_of(quantization: Any) -> str:
    """Names the format of a `quantization_config` entry; old writers leave `quant_method` out."""
    if not isinstance(quantization, dict):
        return shown(str(quantization))
    method = quantization.get("quant_method")
    if method == "fp8" and quantization.get("weight_block_size"):
        return shown(f"fp8 with blocks of {quantization['weight_block_size']}")
    if method:
        return shown(str(method))
    if "quant_algo" in quantization:
        return "modelopt"
    if "config_groups" in quantization:
        return "compressed-tensors"
    if "load_in_8bit" in quantization or "load_in_4bit" in quantization:
        return "bitsandbytes"
    return "a format that gives no quant_method"
