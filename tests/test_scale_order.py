"""Scales as far from 1 as they come: a product is finite wherever its true value is, and as right
as anywhere else.

Expected is NumPy float64 from codes and scales.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fp8jax
from fp8jax import FP8_PER_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR
from fp8jax.ops import experts
from fp8jax.ops import matmul as ops
from fp8jax.ops.choice import Choice
from fp8jax.pallas_kernels import block_scaled_matmul, matmul_tiles
from fp8jax.pallas_kernels.grouped_matmul import Slots
from fp8jax.qarray import QArray

LARGEST, SMALLEST = float(np.finfo(np.float32).max), 2.0**-126
# Sizes of activations and of weights.
SIZES = [
    (3e37, 1e-6),
    (3e38, 3e-38),
    (3e38, 1e-37),
    (1e-4, 1e33),
    (1e-3, 3e-35),
    (1e38, 1e8),
    (1e20, 1e18),
    (1e-9, 1.0),
]
SCHEMES = [FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_PER_BLOCK]


@functools.cache
def operands(x_size: float, w_size: float, scheme: fp8jax.Scheme) -> tuple[jax.Array, QArray]:
    rng = np.random.default_rng(0)
    x, w = rng.uniform(0.2, 1, (4, 160)), rng.uniform(0.2, 1, (96, 160))
    x[:, :3] *= 1e-3
    w[5] = 0  # a sum that is 0 stays 0 beside scales whose product overflows
    quantize = jax.jit(functools.partial(fp8jax.quantize, scheme=scheme))
    return jnp.asarray(x * x_size, jnp.float32), quantize(jnp.asarray(w * w_size, jnp.float32))


def wide(codes: jax.Array, scale: jax.Array) -> np.ndarray:
    """Codes times scales in float64; all rows lie in one block."""
    scales = np.asarray(scale, np.float64)
    scales = (
        scales.repeat(128, 1)[:, : codes.shape[1]]
        if scales.ndim == 2 and scales.shape[1] > 1
        else scales
    )
    return np.asarray(codes.astype(jnp.float32), np.float64) * scales


def check(found: jax.Array, expected: np.ndarray) -> None:
    overflows = np.abs(expected) > LARGEST
    np.testing.assert_array_equal(np.isinf(found), overflows)
    # Sums of 160 products in float32; what is subnormal may be flushed to 0.
    np.testing.assert_allclose(
        np.asarray(found)[~overflows], expected[~overflows], rtol=2e-6, atol=SMALLEST
    )


@pytest.mark.parametrize("implementation", ["xla", "triton_interpreted"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_a_product_is_finite_wherever_its_value_is(scheme, implementation):
    product = jax.jit(functools.partial(ops.scaled_matmul, implementation=implementation))
    for sizes in SIZES:
        x, w = operands(*sizes, scheme)
        activation = ops.quantize_activation(x, scheme.activation)
        found = product(x, w)
        check(found, wide(activation.qvalue, activation.scale) @ wide(w.qvalue, w.scale).T)


@pytest.mark.parametrize("implementation", ["xla", "triton_interpreted"])
@pytest.mark.parametrize("scheme", [FP8_PER_TENSOR, FP8_PER_BLOCK], ids=lambda scheme: scheme.name)
def test_and_so_is_one_of_experts(scheme, implementation):
    product = jax.jit(
        functools.partial(experts.grouped_scaled_matmul, implementation=implementation)
    )
    for sizes in SIZES[:4]:
        x, w = operands(*sizes, scheme)
        scale = w.scale if scheme is FP8_PER_TENSOR else w.scale[None]
        slots = Slots(jnp.asarray([4], jnp.int32))
        found = product(x, QArray(w.qvalue[None], scale, scheme), slots)
        activation = ops.quantize_activation(x, scheme.activation)
        check(found, wide(activation.qvalue, activation.scale) @ wide(w.qvalue, w.scale).T)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_and_so_is_one_with_activations_as_they_are(scheme):
    weight_only = Choice(implementation="auto", weight_only=True)
    for sizes in SIZES:
        x, w = operands(*sizes, scheme)
        found = ops.scaled_matmul(x, w, implementation=weight_only)
        check(found, np.asarray(x, np.float64) @ wide(w.qvalue, w.scale).T)


def test_the_smallest_and_the_largest_sums_survive_the_smallest_and_the_largest_scales():
    sums = jnp.asarray([2.0**-18, 1.0, 2.0**36, 0.0], jnp.float32)[:, None]
    scales = np.float32(2.0) ** np.array([-126, -100, -18, 0, 60, 100, 119], np.float32)
    for a in scales:
        found = np.asarray(
            jax.jit(matmul_tiles.scaled)(sums, jnp.float32(a), jnp.asarray(scales)[None, :])
        )
        expected = np.asarray(sums, np.float64) * float(a) * scales.astype(np.float64)
        overflows = expected > LARGEST
        np.testing.assert_array_equal(np.isinf(found), overflows)
        normal = ~overflows & ((expected >= SMALLEST) | (expected == 0))
        np.testing.assert_array_equal(found[normal], expected[normal])  # powers of two: exact


def test_a_group_that_is_zero_beside_scales_that_overflow_adds_zero():
    """Possible only with codes and scales made by hand or nearly so: the group's codes meet
    zeros."""
    x, w = jnp.zeros((16, 256), jnp.float8_e4m3fn), jnp.ones((16, 256), jnp.float8_e4m3fn)
    x = x.at[:, 128:].set(jnp.ones((), jnp.float8_e4m3fn))
    x_scale, w_scale = (
        jnp.asarray([[1e30, 1.0]] * 16, jnp.float32),
        jnp.asarray([[1e30, 1.0]], jnp.float32),
    )
    for product in (
        block_scaled_matmul.block_scaled_matmul_reference,
        functools.partial(block_scaled_matmul.block_scaled_matmul_triton, interpret=True),
    ):
        np.testing.assert_array_equal(
            product(x, x_scale, w, w_scale, out_dtype=jnp.float32), np.full((16, 16), 128.0)
        )
