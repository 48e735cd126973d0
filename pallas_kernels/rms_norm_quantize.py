"""Residual add, RMSNorm and quantization of its result, in one pass over the row.

    stream = residual + multiplier · x                      rounded as the model adds
    y      = round(stream / √(mean(stream²) + ε)) · weight  mean in float32, both steps rounded
    codes, scale = quantize(y)

A layer normalises what it adds to, and quantizes what it normalises: three reads and two writes of
the row become one read of each input and one write of each output, and y itself does not reach
memory, unless something else wants it (`keep_rows`). A program owns whole rows, since both the mean
square and a token's scale need all of one. x may also be the float32 partial sums `[splits, m, h]`
of a split-K product, which saves the kernel that would add them up. Source of the formula:
transformers' `LlamaRMSNorm`, the stream kept in the activation dtype.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.pallas_kernels import quantize
from fp8jax.pallas_kernels.formats import ActivationGranularity
from fp8jax.pallas_kernels.quantize import Config, ScaleLayout


def rms_norm_quantize_reference(
    x: jax.Array,
    weight: jax.Array,
    granularity: ActivationGranularity,
    *,
    epsilon: float,
    residual: jax.Array | None = None,
    residual_multiplier: float = 1.0,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The specification.

    Args:
        x: bfloat16, float16 or float32 `[m, h]`, or float32 partial sums `[splits, m, h]` of it.
        weight: float `[h]`.
        granularity: "token", "group" or "tensor", see `quantize.py`.
        epsilon: added to the mean square.
        residual: the stream so far, `[m, h]` in x's dtype; None if x is the stream.
        residual_multiplier: what x is multiplied by before it is added.
        dtype: the activation dtype, needed for partial sums only.
    Returns:
        the new stream `[m, h]` (x itself without a residual), codes float8_e4m3fn `[m, h]`, scales
        float32.
    """
    stream = quantize.activation_of(x, dtype)
    if residual is not None:
        stream = residual + times(stream, residual_multiplier)
    y = rms_norm(stream, weight, epsilon=epsilon)
    return stream, *quantize.quantize_activation_reference(y, granularity)


def rms_norm(x: jax.Array, weight: jax.Array, *, epsilon: float) -> jax.Array:
    """x / rms(x) · weight, on any device.

    The mean square is taken in float32, the normalised value is cast to x's dtype before the weight
    comes in.

    Args:
        x: float `[..., h]`.
        weight: float `[h]` of the same dtype.
        epsilon: added to the mean square.
    """
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normalised = (wide * lax.rsqrt(mean_square + jnp.float32(epsilon))).astype(x.dtype)
    return normalised * weight.reshape((1,) * (x.ndim - 1) + (-1,))


def times(x: jax.Array, factor: float) -> jax.Array:
    """x · factor in float32, rounded once to x's dtype, as torch multiplies by a Python number."""
    return x if factor == 1 else (x.astype(jnp.float32) * jnp.float32(factor)).astype(x.dtype)


@functools.partial(
    jax.jit,
    static_argnames=(
        "granularity", "epsilon", "residual_multiplier", "dtype", "scale_layout", "keep_rows",
        "config", "interpret",
    ),
)  # fmt: skip
def rms_norm_quantize_triton(
    x: jax.Array,
    weight: jax.Array,
    granularity: ActivationGranularity,
    *,
    epsilon: float,
    residual: jax.Array | None = None,
    residual_multiplier: float = 1.0,
    dtype: jax.typing.DTypeLike | None = None,
    scale_layout: ScaleLayout = "mg",
    keep_rows: bool = False,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """The same in one kernel.

    Args:
        x, weight, granularity, epsilon, residual, residual_multiplier, dtype: as in the reference;
        not "tensor".
        scale_layout: layout of group scales, `[m, groups]` or `[groups, m]`.
        keep_rows: whether the normalised rows are written beside their codes, for who reads them
            as they are (a router).
        config: `default_config` if None.
        interpret: run on the CPU, to check the mathematics.
    Returns:
        stream, codes and scales as in the reference; the normalised rows `[m, h]` behind them if
        they are kept.
    Raises:
        NotImplementedError: `why_not` says why.
        ValueError: shapes, dtypes or config that do not belong together.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    *_, m, h = x.shape
    dtype = jnp.dtype(x.dtype if x.ndim == 2 else dtype)
    if reason := why_not(m, h, dtype, granularity):
        raise NotImplementedError(f"rms_norm_quantize: {reason}")
    if weight.shape != (h,) or (
        residual is not None and (residual.shape, residual.dtype) != ((m, h), dtype)
    ):
        raise ValueError(
            f"rms_norm_quantize: x is [{m}, {h}] {dtype.name}, so weight must be [{h}] and "
            f"residual [{m}, {h}] {dtype.name}; got weight {weight.shape} and residual "
            f"{None if residual is None else (residual.shape, residual.dtype.name)}"
        )
    config = config or default_config(m, h)
    config.check(h, "token")
    writes_stream, writes_rows = residual is not None or x.ndim == 3, keep_rows

    def kernel(
        # In: x [m, h] or [splits, m, h], weight [h], residual [m, h] if there is one.
        # Out: stream and rows [m, h] if they are wanted, codes [m, h], scale.
        *refs,
    ):
        x_ref, weight_ref, *optional, codes_ref, scale_ref = refs
        rows, cols = quantize.tile_indices(config)
        inside = (rows < m) & (cols < h)
        # Loaded before it is needed: behind the sum's barrier its latency would add to that of x.
        weight_of_channel = plgpu.load(weight_ref.at[cols], mask=cols < h, other=0.0).astype(
            jnp.float32
        )
        stream = quantize.load_activation(x_ref, rows, cols, inside, dtype)
        if residual is not None:
            residual_ref = optional.pop(0)
            if residual_multiplier != 1:
                stream = (
                    (stream * jnp.float32(residual_multiplier)).astype(dtype).astype(jnp.float32)
                )
            stream = (
                plgpu.load(residual_ref.at[rows, cols], mask=inside, other=0.0).astype(jnp.float32)
                + stream
            )
            stream = stream.astype(dtype).astype(jnp.float32)
        if writes_stream:
            plgpu.store(optional.pop(0).at[rows, cols], stream.astype(dtype), mask=inside)
        # Columns outside are 0 and add nothing, so the sum is divided by h, not by the block.
        mean_square = jnp.sum(stream * stream, axis=1) * jnp.float32(1 / h)
        normalised = (
            (stream * lax.rsqrt(mean_square + jnp.float32(epsilon))[:, None])
            .astype(dtype)
            .astype(jnp.float32)
        )
        y = (normalised * weight_of_channel).astype(dtype)
        if writes_rows:
            plgpu.store(optional.pop(0).at[rows, cols], y, mask=inside)
        y = y.astype(jnp.float32)
        quantize.store_quantized(y, codes_ref, scale_ref, h, granularity, scale_layout)

    floats = (jax.ShapeDtypeStruct((m, h), dtype),) * (writes_stream + writes_rows)
    *written, codes, scale = pl.pallas_call(
        kernel,
        out_shape=(*floats, *quantize.quantized_shapes(m, h, granularity, scale_layout)),
        grid=(pl.cdiv(m, config.block_m), 1),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=interpret,
        name=f"rms_norm_quantize_{granularity}",
    )(x, weight, *(() if residual is None else (residual,)))
    stream = written.pop(0) if writes_stream else x
    return stream, codes, scale, *written


def why_not(
    m: int, h: int, dtype: jax.typing.DTypeLike, granularity: ActivationGranularity
) -> str | None:
    """Why there is no kernel for this case, or None if there is one."""
    if h > quantize.MAX_ROW:
        return (
            f"h = {h}: a program holds a whole row in registers, at most {quantize.MAX_ROW} values"
        )
    return quantize.why_not(m, h, dtype, granularity)


def default_config(m: int, h: int) -> Config:
    """Whole rows, 16 values a thread; several rows a program where they are short."""
    return quantize.whole_row_config(m, h)
