"""Mistral: Llama with grouped queries by default and, in the first version, a sliding window on all layers."""

from fp8jax.models.decoder import DecoderConfig
from fp8jax.models.hf_config import HFConfig
from fp8jax.models.shape import read_shape, read_windows


def decoder_config(config: HFConfig, *, dtype: str) -> DecoderConfig:
    """The decoder that a Mistral config.json describes.

    Raises:
        ValueError: a field is missing, has a wrong type, or asks for something that is not implemented.
    Source: transformers 5, models/mistral.
    """
    # Absent means 4096, the window of 7B-v0.1; later files say null, which means none.
    window = config.size("sliding_window", None if config.has("sliding_window") else 4096)
    return read_shape(config, dtype=dtype, num_kv_heads=8, windows=read_windows(config, window=window))
