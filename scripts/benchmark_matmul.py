"""How fast the FP8 matmuls are, beside XLA's in BF16 and cuBLASLt's in FP8, on the layers of
Llama-3.1.

    python scripts/benchmark_matmul.py --shapes llama-3.1-8b --m 1,16,2048,4096 --json FILE
    JAX_PLATFORMS=cpu python scripts/benchmark_matmul.py --shapes tiny      # no speed: that it runs

    bf16                     XLA's product of bfloat16 operands, with whatever its autotuning picks
    cublaslt_fp8             XLA's FP8 product without scales, forced to cuBLASLt with fast
                             accumulation (GPU, m > 1)
    per_tensor, per_block    the kernels here on quantized operands; "_promoted": float32 additions
                             every 128 inputs
    …_with_quantize          the same with the quantization of the activations before it
    quantize_token, _group   that quantization alone

Roofline: the data sheet's peak of the operands' type or the memory bandwidth, whichever binds; each
input is counted as read once and each output as written once. `fp8jax.devtools.benchmarking` says
how time is taken. On a CPU the kernels run interpreted and times mean nothing.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from jax import lax
from rich.console import Console
from rich.table import Table

from fp8jax.device import H100, Gpu, current_device_kind, current_gpu
from fp8jax.devtools import benchmarking
from fp8jax.devtools.benchmarking import Contender, Deadline, ResultFile
from fp8jax.devtools.shapes import LINEAR_SHAPES, TINY_LINEARS
from fp8jax.pallas_kernels import block_scaled_matmul, matmul_config, scaled_matmul, tuning
from fp8jax.pallas_kernels.formats import BLOCK
from fp8jax.pallas_kernels.matmul_config import Config
from fp8jax.pallas_kernels.quantize import quantize_activation_triton

SHAPES = LINEAR_SHAPES | {"tiny": TINY_LINEARS}
CODE_SPREAD = (
    80.0  # standard deviation of the codes: the largest of a big normal matrix then lies near 448
)

# Options that the benchmarks of products have in common.
Only = Annotated[str, typer.Option(help="Contenders to time; all by default.")]
Samples = Annotated[int, typer.Option(help="Samples a median.")]
Minutes = Annotated[float, typer.Option(help="Stop after; a later run goes on if --json is given.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Written row by row.")]


def contenders(m: int, n: int, k: int) -> Iterator[tuple[str, Contender]]:
    """All of them that run on the current device, by name."""
    on_gpu = bool(current_device_kind())  # elsewhere kernels are interpreted
    out, groups, flops = 2 * m * n, -(-k // BLOCK), 2.0 * m * n * k
    contender = functools.partial(Contender, operands="fp8", flops=flops)

    def made(
        maker: Callable[..., tuple[jax.Array, ...]], **options: Any
    ) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
        return functools.partial(maker, m=m, n=n, k=k, **options)

    moved = 2 * (m * k + n * k) + out
    yield (
        "bf16",
        Contender(operands="bf16", make=made(_bf16), run=_product, flops=flops, bytes_moved=moved),
    )
    if on_gpu and m > 1:  # with one row there is no such call, and no FP8 preset either
        preset = functools.partial(
            _product, precision=lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32_FAST_ACCUM
        )
        yield (
            "cublaslt_fp8",
            contender(make=made(_codes), run=preset, bytes_moved=m * k + n * k + out),
        )

    gpu, sizes = config_gpu(), {"m": m, "n": n, "k": k}
    configs = {
        "per_tensor": tuned_config("scaled_matmul", sizes)
        or scaled_matmul.default_config(gpu, m, n, k),
        "per_block": tuned_config("block_scaled_matmul", sizes)
        or block_scaled_matmul.default_config(gpu, m, n, k),
    }
    promoted = matmul_config.default_scaled_config(gpu, m, n, k, precise=True)
    if promoted.promotion != configs["per_tensor"].promotion:
        configs["per_tensor_promoted"] = promoted
    for name, config in configs.items():
        block = name == "per_block"
        matmul = functools.partial(
            block_scaled_matmul.block_scaled_matmul_triton
            if block
            else scaled_matmul.scaled_matmul_triton,
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
        moved = m * k + x_scales + weight + out
        yield (
            name,
            contender(
                make=made(_quantized, block=block), run=matmul, bytes_moved=moved, config=fields
            ),
        )
        if name != "per_tensor_promoted":
            both = functools.partial(_quantize_then, quantize, matmul)
            make, moved = made(_half_quantized, block=block), 2 * m * k + weight + out
            yield (
                f"{name}_with_quantize",
                contender(make=make, run=both, bytes_moved=moved, config=fields),
            )
            alone = f"quantize_{'group' if block else 'token'}"
            yield (
                alone,
                contender(
                    make=made(_activations),
                    run=quantize,
                    flops=0.0,
                    bytes_moved=3 * m * k + x_scales,
                ),
            )


def cases_of(names: list[str], rows_of_x: list[int]) -> Iterator[tuple[dict[str, Any], Contender]]:
    """What `benchmarking.measure` takes, in the order in which it is timed."""
    for m, name in itertools.product(rows_of_x, names):
        for layer, (n, k) in SHAPES[name].items():
            for contender, c in contenders(m, n, k):
                case = {"shape": f"{name} {layer}", "m": m, "n": n, "k": k, "contender": contender}
                if contender.startswith("quantize"):  # does not depend on n
                    case |= {"shape": "activations", "n": 0}
                yield case, c


def ratios(rows: list[dict[str, Any]]) -> list[float | None]:
    """Speed relative to BF16."""
    return benchmarking.ratios(rows, same=("shape", "m"), baselines=lambda _: ("bf16",))


def render(results: ResultFile) -> Table:
    """The table, by shape and m."""
    fields = {"shape": "shape", "n × k": lambda r: f"{r['n']} × {r['k']}", "m": "m"}
    return table_of(results, fields, ratios(results.rows), by=("shape", "m"))


def table_of(
    results: ResultFile,
    fields: Mapping[str, str | Callable[[dict[str, Any]], str]],
    faster: Sequence[float | None],
    *,
    by: tuple[str, ...],
) -> Table:
    """Results as a table: what was timed, how fast it was, and how fast beside its baseline.

    Args:
        fields: heading -> a field of the rows, or a function of a row.
        faster: a ratio a row.
        by: fields to sort by.
    """
    table = Table(title=f"{results.header['title']}, {results.header['device']}")
    for heading in (*fields, "", "µs", "TFLOP/s", "GB/s", "of roofline", "× BF16"):
        table.add_column(
            heading, justify="left" if heading in ("shape", "routing", "") else "right"
        )
    ordered = sorted(
        zip(results.rows, faster, strict=True), key=lambda pair: [pair[0][name] for name in by]
    )
    for r, ratio in ordered:
        start = [str(r[field]) if isinstance(field, str) else field(r) for field in fields.values()]
        if "error" in r:
            table.add_row(*start, r["contender"], r["error"].splitlines()[0][:40])
            continue
        share = r["share_of_roofline"]
        table.add_row(
            *start,
            r["contender"],
            f"{r['microseconds']:.1f}{'' if r['l2'] == 'cold' else ' warm'}",
            f"{r['tflops']:.0f}",
            f"{r['gb_per_second']:.0f}",
            "" if share is None else f"{share:.0%}",
            "" if ratio is None else f"{ratio:.2f}",
        )
    return table


def summary(results: ResultFile) -> dict[str, Any]:
    """Geometric means of the ratio to BF16 over the shapes, by contender, for decode and for
    prefill."""
    phases = {"decode m <= 16": range(1, 17), "prefill m >= 2048": range(2048, 1 << 30)}
    means = benchmarking.mean_ratios(results.rows, ratios(results.rows), phases, size="m")
    return {**results.header, "rows": len(results.rows), "times_bf16": means}


def opened(
    script: str, json_file: Path | None, *, title: str, chosen: list[str], known: Iterable[str]
) -> ResultFile:
    """The results to go on with; ends the script with a line where a shape or the file is not
    right."""
    if unknown := set(chosen) - set(known):
        raise SystemExit(
            f"{script}: unknown shapes {sorted(unknown)}; choose of {', '.join(known)}"
        )
    try:
        return ResultFile(json_file, title=title, device=jax.devices()[0].device_kind)
    except ValueError as error:
        raise SystemExit(f"{script}: {error}") from None


def main(
    shapes: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join(SHAPES)}.")
    ] = "llama-3.1-8b",
    m: Annotated[
        str, typer.Option(help="Rows; in this order.")
    ] = "1,4096,16,2048,64,8192,256,1024",
    only: Only = "",
    samples: Samples = 5,
    minutes: Minutes = 60,
    json_file: JsonFile = None,
) -> None:
    """Time FP8 and BF16 matrix products."""
    names = parts(shapes)
    results = opened(
        "benchmark_matmul", json_file, title="matrix products", chosen=names, known=SHAPES
    )
    cases = cases_of(names, [int(part) for part in parts(m)])
    benchmarking.measure(cases, results, Deadline(minutes), only=parts(only), samples=samples)
    Console(width=140).print(render(results))
    print(json.dumps(summary(results)))


def parts(option: str) -> list[str]:
    """What stands between the commas."""
    return [part.strip() for part in option.split(",") if part.strip()]


def config_gpu() -> Gpu:
    """The GPU whose configs are taken: interpreted, H100's."""
    return current_gpu() or H100


def tuned_config(op: str, shape: Mapping[str, int | str]) -> Config | None:
    """The tuned config for the shape, None where there is none near."""
    entry = tuning.nearest(tuning.load(config_gpu().kind, op), shape)
    return entry and Config(**entry.config)


def _product(x: jax.Array, w: jax.Array, *, precision: Any = None) -> jax.Array:
    return lax.dot_general(
        x, w, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.bfloat16
    )


def _quantize_then(
    quantize: Callable, matmul: Callable, x: jax.Array, w: jax.Array, w_scale: jax.Array
) -> jax.Array:
    return matmul(*quantize(x), w, w_scale)


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_operand(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Normal numbers of standard deviation 1, or of `CODE_SPREAD` as float8_e4m3fn codes."""
    values = jax.random.normal(key, shape, jnp.bfloat16)
    if dtype == "bfloat16":
        return values
    return jnp.clip(values * jnp.bfloat16(CODE_SPREAD), -448, 448).astype(jnp.float8_e4m3fn)


def _pair(
    key: jax.Array, m: int, n: int, k: int, x_dtype: str, w_dtype: str
) -> tuple[jax.Array, jax.Array]:
    of_x, of_w = jax.random.split(key)
    return random_operand(of_x, (m, k), x_dtype), random_operand(of_w, (n, k), w_dtype)


def _bf16(key: jax.Array, m: int, n: int, k: int) -> tuple[jax.Array, ...]:
    return _pair(key, m, n, k, "bfloat16", "bfloat16")


def _codes(key: jax.Array, m: int, n: int, k: int) -> tuple[jax.Array, ...]:
    return _pair(key, m, n, k, "float8_e4m3fn", "float8_e4m3fn")


def _activations(key: jax.Array, m: int, n: int, k: int) -> tuple[jax.Array, ...]:
    return (random_operand(key, (m, k), "bfloat16"),)


def _quantized(key: jax.Array, m: int, n: int, k: int, *, block: bool) -> tuple[jax.Array, ...]:
    x, w = _codes(key, m, n, k)
    x_scale = jnp.full((-(-k // BLOCK), m) if block else (m, 1), 1 / CODE_SPREAD, jnp.float32)
    return x, x_scale, w, _weight_scale(n, k, block=block)


def _half_quantized(
    key: jax.Array, m: int, n: int, k: int, *, block: bool
) -> tuple[jax.Array, ...]:
    return *_pair(key, m, n, k, "bfloat16", "float8_e4m3fn"), _weight_scale(n, k, block=block)


def _weight_scale(n: int, k: int, *, block: bool) -> jax.Array:
    return jnp.full(
        (-(-n // BLOCK), -(-k // BLOCK)) if block else (1,), 1 / CODE_SPREAD, jnp.float32
    )


if __name__ == "__main__":
    typer.run(main)
