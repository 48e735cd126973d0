"""Programs to compile offline: one kernel on a given shape, for tests and for
`scripts/inspect_kernels.py`."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fp8jax.device import required_gpu
from fp8jax.devtools.offline_compile import Program
from fp8jax.pallas_kernels import expert_routing
from fp8jax.pallas_kernels.block_scaled_matmul import block_scaled_matmul_triton
from fp8jax.pallas_kernels.block_scaled_matmul import default_config as default_block_scaled_config
from fp8jax.pallas_kernels.formats import ACTIVATIONS, BLOCK, WEIGHTS, WeightGranularity
from fp8jax.pallas_kernels.grouped_matmul import Slots
from fp8jax.pallas_kernels.grouped_matmul_kernel import grouped_scaled_matmul_triton
from fp8jax.pallas_kernels.matmul_config import Config
from fp8jax.pallas_kernels.scaled_matmul import default_config as default_scaled_config
from fp8jax.pallas_kernels.scaled_matmul import scaled_matmul_triton

MatmulOp = Literal["scaled_matmul", "block_scaled_matmul"]


def matmul(
    op: MatmulOp,
    m: int,
    n: int,
    k: int,
    config: dict[str, Any] | None = None,
    out_dtype: str = "bfloat16",
    bias: bool = False,
    per_channel: bool = False,
    x_scale_layout: Literal["mg", "gm"] = "gm",
) -> Program:
    """One call of a matmul kernel with per-token or 1×128 activation scales.

    Args:
        op: which kernel.
        m, n, k: rows, outputs, inputs.
        config: fields of a `Config`; the default of the device if None.
        out_dtype, bias, x_scale_layout: as the kernel takes them.
        per_channel: one weight scale a channel, for `scaled_matmul`.
    """
    default = default_scaled_config if op == "scaled_matmul" else default_block_scaled_config
    chosen = Config(**config) if config else default(required_gpu(op), m, n, k)
    groups = -(-k // BLOCK)
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    x, w = (jax.ShapeDtypeStruct((rows, k), jnp.float8_e4m3fn) for rows in (m, n))
    if op == "scaled_matmul":
        scales = f32((m, 1)), f32((n, 1) if per_channel else (1,))
        kernel = functools.partial(
            scaled_matmul_triton, out_dtype=jnp.dtype(out_dtype), config=chosen
        )
    else:
        scales = (
            f32((groups, m) if x_scale_layout == "gm" else (m, groups)),
            f32((-(-n // BLOCK), groups)),
        )
        kernel = functools.partial(
            block_scaled_matmul_triton,
            out_dtype=jnp.dtype(out_dtype),
            config=chosen,
            x_scale_layout=x_scale_layout,
        )
    arguments = [x, scales[0], w, scales[1]] + (
        [jax.ShapeDtypeStruct((n,), jnp.bfloat16)] if bias else []
    )

    def program(x, x_scale, w, w_scale, bias=None):
        return kernel(x, x_scale, w, w_scale, bias=bias)

    return Program(program, tuple(arguments))


def grouped_matmul(
    scales: WeightGranularity,
    tokens: int,
    top_k: int,
    num_experts: int,
    n: int,
    k: int,
    row_groups: int = 1,
    gathered: bool = True,
    config: dict[str, Any] | None = None,
    x_scale_layout: Literal["mg", "gm"] = "mg",
) -> Program:
    """One product of sorted slots with a stack of experts, in bfloat16.

    Args:
        scales: of the weights.
        tokens, top_k: there are tokens · top_k slots.
        num_experts, n, k, row_groups: the stack.
        gathered: slots read rows of x by id, as gate_up does; otherwise slot i reads row i and has
            a weight, as down does.
        config: fields of a `Config`; the default of the device if None.
        x_scale_layout: as the kernel takes it.
    """
    slots = tokens * top_k
    m = tokens if gathered else slots
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    x, w = (
        jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn) for shape in ((m, k), (num_experts, n, k))
    )
    of_w = WEIGHTS[scales]
    x_scale = ACTIVATIONS[of_w.activations[0]].scale_shape((m, k))
    if of_w.changes_along_k and x_scale_layout == "gm":
        x_scale = x_scale[::-1]
    x_scale = f32(x_scale)
    w_scale = f32(of_w.scale_shape((num_experts, n, k), row_groups=row_groups))
    sizes = jax.ShapeDtypeStruct((num_experts,), jnp.int32)
    per_slot = jax.ShapeDtypeStruct((slots,), jnp.int32) if gathered else f32((slots,))
    kernel = functools.partial(
        grouped_scaled_matmul_triton,
        granularity=scales,
        row_groups=row_groups,
        x_scale_layout=x_scale_layout,
        config=Config(**config) if config else None,
    )

    def program(x, x_scale, w, w_scale, sizes, per_slot):
        slots = Slots(sizes, row=per_slot) if gathered else Slots(sizes, weight=per_slot)
        return kernel(x, x_scale, w, w_scale, slots)

    return Program(program, (x, x_scale, w, w_scale, sizes, per_slot))


def routing(tokens: int, num_experts: int, top_k: int) -> Program:
    """From a router's bfloat16 logits to the work of an expert layer."""
    rule = expert_routing.Rule(
        top_k=top_k, softmax_over="all", renormalise=True, weight_dtype="bfloat16"
    )
    run = functools.partial(expert_routing.route_experts_triton, rule=rule, block_m=16)
    return Program(
        lambda logits: run(logits), (jax.ShapeDtypeStruct((tokens, num_experts), jnp.bfloat16),)
    )
