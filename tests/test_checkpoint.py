"""Opening a checkpoint folder or a cached hub repository, reading its tensors, refusing what is
malformed."""

import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from fp8jax.checkpoints.folder import Checkpoint, CheckpointError

INDEX = "model.safetensors.index.json"
SHARDS = {
    "model-00001-of-00002.safetensors": {"a": np.arange(6, dtype=np.float32).reshape(2, 3)},
    "model-00002-of-00002.safetensors": {
        "b": np.ones(4, np.int8),
        "c": np.zeros((2, 2), np.float16),
    },
}


def write_folder(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    config: object = None,
    file: str = "model.safetensors",
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({} if config is None else config))
    safetensors.numpy.save_file(dict(tensors), folder / file)
    return folder


def write_shards(folder: Path, weight_map: Mapping[str, Any] | None = None) -> Path:
    """A folder with two shards and an index, by default the right one."""
    for file, tensors in SHARDS.items():
        write_folder(folder, tensors, file=file)
    right = {name: file for file, tensors in SHARDS.items() for name in tensors}
    (folder / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": right if weight_map is None else weight_map})
    )
    return folder


def fault_of(folder: str | os.PathLike[str], **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder, **options)
    return str(caught.value)


# --- reading

DTYPES = [
    np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64,
    np.float16, np.float32,
    np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2,
    ml_dtypes.float8_e8m0fnu,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_every_dtype_is_read_back_bit_for_bit(dtype: type, tmp_path: Path):
    if dtype is ml_dtypes.float8_e8m0fnu:
        pytest.importorskip("safetensors", "0.6")  # older ones do not write it
    size = np.dtype(dtype).itemsize
    every_byte = np.arange(256 * size, dtype=np.uint32).astype(np.uint8)
    values = (every_byte % 2 if dtype is np.bool_ else every_byte).view(dtype).reshape(2, 128)
    written = {"x": values, "scalar": values[0, 3:4].reshape(()), "empty": values[:0]}
    with Checkpoint.open(write_folder(tmp_path, written)) as checkpoint:
        for name, expected in written.items():
            array = checkpoint.read(name)
            assert array.dtype == dtype
            assert array.shape == expected.shape
            assert array.tobytes() == expected.tobytes()


def test_data_at_an_odd_offset_is_read_correctly(tmp_path: Path):
    values = np.arange(12, dtype=np.float32)
    header = json.dumps({"x": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}}).encode()
    header += b" " * (1 - len(header) % 2)  # an odd length puts every float across a word boundary
    write_folder(tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + values.tobytes()
    )
    array = Checkpoint.open(tmp_path).read("x")
    assert array.ctypes.data % 64 == 0  # what XLA can use in place
    np.testing.assert_array_equal(array, values.reshape(3, 4))


def test_what_was_read_belongs_to_the_reader(tmp_path: Path):
    folder = write_folder(tmp_path, {"x": np.arange(8, dtype=np.float32)})
    with Checkpoint.open(folder) as checkpoint:
        first, second = checkpoint.read("x"), checkpoint.read("x")
    first[0] = 9
    (folder / "model.safetensors").unlink()
    np.testing.assert_array_equal(second, np.arange(8))


@pytest.mark.parametrize(
    "rows", [slice(1, 3), slice(None), slice(2, None), slice(-1, None), slice(3, 99), slice(4, 2)]
)
def test_rows_are_read_as_numpy_slices_them(rows: slice, tmp_path: Path):
    stack = np.arange(60, dtype=np.float16).reshape(5, 3, 4)
    with Checkpoint.open(write_folder(tmp_path, {"before": np.ones(7), "x": stack})) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("x", rows), stack[rows])


def test_rows_cost_their_own_size_in_memory(tmp_path: Path):
    with Checkpoint.open(
        write_folder(tmp_path, {"x": np.zeros((64, 1 << 16), np.float32)})
    ) as checkpoint:
        tracemalloc.start()
        checkpoint.read("x", slice(5, 6))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2 << 18  # one row has 2**18 bytes, the tensor 64 times as much


def test_rows_that_are_no_plain_slice_and_arrays_that_do_not_fit_are_refused(tmp_path: Path):
    checkpoint = Checkpoint.open(
        write_folder(tmp_path, {"x": np.zeros((4, 2)), "scalar": np.zeros(())})
    )
    for name, rows in [("x", slice(0, 4, 2)), ("scalar", slice(0, 1))]:
        with pytest.raises(ValueError, match="give a slice without steps"):
            checkpoint.read(name, rows)
    for out, first in [
        (np.zeros(9), 0),
        (np.zeros(2), 7),
        (np.zeros(2), -1),
        (np.zeros(2, np.float32), 0),
    ]:
        with pytest.raises(
            ValueError, match="give a contiguous array of its dtype that ends where the tensor does"
        ):
            checkpoint.read_into("x", out, first=first)
    with pytest.raises(ValueError, match="contiguous"):
        checkpoint.read_into("x", np.zeros((4, 4))[:, ::2])


def test_an_array_outlives_its_checkpoint_but_a_closed_checkpoint_reads_no_more(tmp_path: Path):
    with Checkpoint.open(write_folder(tmp_path, {"x": np.arange(9.0)})) as checkpoint:
        array = checkpoint.read("x")
    np.testing.assert_array_equal(array, np.arange(9.0))
    with pytest.raises(CheckpointError, match="is closed; open it again"):
        checkpoint.read("x")


def test_an_unknown_name_lists_the_closest_ones(tmp_path: Path):
    checkpoint = Checkpoint.open(
        write_folder(tmp_path, {"model.norm.weight": np.zeros(1), "lm_head.weight": np.zeros(1)})
    )
    with pytest.raises(
        CheckpointError,
        match=r"has no tensor model\.norms\.weight; the closest are model\.norm\.weight",
    ):
        checkpoint.read("model.norms.weight")
    with pytest.raises(CheckpointError, match="has no tensor zzz; none of its 2 names"):
        checkpoint.read("zzz")


# --- folders


def test_a_sharded_folder_is_opened_through_its_index(tmp_path: Path):
    with Checkpoint.open(str(write_shards(tmp_path))) as checkpoint:
        assert {name: info.file.name for name, info in checkpoint.tensors.items()} == {
            name: file for file, tensors in SHARDS.items() for name in tensors
        }
        np.testing.assert_array_equal(
            checkpoint.read("a"), SHARDS["model-00001-of-00002.safetensors"]["a"]
        )
        np.testing.assert_array_equal(
            checkpoint.read("b"), SHARDS["model-00002-of-00002.safetensors"]["b"]
        )


def test_a_single_file_wins_over_an_index_as_in_transformers(tmp_path: Path):
    write_folder(write_shards(tmp_path), {"only": np.zeros(1)})
    assert list(Checkpoint.open(tmp_path).tensors) == ["only"]


def test_other_weight_files_beside_the_checkpoint_are_left_alone(tmp_path: Path):
    write_shards(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"not read")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    assert set(Checkpoint.open(tmp_path).tensors) == {"a", "b", "c"}


def test_configuration_files_are_returned_as_they_are(tmp_path: Path):
    write_folder(tmp_path, {}, {"model_type": "llama", "limit": float("inf")})
    assert Checkpoint.open(tmp_path).generation_config == {}
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config == {
        "model_type": "llama",
        "limit": float("inf"),
    }  # json.dump writes such constants
    assert checkpoint.generation_config == {"temperature": 0.6}


@pytest.mark.parametrize(
    "content, expected",
    [
        (None, "config.json: missing"),
        (b"", "config.json: not valid JSON"),
        (b"{", "config.json: not valid JSON"),
        (b"[1]", "config.json: must hold a JSON object, found [1]"),
        (b"\xff", "config.json: not UTF-8"),
        (b"[" * 100_000, "config.json: JSON is nested too deeply"),
    ],
)
def test_a_bad_config_is_refused(content: bytes | None, expected: str, tmp_path: Path):
    write_folder(tmp_path, {})
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    assert expected in fault_of(tmp_path)


FIRST, SECOND = SHARDS
BAD_INDEXES = {
    "tensor that its shard lacks": (
        {"a": FIRST, "b": SECOND, "c": SECOND, "d": FIRST},
        f"tensor d: the index has it in {FIRST}, which lacks it",
    ),
    "tensor not in the index": (
        {"a": FIRST, "b": SECOND},
        f"tensor c: in {SECOND}, but the index has it nowhere",
    ),
    "tensor in the wrong shard": (
        {"a": FIRST, "b": FIRST, "c": SECOND},
        f"tensor b: in {SECOND}, but the index has it in {FIRST}",
    ),
    "missing shard": (
        {"a": FIRST, "b": SECOND, "c": "gone.safetensors"},
        "gone.safetensors: missing; the index puts 1",
    ),
    "parent folder": ({"a": "../model.safetensors"}, "../model.safetensors is not the plain name"),
    "subfolder": ({"a": "x/model.safetensors"}, "x/model.safetensors is not the plain name"),
    "absolute path": ({"a": "/etc/passwd"}, "/etc/passwd is not the plain name"),
    "backslashes": ({"a": "..\\model.safetensors"}, "is not the plain name"),
    "NUL": ({"a": "x\0.safetensors"}, "'x\\x00.safetensors' is not the plain name"),
    "very long name": ({"a": "x" * 5000 + ".safetensors"}, "(5012 characters): missing"),
    "pickled shard": (
        {"a": "pytorch_model.bin"},
        "pytorch_model.bin is not the plain name of a .safetensors",
    ),
    "number for a file": (
        {"a": 1},
        "weight_map must be an object that maps tensor names to file names",
    ),
    "a list": ([], "weight_map must be an object"),
    "empty": ({}, "weight_map must be an object"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_an_index_that_does_not_match_the_shards_is_refused(case: str, tmp_path: Path):
    weight_map, expected = BAD_INDEXES[case]
    write_shards(tmp_path).joinpath(INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert expected in fault_of(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path):
    write_shards(tmp_path)
    safetensors.numpy.save_file({**SHARDS[SECOND], "a": np.zeros(1)}, tmp_path / SECOND)
    assert f"tensor a: in both {FIRST} and {SECOND}" in fault_of(tmp_path)


def test_a_tensor_twice_in_the_index_is_refused(tmp_path: Path):
    text = (
        f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}", "b": "{SECOND}", "c": "{SECOND}"}}}}'
    )
    write_shards(tmp_path).joinpath(INDEX).write_text(text)
    assert f"{INDEX}: the key a occurs twice" in fault_of(tmp_path)


def test_faults_of_all_files_come_in_one_error(tmp_path: Path):
    write_shards(tmp_path)
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "generation_config.json").write_text("[]")
    os.truncate(tmp_path / FIRST, 40)
    (tmp_path / SECOND).write_bytes(b"")
    message = fault_of(tmp_path)
    assert "4 faults" in message
    for part in (
        "config.json: not valid",
        "generation_config.json: must hold",
        f"{FIRST}: claims",
        f"{SECOND}: has 0",
    ):
        assert part in message
    assert (
        "lacks it" not in message
    )  # the tensors of an unreadable shard are not reported one by one


@pytest.mark.parametrize("kind", ["folder", "dangling link"])
def test_weights_that_are_no_file_are_refused(kind: str, tmp_path: Path):
    write_folder(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    if kind == "folder":
        (tmp_path / "model.safetensors").mkdir()
    else:
        (tmp_path / "model.safetensors").symlink_to("../blobs/gone")
    assert "model.safetensors: " in fault_of(tmp_path)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model-q4.gguf", "consolidated.safetensors"])
def test_a_folder_with_other_weights_only_says_what_is_needed(file: str, tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_bytes(b"")
    message = fault_of(tmp_path)
    assert f"found {file}." in message
    assert "Weights are read from safetensors only" in message


def test_a_name_that_is_no_folder_says_so(tmp_path: Path):
    assert "no such folder" in fault_of(tmp_path / "absent")
    assert "no such folder" in fault_of(f"{tmp_path}/absent")
    assert "no such folder" in fault_of("./absent")
    assert "no such folder" in fault_of("")
    assert "cannot be looked up" in fault_of("x" * 5000)
    assert "is a file; give the folder" in fault_of(write_folder(tmp_path, {}) / "config.json")
    assert "has no revision 'main'" in fault_of(tmp_path, revision="main")


# --- the hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_hub_cache(home: Path) -> None:
    """Lays out a repository in the cache as the hub's client does: links by file name to blobs by
    content hash."""
    source = write_shards(home / "source")
    repository = home / "hub" / "models--org--tiny"
    for folder in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for file in source.iterdir():
        blob = hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(repository / "blobs" / blob)
        (repository / "snapshots" / COMMIT / file.name).symlink_to(f"../../blobs/{blob}")


def open_offline(home: Path, *cases: tuple[str, str | None]) -> list[str]:
    """Opens repositories in a fresh process, because the hub's client reads its environment once,
    at import."""
    program = (
        "import json, sys\nfrom fp8jax.checkpoints.folder import Checkpoint, CheckpointError\n"
        "for repo, revision in json.loads(sys.argv[1]):\n"
        "    try:\n        c = Checkpoint.open(repo, revision=revision)\n"
        "    except CheckpointError as error:\n        print('refused:', error)\n"
        "    else:\n        print(c.folder.name, c.read('a').tolist(), c.read('b').tolist())\n"
    )
    root = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(root),
    }
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-W", "ignore", "-c", program, json.dumps(cases)]
    result = subprocess.run(
        command, env=environment, cwd=home, capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines()


def test_a_cached_hub_repository_is_opened_offline_and_what_is_not_cached_is_refused(
    tmp_path: Path,
):
    write_hub_cache(tmp_path)
    by_branch, by_commit, *refused, not_an_id = open_offline(
        tmp_path,
        ("org/tiny", None),
        ("org/tiny", COMMIT),
        ("org/other", None),
        ("org/tiny", "v2"),
        ("no id", None),
    )
    assert by_branch == by_commit == f"{COMMIT} [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]] [1, 1, 1, 1]"
    for repo, message in zip(["org/other", "org/tiny"], refused, strict=True):
        assert message.startswith(f"refused: {repo}: no local folder of this name")
        assert "not in the local cache" in message
        assert "fetch it while online" in message
    assert "check the id" in not_an_id


def test_a_cached_repository_with_a_missing_blob_names_the_file(tmp_path: Path):
    write_hub_cache(tmp_path)
    (tmp_path / f"hub/models--org--tiny/snapshots/{COMMIT}/{SECOND}").resolve().unlink()
    [message] = open_offline(tmp_path, ("org/tiny", None))
    assert f"{SECOND}: cannot be read (No such file" in message


@pytest.mark.parametrize(
    "error_name, advice",
    [
        ("GatedRepoError", "accept its licence"),
        ("RepositoryNotFoundError", "spelling"),
        ("RevisionNotFoundError", "'v9'"),
    ],
)
def test_hub_errors_are_turned_into_advice(
    error_name: str, advice: str, monkeypatch: pytest.MonkeyPatch
):
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(repo_id: str, **options: Any) -> str:
        error_type = getattr(errors, error_name)
        raise error_type.__new__(
            error_type, f"404 for {repo_id}"
        )  # __init__ wants a whole HTTP response

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    message = fault_of("org/tiny", revision="v9")
    assert advice in message
    assert error_name in message


def test_a_download_fetches_configuration_tokenizer_and_weights_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    repository = [
        "config.json",
        INDEX,
        FIRST,
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
    ]
    unwanted = [
        "consolidated.safetensors",
        "pytorch_model.bin",
        "original/params.json",
        "onnx/model.onnx",
        "README.md",
    ]
    fetched: list[str] = []

    def download(repo_id: str, *, revision: str | None, **patterns: Any) -> str:
        fetched.extend(
            [f"{repo_id}@{revision}", *filter_repo_objects([*repository, *unwanted], **patterns)]
        )
        return str(write_shards(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert set(Checkpoint.open("org/tiny", revision="v1").tensors) == {"a", "b", "c"}
    assert fetched == ["org/tiny@v1", *repository]
