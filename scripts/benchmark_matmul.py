"""How fast the FP8 matmuls are, beside XLA's in BF16 and cuBLASLt's in FP8, on the layers of Llama-3.1.

    python scripts/benchmark_matmul.py --shapes llama-3.1-8b --m 1,16,2048,4096 --json scripts/results/h200/matmul.json
    JAX_PLATFORMS=cpu python scripts/benchmark_matmul.py --shapes tiny      # no speed, shows that all of it runs

    bf16                     XLA's product of bfloat16 operands, with whatever its autotuning picks
    cublaslt_fp8             XLA's FP8 product without scales, forced to cuBLASLt with fast accumulation (GPU, m > 1)
    per_tensor, per_block    the kernels here on quantized operands; "_promoted": float32 additions every 128 inputs
    …_with_quantize          the same with the quantization of the activations before it
    quantize_token, _group   that quantization alone

Roofline: the data sheet's peak of the operands' type or the memory bandwidth, whichever binds; each input is counted
as read once and each output as written once. `fp8jax.benchmarking` says how time is taken. On a CPU the kernels run
interpreted and times mean nothing.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import typer
from jax import lax
from rich.console import Console
from rich.table import Table

from fp8jax import benchmarking
from fp8jax.benchmarking import Deadline, ResultFile
from fp8jax.pallas_kernels import block_scaled_matmul, matmul_config, scaled_matmul, tuning
from fp8jax.pallas_kernels.matmul_config import Config
from fp8jax.pallas_kernels.matmul_tiles import current_device_kind
from fp8jax.pallas_kernels.offline_programs import LINEAR_SHAPES
from fp8jax.pallas_kernels.offline_targets import TARGETS
from fp8jax.pallas_kernels.quantize import quantize_activation_triton
from fp8jax.schemes import BLOCK

SHAPES = {**LINEAR_SHAPES, "tiny": {"square": (256, 256)}}
_SPREAD = 80.0  # standard deviation of the codes: the largest of a big normal matrix then lies near 448
_PROGRAM_SECONDS, _MOST_CALLS, _OUTPUT_BYTES = 2e-3, 64, 4 * 2**30


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to do a product of m rows with a weight `[n, k]`.

    Args:
        operands: what the tensor cores multiply.
        make: (key, m, n, k) -> operands of one call.
        run: what is timed.
        bytes_moved: the fewest bytes: inputs read once, the result written once.
        config: fields of the kernel's config, to be written down.
    """

    operands: Literal["bf16", "fp8"]
    make: Callable[..., tuple[jax.Array, ...]]
    run: Callable[..., Any]
    bytes_moved: int
    config: dict[str, Any] | None = None


def contenders(m: int, n: int, k: int) -> Iterator[tuple[str, Contender]]:
    """All of them that run on the current device, by name."""
    on_gpu = bool(current_device_kind())
    out, groups = 2 * m * n, -(-k // BLOCK)
    yield "bf16", Contender("bf16", _bf16, _product, 2 * (m * k + n * k) + out)
    if on_gpu and m > 1:  # with one row there is no such call, and no FP8 preset either
        preset = functools.partial(_product, precision=lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32_FAST_ACCUM)
        yield "cublaslt_fp8", Contender("fp8", _codes, preset, m * k + n * k + out)

    configs = {"per_tensor": _config("scaled_matmul", m, n, k), "per_block": _config("block_scaled_matmul", m, n, k)}
    promoted = matmul_config.default_scaled_config(_kind(), m, n, k, precise=True)
    if promoted.promotion != configs["per_tensor"].promotion:
        configs["per_tensor_promoted"] = promoted
    for name, config in configs.items():
        block = name == "per_block"
        matmul = functools.partial(
            block_scaled_matmul.block_scaled_matmul_triton if block else scaled_matmul.scaled_matmul_triton,
            config=config,
            interpret=not on_gpu,
            **({"x_scale_layout": "gm"} if block else {}),
        )
        quantize = functools.partial(
            quantize_activation_triton,
            granularity="group" if block else "token",
            scale_layout="gm",
            interpret=not on_gpu,
        )
        weight = n * k + (4 * -(-n // BLOCK) * groups if block else 4)
        x_scales = 4 * m * (groups if block else 1)
        fields = dataclasses.asdict(config)
        make = functools.partial(_quantized, block=block)
        yield name, Contender("fp8", make, matmul, m * k + x_scales + weight + out, fields)
        if name != "per_tensor_promoted":
            both = functools.partial(_quantize_then, quantize, matmul)
            make = functools.partial(_half_quantized, block=block)
            yield f"{name}_with_quantize", Contender("fp8", make, both, 2 * m * k + weight + out, fields)
            alone = f"quantize_{'group' if block else 'token'}"
            yield alone, Contender("fp8", _activations, quantize, 3 * m * k + x_scales)


def measure(
    names: list[str], rows_of_x: list[int], results: ResultFile, deadline: Deadline, *, only: list[str], samples: int
) -> None:
    """Time what is not in `results` yet, until the deadline."""
    device = benchmarking.limits(results.header["device"])
    for m in rows_of_x:
        for name in names:
            for layer, (n, k) in SHAPES[name].items():
                for contender, c in contenders(m, n, k):
                    case = {"shape": f"{name} {layer}", "m": m, "n": n, "k": k, "contender": contender}
                    if contender.startswith("quantize"):  # does not depend on n
                        case |= {"shape": "activations", "n": 0}
                    if (only and contender not in only) or results.find(**case):
                        continue
                    if deadline.passed:
                        return
                    results.add(case | _row(c, device, case, samples=samples))


def _row(c: Contender, device: benchmarking.Limits | None, case: dict[str, Any], *, samples: int) -> dict[str, Any]:
    m, n, k = case["m"], case["n"], case["k"]
    flops = 2.0 * m * n * k
    try:
        sets, l2 = benchmarking.sets_needed(c.bytes_moved, device) if device else (2, "warm")
        floor = None
        rounds = 1
        if device:
            floor = benchmarking.floor_microseconds(device, flops=flops, bytes_moved=c.bytes_moved, operands=c.operands)
            calls = min(_MOST_CALLS, math.ceil(_PROGRAM_SECONDS * 1e6 / floor))
            calls = max(2, min(calls, _OUTPUT_BYTES // max(2 * m * n, 3 * m * k)))
            rounds = max(1, calls // sets)
        operand_sets = [c.make(jax.random.key(i), m, n or k, k) for i in range(sets)]
        timing = benchmarking.time_calls(c.run, operand_sets, rounds=rounds, samples=samples, l2=l2)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    seconds = timing.microseconds / 1e6
    return {
        **dataclasses.asdict(timing),
        "tflops": flops / seconds / 1e12,
        "gb_per_second": c.bytes_moved / seconds / 1e9,
        "share_of_roofline": None if floor is None else floor / timing.microseconds,
        "config": c.config,
    }


def ratios(rows: list[dict[str, Any]]) -> dict[tuple, float]:
    """Speed relative to BF16 by (shape, m, contender)."""
    timed = {(r["shape"], r["m"], r["contender"]): r["microseconds"] for r in rows if "microseconds" in r}
    return {
        key: timed[key[0], key[1], "bf16"] / time for key, time in timed.items() if (key[0], key[1], "bf16") in timed
    }


def render(results: ResultFile) -> Table:
    """The table, by shape and m."""
    table = Table(title=f"{results.header['title']}, {results.header['device']}")
    for heading in ("shape", "n × k", "m", "", "µs", "TFLOP/s", "GB/s", "of roofline", "× BF16"):
        table.add_column(heading, justify="left" if heading in ("shape", "") else "right")
    faster = ratios(results.rows)
    for r in sorted(results.rows, key=lambda r: (r["shape"], r["m"])):
        start = (r["shape"], f"{r['n']} × {r['k']}", str(r["m"]), r["contender"])
        if "error" in r:
            table.add_row(*start, r["error"].splitlines()[0][:40])
            continue
        share, ratio = r["share_of_roofline"], faster.get((r["shape"], r["m"], r["contender"]))
        table.add_row(
            *start,
            f"{r['microseconds']:.1f}{'' if r['l2'] == 'cold' else ' warm'}",
            f"{r['tflops']:.0f}",
            f"{r['gb_per_second']:.0f}",
            "" if share is None else f"{share:.0%}",
            "" if ratio is None else f"{ratio:.2f}",
        )
    return table


def summary(results: ResultFile) -> dict[str, Any]:
    """Geometric means of the ratio to BF16 over the shapes, by contender, for decode and for prefill."""
    means: dict[str, dict[str, float]] = {}
    for phase, inside in (("decode m <= 16", range(1, 17)), ("prefill m >= 2048", range(2048, 1 << 30))):
        by_contender: dict[str, list[float]] = {}
        for (_, m, contender), ratio in ratios(results.rows).items():
            if m in inside:
                by_contender.setdefault(contender, []).append(math.log(ratio))
        means[phase] = {name: round(math.exp(sum(logs) / len(logs)), 3) for name, logs in by_contender.items()}
    return {**results.header, "rows": len(results.rows), "times_bf16": means}


def main(
    shapes: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(SHAPES)}.")] = "llama-3.1-8b",
    m: Annotated[str, typer.Option(help="Rows; in this order.")] = "1,4096,16,2048,64,8192,256,1024",
    only: Annotated[str, typer.Option(help="Contenders to time; all by default.")] = "",
    samples: Annotated[int, typer.Option(help="Samples a median.")] = 5,
    minutes: Annotated[float, typer.Option(help="Stop after; a later run goes on if --json is given.")] = 60,
    json_file: Annotated[Path | None, typer.Option("--json", help="Written row by row.")] = None,
) -> None:
    """Time FP8 and BF16 matrix products."""
    names = [name.strip() for name in shapes.split(",")]
    if unknown := set(names) - set(SHAPES):
        raise SystemExit(f"benchmark_matmul: unknown shapes {sorted(unknown)}; choose of {', '.join(SHAPES)}")
    try:
        results = ResultFile(json_file, title="matrix products", device=jax.devices()[0].device_kind)
    except ValueError as error:
        raise SystemExit(f"benchmark_matmul: {error}") from None
    rows = [int(part) for part in m.split(",")]
    chosen = [part for part in only.split(",") if part]
    measure(names, rows, results, Deadline(minutes), only=chosen, samples=samples)
    Console(width=140).print(render(results))
    print(json.dumps(summary(results)))


def _kind() -> str:
    """The device whose configs are taken: interpreted, H100's."""
    return current_device_kind() or TARGETS["h100"].name


def _config(op: Literal["scaled_matmul", "block_scaled_matmul"], m: int, n: int, k: int) -> Config:
    """The tuned config for the shape, else the default."""
    if entry := tuning.nearest(tuning.load(_kind(), op), {"m": m, "n": n, "k": k}):
        return Config(**entry.config)
    module = scaled_matmul if op == "scaled_matmul" else block_scaled_matmul
    return module.default_config(_kind(), m, n, k)


def _product(x: jax.Array, w: jax.Array, *, precision: Any = None) -> jax.Array:
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.bfloat16)


def _quantize_then(quantize: Callable, matmul: Callable, x: jax.Array, w: jax.Array, w_scale: jax.Array) -> jax.Array:
    return matmul(*quantize(x), w, w_scale)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random(key: jax.Array, shape: tuple[int, int], dtype: str) -> jax.Array:
    values = jax.random.normal(key, shape, jnp.bfloat16)
    if dtype == "bfloat16":
        return values
    return jnp.clip(values * jnp.bfloat16(_SPREAD), -448, 448).astype(jnp.float8_e4m3fn)


def _pair(key: jax.Array, m: int, n: int, k: int, x_dtype: str, w_dtype: str) -> tuple[jax.Array, jax.Array]:
    of_x, of_w = jax.random.split(key)
    return _random(of_x, (m, k), x_dtype), _random(of_w, (n, k), w_dtype)


def _bf16(key: jax.Array, m: int, n: int, k: int) -> tuple[jax.Array, ...]:
    return _pair(key, m, n, k, "bfloat16", "bfloat16")


def _codes(key: jax.Array, m: int, n: int, k: int) -> tuple[jax.Array, ...]:
    return _pair(key, m, n, k, "float8_e4m3fn", "float8_e4m3fn")


def _activations(key: jax.Array, m: int, n: int, k: int) -> tuple[jax.Array, ...]:
    return (_random(key, (m, k), "bfloat16"),)


def _quantized(key: jax.Array, m: int, n: int, k: int, *, block: bool) -> tuple[jax.Array, ...]:
    x, w = _codes(key, m, n, k)
    x_scale = jnp.full((-(-k // BLOCK), m) if block else (m, 1), 1 / _SPREAD, jnp.float32)
    return x, x_scale, w, _weight_scale(n, k, block=block)


def _half_quantized(key: jax.Array, m: int, n: int, k: int, *, block: bool) -> tuple[jax.Array, ...]:
    return *_pair(key, m, n, k, "bfloat16", "float8_e4m3fn"), _weight_scale(n, k, block=block)


def _weight_scale(n: int, k: int, *, block: bool) -> jax.Array:
    return jnp.full((-(-n // BLOCK), -(-k // BLOCK)) if block else (1,), 1 / _SPREAD, jnp.float32)


if __name__ == "__main__":
    typer.run(main)
