"""Products on a CPU, which widens weights: right in every block, differentiable, and never all
weights widened at once."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fp8jax.ops import matmul as ops
from fp8jax.pallas_kernels import widened_dot
from fp8jax.pallas_kernels.block_scaled_matmul import block_scaled_matmul_reference
from fp8jax.pallas_kernels.scaled_matmul import scaled_matmul_reference

rng = np.random.default_rng(30)


def e4m3(*shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape) * 50, jnp.float32).astype(jnp.float8_e4m3fn)


# Blocks of 320 // k rows: one block, several whole ones, a last one that lies over its neighbour,
# one row at a time.
@pytest.mark.parametrize("n, k", [(3, 100), (6, 160), (7, 96), (5, 400), (1, 1)])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float16"])
def test_every_block_of_rows_meets_x(monkeypatch, n, k, dtype):
    monkeypatch.setattr(widened_dot, "BLOCK_ELEMENTS", 320)
    x = jnp.asarray(rng.standard_normal((2, 3, k)), jnp.float32)
    w = e4m3(n, k).astype(dtype)
    found = widened_dot.widened_dot(x, w)
    expected = np.asarray(x, np.float64) @ np.asarray(w.astype(jnp.float32), np.float64).T
    # A float32 sum of k ≤ 400 terms of up to 200 each.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)


def test_every_code_is_widened_to_its_number():
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    found = jax.jit(widened_dot.to_float32)(codes)
    expected = codes.astype(np.float32)
    np.testing.assert_array_equal(found, expected)  # NaN equals NaN here, and -0 equals 0
    signed = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(found)[signed], np.signbit(expected)[signed])


def test_scales_follow_their_rows_into_blocks_that_begin_anywhere(monkeypatch):
    monkeypatch.setattr(widened_dot, "BLOCK_ELEMENTS", 100 * 200)
    x, w = (
        e4m3(5, 200),
        e4m3(300, 200),
    )  # blocks of 100 rows: 0, 100 and 200 are not where blocks of scales begin
    x_scale, w_scale = (
        jnp.asarray(rng.uniform(0.5, 2, shape), jnp.float32) for shape in ((5, 2), (3, 2))
    )

    def spread(scale, rows):
        return np.repeat(np.repeat(np.asarray(scale, np.float64), rows, axis=0), 128, axis=1)[
            :, :200
        ]

    wide_x, wide_w = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, w))
    expected = (wide_x * spread(x_scale, 1)) @ (wide_w * spread(w_scale, 128)[:300]).T
    found = block_scaled_matmul_reference(x, x_scale, w, w_scale, out_dtype=jnp.float32)
    np.testing.assert_allclose(
        found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max()
    )  # a float32 sum


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_product_with_a_plain_weight_differentiates_both_ways(dtype):
    x, w, dy = (
        jnp.asarray(rng.integers(-4, 5, shape), dtype) for shape in ((3, 16), (5, 16), (3, 5))
    )
    out, pull = jax.vjp(ops.product, x, w)
    dx, dw = pull(dy.astype(jnp.float32))
    # Small integers: every sum is exact in every dtype.
    np.testing.assert_array_equal(
        np.asarray(out, np.float64), np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    )
    np.testing.assert_array_equal(
        np.asarray(dx, np.float64), np.asarray(dy, np.float64) @ np.asarray(w, np.float64)
    )
    np.testing.assert_array_equal(
        np.asarray(dw, np.float64), np.asarray(dy, np.float64).T @ np.asarray(x, np.float64)
    )
    _, pushed = jax.jvp(lambda x: ops.product(x, w), (x,), (jnp.ones_like(x),))
    np.testing.assert_array_equal(
        np.asarray(pushed, np.float64)[0], np.asarray(w, np.float64).sum(axis=1)
    )


SCALES = {"tensor": ((1, 1), (1,)), "block": ((1, 8), (8, 8))}


@pytest.mark.parametrize("kind", ["tensor", "block", "bfloat16"])
def test_products_in_a_row_do_not_hold_all_their_weights_widened(kind):
    weights = [e4m3(1024, 1024) for _ in range(6)]  # 4 MiB each in float32

    def products(x, weights):
        for w in weights:
            if kind == "bfloat16":
                x = ops.float_matmul(x, w.astype(jnp.bfloat16))
                continue
            x_scale, w_scale = (jnp.full(shape, 1e-3, jnp.float32) for shape in SCALES[kind])
            reference = (
                scaled_matmul_reference if kind == "tensor" else block_scaled_matmul_reference
            )
            x = reference(x.astype(jnp.float8_e4m3fn), x_scale, w, w_scale)
        return x

    if kind == "bfloat16":
        weights = [w.astype(jnp.bfloat16) for w in weights]
    compiled = jax.jit(products).lower(jnp.ones((1, 1024), jnp.bfloat16), weights).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    # One widened block of 4 MiB and small change (block scales spread over it: 4 MiB more); all at
    # once would be 24 MiB.
    assert analysis.temp_size_in_bytes < 9 * 2**20
