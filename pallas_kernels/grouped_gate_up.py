"""gate_up of experts, silu·mul and quantization for down in one kernel: for long batches, with
1×128 activation scales.

    gate, up = round( x[row[slot]] @ w[expert of slot].T )
    y = round( silu(gate) · up )
    codes, scale = quantize(y)

A program computes 128 gate columns and the 128 up columns that belong to them, for the same slots:
a whole group of scales, and all that silu·mul needs. Between the two products r · 2i floats are
then neither written nor read, and a tile of x is loaded once for both halves. Roundings are those
of the three single kernels, so results are the same but for the order in which tensor cores add.

With few slots an expert it does not pay: it would halve the number of programs, which are few, and
read no weight less. Nor can it be had with one scale a token, whose maximum lies across all
programs. Slots and tiles are those of `grouped_matmul.py`. No GPU has timed it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.device import Gpu, required_gpu
from fp8jax.pallas_kernels import grouped_matmul, matmul_tiles, quantize
from fp8jax.pallas_kernels.formats import BLOCK, unaddressable
from fp8jax.pallas_kernels.grouped_matmul import Slots, check_operands
from fp8jax.pallas_kernels.grouped_matmul_kernel import (
    GroupedProblem,
    load_weight,
    tile_of_program,
    work_of,
)
from fp8jax.pallas_kernels.matmul_config import Config
from fp8jax.pallas_kernels.primitives import fp8_dot
from fp8jax.pallas_kernels.quantize import ScaleLayout
from fp8jax.pallas_kernels.silu_mul_quantize import gated

_OP = "grouped_gate_up"


@functools.partial(jax.jit, static_argnames=("dtype", "x_scale_layout", "config", "interpret"))
def grouped_gate_up_triton(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    slots: Slots,
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    x_scale_layout: ScaleLayout = "mg",
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`grouped_scaled_matmul`, `silu_mul_quantize` per group, in one kernel.

    Args:
        x: float8_e4m3fn `[m, k]`.
        x_scale: float32 `[m, ⌈k/128⌉]`, or `[⌈k/128⌉, m]` if x_scale_layout says "gm".
        w: float8_e4m3fn `[e, 2i, k]`, gate rows first; i is a multiple of 128.
        w_scale: float32 `[e, 2i/128, ⌈k/128⌉]`.
        slots: which rows meet which expert; results stay in slot order, without weights.
        dtype: of activations: what gate, up and y are rounded to.
        config: tiles; `default_config` if None.
        interpret: run on the CPU, to check the mathematics.
    Returns:
        codes float8_e4m3fn `[r, i]`, zeros for slots beyond the sum of the sizes, and scales
        float32 `[i/128, r]`.
    Raises:
        NotImplementedError: `why_not` says why.
        ValueError: shapes or a config that do not fit.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    (m, k), (num_experts, n, _) = x.shape, w.shape
    count, i = slots.count(m), n // 2
    gpu = required_gpu(_OP, interpret=interpret)
    if reason := why_not(gpu, m, count, num_experts, n, k):
        raise NotImplementedError(f"{_OP}: {reason}")
    check_operands(_OP, x, x_scale, w, w_scale, slots, "block", 2, x_scale_layout)
    config = config or default_config()
    config.check()
    fixed = config.block_n, config.block_k, config.promotion, config.swap_operands
    if fixed != (BLOCK, BLOCK, "none", False):
        raise ValueError(
            f"{_OP}: block_n and block_k must be {BLOCK}, operands not swapped, no promotion; got "
            f"{config}"
        )
    problem = GroupedProblem(count, num_experts, i, k, 1, config)
    row = jnp.arange(m, dtype=jnp.int32) if slots.row is None else slots.row.astype(jnp.int32)
    last_group = -(-k // BLOCK) - 1

    def kernel(
        work_ref,  # [4, slot_tiles] int32
        row_ref,  # [r] int32
        x_ref,  # [m, k] float8_e4m3fn
        x_scale_ref,  # [m, groups] or [groups, m] float32
        w_ref,  # [e, 2i, k] float8_e4m3fn
        w_scale_ref,  # [e, 2i/128, groups] float32
        codes_ref,  # [r, i] float8_e4m3fn
        scale_ref,  # [i/128, r] float32
    ):
        tile = tile_of_program(problem, {"work": work_ref, "row": row_ref})
        group = tile.block_row

        def scales(step):
            column = jnp.broadcast_to(step, tile.rows.shape)
            of_x = plgpu.load(
                x_scale_ref.at[
                    (tile.rows, column) if x_scale_layout == "mg" else (column, tile.rows)
                ]
            )
            of_w = (w_scale_ref[tile.expert, block, step] for block in (group, group + i // BLOCK))
            return tuple(matmul_tiles.group_scale(of_x, scale) for scale in of_w)

        def step(j, state):
            accumulators, scale = state
            following = scales(jnp.minimum(j + 1, last_group))
            codes = matmul_tiles.load_operand(x_ref, tile.rows, j, k, BLOCK)
            added = []
            for acc, start, of_half in zip(accumulators, (0, i), scale, strict=True):
                weight = load_weight(w_ref, tile.expert, tile.columns + start, j, k, BLOCK)
                product = fp8_dot(codes, weight, jnp.zeros_like(acc), promote_every=None)
                added.append(acc + product * of_half[:, None])
            return tuple(added), following

        zeros = jnp.zeros((config.block_m, BLOCK), jnp.float32)
        (gate, up), _ = lax.fori_loop(
            jnp.int32(0), tile.steps, step, ((zeros, zeros), scales(jnp.int32(0)))
        )
        gate, up = (
            matmul_tiles.of_groups(half).astype(dtype).astype(jnp.float32) for half in (gate, up)
        )
        y = gated(gate, up).astype(dtype).astype(jnp.float32)
        # Slots that are not this tile's hold products of row 0 that nobody stores.
        scale = quantize.scale_of(jnp.max(jnp.abs(y), axis=1))
        inside = tile.slots < tile.slot_end
        codes = quantize.codes_of(y, (1.0 / scale)[:, None])
        plgpu.store(
            codes_ref.at[tile.slots[:, None], tile.columns[None, :]], codes, mask=inside[:, None]
        )
        plgpu.store(
            scale_ref.at[jnp.broadcast_to(group, tile.slots.shape), tile.slots], scale, mask=inside
        )

    return pl.pallas_call(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct((count, i), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((i // BLOCK, count), jnp.float32),
        ),
        grid=(problem.programs,),
        compiler_params=plgpu.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        interpret=interpret,
        name=_OP,
    )(work_of(_OP, problem, slots), row, x, x_scale, w, w_scale)


def why_not(gpu: Gpu | None, m: int, slots: int, num_experts: int, n: int, k: int) -> str | None:
    """Why the kernel does not run there, or None; arguments as of `grouped_matmul.why_not`, and
    the number of slots."""
    if reason := grouped_matmul.why_not(gpu, m, num_experts, n, k):
        return reason
    if gpu is not None and gpu.architecture == "ada":
        return "two accumulators and both halves of the weight do not fit on Ada"
    if n % (2 * BLOCK):
        return (
            f"gate and up are {n // 2} wide each, no multiple of {BLOCK}: a group of scales would "
            "lie across programs"
        )
    if slots == 0 or unaddressable(slots * n // 2):
        return (
            f"{slots} slots × {n // 2} codes: at least one slot, and not 2 to 4 GiB, which "
            "Pallas-Triton addresses wrongly"
        )
    return None


def pays(slots: int, num_experts: int) -> bool:
    """Whether there are so many slots that activations count beside weights, and so few that tiles
    of 64 are the right ones.

    From 256 slots an expert on, single products have tiles of 128, which two accumulators leave no
    registers for.
    """
    return 64 * num_experts <= slots < 256 * num_experts


def default_config() -> Config:
    """64 slots; both accumulators and a step's products stay in the registers of 8 warps."""
    return Config(block_m=64, block_n=BLOCK, block_k=BLOCK, num_warps=8, num_stages=3)
