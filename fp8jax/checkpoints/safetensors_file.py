"""One safetensors file: a header that says where each tensor lies, believed only after every byte
is accounted for.

    8 bytes     N, an unsigned integer, little endian
    N bytes     JSON: {"name": {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64]},
                       "__metadata__": …}
    the rest    tensor bytes, row-major, little endian, no gaps

Offsets count from the start of the data part. The format's own rule makes a strong check possible:
sorted by offset, the tensors must tile the data part exactly, from byte 0 to the last. A file that
was cut short, padded or patched breaks the tiling, so nothing of it is handed out.

Why not the `safetensors` package: its NumPy interface cannot return FP8 or E8M0 tensors, and it
maps the file, which kills the process if the file is cut short meanwhile. Reading the header alone
(this file) costs milliseconds whatever the size of the model; data is read when it is wanted
(`checkpoint.py`).

A header comes from strangers. Its length is compared with the file's before anything is allocated,
`json` gets its blind spots covered (duplicate keys, NaN, endless nesting, `true` counted as the
integer 1), and every number is bounded before arithmetic. All faults of a file are reported
together.

Source: the format description in the safetensors repository; the list of what its reader rejects
was checked by feeding it hand-made files.
"""

import io
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fp8jax.checkpoints.errors import CheckpointError, Faults, shown
from fp8jax.checkpoints.errors import shown_value as _short
from fp8jax.checkpoints.file_reading import FileStamp, NotRegularError, open_regular, reason

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),  # "fn": no infinities, largest value 448
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
PACKED_DTYPES = (
    "F4",
    "F6_E2M3",
    "F6_E3M2",
)  # several values share a byte: no NumPy dtype views them in place

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
MAX_DIMENSIONS = 64  # NumPy's limit
MAX_SIZE = 2**63 - 1  # what an array index can count


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes `begin` to `end` of `file`, counted from the start of the
    file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Reads and checks the header of one safetensors file.

    Args:
        path: the file; tensor data is not read.

    Returns:
        The tensors by name, in the order of the header.

    Raises:
        CheckpointError: the file cannot be opened, or its header and its length do not fit together
            in every detail.

    Source: the safetensors format.
    """
    return read_stamped_header(Path(path))[0]


def read_stamped_header(path: Path) -> tuple[dict[str, TensorInfo], FileStamp]:
    """`read_header`, and the stamp of the file that the header was read from."""
    header, stamp = _header_bytes(path)
    data_start = 8 + len(header)

    faults = Faults()
    entries = parse_object(header, faults)
    _check_metadata(entries.pop("__metadata__", None), faults)
    tensors = {}
    for name, entry in entries.items():
        if info := _tensor_info(name, entry, path, data_start, faults):
            tensors[name] = info
    if not faults:  # offsets mean something only once every entry is sound
        _check_tiling(tensors, data_start, stamp.size, faults)
    if faults:
        raise CheckpointError.gather(str(path), faults)
    return tensors, stamp


def parse_object(raw: bytes, faults: Faults, *, strict: bool = True) -> dict[str, Any]:
    """Parses bytes that must be one JSON object; on failure appends to `faults` and returns an
    empty one.

    `strict` refuses duplicate keys, of which `json` would silently keep the last, and NaN and
    Infinity, which JSON does not have. Configurations are read without it: `json.dump` writes such
    constants into real ones.
    """
    duplicates = Faults()

    def pairs_to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            duplicates.extend(_twice(key) for key, _ in pairs if key in seen or seen.add(key))
        return result

    hooks: dict[str, Any] = {}
    if strict:
        hooks = {"object_pairs_hook": pairs_to_dict, "parse_constant": _refuse_constant}
    try:
        value = json.loads(raw.decode("utf-8"), **hooks)
    except UnicodeDecodeError as error:
        faults.append(
            f"not UTF-8 ({error.reason} at byte {error.start}); the file is damaged, fetch it again"
        )
        return {}
    except (
        ValueError
    ) as error:  # malformed JSON, a refused constant, an integer of thousands of digits
        faults.append(f"not valid JSON ({error}); the file is damaged, fetch it again")
        return {}
    except RecursionError:
        faults.append(
            "JSON is nested too deeply to be read; no checkpoint needs that, the file is not to "
            "be trusted"
        )
        return {}
    faults.merge(duplicates)
    if not isinstance(value, dict):
        faults.append(f"must hold a JSON object, found {_short(value)}")
        return {}
    return value


def _twice(key: str) -> str:
    return f"the key {shown(key)} occurs twice in one JSON object; remove one"


def _header_bytes(path: Path) -> tuple[bytes, FileStamp]:
    """Returns the header's bytes and the stamp of the file."""
    try:
        raw, stamp = open_regular(path)
        file_bytes = stamp.size
        with io.BufferedReader(raw) as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            # The length is only a claim: it is compared with the file before anything is allocated
            # by it.
            if len(prefix) == 8 and length <= min(MAX_HEADER_BYTES, file_bytes - 8):
                header = file.read(length)
                if len(header) == length:
                    return header, stamp
            beginning = prefix + file.read(16)
    except NotRegularError as error:
        fault = f"is {error}, not a regular file; expected a safetensors file"
        raise CheckpointError.gather(shown(str(path)), [fault]) from error
    except (OSError, ValueError) as error:  # ValueError: a path that no file system can hold
        raise CheckpointError.gather(shown(str(path)), [reason(error)]) from error

    if beginning.startswith(b"version https://git-lfs"):
        fault = "is a Git LFS pointer, not the weights; fetch them with `git lfs pull`"
    elif file_bytes < 8:
        fault = (
            f"has {file_bytes} bytes, a safetensors file has at least 8; "
            "it was cut short or never written"
        )
    elif length > MAX_HEADER_BYTES:
        fault = (
            f"claims a header of {length} bytes, the format allows "
            f"{MAX_HEADER_BYTES}; not a safetensors file"
        )
    else:
        fault = (
            f"claims a header of {length} bytes, holds {file_bytes - 8} in all; "
            "cut short? fetch it again"
        )
    raise CheckpointError.gather(str(path), [fault])


def _tensor_info(
    name: str, entry: Any, path: Path, data_start: int, faults: Faults
) -> TensorInfo | None:
    """Checks one header entry by itself; returns None after appending to `faults` what is wrong
    with it."""
    wrong = _entry_faults(name, entry)
    if not wrong:
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        needed = math.prod(shape) * dtype.itemsize
        # NumPy refuses a shape like (0, 2**62, 2**62) too, so zero dimensions do not excuse the
        # others.
        extent = needed if needed else math.prod(size or 1 for size in shape) * dtype.itemsize
        if needed == end - begin and extent <= MAX_SIZE:
            return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, data_start + end)
        array = f"{entry['dtype']}{_short(shape)}"
        if extent > MAX_SIZE:
            wrong.append(f"{array} is larger than any array can be")
        else:
            wrong.append(
                f"{array} needs {needed} bytes, data_offsets [{begin}, {end}] hold {end - begin}"
            )
    faults.extend(f"tensor {shown(name)}: {text}" for text in wrong)
    return None


def _entry_faults(name: str, entry: Any) -> list[str]:
    """Returns what is wrong with the parts of an entry; empty if each is what it should be."""
    wrong: list[str] = []
    if not name or "\0" in name or not (name.isascii() or _is_unicode(name)):
        wrong.append(
            "a name must be non-empty text without NUL bytes or lone surrogates; rewrite the file"
        )
    if not isinstance(entry, dict):
        return [
            *wrong,
            f"expected an object with dtype, shape and data_offsets, found {_short(entry)}",
        ]
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except KeyError as error:
        return [*wrong, f"has no {error.args[0]}; dtype, shape and data_offsets are needed"]

    if dtype in PACKED_DTYPES:
        wrong.append(
            f"dtype {dtype} packs several values into a byte: not supported; use BF16 or FP16 "
            "weights"
        )
    elif not isinstance(dtype, str) or dtype not in DTYPES:
        wrong.append(
            f"unknown dtype {_short(dtype)}; known are {', '.join([*DTYPES, *PACKED_DTYPES])}"
        )
    if not isinstance(shape, list) or not all(map(_is_natural, shape)):
        wrong.append(f"shape must be a list of integers from 0 up, found {_short(shape)}")
    elif len(shape) > MAX_DIMENSIONS:
        wrong.append(f"shape has {len(shape)} dimensions, at most {MAX_DIMENSIONS} can be held")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_natural, offsets)):
        wrong.append(f"data_offsets must be two integers from 0 up, found {_short(offsets)}")
    elif offsets[1] < offsets[0]:
        wrong.append(f"data_offsets end before they begin: {_short(offsets)}")
    elif offsets[1] > MAX_SIZE:  # bounded before anything is computed from it
        wrong.append(f"data_offsets {_short(offsets)} are beyond the end of any file")
    return wrong


def _check_tiling(
    tensors: dict[str, TensorInfo], data_start: int, file_bytes: int, faults: Faults
) -> None:
    """Checks that the tensors, sorted by offset, cover the data part without hole, overlap or
    remainder."""
    reached, previous = data_start, None
    for info in sorted(tensors.values(), key=lambda info: (info.begin, info.end)):
        if info.begin != reached:
            kind = "overlaps" if info.begin < reached else "leaves a hole after"
            before = (
                f"tensor {shown(previous.name)}, which ends"
                if previous
                else "the start of the data,"
            )
            begin, expected = info.begin - data_start, reached - data_start
            faults.append(
                f"tensor {shown(info.name)}: begins at {begin}, {kind} {before} at {expected}"
            )
        reached, previous = max(reached, info.end), info
    if reached != file_bytes:
        described, held = reached - data_start, file_bytes - data_start
        hint = (
            "it was cut short, fetch it again"
            if held < described
            else "something was appended to it"
        )
        faults.append(
            f"the header describes {described} bytes of data, the file holds {held}; {hint}"
        )


def _check_metadata(metadata: Any, faults: Faults) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        faults.append(f"__metadata__ must be an object of strings, found {_short(metadata)}")
        return
    wrong = [key for key, value in metadata.items() if not isinstance(value, str)]
    faults.extend(
        f"__metadata__.{shown(key)}: must be a string, found {_short(metadata[key])}"
        for key in wrong
    )


def _is_natural(value: Any) -> bool:
    return type(value) is int and value >= 0  # `type`, because True is an int too


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, written as an escape
        return False
    return True


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON value")
