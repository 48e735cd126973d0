"""Timing kernels on a device, and keeping what was measured.

One call of a kernel takes microseconds, dispatching a jitted function tens of them. So many calls
are put into one program, one behind another, and several programs are under way before the host
waits:

    time of a call = (time until the last of `depth` programs is done) / (depth · calls of each)

- **In order.** An optimization barrier ties each call to the one before, so that XLA neither merges
  nor reorders them.
- **L2 cold.** Each call has operands of its own; they come round again only after at least twice
  the L2 cache of other data has passed. Small operands that would need more than 64 sets are timed
  warm, and the result says so.
- **No CUDA graph.** Launches come from XLA's own queue (a few microseconds each, hidden behind
  longer kernels). A kernel much shorter than that shows the cost of its launch, which a graph of a
  whole decode step would hide.
- **Warm and median.** The first run compiles and does not count; of the samples the median is
  reported, with the distance between the fastest and the slowest. A difference smaller than that is
  noise.

Ways to do the same work are `Contender`s, and how fast one is beside another is a ratio of their
times, averaged over shapes as a geometric mean. Results go to a JSON file row by row, each with its
date, so that a run that is cut short keeps what it has and the next one goes on from there.
"""

import datetime
import importlib.metadata
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from jax import lax

from fp8jax.device import Gpu, gpu_named

# A program is long beside its launch, holds so many calls at most, and so many bytes of their
# results.
_PROGRAM_SECONDS, _MOST_CALLS, _OUTPUT_BYTES = 2e-3, 64, 4 * 2**30
_MOST_SETS = 64
_SAMPLE_SECONDS = 5e-3  # of a GPU; long beside the latency of the first launch
_UNKNOWN_L2 = 128 * 2**20


def floor_microseconds(
    gpu: Gpu | None, *, flops: float, bytes_moved: float, operands: Literal["bf16", "fp8"]
) -> float | None:
    """The roofline: no kernel that does this work is faster; None where the limits are unknown.

    Args:
        gpu: with its limits by the data sheet.
        flops: operations.
        bytes_moved: of memory.
        operands: what the tensor cores multiply.
    """
    rate = gpu and (gpu.fp8_flops if operands == "fp8" else gpu.bf16_flops)
    if gpu is None or rate is None or gpu.bandwidth is None:
        return None
    return 1e6 * max(flops / rate, bytes_moved / gpu.bandwidth)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The time of one call.

    Args:
        microseconds: median of the samples.
        spread: (slowest − fastest) / median.
        samples, calls: how many samples, and calls in each.
        l2: "cold" where operands came round only after twice the L2 cache.
    """

    microseconds: float
    spread: float
    samples: int
    calls: int
    l2: Literal["cold", "warm"]


def sets_needed(bytes_of_set: int, gpu: Gpu | None) -> tuple[int, Literal["cold", "warm"]]:
    """How many sets of operands keep the L2 cold, and whether so many are made; bytes_of_set counts
    what a call reads."""
    l2 = (gpu and gpu.l2_bytes) or _UNKNOWN_L2
    wanted = 2 + 2 * l2 // max(bytes_of_set, 1)
    return (wanted, "cold") if wanted <= _MOST_SETS else (_MOST_SETS, "warm")


def time_calls(
    function: Callable[..., Any],
    operand_sets: Sequence[tuple[Any, ...]],
    *,
    rounds: int = 1,
    samples: int = 5,
    l2: Literal["cold", "warm"] = "cold",
) -> Timing:
    """Time a traceable function on the default device.

    Args:
        function: what to time.
        operand_sets: its arguments, one tuple of arrays a call.
        rounds: how often a program goes through them.
        samples: how many samples the median is over.
        l2: copied into the result; see `sets_needed`.
    """
    calls = rounds * len(operand_sets)
    program = one_after_another(function, rounds=rounds)
    # A program below this size becomes no CUDA graph; other backends do not look at it.
    run = jax.jit(program, compiler_options={"xla_gpu_graph_min_graph_size": 1_000_000})
    operands = list(operand_sets)
    jax.block_until_ready(run(operands))
    once = _seconds(run, operands, 1)
    on_gpu = jax.default_backend() == "gpu"
    depth = min(20, max(1, round(_SAMPLE_SECONDS / once))) if on_gpu else 1
    times = sorted(_seconds(run, operands, depth) / (depth * calls) for _ in range(samples))
    median = statistics.median(times)
    return Timing(
        microseconds=1e6 * median,
        spread=(times[-1] - times[0]) / median,
        samples=samples,
        calls=depth * calls,
        l2=l2,
    )


def one_after_another(
    function: Callable[..., Any], *, rounds: int = 1
) -> Callable[[list[tuple[Any, ...]]], list[Any]]:
    """A function of a list of operand tuples: calls `function` on each, in this order, and returns
    all results."""

    def program(sets: list[tuple[Any, ...]]) -> list[Any]:
        outputs: list[Any] = []
        for operands in sets * rounds:
            if outputs:
                operands, outputs[-1] = lax.optimization_barrier((operands, outputs[-1]))
            outputs.append(function(*operands))
        return outputs

    return program


def _seconds(run: Callable[[Any], Any], operands: Any, depth: int) -> float:
    start = time.perf_counter()
    for _ in range(depth - 1):
        run(operands)
    jax.block_until_ready(run(operands))  # the device works in order: the last one done, all are
    return time.perf_counter() - start


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to do a piece of work.

    Args:
        operands: what the tensor cores multiply.
        make: key -> operands of one call.
        run: what is timed.
        flops: operations of a call.
        bytes_moved: the fewest bytes: inputs read once, the result written once.
        config: fields of the kernel's config, to be written down.
    """

    operands: Literal["bf16", "fp8"]
    make: Callable[[jax.Array], tuple[Any, ...]]
    run: Callable[..., Any]
    flops: float
    bytes_moved: int
    config: dict[str, Any] | None = None

    def operand_sets(
        self, gpu: Gpu | None
    ) -> tuple[list[tuple[Any, ...]], Literal["cold", "warm"]]:
        """As many sets of operands as keep a GPU's L2 cold, see `sets_needed`; one elsewhere."""
        on_gpu = jax.default_backend() == "gpu"
        sets, l2 = sets_needed(self.bytes_moved, gpu) if on_gpu else (1, "warm")
        return [self.make(jax.random.key(i)) for i in range(sets)], l2


def measured(c: Contender, gpu: Gpu | None, *, samples: int) -> dict[str, Any]:
    """What a result says about a contender: its time and what follows from it, or the error that it
    ended with."""
    try:
        operand_sets, l2 = c.operand_sets(gpu)
        floor = floor_microseconds(
            gpu, flops=c.flops, bytes_moved=c.bytes_moved, operands=c.operands
        )
        rounds = 1
        if floor is not None:
            output_bytes = sum(
                a.size * a.dtype.itemsize
                for a in jax.tree.leaves(jax.eval_shape(c.run, *operand_sets[0]))
            )
            calls = min(
                _MOST_CALLS,
                math.ceil(_PROGRAM_SECONDS * 1e6 / floor),
                _OUTPUT_BYTES // output_bytes,
            )
            rounds = max(1, calls // len(operand_sets))
        timing = time_calls(c.run, operand_sets, rounds=rounds, samples=samples, l2=l2)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    seconds = timing.microseconds / 1e6
    return {
        **asdict(timing),
        "tflops": c.flops / seconds / 1e12,
        "gb_per_second": c.bytes_moved / seconds / 1e9,
        "share_of_roofline": None if floor is None else floor / timing.microseconds,
        "config": c.config,
    }


def measure(
    cases: Iterable[tuple[dict[str, Any], Contender]],
    results: "ResultFile",
    deadline: "Deadline",
    *,
    only: Sequence[str],
    samples: int,
) -> None:
    """Time what is not in `results` yet, until the deadline.

    Args:
        cases: what identifies a row, "contender" among it, and what is timed.
        only: contenders to time; all if empty.
    """
    gpu = gpu_named(results.header["device"])
    for case, contender in cases:
        if (only and case["contender"] not in only) or results.find(**case):
            continue
        if deadline.passed:
            return
        results.add(case | measured(contender, gpu, samples=samples))


def ratios(
    rows: Sequence[Mapping[str, Any]],
    *,
    same: Sequence[str],
    baselines: Callable[[str], Sequence[str]],
) -> list[float | None]:
    """Each row's speed relative to its baseline; None where one of the two has no time.

    Args:
        rows: of a `ResultFile`.
        same: fields in which a row and its baseline agree.
        baselines: contender -> the contenders whose fastest is its baseline.
    """
    timed = {
        (*(r[f] for f in same), r["contender"]): r["microseconds"]
        for r in rows
        if "microseconds" in r
    }

    def ratio(row: Mapping[str, Any]) -> float | None:
        case = tuple(row[f] for f in same)
        times = [
            timed[key] for name in baselines(row["contender"]) if (key := (*case, name)) in timed
        ]
        return min(times) / row["microseconds"] if times and "microseconds" in row else None

    return [ratio(row) for row in rows]


def mean_ratios(
    rows: Sequence[Mapping[str, Any]],
    ratios: Sequence[float | None],
    phases: Mapping[str, range],
    *,
    size: str,
) -> dict[str, dict[str, float]]:
    """Geometric means of ratios by phase and contender.

    Args:
        rows, ratios: as `ratios` returned them.
        phases: name -> what the field `size` of a row must be in.
    """
    means: dict[str, dict[str, float]] = {}
    for phase, inside in phases.items():
        logs: dict[str, list[float]] = {}
        for row, ratio in zip(rows, ratios, strict=True):
            if ratio is not None and row[size] in inside:
                logs.setdefault(row["contender"], []).append(math.log(ratio))
        means[phase] = {name: round(math.exp(statistics.fmean(of)), 3) for name, of in logs.items()}
    return means


class Deadline:
    """A number of minutes that starts now."""

    def __init__(self, minutes: float):
        self._end = time.monotonic() + 60 * minutes

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    @property
    def passed(self) -> bool:
        return self.seconds_left <= 0


def versions() -> dict[str, str]:
    """Of the packages that decide what runs."""
    names = ("jax", "jaxlib", "fp8jax", "jax-cuda13-plugin", "jax-cuda12-plugin")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


class ResultFile:
    """Rows of measurements in a JSON file, written after each row.

    Args:
        path: the file; None keeps the rows in memory only. One that exists is continued.
        title: what is measured.
        device: `device_kind`.
    Raises:
        ValueError: the file is of another device or other versions, whose rows must not stand
            beside these.
    """

    def __init__(self, path: Path | None, *, title: str, device: str):
        self.path = path
        self.header: dict[str, Any] = {"title": title, "device": device, "versions": versions()}
        self.rows: list[dict[str, Any]] = []
        if path is not None and path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            self.rows = content.pop("rows", [])
            if content != self.header:
                raise ValueError(
                    f"{path} holds {content}, this run would add {self.header}; name another file"
                )

    def find(self, **fields: Any) -> dict[str, Any] | None:
        """The row with these values, or None."""
        return next(
            (
                row
                for row in self.rows
                if all(row.get(name) == value for name, value in fields.items())
            ),
            None,
        )

    def add(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a row, with today's date, and write the file."""
        dated = {**row, "date": today()}
        self.rows.append(dated)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.path.with_suffix(".unfinished")
            unfinished.write_text(
                json.dumps({**self.header, "rows": self.rows}, indent=1) + "\n", encoding="utf-8"
            )
            unfinished.replace(self.path)
        return dated
