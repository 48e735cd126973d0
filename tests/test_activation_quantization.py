"""Quantizing activations in plain jnp, against what torch froze and against float64 arithmetic."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden_checkpoints import GOLDENS
from golden_checkpoints import SCHEMES as FROZEN_SCHEMES

from fp8jax import FP8_PER_BLOCK, QArray, quantize, quantize_activation, scaled_matmul
from fp8jax.schemes import SCHEMES

FLOOR = np.float32(1 / (448 * 512))
quantized = jax.jit(quantize_activation, static_argnums=1, static_argnames="implementation")


def ordinal(codes):
    """e4m3 codes as integers in the order of their values; both zeros are 0."""
    bits = np.asarray(codes).view(np.uint8).astype(np.int32)
    return np.where(bits >= 128, 128 - bits, bits)


def assert_nearly_the_same_codes(found, expected):
    """The bound of the reference's own tests: under 0.2 % differ, none by more than one step. XLA
    divides approximately."""
    apart = np.abs(ordinal(found) - ordinal(expected))
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.002


@pytest.mark.smoke
@pytest.mark.parametrize("case", ["17x96x160", "5x200x300", "128x256x256"])
@pytest.mark.parametrize("name", FROZEN_SCHEMES)
def test_codes_and_scales_follow_torch(case, name):
    scheme = SCHEMES[name]
    with np.load(GOLDENS / "matmul.npz") as arrays:
        x = arrays[f"{case}.x"]
        codes = arrays[f"{case}.{scheme.name}.activation_codes"]
        scale = arrays[f"{case}.{scheme.name}.activation_scale"]
    q = quantized(x, scheme.activation)
    np.testing.assert_allclose(q.scale, scale, rtol=2.0**-22)  # two units in the last place
    assert_nearly_the_same_codes(q.qvalue, codes)


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.bfloat16, np.float16, np.float32], ids=["bfloat16", "float16", "float32"]
)
@pytest.mark.parametrize("granularity", ["token", "group", "tensor"])
def test_codes_and_scales_follow_float64_arithmetic(granularity, dtype):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 300)) * 2.0 ** rng.integers(-6, 7, (64, 1))).astype(dtype)
    x[3] = 0  # a row of zeros gets the floor
    wide = x.astype(np.float64)
    padded = np.pad(wide, ((0, 0), (0, 84))).reshape(64, 3, 128)
    amax = {
        "token": np.abs(wide).max(1, keepdims=True),
        "group": np.abs(padded).max(2),
        "tensor": np.abs(wide).max().reshape(1),
    }[granularity]
    scale = np.maximum(amax / 448, FLOOR)
    each = np.repeat(scale, 128, axis=1)[:, :300] if granularity == "group" else scale
    expected = np.clip(wide / each, -448, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    q = quantized(x, granularity)
    np.testing.assert_allclose(q.scale, scale, rtol=2.0**-22)  # two units in the last place
    assert_nearly_the_same_codes(q.qvalue, expected)
    assert not np.asarray(q.qvalue[3], np.float32).any()


def test_only_valid_rows_decide_a_scale_for_all():
    x = jnp.asarray([[1.0, -2.0], [100.0, 3.0], [0.5, 0.25]])
    q = quantize_activation(x, "tensor", valid=jnp.asarray([True, False, True]))
    np.testing.assert_allclose(q.scale, [2 / 448], rtol=2.0**-22)  # two units in the last place
    assert float(q.qvalue[1, 0]) == 448  # what does not count saturates instead of becoming NaN


def test_errors_name_shapes_and_granularities():
    w = quantize(jnp.ones((8, 16)), FP8_PER_BLOCK)
    with pytest.raises(ValueError, match=r"\(4, 15\).*\(8, 16\)"):
        scaled_matmul(jnp.ones((4, 15)), w)
    with pytest.raises(ValueError, match="per token.*fp8_per_block.*group"):
        scaled_matmul(quantize_activation(jnp.ones((4, 16)), "token"), w)
    with pytest.raises(ValueError, match="auto, xla, triton"):
        scaled_matmul(jnp.ones((4, 16)), w, implementation="cuda")  # pyright: ignore
    with pytest.raises(ValueError, match=r"\(2, 1\).*expected \(1, 1\)"):
        QArray(w.qvalue, jnp.ones((2, 1)), FP8_PER_BLOCK).validate()
