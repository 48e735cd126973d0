"""The kernel behind `grouped_matmul.py`: FP8 products of sorted rows with the weights of their
experts, both schemes.

    out[slot] = (Σ_k x[rows[slot], k] Â· w[expert, :, k]) Â· scales Â· row_weight[slot]        scales as in the dense kernels

A program computes block_m slots of one expert times block_n outputs. The grid is one-dimensional
and static, while the routing is not, so it is laid out for the worst routing of r slots over e
experts:

    tiles = min(e, r) + ⌈(r − min(e, r)) / block_m⌉        programs = tiles Â· (tiles along n)

Each expert in use wastes at most one tile, and each further tile needs block_m slots. The tiles
that a routing leaves over are at least as many as its padding slots need: those tiles write zeros
there, so that every slot of the output is written, exactly once. A tile without an expert runs its
loop zero times: it touches no weight and no x. A decode step of one token (r = top_k ≤ e) has top_k
tiles.

Rows of x are gathered by the loads themselves: ids come from memory, a row's codes stay contiguous,
and the copies to shared memory stay asynchronous and 16 bytes wide. Slots of a tile beyond its end
belong to the next expert; they read row 0 and are not stored. The output may be scattered in the
same way (`out_rows`): the second product of an expert layer writes choice j of token i to row j Â· t
+ i, so that the sum over the choices, which the next norm takes, reads whole rows in a fixed order.

Row groups (gate and up in one stack) have block scales of their own. Columns are tiled in each
group for itself, and block_n divides 128, so that a tile meets one block of scales a step even
where a group's width is no multiple of 128.

Two shapes of work, as in `matmul_config`: a few rows an expert (decode) read the weights once and
nothing else matters, so Hopper and Blackwell take weights as the left operand and tokens in tiles
of 16 or 32; many rows (prefill) take 64 or 128. No GPU has timed the choices below.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.pallas_kernels import matmul_tiles
from fp8jax.pallas_kernels.formats import BLOCK
from fp8jax.pallas_kernels.grouped_matmul import (
    ExpertScales,
    default_config,
    tile_list,
    tiles_needed,
    why_not,
)
from fp8jax.pallas_kernels.matmul_config import Config
from fp8jax.pallas_kernels.primitives import fp8_dot
from fp8jax.pallas_kernels.quantize import ScaleLayout
from fp8jax.pallas_kernels.scaled_matmul import PROMOTE_EVERY

_OP = "grouped_scaled_matmul"
_STATIC = ("row_groups", "out_dtype", "x_scale_layout", "config", "interpret")


@dataclass(frozen=True)
class GroupedProblem:
    """Sizes of one grouped product: r slots, e experts, n outputs in row_groups equal groups, k
    inputs; and how it is cut up."""

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
        """Tiles along the slots, those that write zeros included, in the worst routing; see the
        module's docstring."""
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
    sizes: jax.Array,
    *,
    rows: jax.Array | None = None,
    row_weight: jax.Array | None = None,
    out_rows: jax.Array | None = None,
    work: jax.Array | None = None,
    row_groups: int = 1,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    x_scale_layout: ScaleLayout = "mg",
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """What `grouped_scaled_matmul_reference` computes, in one kernel behind the few operations that
    list its tiles.

    Args:
        x, w, w_scale, sizes, rows, row_weight, out_rows, row_groups: as for the reference.
        x_scale: as for the reference; `[⌈k/128⌉, m]` with block scales if x_scale_layout says "gm".
        work: `work_list` for these sizes and the config's block_m, from who has it already.
        out_dtype: bfloat16, float16 or float32.
        x_scale_layout: of block scales. Gathered rows have no neighbours, so neither is faster
            where rows is given.
        config: tiles; `default_config` of the current device if None.
        interpret: run on the CPU, to check the mathematics.
    Returns:
        `[r, n]`, zeros for slots beyond the sum of the sizes.
    Raises:
        NotImplementedError: `why_not` says why.
        ValueError: shapes, dtypes or a config that do not fit.
    """
    per_slot = {"rows": rows, "row_weight": row_weight, "out_rows": out_rows}
    _check_operands(x, x_scale, w, w_scale, sizes, per_slot, row_groups, out_dtype, x_scale_layout)
    (m, k), (num_experts, n, _) = x.shape, w.shape
    slots = m if rows is None else rows.shape[0]
    if slots == 0 or m == 0:
        return jnp.zeros((slots, n), out_dtype)
    scales: ExpertScales = "tensor" if w_scale.ndim == 1 else "block"
    config = _checked_config(m, slots, num_experts, n, k, row_groups, scales, config, interpret)
    problem = GroupedProblem(slots, num_experts, n, k, row_groups, config)

    operands = {
        "work": checked_work(_OP, problem, sizes, work),
        "x": x,
        "x_scale": x_scale,
        "w": w,
        "w_scale": w_scale,
    }
    if scales == "tensor":
        operands["x_scale"] = x_scale.reshape(-1)
    for name, array in per_slot.items():
        if array is not None:
            operands[name] = array.astype(jnp.float32 if name == "row_weight" else jnp.int32)
    return launch(problem, operands, x_scale_layout, out_dtype, interpret=interpret)


def _checked_config(
    m: int,
    slots: int,
    num_experts: int,
    n: int,
    k: int,
    row_groups: int,
    scales: ExpertScales,
    config: Config | None,
    interpret: bool,
) -> Config:
    device_kind = (
        "NVIDIA H100" if interpret else matmul_tiles.current_device_kind() or "this device"
    )
    if reason := why_not(device_kind, m, num_experts, n, k):
        raise NotImplementedError(f"{_OP}: {reason}; use implementation='xla'")
    config = config or default_config(
        device_kind, slots, num_experts, n, k, row_groups=row_groups, scales=scales
    )
    config.check()
    if config.split_k != 1:
        raise ValueError(
            f"{_OP}: k is not split here, every expert in use is a tile of its own; got {config}"
        )
    if scales == "block" and (
        config.block_k != BLOCK or config.block_n > BLOCK or config.promotion != "none"
    ):
        raise ValueError(
            f"{_OP}: with block scales block_k must be {BLOCK}, the group of the scales, block_n "
            f"at most {BLOCK}, and promotion 'none', since every group is promoted anyway; got "
            f"{config}"
        )
    return config


def _check_operands(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    sizes: jax.Array,
    per_slot: dict[str, jax.Array | None],
    row_groups: int,
    out_dtype: jax.typing.DTypeLike,
    x_scale_layout: ScaleLayout,
) -> None:
    if w.ndim != 3 or 0 in w.shape or sizes.shape != w.shape[:1] or w.shape[1] % row_groups:
        raise ValueError(
            f"{_OP}: w [e, n, k] is {w.shape}, sizes [e] is {sizes.shape}, row_groups "
            f"{row_groups}; e must be the same and row_groups divide n"
        )
    one_expert = jax.ShapeDtypeStruct(w.shape[1:], w.dtype)
    matmul_tiles.check_operands(_OP, x, one_expert, None, out_dtype)  # pyright: ignore[reportArgumentType]
    (m, k), (num_experts, n, _) = x.shape, w.shape
    slots = m if per_slot["rows"] is None else per_slot["rows"].size
    for name, array in per_slot.items():
        if array is not None and array.shape != (slots,):
            raise ValueError(f"{_OP}: {name} is {array.shape}, wanted [{slots}], one a slot")
    groups = -(-k // BLOCK)
    if w_scale.ndim == 1:
        fits, wanted = (
            x_scale.shape in ((1,), (m, 1)) and w_scale.shape == (num_experts,),
            "[1] or [m, 1] and [e]",
        )
    else:
        x_shape = (m, groups) if x_scale_layout == "mg" else (groups, m)
        w_shape = (num_experts, row_groups * -(-(n // row_groups) // BLOCK), groups)
        fits, wanted = (
            x_scale.shape == x_shape and w_scale.shape == w_shape,
            f"{x_shape} and {w_shape}",
        )
    if not fits:
        raise ValueError(
            f"{_OP}: x_scale is {x_scale.shape} and w_scale is {w_scale.shape}; wanted {wanted} "
            f"for x {x.shape}, w {w.shape}, {row_groups} row groups and layout {x_scale_layout!r}"
        )


def work_list(problem: GroupedProblem, sizes: jax.Array) -> jax.Array:
    """What each tile has to do: int32 `[4, slot_tiles]`, rows expert, first slot, end of its slots,
    and whether it has an expert.

    The first of the tiles without an expert cover the padding slots, the others nothing.
    """
    block_m, slots = problem.config.block_m, problem.slots
    tiles = tile_list(sizes, slots, block_m)
    index = jnp.arange(problem.slot_tiles, dtype=jnp.int32)
    expert, start, end = tiles[:3]
    used = index < tiles.count
    padding = jnp.sum(sizes.astype(jnp.int32)) + (index - tiles.count) * block_m
    start = jnp.where(used, start, jnp.minimum(padding, slots))
    end = jnp.where(used, end, jnp.minimum(padding + block_m, slots))
    return jnp.stack([expert, start, end, used.astype(jnp.int32)])


def checked_work(
    op: str, problem: GroupedProblem, sizes: jax.Array, work: jax.Array | None
) -> jax.Array:
    """The list that was handed in, if it is one for this problem; a new one if there is none."""
    if work is None:
        return work_list(problem, sizes)
    if work.shape != (4, problem.slot_tiles):
        raise ValueError(
            f"{op}: work is {work.shape}, wanted {(4, problem.slot_tiles)} for tiles of "
            f"{problem.config.block_m} slots"
        )
    return work


def launch(
    problem: GroupedProblem,
    operands: dict[str, jax.Array],
    x_scale_layout: ScaleLayout,
    out_dtype: jax.typing.DTypeLike,
    *,
    interpret: bool,
) -> jax.Array:
    """Run the kernel on operands by name: work, x, x_scale, w, w_scale and, where there are any,
    rows, row_weight, out_rows."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    config = problem.config

    def kernel(*refs):
        compute_tile(problem, dict(zip(operands, refs[:-1], strict=True)), refs[-1], x_scale_layout)

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
    problem: GroupedProblem, refs: dict[str, Any], out_ref: Any, x_scale_layout: ScaleLayout
) -> None:
    """Inside a kernel: one tile of the output, from the list of work to the store.

    Args:
        problem: the sizes.
        refs: by the names of `launch`.
        out_ref: `[r, n]`.
        x_scale_layout: of block scales.
    """
    from jax.experimental.pallas import triton as plgpu

    config = problem.config
    tile = tile_of_program(problem, refs)
    out = (_block_scaled if len(refs["w_scale"].shape) == 3 else _scaled)(
        problem, tile, refs, x_scale_layout
    )
    if "row_weight" in refs:
        out = out * matmul_tiles.along_rows(config, _per_slot(tile, refs["row_weight"], tile.slots))
    inside, rows = tile.slots < tile.slot_end, tile.slots
    if "out_rows" in refs:
        # Slots of no tile go nowhere: interpreted, a masked store writes the old value back, over a
        # new one in the same place.
        rows = plgpu.load(refs["out_rows"].at[rows], mask=inside, other=problem.slots)
    rows, columns = (
        matmul_tiles.along_rows(config, rows),
        matmul_tiles.along_columns(config, tile.columns),
    )
    mask = matmul_tiles.along_rows(config, inside) & (columns < tile.column_end)
    plgpu.store(out_ref.at[rows, columns], out.astype(out_ref.dtype), mask=mask)


@dataclass(frozen=True)
class SlotTile:
    """Where a program works.

    Slots `[block_m]` before slot_end, of which x is read where `used`, from these rows; columns
    `[block_n]` before column_end, the first of them in row block_row of the block scales; the
    expert; steps along k.
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
    """Inside a kernel: where this program works. refs has work and, where x is gathered, rows."""
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
    rows = plgpu.load(refs["rows"].at[slots], mask=used, other=0) if "rows" in refs else slots
    tiles_of_group = problem.column_tiles // problem.row_groups
    group, column_in_group = (
        lax.div(column_tile, tiles_of_group),
        lax.rem(column_tile, tiles_of_group) * config.block_n,
    )
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


def _scaled(
    problem: GroupedProblem, tile: SlotTile, refs: dict[str, Any], x_scale_layout: ScaleLayout
) -> jax.Array:
    """Scales that are constant along k come once, at the end."""
    del x_scale_layout
    config = problem.config

    def add(left, right, acc, step, carried):
        del step
        if config.promotion == "separate":
            return acc + fp8_dot(left, right, jnp.zeros_like(acc), promote_every=None), carried
        promote_every = PROMOTE_EVERY if config.promotion == "tensor_core" else None
        return fp8_dot(left, right, acc, promote_every=promote_every), carried

    out = _accumulate(problem, tile, refs, add)
    x_scale = refs["x_scale"]
    of_rows = x_scale[0] if x_scale.shape == (1,) else _per_slot(tile, x_scale, tile.rows)
    return matmul_tiles.scaled(
        out, matmul_tiles.along_rows(config, of_rows), refs["w_scale"][tile.expert]
    )


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
    return lax.fori_loop(jnp.int32(0), tile.steps, step, (jnp.zeros(shape, jnp.float32), carried))[
        0
    ]


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
