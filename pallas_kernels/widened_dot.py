"""x @ w.T on a device that has to widen w first: a CPU multiplies in float32, whatever the weights
are stored in.

XLA's CPU backend converts a narrow weight as a whole and, since no conversion waits for anything,
converts all weights of a model before the first product: one decode step of a 135M model touched
514 MiB of fresh memory and spent nine tenths of its time there. Here w is widened a block of rows
at a time, each block when it is needed:

    for each block of rows:    out[:, rows] = x @ widen(w[rows]).T      4 MiB of float32 at a time

so that the widened block stays in the cache, and memory beyond the weights does not depend on their
size. The numbers are those of the whole product; only a sum over k may run in another order.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

BLOCK_ELEMENTS = (
    1 << 20
)  # 4 MiB of float32: a block and what it was widened from fit a core's share of the cache

Scale = Callable[[jax.Array, jax.Array], jax.Array]
"""Widened rows of w, float32 `[r, k]`, and their numbers, int32 `[r]` -> what x meets, float32
`[r, k]`."""


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w.T summed in float32: x `[..., k]`, w `[n, k]` of one dtype -> `[..., n]`; float32 means
    float32, not TF32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(
        x, w, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def widened_dot(x: jax.Array, w: jax.Array, scale: Scale | None = None) -> jax.Array:
    """x @ scale(widen(w)).T, a block of rows of w at a time. Not differentiable; see `narrow_dot`.

    Args:
        x: float32 `[..., k]`.
        w: `[n, k]`, any dtype.
        scale: what is done to rows that have been widened; nothing if None.
    Returns:
        float32 `[..., n]`.
    """
    n, k = w.shape
    block = min(n, max(BLOCK_ELEMENTS // max(k, 1), 1))
    last = x.ndim - 1

    def add_block(index: jax.Array, out: jax.Array) -> jax.Array:
        # Tied to x and the index, or XLA would widen w before x is there, and all blocks before the
        # first.
        index, wide, narrow = lax.optimization_barrier((index, x, w))
        # The last block may lie over its neighbour: the same values twice.
        start = jnp.minimum(index * block, n - block)
        rows = to_float32(_rows(narrow, start, block))
        if scale is not None:
            rows = scale(rows, start + jnp.arange(block, dtype=jnp.int32))
        product = dot(wide, rows)
        return lax.dynamic_update_slice_in_dim(out, product, start, last)

    out = jnp.zeros((*x.shape[:-1], n), jnp.float32)
    return lax.fori_loop(0, -(-n // block) if block else 0, add_block, out)


@jax.custom_jvp
def narrow_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """`dot` of operands narrower than float32, on every device as it does it best.

    Args:
        x: bfloat16 or float16 `[..., k]`.
        w: `[n, k]` of the same dtype.
    Returns:
        float32 `[..., n]`.
    """
    return lax.platform_dependent(
        x, w, cpu=lambda x, w: widened_dot(x.astype(jnp.float32), w), default=dot
    )


def _narrow_dot_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[Any, Any]
) -> tuple[jax.Array, Any]:
    (x, w), (dx, dw) = primals, tangents
    terms = [] if isinstance(dx, SymbolicZero) else [dot(dx, w)]
    terms += [] if isinstance(dw, SymbolicZero) else [dot(x, dw)]
    return narrow_dot(x, w), functools.reduce(jnp.add, terms)


narrow_dot.defjvp(_narrow_dot_jvp, symbolic_zeros=True)


def to_float32(x: jax.Array) -> jax.Array:
    """The same numbers in float32.

    XLA's CPU backend takes an e4m3 code apart in a dozen operations. Its bits, moved by one
    exponent bit's width, are those of a float16 smaller by 2⁸, subnormal ones included, which the
    processor widens by itself; only NaN looks different.
    """
    if x.dtype != jnp.float8_e4m3fn:
        return x.astype(jnp.float32)
    bits = lax.bitcast_convert_type(x, jnp.uint8).astype(jnp.uint16)
    magnitude = bits & jnp.uint16(0x7F)
    half = lax.bitcast_convert_type(
        ((bits & jnp.uint16(0x80)) << 8) | (magnitude << 7), jnp.float16
    )
    return jnp.where(
        magnitude == 0x7F, jnp.float32(jnp.nan), half.astype(jnp.float32) * jnp.float32(2.0**8)
    )


def _rows(w: jax.Array, start: jax.Array, count: int) -> jax.Array:
    """w[start : start + count], cut out as integers: XLA's CPU backend would widen a whole FP8 or
    BF16 array first."""
    bits = lax.bitcast_convert_type(w, jnp.dtype(f"uint{8 * w.dtype.itemsize}"))
    return lax.bitcast_convert_type(lax.dynamic_slice_in_dim(bits, start, count), w.dtype)
