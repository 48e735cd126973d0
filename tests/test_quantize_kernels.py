"""The quantizing kernels, run by Pallas' interpreter on the CPU, against numpy in float64 and
against their references.

Accesses outside an array become NaN (`strict_memory.py`), so every odd size below also shows that
no margin is touched.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from strict_memory import strict_memory

from fp8jax.pallas_kernels import quantize, rms_norm_quantize, silu_mul_quantize
from fp8jax.pallas_kernels.quantize import quantize_activation_triton
from fp8jax.pallas_kernels.rms_norm_quantize import (
    rms_norm_quantize_reference,
    rms_norm_quantize_triton,
)
from fp8jax.pallas_kernels.silu_mul_quantize import (
    silu_mul_quantize_reference,
    silu_mul_quantize_triton,
)

FLOOR = np.float32(1 / (448 * 512))
GRANULARITIES = ("token", "group")


@pytest.fixture(autouse=True, scope="module")
def no_access_outside_an_array():
    with strict_memory():
        yield


def normal(seed, shape, dtype=jnp.bfloat16):
    # Rows of very different size, as activations have them.
    rows = 2.0 ** np.random.default_rng(seed).integers(-6, 7, size=(*shape[:-1], 1))
    values = np.random.default_rng(seed + 1).normal(size=shape) * rows
    return jnp.asarray(values.astype(np.float32)).astype(dtype)


def steps_apart(codes, expected):
    """How many e4m3 values lie between; both zeros are one value."""

    def index(array):
        bits = np.asarray(array).view(np.uint8).astype(np.int32)
        return np.where(bits >= 128, 128 - bits, bits)

    return np.abs(index(codes) - index(expected))


def assert_same_codes(codes, expected):
    apart = steps_apart(codes, expected)
    # A scale that is off by one unit in the last place moves a value over at most one rounding
    # boundary, and does so for fewer than 0.2 % of the values; in these small arrays one value may
    # be more than that.
    assert apart.max() <= 1
    assert np.count_nonzero(apart) <= max(1, 0.002 * apart.size)


def quantized_by_numpy(x, granularity):
    """Codes and scales in float64, rounded once."""
    x = np.asarray(x, np.float64)
    m, k = x.shape
    width = k if granularity == "token" else 128
    groups = -(-k // width)
    padded = np.pad(x, ((0, 0), (0, groups * width - k))).reshape(m, groups, width)
    scale = np.maximum(np.abs(padded).max(axis=2) / 448, FLOOR).astype(np.float32)
    codes = np.clip(padded / scale[:, :, None].astype(np.float64), -448, 448).reshape(m, -1)[:, :k]
    return codes.astype(np.float32).astype(ml_dtypes.float8_e4m3fn), scale


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("m", "k", "dtype"),
    [(1, 64, "bfloat16"), (5, 100, "float32"), (17, 1100, "bfloat16"), (2, 4112, "float16")],
)
def test_codes_and_scales_are_those_of_float64_arithmetic(m, k, dtype, granularity):
    x = normal(0, (m, k), dtype)
    codes, scale = quantize_activation_triton(x, granularity, interpret=True)
    expected_codes, expected_scale = quantized_by_numpy(x, granularity)
    assert codes.dtype == jnp.float8_e4m3fn
    assert np.array_equal(scale, expected_scale)
    assert_same_codes(codes, expected_codes)


def test_a_scale_is_amax_by_448_to_the_last_bit_for_every_mantissa():
    amax = (np.arange(2**23, dtype=np.uint32) | np.uint32(130 << 23)).view(np.float32)
    assert np.array_equal(jax.jit(quantize.scale_of)(amax), amax / np.float32(448))
    for exponent in (
        -1,
        0,
        20,
        127,
    ):  # scaling by a power of two is exact as long as nothing overflows
        some = np.ldexp(
            np.float32(1) + np.arange(0, 2**23, 1013, dtype=np.float32) / np.float32(2**23),
            exponent,
        )
        assert np.array_equal(jax.jit(quantize.scale_of)(some), some / np.float32(448))
    extremes = quantize.scale_of(jnp.asarray([0, 1e-40, np.inf, np.nan], jnp.float32))
    assert np.array_equal(
        extremes, np.asarray([FLOOR, FLOOR, np.inf, np.nan], np.float32), equal_nan=True
    )


def test_group_scales_in_layout_gm_are_the_transposed_ones():
    x = normal(1, (5, 300))
    codes, scale = quantize_activation_triton(x, "group", interpret=True)
    same_codes, transposed = quantize_activation_triton(
        x, "group", scale_layout="gm", interpret=True
    )
    assert transposed.shape == (3, 5)
    assert np.array_equal(transposed.T, scale)
    assert np.array_equal(steps_apart(codes, same_codes), np.zeros(codes.shape))


def test_a_tile_of_several_programs_gives_what_one_program_gives():
    x = normal(2, (6, 500))
    small = quantize.Config(block_m=2, block_k=128, num_warps=1)
    large = quantize.Config(block_m=8, block_k=512, num_warps=4)
    for one, other in zip(
        quantize_activation_triton(x, "group", config=small, interpret=True),
        quantize_activation_triton(x, "group", config=large, interpret=True),
        strict=True,
    ):
        assert np.array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zeros_nan_and_infinity_stay_in_their_row(granularity):
    x = normal(3, (4, 256)).at[0].set(0).at[1, 7].set(jnp.nan).at[2, 7].set(jnp.inf)
    codes, scale = quantize_activation_triton(x, granularity, interpret=True)
    values = np.asarray(codes, np.float32)
    assert not values[0].any()
    assert np.all(np.asarray(scale)[0] == FLOOR)
    assert np.isnan(values[1, 7])
    assert np.isnan(values[2, 7])
    assert np.isfinite(values[3]).all()
    if granularity == "group":
        assert np.isfinite(values[1:3, 128:]).all()


def test_a_row_does_not_depend_on_the_others():
    x = normal(4, (9, 200))
    for granularity in GRANULARITIES:
        config = quantize.Config(block_m=4, block_k=256, num_warps=1)
        codes, scale = quantize_activation_triton(x, granularity, config=config, interpret=True)
        alone, alone_scale = quantize_activation_triton(
            x[5:6], granularity, config=config, interpret=True
        )
        assert np.array_equal(
            np.asarray(codes)[5:6].view(np.uint8), np.asarray(alone).view(np.uint8)
        )
        assert np.array_equal(np.asarray(scale)[5:6], alone_scale)


def rms_norm_by_numpy(stream, weight, epsilon):
    stream = np.asarray(stream, np.float64)
    return (
        stream
        / np.sqrt((stream**2).mean(axis=1, keepdims=True) + epsilon)
        * np.asarray(weight, np.float64)
    )


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("m", "h"), [(1, 64), (5, 300)])
def test_rms_norm_quantize_is_add_norm_and_quantize_in_float64(m, h, granularity):
    x, residual, weight = (
        normal(0, (m, h), "float32"),
        normal(2, (m, h), "float32"),
        normal(4, (1, h), "float32")[0],
    )
    stream, codes, scale = rms_norm_quantize_triton(
        x, weight, granularity, epsilon=1e-5, residual=residual, interpret=True
    )
    assert np.array_equal(
        stream, np.asarray(x) + np.asarray(residual)
    )  # one float32 addition is exactly rounded
    y = rms_norm_by_numpy(stream, weight, 1e-5)
    expected_codes, expected_scale = quantized_by_numpy(y, granularity)
    # Four rounded float32 operations and a sum of h squares: well within 2^-20.
    np.testing.assert_allclose(scale, expected_scale, rtol=2**-20)
    assert_same_codes(codes, expected_codes)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"residual": (5, 300)}, {"residual": (5, 300), "residual_multiplier": 0.22}],
    ids=["norm only", "with residual", "with a multiplier"],
)
def test_rms_norm_quantize_rounds_to_bfloat16_where_the_layers_do(arguments):
    x, weight = normal(5, (5, 300)), normal(7, (1, 300))[0]
    if "residual" in arguments:
        arguments = arguments | {"residual": normal(6, arguments["residual"])}
    got = rms_norm_quantize_triton(x, weight, "token", epsilon=1e-5, **arguments, interpret=True)
    # The layer, op by op without jit, so that every bfloat16 result is really rounded.
    stream = x
    if "residual" in arguments:
        multiplier = jnp.float32(arguments.get("residual_multiplier", 1.0))
        stream = arguments["residual"] + (x.astype(jnp.float32) * multiplier).astype(x.dtype)
    wide = stream.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    y = (wide * jax.lax.rsqrt(mean_square + jnp.float32(1e-5))).astype(x.dtype) * weight
    codes, scale = quantized_by_numpy(y.astype(jnp.float32), "token")
    assert np.array_equal(np.asarray(got[0]), np.asarray(stream))
    # One value in bfloat16 steps of 2^-8: the amax may round differently if the mean square does in
    # its last place.
    np.testing.assert_allclose(got[2], scale, rtol=2**-7)
    assert_same_codes(got[1], codes)
    reference = rms_norm_quantize_reference(x, weight, "token", epsilon=1e-5, **arguments)
    assert_same_codes(got[1], reference[1])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_silu_mul_quantize_is_silu_times_up_in_float64(granularity):
    gate_up = normal(8, (5, 600), "float32")
    codes, scale = silu_mul_quantize_triton(gate_up, granularity, interpret=True)
    gate, up = np.split(np.asarray(gate_up, np.float64), 2, axis=1)
    with np.errstate(over="ignore"):  # exp(-gate) of a very negative gate is infinite and silu is 0
        expected_codes, expected_scale = quantized_by_numpy(
            gate / (1 + np.exp(-gate)) * up, granularity
        )
    # exp and three rounded float32 operations: within 2^-20.
    np.testing.assert_allclose(scale, expected_scale, rtol=2**-20)
    assert_same_codes(codes, expected_codes)


def test_silu_mul_quantize_in_bfloat16_equals_the_two_steps():
    gate_up = normal(9, (7, 520))
    codes, scale = silu_mul_quantize_triton(gate_up, "group", scale_layout="gm", interpret=True)
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    y = (gate * jax.nn.sigmoid(gate) * up).astype(gate_up.dtype)
    two_steps, two_steps_scale = quantize_activation_triton(y, "group", interpret=True)
    assert_same_codes(codes, two_steps)
    # One value in bfloat16 steps of 2^-8: y may round differently if the sigmoid does in its last
    # place.
    np.testing.assert_allclose(scale.T, two_steps_scale, rtol=2**-7)
    assert_same_codes(codes, silu_mul_quantize_reference(gate_up, "group")[0])


def test_partial_sums_are_added_and_rounded_before_anything_else():
    parts = normal(10, (3, 4, 200), "float32")
    whole = ((parts[0] + parts[1]) + parts[2]).astype(jnp.bfloat16)
    weight, residual = normal(11, (1, 200))[0], normal(12, (4, 200))
    for given, dtype in ((parts, "bfloat16"), (whole, None)):
        fused = rms_norm_quantize_triton(
            given, weight, "token", epsilon=1e-6, residual=residual, dtype=dtype, interpret=True
        )
        assert np.array_equal(np.asarray(fused[0]), np.asarray(whole + residual))
    without_residual = rms_norm_quantize_triton(
        parts, weight, "token", epsilon=1e-6, dtype="bfloat16", interpret=True
    )
    assert np.array_equal(np.asarray(without_residual[0]), np.asarray(whole))
    from_parts = silu_mul_quantize_triton(parts, "group", dtype="bfloat16", interpret=True)
    from_whole = silu_mul_quantize_triton(whole, "group", interpret=True)
    assert_same_codes(from_parts[0], from_whole[0])
    assert_same_codes(
        from_parts[0], silu_mul_quantize_reference(parts, "group", dtype="bfloat16")[0]
    )


@pytest.mark.parametrize(
    ("m", "k", "dtype", "granularity", "reason"),
    [
        (4, 256, "bfloat16", "tensor", "maximum over the whole array"),
        (4, 40000, "bfloat16", "token", "at most 32768"),
        (4, 256, "int8", "token", "int8"),
        (0, 256, "bfloat16", "token", "nothing to quantize"),
        (2**16, 2**15 + 128, "bfloat16", "group", "2 to 4 GiB"),
    ],
)
def test_unsupported_cases_say_why(m, k, dtype, granularity, reason):
    assert reason in (quantize.why_not(m, k, dtype, granularity) or "")
    if m * k < 2**20:
        with pytest.raises(NotImplementedError, match=reason):
            quantize_activation_triton(jnp.zeros((m, k), dtype), granularity, interpret=True)


def test_configs_and_shapes_that_do_not_fit_are_errors():
    x = jnp.zeros((4, 256), jnp.bfloat16)
    for config, problem in [
        (quantize.Config(block_m=1, block_k=128, num_warps=1), "whole row"),
        (quantize.Config(block_m=3, block_k=256, num_warps=1), "powers of two"),
    ]:
        with pytest.raises(ValueError, match=problem):
            quantize_activation_triton(x, "token", config=config, interpret=True)
    narrow = quantize.Config(block_m=1, block_k=64, num_warps=1)
    with pytest.raises(ValueError, match="multiple of 128"):
        quantize_activation_triton(x, "group", config=narrow, interpret=True)
    with pytest.raises(ValueError, match=r"weight must be \[256\]"):
        rms_norm_quantize_triton(
            x, jnp.zeros((128,), jnp.bfloat16), "token", epsilon=1e-5, interpret=True
        )
    with pytest.raises(ValueError, match="odd width"):
        silu_mul_quantize_triton(x[:, :255], "token", interpret=True)


@pytest.mark.parametrize("k", [1, 64, 128, 3884, 14336, 32768])
@pytest.mark.parametrize("m", [1, 16, 4096])
def test_default_configs_fit_their_shape(m, k):
    for granularity in GRANULARITIES:
        quantize.default_config(m, k, granularity).check(k, granularity)
        silu_mul_quantize.default_config(m, k, granularity).check(k, granularity)
    rms_norm_quantize.default_config(m, k).check(k, "token")


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("m", "k"), [(1, 4096), (17, 1100), (300, 14336)])
def test_on_a_gpu_the_kernels_agree_with_their_references(m, k, granularity):
    x, residual, weight = normal(0, (m, k)), normal(1, (m, k)), normal(2, (1, k))[0]
    gate_up = normal(3, (m, 2 * k))
    pairs = [
        (
            quantize_activation_triton(x, granularity),
            quantize.quantize_activation_reference(x, granularity),
        ),
        (
            silu_mul_quantize_triton(gate_up, granularity),
            silu_mul_quantize_reference(gate_up, granularity),
        ),
        (
            rms_norm_quantize_triton(x, weight, granularity, epsilon=1e-5, residual=residual)[1:],
            rms_norm_quantize_reference(x, weight, granularity, epsilon=1e-5, residual=residual)[
                1:
            ],
        ),
    ]
    for (codes, scale), (expected_codes, expected_scale) in pairs:
        assert_same_codes(codes, expected_codes)
        # The amax itself may land one bfloat16 step of 2^-8 away where exp and rsqrt are
        # approximate.
        np.testing.assert_allclose(scale, expected_scale, rtol=2**-7)


@pytest.mark.gpu
def test_on_a_gpu_nan_and_infinity_give_nan_codes():
    x = normal(3, (4, 256)).at[1, 7].set(jnp.nan).at[2, 7].set(jnp.inf)
    for granularity in GRANULARITIES:
        values = np.asarray(quantize_activation_triton(x, granularity)[0], np.float32)
        assert np.isnan(values[1, 7])
        assert np.isnan(values[2, 7])
        assert np.isfinite(values[3]).all()
