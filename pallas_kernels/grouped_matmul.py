"""Products of sorted rows with a stack of experts: every row meets the weight of its own expert and
no other.

Rows are sorted by expert into *slots*: the first sizes[0] slots are expert 0's, the next sizes[1]
expert 1's, and so on.

    out[out_row[slot]] = x[row[slot]] @ w[expert of slot].T · weight[slot]

                         x [m, k]      w [e, n, k]      out [r, n]

The number of slots r is static (tokens × top_k), the sizes are not. Slots beyond their sum belong
to no one (padding) and give zeros.

Work is cut into *tiles* of block_m slots of one expert; one with s slots has ⌈s / block_m⌉ of them.
So there are never more than

    min(e, r) + ⌈(r − min(e, r)) / block_m⌉

tiles, and this number, times the tiles of outputs, is the grid of a kernel. `Tiles.count` of them
do something. An expert without slots has no tile, hence a decode step reads the weights of the
experts that were routed to and no others.

Scales of a stack are those of its granularity (`formats.WEIGHTS`): one an expert `[e]`, or blocks
laid out in each row group for itself. The products of a tile are those of `scaled_matmul` and
`block_scaled_matmul`.

The reference loops over the used tiles and takes one expert's weight at a time to float32. Its work
and memory follow the rows, not e times the rows. The kernel (`grouped_matmul_kernel.py`) has to
refuse stacks of 2 to 4 GiB (`formats.unaddressable`), which are therefore loaded in parts.

In this file: slots and tiles; the reference; where the kernel runs, and with which tiles.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.device import Gpu
from fp8jax.pallas_kernels import matmul_config
from fp8jax.pallas_kernels.block_scaled_matmul import block_scaled_matmul_reference
from fp8jax.pallas_kernels.formats import (
    ACTIVATIONS,
    BLOCK,
    WEIGHTS,
    WeightGranularity,
    unaddressable,
)
from fp8jax.pallas_kernels.matmul_config import Config
from fp8jax.pallas_kernels.quantize import ScaleLayout
from fp8jax.pallas_kernels.scaled_matmul import scaled_matmul_reference


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """r places, sorted by expert, in which rows meet the weight of their expert.

    Args:
        sizes: int32 `[e]`, slots of each expert. Those beyond their sum belong to no one.
        row: int32 `[r]`, the row of x that a slot reads; None where slot i reads row i.
        out_row: int32 `[r]`, a permutation: the row of the result that a slot becomes; None where
            slot i becomes row i.
        weight: float32 `[r]`, multiplies a slot's result in float32, before it is rounded.
        work: int32 `[4, tiles]`, the `work_list` of these sizes, from who has it already.
        block_m: slots a tile of `work` (static). Kernels with other tiles make their own list.
    """

    sizes: jax.Array
    row: jax.Array | None = None
    out_row: jax.Array | None = None
    weight: jax.Array | None = None
    work: jax.Array | None = None
    block_m: int = field(default=0, metadata={"static": True})

    def reading(self) -> "Slots":
        """For the first product of an expert: rows are gathered, results stay in slot order."""
        return replace(self, out_row=None, weight=None)

    def writing(self) -> "Slots":
        """For the last product: slot i reads row i, results are weighted and scattered."""
        return replace(self, row=None)

    def count(self, m: int) -> int:
        """How many slots there are for m rows of x."""
        return m if self.row is None else self.row.size

    def check(self, op: str, x: tuple[int, ...], w: tuple[int, ...]) -> None:
        """Refuse shapes that do not belong together.

        Args:
            op: the name that the error begins with.
            x, w: shapes, `[m, k]` and `[e, n, k]`.
        Raises:
            ValueError: names the sizes.
        """
        if len(x) != 2 or len(w) != 3 or x[1] != w[2] or self.sizes.shape != w[:1]:
            raise ValueError(
                f"{op}: x [m, k] is {x}, w [e, n, k] is {w} and sizes [e] is {self.sizes.shape}; "
                "e and k must be the same"
            )
        slots = self.count(x[0])
        for name in ("row", "out_row", "weight"):
            array = getattr(self, name)
            if array is not None and array.shape != (slots,):
                raise ValueError(f"{op}: {name} is {array.shape}, wanted [{slots}], one a slot")


class Tiles(NamedTuple):
    """Tile j is slots start[j] … end[j] − 1, all of expert[j]; tiles from `count` on are empty.

    expert, start and end are int32 `[tiles_needed]`, count is int32 `[]`. Tiles are in the order of
    their slots.
    """

    expert: jax.Array
    start: jax.Array
    end: jax.Array
    count: jax.Array


def tiles_needed(slots: int, num_experts: int, block_m: int) -> int:
    """The most tiles that any routing of this many slots can have, tiles for its padding slots
    included.

    Each expert in use wastes at most one tile, and each further tile needs block_m slots.
    """
    in_use = min(num_experts, slots)
    return in_use + -(-(slots - in_use) // block_m)


def tile_list(sizes: jax.Array, slots: int, block_m: int) -> Tiles:
    """Cut groups of slots into tiles.

    Args:
        sizes: int32 `[e]`, slots of each expert; their sum is at most `slots`.
        slots: how many there are in all.
        block_m: the most slots of a tile.
    """
    sizes = sizes.astype(jnp.int32)
    num_experts = sizes.shape[0]
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    tiles = (sizes + (block_m - 1)) // block_m
    last = jnp.cumsum(tiles, dtype=jnp.int32)  # the tiles of this expert and of all before it
    index = jnp.arange(tiles_needed(slots, num_experts, block_m), dtype=jnp.int32)
    expert = jnp.sum((last[None, :] <= index[:, None]).astype(jnp.int32), axis=1, dtype=jnp.int32)
    used = expert < num_experts
    expert = jnp.minimum(expert, num_experts - 1)
    start = (ends - sizes)[expert] + (index - (last - tiles)[expert]) * block_m
    start = jnp.where(used, start, slots)
    end = jnp.where(used, jnp.minimum(start + block_m, ends[expert]), slots)
    return Tiles(expert, start, end, last[-1])


def work_list(sizes: jax.Array, slots: int, block_m: int) -> jax.Array:
    """The tiles as kernels read them, with further ones for the padding slots.

    Arguments are those of `tile_list`. A tile without an expert writes zeros: the first of these
    cover the padding, the others nothing. So every slot of the result is written, exactly once.

    Returns:
        int32 `[4, tiles_needed]`: expert, first slot, end of its slots, whether it has an expert.
    """
    tiles = tile_list(sizes, slots, block_m)
    index = jnp.arange(tiles.expert.shape[0], dtype=jnp.int32)
    used = index < tiles.count
    padding = jnp.sum(sizes.astype(jnp.int32)) + (index - tiles.count) * block_m
    start = jnp.where(used, tiles.start, jnp.minimum(padding, slots))
    end = jnp.where(used, tiles.end, jnp.minimum(padding + block_m, slots))
    return jnp.stack([tiles.expert, start, end, used.astype(jnp.int32)])


def grouped_scaled_matmul_reference(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    slots: Slots,
    *,
    granularity: WeightGranularity,
    row_groups: int = 1,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """The specification for quantized experts.

    Args:
        x: float8_e4m3fn `[m, k]`.
        x_scale: float32, of an activation granularity that the weight's can take: `[m, 1]`, `[1]`
            for one scale over all rows, or `[m, ⌈k/128⌉]` with block scales.
        w: float8_e4m3fn `[e, n, k]`.
        w_scale: float32, of the granularity: `[e]`, `[e, n, 1]`, or
            `[e, row_groups · ⌈n/row_groups/128⌉, ⌈k/128⌉]`.
        slots: which rows meet which expert.
        granularity: of w_scale.
        row_groups: into how many equal groups of rows the blocks were laid out.
        out_dtype: dtype of the result.
    Returns:
        `[r, n]`, zeros for slots beyond the sum of the sizes.
    Raises:
        ValueError: shapes that do not belong together.
    """
    check_operands("grouped_scaled_matmul", x, x_scale, w, w_scale, slots, granularity, row_groups)

    def product(expert: jax.Array, tile_rows: jax.Array) -> jax.Array:
        codes, weight, scale = x[tile_rows], pick_codes(w, expert), pick(w_scale, expert)
        tile_scale = x_scale if x_scale.shape == (1,) else x_scale[tile_rows]
        if not WEIGHTS[granularity].changes_along_k:
            return scaled_matmul_reference(
                codes, tile_scale, weight, jnp.atleast_1d(scale), out_dtype=jnp.float32
            )
        parts = zip(jnp.split(weight, row_groups), jnp.split(scale, row_groups), strict=True)
        outputs = [
            block_scaled_matmul_reference(
                codes, tile_scale, part, part_scale, out_dtype=jnp.float32
            )
            for part, part_scale in parts
        ]
        return jnp.concatenate(outputs, axis=1)

    return over_tiles(product, slots, m=x.shape[0], n=w.shape[1], out_dtype=out_dtype)


def grouped_matmul_reference(x: jax.Array, w: jax.Array, slots: Slots) -> jax.Array:
    """The same for unquantized experts; float32 means float32, not TF32.

    Args:
        x: float `[m, k]`.
        w: `[e, n, k]` of the same dtype.
        slots: which rows meet which expert.
    Returns:
        `[r, n]` in the dtype of x.
    Raises:
        ValueError: shapes that do not belong together.
    """
    slots.check("grouped_matmul", x.shape, w.shape)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT

    def product(expert: jax.Array, tile_rows: jax.Array) -> jax.Array:
        contract_last = (((1,), (1,)), ((), ()))
        return lax.dot_general(
            x[tile_rows],
            pick(w, expert),
            contract_last,
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    return over_tiles(product, slots, m=x.shape[0], n=w.shape[1], out_dtype=x.dtype)


def over_tiles(
    product: Callable[[jax.Array, jax.Array], jax.Array],
    slots: Slots,
    *,
    m: int,
    n: int,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """A loop over the used tiles of any product of rows with one expert; what both references are
    made of.

    Args:
        product: (expert, rows of x `[block_m]`) -> float32 `[block_m, n]`.
        slots: which rows meet which expert.
        m: rows of x.
        n: outputs.
        out_dtype: dtype of the result.
    Returns:
        `[r, n]`, zeros for slots beyond the sum of the sizes.
    """
    row = jnp.arange(m, dtype=jnp.int32) if slots.row is None else slots.row
    count, num_experts = row.shape[0], slots.sizes.shape[0]
    block_m = _block_m(count, num_experts)
    tiles = tile_list(slots.sizes, count, block_m)
    # Arrays are a tile longer than they need be, so that the last tile may start anywhere.
    row = jnp.pad(row, (0, block_m))
    weight = None if slots.weight is None else jnp.pad(slots.weight, (0, block_m))

    def add_tile(j: jax.Array, out: jax.Array) -> jax.Array:
        start = tiles.start[j]
        values = product(tiles.expert[j], lax.dynamic_slice(row, (start,), (block_m,)))
        if weight is not None:
            values = values * lax.dynamic_slice(weight, (start,), (block_m,))[:, None]
        inside = start + jnp.arange(block_m, dtype=jnp.int32) < tiles.end[j]
        values = jnp.where(inside[:, None], values, jnp.float32(0)).astype(out_dtype)
        # Behind a short tile lie slots of the next expert. They are zeros for now, since tiles come
        # in slot order.
        return lax.dynamic_update_slice(out, values, (start, jnp.int32(0)))

    out = lax.fori_loop(
        jnp.int32(0), tiles.count, add_tile, jnp.zeros((count + block_m, n), out_dtype)
    )
    if slots.out_row is None:
        return out[:count]
    slot_of = (
        jnp.zeros(count, jnp.int32)
        .at[slots.out_row]
        .set(jnp.arange(count, dtype=jnp.int32), unique_indices=True)
    )
    return out[slot_of]  # rows are gathered: a scatter of them is slow on a CPU


def _block_m(slots: int, num_experts: int) -> int:
    """Slots a tile of the reference: a power of two near what an expert gets, since a tile costs
    the same when half full."""
    share = -(-slots // num_experts)
    return min(128, max(8, 1 << (share - 1).bit_length()))


def pick(stack: jax.Array, expert: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(stack, expert, axis=0, keepdims=False)


def pick_codes(stack: jax.Array, expert: jax.Array) -> jax.Array:
    """One expert's FP8 codes, without a look at the others'.

    Where a device has no FP8, XLA moves it about as float16. It would turn the whole stack to
    float16 in order to take one expert out (bytes it moves as they are), and do so before the loop,
    once for all tiles (the barrier keeps it inside, where it melts into the slice). On a CPU this
    is a factor of ten in a decode step, and twice the stack in memory.
    """
    stack, expert = lax.optimization_barrier((stack, expert))
    codes = pick(lax.bitcast_convert_type(stack, jnp.uint8), expert)
    return lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)


def check_operands(
    op: str,
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    slots: Slots,
    granularity: WeightGranularity,
    row_groups: int,
    x_scale_layout: ScaleLayout = "mg",
) -> None:
    """Refuse operands of a quantized product whose shapes do not belong together.

    Args:
        op: the name that the error begins with.
        x_scale_layout: "gm" where scales of groups come as `[⌈k/128⌉, m]`.
        Others as for `grouped_scaled_matmul_reference`.
    Raises:
        ValueError: names the shapes and those wanted.
    """
    slots.check(op, x.shape, w.shape)
    if 0 in w.shape or w.shape[1] % row_groups:
        raise ValueError(
            f"{op}: w [e, n, k] is {w.shape} and row_groups {row_groups}, which must divide n"
        )
    of_w = WEIGHTS[granularity]
    x_shapes = [ACTIVATIONS[name].scale_shape(x.shape) for name in of_w.activations]
    if of_w.changes_along_k and x_scale_layout == "gm":
        x_shapes = [shape[::-1] for shape in x_shapes]
    w_shape = of_w.scale_shape(w.shape, row_groups=row_groups)
    if x_scale.shape not in x_shapes or w_scale.shape != w_shape:
        raise ValueError(
            f"{op}: x_scale is {x_scale.shape} and w_scale is {w_scale.shape}; wanted "
            f"{' or '.join(map(str, x_shapes))}, and {w_shape}, for x {x.shape}, w {w.shape}, "
            f"{row_groups} row groups and layout {x_scale_layout!r}"
        )


def why_not(gpu: Gpu | None, m: int, num_experts: int, n: int, k: int) -> str | None:
    """Why the kernel does not run there, or None.

    Args:
        gpu: as `device.current_gpu` finds it.
        m: rows of x.
        num_experts, n, k: the stack `[e, n, k]`.
    """
    if reason := matmul_config.why_not(gpu, m, n, k):
        return reason
    if unaddressable(num_experts * n * k):
        return (
            f"w [e, n, k] is {[num_experts, n, k]}: Pallas-Triton addresses one-byte arrays "
            "between 2 and 4 GiB with offsets that overflow; split the stack "
            "(fp8jax.qarray.split_rows; load_quantized does)"
        )
    return None


def default_config(
    gpu: Gpu,
    slots: int,
    num_experts: int,
    n: int,
    k: int,
    *,
    row_groups: int = 1,
    scales: WeightGranularity,
    precise: bool = False,
) -> Config:
    """Tiles by what an expert gets if the slots spread evenly, since the sizes are not known when
    the kernel is compiled.

    Args:
        gpu: whose tiles.
        slots: r.
        num_experts, n, k: the stack `[e, n, k]`.
        row_groups: equal groups of outputs.
        scales: the granularity of w_scale.
        precise: promote partial sums every 128 inputs whatever k is; scales that change along k
            always do.
    """
    arch = gpu.architecture
    along_k = WEIGHTS[scales].changes_along_k
    share = -(-slots // num_experts)
    if share <= 32:
        config = Config(
            block_m=16 if share <= 16 else 32, block_n=64, block_k=BLOCK, num_warps=4, num_stages=5
        )
        config = (
            replace(config, swap_operands=True) if arch != "ada" else replace(config, num_stages=4)
        )
        if not along_k and arch != "ada" and share <= 16 and k > 256 and k % 16 == 0:
            config = replace(config, block_k=256, num_stages=4)  # as in matmul_config
    elif share < 256:
        config = Config(block_m=64, block_n=128, block_k=BLOCK, num_warps=4, num_stages=3)
        if arch == "ada" and along_k:
            config = replace(config, block_n=64, num_stages=4)
    else:
        config = Config(block_m=128, block_n=128, block_k=BLOCK, num_warps=8, num_stages=3)
    if n // row_groups % 128 and n // row_groups < 1024:
        # Of a narrow group, 128 would compute too much that is not there.
        config = replace(config, block_n=64)
    if not along_k and (precise or k >= matmul_config.PROMOTE_FROM_K):
        config = replace(config, promotion=matmul_config.PROMOTIONS[arch])
    return config
