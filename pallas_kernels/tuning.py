"""Tuned tables: for a device and an operation, which config was the fastest on which shape, and how
it was measured.

    pallas_kernels/tuned/<device>/<op>.json        {"device": ..., "op": ..., "entries": [...]}

An entry carries its measurement, the XLA path's time on the same shape where that was taken, the
versions and the date: a config without them is an opinion. `scripts/tune_kernels.py` writes the
tables; `ops` reads them.

A shape is named numbers, `{"m": 16, "n": 4096, "k": 4096}`, and words that must match exactly
(`{"granularity": "token"}`). Distance between two shapes is counted in octaves, log2 of the ratio,
and the largest of them counts: m = 48 is 0.6 octaves from 32 and takes its config. A shape more
than an octave from every entry has no tuned config: a measurement says little about it. Of entries
at the same distance the one wins whose sizes, as they are, differ least in all. Two sizes and one
number are not taken as they are:

    m            Up to 16 rows are one tile, so m below 16 counts as 16.
    slots        (rows that meet `experts`) A tile is 16 slots of one expert, and each tile reads its expert's weights, which is
                 what costs. Spread evenly, r slots are min(experts, r) tiles until every expert has more than 16, then r / 16:
                 the number of tiles counts. From one slot an expert to 16 nothing changes; from 8 slots to 128, 16 times as
                 many experts are read.
    row_groups   1 and 2 are two layouts, not near each other: they must be equal.
"""

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

TUNED = Path(__file__).resolve().parent / "tuned"
_TOKEN_TILE = 16
_EXACT = ("row_groups",)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The fastest config that was found for one shape.

    Args:
        shape: sizes by name (int), and words that must match exactly.
        config: fields of the operation's `Config`.
        microseconds: median time of the kernel with this config.
        xla_microseconds: median time of the XLA path on the same shape; None where it was not
            taken.
        candidates: how many configs were timed.
        versions: of packages, by name.
        date: ISO date of the measurement.
    """

    shape: Mapping[str, int | str]
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


def table_path(device_kind: str, op: str, *, folder: Path = TUNED) -> Path:
    """Where the table lies; "NVIDIA H100 80GB HBM3" gives `nvidia_h100_80gb_hbm3/<op>.json`."""
    return folder / device_folder(device_kind) / f"{op}.json"


def device_folder(device_kind: str) -> str:
    """A device's name as a folder name."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_")


@functools.cache
def load(device_kind: str, op: str, *, folder: Path = TUNED) -> tuple[Entry, ...]:
    """The entries for a device and operation, () where nothing was tuned; read once a process.

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


def nearest(
    entries: Iterable[Entry], shape: Mapping[str, int | str], *, within: float = 1.0
) -> Entry | None:
    """The entry whose shape is nearest, None if none is within so many octaves.

    Args:
        entries: from `load`.
        shape: with the same names as theirs.
        within: the largest distance in any one size.
    """
    reachable = [
        (distances, entry)
        for entry in entries
        if (distances := _octaves(entry.shape, shape)) is not None and distances[0] <= within
    ]
    return min(reachable, key=lambda pair: pair[0], default=(None, None))[1]


def save(device_kind: str, op: str, entries: Iterable[Entry], *, folder: Path = TUNED) -> Path:
    """Write a table in whole, entries sorted by shape; a reader never sees half of one.

    Where two entries have the same shape, the later one stays.
    """
    by_shape = {tuple(sorted(entry.shape.items(), key=str)): entry for entry in entries}
    ordered = sorted(
        by_shape.values(), key=lambda entry: [(isinstance(v, str), v) for v in entry.shape.values()]
    )
    path = table_path(device_kind, op, folder=folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"device": device_kind, "op": op, "entries": [asdict(entry) for entry in ordered]}
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
    load.cache_clear()
    return path


def _octaves(
    tuned: Mapping[str, int | str], wanted: Mapping[str, int | str]
) -> tuple[float, float] | None:
    """The largest distance, and the sum of those of the sizes as they are; None where the two are
    not comparable."""
    if tuned.keys() != wanted.keys():
        return None
    largest = total = 0.0
    for name, value in wanted.items():
        other = tuned[name]
        if isinstance(value, str) or isinstance(other, str) or name in _EXACT:
            if value != other:
                return None
            continue
        largest = max(largest, abs(math.log2(_size(name, wanted) / _size(name, tuned))))
        total += abs(math.log2(max(value, 1) / max(other, 1)))
    return largest, total


def _size(name: str, shape: Mapping[str, int | str]) -> float:
    """What a size counts as; see the module's table."""
    size = max(int(shape[name]), 1)
    if name == "m":
        return max(size, _TOKEN_TILE)
    if name == "slots":
        return max(min(int(shape["experts"]), size), size / _TOKEN_TILE)
    return size
