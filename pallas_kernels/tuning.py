"""Tuned tables: the fastest config of a kernel on a device, for each shape that was timed.

    pallas_kernels/tuned/<device>/<op>.json        {"device": ..., "op": ..., "entries": [...]}

An entry is a shape, the fastest config on it, and how that was measured: a config without its
measurement is an opinion. Tables are written by `scripts/tune_kernels.py`; here they are only read.

A shape is sizes, `{"m": 16, "n": 4096, "k": 4096}`, and words, `{"scales": "block"}`. Words must
match exactly. The distance of two sizes is counted in octaves, log2 of their ratio, and the largest
of these is the distance of two shapes: from m = 32, m = 48 is 0.6 octaves away. A kernel runs with
the config of the nearest entry, unless that is more than an octave away: so far off, a measurement
says little. Of entries at the same distance the one wins whose sizes differ least in sum.

What counts is the work that a size stands for, which is not always the size:

    m           Up to 16 rows are one tile: fewer count as 16.
    slots       Rows that are spread over `experts`; what costs is the tiles, each of which reads
                its expert's weights. r slots of e experts are min(e, r) tiles of at most 16, or
                r / 16 where every expert has more than 16.
    row_groups  1 and 2 are two layouts, not near each other: it is a word that looks like a number.
"""

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Shape = Mapping[str, int | str]

TUNED = Path(__file__).resolve().parent / "tuned"
_TOKEN_TILE = 16
_WORDS = ("row_groups",)  # by name; besides, all that are strings


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The fastest config that was found for one shape.

    Args:
        shape: sizes and words by name.
        config: fields of the operation's `Config`.
        microseconds: median time of the kernel with this config.
        xla_microseconds: median time of the XLA path on the same shape; None where it was not
            taken.
        candidates: how many configs were timed.
        versions: of packages, by name.
        date: ISO date of the measurement.
    """

    shape: Shape
    config: Mapping[str, Any]
    microseconds: float
    versions: Mapping[str, str]
    date: str
    candidates: int = 1
    xla_microseconds: float | None = None

    @property
    def implementation(self) -> Literal["triton", "xla"]:
        """What was faster on this shape."""
        beaten = self.xla_microseconds is not None and self.xla_microseconds < self.microseconds
        return "xla" if beaten else "triton"


@functools.cache
def load(device_kind: str, op: str, *, folder: Path = TUNED) -> tuple[Entry, ...]:
    """The entries for a device and operation; read once a process.

    Args:
        device_kind: as JAX reports it.
        op: name of the operation.
        folder: of all tables.
    Returns:
        The entries, () where nothing was tuned.
    Raises:
        ValueError: the file is no table of this device and operation.
    """
    path = table_path(device_kind, op, folder=folder)
    if not path.exists():
        return ()
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if (table["device"], table["op"]) != (device_kind, op):
            raise ValueError(f"it is for {table['op']} on {table['device']!r}")
        return tuple(Entry(**entry) for entry in table["entries"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not a tuned table for {op} on {device_kind!r} ({error}); write it with "
            "scripts/tune_kernels.py"
        ) from error


def table_path(device_kind: str, op: str, *, folder: Path = TUNED) -> Path:
    """Where the table lies; "NVIDIA H100 80GB HBM3" gives `nvidia_h100_80gb_hbm3/<op>.json`."""
    return folder / device_folder(device_kind) / f"{op}.json"


def device_folder(device_kind: str) -> str:
    """A device's name as a folder name."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_")


def nearest(entries: Iterable[Entry], shape: Shape, *, within: float = 1.0) -> Entry | None:
    """The entry whose shape is nearest.

    Args:
        entries: from `load`.
        shape: what is to be run.
        within: the largest distance, in octaves.
    Returns:
        The entry, None if none of these names and words is within that distance.
    """
    comparable = (
        entry
        for entry in entries
        if entry.shape.keys() == shape.keys() and _words(entry.shape) == _words(shape)
    )
    near = [
        (distance, entry)
        for entry in comparable
        if (distance := max(_octaves(_work(entry.shape), _work(shape)), default=0.0)) <= within
    ]

    def order(pair: tuple[float, Entry]) -> tuple[float, float]:
        distance, entry = pair
        return distance, sum(_octaves(_sizes(entry.shape), _sizes(shape)))

    return min(near, key=order, default=(0.0, None))[1]


def _words(shape: Shape) -> dict[str, int | str]:
    return {n: value for n, value in shape.items() if isinstance(value, str) or n in _WORDS}


def _sizes(shape: Shape) -> dict[str, float]:
    """The sizes as they are; one of 0 counts as 1, so that it has a distance too."""
    return {
        name: max(value, 1)
        for name, value in shape.items()
        if not isinstance(value, str) and name not in _WORDS
    }


def _work(shape: Shape) -> dict[str, float]:
    """The sizes as the work that they stand for: see the module's table."""
    work = _sizes(shape)
    if "m" in work:
        work["m"] = max(work["m"], _TOKEN_TILE)
    if "slots" in work:
        slots = work["slots"]
        work["slots"] = max(min(work["experts"], slots), slots / _TOKEN_TILE)
    return work


def _octaves(sizes: Mapping[str, float], others: Mapping[str, float]) -> list[float]:
    return [abs(math.log2(others[name] / size)) for name, size in sizes.items()]
