"""Weight codes and scales against an independent NumPy restatement of the reference's rules, bit
for bit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8jax import (
    FP8_PER_BLOCK,
    FP8_PER_CHANNEL,
    FP8_PER_TENSOR,
    QArray,
    Scheme,
    dequantize,
    quantize,
)
from fp8jax.exact_division import divide
from fp8jax.pallas_kernels.formats import WEIGHTS, Granularity
from fp8jax.qarray import dequantize_rows, split_rows

F32 = np.float32


def oracle_codes(w, scale):
    with np.errstate(over="ignore", under="ignore"):
        return np.clip(w.astype(F32) * (F32(1) / scale), F32(-448), F32(448)).astype(
            ml_dtypes.float8_e4m3fn
        )


def oracle_tensor(w):
    scale = np.maximum(np.abs(w.astype(F32)).max() / F32(448), F32(2.0**-126))
    return oracle_codes(w, scale), np.asarray([scale])


def oracle_channel(w):
    scale = np.maximum(np.abs(w.astype(F32)).max(axis=1, keepdims=True) / F32(448), F32(2.0**-126))
    return oracle_codes(w, scale), scale


def oracle_block(w):
    """Block by block, with no padding anywhere."""
    n, k = w.shape
    codes = np.zeros((n, k), ml_dtypes.float8_e4m3fn)
    scales = np.zeros((-(-n // 128), -(-k // 128)), F32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = np.s_[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            scales[i, j] = max(np.abs(w[block].astype(F32)).max(), F32(1e-4)) / F32(448)
            codes[block] = oracle_codes(w[block], scales[i, j])
    return codes, scales


ORACLES = {
    FP8_PER_TENSOR: oracle_tensor,
    FP8_PER_CHANNEL: oracle_channel,
    FP8_PER_BLOCK: oracle_block,
}
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def bits(array):
    array = np.asarray(array)
    return array.view({1: np.uint8, 4: np.uint32}[array.dtype.itemsize])


jitted = jax.jit(quantize, static_argnums=1, static_argnames="row_groups")


def assert_same_bits(w, scheme, run: Callable[..., QArray] = jitted):
    codes, scale = ORACLES[scheme](w)
    q = run(jnp.asarray(w), scheme)
    q.validate()
    np.testing.assert_array_equal(bits(q.scale), bits(scale))
    np.testing.assert_array_equal(bits(q.qvalue), bits(codes))


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("scheme", ORACLES, ids=lambda s: s.name)
@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (300, 200), (96, 500)])
def test_codes_and_scales_equal_numpy(shape, scheme, dtype):
    rng = np.random.default_rng(sum(shape))
    assert_same_bits((rng.standard_normal(shape) * 0.05).astype(dtype), scheme)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("scheme", ORACLES, ids=lambda s: s.name)
@pytest.mark.parametrize(
    "magnitude", [1e-42, 1e-39, 1e-38, 1e-37, 1e-36, 5.3e-36, 1e-30, 1e-10, 1e-4, 1e20, 3e38]
)
def test_tiny_and_huge_weights_equal_numpy(magnitude, scheme, dtype):
    # Below 1.2e-38 weights are subnormal numbers, which XLA flushes to zero and NumPy does not.
    uniform = np.random.default_rng(1).uniform(-1, 1, (130, 140))
    assert_same_bits((uniform * magnitude).astype(dtype), scheme)


@pytest.mark.parametrize("scheme", ORACLES, ids=lambda s: s.name)
def test_zeros_get_a_finite_scale_and_zero_codes(scheme):
    w = np.zeros((256, 200), ml_dtypes.bfloat16)
    assert_same_bits(w, scheme)
    w[:128, :128] = 0.5  # one block that is not zero
    assert_same_bits(w, scheme)
    q = quantize(jnp.zeros((3, 5)), scheme)
    assert np.isfinite(q.scale).all() and not np.asarray(q.qvalue, F32).any()


def test_a_block_below_the_floor_is_quantized_against_the_floor():
    q = quantize(jnp.full((4, 4), 3e-5, jnp.float32), "fp8_per_block")
    assert q.scale[0, 0] == F32(1e-4) / F32(448)
    assert float(q.qvalue[0, 0]) == 128  # 3e-5 / 1e-4 · 448 = 134.4, between the codes 128 and 144


def test_last_block_of_a_ragged_matrix_has_its_own_scale():
    w = np.ones((130, 130), F32)
    w[128:, 128:] = 7
    scale = np.asarray(quantize(jnp.asarray(w), "fp8_per_block").scale)
    np.testing.assert_array_equal(scale, np.asarray([[1, 1], [1, 7]], F32) / F32(448))


def test_experts_are_quantized_each_for_itself():
    w = np.random.default_rng(2).standard_normal((3, 130, 140)).astype(ml_dtypes.bfloat16)
    w[1] *= 100
    for scheme in ORACLES:
        stacked = jitted(jnp.asarray(w), scheme)
        for expert in range(3):
            codes, scale = ORACLES[scheme](w[expert])
            np.testing.assert_array_equal(bits(stacked.qvalue[expert]), bits(codes))
            np.testing.assert_array_equal(bits(stacked.scale[expert]).ravel(), bits(scale).ravel())


@pytest.mark.parametrize("half", [64, 100, 192])
def test_gate_and_up_never_share_a_block(half):
    w = np.random.default_rng(3).standard_normal((2, 2 * half, 140)).astype(ml_dtypes.bfloat16)
    q = jitted(jnp.asarray(w), "fp8_per_block", row_groups=2)
    q.validate()
    assert q.scale.shape == (2, 2 * -(-half // 128), 2)
    for expert in range(2):
        (gate, gate_scale), (up, up_scale) = (
            oracle_block(w[expert, :half]),
            oracle_block(w[expert, half:]),
        )
        np.testing.assert_array_equal(bits(q.qvalue[expert]), bits(np.concatenate([gate, up])))
        np.testing.assert_array_equal(
            bits(q.scale[expert]), bits(np.concatenate([gate_scale, up_scale]))
        )
    restored = dequantize(q)
    # half an e4m3 step of 2⁻⁴ relative, or of 2⁻⁹ absolute in codes, at a scale of at most 5/448
    assert np.allclose(restored, w.astype(F32), rtol=2**-4, atol=2**-10 * 5 / 448)


@pytest.mark.parametrize("scheme", ORACLES, ids=lambda s: s.name)
def test_outside_jit_the_bits_are_the_same(scheme):
    assert_same_bits(
        np.random.default_rng(8).standard_normal((130, 140)).astype(ml_dtypes.bfloat16),
        scheme,
        quantize,
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(1, 150), (150, 1), (130, 140)]),  # few shapes: each one compiles
    exponent=st.integers(-148, 126),
    seed=st.integers(0, 2**32 - 1),
    scheme=st.sampled_from(list(ORACLES)),
)
def test_any_finite_float32_weight_equals_numpy(shape, exponent, seed, scheme):
    assert_same_bits(
        np.ldexp(np.random.default_rng(seed).uniform(-2, 2, shape), exponent).astype(F32), scheme
    )


def test_division_is_correctly_rounded():
    rng = np.random.default_rng(4)
    a, b = (
        rng.integers(0x00800000, 0x7F800000, 500_000).astype(np.uint32).view(F32) for _ in range(2)
    )
    with np.errstate(all="ignore"):
        exact = a / b
    normal = (exact >= 2.0**-126) & np.isfinite(exact)
    assert normal.sum() > 300_000
    np.testing.assert_array_equal(bits(jax.jit(divide)(a, b))[normal], bits(exact)[normal])


def test_plain_division_would_not_be():
    """The reason for exact_division: if XLA ever divides exactly, this fails and the module can
    go."""
    amax = np.random.default_rng(5).uniform(0.01, 2, 10_000).astype(F32)
    assert (bits(jax.jit(lambda x: x / F32(448))(amax)) != bits(amax / F32(448))).any()


def test_quantize_traces():
    shape = jax.eval_shape(
        lambda w: quantize(w, "fp8_per_block"), jax.ShapeDtypeStruct((200, 300), jnp.bfloat16)
    )
    assert (shape.qvalue.dtype, shape.scale.shape) == (jnp.float8_e4m3fn, (2, 3))


def test_dequantize_multiplies_codes_by_their_scale():
    w = np.random.default_rng(6).standard_normal((200, 300)).astype(F32)
    for scheme in ORACLES:
        codes, scale = ORACLES[scheme](w)
        if scheme.weight == "block":
            scale = np.kron(scale, np.ones((128, 128), F32))[:200, :300]
        np.testing.assert_array_equal(
            dequantize(quantize(jnp.asarray(w), scheme)), codes.astype(F32) * scale
        )


@pytest.mark.parametrize(
    ("weight", "scheme", "message"),
    [
        (jnp.zeros((2, 2), jnp.int32), "fp8_per_tensor", "int32"),
        (jnp.zeros(3), "fp8_per_tensor", r"\(3,\)"),
        (jnp.zeros((0, 3)), "fp8_per_tensor", "empty"),
        (jnp.zeros((2, 2)), "fp8_per_row", "fp8_per_tensor, fp8_per_channel, fp8_per_block"),
        (jnp.zeros((2, 2)), "mxfp8", "not supported"),
    ],
)
def test_errors_name_what_was_found(weight, scheme, message):
    with pytest.raises(ValueError, match=message):
        quantize(weight, scheme)


def test_a_scheme_that_cannot_be_is_refused():
    with pytest.raises(
        ValueError, match="weights with scales per block meet activations with scales per group"
    ):
        Scheme(name="mine", weight="block", activation="token")


@pytest.mark.parametrize("scheme", ORACLES, ids=lambda s: s.name)
@pytest.mark.parametrize("row_groups", [1, 2])
def test_some_rows_dequantize_as_all_rows_do(scheme, row_groups):
    w = np.random.default_rng(7).standard_normal((2, 200, 140)).astype(F32)
    q = jitted(jnp.asarray(w), scheme, row_groups=row_groups if scheme.weight == "block" else 1)
    rows = np.asarray([0, 99, 100, 127, 128, 199])
    np.testing.assert_array_equal(dequantize_rows(q, rows), dequantize(q)[:, rows])


@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (256, 128)])
@pytest.mark.parametrize("row_groups", [1, 2])
def test_a_row_in_the_table_of_granularities_is_all_that_a_new_one_needs(
    rows, columns, row_groups, monkeypatch
):
    name: Any = f"{rows} x {columns}"
    new = Granularity(name=name, rows=rows, columns=columns, activations=("group",))
    monkeypatch.setitem(WEIGHTS, name, new)
    scheme = Scheme(name="mine", weight=name, activation="group")
    w = np.random.default_rng(9).standard_normal((2, 600, 140)).astype(F32)
    q = jitted(jnp.asarray(w), scheme, row_groups=row_groups)
    q.validate()
    wide, group_rows = [], 600 // row_groups
    for group in np.split(w, row_groups, axis=1):
        spread = np.zeros_like(group)
        for i in range(0, group_rows, rows):
            for j in range(0, 140, columns):
                block = np.s_[:, i : i + rows, j : j + columns]
                amax = np.abs(group[block]).max(axis=(1, 2), keepdims=True)
                spread[block] = amax / F32(448)
        wide.append(spread)
    scale = np.concatenate(wide, axis=1)
    np.testing.assert_array_equal(bits(q.qvalue), bits(oracle_codes(w, scale)))
    restored = dequantize(q)
    np.testing.assert_array_equal(restored, np.asarray(q.qvalue, F32) * scale)
    some = np.asarray([0, 299, 300, 512, 599])
    np.testing.assert_array_equal(dequantize_rows(q, some), restored[:, some])
    parts = split_rows(q, (300, 300) if row_groups == 2 else (new.row_step, 600 - new.row_step))
    for part in parts.parts:
        part.validate()
    np.testing.assert_array_equal(
        np.concatenate([dequantize(part) for part in parts.parts], axis=1), restored
    )
    np.testing.assert_array_equal(parts.joined().scale, q.scale)
