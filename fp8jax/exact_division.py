"""Correctly rounded float32 division inside a jitted function, on every device.

XLA turns `x / 448` into a multiplication by a rounded reciprocal, and GPUs divide approximately.
The scales of an FP8 weight would then differ from the reference's `amax / 448` in the last bit, and
with them 0.14 % of the codes. A scale is one number a tensor or block, so the division can afford
to be done as on paper: long division of the 24-bit mantissas in uint32, one quotient bit a step,
then round to nearest, ties to even, by the guard bit and the remainder.

    a = ma · 2^ea,  b = mb · 2^eb,  2²³ ≤ m < 2²⁴       a / b = (ma / mb) · 2^(ea − eb)
"""

import jax
import jax.numpy as jnp
from jax import lax

_HIDDEN_BIT = 1 << 23


def divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b for non-negative `a` and positive normal `b`, rounded as IEEE 754 demands.

    Args:
        a: float32, any shape. Zero and subnormal values give 0.
        b: float32, broadcastable to `a`.
    Returns:
        float32 of the broadcast shape. Quotients below 2⁻¹²⁶ give 0 (no subnormal results); `a`
        infinite or NaN is returned as it is.
    """
    a, b = jnp.broadcast_arrays(a, b)
    a_bits, b_bits = (lax.bitcast_convert_type(x, jnp.uint32) for x in (a, b))
    a_exponent, b_exponent = (x >> jnp.uint32(23) for x in (a_bits, b_bits))
    a_mantissa, b_mantissa = (
        (x & jnp.uint32(_HIDDEN_BIT - 1)) | jnp.uint32(_HIDDEN_BIT) for x in (a_bits, b_bits)
    )

    # Bring the quotient of the mantissas into [1, 2): then its first bit is 1 and 25 bits are 24 of
    # result and one guard.
    below_one = a_mantissa < b_mantissa
    exponent = (
        a_exponent.astype(jnp.int32)
        - b_exponent.astype(jnp.int32)
        + 127
        - below_one.astype(jnp.int32)
    )
    remainder = jnp.where(below_one, a_mantissa << jnp.uint32(1), a_mantissa)

    def next_bit(_, state):
        quotient, remainder = state
        bit = (remainder >= b_mantissa).astype(jnp.uint32)
        return (quotient << jnp.uint32(1)) | bit, (remainder - bit * b_mantissa) << jnp.uint32(1)

    quotient, remainder = lax.fori_loop(0, 25, next_bit, (jnp.zeros_like(remainder), remainder))
    guard, mantissa = quotient & jnp.uint32(1), quotient >> jnp.uint32(1)
    round_up = guard & ((remainder != 0).astype(jnp.uint32) | (mantissa & jnp.uint32(1)))
    # Adding instead of or-ing: a mantissa that rounds up to 2²⁴ carries into the exponent, which is
    # what it should do.
    bits = (
        (exponent.astype(jnp.uint32) << jnp.uint32(23))
        + (mantissa - jnp.uint32(_HIDDEN_BIT))
        + round_up
    )

    value = lax.bitcast_convert_type(bits, jnp.float32)
    value = jnp.where((a_exponent == 0) | (exponent <= 0), jnp.float32(0), value)
    return jnp.where(a_exponent == 255, a, value)
