"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and none on o.

With `use_sliding_window`, the layers from `max_window_layers` on slide; without it, and published
files are without it, `sliding_window` and `max_window_layers` mean nothing.
"""

from typing import Any

from fp8jax.models.config import DecoderConfig
from fp8jax.models.hf_config import Family, HFConfig
from fp8jax.models.shape import read_shape, read_window, windows_by_layer

DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
"""What Qwen2 and Qwen3 share where the file is silent."""
FAMILY = Family(architecture="Qwen2ForCausalLM", model_type="qwen2", defaults=DEFAULTS)


def decoder_config(config: HFConfig, *, dtype: str) -> DecoderConfig:
    """The decoder that a Qwen2 config.json describes.

    Raises:
        ValueError: a field has a wrong type or value, or asks for something that is not
            implemented.
    Source: transformers 5, models/qwen2.
    """
    return read_shape(config, dtype=dtype, qkv_bias=True, windows=qwen_windows(config))


def qwen_windows(config: HFConfig) -> tuple[int | None, ...]:
    """Windows of Qwen2 and Qwen3: only with `use_sliding_window`, from layer `max_window_layers`
    on."""
    first_layer = config.take("max_window_layers", kind=int)
    return windows_by_layer(
        config, read_window(config, switch="use_sliding_window"), first_layer=first_layer
    )
