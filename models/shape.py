"""The part of a config.json that all families write alike, read once.

A family file says what is different: its defaults, a bias, a norm, a window. `read_shape` does the
rest, so that a field which a family has never heard of stays unread and becomes an error in
`HFConfig.reject_unread`.
"""

from typing import Any

from fp8jax.models.config import DecoderConfig
from fp8jax.models.hf_config import MOST_LAYERS, HFConfig, shown
from fp8jax.models.rope_config import read_context, read_rope

_FULL, _SLIDING = "full_attention", "sliding_attention"
_OLDER_WORDS = {"attention": _FULL}  # as transformers translates them
_WIDEST_HEAD = 2**16


def read_shape(config: HFConfig, *, dtype: str, **differences: Any) -> DecoderConfig:
    """A decoder's numbers.

    Args:
        config: the file; where it is silent, the family's defaults count.
        dtype: of activations and unquantized weights.
        differences: fields of `DecoderConfig` that the family sets itself.
    Raises:
        ValueError: a field has a wrong type or value, or asks for something that is not
            implemented.
    """
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    head_dim = config.size("head_dim", most=_WIDEST_HEAD) or _even_heads(config, hidden, heads)
    # Null says "as many as query heads", absent says what the family's default is.
    kv_heads = config.size("num_key_value_heads", null=heads) or heads
    if heads % kv_heads:
        raise ValueError(
            f"{config.where}: num_attention_heads {heads} is not a multiple of num_key_value_heads "
            f"{kv_heads}"
        )
    activation = config.take("hidden_act", kind=str)
    if activation not in ("silu", "swish"):
        raise ValueError(
            f"{config.where}: hidden_act {shown(activation)} is not implemented; known: silu"
        )
    epsilon = config.number("rms_norm_eps")
    if epsilon < 0:
        raise config.fault("rms_norm_eps", "expected a number that is not negative")
    rope = read_rope(config, head_dim=head_dim)
    fields: dict[str, Any] = {"attention_scale": head_dim**-0.5}
    if "windows" not in differences:
        _refuse_sliding_layers(config)
    return DecoderConfig(
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.size("intermediate_size"),
        num_layers=num_layers(config),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=read_context(config, rope),
        rope=rope,
        rms_norm_eps=epsilon,
        tied=config.flag("tie_word_embeddings"),
        dtype=dtype,
        **(fields | differences),
    )


def num_layers(config: HFConfig) -> int:
    """How many layers there are: so few that one may count them."""
    return config.size("num_hidden_layers", most=MOST_LAYERS)


def read_window(config: HFConfig, *, switch: str | None = None) -> int | None:
    """`sliding_window`: how many keys a query of a sliding layer sees, itself included; None for no
    sliding layers.

    Args:
        config: the file.
        switch: a field that must be true for the window to count.
    Raises:
        ValueError: no integer, or a window that counts and holds no token.
    """
    window = config.take("sliding_window", kind=int, null=None)
    if window is None or (switch is not None and not config.flag(switch)):
        return None
    return config.size("sliding_window")


def windows_of_all(config: HFConfig, window: int | None) -> tuple[int | None, ...]:
    """Every layer's window in the families where it is the same for all; () for none.

    Their code in transformers does not look at `layer_types`; a file that says otherwise there is
    told about.
    """
    types = _layer_types(config)
    if types and window is None and _SLIDING in types:
        raise _without_window(config, types)
    if types and window is not None and _FULL in types:
        config.tell(
            f"layer {types.index(_FULL)} is {_FULL!r} by layer_types, but in this architecture "
            f"sliding_window {window} counts for all layers, as in transformers"
        )
    return (window,) * num_layers(config) if window is not None else ()


def windows_by_layer(
    config: HFConfig, window: int | None, *, first_layer: int
) -> tuple[int | None, ...]:
    """Every layer's window in the families whose layers differ; () where no layer has one.

    Args:
        config: the file; its `layer_types`, as transformers 5 writes them, win over the older rule.
        window: of sliding layers; None for no sliding layers.
        first_layer: the older rule: layers from here on slide.
    Raises:
        ValueError: `layer_types` is not one known word a layer, or has a sliding layer without a
            window.
    """
    types = _layer_types(config)
    if types is None:
        types = [
            _SLIDING if window is not None and i >= first_layer else _FULL
            for i in range(num_layers(config))
        ]
    if _SLIDING not in types:
        return ()
    if window is None:
        raise _without_window(config, types)
    return tuple(window if word == _SLIDING else None for word in types)


def _refuse_sliding_layers(config: HFConfig) -> None:
    types = _layer_types(config)
    if types and _SLIDING in types:
        raise ValueError(
            f"{config.where}: layer {types.index(_SLIDING)} is {_SLIDING!r} by layer_types, which "
            "is not implemented for this architecture"
        )


def _layer_types(config: HFConfig) -> list[str] | None:
    types, layers = config.take("layer_types", kind=list), num_layers(config)
    if types is None:
        return None
    words = [_OLDER_WORDS.get(word, word) if isinstance(word, str) else word for word in types]
    if len(types) != layers or not all(word in (_FULL, _SLIDING) for word in words):
        raise ValueError(
            f"{config.where}: layer_types is {shown(types)}, expected {layers} words "
            f"(num_hidden_layers), each {_FULL!r} or {_SLIDING!r}"
        )
    return words


def _without_window(config: HFConfig, types: list[str]) -> ValueError:
    return ValueError(
        f"{config.where}: layer {types.index(_SLIDING)} is {_SLIDING!r} by layer_types, but there "
        "is no sliding_window (or use_sliding_window is false); make the fields agree"
    )


def _even_heads(config: HFConfig, hidden: int, heads: int) -> int:
    """The channels of a head where the file does not give them."""
    if (
        hidden % heads and config.family.model_type == "llama"
    ):  # others round down, as their code in transformers does
        raise ValueError(
            f"{config.where}: hidden_size {hidden} does not divide into num_attention_heads {heads}"
        )
    if not 1 <= hidden // heads <= _WIDEST_HEAD:
        raise ValueError(
            f"{config.where}: hidden_size {hidden} in num_attention_heads {heads} leaves "
            f"{hidden // heads} channels a head, expected 1 to {_WIDEST_HEAD}"
        )
    return hidden // heads
