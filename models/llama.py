"""The Llama family: Llama 2, 3.x, SmolLM2 and everything else that says `LlamaForCausalLM`."""

from fp8jax.models.config import DecoderConfig
from fp8jax.models.hf_config import Family, HFConfig
from fp8jax.models.shape import read_shape

FAMILY = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    defaults={
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
        "mlp_bias": False,
    },
    harmless={"pretraining_tp": "cuts products into slices and adds them up again: the same sums"},
)


def decoder_config(config: HFConfig, *, dtype: str) -> DecoderConfig:
    """The decoder that a Llama config.json describes.

    Raises:
        ValueError: a field has a wrong type or value, or asks for something that is not
            implemented.
    Source: transformers 5, models/llama.
    """
    bias = config.flag("attention_bias")
    return read_shape(
        config, dtype=dtype, qkv_bias=bias, o_bias=bias, mlp_bias=config.flag("mlp_bias")
    )
