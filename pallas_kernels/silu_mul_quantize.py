"""silu(gate) · up and quantization of the product, in one pass.

    y = round( gate · sigmoid(gate) · up )       (float32, rounded once to the activation dtype)
    codes, scale = quantize(y)

gate and up lie side by side, `[m, 2i]`, as the fused gate_up projection writes them. Unfused, y is
written and read back once more: with the fusion the op reads 2i values a row and writes i bytes.
Rounding y to the activation dtype costs nothing and makes the fused result that of the unfused one.
gate_up may also be the float32 partial sums `[splits, m, 2i]` of a split-K product. Works for the
rows of experts as well as for those of an MLP. Source: the gated MLP of Llama (transformers'
`LlamaMLP`).
"""

import functools

import jax
import jax.numpy as jnp

from fp8jax.pallas_kernels import quantize
from fp8jax.pallas_kernels.formats import ActivationGranularity
from fp8jax.pallas_kernels.quantize import Config, ScaleLayout


def silu_mul_quantize_reference(
    gate_up: jax.Array,
    granularity: ActivationGranularity,
    *,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The specification.

    Args:
        gate_up: bfloat16, float16 or float32 `[m, 2i]`, or float32 partial sums `[splits, m, 2i]`
            of it.
        granularity: "token", "group" or "tensor", see `quantize.py`.
        dtype: the activation dtype, needed for partial sums only.
    Returns:
        codes float8_e4m3fn `[m, i]`, scales float32.
    """
    y = silu_mul(quantize.activation_of(gate_up, dtype))
    return quantize.quantize_activation_reference(y, granularity)


def silu_mul(gate_up: jax.Array) -> jax.Array:
    """silu(gate) · up in float32, on any device.

    Args:
        gate_up: float `[..., 2i]`.
    Returns:
        `[..., i]` in the same dtype.
    """
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return gated(gate, up).astype(gate_up.dtype)


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """The formula on float32 values; works in kernels too."""
    return gate * jax.nn.sigmoid(gate) * up


@functools.partial(
    jax.jit, static_argnames=("granularity", "dtype", "scale_layout", "config", "interpret")
)
def silu_mul_quantize_triton(
    gate_up: jax.Array,
    granularity: ActivationGranularity,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    scale_layout: ScaleLayout = "mg",
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The same in one kernel.

    Args:
        gate_up, granularity, dtype: as in the reference; not "tensor".
        scale_layout: layout of group scales, `[m, groups]` or `[groups, m]`.
        config: `default_config` if None.
        interpret: run on the CPU, to check the mathematics.
    Returns:
        codes and scales as in the reference.
    Raises:
        NotImplementedError: `why_not` says why.
        ValueError: an odd width, or a config that does not fit the shape.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    *_, m, width = gate_up.shape
    if width % 2:
        raise ValueError(f"silu_mul_quantize: gate_up must be [m, 2i], got an odd width of {width}")
    i = width // 2
    dtype = jnp.dtype(gate_up.dtype if gate_up.ndim == 2 else dtype)
    if reason := why_not(m, i, dtype, granularity):
        raise NotImplementedError(f"silu_mul_quantize: {reason}")
    config = config or default_config(m, i, granularity)
    config.check(i, granularity)

    def kernel(
        gate_up_ref,  # [m, 2i] or [splits, m, 2i] float
        codes_ref,  # [m, i] float8_e4m3fn
        scale_ref,  # [m, 1], [m, groups] or [groups, m] float32
    ):
        rows, cols = quantize.tile_indices(config)
        inside = (rows < m) & (cols < i)
        gate = quantize.load_activation(gate_up_ref, rows, cols, inside, dtype)
        up = quantize.load_activation(gate_up_ref, rows, cols + i, inside, dtype)
        y = gated(gate, up).astype(dtype).astype(jnp.float32)
        quantize.store_quantized(y, codes_ref, scale_ref, i, granularity, scale_layout)

    return pl.pallas_call(
        kernel,
        out_shape=quantize.quantized_shapes(m, i, granularity, scale_layout),
        grid=(pl.cdiv(m, config.block_m), pl.cdiv(i, config.block_k)),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=interpret,
        name=f"silu_mul_quantize_{granularity}",
    )(gate_up)


def why_not(
    m: int, i: int, dtype: jax.typing.DTypeLike, granularity: ActivationGranularity
) -> str | None:
    """Why there is no kernel for this case, or None if there is one."""
    return quantize.why_not(m, i, dtype, granularity)


def default_config(m: int, i: int, granularity: ActivationGranularity) -> Config:
    """As for plain quantization: the second input costs registers only until it is multiplied."""
    return quantize.default_config(m, i, granularity)
