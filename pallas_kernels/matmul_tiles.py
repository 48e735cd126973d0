"""What the FP8 matmul kernels do alike: find their tile, load operands, store results, add up
splits.

Pallas is imported inside the functions: the references in the kernels' files serve machines that
never need it, and it takes a second.

Bounds. Pallas-Triton masks nothing by itself. Rows beyond an operand's end are read from its last
row instead (what they give is never stored, and a clamped address keeps the copies 16 bytes wide);
columns of k beyond the end read as 0 under a mask. Stores are masked. Each of these is left out
where the tile divides the array.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fp8jax.device import required_gpu
from fp8jax.pallas_kernels import matmul_config
from fp8jax.pallas_kernels.matmul_config import Config

OUT_DTYPES = ("bfloat16", "float16", "float32")
_HEADROOM = np.float32(2.0**24)


@dataclass(frozen=True)
class Problem:
    """The sizes of one matmul and how it is cut up: m rows, n outputs, k inputs."""

    m: int
    n: int
    k: int
    config: Config

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles along m and n."""
        return -(-self.m // self.config.block_m), -(-self.n // self.config.block_n)

    @property
    def programs(self) -> int:
        """Programs of the launch."""
        return self.tiles[0] * self.tiles[1] * self.config.splits(self.k)[0]


@dataclass(frozen=True)
class Tile:
    """Where a program works: token rows `[block_m]`, outputs `[block_n]` (both may reach beyond the
    end), and its part of k."""

    rows: jax.Array
    columns: jax.Array
    column_start: jax.Array
    split: jax.Array
    first_step: jax.Array
    steps: int | jax.Array


def tile_of_program(problem: Problem) -> Tile:
    """Inside a kernel: this program's tile. Splits are the slowest index, then groups of row tiles,
    then columns, then rows."""
    from jax.experimental import pallas as pl

    config = problem.config
    tiles_m, tiles_n = problem.tiles
    splits, per_split = config.splits(problem.k)
    program = pl.program_id(0)
    split, tile = (
        lax.div(program, jnp.int32(tiles_m * tiles_n)),
        lax.rem(program, jnp.int32(tiles_m * tiles_n)),
    )
    if tiles_m == 1:
        tile_m, tile_n = jnp.int32(0), tile
    else:
        group = jnp.int32(config.group_m * tiles_n)
        first_m = lax.div(tile, group) * config.group_m
        height = jnp.minimum(tiles_m - first_m, config.group_m)
        tile_m = first_m + lax.rem(lax.rem(tile, group), height)
        tile_n = lax.div(lax.rem(tile, group), height)
    total = -(-problem.k // config.block_k)
    first_step = split * per_split
    return Tile(
        rows=tile_m * config.block_m + jnp.arange(config.block_m, dtype=jnp.int32),
        columns=tile_n * config.block_n + jnp.arange(config.block_n, dtype=jnp.int32),
        column_start=tile_n * config.block_n,
        split=split,
        first_step=first_step,
        # A constant where it can be: the compiler then knows that the loop runs at all.
        steps=per_split
        if total == splits * per_split
        else jnp.minimum(per_split, total - first_step),
    )


def clamped(indices: jax.Array, size: int, block: int) -> jax.Array:
    """Indices that stay inside an array of `size`."""
    return indices if size % block == 0 else jnp.minimum(indices, size - 1)


def load_operand(ref: Any, rows: jax.Array, step: jax.Array, k: int, block_k: int) -> jax.Array:
    """Inside a kernel: the tile `[rows, block_k]` of codes at a step along k; rows must lie inside,
    columns beyond k are 0."""
    from jax.experimental.pallas import triton as plgpu

    columns = step * block_k + jnp.arange(block_k, dtype=jnp.int32)
    source = ref.at[rows[:, None], columns[None, :]]
    if k % block_k == 0:
        return plgpu.load(source)
    inside = jnp.broadcast_to((columns < k)[None, :], (rows.shape[0], block_k))
    return plgpu.load(source, mask=inside, other=0.0)


def accumulate(
    problem: Problem,
    tile: Tile,
    x_ref: Any,
    w_ref: Any,
    add: Callable[..., tuple[jax.Array, Any]],
    carried: Any = (),
) -> jax.Array:
    """Inside a kernel: run the loop over this program's part of k.

    Args:
        add: (left tile, right tile, accumulator, step, carried) -> (accumulator, carried); one step
            along k.
        carried: what `add` gets in the first step beside the accumulator of zeros.
    Returns:
        float32 `[block_m, block_n]`, or `[block_n, block_m]` with swapped operands.
    """
    config = problem.config
    rows = clamped(tile.rows, problem.m, config.block_m)
    columns = clamped(tile.columns, problem.n, config.block_n)

    def step(i, state):
        acc, carried = state
        at = tile.first_step + i
        x = load_operand(x_ref, rows, at, problem.k, config.block_k)
        w = load_operand(w_ref, columns, at, problem.k, config.block_k)
        left, right = (w, x) if config.swap_operands else (x, w)
        return add(left, right, acc, at, carried)

    shape = (
        (config.block_n, config.block_m)
        if config.swap_operands
        else (config.block_m, config.block_n)
    )
    return lax.fori_loop(0, tile.steps, step, (jnp.zeros(shape, jnp.float32), carried))[0]


def along_rows(config: Config, values: jax.Array) -> jax.Array:
    """One value a token row `[block_m]`, or a scalar, in the accumulator's orientation."""
    if values.ndim == 0:
        return values
    return values[None, :] if config.swap_operands else values[:, None]


def along_columns(config: Config, values: jax.Array) -> jax.Array:
    """One value an output `[block_n]`, or a scalar, in the accumulator's orientation."""
    if values.ndim == 0:
        return values
    return values[:, None] if config.swap_operands else values[None, :]


def scaled(acc: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """acc · a · b in an order in which nothing overflows or vanishes on the way that the result
    does not; works in kernels too.

    Sums of e4m3 products are 0 or between 2⁻¹⁸ and about 2³⁶, scales between 2⁻¹²⁶ and 2¹²⁰. The
    smaller scale comes first: if that overflows, so does the result. It takes 2²⁴ from the larger
    one, so that no intermediate is subnormal, which XLA makes 0. The cap keeps 0 · ∞ away; a sum
    that is not 0 overflows anyway where both scales are beyond it. Powers of two are exact.

    Args:
        acc: float32 `[m, n]`, sums of products of codes.
        a, b: float32, positive, the scales; they broadcast against acc.
    """
    smaller = jnp.minimum(jnp.minimum(a, b), jnp.float32(2.0**100)) * _HEADROOM
    return acc * smaller * (jnp.maximum(a, b) * (1 / _HEADROOM))


def group_scale(of_x: jax.Array, of_w: jax.Array) -> jax.Array:
    """x_scale · w_scale · 2⁻²⁴ of a group of inputs, finite, for sums that `of_groups` finishes;
    works in kernels too.

    In range wherever the result is: the product of two scales may overflow where what it multiplies
    is 0 or 2⁻¹⁸.
    """
    return jnp.minimum(of_x * (1 / _HEADROOM) * of_w, jnp.float32(jnp.finfo(jnp.float32).max))


def of_groups(acc: jax.Array) -> jax.Array:
    """The sum of group products times their `group_scale`, as a number."""
    return acc * _HEADROOM


def add_bias(problem: Problem, tile: Tile, out: jax.Array, bias_ref: Any) -> jax.Array:
    """Inside a kernel: add the bias `[n]` in float32, once, by the first split."""
    from jax.experimental.pallas import triton as plgpu

    bias = plgpu.load(bias_ref.at[clamped(tile.columns, problem.n, problem.config.block_n)]).astype(
        jnp.float32
    )
    if problem.config.splits(problem.k)[0] > 1:
        bias = jnp.where(tile.split == 0, bias, jnp.zeros_like(bias))
    return out + along_columns(problem.config, bias)


def store(problem: Problem, tile: Tile, out: jax.Array, out_ref: Any) -> None:
    """Inside a kernel: write the tile into `[splits · m, n]`, nothing outside the split's own
    `[m, n]`."""
    from jax.experimental.pallas import triton as plgpu

    config, m, n = problem.config, problem.m, problem.n
    rows, columns = along_rows(config, tile.rows), along_columns(config, tile.columns)
    mask = None
    if m % config.block_m or n % config.block_n:
        mask = (rows < m) & (columns < n)
    target = out_ref.at[tile.split * m + rows, columns]
    plgpu.store(target, out.astype(out_ref.dtype), mask=mask)


def launch(
    kernel: Callable[..., None],
    problem: Problem,
    operands: list[jax.Array],
    *,
    out_dtype: Any,
    name: str,
    interpret: bool,
) -> jax.Array:
    """Run a kernel whose last argument is the output `[splits · m, n]`; with several splits that is
    float32.

    Returns:
        `[splits, m, n]`.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    splits = problem.config.splits(problem.k)[0]
    dtype = jnp.float32 if splits > 1 else out_dtype
    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((splits * problem.m, problem.n), dtype),
        grid=(problem.programs,),
        compiler_params=plgpu.CompilerParams(
            num_warps=problem.config.num_warps, num_stages=problem.config.num_stages
        ),
        interpret=interpret,
        name=name,
    )(*operands)
    return out.reshape(splits, problem.m, problem.n)


def sum_of_splits(partials: jax.Array, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    """`[splits, m, n]` -> `[m, n]`, added in order. Written as single additions, which XLA fuses
    with what follows and never reorders."""
    total = partials[0]
    for split in range(1, partials.shape[0]):
        total = total + partials[split]
    return total.astype(out_dtype)


def check_operands(
    op: str, x: jax.Array, w: jax.Array, bias: jax.Array | None, out_dtype: jax.typing.DTypeLike
) -> None:
    """Raise ValueError where codes, bias and output dtype do not belong together."""
    if x.dtype != jnp.float8_e4m3fn or w.dtype != jnp.float8_e4m3fn:
        raise ValueError(
            f"{op} multiplies float8_e4m3fn codes, got x {x.dtype} and w {w.dtype}; quantize them "
            "first"
        )
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1] or 0 in w.shape:
        raise ValueError(
            f"{op}: x [m, k] is {x.shape} and w [n, k] is {w.shape}; k must be the same, n and k "
            "at least 1"
        )
    if bias is not None and bias.shape != (w.shape[0],):
        raise ValueError(f"{op}: bias is {bias.shape}, wanted [{w.shape[0]}], one value a row of w")
    if jnp.dtype(out_dtype).name not in OUT_DTYPES:
        raise ValueError(
            f"{op}: out_dtype {jnp.dtype(out_dtype).name!r}; choose one of {', '.join(OUT_DTYPES)}"
        )


def checked_config(
    op: str,
    m: int,
    n: int,
    k: int,
    config: Config | None,
    default: Callable[..., Config],
    interpret: bool,
) -> Config:
    """The config to run with, once device and shape are known to work."""
    gpu = required_gpu(op, interpret=interpret)
    if reason := matmul_config.why_not(gpu, m, n, k):
        raise NotImplementedError(f"{op}: {reason}; use implementation='xla'")
    config = config or default(gpu, m, n, k)
    config.check()
    return config
