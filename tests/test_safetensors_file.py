"""Reading the header of one safetensors file: what is accepted, what is refused, and what is said
about it."""

import json
import time
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from fp8jax.checkpoints.errors import CheckpointError
from fp8jax.checkpoints.safetensors_file import DTYPES, read_header


def file_bytes(header: object, data: bytes = b"") -> bytes:
    """A safetensors file from a header, as an object or as raw bytes, and a data part."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def u8(begin: int, end: int, **changes: object) -> dict[str, object]:
    """A header entry of `end - begin` bytes, with any of its fields replaced."""
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end], **changes}


def fault_of(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)  # every message says where
    return str(caught.value)


VALID = json.dumps({"a": u8(0, 2)}).encode()

REFUSED = {
    "empty file": (b"", "has 0 bytes"),
    "7 bytes": (b"\2\0\0\0\0\0\0", "has 7 bytes"),
    "length and nothing else": ((2).to_bytes(8, "little"), "claims a header of 2 bytes, holds 0"),
    "header cut short": (file_bytes(VALID, b"ab")[:20], "cut short"),
    "header beyond the limit": (
        file_bytes({})[:0] + (100_000_001).to_bytes(8, "little") + b"{}",
        "allows 100000000",
    ),
    "absurd length": (b"\xff" * 8 + b"{}", "claims a header of 18446744073709551615"),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "git lfs pull",
    ),
    "not UTF-8": (file_bytes(b'{"\xff":1}'), "not UTF-8"),
    "byte order mark": (file_bytes(b"\xef\xbb\xbf{}"), "not valid JSON"),
    "empty header": (file_bytes(b""), "not valid JSON"),
    "padded with NUL": (file_bytes(b"{}\0\0"), "not valid JSON"),
    "two objects": (file_bytes(b"{}{}"), "not valid JSON"),
    "a list": (file_bytes([]), "must hold a JSON object, found []"),
    "a number": (file_bytes(b"1"), "must hold a JSON object, found 1"),
    "NaN": (file_bytes(b'{"__metadata__": NaN}'), "NaN is not a JSON value"),
    "Infinity in a shape": (
        file_bytes(b'{"a": {"shape": [-Infinity]}}'),
        "-Infinity is not a JSON value",
    ),
    "ten thousand digits": (file_bytes(b'{"a": ' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "nested too deeply": (
        file_bytes(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "nested too deeply",
    ),
    "objects nested too deeply": (
        file_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "nested too deeply",
    ),
    "the same tensor twice": (
        file_bytes(VALID[:-1] + b"," + VALID[1:], b"ab"),
        "key a occurs twice",
    ),
    "the same field twice": (
        file_bytes(VALID.replace(b'"dtype"', b'"dtype": "U8", "dtype"'), b"ab"),
        "key dtype occurs",
    ),
    "metadata with a number": (
        file_bytes({"__metadata__": {"format": 1}}),
        "__metadata__.format: must be a string",
    ),
    "metadata as a list": (file_bytes({"__metadata__": []}), "__metadata__ must be an object"),
    "an entry that is a list": (file_bytes({"a": [1]}), "tensor a: expected an object"),
    "an empty name": (file_bytes({"": u8(0, 2)}, b"ab"), "tensor '': a name must be"),
    "NUL in a name": (file_bytes({"a\0b": u8(0, 2)}, b"ab"), "tensor 'a\\x00b': a name must be"),
    "half a surrogate pair": (file_bytes(b'{"\\ud800": 1}'), "tensor '\\ud800': a name must be"),
    "no dtype": (
        file_bytes({"a": {"shape": [0], "data_offsets": [0, 0]}}),
        "tensor a: has no dtype",
    ),
    "no shape": (
        file_bytes({"a": {"dtype": "U8", "data_offsets": [0, 0]}}),
        "tensor a: has no shape",
    ),
    "no offsets": (
        file_bytes({"a": {"dtype": "U8", "shape": [0]}}),
        "tensor a: has no data_offsets",
    ),
    "lower-case dtype": (
        file_bytes({"a": u8(0, 2, dtype="u8")}, b"ab"),
        "unknown dtype 'u8'; known are BOOL, I8",
    ),
    "dtype that is no string": (
        file_bytes({"a": u8(0, 2, dtype=["U8"])}, b"ab"),
        "unknown dtype ['U8']",
    ),
    "packed dtype": (
        file_bytes({"a": u8(0, 2, dtype="F4", shape=[4])}, b"ab"),
        "F4 packs several values",
    ),
    "shape that is no list": (file_bytes({"a": u8(0, 2, shape=2)}, b"ab"), "shape must be a list"),
    "negative dimension": (file_bytes({"a": u8(0, 2, shape=[-2, -1])}, b"ab"), "found [-2, -1]"),
    "dimension 2.0": (file_bytes({"a": u8(0, 2, shape=[2.0])}, b"ab"), "found [2.0]"),
    "dimension 2e0": (file_bytes(VALID.replace(b"[2]", b"[2e0]"), b"ab"), "found [2.0]"),
    "true as a dimension": (file_bytes({"a": u8(0, 1, shape=[True])}, b"a"), "found [True]"),
    "65 dimensions": (file_bytes({"a": u8(0, 1, shape=[1] * 65)}, b"a"), "65 dimensions"),
    "product beyond u64": (
        file_bytes({"a": u8(0, 0, shape=[2**32, 2**32])}),
        "larger than any array",
    ),
    "dimension beyond i64": (
        file_bytes({"a": u8(0, 0, shape=[0, 2**63])}),
        "larger than any array",
    ),
    "dimension of 4000 digits": (
        file_bytes({"a": u8(0, 0, shape=[10**4000] * 64)}),
        "larger than any array",
    ),
    "zero times too much": (
        file_bytes({"a": u8(0, 0, shape=[0, 2**62, 2**62])}),
        "larger than any array",
    ),
    "one offset": (
        file_bytes({"a": u8(0, 2, data_offsets=[0])}, b"ab"),
        "data_offsets must be two",
    ),
    "three offsets": (
        file_bytes({"a": u8(0, 2, data_offsets=[0, 2, 2])}, b"ab"),
        "data_offsets must be two",
    ),
    "negative offset": (
        file_bytes({"a": u8(0, 2, data_offsets=[-2, 0])}, b"ab"),
        "data_offsets must be two",
    ),
    "false as an offset": (
        file_bytes({"a": u8(0, 2, data_offsets=[False, 2])}, b"ab"),
        "data_offsets must be two",
    ),
    "float offset": (
        file_bytes({"a": u8(0, 2, data_offsets=[0, 2.0])}, b"ab"),
        "data_offsets must be two",
    ),
    "offset of 4000 digits": (
        file_bytes({"a": u8(0, 2, data_offsets=[0, 10**4000])}, b"ab"),
        "beyond the end of any file",
    ),
    "offsets reversed": (
        file_bytes({"a": u8(0, 2, data_offsets=[2, 0])}, b"ab"),
        "end before they begin",
    ),
    "shape and offsets disagree": (
        file_bytes({"a": u8(0, 2, dtype="F32")}, b"ab"),
        "F32[2] needs 8 bytes, data_offsets",
    ),
    "first byte unused": (
        file_bytes({"a": u8(1, 3)}, b"abc"),
        "tensor a: begins at 1, leaves a hole after the start",
    ),
    "a hole": (
        file_bytes({"a": u8(0, 2), "b": u8(3, 5)}, b"abcde"),
        "tensor b: begins at 3, leaves a hole after tensor a",
    ),
    "an overlap": (
        file_bytes({"a": u8(0, 2), "b": u8(1, 3)}, b"abc"),
        "tensor b: begins at 1, overlaps tensor a",
    ),
    "two names for one range": (
        file_bytes({"a": u8(0, 2), "b": u8(0, 2)}, b"ab"),
        "tensor b: begins at 0, overlaps",
    ),
    "an empty tensor inside another": (
        file_bytes({"a": u8(0, 2), "b": u8(1, 1)}, b"ab"),
        "tensor b: begins at 1, overlaps",
    ),
    "data cut short": (
        file_bytes({"a": u8(0, 2)}, b"a"),
        "describes 2 bytes of data, the file holds 1; it was cut",
    ),
    "data appended": (
        file_bytes({"a": u8(0, 2)}, b"abc"),
        "describes 2 bytes of data, the file holds 3; something",
    ),
    "data without tensors": (file_bytes({}, b"a"), "describes 0 bytes of data, the file holds 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_malformed_file_is_refused_with_the_fault_named(case: str, tmp_path: Path):
    content, expected = REFUSED[case]
    assert expected in fault_of(tmp_path / "x.safetensors", content)


ACCEPTED = {
    "no tensors": (b"{}", b"", {}),
    "only metadata": (b'{"__metadata__": {"format": "pt"}}', b"", {}),
    "metadata null": (b'{"__metadata__": null}', b"", {}),
    "spaces around": (b"  " + VALID + b"   ", b"ab", {"a": (2,)}),
    "an unknown field": ({"a": u8(0, 2, note={"x": [1.5]})}, b"ab", {"a": (2,)}),
    "a scalar": ({"a": u8(0, 1, shape=[])}, b"a", {"a": ()}),
    "zero dimensions": (
        {"a": u8(0, 0, shape=[0, 3]), "b": u8(0, 1), "c": u8(1, 1)},
        b"a",
        {"a": (0, 3), "b": (1,), "c": (0,)},
    ),
    "any order": ({"b": u8(1, 3), "a": u8(0, 1)}, b"abc", {"b": (2,), "a": (1,)}),
    "64 dimensions": ({"a": u8(0, 1, shape=[1] * 64)}, b"a", {"a": (1,) * 64}),
    "any script": ({"重み": u8(0, 1)}, b"a", {"重み": (1,)}),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_an_unusual_but_valid_file_is_accepted(case: str, tmp_path: Path):
    header, data, shapes = ACCEPTED[case]
    (tmp_path / "x.safetensors").write_bytes(file_bytes(header, data))
    assert {
        name: info.shape for name, info in read_header(tmp_path / "x.safetensors").items()
    } == shapes


def test_offsets_are_counted_from_the_start_of_the_file(tmp_path: Path):
    content = file_bytes({"a": u8(0, 3), "b": u8(3, 8)}, b"abcdefgh")
    (tmp_path / "x.safetensors").write_bytes(content)
    info = read_header(tmp_path / "x.safetensors")["b"]
    assert content[info.begin : info.end] == b"defgh"
    assert info.nbytes == 5
    assert info.dtype == np.uint8
    assert info.file == tmp_path / "x.safetensors"


def test_every_dtype_that_the_official_writer_writes_is_recognised(tmp_path: Path):
    written = {
        "BOOL": np.bool_, "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
        "U8": np.uint8,
        "U16": np.uint16, "U32": np.uint32, "U64": np.uint64, "F16": np.float16, "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
    }  # fmt: skip
    arrays = {name: np.ones((2, 3), dtype=dtype) for name, dtype in written.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    assert {name: info.dtype for name, info in header.items()} == {
        name: np.dtype(t) for name, t in written.items()
    }
    # The NumPy writer has no "FNUZ" kinds, and E8M0 from safetensors 0.6 on: written by hand.
    unwritten = DTYPES.keys() - written.keys()
    assert unwritten == {"F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"}
    for name in unwritten:
        (tmp_path / "x.safetensors").write_bytes(file_bytes({"a": u8(0, 2, dtype=name)}, b"ab"))
        assert read_header(tmp_path / "x.safetensors")["a"].dtype == DTYPES[name]


def test_all_faults_of_a_file_are_reported_together(tmp_path: Path):
    header = {
        "a": u8(0, 2, dtype="Q7"),
        "b": u8(2, 4, shape=[-1]),
        "__metadata__": {"k": 3},
        "c": u8(4, 6),
    }
    message = fault_of(tmp_path / "x.safetensors", file_bytes(header, b"abcdef"))
    assert "3 faults" in message
    assert all(
        part in message for part in ("tensor a: unknown dtype", "tensor b: shape", "__metadata__.k")
    )
    assert "tensor c" not in message  # what is sound is not blamed for its neighbours


def test_a_long_list_of_faults_is_cut_and_counted(tmp_path: Path):
    header = {f"t{i}": u8(0, 2, dtype="Q7") for i in range(25)}
    message = fault_of(tmp_path / "x.safetensors", file_bytes(header))
    assert "25 faults" in message
    assert message.count("\n  - ") == 21  # 20 faults and the line that counts the rest
    assert message.endswith("... and 5 more")


def test_a_hostile_name_cannot_garble_or_flood_the_message(tmp_path: Path):
    message = fault_of(
        tmp_path / "x.safetensors", file_bytes({"\x1b[2J" + "n" * 10_000: 1, "b": "v" * 10_000})
    )
    assert "\x1b" not in message
    assert len(message) < 1_000


@pytest.mark.parametrize(
    "kind", ["missing", "folder", "below a file", "link to itself", "NUL in the path"]
)
def test_what_cannot_be_read_as_a_file_is_a_checkpoint_error(kind: str, tmp_path: Path):
    path = tmp_path / "x.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "below a file":
        path.write_bytes(b"")
        path = path / "y.safetensors"
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "NUL in the path":
        path = tmp_path / "x\0.safetensors"
    with pytest.raises(CheckpointError, match=r"cannot be read|not a regular file"):
        read_header(path)


@pytest.mark.parametrize("claimed", [99_999_999, 100_000_001, 2**40, 2**63, 2**64 - 1])
def test_nothing_is_allocated_by_what_a_header_length_claims(claimed: int, tmp_path: Path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(claimed.to_bytes(8, "little") + b"{}" * 50)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="claims a header"):
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (
        peak < 1_000_000
    )  # the smallest claim is a hundred times this; the error itself needs a few kB


def test_a_header_of_18432_tensors_takes_a_few_times_as_long_as_parsing_its_json(tmp_path: Path):
    header = {
        f"model.layers.{i // 384}.mlp.experts.{i % 384}.gate_proj.weight": u8(2 * i, 2 * i + 2)
        for i in range(18432)
    }
    content = file_bytes(header, bytes(2 * 18432))
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    raw = content[8 : -2 * 18432]

    def seconds(action: object, *arguments: object) -> float:
        assert callable(action)
        times = []
        for _ in range(3):
            start = time.process_time()
            action(*arguments)
            times.append(time.process_time() - start)
        return min(times)

    # Measured: 4 to 7 times. A check that is quadratic in the number of tensors would be hundreds
    # of times.
    assert seconds(read_header, path) < 20 * seconds(json.loads, raw)
