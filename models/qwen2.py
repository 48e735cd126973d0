"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and none on o.

With `use_sliding_window`, the layers from `max_window_layers` on slide; without it, and published files are without it,
`sliding_window` and `max_window_layers` mean nothing.
"""

from fp8jax.models.decoder import DecoderConfig
from fp8jax.models.hf_config import HFConfig
from fp8jax.models.shape import read_shape, read_windows


def decoder_config(config: HFConfig, *, dtype: str) -> DecoderConfig:
    """The decoder that a Qwen2 config.json describes.

    Raises:
        ValueError: a field is missing, has a wrong type, or asks for something that is not implemented.
    Source: transformers 5, models/qwen2.
    """
    return read_shape(config, dtype=dtype, num_kv_heads=32, qkv_bias="yes", windows=qwen_windows(config))


def qwen_windows(config: HFConfig) -> tuple[int | None, ...]:
    """Windows of Qwen2 and Qwen3: only with `use_sliding_window`, from layer `max_window_layers` on."""
    window = config.size("sliding_window", None if config.has("sliding_window") else 4096)  # null is no window
    first_layer = config.take("max_window_layers", 28, kind=int)
    if not config.flag("use_sliding_window", False):
        window = None
    return read_windows(config, window=window, first_layer=first_layer)
