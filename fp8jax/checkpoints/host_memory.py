"""How much memory of its own the process holds, and the most it held meanwhile.

What counts is private memory (RssAnon on Linux): the pages of a checkpoint's files are in the page
cache, which the kernel takes back whenever it wants. Where RssAnon is not known, the resident set
is what there is.
"""

import ctypes
import gc
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

_SECONDS_BETWEEN_SAMPLES = 0.005


def private_bytes() -> int:
    """Private memory of this process in bytes."""
    try:
        with Path("/proc/self/status").open() as status:
            for line in status:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return psutil.Process().memory_info().rss


class PeakMemory:
    """A context that samples private memory every 5 ms in a thread; `peak` and `start` are in
    bytes."""

    def __init__(self) -> None:
        self.start = self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "PeakMemory":
        _give_back_freed_memory()
        self.start = self.peak = private_bytes()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, private_bytes())

    def _sample(self) -> None:
        while not self._stop.wait(_SECONDS_BETWEEN_SAMPLES):
            self.peak = max(self.peak, private_bytes())


def _give_back_freed_memory() -> None:
    """Return what was freed before to the system, or the next allocations would come from it and
    not show."""
    gc.collect()
    with suppress(AttributeError, OSError, TypeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
