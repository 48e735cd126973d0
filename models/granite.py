"""Granite 3, dense: Llama with four multipliers.

x = embed(tokens) · embedding_multiplier
x += residual_multiplier · branch(norm(x))
scores · attention_multiplier                        in place of head_dim^(−1/2)
logits / logits_scaling
"""

from typing import Any

from fp8jax.models.config import DecoderConfig
from fp8jax.models.hf_config import Family, HFConfig
from fp8jax.models.shape import read_shape

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}
"""What dense Granite and GraniteMoE share where the file is silent."""
_LARGEST_MULTIPLIER = 1e15
FAMILY = Family(
    architecture="GraniteForCausalLM", model_type="granite", defaults=DEFAULTS | {"mlp_bias": False}
)


def decoder_config(config: HFConfig, *, dtype: str) -> DecoderConfig:
    """The decoder that a Granite config.json describes.

    Raises:
        ValueError: a field has a wrong type or value, or asks for something that is not
            implemented.
    Source: transformers 5, models/granite.
    """
    return read_shape(
        config, dtype=dtype, mlp_bias=config.flag("mlp_bias"), **granite_fields(config)
    )


def granite_fields(config: HFConfig) -> dict[str, Any]:
    """What dense Granite and GraniteMoE share: attention biases and the multipliers."""
    bias, divisor = config.flag("attention_bias"), config.number("logits_scaling")
    if divisor == 0:
        raise config.fault("logits_scaling", "expected the number that logits are divided by")
    multipliers = {
        key: config.number(key) for key in ("embedding_multiplier", "residual_multiplier")
    }
    for key, multiplier in multipliers.items():
        if abs(multiplier) > _LARGEST_MULTIPLIER:
            raise config.fault(
                key, "expected a number whose square leaves RMSNorm a mean within float32"
            )
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "attention_scale": config.number("attention_multiplier"),
        "logits_divisor": divisor,
        **multipliers,
    }
