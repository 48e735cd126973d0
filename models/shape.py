"""The part of a config.json that all families write alike, read once.

A family file says what is different: defaults of its own, a bias, a norm, a window. `read_shape` does the rest, so that
a field which a family has never heard of stays unread and becomes an error in `HFConfig.reject_unread`.
"""

from typing import Any

from fp8jax.models.decoder import DecoderConfig
from fp8jax.models.hf_config import HFConfig, read_rope

_FULL, _SLIDING = "full_attention", "sliding_attention"


def read_shape(
    config: HFConfig,
    *,
    dtype: str,
    head_dim: int | None = None,
    num_kv_heads: int | None = None,
    rms_norm_eps: float = 1e-6,
    rope_theta: float = 10000.0,
    **differences: Any,
) -> DecoderConfig:
    """A decoder's numbers; those given here are what the family has where config.json is silent.

    Args:
        config: the file.
        dtype: of activations and unquantized weights.
        head_dim: None for hidden_size / num_attention_heads.
        num_kv_heads: None for as many as there are query heads.
        rms_norm_eps: the family's default.
        rope_theta: the family's default.
        differences: fields of `DecoderConfig` that the family sets itself.
    Raises:
        ValueError: a field is missing, has a wrong type, or asks for something that is not implemented.
    """
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    head_dim = int(config.size("head_dim", head_dim) or _even_heads(config, hidden, heads))
    kv_heads = config.size("num_key_value_heads", num_kv_heads or heads)
    if heads % kv_heads:
        raise ValueError(
            f"{config.where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    activation = config.take("hidden_act", "silu", kind=str)
    if activation not in ("silu", "swish"):
        raise ValueError(f"{config.where}: hidden_act {activation!r} is not implemented; known: silu")
    fields: dict[str, Any] = {"attention_scale": head_dim**-0.5}
    if "windows" not in differences:
        fields["windows"] = read_windows(config, window=None)
    return DecoderConfig(
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.size("intermediate_size"),
        num_layers=config.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=config.size("max_position_embeddings"),
        rope=read_rope(config, head_dim=head_dim, default_theta=rope_theta),
        rms_norm_eps=config.number("rms_norm_eps", rms_norm_eps),
        tied=config.flag("tie_word_embeddings", False),
        dtype=dtype,
        **(fields | differences),
    )


def read_windows(config: HFConfig, *, window: int | None, first_layer: int = 0) -> tuple[int | None, ...]:
    """Every layer's attention window, () where no layer has one.

    Args:
        config: the file; its `layer_types`, as transformers 5 writes them, win over the family's rule.
        window: how many keys a query of a sliding layer sees, itself included; None for no sliding layers.
        first_layer: the family's rule: layers from here on slide.
    Raises:
        ValueError: `layer_types` is not one known word a layer, or has a sliding layer without a window.
    """
    layers = config.size("num_hidden_layers")
    slides = [window is not None and i >= first_layer for i in range(layers)]
    types = config.take("layer_types", None, kind=list)
    if types is not None:
        if len(types) != layers or not set(types) <= {_FULL, _SLIDING}:
            raise ValueError(
                f"{config.where}: layer_types is {types!r}, expected {layers} words (num_hidden_layers), each "
                f"{_FULL!r} or {_SLIDING!r}"
            )
        slides = [word == _SLIDING for word in types]
        if any(slides) and window is None:
            raise ValueError(
                f"{config.where}: layer {slides.index(True)} is {_SLIDING!r} by layer_types, but there is no sliding_window "
                "(or use_sliding_window is false); make the fields agree"
            )
    return tuple(window if slide else None for slide in slides) if any(slides) else ()


def _even_heads(config: HFConfig, hidden: int, heads: int) -> int:
    if hidden % heads:
        raise ValueError(f"{config.where}: hidden_size {hidden} does not divide into num_attention_heads {heads}")
    return hidden // heads
