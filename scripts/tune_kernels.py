"""Find the fastest config of each matmul kernel by timing, within a given time, and write the tuned tables.

    python scripts/tune_kernels.py --shapes llama-3.1-8b --minutes 8          # again, to go on where it stopped
    python scripts/tune_kernels.py --device h100 --plan plan.json             # no GPU: drop what cannot be fast
    python scripts/tune_kernels.py --plan plan.json                           # on the GPU: time what is left
    JAX_PLATFORMS=cpu python scripts/tune_kernels.py --shapes tiny --m 1 --tuned tuned_on_cpu

For each shape the default config comes first, then, up to a number, the candidates that differ least from the best so
far. One that does not compile is out. The three fastest are compared with the XLA path's result and timed again with
more samples, and the fastest that is right goes into `pallas_kernels/tuned/<device>/<op>.json` at once, beside the time of
that XLA path. How partial sums are promoted is a matter of accuracy and stays as the default has it.

A plan is a list of candidates compiled offline (extra `[offline-gpu]`): those that spill registers, leave the FP8
tensor cores or do not fit are not in it. Every time taken goes into a JSON file row by row.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from benchmark_matmul import SHAPES, contenders

from fp8jax import benchmarking
from fp8jax.benchmarking import Deadline, ResultFile
from fp8jax.pallas_kernels import block_scaled_matmul, scaled_matmul, tuning
from fp8jax.pallas_kernels.matmul_config import Config
from fp8jax.pallas_kernels.offline_compile import OfflineCompileError, OfflineCompiler, available
from fp8jax.pallas_kernels.offline_targets import TARGETS, Target
from fp8jax.schemes import BLOCK

OPS = {"scaled_matmul": "per_tensor", "block_scaled_matmul": "per_block"}
_MODULES = {"scaled_matmul": scaled_matmul, "block_scaled_matmul": block_scaled_matmul}
_SAME_RESULT = 1e-4  # calc_diff: bfloat16 rounding is 1e-6, fast accumulation stays below
_SMALLEST_SPLIT = 512  # of k: fewer steps do not fill the pipeline
_FINALISTS, _FINAL_SAMPLES = 3, 9
_FAILURES = (jax.errors.JaxRuntimeError, NotImplementedError, ValueError)  # of a config that cannot be compiled or run


def candidates(op: str, device_kind: str, m: int, n: int, k: int) -> list[Config]:
    """The default config and, behind it, what is worth timing for the shape."""
    default: Config = _MODULES[op].default_config(device_kind, m, n, k)
    if m <= 64:  # one token tile, which the default has right; the weight's tile, the pipeline and the splits are open
        splits = {split_k for split_k in (1, 2, 4, 8) if split_k == 1 or k // split_k >= _SMALLEST_SPLIT}
        choices = (
            (default.block_m,),
            (32, 64, 128),
            (128, 256),
            (4,),
            (3, 4, 5, 6),
            sorted(splits | {default.split_k}),
        )
    else:
        choices = ((64, 128), (64, 128, 256), (128,), (4, 8), (3, 4), (default.split_k,))
    found = [default]
    for block_m, block_n, block_k, num_warps, num_stages, split_k in itertools.product(*choices):
        if block_k > max(k, BLOCK) or (op == "block_scaled_matmul" and (block_k > BLOCK or block_n > BLOCK)):
            continue
        if default.swap_operands and block_n < 64:  # weights are on the left there, which wants 64 rows
            continue
        if m > 64 and block_m * block_n // (32 * num_warps) not in (32, 64, 128):  # accumulators a thread
            continue
        sizes = {"block_m": block_m, "block_n": block_n, "block_k": block_k}
        pipeline = {"num_warps": num_warps, "num_stages": num_stages, "split_k": split_k}
        found.append(dataclasses.replace(default, **sizes, **pipeline))
    return list(dict.fromkeys(found))


def fits(config: Config, target: Target) -> bool:
    """Whether the tiles in flight fit into shared memory; known without compiling."""
    stages = config.num_stages if target.capability >= (9, 0) else config.num_stages - 1
    return stages * (config.block_m + config.block_n) * config.block_k + 1024 <= target.shared_per_block


def make_plan(device: str, cases: list[dict[str, Any]], deadline: Deadline) -> dict[str, Any]:
    """Compile every candidate for a GPU that is not here and keep the sound ones; for `--plan`.

    Splits and sizes do not change a kernel's registers, so each tile is compiled once an op.
    """
    target, sound, planned = TARGETS[device], {}, []
    with OfflineCompiler() as compiler:
        for case in cases:
            op, sizes = case["op"], {name: case[name] for name in ("m", "n", "k")}
            kept = []
            for config in candidates(op, target.name, **sizes):
                tile = (op, dataclasses.replace(config, split_k=1), case["m"] % config.block_m == 0)
                if tile not in sound:
                    if deadline.passed:
                        return {"device": target.name, "cases": planned}
                    sound[tile] = fits(config, target) and _sound(compiler, device, op, config, sizes)
                if sound[tile]:
                    kept.append(dataclasses.asdict(config))
            planned.append({**case, "candidates": kept})
    return {"device": target.name, "cases": planned}


def _sound(compiler: OfflineCompiler, device: str, op: str, config: Config, sizes: dict[str, int]) -> bool:
    arguments = {"op": op, **sizes, "config": dataclasses.asdict(config)}
    try:
        report = compiler.compile(device, "fp8jax.pallas_kernels.offline_programs:matmul", arguments)
    except OfflineCompileError:
        return False
    kernel = report.kernels[op]
    return kernel.fp8_only and not kernel.spill_bytes and kernel.blocks_per_sm >= 1


def tune(
    cases: list[dict[str, Any]],
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
    config_kind = kind if jax.default_backend() == "gpu" else TARGETS["h100"].name
    planned = {_key(case): case["candidates"] for case in plan["cases"]} if plan else {}
    finished = 0
    for case in cases:
        op, shape = case["op"], {name: case[name] for name in ("m", "n", "k")}
        if any(entry.shape == shape for entry in tuning.load(kind, op, folder=folder)):
            continue
        listed = planned.get(_key(case))
        configs = candidates(op, config_kind, **shape) if listed is None else [Config(**c) for c in listed]
        entry = _tune_one(op, shape, configs, results, deadline, most=most, samples=samples)
        if entry is None:  # out of time, or nothing ran
            if deadline.passed:
                break
            continue
        tuning.save(kind, op, [*tuning.load(kind, op, folder=folder), entry], folder=folder)
        finished += 1
        print(
            f"{op} {shape}: {entry.microseconds:.1f} us ({entry.implementation}) with {dict(entry.config)}", flush=True
        )
    return finished


def _tune_one(
    op: str,
    shape: dict[str, int],
    configs: list[Config],
    results: ResultFile,
    deadline: Deadline,
    *,
    most: int,
    samples: int,
) -> tuning.Entry | None:
    """The winner for one shape, None where time ran out."""
    m, n, k = shape["m"], shape["n"], shape["k"]
    contender = dict(contenders(m, n, k))[OPS[op]]
    device = benchmarking.limits(results.header["device"])
    sets, l2 = benchmarking.sets_needed(contender.bytes_moved, device) if device else (1, "warm")
    operand_sets = [contender.make(jax.random.key(i), m, n, k) for i in range(sets)]
    time_calls = functools.partial(benchmarking.time_calls, operand_sets=operand_sets, l2=l2, rounds=2 if device else 1)

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
        fields = {"op": op, **shape, "config": dataclasses.asdict(config)}
        row = results.find(**fields)
        if row is None:
            if deadline.passed:
                return None
            try:
                measured: dict[str, Any] = {"microseconds": time_calls(run_of(config), samples=samples).microseconds}
            except _FAILURES as error:
                measured = {"error": f"{type(error).__name__}: {error}"[:300]}
            row = results.add(fields | measured)
        if "microseconds" in row:
            times[config] = row["microseconds"]

    expected = jax.jit(functools.partial(_xla, op))(*operand_sets[0])
    final: dict[Config, float] = {}
    for config in sorted(times, key=lambda config: times[config]):
        if len(final) == _FINALISTS or deadline.passed:
            break
        if (difference := calc_diff(run_of(config)(*operand_sets[0]), expected)) > _SAME_RESULT:
            print(f"{op} {shape}: {config} is wrong, calc_diff {difference:.2g} from the XLA path", flush=True)
            continue
        final[config] = time_calls(run_of(config), samples=_FINAL_SAMPLES).microseconds
    if not final or deadline.passed:
        return None
    winner = min(final, key=lambda config: final[config])
    return tuning.Entry(
        shape=shape,
        config=dataclasses.asdict(winner),
        microseconds=final[winner],
        xla_microseconds=time_calls(functools.partial(_xla, op), samples=samples).microseconds,
        candidates=len(times),
        versions=benchmarking.versions(),
        date=benchmarking.today(),
    )


def _differences(config: Config, other: Config) -> int:
    """Number of fields in which they differ."""
    return sum(getattr(config, f.name) != getattr(other, f.name) for f in dataclasses.fields(Config))


def calc_diff(x: jax.Array, y: jax.Array) -> float:
    """1 − 2·Σxy / Σ(x² + y²): 0 for equal arrays; NaN counts as infinitely far."""
    wide_x, wide_y = x.astype(jnp.float32), y.astype(jnp.float32)
    difference = float(1 - 2 * jnp.sum(wide_x * wide_y) / jnp.sum(wide_x**2 + wide_y**2))
    return difference if difference == difference else float("inf")


def _xla(op: str, x: jax.Array, x_scale: jax.Array, w: jax.Array, w_scale: jax.Array) -> jax.Array:
    if op == "scaled_matmul":
        return scaled_matmul.scaled_matmul_reference(x, x_scale, w, w_scale)
    return block_scaled_matmul.block_scaled_matmul_reference(x, x_scale.T, w, w_scale)  # made in the layout "gm"


def _key(case: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(case[name] for name in ("op", "m", "n", "k"))


def cases_of(shapes: list[str], rows: list[int], ops: list[str]) -> Iterator[dict[str, Any]]:
    """In the order in which they are tuned: each m over all layers and ops."""
    for m, name in itertools.product(rows, shapes):
        for (n, k), op in itertools.product(SHAPES[name].values(), ops):
            yield {"op": op, "m": m, "n": n, "k": k}


def main(
    shapes: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(SHAPES)}.")] = "llama-3.1-8b",
    m: Annotated[str, typer.Option(help="Rows; in this order.")] = "16,4096,64,1024,32,256,128,512",
    op: Annotated[str, typer.Option(help="Kernels.")] = ",".join(OPS),
    minutes: Annotated[float, typer.Option(help="Stop after.")] = 60,
    most: Annotated[int, typer.Option(help="Candidates a shape at most.")] = 16,
    samples: Annotated[int, typer.Option(help="Samples of the first timing.")] = 3,
    device: Annotated[str, typer.Option(help=f"Only make the plan, for one of {', '.join(TARGETS)}.")] = "",
    plan: Annotated[Path | None, typer.Option(help="Candidates that compiled well; see above.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="All times taken.")] = None,
    tuned: Annotated[Path, typer.Option(help="Folder of the tables.")] = tuning.TUNED,
) -> None:
    """Tune the matmul kernels on this machine's GPU, or plan to."""
    names, ops = shapes.split(","), op.split(",")
    for given, known in ((names, SHAPES), (ops, OPS), ([device] if device else [], TARGETS)):
        if unknown := set(given) - set(known):
            raise SystemExit(f"tune_kernels: unknown {sorted(unknown)}; choose of {', '.join(known)}")
    cases = list(cases_of(names, [int(part) for part in m.split(",")], ops))
    deadline = Deadline(minutes)
    if device:
        if plan is None:
            raise SystemExit("tune_kernels: --device makes a plan; say where with --plan FILE")
        if reason := available():
            raise SystemExit(f"tune_kernels: {reason}")
        made = make_plan(device, cases, deadline)
        plan.write_text(json.dumps(made) + "\n", encoding="utf-8")
        left = sum(len(case["candidates"]) for case in made["cases"])
        print(json.dumps({"device": made["device"], "cases": len(made["cases"]), "candidates": left}))
        return
    if jax.default_backend() != "gpu" and tuned == tuning.TUNED:
        raise SystemExit(
            "tune_kernels: no GPU here; times of a CPU do not belong in the tables, name a folder with --tuned"
        )
    try:
        results = ResultFile(json_file, title="tuning", device=jax.devices()[0].device_kind)
        listed = json.loads(plan.read_text(encoding="utf-8")) if plan else None
        finished = tune(cases, listed, results, deadline, most=most, samples=samples, folder=tuned)
    except (OSError, ValueError) as error:
        raise SystemExit(f"tune_kernels: {error}") from None
    print(json.dumps({**results.header, "cases": len(cases), "finished_now": finished, "timed": len(results.rows)}))


if __name__ == "__main__":
    typer.run(main)
