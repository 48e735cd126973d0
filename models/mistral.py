"""Mistral: Llama with grouped queries by default and, in the first version, a sliding window on all
layers."""

from fp8jax.models.config import DecoderConfig
from fp8jax.models.hf_config import Family, HFConfig
from fp8jax.models.shape import read_shape, read_window, windows_of_all

FAMILY = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        # That of 7B-v0.1, where the field is absent; later files say null, which means none.
        "sliding_window": 4096,
    },
)


def decoder_config(config: HFConfig, *, dtype: str) -> DecoderConfig:
    """The decoder that a Mistral config.json describes.

    Raises:
        ValueError: a field has a wrong type or value, or asks for something that is not
            implemented.
    Source: transformers 5, models/mistral.
    """
    return read_shape(config, dtype=dtype, windows=windows_of_all(config, read_window(config)))
