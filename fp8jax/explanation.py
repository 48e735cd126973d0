"""What would run each operation of each layer, with which tiles, and why not something else.

Nothing is computed: a decode step and a prefill are traced with the model's shapes, and what their
operations decide is listened to (`ops/decisions.py`). Layers that decide alike share their rows.
"""

import contextlib
import functools
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from fp8jax.device import current_device_kind
from fp8jax.generation import decode_step, prefill
from fp8jax.models import CausalLM
from fp8jax.ops.decisions import Decision, noted

_LAYER = re.compile(r"\blayers\.(\d+)\b")


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a model's operations would run on.

    Args:
        device: as JAX names it.
        decisions: by phase, "decode" and "prefill", in the order of the forward pass; `where` says
            "layers.*" for layers that decide alike.
        layers: by phase, which layers each of the decisions is of; () outside of layers.
    """

    device: str
    decisions: dict[str, tuple[Decision, ...]]
    layers: dict[str, tuple[tuple[int, ...], ...]]

    def rows(self) -> list[dict[str, Any]]:
        """The decisions as plain data, for JSON."""
        return [
            asdict(decision)
            | {
                "phase": phase,
                "layers": list(layers),
                "config": None if decision.config is None else asdict(decision.config),
            }
            for phase, decisions in self.decisions.items()
            for decision, layers in zip(decisions, self.layers[phase], strict=True)
        ]

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        console = Console(width=150)
        with console.capture() as captured:
            for phase, decisions in self.decisions.items():
                table = Table(
                    "layers", "module", "operation", "shape", "runs", "tiles", "why", title=phase
                )
                for decision, layers in zip(decisions, self.layers[phase], strict=True):
                    table.add_row(
                        _ranges(layers),
                        decision.where.removeprefix("model.").removeprefix("layers.*."),
                        decision.op,
                        " ".join(f"{name}={value}" for name, value in decision.shape.items()),
                        "kernel" if decision.kernel else "XLA",
                        _short(decision.config),
                        decision.why_not or decision.source,
                    )
                console.print(table)
        return f"on {self.device}\n{captured.get()}"


def explain(
    model: CausalLM, *, batch: int = 1, prompt_tokens: int = 512, device: str | None = None
) -> Explanation:
    """What would run a decode step and a prefill of a model.

    Args:
        model: its weights are looked at for their shapes and schemes only.
        batch: rows.
        prompt_tokens: tokens of each row in the prefill.
        device: `device_kind` of a GPU that need not be here, "NVIDIA H100 80GB HBM3"; the current
            device by default.
    Raises:
        ValueError: more tokens than the model's context.
        NotImplementedError: the model names an implementation that the device has not.
    """
    room = min(2 * prompt_tokens, model.config.max_position_embeddings)
    model = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model)
    cache = jax.eval_shape(lambda: model.empty_cache(batch, room))
    numbers = jax.ShapeDtypeStruct((batch,), jnp.int32)
    prompts = jax.ShapeDtypeStruct((batch, prompt_tokens), jnp.int32)
    arguments = {
        "decode": (decode_step, (model, cache, numbers, numbers)),
        "prefill": (prefill, (model, cache, prompts, numbers)),
    }
    decisions, layers = {}, {}
    with on_device(device):
        kind = current_device_kind() or jax.default_backend()
        for phase, (function, operands) in arguments.items():
            with noted() as found:  # a new function, so that JAX traces it anew
                jax.eval_shape(functools.partial(function), *operands)
            decisions[phase], layers[phase] = _together(found)
    return Explanation(device=kind, decisions=decisions, layers=layers)


def on_device(kind: str | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which programs are traced for a GPU that need not be here."""
    if kind is None:
        return contextlib.nullcontext()
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def _together(
    found: Iterable[Decision],
) -> tuple[tuple[Decision, ...], tuple[tuple[int, ...], ...]]:
    """Decisions that layers share, once each, in the order of the first; and whose they are."""
    layers_of: dict[str, tuple[Decision, list[int]]] = {}
    for decision in found:
        layer = _LAYER.search(decision.where)
        alike = replace(decision, where=_LAYER.sub("layers.*", decision.where))
        _, layers = layers_of.setdefault(repr(alike), (alike, []))
        if layer and int(layer[1]) not in layers:
            layers.append(int(layer[1]))
    decisions = tuple(decision for decision, _ in layers_of.values())
    return decisions, tuple(tuple(layers) for _, layers in layers_of.values())


def _ranges(numbers: tuple[int, ...]) -> str:
    """ "0-3, 5" for 0, 1, 2, 3, 5."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def _short(config: Any) -> str:
    """The tiles of a config in a few characters."""
    if config is None:
        return ""
    tiles = "×".join(str(getattr(config, name)) for name in ("block_m", "block_n", "block_k"))
    return f"{tiles}, {config.num_warps} warps, {config.num_stages} stages" + (
        f", split {config.split_k}" if config.split_k > 1 else ""
    )
