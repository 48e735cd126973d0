"""Files that change while a checkpoint is read, files that are none, and files that cannot be
opened: an error, in time."""

import errno
import json
import os
import resource
import shutil
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from test_checkpoint import INDEX, SHARDS, fault_of, write_folder, write_shards

from fp8jax.checkpoints import file_reading
from fp8jax.checkpoints import folder as checkpoint_module
from fp8jax.checkpoints.errors import MAX_FAULTS_KEPT
from fp8jax.checkpoints.folder import Checkpoint, CheckpointError
from fp8jax.tokenizer import load_tokenizer

WEIGHTS = "model.safetensors"

# --- changed meanwhile


def in_place(path: Path) -> None:
    """The same size, other bytes, at another time."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def replaced(path: Path) -> None:
    """Another file of the same size and time is moved over it."""
    before = path.stat()
    new = path.with_suffix(".new")
    shutil.copyfile(path, new)
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(path)


CHANGES: dict[str, tuple[Any, str]] = {
    "in place": (in_place, "it was written to"),
    "replaced": (replaced, "another file has taken its name"),
    "cut short": (lambda path: os.truncate(path, 200), "it had 80072 bytes and has 200 by now"),
    "emptied": (lambda path: os.truncate(path, 0), "has 0 by now"),
    "grown": (lambda path: os.truncate(path, 10**6), "has 1000000 by now"),
}


@pytest.mark.parametrize("when", ["before the first read", "between reads"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_is_not_read_from(change: str, when: str, tmp_path: Path):
    """Cut short, a mapped file would kill the process here."""
    change_file, how = CHANGES[change]
    folder = write_folder(tmp_path, {"x": np.zeros(10_000)})
    with Checkpoint.open(folder) as checkpoint:
        if when == "between reads":
            checkpoint.read("x", slice(0, 10))
        change_file(folder / WEIGHTS)
        if change == "replaced" and when == "between reads":
            checkpoint.read(
                "x"
            )  # the open file is still the old one, whole; `verify_unchanged` tells
        else:
            with pytest.raises(
                CheckpointError, match=f"{WEIGHTS}: was changed while .* {how}.* load it again"
            ):
                checkpoint.read("x")
        with pytest.raises(CheckpointError, match=f"{WEIGHTS}: was changed while .* {how}"):
            checkpoint.verify_unchanged()


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", INDEX, *SHARDS])
@pytest.mark.parametrize(
    "change", [in_place, replaced, Path.unlink], ids=["in place", "replaced", "removed"]
)
def test_every_file_is_looked_at_again_in_the_end(change: Any, file: str, tmp_path: Path):
    write_shards(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"top_k": 1}')
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.verify_unchanged()
        change(tmp_path / file)
        with pytest.raises(CheckpointError, match=f"{file}: was changed while"):
            checkpoint.verify_unchanged()


@pytest.mark.parametrize("file", ["generation_config.json", WEIGHTS])
def test_a_file_that_comes_meanwhile_and_would_have_counted_is_noticed(file: str, tmp_path: Path):
    with Checkpoint.open(write_shards(tmp_path)) as checkpoint:
        (tmp_path / "README.md").write_text("counts for nothing")
        checkpoint.verify_unchanged()
        (tmp_path / file).write_text("{}")
        with pytest.raises(
            CheckpointError, match=f"{file}: was changed .* it was not there before"
        ):
            checkpoint.verify_unchanged()


def test_a_config_whose_weights_were_replaced_before_their_headers_were_read(tmp_path, monkeypatch):
    write_folder(tmp_path / "one", {"x": np.zeros(4)}, {"of": "one"})
    write_folder(tmp_path / "two", {"x": np.ones(4)}, {"of": "two"})
    read_header = checkpoint_module.read_stamped_header

    def replace_then_read(path: Path):
        (tmp_path / "one").rename(tmp_path / "away")
        (tmp_path / "two").rename(tmp_path / "one")
        return read_header(path)

    monkeypatch.setattr(checkpoint_module, "read_stamped_header", replace_then_read)
    with Checkpoint.open(tmp_path / "one") as checkpoint:
        assert checkpoint.config == {"of": "one"}
        np.testing.assert_array_equal(
            checkpoint.read("x"), np.ones(4)
        )  # the mixture that must not come out
        with pytest.raises(
            CheckpointError,
            match="config.json: was changed while .* another file has taken its name",
        ):
            checkpoint.verify_unchanged()


# --- no files at all


def pipe(path: Path) -> str:
    os.mkfifo(path)
    return "is a pipe, not a regular file"


def zeros_without_end(path: Path) -> str:
    path.symlink_to("/dev/zero")
    return "is a device, not a regular file"


def folder_of_that_name(path: Path) -> str:
    path.mkdir()
    return "is a folder, not a regular file"


def link_to_itself(path: Path) -> str:
    path.symlink_to(path.name)
    return "a link that leads back to itself"


KINDS = [pipe, zeros_without_end, folder_of_that_name, link_to_itself]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", INDEX, next(iter(SHARDS))]
)
def test_what_is_no_regular_file_is_refused_by_name_and_does_not_hang(
    file: str, kind: Any, tmp_path: Path
):
    write_shards(tmp_path)
    (tmp_path / file).unlink(missing_ok=True)
    expected = kind(tmp_path / file)
    message: list[str] = []
    thread = threading.Thread(target=lambda: message.append(fault_of(tmp_path)), daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert f"{file}: " in message[0] and expected in message[0]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("file", ["tokenizer.json", "special_tokens_map.json", "merges.txt"])
def test_tokenizer_files_that_are_none_are_refused_before_anyone_waits_for_them(
    file: str, kind: Any, tmp_path: Path
):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    expected = kind(tmp_path / file)
    with pytest.raises(CheckpointError, match=f"{file}: .*{expected}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "file, limit",
    [
        ("config.json", checkpoint_module.MAX_CONFIG_BYTES),
        (INDEX, checkpoint_module.MAX_INDEX_BYTES),
    ],
)
def test_json_files_have_a_limit_that_the_error_names(file: str, limit: int, tmp_path: Path):
    write_shards(tmp_path)
    os.truncate(tmp_path / file, limit + 1)  # a hole: takes no disk
    tracemalloc.start()
    message = fault_of(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"{file}: has {limit + 1} bytes, at most {limit} are read" in message
    assert peak < 1_000_000  # of a file of 10 or 100 MB nothing is read


def test_a_tokenizer_file_has_a_limit_too(tmp_path: Path):
    (tmp_path / "tokenizer.json").touch()
    os.truncate(tmp_path / "tokenizer.json", 10**9)
    with pytest.raises(
        CheckpointError, match="tokenizer.json: has 1000000000 bytes, at most 500000000 are read"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("part", ["header", "index"])
def test_millions_of_faults_are_counted_and_not_kept(part: str, tmp_path: Path):
    count = 200_000
    pairs = ",".join(f'"t{i % 1000}":0' for i in range(count)).encode()
    write_shards(tmp_path)
    if part == "header":
        raw = b"{" + pairs + b"}"
        (tmp_path / next(iter(SHARDS))).write_bytes(len(raw).to_bytes(8, "little") + raw)
    else:
        (tmp_path / INDEX).write_bytes(b'{"weight_map":{' + pairs + b"}}")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert len(caught.value.faults) <= 2 * MAX_FAULTS_KEPT
    assert caught.value.count >= count - 1000
    assert f"{caught.value.count - 20} more" in str(caught.value)


# --- what the system refuses


def open_descriptors() -> set[int]:
    return {int(entry.name) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="descriptors are listed in /proc")
def test_few_files_are_open_whatever_the_number_of_shards(tmp_path: Path):
    shards = {f"x{i:03}": f"model-{i:03}.safetensors" for i in range(100)}
    for i, (name, file) in enumerate(shards.items()):
        safetensors.numpy.save_file({name: np.full(3, i)}, tmp_path / file)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": shards}))
    before = open_descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before) + 8, hard))
    try:
        with Checkpoint.open(tmp_path) as checkpoint:
            for _ in range(2):
                assert [int(checkpoint.read(name)[0]) for name in shards] == list(range(100))
            assert len(open_descriptors()) - len(before) <= file_reading.MAX_OPEN_FILES
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_descriptors() == before


@pytest.mark.parametrize(
    "code, advice",
    [
        (errno.EMFILE, "too many files open: close some, or raise `ulimit -n`"),
        (errno.ENFILE, "the system has too many files open"),
        (errno.ENOMEM, "memory is short"),
        (errno.EIO, "the disk fails to read it"),
        (errno.EACCES, "check its permissions"),
    ],
)
@pytest.mark.parametrize("when", ["opening", "reading"])
def test_what_the_system_refuses_is_said_as_it_is(
    code: int, advice: str, when: str, tmp_path: Path, monkeypatch
):
    checkpoint = Checkpoint.open(write_folder(tmp_path, {"x": np.zeros(4)}))

    def refuse(path: Any, *_: Any) -> int:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(file_reading.os, "open", refuse)
    if when == "opening":
        message = fault_of(tmp_path)
        assert "config.json" in message
    else:
        with pytest.raises(CheckpointError) as caught:
            checkpoint.read("x")
        message = str(caught.value)
        assert str(tmp_path / WEIGHTS) in message
    assert f"cannot be read ({os.strerror(code)})" in message and advice in message
    assert "changed" not in message


def test_threads_share_a_checkpoint(tmp_path: Path):
    tensors = {f"x{i}": np.full(50_000, i, np.int32) for i in range(8)}
    wrong: list[str] = []
    with Checkpoint.open(write_folder(tmp_path, tensors)) as checkpoint:

        def read_many(name: str) -> None:
            wrong.extend(
                name for _ in range(50) if not np.array_equal(checkpoint.read(name), tensors[name])
            )

        threads = [threading.Thread(target=read_many, args=(name,)) for name in tensors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
