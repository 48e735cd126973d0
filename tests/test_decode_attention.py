"""Decode attention, run by Pallas' interpreter on the CPU, against numpy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from strict_memory import strict_memory

from fp8jax.device import H100
from fp8jax.pallas_kernels import quantize
from fp8jax.pallas_kernels.decode_attention import (
    Config,
    decode_attention_quantize_triton,
    decode_attention_reference,
    decode_attention_triton,
    default_config,
    why_not,
)


@pytest.fixture(autouse=True, scope="module")
def no_access_outside_an_array():
    with strict_memory():
        yield


def config(splits, block_s=16):
    return Config(block_s=block_s, splits=splits, num_warps=4, num_stages=2)


def normal(seed, shape, dtype):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(
        dtype
    )


def inputs(b, h, kv_heads, s, d, dtype="float32"):
    """q, k, v; and lengths of which one is the capacity, one is 1, and the others lie between."""
    q, k, v = (
        normal(0, (b, h, d), dtype),
        normal(1, (b, kv_heads, s, d), dtype),
        normal(2, (b, kv_heads, s, d), dtype),
    )
    lengths = np.random.default_rng(3).integers(1, s + 1, size=b)
    lengths[0], lengths[-1] = s, 1
    return q, k, v, jnp.asarray(lengths, jnp.int32)


def poisoned(cache, lengths):
    """The cache with NaN where nothing may be read."""
    unused = np.arange(cache.shape[2])[None, :] >= np.asarray(lengths)[:, None]
    return jnp.where(unused[:, None, :, None], jnp.asarray(jnp.nan, cache.dtype), cache)


def by_numpy(q, k, v, lengths, *, scale, window=None):
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for row, length in enumerate(np.asarray(lengths)):
        first = 0 if window is None else max(0, length - window)
        for head in range(q.shape[1]):
            group = head // (q.shape[1] // k.shape[1])
            keys, values = k[row, group, first:length], v[row, group, first:length]
            scores = keys @ q[row, head] * scale
            weights = np.exp(scores - scores.max())
            out[row, head] = weights / weights.sum() @ values
    return out


@pytest.mark.parametrize(
    ("shape", "splits", "window"),
    [
        ((3, 8, 2, 100, 64), 1, None),  # a ragged last block
        (
            (3, 8, 2, 100, 64),
            4,
            None,
        ),  # 7 blocks over 4 splits: the last split of every row has fewer
        (
            (2, 5, 5, 70, 80),
            8,
            None,
        ),  # no grouping, d no power of two, more splits than the short row has blocks
        ((4, 6, 1, 90, 16), 2, 37),  # a window that begins inside a block
        ((2, 34, 2, 33, 32), 1, 5),  # 17 query heads share keys: a tile of 32
    ],
)
def test_it_is_softmax_attention_over_the_used_keys(shape, splits, window):
    q, k, v, lengths = inputs(*shape)
    scale = shape[-1] ** -0.5
    arguments = {"scale": scale, "window": window}
    expected = by_numpy(q, k, v, lengths, **arguments)
    k, v = poisoned(k, lengths), poisoned(v, lengths)
    out = decode_attention_triton(
        q, k, v, lengths, **arguments, config=config(splits), interpret=True
    )
    # About 100 float32 additions of numbers near 1: 100 · 2^-24 = 6e-6.
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(
        decode_attention_reference(q, k, v, lengths, **arguments), expected, atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_lose_the_weights_rounding_and_the_outputs(dtype):
    q, k, v, lengths = inputs(2, 4, 2, 60, 64, dtype)
    out = decode_attention_triton(q, k, v, lengths, scale=0.125, config=config(2), interpret=True)
    assert out.dtype == dtype
    # Weights rounded to the dtype before they meet v: half a unit in the last place of each, at
    # most that of Σ w |v| <= max |v|. The output is rounded once more. So one unit in the last
    # place, relative to max |v|.
    bound = float(jnp.finfo(dtype).eps) * float(jnp.max(jnp.abs(v.astype(jnp.float32))))
    np.testing.assert_allclose(
        out.astype(jnp.float32), by_numpy(q, k, v, lengths, scale=0.125), atol=bound
    )


def test_a_row_without_keys_is_zero():
    q, k, v, _ = inputs(2, 4, 2, 40, 32)
    lengths = jnp.asarray([0, 40], jnp.int32)
    for splits in (1, 4):
        out = decode_attention_triton(
            q, poisoned(k, lengths), v, lengths, scale=0.2, config=config(splits), interpret=True
        )
        assert not np.asarray(out[0]).any()
        assert np.asarray(out[1]).any()
    assert not np.asarray(decode_attention_reference(q, k, v, lengths, scale=0.2)[0]).any()


def test_a_row_does_not_depend_on_the_others():
    q, k, v, lengths = inputs(4, 4, 2, 80, 32, "bfloat16")
    together = decode_attention_triton(
        q, k, v, lengths, scale=0.2, config=config(4), interpret=True
    )
    for row in range(4):
        only = slice(row, row + 1)
        alone = decode_attention_triton(
            q[only], k[only], v[only], lengths[only], scale=0.2, config=config(4), interpret=True
        )
        assert np.array_equal(np.asarray(alone[0]), np.asarray(together[row]))


def test_unused_capacity_changes_nothing():
    q, k, v, lengths = inputs(2, 4, 2, 48, 32)
    more_k, more_v = (
        jnp.pad(x, ((0, 0), (0, 0), (0, 64), (0, 0)), constant_values=jnp.nan) for x in (k, v)
    )
    arguments = {"scale": 0.2, "config": config(2), "interpret": True}
    assert np.array_equal(
        decode_attention_triton(q, k, v, lengths, **arguments),
        decode_attention_triton(q, more_k, more_v, lengths, **arguments),
    )


@pytest.mark.parametrize(
    ("shape", "granularity", "splits"),
    [
        ((3, 6, 2, 50, 64), "token", 2),  # 6 heads in a tile of 8
        ((2, 3, 1, 50, 64), "group", 4),  # the last group has one head
        ((2, 3, 1, 50, 80), "group", 2),  # heads straddle groups
    ],
)
def test_the_quantizing_form_gives_the_codes_of_the_plain_one(shape, granularity, splits):
    q, k, v, lengths = inputs(*shape, dtype="bfloat16")
    arguments = {"scale": 0.1, "config": config(splits), "interpret": True}
    rows = decode_attention_triton(q, k, v, lengths, **arguments).reshape(shape[0], -1)
    expected_codes, expected_scale = quantize.quantize_activation_reference(rows, granularity)
    codes, scale = decode_attention_quantize_triton(
        q, k, v, lengths, granularity, scale_layout="gm", **arguments
    )
    # The same float32 operations in the same order.
    assert np.array_equal(
        np.asarray(codes).view(np.uint8), np.asarray(expected_codes).view(np.uint8)
    )
    assert np.array_equal(scale if granularity == "token" else scale.T, expected_scale)


@pytest.mark.parametrize(
    ("b", "kv_heads", "s", "splits"),
    [
        (1, 8, 8192, 16),
        (16, 8, 8192, 1),
        (64, 8, 8192, 1),
        (1, 8, 256, 2),
        (1, 1, 100, 1),
        (2, 1, 131072, 32),
    ],
)
def test_default_splits_fill_a_gpu_but_keep_128_keys_each(b, kv_heads, s, splits):
    chosen = default_config(H100, b, kv_heads, s, 128, "bfloat16")
    chosen.check()
    assert chosen.splits == splits


def test_what_it_cannot_do_it_says():
    assert "evenly" in (why_not(7, 64, 2, "bfloat16") or "")
    assert "at most 256" in (why_not(8, 512, 2, "bfloat16") or "")
    assert "at most 64" in (why_not(128, 64, 1, "bfloat16") or "")
    assert "float8_e4m3fn" in (why_not(8, 64, 2, "float8_e4m3fn") or "")
    q, k, v, lengths = inputs(2, 4, 2, 48, 32)
    with pytest.raises(ValueError, match=r"k and v must be \[2, kv_heads, s, 32\]"):
        decode_attention_triton(q, k[..., :16], v, lengths, scale=1.0, interpret=True)
    with pytest.raises(ValueError, match="one dtype"):
        decode_attention_triton(q.astype(jnp.bfloat16), k, v, lengths, scale=1.0, interpret=True)
    with pytest.raises(ValueError, match="window=0"):
        decode_attention_triton(q, k, v, lengths, scale=1.0, window=0, interpret=True)
    with pytest.raises(ValueError, match="powers of two"):
        decode_attention_triton(q, k, v, lengths, scale=1.0, config=config(3), interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(1, 32, 8, 4096, 128), (16, 32, 8, 1000, 128), (3, 14, 2, 300, 64), (2, 8, 8, 70, 80)]
)
def test_on_a_gpu_it_agrees_with_the_reference_and_with_itself(shape):
    q, k, v, lengths = inputs(*shape, dtype="bfloat16")
    k, v = poisoned(k, lengths), poisoned(v, lengths)
    for window in (None, 100):
        out = decode_attention_triton(q, k, v, lengths, scale=0.1, window=window)
        expected = decode_attention_reference(q, k, v, lengths, scale=0.1, window=window)
        # As in interpret mode: weights and outputs are rounded to bfloat16.
        bound = 2**-7 * float(jnp.nanmax(jnp.abs(v.astype(jnp.float32))))
        np.testing.assert_allclose(
            out.astype(jnp.float32), expected.astype(jnp.float32), atol=bound
        )
        again = decode_attention_triton(q, k, v, lengths, scale=0.1, window=window)
        assert np.array_equal(np.asarray(out), np.asarray(again))
