"""What the compiler makes of the kernels, for a GPU that need not be here: registers, spills,
shared memory, tensor cores.

    python scripts/inspect_kernels.py --device h100
    python scripts/inspect_kernels.py --device l40 --op block_scaled_matmul --m 16,4096
    python scripts/inspect_kernels.py --device h100 --step decode --batch 16 --json step.json

One row a kernel, with the config that would run (tuned if there is a table, else the default) on
the widths of a model's layers. The grid of an expert kernel stands beside its static bound, tiles
of slots × tiles of outputs: what a launch costs whatever the routing is. `--step` compiles a whole
decode step, or the prefill of a 2048-token prompt, and lists its launches, its temporary bytes, and
everything it writes that is as large as the smallest weight and comes from no kernel of ours: a
copied or converted weight shows there (among activations, which are as large in a prefill). Layers
are alike, so two of them are enough, and kernels a layer is what the second one adds.

Needs the extra `[offline-gpu]`. Nothing is timed: there is no GPU in this.
"""

import dataclasses
import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.table import Table

from fp8jax.devtools import benchmarking
from fp8jax.devtools.offline_compile import OfflineCompileError, OfflineCompiler, Program, available
from fp8jax.devtools.offline_report import CompileReport, KernelReport
from fp8jax.devtools.offline_targets import TARGETS
from fp8jax.devtools.shapes import EXPERT_SHAPES, LINEAR_SHAPES, WIDTHS
from fp8jax.pallas_kernels import (
    block_scaled_matmul,
    decode_attention,
    expert_routing,
    grouped_gate_up,
    grouped_matmul,
    quantize,
    rms_norm_quantize,
    rope_cache,
    scaled_matmul,
    silu_mul_quantize,
    tuning,
)
from fp8jax.pallas_kernels.grouped_matmul_kernel import GroupedProblem
from fp8jax.pallas_kernels.matmul_config import Config

_MATMULS = {"scaled_matmul": scaled_matmul, "block_scaled_matmul": block_scaled_matmul}
_QUANTIZERS = ("quantize", "rms_norm_quantize", "silu_mul_quantize")
_OF_EXPERTS = ("route_experts", "grouped_scaled_matmul")
OPS = (*_MATMULS, *_OF_EXPERTS, *_QUANTIZERS, "decode_attention", "rope_cache")
_CACHE_LENGTH, _PROMPT = 8192, 2048
_MOST_DECODE_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to compile: the shape in words, where the program is, its arguments, and the
    config it will use.

    `bound` is what the kernel's grid has to be, where that is a promise: tiles of slots by tiles of
    outputs.
    """

    op: str
    shape: str
    program: str
    arguments: dict[str, Any]
    config: Any
    bound: tuple[int, int] | None = None


def cases(op: str, model: str, device: str, m: int) -> Iterator[Case]:
    """What to compile for one op, one model and m rows (tokens)."""
    widths, here = WIDTHS[model], "inspect_kernels"
    if op in _OF_EXPERTS:
        if model in EXPERT_SHAPES:
            yield from expert_cases(op, model, device, m)
    elif op in _MATMULS:
        gpu = TARGETS[device]
        for layer, (n, k) in LINEAR_SHAPES[model].items():
            arguments: dict[str, Any] = {"op": op, "m": m, "n": n, "k": k}
            if entry := tuning.nearest(tuning.load(gpu.kind, op), {"m": m, "n": n, "k": k}):
                config: Any = dict(entry.config)
                arguments["config"] = config
            else:
                config = _MATMULS[op].default_config(gpu, m, n, k)
            program = "fp8jax.devtools.offline_programs:matmul"
            yield Case(op, f"{layer} [{m}, {k}] × [{n}, {k}]", program, arguments, config)
    elif op in _QUANTIZERS:
        for granularity in ("token", "group"):
            width, rows = widths.hidden, m
            if op == "silu_mul_quantize":
                width, rows = widths.inner, m * widths.top_k
            whole_row = op == "rms_norm_quantize" or granularity == "token"
            config = (
                quantize.whole_row_config(rows, width)
                if whole_row
                else quantize.default_config(rows, width, "group")
            )
            arguments = {"op": op, "m": rows, "width": width, "granularity": granularity}
            yield Case(
                op, f"{granularity} [{rows}, {width}]", f"{here}:quantizer", arguments, config
            )
    elif m <= _MOST_DECODE_ROWS:  # of a decode step, so m is the batch
        config = rope_cache.default_config()
        if op == "decode_attention":
            config = decode_attention.default_config(
                TARGETS[device], m, widths.kv_heads, _CACHE_LENGTH, widths.head_dim, jnp.bfloat16
            )
        heads = f"{widths.heads}/{widths.kv_heads} heads of {widths.head_dim}"
        shape = f"batch {m}, {heads}, cache {_CACHE_LENGTH}"
        yield Case(op, shape, f"{here}:{op}_program", {"m": m, "model": model}, config)


def expert_cases(op: str, model: str, device: str, tokens: int) -> Iterator[Case]:
    """The same for the experts of a model."""
    experts = EXPERT_SHAPES[model]
    num_experts, top_k = experts.num_experts, experts.top_k
    gpu, slots = TARGETS[device], tokens * top_k
    routed = f"{tokens} tokens × {top_k} of {num_experts} experts"
    if op == "route_experts":
        if expert_routing.why_not(tokens, num_experts, top_k, jnp.bfloat16) is None:
            arguments: dict[str, Any] = {
                "tokens": tokens,
                "num_experts": num_experts,
                "top_k": top_k,
            }
            yield Case(op, routed, "fp8jax.devtools.offline_programs:routing", arguments, {})
        return
    for name in ("gate_up", "down"):
        row_groups, n, k = experts.stack(name)
        for scales in ("tensor", "block"):
            stack = {"num_experts": num_experts, "n": n, "k": k, "row_groups": row_groups}
            arguments = {
                "scales": scales,
                "tokens": tokens,
                "top_k": top_k,
                "gathered": name == "gate_up",
                **stack,
            }
            config = grouped_matmul.default_config(
                gpu, slots, num_experts, n, k, row_groups=row_groups, scales=scales
            )
            shape = {
                "slots": slots,
                "experts": num_experts,
                "n": n,
                "k": k,
                "row_groups": row_groups,
                "scales": scales,
            }
            if entry := tuning.nearest(tuning.load(gpu.kind, op), shape):
                arguments["config"] = dict(entry.config)
                config = Config(**entry.config)
            problem = GroupedProblem(slots, num_experts, n, k, row_groups, config)
            yield Case(
                op,
                f"{name}, {scales}, {routed} [{n}, {k}]",
                "fp8jax.devtools.offline_programs:grouped_matmul",
                arguments,
                config,
                (problem.slot_tiles, problem.column_tiles),
            )


bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
i32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)


def quantizer(op: str, m: int, width: int, granularity: quantize.ActivationGranularity) -> Program:
    """One quantizing kernel; group scales in the layout that the matmul reads."""
    if op == "quantize":
        run = functools.partial(
            quantize.quantize_activation_triton, granularity=granularity, scale_layout="gm"
        )
        return Program(lambda x: run(x), (bf16((m, width)),))
    if op == "silu_mul_quantize":
        run = functools.partial(
            silu_mul_quantize.silu_mul_quantize_triton, granularity=granularity, scale_layout="gm"
        )
        return Program(lambda gate_up: run(gate_up), (bf16((m, 2 * width)),))

    def normed(x: jax.Array, weight: jax.Array, residual: jax.Array) -> Any:
        return rms_norm_quantize.rms_norm_quantize_triton(
            x, weight, granularity, epsilon=1e-5, residual=residual, scale_layout="gm"
        )

    return Program(normed, (bf16((m, width)), bf16((width,)), bf16((m, width))))


def decode_attention_program(m: int, model: str) -> Program:
    """Attention of m rows over a cache."""
    w = WIDTHS[model]
    cache = bf16((m, w.kv_heads, _CACHE_LENGTH, w.head_dim))
    run = functools.partial(decode_attention.decode_attention_triton, scale=w.head_dim**-0.5)
    return Program(
        lambda *operands: run(*operands), (bf16((m, w.heads, w.head_dim)), cache, cache, i32((m,)))
    )


def rope_cache_program(m: int, model: str) -> Program:
    """Rotary embedding and cache write of m rows, the caches donated."""
    w = WIDTHS[model]
    cache, angles = bf16((m, w.kv_heads, _CACHE_LENGTH, w.head_dim)), f32((m, w.head_dim // 2))
    qkv = bf16((m, (w.heads + 2 * w.kv_heads) * w.head_dim))
    return Program(
        lambda *operands: rope_cache.rope_cache_triton(*operands),
        (qkv, angles, angles, cache, cache, i32((m,))),
        (3, 4),
    )


def inspect_kernels(
    device: str, ops: list[str], models: list[str], rows: list[int]
) -> list[dict[str, Any]]:
    """One row a kernel and shape."""
    found = []
    with OfflineCompiler() as compiler:
        for op in ops:
            for model in models:
                for case in (case for m in rows for case in cases(op, model, device, m)):
                    start = {
                        "op": case.op,
                        "model": model,
                        "shape": case.shape,
                        "config": _fields(case.config),
                    }
                    if case.bound is not None:
                        start["static_bound"] = case.bound
                    try:
                        report = compiler.compile(device, case.program, case.arguments)
                    except OfflineCompileError as error:
                        found.append(start | {"error": str(error)[-500:]})
                        continue
                    found += [
                        start | _facts(kernel)
                        for kernel in report.kernels.values()
                        if _is_ours(kernel.name)
                    ]
    return found


def inspect_step(
    device: str, step: str, model: str, batch: int, scheme: str | None, implementation: str
) -> dict[str, Any]:
    """A decode step or a prefill of a model: launches a layer by kind, temporary bytes, and large
    buffers."""
    arguments = {"model": model, "batch": batch, "scheme": scheme, "implementation": implementation}
    program = "fp8jax.devtools.offline_models:decode_step"
    if step == "prefill":
        program, arguments["tokens"] = "fp8jax.devtools.offline_models:prefill", _PROMPT
    with OfflineCompiler() as compiler:
        one, two = (
            compiler.compile(device, program, arguments | {"layers": layers}) for layers in (1, 2)
        )
    a_layer = Counter(map(_kind, two.launches)) - Counter(map(_kind, one.launches))
    bytes_of_code = 2 if scheme is None else 1
    weights = [*LINEAR_SHAPES[model].values()]
    if experts := EXPERT_SHAPES.get(model):
        weights += [experts.gate_up[1:], experts.down[1:]]
    smallest = bytes_of_code * min(n * k for n, k in weights)
    return {
        "step": step,
        **arguments,
        "launches_per_layer": len(two.launches) - len(one.launches),
        "launches_per_layer_by_kind": dict(a_layer),
        "temporary_bytes": two.bytes_by_use["temporary"],
        "large_buffers": [
            dataclasses.asdict(buffer) for buffer in two.buffers_of_at_least(smallest)
        ],
        "kernels": _step_kernels(two, device, model, batch * arguments.get("tokens", 1), scheme),
    }


def _step_kernels(
    report: CompileReport, device: str, model: str, tokens: int, scheme: str | None
) -> list[dict[str, Any]]:
    """The kernels of a step; those of the experts, which come in the order gate_up, down, with the
    bound of their grid."""
    products = (
        expert_cases("grouped_scaled_matmul", model, device, tokens)
        if model in EXPERT_SHAPES
        else ()
    )
    scales = "block" if scheme == "fp8_per_block" else "tensor"
    of_experts = iter([case for case in products if case.arguments["scales"] == scales])
    found = []
    for kernel in report.kernels.values():
        if not _is_ours(kernel.name):
            continue
        found.append(_facts(kernel))
        if kernel.name.startswith("grouped") and (case := next(of_experts, None)):
            config, bound = case.config, case.bound
            if kernel.name.startswith("grouped_gate_up"):  # one column tile for gate and up
                config, stack = grouped_gate_up.default_config(), case.arguments
                sizes = (tokens * stack["top_k"], stack["num_experts"], stack["n"] // 2, stack["k"])
                problem = GroupedProblem(*sizes, row_groups=1, config=config)
                bound = (problem.slot_tiles, problem.column_tiles)
            found[-1] |= {"shape": case.shape, "config": _fields(config), "static_bound": bound}
    return found


def _kind(launch: str) -> str:
    """A launch without the numbers that XLA gives it: loop_add_fusion_12 is a loop_add_fusion,
    sort_14_1 a sort."""
    return re.sub(r"(_+\d+)+$", "", launch)


def _is_ours(kernel: str) -> bool:
    return kernel.startswith(
        (
            "scaled_matmul",
            "block_scaled",
            "grouped",
            "route",
            "quantize_",
            "rms_norm",
            "silu_mul",
            "decode_attention",
            "rope",
        )
    )


def _fields(config: Any) -> dict[str, Any]:
    return config if isinstance(config, dict) else dataclasses.asdict(config)


def _facts(kernel: KernelReport) -> dict[str, Any]:
    return {**dataclasses.asdict(kernel), "tensor_cores": _tensor_cores(kernel)}


def _tensor_cores(kernel: KernelReport) -> dict[str, int]:
    return {name: count for name, count in kernel.instructions.items() if "." in name}


def render(rows: list[dict[str, Any]], title: str) -> Table:
    """The kernels as a table."""
    table = Table(title=title)
    for heading in (
        "kernel",
        "shape",
        "config",
        "grid",
        "regs",
        "spill B",
        "smem KB",
        "blocks/SM",
        "tensor cores",
        "async copies",
    ):
        table.add_column(
            heading,
            justify="right" if heading in ("regs", "spill B", "smem KB", "blocks/SM") else "left",
        )
    for r in rows:
        shape, config = r.get("shape", ""), _short(r.get("config", {}))
        if "error" in r:
            table.add_row(
                r["op"], shape, config, "", "", "", "", "", r["error"].splitlines()[-1][:60], ""
            )
            continue
        table.add_row(
            r["name"],
            shape,
            config,
            _grid(r),
            str(r["registers"]),
            str(r["spill_bytes"]),
            f"{r['shared_bytes'] / 1024:.0f}",
            str(r["blocks_per_sm"]),
            ", ".join(f"{count} {name}" for name, count in r["tensor_cores"].items()),
            ", ".join(f"{count} of {width} B" for width, count in r["copy_widths"].items()),
        )
    return table


def _grid(row: dict[str, Any]) -> str:
    """Programs of the launch, and what they must be where there is a static bound."""
    programs = math.prod(row["grid"])
    if "static_bound" not in row:
        return str(programs)
    tiles, columns = row["static_bound"]
    return f"{programs} {'=' if programs == tiles * columns else '≠'} {tiles} × {columns}"


def _short(config: dict[str, Any]) -> str:
    """16×64×256 4w st4, and what else is not as usual."""
    tile = "×".join(
        str(config[name]) for name in ("block_m", "block_n", "block_k", "block_s") if name in config
    )
    words = [tile, f"{config['num_warps']}w" if "num_warps" in config else ""]
    words.append(f"st{config['num_stages']}" if "num_stages" in config else "")
    words.append(
        f"split {splits}" if (splits := config.get("split_k", config.get("splits", 1))) > 1 else ""
    )
    words.append("swapped" if config.get("swap_operands") else "")
    words.append(
        f"promoted {config['promotion']}" if config.get("promotion", "none") != "none" else ""
    )
    return " ".join(word for word in words if word)


def main(
    device: Annotated[str, typer.Option(help=f"One of {', '.join(TARGETS)}.")],
    op: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join(OPS)}; all by default.")
    ] = ",".join(OPS),
    model: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join(WIDTHS)}.")
    ] = "llama-3.1-8b",
    m: Annotated[str, typer.Option(help="Rows.")] = "1,16,64,256,4096",
    step: Annotated[
        str, typer.Option(help="decode or prefill: compile the model's whole step instead.")
    ] = "",
    batch: Annotated[int, typer.Option(help="Rows of that step.")] = 1,
    scheme: Annotated[
        str, typer.Option(help="Scheme of that step; bf16 for none.")
    ] = "fp8_per_tensor",
    implementation: Annotated[str, typer.Option(help="Implementation of that step.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Save all of it here.")] = None,
) -> None:
    """Compile kernels for a GPU and print what came out."""
    for chosen, known in (
        (device, TARGETS),
        (op, OPS),
        (model, WIDTHS),
        (step or "decode", ("decode", "prefill")),
    ):
        if unknown := set(chosen.split(",")) - set(known):
            raise SystemExit(
                f"inspect_kernels: unknown {sorted(unknown)}; choose of {', '.join(known)}"
            )
    if reason := available():
        raise SystemExit(f"inspect_kernels: {reason}")
    console = Console(width=180)
    content: dict[str, Any] = {"device": TARGETS[device].kind, "versions": benchmarking.versions()}
    models = model.split(",")
    if step:
        try:
            steps = [
                inspect_step(
                    device, step, name, batch, None if scheme == "bf16" else scheme, implementation
                )
                for name in models
            ]
        except OfflineCompileError as error:
            raise SystemExit(f"inspect_kernels: {error}") from None
        content["steps"] = steps
        for found in steps:
            console.print(
                render(
                    found["kernels"],
                    f"{step} of {found['model']}, batch {batch}, {scheme}, on {device}",
                )
            )
            kinds = ", ".join(
                f"{count} {kind}" for kind, count in found["launches_per_layer_by_kind"].items()
            )
            console.print(f"launches a layer: {found['launches_per_layer']} ({kinds})")
            console.print(
                f"temporary memory of two layers: {found['temporary_bytes'] / 1e6:.1f} MB"
            )
            large = Counter(
                f"{b['opcode']} {b['dtype']}{list(b['shape'])}" for b in found["large_buffers"]
            )
            listed = ", ".join(f"{count} × {name}" for name, count in large.items())
            console.print(f"written by XLA and as large as a weight: {listed or 'nothing'}")
    else:
        content["kernels"] = inspect_kernels(
            device, op.split(","), models, [int(part) for part in m.split(",")]
        )
        console.print(
            render(content["kernels"], f"kernels on {TARGETS[device].kind}, compiled offline")
        )
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
