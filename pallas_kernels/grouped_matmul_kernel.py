"""The kernel behind `grouped_matmul.py`: FP8 products of sorted rows with the weights of their
experts.

    out[out_row[slot]] = (Σ_k x[row[slot], k] · w[expert, :, k]) · scales · weight[slot]

Scales are applied as in the dense kernels: at the end where they are constant along k, group by
group where they change.

A program computes block_m slots of one expert times block_n outputs. The grid is one-dimensional
and static, while the routing is not, so it is laid out for the worst routing (`tiles_needed`):

    programs = tiles · (tiles along n)

The tiles that a routing leaves over are at least as many as its padding slots need. Those tiles
write zeros there (`work_list`). A tile without an expert runs its loop zero times: it touches no
weight and no x. A decode step of one token (r = top_k ≤ e) has top_k tiles.

Rows of x are gathered by the loads themselves: ids come from memory, a row's codes stay contiguous,
and the copies to shared memory stay asynchronous and 16 bytes wide. Slots of a tile beyond its end
belong to the next expert; they read row 0 and are not stored. The output may be scattered in the
same way (`Slots.out_row`). The second product of an expert layer writes choice j of token i to row
j · t + i, so that the sum over the choices, which the next norm takes, reads whole rows in a fixed
order.

Row groups (gate and up in one stack) have block scales of their own. Columns are tiled in each
group for itself, and block_n divides 128, so that a tile meets one block of scales a step even
where a group's width is no multiple of 128.

Two shapes of work, as in `matmul_config`. A few rows an expert (decode) read the weights once and
nothing else matters, so Hopper and Blackwell take weights as the left operand and tokens in tiles
of 16 or 32. Many rows (prefill) take 64 or 128. No GPU has timed the choices below.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.device import required_gpu
from fp8jax.pallas_kernels import matmul_tiles
from fp8jax.pallas_kernels.formats import BLOCK, WEIGHTS, Granularity, WeightGranularity
from fp8jax.pallas_kernels.grouped_matmul import (
    Slots,
    check_operands,
    default_config,
    tiles_needed,
    why_not,
    work_list,
)
from fp8jax.pallas_kernels.matmul_config import Config
from fp8jax.pallas_kernels.primitives import fp8_dot
from fp8jax.pallas_kernels.quantize import ScaleLayout
from fp8jax.pallas_kernels.scaled_matmul import add_step

_OP = "grouped_scaled_matmul"
_STATIC = ("granularity", "row_groups", "out_dtype", "x_scale_layout", "config", "interpret")


@dataclass(frozen=True)
class GroupedProblem:
    """Sizes of one grouped product, and how it is cut up.

    Args:
        slots: r.
        num_experts: e.
        n: outputs, in row_groups equal groups.
        k: inputs.
        row_groups: into how many groups the outputs fall.
        config: tiles.
    """

    slots: int
    num_experts: int
    n: int
    k: int
    row_groups: int
    config: Config

    @property
    def width(self) -> int:
        """Outputs of a row group."""
        return self.n // self.row_groups

    @property
    def column_tiles(self) -> int:
        """Tiles along n, none of them across the border of a row group."""
        return self.row_groups * -(-self.width // self.config.block_n)

    @property
    def slot_tiles(self) -> int:
        """Tiles along the slots in the worst routing, those that write zeros included."""
        return tiles_needed(self.slots, self.num_experts, self.config.block_m)

    @property
    def programs(self) -> int:
        """Programs of the launch."""
        return self.slot_tiles * self.column_tiles


@functools.partial(jax.jit, static_argnames=_STATIC)
def grouped_scaled_matmul_triton(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    slots: Slots,
    *,
    granularity: WeightGranularity,
    row_groups: int = 1,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    x_scale_layout: ScaleLayout = "mg",
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """What `grouped_scaled_matmul_reference` computes, in one kernel behind the few operations that
    list its tiles.

    Args:
        x, w, w_scale, granularity, row_groups: as for the reference.
        x_scale: as for the reference; `[⌈k/128⌉, m]` with block scales if x_scale_layout says "gm".
        slots: as for the reference.
        out_dtype: bfloat16, float16 or float32.
        x_scale_layout: of block scales. Gathered rows have no neighbours, so neither is faster
            where slots name their rows.
        config: tiles; `default_config` of the current device if None.
        interpret: run on the CPU, to check the mathematics.
    Returns:
        `[r, n]`, zeros for slots beyond the sum of the sizes.
    Raises:
        NotImplementedError: `why_not` says why.
        ValueError: shapes, dtypes or a config that do not fit.
    """
    check_operands(_OP, x, x_scale, w, w_scale, slots, granularity, row_groups, x_scale_layout)
    one_expert: Any = jax.ShapeDtypeStruct(w.shape[1:], w.dtype)
    matmul_tiles.check_operands(_OP, x, one_expert, None, out_dtype)
    (m, k), (num_experts, n, _), count = x.shape, w.shape, slots.count(x.shape[0])
    if count == 0 or m == 0:
        return jnp.zeros((count, n), out_dtype)
    config = _checked_config(
        m, count, num_experts, n, k, row_groups, granularity, config, interpret
    )
    problem = GroupedProblem(count, num_experts, n, k, row_groups, config)

    along_k = WEIGHTS[granularity].changes_along_k
    operands = {
        "work": work_of(_OP, problem, slots),
        "x": x,
        "x_scale": x_scale if along_k else x_scale.reshape(-1),
        "w": w,
        "w_scale": w_scale,
    }
    for name, dtype in (("row", jnp.int32), ("weight", jnp.float32), ("out_row", jnp.int32)):
        if (array := getattr(slots, name)) is not None:
            operands[name] = array.astype(dtype)
    return launch(
        problem, WEIGHTS[granularity], operands, x_scale_layout, out_dtype, interpret=interpret
    )


def work_of(op: str, problem: GroupedProblem, slots: Slots) -> jax.Array:
    """The list of tiles that came with the slots, if its tiles are the config's; a new one
    otherwise."""
    block_m = problem.config.block_m
    if slots.work is None or slots.block_m != block_m:
        return work_list(slots.sizes, problem.slots, block_m)
    if slots.work.shape != (4, problem.slot_tiles):
        raise ValueError(
            f"{op}: work is {slots.work.shape}, wanted {(4, problem.slot_tiles)} for tiles of "
            f"{block_m} slots"
        )
    return slots.work


def _checked_config(
    m: int,
    slots: int,
    num_experts: int,
    n: int,
    k: int,
    row_groups: int,
    granularity: WeightGranularity,
    config: Config | None,
    interpret: bool,
) -> Config:
    gpu = required_gpu(_OP, interpret=interpret)
    if reason := why_not(gpu, m, num_experts, n, k):
        raise NotImplementedError(f"{_OP}: {reason}; use implementation='xla'")
    config = config or default_config(
        gpu, slots, num_experts, n, k, row_groups=row_groups, scales=granularity
    )
    config.check()
    if config.split_k != 1:
        raise ValueError(
            f"{_OP}: k is not split here, every expert in use is a tile of its own; got {config}"
        )
    if WEIGHTS[granularity].changes_along_k and (
        config.block_k != BLOCK or config.block_n > BLOCK or config.promotion != "none"
    ):
        raise ValueError(
            f"{_OP}: with block scales block_k must be {BLOCK}, the group of the scales, block_n "
            f"at most {BLOCK}, and promotion 'none', since every group is promoted anyway; got "
            f"{config}"
        )
    return config


def launch(
    problem: GroupedProblem,
    granularity: Granularity,
    operands: dict[str, jax.Array],
    x_scale_layout: ScaleLayout,
    out_dtype: jax.typing.DTypeLike,
    *,
    interpret: bool,
) -> jax.Array:
    """Run the kernel on operands by name.

    Args:
        problem: the sizes.
        granularity: of w_scale.
        operands: work, x, x_scale, w, w_scale and, where there are any, row, weight, out_row.
        x_scale_layout: of block scales.
        out_dtype: dtype of the result.
        interpret: run on the CPU.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    config = problem.config

    def kernel(*refs):
        by_name = dict(zip(operands, refs[:-1], strict=True))
        compute_tile(problem, granularity, by_name, refs[-1], x_scale_layout)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((problem.slots, problem.n), out_dtype),
        grid=(problem.programs,),
        compiler_params=plgpu.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        interpret=interpret,
        name=_OP,
    )(*operands.values())


def compute_tile(
    problem: GroupedProblem,
    granularity: Granularity,
    refs: dict[str, Any],
    out_ref: Any,
    x_scale_layout: ScaleLayout,
) -> None:
    """Inside a kernel: one tile of the output, from the list of work to the store.

    Args:
        problem: the sizes.
        granularity: of w_scale.
        refs: by the names of `launch`.
        out_ref: `[r, n]`.
        x_scale_layout: of block scales.
    """
    from jax.experimental.pallas import triton as plgpu

    config = problem.config
    tile = tile_of_program(problem, refs)
    if granularity.changes_along_k:
        out = _block_scaled(problem, tile, refs, x_scale_layout)
    else:
        out = _scaled(problem, tile, refs)
    if "weight" in refs:
        out = out * matmul_tiles.along_rows(config, _per_slot(tile, refs["weight"], tile.slots))
    inside, rows = tile.slots < tile.slot_end, tile.slots
    if "out_row" in refs:
        # Slots of no tile go nowhere: interpreted, a masked store writes the old value back, over a
        # new one in the same place.
        rows = plgpu.load(refs["out_row"].at[rows], mask=inside, other=problem.slots)
    rows = matmul_tiles.along_rows(config, rows)
    columns = matmul_tiles.along_columns(config, tile.columns)
    mask = matmul_tiles.along_rows(config, inside) & (columns < tile.column_end)
    plgpu.store(out_ref.at[rows, columns], out.astype(out_ref.dtype), mask=mask)


@dataclass(frozen=True)
class SlotTile:
    """Where a program works.

    Args:
        slots: `[block_m]`; those from slot_end on are not this tile's.
        slot_end: the slot behind its last one.
        used: bool `[block_m]`, whether x is read for a slot.
        rows: `[block_m]`, the rows of x that are read.
        columns: `[block_n]`, outputs; those from column_end on are not this row group's.
        column_end: the output behind the last one of the row group.
        block_row: of the block scales, where the columns lie.
        expert: whose weight it is.
        steps: along k; 0 without an expert.
    """

    slots: jax.Array
    slot_end: jax.Array
    used: jax.Array
    rows: jax.Array
    columns: jax.Array
    column_end: jax.Array
    block_row: jax.Array
    expert: jax.Array
    steps: jax.Array


def tile_of_program(problem: GroupedProblem, refs: dict[str, Any]) -> SlotTile:
    """Inside a kernel: where this program works. refs has work and, where x is gathered, row."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    config, width = problem.config, problem.width
    # group_m slot tiles share a column tile while its weights are in L2.
    program, together = pl.program_id(0), jnp.int32(config.group_m * problem.column_tiles)
    first = lax.div(program, together) * config.group_m
    height = jnp.minimum(problem.slot_tiles - first, config.group_m)
    slot_tile = first + lax.rem(lax.rem(program, together), height)
    column_tile = lax.div(lax.rem(program, together), height)

    expert, start, end, has_expert = (refs["work"][field, slot_tile] for field in range(4))
    slots = start + jnp.arange(config.block_m, dtype=jnp.int32)
    used = (slots < end) & (has_expert > 0)
    rows = plgpu.load(refs["row"].at[slots], mask=used, other=0) if "row" in refs else slots
    tiles_of_group = problem.column_tiles // problem.row_groups
    group = lax.div(column_tile, tiles_of_group)
    column_in_group = lax.rem(column_tile, tiles_of_group) * config.block_n
    return SlotTile(
        slots=slots,
        slot_end=end,
        used=used,
        # Slots that are not this tile's read row 0: its products are not stored.
        rows=jnp.where(used, rows, jnp.int32(0)),
        columns=group * width + column_in_group + jnp.arange(config.block_n, dtype=jnp.int32),
        column_end=(group + 1) * width,
        block_row=group * -(-width // BLOCK) + lax.div(column_in_group, BLOCK),
        expert=expert,
        steps=has_expert * -(-problem.k // config.block_k),
    )


def _scaled(problem: GroupedProblem, tile: SlotTile, refs: dict[str, Any]) -> jax.Array:
    """Scales that are constant along k come once, at the end."""
    config = problem.config
    out = _accumulate(problem, tile, refs, functools.partial(add_step, config))
    x_scale = refs["x_scale"]
    of_rows = x_scale[0] if x_scale.shape == (1,) else _per_slot(tile, x_scale, tile.rows)
    along_rows = matmul_tiles.along_rows(config, of_rows)
    w_scale = refs["w_scale"]
    if len(w_scale.shape) == 1:
        of_columns = w_scale[tile.expert]
    else:  # one a channel; what lies beyond the last is read from it and not stored
        of_columns = w_scale[tile.expert, jnp.minimum(tile.columns, tile.column_end - 1), 0]
    return matmul_tiles.scaled(out, along_rows, matmul_tiles.along_columns(config, of_columns))


def _block_scaled(
    problem: GroupedProblem, tile: SlotTile, refs: dict[str, Any], x_scale_layout: ScaleLayout
) -> jax.Array:
    """A step along k is a group; its scales are loaded one step ahead, as in
    `block_scaled_matmul`."""
    from jax.experimental.pallas import triton as plgpu

    last_group = -(-problem.k // BLOCK) - 1

    def scales(group):
        column = jnp.broadcast_to(group, tile.rows.shape)
        place = (tile.rows, column) if x_scale_layout == "mg" else (column, tile.rows)
        of_w = refs["w_scale"][tile.expert, tile.block_row, group]
        return matmul_tiles.group_scale(plgpu.load(refs["x_scale"].at[place]), of_w)

    def add(left, right, acc, group, scale):
        following = scales(jnp.minimum(group + 1, last_group))
        product = fp8_dot(left, right, jnp.zeros_like(acc), promote_every=None)
        return acc + product * matmul_tiles.along_rows(problem.config, scale), following

    return matmul_tiles.of_groups(_accumulate(problem, tile, refs, add, scales(jnp.int32(0))))


def _accumulate(
    problem: GroupedProblem,
    tile: SlotTile,
    refs: dict[str, Any],
    add: Callable[..., tuple[jax.Array, Any]],
    carried: Any = (),
) -> jax.Array:
    """The loop along k; float32 `[block_m, block_n]`, or `[block_n, block_m]` with swapped
    operands."""
    config = problem.config
    columns = tile.columns
    if problem.width % config.block_n:
        columns = jnp.minimum(columns, tile.column_end - 1)

    def step(i, state):
        acc, carried = state
        x = matmul_tiles.load_operand(refs["x"], tile.rows, i, problem.k, config.block_k)
        w = load_weight(refs["w"], tile.expert, columns, i, problem.k, config.block_k)
        left, right = (w, x) if config.swap_operands else (x, w)
        return add(left, right, acc, i, carried)

    shape = (
        (config.block_n, config.block_m)
        if config.swap_operands
        else (config.block_m, config.block_n)
    )
    state = jnp.zeros(shape, jnp.float32), carried
    return lax.fori_loop(jnp.int32(0), tile.steps, step, state)[0]


def load_weight(
    ref: Any, expert: jax.Array, rows: jax.Array, step: jax.Array, k: int, block_k: int
) -> jax.Array:
    """`matmul_tiles.load_operand` for one expert of a stack; the stack itself is never sliced,
    which XLA would do by a copy."""
    from jax.experimental.pallas import triton as plgpu

    columns = step * block_k + jnp.arange(block_k, dtype=jnp.int32)
    source = ref.at[expert, rows[:, None], columns[None, :]]
    if k % block_k == 0:
        return plgpu.load(source)
    inside = jnp.broadcast_to((columns < k)[None, :], (rows.shape[0], block_k))
    return plgpu.load(source, mask=inside, other=0.0)


def _per_slot(tile: SlotTile, ref: Any, index: jax.Array) -> jax.Array:
    """One float a slot, 0 where the tile does not use it: padding stays zero whatever lies in its
    place, NaN included."""
    from jax.experimental.pallas import triton as plgpu

    return plgpu.load(ref.at[index], mask=tile.used, other=0.0)
