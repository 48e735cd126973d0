"""Products of sorted rows with a stack of experts: every row meets the weight of its own expert and
no other.

Rows are sorted by expert into *slots*: the first sizes[0] slots are expert 0's, the next sizes[1]
expert 1's, and so on.

    out[out_rows[slot]] = x[rows[slot]] @ w[expert of slot].T · row_weight[slot]          x [m, k], w [e, n, k], out [r, n]

The number of slots r is static (tokens × top_k), the sizes are not. Slots beyond their sum belong
to no one (padding) and give zeros. Work is cut into *tiles* of `block_m` slots of one expert. An
expert with s slots has ⌈s / block_m⌉ tiles, so there are never more than min(e, r) + ⌈(r − min(e,
r)) / block_m⌉: so many, times the tiles of outputs, is the grid of a kernel, of which `Tiles.count`
do something. An expert without slots has no tile, hence a decode step reads the weights of the
experts that were routed to and no others.

Quantized stacks have one scale an expert `[e]`, or blocks
`[e, row_groups · ⌈n/row_groups/128⌉, ⌈k/128⌉]` laid out in each row group for itself (see
`qarray`); the products of a tile are those of `scaled_matmul` and `block_scaled_matmul`.

The reference loops over the used tiles and takes one expert's weight at a time to float32: its work
and memory follow the rows, not e times the rows. The kernel (`grouped_matmul_kernel.py`) has to
refuse stacks of 2 to 4 GiB (`addressing.py`), which are therefore loaded in parts. Here also: where
the kernel runs, and with which tiles.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.pallas_kernels import matmul_config
from fp8jax.pallas_kernels.block_scaled_matmul import block_scaled_matmul_reference
from fp8jax.pallas_kernels.formats import BLOCK, unaddressable
from fp8jax.pallas_kernels.matmul_config import Config, Promotion
from fp8jax.pallas_kernels.scaled_matmul import scaled_matmul_reference

ExpertScales = Literal["tensor", "block"]


class Tiles(NamedTuple):
    """The work list: tile j is slots start[j] … end[j] − 1, all of expert[j]; tiles from `count` on
    are empty.

    expert, start, end are int32 `[tiles_needed]`, count is int32 `[]`. Tiles are in the order of
    their slots.
    """

    expert: jax.Array
    start: jax.Array
    end: jax.Array
    count: jax.Array


def tiles_needed(slots: int, num_experts: int, block_m: int) -> int:
    """The most tiles that any routing of this many slots can have, tiles for its padding slots
    included."""
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


def grouped_scaled_matmul_reference(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    sizes: jax.Array,
    *,
    rows: jax.Array | None = None,
    row_weight: jax.Array | None = None,
    out_rows: jax.Array | None = None,
    row_groups: int = 1,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    block_m: int | None = None,
) -> jax.Array:
    """The specification for quantized experts.

    Args:
        x: float8_e4m3fn `[m, k]`.
        x_scale: float32 `[m, 1]`, `[1]` for one scale over all rows, or `[m, ⌈k/128⌉]` with block
            scales.
        w: float8_e4m3fn `[e, n, k]`.
        w_scale: float32 `[e]`, or `[e, row_groups · ⌈n/row_groups/128⌉, ⌈k/128⌉]`.
        sizes: int32 `[e]`, slots of each expert.
        rows: int32 `[r]`, the row of x that a slot reads; None where slot i reads row i.
        row_weight: float32 `[r]`, multiplies a slot's result in float32.
        out_rows: int32 `[r]`, a permutation: the row of the result that a slot becomes; None where
            slot i becomes row i.
        row_groups: into how many equal groups of rows the blocks were laid out.
        out_dtype: dtype of the result.
        block_m: slots a tile; by default what suits r and e.
    Returns:
        `[r, n]`, zeros for slots beyond the sum of the sizes.
    """

    def product(expert: jax.Array, tile_rows: jax.Array) -> jax.Array:
        codes, weight, scale = x[tile_rows], pick_codes(w, expert), pick(w_scale, expert)
        tile_scale = x_scale if x_scale.shape == (1,) else x_scale[tile_rows]
        if w_scale.ndim == 1:
            return scaled_matmul_reference(
                codes, tile_scale, weight, scale.reshape(1), out_dtype=jnp.float32
            )
        parts = zip(jnp.split(weight, row_groups), jnp.split(scale, row_groups), strict=True)
        outputs = [
            block_scaled_matmul_reference(
                codes, tile_scale, part, part_scale, out_dtype=jnp.float32
            )
            for part, part_scale in parts
        ]
        return jnp.concatenate(outputs, axis=1)

    return over_tiles(
        product, x.shape[0], w.shape, sizes, rows, row_weight, out_rows, out_dtype, block_m
    )


def grouped_matmul_reference(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    rows: jax.Array | None = None,
    row_weight: jax.Array | None = None,
    out_rows: jax.Array | None = None,
    block_m: int | None = None,
) -> jax.Array:
    """The same for unquantized experts; float32 means float32, not TF32.

    Args:
        x: float `[m, k]`.
        w: `[e, n, k]` of the same dtype.
        sizes, rows, row_weight, out_rows, block_m: as in `grouped_scaled_matmul_reference`.
    Returns:
        `[r, n]` in the dtype of x.
    """
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

    return over_tiles(
        product, x.shape[0], w.shape, sizes, rows, row_weight, out_rows, x.dtype, block_m
    )


def why_not(device_kind: str, m: int, num_experts: int, n: int, k: int) -> str | None:
    """Why the kernel does not run there, or None.

    Args:
        device_kind: of the JAX device.
        m: rows of x.
        num_experts, n, k: the stack `[e, n, k]`.
    """
    if reason := matmul_config.why_not(device_kind, m, n, k):
        return reason
    if unaddressable(num_experts * n * k):
        return (
            f"w [e, n, k] is {[num_experts, n, k]}: Pallas-Triton addresses one-byte arrays "
            "between 2 and 4 GiB with offsets that overflow; split the stack "
            "(fp8jax.qarray.split_rows; load_quantized does)"
        )
    return None


def default_config(
    device_kind: str,
    slots: int,
    num_experts: int,
    n: int,
    k: int,
    *,
    row_groups: int = 1,
    scales: ExpertScales,
    sums: Literal["fast", "precise"] = "fast",
) -> Config:
    """Tiles by what an expert gets if the slots spread evenly, since the sizes are not known when
    the kernel is compiled.

    Args:
        device_kind: of the JAX device.
        slots: r.
        num_experts, n, k: the stack `[e, n, k]`.
        row_groups: equal groups of outputs.
        scales: "tensor" or "block", what w_scale is.
        sums: "precise" promotes partial sums every 128 inputs whatever k is; block scales always
            do.
    Raises:
        ValueError: an unknown device.
    """
    if (arch := matmul_config.architecture(device_kind)) is None:
        raise ValueError(
            f"no default config for device {device_kind!r}, which is not known to have FP8 tensor "
            "cores"
        )
    share = -(-slots // num_experts)
    if share <= 32:
        config = Config(
            block_m=16 if share <= 16 else 32, block_n=64, block_k=BLOCK, num_warps=4, num_stages=5
        )
        config = (
            replace(config, swap_operands=True) if arch != "ada" else replace(config, num_stages=4)
        )
        if scales == "tensor" and arch != "ada" and share <= 16 and k > 256 and k % 16 == 0:
            config = replace(config, block_k=256, num_stages=4)  # as in matmul_config
    elif share < 256:
        config = Config(block_m=64, block_n=128, block_k=BLOCK, num_warps=4, num_stages=3)
        if arch == "ada" and scales == "block":
            config = replace(config, block_n=64, num_stages=4)
    else:
        config = Config(block_m=128, block_n=128, block_k=BLOCK, num_warps=8, num_stages=3)
    if n // row_groups % 128 and n // row_groups < 1024:
        config = replace(
            config, block_n=64
        )  # of a narrow group, 128 would compute too much that is not there
    if scales == "tensor" and (sums == "precise" or k >= matmul_config.PROMOTE_FROM_K):
        promotions: dict[str, Promotion] = {
            "hopper": "tensor_core",
            "ada": "separate",
            "blackwell": "none",
        }
        config = replace(config, promotion=promotions[arch])
    return config


def default_block_m(slots: int, num_experts: int) -> int:
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


def over_tiles(
    product: Callable[[jax.Array, jax.Array], jax.Array],
    m: int,
    stack: tuple[int, ...],
    sizes: jax.Array,
    rows: jax.Array | None,
    row_weight: jax.Array | None,
    out_rows: jax.Array | None,
    out_dtype: jax.typing.DTypeLike,
    block_m: int | None = None,
) -> jax.Array:
    """A loop over the used tiles of any product of rows with one expert; what both references are
    made of.

    Args:
        product: (expert, rows of x `[block_m]`) -> float32 `[block_m, n]`.
        m: rows of x.
        stack: e, n, k.
        sizes, rows, row_weight, out_rows, out_dtype, block_m: as in
            `grouped_scaled_matmul_reference`.
    """
    rows = jnp.arange(m, dtype=jnp.int32) if rows is None else rows
    slots, (num_experts, n, _) = rows.shape[0], stack
    block_m = block_m or default_block_m(slots, num_experts)
    tiles = tile_list(sizes, slots, block_m)
    # Arrays are a tile longer than they need be, so that the last tile may start anywhere.
    rows = jnp.pad(rows, (0, block_m))
    row_weight = None if row_weight is None else jnp.pad(row_weight, (0, block_m))

    def add_tile(j: jax.Array, out: jax.Array) -> jax.Array:
        start = tiles.start[j]
        values = product(tiles.expert[j], lax.dynamic_slice(rows, (start,), (block_m,)))
        if row_weight is not None:
            values = values * lax.dynamic_slice(row_weight, (start,), (block_m,))[:, None]
        inside = start + jnp.arange(block_m, dtype=jnp.int32) < tiles.end[j]
        values = jnp.where(inside[:, None], values, jnp.float32(0)).astype(out_dtype)
        # Behind a short tile lie slots of the next expert. They are zeros for now, since tiles come
        # in slot order.
        return lax.dynamic_update_slice(out, values, (start, jnp.int32(0)))

    out = lax.fori_loop(
        jnp.int32(0), tiles.count, add_tile, jnp.zeros((slots + block_m, n), out_dtype)
    )
    if out_rows is None:
        return out[:slots]
    slot_of = (
        jnp.zeros(slots, jnp.int32)
        .at[out_rows]
        .set(jnp.arange(slots, dtype=jnp.int32), unique_indices=True)
    )
    return out[slot_of]  # rows are gathered: a scatter of them is slow on a CPU
