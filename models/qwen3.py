"""Qwen3, dense: RMSNorm over each head of q and k before rope, and heads of 128 whatever the hidden size."""

from fp8jax.models.decoder import DecoderConfig
from fp8jax.models.hf_config import HFConfig
from fp8jax.models.qwen2 import qwen_windows
from fp8jax.models.shape import read_shape


def decoder_config(config: HFConfig, *, dtype: str) -> DecoderConfig:
    """The decoder that a Qwen3 config.json describes.

    Raises:
        ValueError: a field is missing, has a wrong type, or asks for something that is not implemented.
    Source: transformers 5, models/qwen3.
    """
    bias = config.yes_or_no("attention_bias")
    return read_shape(
        config,
        dtype=dtype,
        head_dim=128,
        num_kv_heads=32,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        windows=qwen_windows(config),
    )
