"""Qwen3, dense: RMSNorm over each head of q and k before rope, and heads of 128 whatever the hidden
size."""

from fp8jax.models.config import DecoderConfig
from fp8jax.models.config_fields import Neutral
from fp8jax.models.hf_config import Family, HFConfig
from fp8jax.models.qwen2 import DEFAULTS, qwen_windows
from fp8jax.models.shape import read_shape

NEUTRAL = {
    "use_qk_norm": Neutral((True,))
}  # what the family always does; files of the coder models say so
FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    defaults=DEFAULTS | {"head_dim": 128, "attention_bias": False},
    neutral=NEUTRAL,
)


def decoder_config(config: HFConfig, *, dtype: str) -> DecoderConfig:
    """The decoder that a Qwen3 config.json describes.

    Raises:
        ValueError: a field has a wrong type or value, or asks for something that is not
            implemented.
    Source: transformers 5, models/qwen3.
    """
    bias = config.flag("attention_bias")
    return read_shape(
        config,
        dtype=dtype,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        windows=qwen_windows(config),
    )
