"""The rope of a config.json: which of its two tables counts, what the fields of each rope type are,
how long the context is.

    rope_scaling         transformers 4, beside rope_theta at top level; counts unless null or empty
    rope_parameters      transformers 5, with rope_theta inside; counts otherwise

    theta = rope_theta of the table that counts, else that at top level, else the family's default

A field of another rope type, or one that transformers does not read, changes nothing there and
changes nothing here; what somebody may have meant by it is told. The families all turn whole heads:
transformers reads `partial_rotary_factor` for the number of frequencies of a scaled rope only, and
then fails; with the default type it looks away.

A stretched context is written in two ways. Files that were trained with yarn give the long context
as max_position_embeddings; the model cards of Qwen2.5 and Qwen3 prescribe to add a yarn table and
to leave max_position_embeddings as it is. factor · original_max_position_embeddings is the context
in both.

Source: transformers 5.23, modeling_rope_utils; the model cards of Qwen2.5 and Qwen3; FastChat's
configs of Vicuna-16k.
"""

import math
from typing import Any

import numpy as np

from fp8jax.models.hf_config import LARGEST_SIZE, Fields, HFConfig, shown
from fp8jax.models.rotary_embedding import ROPE_TYPES, Rope

# What each rope type computes with, beside rope_theta.
_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
        "mscale", "mscale_all_dim", "truncate",
    ),
}  # fmt: skip
_ANY_TYPE = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
# What tables carry that no rope type computes with: the reason.
_HARMLESS = {
    "finetuned": (
        "Yarn-Llama-2 and Yarn-Mistral: tells the repository's own code to extrapolate no further"
    ),
    "mrope_section": (
        "shares the frequencies among text, height and width, which are one and the same in text"
    ),
    "attn_factor": "is told about instead",
}


def read_rope(config: HFConfig, *, head_dim: int) -> Rope:
    """The rope of a config, from either spelling.

    Args:
        config: the file.
        head_dim: channels of a head, all of which turn.
    Raises:
        ValueError: a rope type or a field that is not implemented, with the known ones; a value
            with which there are no frequencies.
    """
    table = _table(config)
    rope_type = _rope_type(table)
    theta = _theta(config, table)
    _check_rotated_part(config, table, rope_type, head_dim)
    values = _values(config, table, rope_type)
    _tell_of_unused(config, table, rope_type)
    rope = Rope(rotary_dim=head_dim, theta=theta, rope_type=rope_type, **values)
    _check_frequencies(table, rope)
    if "attn_factor" in table.raw and rope_type == "yarn":
        config.tell(
            f"{table.name('attn_factor')} {shown(table.raw['attn_factor'])} is ignored, as "
            f"transformers ignores it: cos and sin are multiplied by {rope.multiplier():.3f}; "
            "other engines multiply by attn_factor as well, and differ"
        )
    return rope


def read_context(config: HFConfig, rope: Rope) -> int:
    """How many tokens a sequence may have.

    Args:
        config: the file.
        rope: its rope.
    Raises:
        ValueError: a field is wrong, or a dual_chunk_attention_config does not say where chunks
            begin.
    """
    context = config.size("max_position_embeddings")
    trained = config.size("max_sequence_length")
    if rope.rope_type == "yarn":
        context = max(
            context, min(round(rope.factor * rope.original_max_position_embeddings), LARGEST_SIZE)
        )
    elif rope.rope_type == "linear" and trained is not None:
        context = max(context, min(trained, round(rope.factor * context)))
    chunks = config.take("dual_chunk_attention_config", kind=dict)
    if chunks:
        table = Fields(chunks, config.where, prefix="dual_chunk_attention_config.")
        plain = [table.size(key) for key in ("original_max_position_embeddings", "chunk_size")]
        if plain[0] is None:
            raise table.fault(
                "original_max_position_embeddings",
                "expected the length up to which attention is plain",
            )
        plain = min(context, *(length for length in plain if length is not None))
        if plain < context:
            config.tell(
                f"dual chunk attention is not implemented; up to {plain} tokens it is plain "
                f"attention, so that is the context, not {context}"
            )
        context = plain
    return context


def _table(config: HFConfig) -> Fields:
    """The table that counts; without one, an empty one."""
    found = {key: config.take(key, kind=dict) for key in ("rope_scaling", "rope_parameters")}
    key = (
        "rope_scaling"
        if found["rope_scaling"] or not found["rope_parameters"]
        else "rope_parameters"
    )
    return Fields(found[key] or {}, config.where, prefix=f"{key}.")


def _rope_type(table: Fields) -> Any:
    older, rope_type = (table.take(key, kind=str) for key in ("type", "rope_type"))
    rope_type = rope_type or older or "default"
    if rope_type not in ROPE_TYPES:
        key = table.name("rope_type" if table.raw.get("rope_type") else "type")
        raise ValueError(
            f"{table.where}: {key} {shown(rope_type)} is not implemented; known: "
            f"{', '.join(ROPE_TYPES)}"
        )
    return rope_type


def _theta(config: HFConfig, table: Fields) -> float:
    outer = config.number("rope_theta")
    inner = table.number("rope_theta") if table.has("rope_theta") else None
    theta, owner = (outer, config) if inner is None else (inner, table)
    if theta is None or theta <= 0:
        raise owner.fault("rope_theta", "expected a positive number")
    # CodeQwen1.5 says it twice; transformers reads rope_theta only.
    again = config.number("rotary_emb_base")
    if again is not None and again != theta:
        raise config.fault(
            "rotary_emb_base",
            f"rope_theta is {theta}, and the two mean the same; remove the wrong one",
        )
    return theta


def _check_rotated_part(config: HFConfig, table: Fields, rope_type: str, head_dim: int) -> None:
    if head_dim % 2:
        raise ValueError(
            f"{config.where}: head_dim is {head_dim} (where it is not given: hidden_size / "
            "num_attention_heads), expected an even number: rotary embedding turns pairs of "
            "channels"
        )
    outer, inner = config.number("partial_rotary_factor"), table.number("partial_rotary_factor")
    partial, owner = (outer, config) if inner is None else (inner, table)
    if partial is None or math.floor(head_dim * partial) == head_dim:
        return
    if rope_type != "default":
        raise owner.fault(
            "partial_rotary_factor",
            f"expected 1: this architecture turns whole heads with {rope_type!r}",
        )
    config.tell(
        f"{owner.name('partial_rotary_factor')} {partial} is ignored, as transformers ignores it "
        "in this architecture: whole heads are turned"
    )


def _values(config: HFConfig, table: Fields, rope_type: str) -> dict[str, Any]:
    """The fields of the rope type, as `Rope` takes them."""
    known = _FIELDS[rope_type]
    values: dict[str, Any] = {}
    for key in known:
        if key not in ("truncate", "original_max_position_embeddings"):
            values[key] = table.number(key)
    outer = config.size(
        "original_max_position_embeddings"
    )  # wins over the inner one, as in transformers
    if "original_max_position_embeddings" in known:
        inner = table.size("original_max_position_embeddings")
        values["original_max_position_embeddings"] = (
            outer or inner or config.size("max_position_embeddings")
        )
    if rope_type == "yarn":
        # Zero and null mean the default; null for truncate means false: so transformers reads them.
        values["beta_fast"], values["beta_slow"] = (
            values["beta_fast"] or 32.0,
            values["beta_slow"] or 1.0,
        )
        values["truncate"] = (
            bool(table.take("truncate", kind=bool)) if table.has("truncate") else True
        )
        if values["factor"] is None:
            values["factor"] = (
                config.size("max_position_embeddings") / values["original_max_position_embeddings"]
            )
        for key in ("beta_fast", "beta_slow"):
            if values[key] < 0:
                raise table.fault(key, "expected a positive number of turns")
    optional = ("attention_factor", "mscale", "mscale_all_dim")
    for key, value in values.items():
        if value is None and key not in optional:
            raise table.fault(key, f"rope type {rope_type!r} needs a number")
    if values.get("factor", 1) <= 0:
        raise table.fault("factor", "expected a positive number")
    return values


def _tell_of_unused(config: HFConfig, table: Fields, rope_type: str) -> None:
    every = {key for keys in _FIELDS.values() for key in keys}
    rest = {
        key: value
        for key, value in table.raw.items()
        if key not in (*_FIELDS[rope_type], *_ANY_TYPE, *_HARMLESS)
    }
    unknown = {key: value for key, value in rest.items() if key not in every and value is not None}
    if unknown:
        named = "; ".join(
            f"{table.name(key[:100])}: {shown(value)}" for key, value in list(unknown.items())[:20]
        )
        raise ValueError(
            f"{table.where}: {named} is nothing that rope type {rope_type!r} computes with; known: "
            f"{', '.join((*_FIELDS[rope_type], *_ANY_TYPE))}"
        )
    # Of no meaning outside the types above, and common beside them: how long the context was
    # before.
    unused = [
        key
        for key, value in rest.items()
        if value is not None and key != "original_max_position_embeddings"
    ]
    if unused:
        config.tell(
            f"{', '.join(map(table.name, unused))} changes nothing with rope type {rope_type!r}, "
            "and is ignored as in transformers"
        )


def _check_frequencies(table: Fields, rope: Rope) -> None:
    """One look at what comes out finds every value with which a logarithm or a quotient has no
    meaning."""
    try:
        frequencies, multiplier = rope.frequencies(), rope.multiplier()
    except (ArithmeticError, ValueError) as error:
        frequencies, multiplier, reason = np.zeros(1), math.nan, f" ({error})"
    else:
        reason = ""
    # A channel that turns more than once from one token to the next cannot tell tokens apart by
    # that.
    if not (
        np.all(np.abs(frequencies) <= 2 * math.pi) and abs(multiplier) <= np.finfo(np.float32).max
    ):
        raise ValueError(
            f"{table.where}: rope_theta {rope.theta} and the other rope parameters "
            f"{shown(table.raw)} give no usable frequencies with rope type "
            f"{rope.rope_type!r}{reason}"
        )
