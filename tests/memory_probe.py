"""A child process that loads a checkpoint, and its parent that watches how much private memory the
child takes.

The parent samples RssAnon every 2 ms or so: pages of the page cache do not count. Run as a script,
this file is the child: it imports what loading needs, says "idle", waits for a line, loads, and
says what it holds.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Probe:
    """Private memory of the child in bytes, and what it said about its model."""

    idle: int
    peak: int
    held: dict[str, int]

    @property
    def above_idle(self) -> int:
        return self.peak - self.idle


def watch_loading(folder: Path, scheme: str, *, mode: str = "load") -> Probe:
    """Load `folder` in a process of its own.

    For negative controls, mode "keep" also keeps an unquantized copy, and "whole" makes one piece
    of every matrix.
    """
    command = [sys.executable, __file__, str(folder), scheme, mode]
    with subprocess.Popen(
        command, cwd=HERE.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        assert child.stdout.readline().strip() == "idle"
        idle = peak = private_bytes(child.pid)
        child.stdin.write("go\n")
        child.stdin.flush()
        while (now := private_bytes(child.pid)) > 0:
            peak = max(peak, now)
            time.sleep(0.002)
        held = json.loads(child.stdout.readline())
    assert child.returncode == 0
    return Probe(idle, peak, held)


def private_bytes(pid: int) -> int:
    """RssAnon of a process; 0 once it has ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def _child(folder: str, scheme: str, mode: str) -> None:
    import jax
    import jax.numpy as jnp

    import fp8jax
    from fp8jax.checkpoints import filling
    from fp8jax.checkpoints.folder import Checkpoint

    jax.block_until_ready(jnp.zeros(8) + 1)  # the backend is part of idling
    print("idle", flush=True)
    sys.stdin.readline()
    kept = []
    if mode == "keep":
        with Checkpoint.open(folder) as checkpoint:
            kept = [
                jax.device_put(checkpoint.read(name), may_alias=False)
                for name in checkpoint.tensors
            ]
            jax.block_until_ready(kept)
    if mode == "whole":
        filling.PIECE_BYTES = 1 << 40
    lm = fp8jax.load_quantized(folder, scheme)
    held = {
        "bytes_before": lm.report.bytes_before,
        "bytes_after": lm.report.bytes_after,
        "kept": len(kept),
    }
    print(json.dumps(held), flush=True)


if __name__ == "__main__":
    _child(*sys.argv[1:])
