"""FP8 product with 1×128 activation groups and 128×128 weight blocks.

    out[m, n] = Σ_g ( Σ_{k in g} x[m, k] · w[n, k] ) · x_scale[m, g] · w_scale[n / 128, g] + bias[n]

g counts groups of 128 along k; the last one may be shorter. Each group's partial sum is scaled and
added in float32. That also keeps the short accumulator of Hopper's FP8 tensor cores from losing
bits over a long k.

In the kernel a step along k is a group. Its product starts from zero, and one multiply-add an
output applies x_scale · w_scale (held in range by a power of two, `matmul_tiles.group_scale`). The
scales of the next step are loaded one step ahead, because only operands of a dot are fetched
asynchronously. Where k is no multiple of 16, see `scaled_matmul`: padding codes with zeros to a
multiple of 16 leaves the scales as they are.

Source: DeepSeek-V3's recipe, as in vLLM's `w8a8_block_fp8_matmul`; the bias is added before the
cast.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.device import Gpu
from fp8jax.pallas_kernels import matmul_config, matmul_tiles, widened_dot
from fp8jax.pallas_kernels.formats import ACTIVATIONS, BLOCK, WEIGHTS
from fp8jax.pallas_kernels.matmul_config import Config
from fp8jax.pallas_kernels.primitives import fp8_dot
from fp8jax.pallas_kernels.quantize import ScaleLayout

_STATIC = ("out_dtype", "x_scale_layout", "config", "interpret")


def block_scaled_matmul_reference(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    bias: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """The specification, in float32: since scales are constant within a group, scaling the operands
    first gives the same sum.

    Args:
        x: float8_e4m3fn `[m, k]`.
        x_scale: float32 `[m, ⌈k/128⌉]`.
        w: float8_e4m3fn `[n, k]`.
        w_scale: float32 `[⌈n/128⌉, ⌈k/128⌉]`.
        bias: any float `[n]`, added in float32.
        out_dtype: dtype of the result.
    Returns:
        `[m, n]`.
    """
    k = w.shape[1]
    wide = x.astype(jnp.float32) * jnp.repeat(x_scale, BLOCK, axis=1)[:, :k]

    def scaled(rows: jax.Array, numbers: jax.Array) -> jax.Array:
        return rows * jnp.repeat(w_scale[numbers // BLOCK], BLOCK, axis=1)[:, :k]

    out = lax.platform_dependent(
        wide,
        w,
        cpu=lambda x, w: widened_dot.widened_dot(x, w, scaled),
        default=lambda x, w: widened_dot.dot(
            x, scaled(w.astype(jnp.float32), jnp.arange(w.shape[0], dtype=jnp.int32))
        ),
    )
    if bias is not None:
        out = out + bias.astype(jnp.float32)[None, :]
    return out.astype(out_dtype)


@functools.partial(jax.jit, static_argnames=_STATIC)
def block_scaled_matmul_triton(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    bias: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    x_scale_layout: ScaleLayout = "mg",
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The same in one kernel, and a small sum where k is split.

    Args:
        x, w, w_scale, bias: as for the reference.
        x_scale: float32 `[m, ⌈k/128⌉]`, or `[⌈k/128⌉, m]` if x_scale_layout says "gm".
        out_dtype: bfloat16, float16 or float32.
        x_scale_layout: "gm" is the faster one: the scales of a tile are then neighbours in memory.
        config: tiles; `default_config` of the current device if None.
        interpret: run on the CPU, to check the mathematics.
    Returns:
        `[m, n]`.
    Raises:
        NotImplementedError: `why_not` says why.
        ValueError: shapes, dtypes or a config that do not fit.
    """
    partials = _run(x, x_scale, w, w_scale, bias, out_dtype, x_scale_layout, config, interpret)
    return matmul_tiles.sum_of_splits(partials, out_dtype)


@functools.partial(jax.jit, static_argnames=("x_scale_layout", "config", "interpret"))
def block_scaled_matmul_partials(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    bias: jax.Array | None = None,
    x_scale_layout: ScaleLayout = "mg",
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The partial sums of the splits, scaled and with the bias, for a next kernel that adds them up
    itself.

    Args:
        x, x_scale, w, w_scale, bias, x_scale_layout, config, interpret: as for
        `block_scaled_matmul_triton`.
    Returns:
        float32 `[splits, m, n]`; splits is 1 where k is not split.
    Raises:
        NotImplementedError, ValueError: as `block_scaled_matmul_triton`.
    """
    return _run(x, x_scale, w, w_scale, bias, jnp.float32, x_scale_layout, config, interpret)


def why_not(gpu: Gpu | None, m: int, n: int, k: int) -> str | None:
    """Why the kernel does not run there, or None.

    Args:
        gpu: as `device.current_gpu` finds it.
        m, n, k: rows, outputs, inputs.
    """
    return matmul_config.why_not(gpu, m, n, k)


def default_config(gpu: Gpu, m: int, n: int, k: int) -> Config:
    """Tiles for the GPU and shape; the reasons are in `matmul_config`."""
    return matmul_config.default_block_scaled_config(gpu, m, n, k)


def _run(
    x,
    x_scale,
    w,
    w_scale,
    bias,
    out_dtype,
    x_scale_layout: ScaleLayout,
    config: Config | None,
    interpret: bool,
):
    matmul_tiles.check_operands("block_scaled_matmul", x, w, bias, out_dtype)
    (m, k), n = x.shape, w.shape[0]
    x_shape = ACTIVATIONS["group"].scale_shape((m, k))
    w_shape = WEIGHTS["block"].scale_shape((n, k))
    if x_scale_layout == "gm":
        x_shape = x_shape[::-1]
    if x_scale.shape != x_shape or w_scale.shape != w_shape:
        raise ValueError(
            f"block_scaled_matmul: x_scale is {x_scale.shape} and w_scale is {w_scale.shape}; "
            f"wanted {x_shape} (layout {x_scale_layout!r}) for x {x.shape}, and {w_shape} for w "
            f"{w.shape}"
        )
    if m == 0:
        return jnp.zeros((1, 0, n), out_dtype)
    config = matmul_tiles.checked_config(
        "block_scaled_matmul", m, n, k, config, default_config, interpret
    )
    if config.block_k != BLOCK or config.block_n > BLOCK or config.promotion != "none":
        raise ValueError(
            f"block_scaled_matmul: block_k must be {BLOCK}, the group of the scales, block_n at "
            f"most {BLOCK}, and promotion 'none', since every group is promoted anyway; got "
            f"{config}"
        )
    problem = matmul_tiles.Problem(m, n, k, config)
    operands = [x, x_scale, w, w_scale] + ([] if bias is None else [bias])
    return matmul_tiles.launch(
        kernel_of(problem, x_scale_layout),
        problem,
        operands,
        out_dtype=out_dtype,
        name="block_scaled_matmul",
        interpret=interpret,
    )


def kernel_of(problem: matmul_tiles.Problem, x_scale_layout: ScaleLayout) -> Callable[..., None]:
    """The kernel, for arrays that are at least as large as the problem says."""
    config = problem.config
    last_group = -(-problem.k // BLOCK) - 1

    def kernel(
        x_ref,  # [m, k] float8_e4m3fn
        x_scale_ref,  # [m, groups] or [groups, m] float32
        w_ref,  # [n, k] float8_e4m3fn
        w_scale_ref,  # [ceil(n / 128), groups] float32
        *rest,  # bias [n], if there is one; out [splits * m, n]
    ):
        tile = matmul_tiles.tile_of_program(problem)
        rows = matmul_tiles.clamped(tile.rows, problem.m, config.block_m)
        weight_block = lax.div(tile.column_start, jnp.int32(BLOCK))

        def scales(group):
            column = jnp.broadcast_to(group, rows.shape)
            of_x = (
                x_scale_ref[rows, column] if x_scale_layout == "mg" else x_scale_ref[column, rows]
            )
            return matmul_tiles.group_scale(of_x, w_scale_ref[weight_block, group])

        def add_group(left, right, acc, group, scale):
            following = scales(jnp.minimum(group + 1, last_group))
            product = fp8_dot(left, right, jnp.zeros_like(acc), promote_every=None)
            return acc + product * matmul_tiles.along_rows(config, scale), following

        out = matmul_tiles.accumulate(
            problem, tile, x_ref, w_ref, add_group, scales(tile.first_step)
        )
        out = matmul_tiles.of_groups(out)
        if len(rest) == 2:
            out = matmul_tiles.add_bias(problem, tile, out, rest[0])
        matmul_tiles.store(problem, tile, out, rest[-1])

    return kernel
