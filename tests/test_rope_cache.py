"""Rotation and cache write, run by Pallas' interpreter on the CPU, against complex multiplication
in numpy."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from strict_memory import strict_memory

from fp8jax.pallas_kernels.rope_cache import (
    Config,
    rope_cache_reference,
    rope_cache_triton,
    why_not,
)


@pytest.fixture(autouse=True, scope="module")
def no_access_outside_an_array():
    with strict_memory():
        yield


def normal(seed, shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(
        dtype
    )


def inputs(b, h, kv_heads, s, d, rotary_dim, dtype="float32"):
    qkv = normal(0, (b, (h + 2 * kv_heads) * d), dtype)
    angles = normal(1, (b, rotary_dim // 2)) * 100
    caches = normal(2, (b, kv_heads, s, d), dtype), normal(3, (b, kv_heads, s, d), dtype)
    positions = jnp.asarray(np.random.default_rng(4).integers(0, s, size=b), jnp.int32)
    return qkv, jnp.cos(angles), jnp.sin(angles), *caches, positions


def by_numpy(
    qkv,
    cos,
    sin,
    key_cache,
    value_cache,
    positions,
    *,
    q_norm=None,
    k_norm=None,
    epsilon=0.0,
    clip=None,
):
    qkv, cos, sin = (np.asarray(x.astype(jnp.float32), np.float64) for x in (qkv, cos, sin))
    b, kv_heads, s, d = key_cache.shape
    half = cos.shape[1]
    heads = qkv.reshape(b, -1, d)
    if clip is not None:
        heads = heads.clip(-clip, clip)
    q, k, v = np.split(heads, [heads.shape[1] - 2 * kv_heads, heads.shape[1] - kv_heads], axis=1)

    def turned(x, norm):
        if norm is not None:
            x = (
                x
                / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon)
                * np.asarray(norm, np.float64)
            )
        pairs = (x[..., :half] + 1j * x[..., half : 2 * half]) * (cos + 1j * sin)[:, None, :]
        return np.concatenate([pairs.real, pairs.imag, x[..., 2 * half :]], axis=-1)

    caches = [np.array(cache.astype(jnp.float32), np.float64) for cache in (key_cache, value_cache)]
    for row, position in enumerate(np.asarray(positions)):
        if 0 <= position < s:
            caches[0][row, :, position], caches[1][row, :, position] = (
                turned(k, k_norm)[row],
                v[row],
            )
    return turned(q, q_norm), *caches


@pytest.mark.parametrize(
    "shape",
    [
        (3, 8, 2, 20, 64, 64),
        (1, 1, 1, 5, 32, 32),
        (2, 5, 5, 10, 80, 32),  # a rotated part of 16 pairs and 48 channels that pass
        (2, 6, 2, 9, 48, 48),  # 24 pairs: no power of two
    ],
)
def test_queries_and_keys_turn_and_keys_and_values_land_at_their_positions(shape):
    arguments = inputs(*shape)
    got = rope_cache_triton(*arguments, interpret=True)
    for array, expected, reference in zip(
        got, by_numpy(*arguments), rope_cache_reference(*arguments), strict=True
    ):
        # Two products and a sum of numbers below 5, each rounded to 2^-24 of them.
        np.testing.assert_allclose(array, expected, atol=2e-6)
        np.testing.assert_allclose(reference, expected, atol=2e-6)


def test_norms_and_clipping_come_before_the_rotation():
    arguments = inputs(2, 6, 2, 9, 80, 32)
    options = {"q_norm": normal(5, (80,)), "k_norm": normal(6, (80,)), "epsilon": 1e-6, "clip": 1.5}
    got = rope_cache_triton(*arguments, **options, interpret=True)
    references = rope_cache_reference(*arguments, **options)
    for array, expected, reference in zip(
        got, by_numpy(*arguments, **options), references, strict=True
    ):
        # As above, behind a mean of 80 squares and a square root: a few units in the last place of
        # numbers below 10.
        np.testing.assert_allclose(array, expected, atol=1e-5)
        np.testing.assert_allclose(reference, expected, atol=1e-5)


def test_bfloat16_is_rounded_once_after_a_rotation_in_float32():
    arguments = inputs(3, 8, 2, 20, 64, 64, "bfloat16")
    got = rope_cache_triton(*arguments, interpret=True)
    for array, expected in zip(got, by_numpy(*arguments), strict=True):
        assert array.dtype == jnp.bfloat16
        # Half a unit in the last place, and a little for the float32 arithmetic before it where
        # products cancel.
        np.testing.assert_allclose(array.astype(jnp.float32), expected, rtol=2**-8, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_touched_rows_of_the_caches_change(dtype):
    qkv, cos, sin, key_cache, value_cache, _ = inputs(4, 8, 2, 20, 64, 64, dtype)
    positions = jnp.asarray([0, 19, 20, -1], jnp.int32)  # the last two are outside
    poisoned = [cache.at[:, :, 7].set(jnp.nan) for cache in (key_cache, value_cache)]
    for run in (functools.partial(rope_cache_triton, interpret=True), rope_cache_reference):
        _, *after = run(qkv, cos, sin, poisoned[0], poisoned[1], positions)
        for new, old in zip(after, poisoned, strict=True):
            changed = np.any(
                np.asarray(new).view(np.uint8) != np.asarray(old).view(np.uint8), axis=-1
            )
            expected = np.zeros(changed.shape, bool)
            expected[0, :, 0] = expected[1, :, 19] = True
            assert np.array_equal(changed, expected)


def test_partial_sums_are_added_and_rounded_first():
    _, *others = inputs(2, 4, 2, 9, 32, 32, "bfloat16")
    parts = normal(7, (3, 2, 8 * 32))
    whole = ((parts[0] + parts[1]) + parts[2]).astype(jnp.bfloat16)
    from_parts = rope_cache_triton(parts, *others, dtype="bfloat16", interpret=True)
    from_whole = rope_cache_triton(whole, *others, interpret=True)
    for one, other in zip(from_parts, from_whole, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_a_cache_may_be_narrower_than_the_activations():
    qkv, cos, sin, key_cache, value_cache, positions = inputs(2, 4, 2, 9, 32, 32)
    narrow = key_cache.astype(jnp.bfloat16), value_cache.astype(jnp.bfloat16)
    q, keys, values = rope_cache_triton(qkv, cos, sin, *narrow, positions, interpret=True)
    expected = by_numpy(qkv, cos, sin, *narrow, positions)
    assert (q.dtype, keys.dtype, values.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    # Half a unit in the last place of bfloat16, see above.
    np.testing.assert_allclose(keys.astype(jnp.float32), expected[1], rtol=2**-8, atol=2e-6)
    np.testing.assert_allclose(values.astype(jnp.float32), expected[2], rtol=2**-8)


def test_a_nan_in_one_head_reaches_neither_other_heads_nor_gets_lost():
    qkv, *others = inputs(1, 4, 2, 9, 32, 32)
    q, keys, values = rope_cache_triton(
        qkv.at[0, 3].set(jnp.nan), *others, clip=2.0, interpret=True
    )
    assert np.isnan(np.asarray(q)[0, 0]).any()
    assert np.isfinite(np.asarray(q)[0, 1:]).all()
    assert np.isfinite(np.asarray(keys)).all()
    assert np.isfinite(np.asarray(values)).all()


def test_what_it_cannot_do_it_says():
    assert "evenly" in (why_not(7, 64, 2, "bfloat16", "bfloat16") or "")
    assert "the cache is float8_e4m3fn" in (why_not(8, 64, 2, "bfloat16", "float8_e4m3fn") or "")
    qkv, cos, sin, key_cache, value_cache, positions = inputs(2, 4, 2, 9, 32, 32)
    with pytest.raises(ValueError, match="whole heads of 32"):
        rope_cache_triton(qkv[:, :-1], cos, sin, key_cache, value_cache, positions, interpret=True)
    with pytest.raises(ValueError, match=r"positions must be \[2\]"):
        rope_cache_triton(qkv, cos, sin, key_cache, value_cache, positions[:1], interpret=True)
    with pytest.raises(ValueError, match="both None"):
        rope_cache_triton(
            qkv, cos, sin, key_cache, value_cache, positions, q_norm=jnp.ones(32), interpret=True
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("num_warps", [1, 4])
def test_on_a_gpu_it_agrees_with_the_reference(num_warps):
    for shape in [(16, 32, 8, 1000, 128, 128), (3, 5, 5, 10, 80, 32)]:
        arguments = inputs(*shape, dtype="bfloat16")
        got = rope_cache_triton(*arguments, config=Config(num_warps=num_warps))
        for array, expected in zip(got, rope_cache_reference(*arguments), strict=True):
            # A fused multiply-add may round the other way: one unit in the last place of bfloat16.
            np.testing.assert_allclose(
                array.astype(jnp.float32), expected.astype(jnp.float32), rtol=2**-7, atol=2e-6
            )
