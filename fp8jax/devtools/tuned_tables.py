"""Writing the tables that `pallas_kernels/tuning.py` reads."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from fp8jax.pallas_kernels.tuning import TUNED, Entry, load, table_path


def save(device_kind: str, op: str, entries: Iterable[Entry], *, folder: Path = TUNED) -> Path:
    """Write a table in whole; whoever reads it meanwhile sees the old one or the new one.

    Args:
        device_kind: as JAX reports it.
        op: name of the operation.
        entries: all of the table; of two with the same shape the later one stays.
        folder: of all tables.
    Returns:
        The file, its entries sorted by shape.
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
