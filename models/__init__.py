"""Model families: from a config.json to a `DecoderConfig`. Imported as `fp8jax.models`."""

from collections.abc import Callable, Mapping
from typing import Any

from fp8jax.models import granite, granitemoe, llama, mistral, mixtral, olmoe, qwen2, qwen3, qwen3_moe
from fp8jax.models.decoder import CausalLM, Decoder, DecoderConfig
from fp8jax.models.hf_config import HFConfig

ARCHITECTURES: dict[str, Callable[..., DecoderConfig]] = {
    "GraniteForCausalLM": granite.decoder_config,
    "GraniteMoeForCausalLM": granitemoe.decoder_config,
    "LlamaForCausalLM": llama.decoder_config,
    "MistralForCausalLM": mistral.decoder_config,
    "MixtralForCausalLM": mixtral.decoder_config,
    "OlmoeForCausalLM": olmoe.decoder_config,
    "Qwen2ForCausalLM": qwen2.decoder_config,
    "Qwen3ForCausalLM": qwen3.decoder_config,
    "Qwen3MoeForCausalLM": qwen3_moe.decoder_config,
}
"""config.json's `architectures[0]` to the function that reads the rest of it."""

_MODEL_TYPES = {
    "granite": "GraniteForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}

__all__ = ["ARCHITECTURES", "CausalLM", "Decoder", "DecoderConfig", "read_decoder_config"]


def read_decoder_config(raw: Mapping[str, Any], *, dtype: str, where: str = "config.json") -> DecoderConfig:
    """The decoder that a config.json describes.

    Args:
        raw: the JSON object.
        dtype: of activations and unquantized weights.
        where: how to call the file in an error.
    Raises:
        ValueError: unknown architecture (with the known ones), or a field that is missing, wrong or not implemented.
    """
    config = HFConfig(raw, where)
    architectures = config.take("architectures", [], kind=list)
    architecture = architectures[0] if architectures else _MODEL_TYPES.get(config.take("model_type", "", kind=str))
    if architecture not in ARCHITECTURES:
        found = architecture or raw.get("model_type")
        raise ValueError(
            f"{where}: architecture {found!r} is not implemented; known: {', '.join(sorted(ARCHITECTURES))}"
        )
    decoder_config = ARCHITECTURES[architecture](config, dtype=dtype)
    config.reject_unread()
    return decoder_config
