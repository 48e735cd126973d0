"""Granite 3, dense: Llama with four multipliers.

x = embed(tokens) · embedding_multiplier             scores · attention_multiplier, in place of head_dim^(−1/2)
x += residual_multiplier · branch(norm(x))           logits / logits_scaling
"""

from typing import Any

from fp8jax.models.decoder import DecoderConfig
from fp8jax.models.hf_config import HFConfig
from fp8jax.models.shape import read_shape


def decoder_config(config: HFConfig, *, dtype: str) -> DecoderConfig:
    """The decoder that a Granite config.json describes.

    Raises:
        ValueError: a field is missing, has a wrong type, or asks for something that is not implemented.
    Source: transformers 5, models/granite.
    """
    return read_shape(config, dtype=dtype, mlp_bias=config.yes_or_no("mlp_bias"), **granite_fields(config))


def granite_fields(config: HFConfig) -> dict[str, Any]:
    """What dense Granite and GraniteMoE share: attention biases and the multipliers, 1 where absent."""
    bias = config.yes_or_no("attention_bias")
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "attention_scale": config.number("attention_multiplier", 1.0),
        "embedding_multiplier": config.number("embedding_multiplier", 1.0),
        "residual_multiplier": config.number("residual_multiplier", 1.0),
        "logits_divisor": config.number("logits_scaling", 1.0),
    }
