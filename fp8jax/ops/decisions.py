"""Where an operation belongs, and what was decided for it: names in profiles, rows for `explain`.

    with scope("self_attn"):            # operations carry the name into HLO and profiles
        ...
    with noted() as decisions:          # what a trace decides, in the order of its operations
        jax.eval_shape(step, model, …)

Decisions are only listened to here. Nothing that runs depends on it.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What runs one operation of a trace.

    Args:
        where: name of the module that asked, "model.layers.0.mlp.down_proj".
        op: name of the operation.
        kernel: whether its kernel runs, rather than its reference.
        why_not: why no kernel runs; None where one does.
        shape: its sizes, where its tiles follow from them.
        config: the kernel's tiles, where they are chosen here.
        source: where the config is from: "rule", or "measured" and the date.
    """

    where: str
    op: str
    kernel: bool
    why_not: str | None = None
    shape: Mapping[str, int | str] = field(default_factory=dict)
    config: Any = None
    source: str = ""


_where: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("fp8jax_where", default=())
_listening: contextvars.ContextVar[list[Decision] | None] = contextvars.ContextVar(
    "fp8jax_decisions", default=None
)


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """What is traced inside belongs to a module of this name, within the module around it."""
    token = _where.set((*_where.get(), name))
    try:
        with jax.named_scope(name):
            yield
    finally:
        _where.reset(token)


@contextlib.contextmanager
def noted() -> Iterator[list[Decision]]:
    """A list that every decision inside is added to."""
    decisions: list[Decision] = []
    token = _listening.set(decisions)
    try:
        yield decisions
    finally:
        _listening.reset(token)


def note(op: str, *, kernel: bool, **details: Any) -> None:
    """Tell who listens that a decision was made; see `Decision`."""
    if (decisions := _listening.get()) is not None:
        decisions.append(Decision(where=".".join(_where.get()), op=op, kernel=kernel, **details))
