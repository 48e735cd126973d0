"""Files of a checkpoint, read as what they were when they were first opened, or not at all.

A checkpoint is several files, and loading takes minutes in which they may be replaced, cut short or
lost. Three rules:

    regular files only    a pipe would block for ever, a device never ends; files read whole have a
                          size limit
    a file has a stamp    (device, inode, size, mtime): taken when the header is read, compared
                          whenever the file is opened again, after every read from it, and once more
                          when all is loaded
    read, never map       a mapped file that is cut short kills the process that touches it
                          (SIGBUS); a read that comes out short is an error that can be told

Reads go into memory of the caller's. So what a loader holds is what it asked for, aligned, and does
not change with the file. Few descriptors are open at a time, whatever the number of shards.
"""

import errno
import io
import os
import stat
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fp8jax.checkpoints.errors import CheckpointError, Faults, shown

MAX_OPEN_FILES = 4
_ALIGNMENT = 64  # what XLA wants of memory that it uses in place on a CPU
_LARGEST_READ = 1 << 30  # one system call reads at most 2 GiB

_ADVICE = {
    errno.ENOENT: "it is not there, or a link to it leads nowhere: fetch it again",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.ELOOP: "it is a link that leads back to itself: fetch it again",
    errno.EMFILE: "this process has too many files open: close some, or raise `ulimit -n`",
    errno.ENFILE: "the system has too many files open: close some",
    errno.ENOMEM: "memory is short: free some, or raise the limit of this process",
    errno.EIO: "the disk fails to read it: copy or fetch it again",
    errno.ESTALE: "the file server has lost it: open the checkpoint again",
}


@dataclass(frozen=True)
class FileStamp:
    """What tells that a file is still the same one with the same contents.

    Args:
        device, inode: which file it is; another one moved over its name has another inode.
        size: in bytes.
        mtime_ns: when it was last written to, in nanoseconds.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "FileStamp":
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def reason(error: Exception) -> str:
    """Why a file cannot be read, and what to do: "cannot be read (Permission denied); check its
    permissions"."""
    cause, advice = error, "check the path and its permissions"
    if isinstance(error, OSError):
        cause, advice = error.strerror or error, _ADVICE.get(error.errno or 0, advice)
    return f"cannot be read ({cause}); {advice}"


def open_regular(path: Path) -> tuple[io.FileIO, FileStamp]:
    """Opens a regular file for reading, unbuffered.

    Raises:
        OSError, ValueError: it cannot be opened. ValueError: a path that no file system can hold.
        NotRegularError: it is a folder, a pipe, a device or a socket.
    """
    # Before opening, for to open a device may do something; and after, for it may have been
    # replaced between.
    _require_regular(path.stat())
    # O_NONBLOCK: a pipe would wait here for a writer. For regular files it means nothing.
    descriptor = os.open(
        path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    file = io.FileIO(descriptor, "rb")
    try:
        status = os.fstat(descriptor)
        _require_regular(status)
    except BaseException:
        file.close()
        raise
    return file, FileStamp.of(status)


class NotRegularError(Exception):
    """The file is not a regular one; the text says what it is."""


def read_whole(path: Path, limit: int) -> tuple[bytes, FileStamp]:
    """Reads a file of at most `limit` bytes.

    Raises:
        CheckpointError: it cannot be read, is no regular file or is larger; the text has no path,
            for it stands in a list.
        FileNotFoundError: there is no such file.
    """
    content = bytearray()
    try:
        file, stamp = open_regular(path)
        with file:
            # Not `file.read()`: a file that grows meanwhile, or lies about its size, has to end
            # too.
            while stamp.size <= limit >= len(content):
                if not (piece := file.read(max(stamp.size - len(content), 0) + 1)):
                    break
                content += piece
    except FileNotFoundError:
        raise
    except NotRegularError as error:
        raise CheckpointError(f"is {error}, not a regular file; expected a JSON file") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(reason(error)) from error
    if (size := max(stamp.size, len(content))) > limit:
        raise CheckpointError(
            f"has {size} bytes, at most {limit} are read of such a file; it is damaged or "
            "something else"
        )
    return bytes(content), stamp


def check_readable(folder: Path, suffixes: tuple[str, ...], limit: int) -> None:
    """Looks at files of a folder that someone else is going to read: each must open, be a regular
    file, and end.

    Args:
        folder: where they lie; subfolders are not looked into.
        suffixes: of the files' names, ".json" say.
        limit: bytes that each may have.

    Raises:
        CheckpointError: lists those that fail.
    """
    faults = Faults()
    for path in sorted(folder.iterdir()):
        if not path.name.endswith(suffixes):
            continue
        try:
            file, stamp = open_regular(path)
            file.close()
            if stamp.size > limit:
                faults.append(
                    f"{shown(path.name)}: has {stamp.size} bytes, at most {limit} are read of such "
                    "a file"
                )
        except NotRegularError as error:
            faults.append(f"{shown(path.name)}: is {error}, not a regular file")
        except OSError as error:
            faults.append(f"{shown(path.name)}: {reason(error)}")
    if faults:
        raise CheckpointError.gather(shown(str(folder)), faults)


def aligned_empty(count: int) -> np.ndarray:
    """Uninitialised memory of `count` bytes, uint8, that begins at a multiple of 64 bytes."""
    memory = np.empty(count + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return memory[first : first + count]


@dataclass(eq=False)
class FileReader:
    """Reads ranges of files that must stay what their stamps say; `stamps` has None for a file that
    must stay absent."""

    stamps: dict[Path, FileStamp | None] = field(default_factory=dict)
    _open: OrderedDict[Path, io.FileIO] = field(default_factory=OrderedDict, repr=False)
    _lock: threading.Lock = field(
        default_factory=threading.Lock, repr=False
    )  # a file has one position for all threads

    def read_into(self, path: Path, offset: int, out: np.ndarray) -> None:
        """Fills `out` (contiguous) with the bytes of a file from `offset` on.

        Raises:
            CheckpointError: the file cannot be read, ends too soon, or is not what it was when its
                stamp was taken.
        """
        try:
            with self._lock:
                file = self._opened(path)
                file.seek(offset)
                missing = _fill(file, memoryview(out.reshape(-1).view(np.uint8)))
                now = FileStamp.of(os.fstat(file.fileno()))
        except NotRegularError as error:
            raise _changed(path, f"it is {error} by now") from error
        except OSError as error:
            raise CheckpointError(f"{shown(str(path))}: {reason(error)}") from error
        self._compare(path, now)
        if missing:  # a file system that does not tell the truth about sizes
            raise _changed(path, f"it ends {missing} bytes too soon")

    def verify(self) -> None:
        """Raises `CheckpointError` naming the first file that is not what it was, was replaced, or
        has come or gone."""
        for path, before in self.stamps.items():
            try:
                now = FileStamp.of(path.stat())
            except FileNotFoundError:
                now = None
            except OSError as error:
                raise CheckpointError(f"{shown(str(path))}: {reason(error)}") from error
            if now != before:
                self._compare(path, now)

    def close(self) -> None:
        """Closes what is open."""
        while self._open:
            self._open.popitem()[1].close()

    def __del__(self) -> None:
        self.close()

    def _opened(self, path: Path) -> io.FileIO:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        while len(self._open) >= MAX_OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        file, stamp = open_regular(path)
        try:
            self._compare(path, stamp)
        except CheckpointError:
            file.close()
            raise
        self._open[path] = file
        return file

    def _compare(self, path: Path, now: FileStamp | None) -> None:
        before = self.stamps.get(path)
        if now == before:
            return
        if before is None:
            raise _changed(path, "it was not there before")
        if now is None:
            raise _changed(path, "it is gone")
        if (now.device, now.inode) != (before.device, before.inode):
            raise _changed(path, "another file has taken its name")
        if now.size != before.size:
            raise _changed(path, f"it had {before.size} bytes and has {now.size} by now")
        raise _changed(path, "it was written to")


def _fill(file: io.FileIO, rest: memoryview) -> int:
    """Reads until `rest` is full or the file ends; returns how many bytes are missing."""
    while len(rest) and (count := file.readinto(rest[:_LARGEST_READ])):
        rest = rest[count:]
    return len(rest)


def _changed(path: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"{shown(str(path))}: was changed while the checkpoint was being read: {how}. What was "
        "read so far may be of two checkpoints; wait until nothing writes to the folder, and load "
        "it again"
    )


def _require_regular(status: os.stat_result) -> None:
    mode = status.st_mode
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    raise NotRegularError(next((kind for test, kind in kinds.items() if test(mode)), "a device"))
