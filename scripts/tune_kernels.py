"""Find the fastest config of each matmul kernel by timing, within a given time, and write the tuned
tables.

    python scripts/tune_kernels.py --shapes llama-3.1-8b --minutes 8    # again: goes on from there
    python scripts/tune_kernels.py --device h100 --plan plan.json       # no GPU: drops the slow
    python scripts/tune_kernels.py --plan plan.json                     # on the GPU: times the rest
    python scripts/tune_kernels.py --shapes qwen3-30b-a3b --op grouped_scaled_matmul      # experts
    JAX_PLATFORMS=cpu python scripts/tune_kernels.py --shapes tiny --m 1 --tuned tuned_on_cpu

What is tuned, and which configs are tried, stands in `tunable_ops.py`. For each shape the default
config comes first, then, up to a number, the candidates that differ least from the best so far. One
that does not compile is out. The three fastest are compared with the XLA path's result and timed
again with more samples, and the fastest that is right goes into
`pallas_kernels/tuned/<device>/<op>.json` at once, beside the time of that XLA path: the reference,
which is what runs where no kernel does, for experts a loop over tiles.

A plan is a list of candidates compiled offline (extra `[offline-gpu]`): those that spill registers,
leave the FP8 tensor cores or do not fit are not in it. Every time taken goes into a JSON file row
by row.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from benchmark_matmul import parts
from tunable_ops import OPS, SHAPES, Case, cases_of

from fp8jax.device import H100, Gpu, current_gpu, gpu_named
from fp8jax.devtools import benchmarking, tuned_tables
from fp8jax.devtools.benchmarking import Deadline, ResultFile
from fp8jax.devtools.offline_compile import OfflineCompileError, OfflineCompiler, available
from fp8jax.devtools.offline_targets import TARGETS
from fp8jax.pallas_kernels import tuning
from fp8jax.pallas_kernels.matmul_config import Config

_SAME_RESULT = 1e-4  # calc_diff: bfloat16 rounding is 1e-6, fast accumulation stays below
_FINALISTS, _FINAL_SAMPLES = 3, 9
_FAILURES = (
    jax.errors.JaxRuntimeError,
    NotImplementedError,
    ValueError,
)  # of a config that cannot be compiled or run


def fits(config: Config, gpu: Gpu) -> bool:
    """Whether the tiles in flight fit into shared memory; known without compiling."""
    stages = config.num_stages if gpu.capability >= (9, 0) else config.num_stages - 1
    return (
        stages * (config.block_m + config.block_n) * config.block_k + 1024 <= gpu.shared_per_block
    )


def make_plan(device: str, cases: list[Case], deadline: Deadline) -> dict[str, Any]:
    """Compile every candidate for a GPU that is not here and keep the sound ones; for `--plan`.

    Sizes hardly change a kernel's registers, so each tile is compiled once; see `Case.tile`.
    """
    gpu, sound, planned = TARGETS[device], {}, []
    with OfflineCompiler() as compiler:
        for case in cases:
            kept = []
            for config in case.candidates(gpu):
                tile = case.tile(config)
                if tile not in sound:
                    if deadline.passed:
                        return {"device": gpu.kind, "cases": planned}
                    sound[tile] = fits(config, gpu) and _sound(compiler, device, case, config)
                if sound[tile]:
                    kept.append(dataclasses.asdict(config))
            planned.append({**_fields(case), "candidates": kept})
    return {"device": gpu.kind, "cases": planned}


def _sound(compiler: OfflineCompiler, device: str, case: Case, config: Config) -> bool:
    try:
        report = compiler.compile(device, *case.program(config))
    except OfflineCompileError:
        return False
    kernel = report.kernels[case.op]
    return kernel.fp8_only and not kernel.spill_bytes and kernel.blocks_per_sm >= 1


def tune(
    cases: list[Case],
    plan: dict[str, Any] | None,
    results: ResultFile,
    deadline: Deadline,
    *,
    most: int,
    samples: int,
    folder: Path,
) -> int:
    """Time the cases that are not in the tables yet; returns how many were finished."""
    kind = jax.devices()[0].device_kind
    gpu = current_gpu() or H100
    planned = {}
    for case in plan["cases"] if plan else ():
        planned[_key({name: value for name, value in case.items() if name != "candidates"})] = case[
            "candidates"
        ]
    finished = 0
    for case in cases:
        op = case.op
        if any(entry.shape == case.shape for entry in tuning.load(kind, op, folder=folder)):
            continue
        listed = planned.get(_key(_fields(case)))
        configs = case.candidates(gpu) if listed is None else [Config(**c) for c in listed]
        entry = _tune_one(case, configs, results, deadline, most=most, samples=samples)
        if entry is None:  # out of time, or nothing ran
            if deadline.passed:
                break
            continue
        tuned_tables.save(kind, op, [*tuning.load(kind, op, folder=folder), entry], folder=folder)
        finished += 1
        timed = f"{entry.microseconds:.1f} us ({entry.implementation}) with {dict(entry.config)}"
        print(f"{op} {dict(case.shape)}: {timed}", flush=True)
    return finished


def _tune_one(
    case: Case,
    configs: list[Config],
    results: ResultFile,
    deadline: Deadline,
    *,
    most: int,
    samples: int,
) -> tuning.Entry | None:
    """The winner for one shape, None where time ran out."""
    contender = case.contender
    gpu = gpu_named(results.header["device"])
    operand_sets, l2 = contender.operand_sets(gpu)
    time_calls = functools.partial(
        benchmarking.time_calls, operand_sets=operand_sets, l2=l2, rounds=2 if gpu else 1
    )

    def run_of(config: Config) -> Callable[..., Any]:
        assert isinstance(contender.run, functools.partial)
        return functools.partial(contender.run, config=config)

    times: dict[Config, float] = {}
    left = list(configs)
    for _ in range(min(most, len(configs))):
        # The untried neighbour of the best so far: the search walks to where it gets faster.
        best = min(times, key=lambda config: times[config], default=configs[0])
        config = min(left, key=lambda config: _differences(config, best))
        left.remove(config)
        fields = {**_fields(case), "config": dataclasses.asdict(config)}
        row = results.find(**fields)
        if row is None:
            if deadline.passed:
                return None
            try:
                measured: dict[str, Any] = {
                    "microseconds": time_calls(run_of(config), samples=samples).microseconds
                }
            except _FAILURES as error:
                measured = {"error": f"{type(error).__name__}: {error}"[:300]}
            row = results.add(fields | measured)
        if "microseconds" in row:
            times[config] = row["microseconds"]

    expected = jax.jit(case.reference)(*operand_sets[0])
    final: dict[Config, float] = {}
    for config in sorted(times, key=lambda config: times[config]):
        if len(final) == _FINALISTS or deadline.passed:
            break
        if (difference := calc_diff(run_of(config)(*operand_sets[0]), expected)) > _SAME_RESULT:
            print(
                f"{_fields(case)}: {config} is wrong, calc_diff {difference:.2g} from the XLA path",
                flush=True,
            )
            continue
        final[config] = time_calls(run_of(config), samples=_FINAL_SAMPLES).microseconds
    if not final or deadline.passed:
        return None
    winner = min(final, key=lambda config: final[config])
    return tuning.Entry(
        shape=case.shape,
        config=dataclasses.asdict(winner),
        microseconds=final[winner],
        xla_microseconds=time_calls(case.reference, samples=samples).microseconds,
        candidates=len(times),
        versions=benchmarking.versions(),
        date=benchmarking.today(),
    )


def _differences(config: Config, other: Config) -> int:
    """Number of fields in which they differ."""
    return sum(
        getattr(config, f.name) != getattr(other, f.name) for f in dataclasses.fields(Config)
    )


def calc_diff(x: jax.Array, y: jax.Array) -> float:
    """1 − 2·Σxy / Σ(x² + y²): 0 for equal arrays; NaN counts as infinitely far."""
    wide_x, wide_y = x.astype(jnp.float32), y.astype(jnp.float32)
    difference = float(1 - 2 * jnp.sum(wide_x * wide_y) / jnp.sum(wide_x**2 + wide_y**2))
    return difference if difference == difference else float("inf")


def _fields(case: Case) -> dict[str, int | str]:
    return {"op": case.op, **case.shape}


def _key(fields: Mapping[str, int | str]) -> frozenset[tuple[str, int | str]]:
    return frozenset(fields.items())


def main(
    shapes: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join(SHAPES)}.")
    ] = "llama-3.1-8b",
    m: Annotated[
        str, typer.Option(help="Rows of linear layers; in this order.")
    ] = "16,4096,64,1024,32,256,128,512",
    tokens: Annotated[
        str, typer.Option(help="Tokens that meet experts; in this order.")
    ] = "1,2048,16,256,64",
    op: Annotated[str, typer.Option(help="Kernels.")] = ",".join(OPS),
    minutes: Annotated[float, typer.Option(help="Stop after.")] = 60,
    most: Annotated[int, typer.Option(help="Candidates a shape at most.")] = 16,
    samples: Annotated[int, typer.Option(help="Samples of the first timing.")] = 3,
    device: Annotated[
        str, typer.Option(help=f"Only make the plan, for one of {', '.join(TARGETS)}.")
    ] = "",
    plan: Annotated[
        Path | None, typer.Option(help="Candidates that compiled well; see above.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="All times taken.")] = None,
    tuned: Annotated[Path, typer.Option(help="Folder of the tables.")] = tuning.TUNED,
) -> None:
    """Tune the matmul kernels on this machine's GPU, or plan to."""
    names, ops = parts(shapes), parts(op)
    for given, known in ((names, SHAPES), (ops, OPS), ([device] if device else [], TARGETS)):
        if unknown := set(given) - set(known):
            raise SystemExit(
                f"tune_kernels: unknown {sorted(unknown)}; choose of {', '.join(known)}"
            )
    rows, batches = ([int(part) for part in parts(option)] for option in (m, tokens))
    cases = list(cases_of(names, rows, batches, ops))
    deadline = Deadline(minutes)
    if device:
        if plan is None:
            raise SystemExit("tune_kernels: --device makes a plan; say where with --plan FILE")
        if reason := available():
            raise SystemExit(f"tune_kernels: {reason}")
        made = make_plan(device, cases, deadline)
        plan.write_text(json.dumps(made) + "\n", encoding="utf-8")
        left = sum(len(case["candidates"]) for case in made["cases"])
        print(
            json.dumps({"device": made["device"], "cases": len(made["cases"]), "candidates": left})
        )
        return
    if jax.default_backend() != "gpu" and tuned == tuning.TUNED:
        raise SystemExit(
            "tune_kernels: no GPU here; times of a CPU do not belong in the tables, name a folder "
            "with --tuned"
        )
    try:
        results = ResultFile(json_file, title="tuning", device=jax.devices()[0].device_kind)
        listed = json.loads(plan.read_text(encoding="utf-8")) if plan else None
        finished = tune(cases, listed, results, deadline, most=most, samples=samples, folder=tuned)
    except (OSError, ValueError) as error:
        raise SystemExit(f"tune_kernels: {error}") from None
    print(
        json.dumps(
            {
                **results.header,
                "cases": len(cases),
                "finished_now": finished,
                "timed": len(results.rows),
            }
        )
    )


if __name__ == "__main__":
    typer.run(main)
