"""Quantize activations on the fly: floats in, e4m3 codes and float32 scales out.

    s = max(amax / 448, 1 / (448 · 512))      q = round_e4m3(clip(x · (1/s), ±448))      x ≈ q · s

| granularity | amax over                                      | scales          |
|-------------|------------------------------------------------|-----------------|
| token       | one row                                        | `[m, 1]`        |
| group       | 128 inputs of a row, the last group its rest   | `[m, ⌈k/128⌉]`  |
| tensor      | all valid rows                                 | `[1]`           |

The floor keeps an all-zero row finite (s = floor, q = 0). s is correctly rounded everywhere. 1/s
may be off in the last place, since GPUs divide approximately: fewer than 0.2 % of the codes differ
from exact division, none by more than one step. A NaN or Inf among the inputs gives NaN codes,
hence a NaN result, never a plausible number. Source: vLLM 0.20.2, `QuantFP8.forward_native`.

The kernel is bound by memory, so it reads x once: a program holds its whole tile in registers, an
entire row for "token" and any multiple of 128 columns for "group". "tensor" needs a maximum over
all programs first, which XLA's two fusions do as well as a kernel. The fused kernels
(`rms_norm_quantize.py`, `silu_mul_quantize.py`) compute a tile and end in the same
`store_quantized`.

Group scales come in two layouts: "mg" is the `[m, groups]` of the table, "gm" is `[groups, m]`. A
tile of the block-scaled matmul needs one group's scales of many rows at a time; in "gm" they are
neighbours in memory.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.pallas_kernels.formats import BLOCK, E4M3_MAX, ActivationGranularity, unaddressable

SCALE_FLOOR = 1.0 / (E4M3_MAX * 512.0)
MAX_ROW = 32768  # a whole row stays in registers: 64 values a thread at 16 warps
ACTIVATION_DTYPES = ("bfloat16", "float16", "float32")
ScaleLayout = Literal["mg", "gm"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What one program of a quantizing kernel works on.

    Args:
        block_m: rows, a power of two.
        block_k: columns, a power of two; at least k for "token", a multiple of 128 for "group".
        num_warps: warps of 32 threads that share the tile.
    """

    block_m: int
    block_k: int
    num_warps: int

    def check(self, k: int, granularity: ActivationGranularity) -> None:
        """Raise ValueError unless a kernel over rows of k values can use this."""
        if any(
            size < 1 or size & (size - 1) for size in (self.block_m, self.block_k, self.num_warps)
        ):
            raise ValueError(f"{self}: block_m, block_k and num_warps must be powers of two")
        if granularity == "token" and self.block_k < k:
            raise ValueError(
                f"{self}: a scale a token needs the whole row in one program, block_k >= k = {k}"
            )
        if granularity == "group" and self.block_k % BLOCK:
            raise ValueError(
                f"{self}: groups are {BLOCK} wide, block_k must be a multiple of {BLOCK}"
            )


def quantize_activation_reference(
    x: jax.Array, granularity: ActivationGranularity, *, valid: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of activations.

    Args:
        x: bfloat16, float16 or float32 `[m, k]`.
        granularity: "token", "group" or "tensor".
        valid: bool `[m]`, which rows count for the amax of "tensor" (padding does not); None for
            all of them.
    Returns:
        codes float8_e4m3fn `[m, k]`, scales float32 in the shape of the table above.
    """
    m, k = x.shape
    wide = x.astype(jnp.float32)
    match granularity:
        case "token":
            scale = scale_of(jnp.max(jnp.abs(wide), axis=1, keepdims=True))
            return codes_of(wide, 1.0 / scale), scale
        case "group":
            groups = -(-k // BLOCK)
            padded = jnp.pad(wide, ((0, 0), (0, groups * BLOCK - k))).reshape(m, groups, BLOCK)
            scale = scale_of(jnp.max(jnp.abs(padded), axis=2))
            return codes_of(padded, (1.0 / scale)[:, :, None]).reshape(m, groups * BLOCK)[
                :, :k
            ], scale
        case "tensor":
            counted = wide if valid is None else jnp.where(valid[:, None], wide, jnp.float32(0))
            scale = scale_of(jnp.max(jnp.abs(counted)).reshape(1))
            return codes_of(wide, 1.0 / scale), scale


@functools.partial(jax.jit, static_argnames=("granularity", "scale_layout", "config", "interpret"))
def quantize_activation_triton(
    x: jax.Array,
    granularity: ActivationGranularity,
    *,
    scale_layout: ScaleLayout = "mg",
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The same in one kernel.

    Args:
        x: bfloat16, float16 or float32 `[m, k]`.
        granularity: "token" or "group".
        scale_layout: layout of group scales.
        config: tile and warps; `default_config` if None.
        interpret: run on the CPU, to check the mathematics.
    Returns:
        codes float8_e4m3fn `[m, k]`, scales float32 `[m, 1]`, `[m, ⌈k/128⌉]` or `[⌈k/128⌉, m]`.
    Raises:
        NotImplementedError: `why_not` says why.
        ValueError: the config does not fit the shape.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    m, k = x.shape
    if reason := why_not(m, k, x.dtype, granularity):
        raise NotImplementedError(f"quantize_activation: {reason}")
    config = config or default_config(m, k, granularity)
    config.check(k, granularity)

    def kernel(
        x_ref,  # [m, k] float
        codes_ref,  # [m, k] float8_e4m3fn
        scale_ref,  # [m, 1], [m, groups] or [groups, m] float32
    ):
        rows, cols = tile_indices(config)
        values = plgpu.load(x_ref.at[rows, cols], mask=(rows < m) & (cols < k), other=0.0)
        store_quantized(
            values.astype(jnp.float32), codes_ref, scale_ref, k, granularity, scale_layout
        )

    return pl.pallas_call(
        kernel,
        out_shape=quantized_shapes(m, k, granularity, scale_layout),
        grid=(pl.cdiv(m, config.block_m), pl.cdiv(k, config.block_k)),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=interpret,
        name=f"quantize_{granularity}",
    )(x)


def why_not(
    m: int, k: int, dtype: jax.typing.DTypeLike, granularity: ActivationGranularity
) -> str | None:
    """Why there is no kernel for this case, or None if there is one."""
    if granularity == "tensor":
        return (
            "one scale for all rows needs a maximum over the whole array before the first code; "
            "XLA does that"
        )
    if granularity not in ("token", "group"):
        return f"granularity {granularity!r} is unknown; choose 'token' or 'group'"
    if jnp.dtype(dtype).name not in ACTIVATION_DTYPES:
        return (
            f"activations are {jnp.dtype(dtype).name}, the kernel takes "
            f"{', '.join(ACTIVATION_DTYPES)}"
        )
    if m == 0 or k == 0:
        return f"nothing to quantize in [m, k] = [{m}, {k}]"
    if granularity == "token" and k > MAX_ROW:
        return f"k = {k}: a program holds a whole row in registers, at most {MAX_ROW} values"
    if unaddressable(m * k):
        return f"{m} x {k} codes: Pallas-Triton addresses 1-byte arrays of 2 to 4 GiB wrongly"
    return None


def default_config(m: int, k: int, granularity: ActivationGranularity) -> Config:
    """16 to 32 values a thread: enough 16-byte loads in flight, few registers.

    A "token" program takes one row, or several short ones; a "group" program takes up to 4 rows × 8
    groups, and fewer rows where m is small, since a decode step wants many programs rather than big
    ones.
    """
    columns = power_of_two(k)
    if granularity == "token":
        return whole_row_config(m, k)
    block_k = min(1024, max(BLOCK, columns))
    block_m = min(4096 // block_k, power_of_two(-(-m // 8)))
    return Config(
        block_m=block_m, block_k=block_k, num_warps=warps_for(block_m * block_k, values=32)
    )


# What follows is shared with the kernels that compute x before they quantize it.


def whole_row_config(m: int, k: int) -> Config:
    """For kernels that need a whole row at once."""
    block_k = power_of_two(max(k, BLOCK))
    block_m = max(1, min(2048 // block_k, power_of_two(m)))
    return Config(
        block_m=block_m, block_k=block_k, num_warps=warps_for(block_m * block_k, values=16)
    )


def power_of_two(size: int) -> int:
    """The smallest one that is not below `size`."""
    return 1 << (size - 1).bit_length()


def warps_for(tile: int, *, values: int) -> int:
    """Warps so that a thread holds about `values` of a tile's values; more where 16 warps are not
    enough."""
    return min(16, max(1, tile // (32 * values)))


def tile_indices(config: Config) -> tuple[jax.Array, jax.Array]:
    """Inside a kernel: the rows `[block_m, 1]` and columns `[1, block_k]` of this program."""
    from jax.experimental import pallas as pl

    rows = pl.program_id(0) * config.block_m + jnp.arange(config.block_m, dtype=jnp.int32)
    cols = pl.program_id(1) * config.block_k + jnp.arange(config.block_k, dtype=jnp.int32)
    return rows[:, None], cols[None, :]


def load_activation(x_ref, rows: jax.Array, cols: jax.Array, inside: jax.Array, dtype) -> jax.Array:
    """Inside a kernel: values of `dtype` as float32, 0 where not `inside`.

    Args:
        x_ref: `[m, k]` of `dtype`, or float32 partial sums `[splits, m, k]` of a split-K product,
            which are added in order and rounded to `dtype`.
    """
    from jax.experimental.pallas import triton as plgpu

    if len(x_ref.shape) == 2:
        return plgpu.load(x_ref.at[rows, cols], mask=inside, other=0.0).astype(jnp.float32)
    total = jnp.zeros(inside.shape, jnp.float32)
    for split in range(x_ref.shape[0]):
        total = total + plgpu.load(
            x_ref.at[jnp.full_like(rows, split), rows, cols], mask=inside, other=0.0
        )
    return total.astype(dtype).astype(jnp.float32)


def activation_of(x: jax.Array, dtype: jax.typing.DTypeLike | None) -> jax.Array:
    """For references: x itself, or partial sums `[splits, m, k]` added in order and rounded to
    `dtype`."""
    return x if x.ndim == 2 else functools.reduce(jnp.add, x).astype(dtype)


def rounded(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """For references: the nearest values of `dtype`, as float32. Under jit XLA may drop a cast to
    bfloat16 and back."""
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)


def quantized_shapes(
    m: int, k: int, granularity: ActivationGranularity, scale_layout: ScaleLayout
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Codes and scales as `store_quantized` writes them."""
    scales = (m, 1) if granularity == "token" else (m, -(-k // BLOCK))
    if granularity == "group" and scale_layout == "gm":
        scales = scales[::-1]
    return jax.ShapeDtypeStruct((m, k), jnp.float8_e4m3fn), jax.ShapeDtypeStruct(
        scales, jnp.float32
    )


def store_quantized(
    y: jax.Array,
    codes_ref,
    scale_ref,
    k: int,
    granularity: ActivationGranularity,
    scale_layout: ScaleLayout,
) -> None:
    """Inside a kernel: quantize this program's tile and write codes and scales.

    Args:
        y: float32 `[block_m, block_k]`, 0 outside the array.
        codes_ref: float8_e4m3fn `[m, k]`.
        scale_ref: float32 in the shape of `quantized_shapes`.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    m = codes_ref.shape[0]
    block_m, block_k = y.shape
    rows, cols = tile_indices(Config(block_m=block_m, block_k=block_k, num_warps=1))
    if granularity == "token":
        scale = scale_of(jnp.max(jnp.abs(y), axis=1))
        codes = codes_of(y, (1.0 / scale)[:, None])
        plgpu.store(scale_ref.at[rows, jnp.zeros_like(rows)], scale[:, None], mask=rows < m)
    else:
        grouped = y.reshape(block_m, block_k // BLOCK, BLOCK)
        scale = scale_of(jnp.max(jnp.abs(grouped), axis=2))
        codes = codes_of(grouped, (1.0 / scale)[:, :, None]).reshape(block_m, block_k)
        first = pl.program_id(1) * (block_k // BLOCK)
        groups = first + jnp.arange(block_k // BLOCK, dtype=jnp.int32)[None, :]
        place = (groups, rows) if scale_layout == "gm" else (rows, groups)
        plgpu.store(scale_ref.at[place], scale, mask=(rows < m) & (groups * BLOCK < k))
    plgpu.store(codes_ref.at[rows, cols], codes, mask=(rows < m) & (cols < k))


def scale_of(amax: jax.Array) -> jax.Array:
    """max(amax / 448, floor), the quotient correctly rounded; works in kernels too.

    XLA makes `amax / 448` a product with a rounded 1/448 and GPUs divide approximately. The last
    bit matters: bfloat16 values are often exact ties between two codes where the scale is a power
    of two. So t / 7, with t = amax / 64, is corrected by its remainder t - 7s. That is exact,
    because 7 times half of the bits of s is, contracted to a fused multiply-add or not; and no
    multiple of 1/7 is near a tie, so the corrected quotient rounds as the true one does.
    """
    seventh = jnp.float32(1 / 7)
    t = amax * jnp.float32(1 / 64)
    s = t * seventh
    high = lax.bitcast_convert_type(
        lax.bitcast_convert_type(s, jnp.uint32) & jnp.uint32(0xFFFFF000), jnp.float32
    )
    remainder = (t - jnp.float32(7) * high) - jnp.float32(7) * (s - high)
    exact = s + remainder * seventh
    # An infinite amax has no remainder; NaN compares false and stays NaN.
    return jnp.maximum(jnp.where(jnp.abs(s) == jnp.inf, s, exact), jnp.float32(SCALE_FLOOR))


def codes_of(x: jax.Array, reciprocal: jax.Array) -> jax.Array:
    """x · (1/s) as codes; works in kernels too.

    Clipped, because JAX's cast gives NaN above 464 instead of saturating; by comparisons, because
    min and max drop a NaN in Triton.
    """
    x, lowest, highest = x * reciprocal, jnp.float32(-E4M3_MAX), jnp.float32(E4M3_MAX)
    return jnp.where(x > highest, highest, jnp.where(x < lowest, lowest, x)).astype(
        jnp.float8_e4m3fn
    )
