"""FP8 product with one scale a row and one scale a matrix or output channel.

    out[m, n] = (Σ_k x[m, k] · w[n, k]) · x_scale[m] · w_scale[n] + bias[n]

The sum runs over e4m3 codes with a float32 accumulator. Scales, bias and the cast come once, at the
end. The scales come in an order that keeps every finite result finite (`matmul_tiles.scaled`). The
weight is `[n, k]` as in the checkpoint: both operands are contiguous in k, which is what FP8 tensor
cores read.

The kernel works for every k. Where k is no multiple of 16, rows start at unaligned addresses and
its copies shrink to a few bytes. There, pad codes of both operands with zeros to a multiple of 16
once, rather than pay in each call.

Source: vLLM's CUTLASS epilogue (`cutlass_scaled_mm`), with the bias added before the cast.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.device import Gpu
from fp8jax.pallas_kernels import matmul_config, matmul_tiles, widened_dot
from fp8jax.pallas_kernels.matmul_config import Config
from fp8jax.pallas_kernels.primitives import fp8_dot

PROMOTE_EVERY = 128
_STATIC = ("out_dtype", "config", "interpret")


def scaled_matmul_reference(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    bias: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> jax.Array:
    """The specification, in float32.

    Args:
        x: float8_e4m3fn `[m, k]`.
        x_scale: float32 `[m, 1]`, or `[1]` for one scale over all rows.
        w: float8_e4m3fn `[n, k]`.
        w_scale: float32 `[1]`, or `[n, 1]` for one scale an output channel.
        bias: any float `[n]`, added in float32.
        out_dtype: dtype of the result.
    Returns:
        `[m, n]`.
    """
    out = matmul_tiles.scaled(
        _product_of_codes(x, w), x_scale.reshape(-1, 1), w_scale.reshape(1, -1)
    )
    if bias is not None:
        out = out + bias.astype(jnp.float32)[None, :]
    return out.astype(out_dtype)


@functools.partial(jax.jit, static_argnames=_STATIC)
def scaled_matmul_triton(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    bias: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The same in one kernel, and a small sum where k is split.

    Args:
        x, x_scale, w, w_scale, bias: as for the reference.
        out_dtype: bfloat16, float16 or float32.
        config: tiles; `default_config` of the current device if None.
        interpret: run on the CPU, to check the mathematics.
    Returns:
        `[m, n]`.
    Raises:
        NotImplementedError: `why_not` says why.
        ValueError: shapes, dtypes or a config that do not fit.
    """
    partials = _run(x, x_scale, w, w_scale, bias, out_dtype, config, interpret)
    return matmul_tiles.sum_of_splits(partials, out_dtype)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def scaled_matmul_partials(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    *,
    bias: jax.Array | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The partial sums of the splits, scaled and with the bias, for a next kernel that adds them up
    itself.

    Args:
        x, x_scale, w, w_scale, bias, config, interpret: as for `scaled_matmul_triton`.
    Returns:
        float32 `[splits, m, n]`; splits is 1 where k is not split.
    Raises:
        NotImplementedError, ValueError: as `scaled_matmul_triton`.
    """
    return _run(x, x_scale, w, w_scale, bias, jnp.float32, config, interpret)


def why_not(gpu: Gpu | None, m: int, n: int, k: int) -> str | None:
    """Why the kernel does not run there, or None.

    Args:
        gpu: as `device.current_gpu` finds it.
        m, n, k: rows, outputs, inputs.
    """
    return matmul_config.why_not(gpu, m, n, k)


def default_config(gpu: Gpu, m: int, n: int, k: int) -> Config:
    """Tiles for the GPU and shape; the reasons are in `matmul_config`."""
    return matmul_config.default_scaled_config(gpu, m, n, k)


def _run(
    x, x_scale, w, w_scale, bias, out_dtype, config: Config | None, interpret: bool
) -> jax.Array:
    matmul_tiles.check_operands("scaled_matmul", x, w, bias, out_dtype)
    (m, k), n = x.shape, w.shape[0]
    if x_scale.size not in (1, m) or w_scale.size not in (1, n):
        raise ValueError(
            f"scaled_matmul: x_scale is {x_scale.shape} and w_scale is {w_scale.shape}; "
            f"wanted [1] or [{m}, 1] for x {x.shape}, and [1] or [{n}, 1] for w {w.shape}"
        )
    if m == 0:
        return jnp.zeros((1, 0, n), out_dtype)
    config = matmul_tiles.checked_config(
        "scaled_matmul", m, n, k, config, default_config, interpret
    )
    problem = matmul_tiles.Problem(m, n, k, config)
    kernel = kernel_of(
        problem, scale_per_row=x_scale.size == m, scale_per_channel=w_scale.size == n
    )
    operands = [x, x_scale.reshape(-1), w, w_scale.reshape(-1)] + ([] if bias is None else [bias])
    return matmul_tiles.launch(
        kernel, problem, operands, out_dtype=out_dtype, name="scaled_matmul", interpret=interpret
    )


def kernel_of(
    problem: matmul_tiles.Problem, *, scale_per_row: bool, scale_per_channel: bool
) -> Callable[..., None]:
    """The kernel, for arrays that are at least as large as the problem says."""
    config, m, n = problem.config, problem.m, problem.n

    def kernel(
        x_ref,  # [m, k] float8_e4m3fn
        x_scale_ref,  # [m] or [1] float32
        w_ref,  # [n, k] float8_e4m3fn
        w_scale_ref,  # [n] or [1] float32
        *rest,  # bias [n], if there is one; out [splits * m, n]
    ):
        tile = matmul_tiles.tile_of_program(problem)
        out = matmul_tiles.accumulate(
            problem, tile, x_ref, w_ref, functools.partial(add_step, config)
        )
        rows = matmul_tiles.clamped(tile.rows, m, config.block_m)
        columns = matmul_tiles.clamped(tile.columns, n, config.block_n)
        of_rows = matmul_tiles.along_rows(
            config, x_scale_ref[rows] if scale_per_row else x_scale_ref[0]
        )
        of_columns = w_scale_ref[columns] if scale_per_channel else w_scale_ref[0]
        out = matmul_tiles.scaled(out, of_rows, matmul_tiles.along_columns(config, of_columns))
        if len(rest) == 2:
            out = matmul_tiles.add_bias(problem, tile, out, rest[0])
        matmul_tiles.store(problem, tile, out, rest[-1])

    return kernel


def add_step(
    config: Config, left: jax.Array, right: jax.Array, acc: jax.Array, step: jax.Array, carried: Any
) -> tuple[jax.Array, Any]:
    """Inside a kernel: add the product of two tiles to the accumulator, and what is carried along
    the loop as it was."""
    del step
    if config.promotion == "separate":
        return acc + fp8_dot(left, right, jnp.zeros_like(acc), promote_every=None), carried
    promote_every = PROMOTE_EVERY if config.promotion == "tensor_core" else None
    return fp8_dot(left, right, acc, promote_every=promote_every), carried


def _product_of_codes(x: jax.Array, w: jax.Array) -> jax.Array:
    # e4m3 values and their products are exact in bfloat16 operands with a float32 accumulator, so a
    # GPU need not spend float32 on them; CPUs are faster in float32.
    return lax.platform_dependent(
        x,
        w,
        cuda=lambda x, w: widened_dot.dot(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)),
        default=lambda x, w: widened_dot.widened_dot(x.astype(jnp.float32), w),
    )
