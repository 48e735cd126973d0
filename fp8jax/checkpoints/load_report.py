"""What loading did: which layer was quantized how, what it saved, what it cost in accuracy, memory
and time.

`print(lm.report)` shows a table with one row for each type of layer and scheme; `lm.report.layers`
has every layer; `lm.report.to_dict()` is the same as plain data.
"""

import dataclasses
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from fp8jax.quantization_config import LayerKind
from fp8jax.schemes import Scheme

# What a scale of the weight covers is in the scheme's name; what one of the activation covers can
# be configured.
_HEADINGS = ("layer type", "count", "scheme", "scale\nper", "MiB\nbefore", "MiB\nafter", "error")

Outcome = Literal["quantized", "ignored", "no scheme", "never quantized"]


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One tensor of the model, fused where the model fuses.

    Args:
        name: the module's name, "model.layers.0.self_attn.qkv_proj"; for a stack of experts
            "model.layers.0.mlp.experts.gate_up_proj".
        kind: "linear" or "moe" for what could be quantized, "other" for embeddings, norms, biases,
            lm_head, routers.
        outcome: what became of it: "ignored" is an `ignore` entry, "no scheme" a kind that was
            given none.
        bytes_before: as in the checkpoint.
        bytes_after: as held, scales included.
        relative_error: ‖dequantized − w‖ / ‖w‖ (Frobenius) over at most 256 evenly spread rows,
            None where nothing was quantized.
        shard_amax: largest |w| of each shard of a fused layer, for a stack over all experts.
            Far-apart values mean that one scale serves some shards badly.
    """

    name: str
    kind: LayerKind | Literal["other"]
    outcome: Outcome
    scheme: Scheme | None
    bytes_before: int
    bytes_after: int
    relative_error: float | None = None
    shard_amax: tuple[float, ...] = ()

    @property
    def type(self) -> str:
        """The name after the last layer index: "self_attn.qkv_proj"."""
        return re.split(r"\.\d+\.", self.name)[-1]


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """A loaded model in numbers: bytes, seconds, and one `LayerReport` a tensor."""

    source: str
    layers: tuple[LayerReport, ...]
    seconds: float
    seconds_by_phase: dict[str, float]
    peak_host_bytes: int
    warnings: tuple[str, ...] = ()

    @property
    def bytes_before(self) -> int:
        """Bytes of all weights as in the checkpoint."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of all weights as held now."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.outcome == "quantized")

    def log_line(self) -> str:
        """The reference's one line: how many layers of which types, from which setting."""
        counts: dict[str, int] = {}
        for layer in self.quantized:
            origin = f"(from {layer.kind}: {layer.scheme.name})" if layer.scheme else ""
            counts[f"{layer.type}|{origin}"] = counts.get(f"{layer.type}|{origin}", 0) + 1
        items = (
            f"{key.split('|')[0]}: {count} {key.split('|')[1]}"
            for key, count in sorted(counts.items())
        )
        left = [f"{self._count('ignored')} ignored"] if self._count("ignored") else []
        left += [
            f"{n} of kind {kind}, which was given no scheme"
            for kind in ("linear", "moe")
            if (n := self._count("no scheme", kind))
        ]
        rest = f"; left unquantized: {', '.join(left)}" if left else ""
        return f"Quantizing {len(self.quantized)} layers of types: {'; '.join(items)}{rest}"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        totals = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        return dataclasses.asdict(self) | totals

    def __str__(self) -> str:
        from rich.console import Console

        # As wide as COLUMNS or the terminal says, 80 where there is none.
        console = Console(file=io.StringIO())
        console.print(self.__rich__())
        text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
        return "\n".join(line.rstrip() for line in text.splitlines())

    def __rich__(self):
        from rich import box
        from rich.table import Table
        from rich.text import Text

        # Text, so that no part of a path is taken for markup; no vertical lines, so that it fits 80
        # columns.
        title, caption = f"{self.source}: loaded in {self.seconds:.1f} s", self._caption()
        table = Table(
            title=Text(title, overflow="fold"),
            caption=caption,
            box=box.SIMPLE,
            padding=(0, 0),
            pad_edge=False,
        )
        for heading in _HEADINGS:
            words = heading in ("layer type", "scheme")
            table.add_column(
                heading, justify="left" if words else "right", overflow="fold", no_wrap=not words
            )
        for row in self._rows():
            table.add_row(*row)
        table.add_section()
        table.add_row("all", "", "", "", _mib(self.bytes_before), _mib(self.bytes_after), "")
        return table

    def _rows(self) -> Iterable[tuple[str, ...]]:
        groups: dict[tuple, list[LayerReport]] = {}
        for layer in self.layers:
            key = (
                (layer.type, layer.outcome, layer.scheme)
                if layer.kind != "other"
                else ("the rest", "", None)
            )
            groups.setdefault(key, []).append(layer)
        # What is never quantized comes last, as one line.
        for (kind, outcome, scheme), group in sorted(
            groups.items(), key=lambda item: item[0][0] == "the rest"
        ):
            errors = [layer.relative_error for layer in group if layer.relative_error is not None]
            yield (
                kind,
                str(len(group)),
                scheme.name if scheme else f"— {outcome}".rstrip(),
                scheme.activation if scheme else "",
                _mib(sum(layer.bytes_before for layer in group)),
                _mib(sum(layer.bytes_after for layer in group)),
                f"{sum(errors) / len(errors):.2%}" if errors else "",
            )

    def _caption(self) -> str:
        phases = ", ".join(
            f"{name} {seconds:.1f} s" for name, seconds in self.seconds_by_phase.items()
        )
        share = self.bytes_after / self.bytes_before if self.bytes_before else 1.0
        return (
            f"{share:.1%} of the checkpoint's bytes; peak private host memory "
            f"{mebibytes(self.peak_host_bytes)}; {phases}"
        )

    def _count(self, outcome: Outcome, kind: LayerKind | None = None) -> int:
        return sum(layer.outcome == outcome and kind in (None, layer.kind) for layer in self.layers)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def mebibytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**20:,.1f} MiB"
