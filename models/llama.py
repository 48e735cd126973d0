"""The Llama family: Llama 2, 3.x, SmolLM2 and everything else that says `LlamaForCausalLM`."""

from fp8jax.models.decoder import DecoderConfig
from fp8jax.models.hf_config import HFConfig
from fp8jax.models.shape import read_shape


def decoder_config(config: HFConfig, *, dtype: str) -> DecoderConfig:
    """The decoder that a Llama config.json describes.

    Raises:
        ValueError: a field is missing, has a wrong type, or asks for something that is not implemented.
    Source: transformers 5, models/llama.
    """
    bias = config.yes_or_no("attention_bias")
    return read_shape(config, dtype=dtype, qkv_bias=bias, o_bias=bias, mlp_bias=config.yes_or_no("mlp_bias"))
