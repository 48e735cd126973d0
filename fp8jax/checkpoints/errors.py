"""What is wrong with a checkpoint, said in one error whatever the number of faults.

Files come from strangers, and a hostile one can hold millions of faults. `Faults` keeps the first
thousand and counts the rest, so that gathering them costs neither memory nor a screenful.
"""

from collections.abc import Iterable, Iterator, Sequence
from reprlib import Repr

MAX_FAULTS_SHOWN = 20
MAX_FAULTS_KEPT = 1000

# Cuts long and deep values, so that a hostile header can neither flood nor crash the error message.
shown_value = Repr(maxlevel=2, maxlist=8, maxdict=4, maxstring=60, maxlong=40, maxother=60).repr


class Faults:
    """Sentences about what is wrong: `len` counts all of them, iteration gives the first
    `MAX_FAULTS_KEPT`."""

    def __init__(self, faults: Iterable[str] = (), *, count: int = 0):
        self._kept: list[str] = []
        self._count = 0
        self.extend(faults)
        self._count = max(self._count, count)

    def append(self, fault: str) -> None:
        self._count += 1
        if len(self._kept) < MAX_FAULTS_KEPT:
            self._kept.append(fault)

    def extend(self, faults: Iterable[str]) -> None:
        for fault in faults:
            self.append(fault)

    def prefixed(self, where: str) -> "Faults":
        """The same faults with `where: ` before each, the count of those not kept included."""
        return Faults((f"{where}: {fault}" for fault in self._kept), count=self._count)

    def merge(self, other: "Faults") -> None:
        """Adds another list, the count of those that it did not keep included."""
        self.extend(other._kept)
        self._count += other._count - len(other._kept)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)


class CheckpointError(ValueError):
    """A checkpoint file or folder is malformed or cannot be used.

    Attributes:
        faults: what was found, one line each; the first `MAX_FAULTS_KEPT` of it.
        count: how many faults there were.
    """

    faults: tuple[str, ...]
    count: int

    def __init__(self, message: str):
        super().__init__(message)
        self.faults, self.count = (message,), 1

    @classmethod
    def gather(cls, where: str, faults: Sequence[str] | Faults) -> "CheckpointError":
        """Makes one error of all the faults found at one place."""
        kept = tuple(faults)
        if len(faults) == 1:
            error = cls(f"{where}: {kept[0]}")
        else:
            lines = [f"{where}: {len(faults)} faults", *kept[:MAX_FAULTS_SHOWN]]
            if len(faults) > MAX_FAULTS_SHOWN:
                lines.append(f"... and {len(faults) - MAX_FAULTS_SHOWN} more")
            error = cls("\n  - ".join(lines))
        error.faults, error.count = kept, len(faults)
        return error


def shown(name: str) -> str:
    """Returns a tensor or file name fit for a message: escaped if it would garble a terminal, cut
    if very long."""
    text = name if name and name.isprintable() else ascii(name)
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"
