"""Rotate a new token's queries and keys, and write its keys and values into the cache, in one
kernel.

    qkv [b, (h + 2·kv_heads) · d]  ->  q [b, h, d] turned
                                       k turned, v as it is, at cache[b, :, positions[b], :]

    [x₁ x₂ rest]  ->  [x₁·cos − x₂·sin,  x₂·cos + x₁·sin,  rest]
                                       x₁, x₂ of rotary_dim / 2 channels each, in float32

The caches `[b, kv_heads, s, d]` are updated in place: input and output of the kernel are one
buffer, of which only the touched rows are written. Donate the caches to the enclosing `jax.jit`;
otherwise XLA copies them first to keep the caller's arrays as they were. cos and sin come
ready-made, since all layers share them and an accurate cosine of a large angle is long code. What
some families do to q and k before they turn is done on the way: clipping (OLMo), and RMSNorm over
each head (Qwen3). qkv may also be the float32 partial sums of a split-K product. Source: the
rotation of `rotary_embedding.py`.

A program takes one row and one key-value head: its query heads and the key are the rows of one
tile, so that they turn together.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fp8jax.pallas_kernels import quantize
from fp8jax.pallas_kernels.quantize import ACTIVATION_DTYPES, power_of_two
from fp8jax.pallas_kernels.rms_norm_quantize import rms_norm


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a program runs; its tile follows from the shapes.

    Args:
        num_warps: warps that share a program's heads.
    """

    num_warps: int


def rope_cache_reference(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    key_cache: jax.Array,
    value_cache: jax.Array,
    positions: jax.Array,
    *,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    epsilon: float = 0.0,
    clip: float | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The specification.

    Args:
        qkv: bfloat16, float16 or float32 `[b, (h + 2·kv_heads) · d]`, or float32 partial sums
            `[splits, b, …]` of it.
        cos, sin: float32 `[b, rotary_dim / 2]`.
        key_cache, value_cache: float `[b, kv_heads, s, d]`.
        positions: int32 `[b]`, where each row's key and value go; a row whose position is outside
            the cache writes nothing.
        q_norm, k_norm: float `[d]`, weights of an RMSNorm over each head; None for no norm.
        epsilon: added to that norm's mean square.
        clip: q, k and v are clipped to ± this; None for no clipping.
        dtype: the activation dtype, needed for partial sums only.
    Returns:
        q `[b, h, d]` in the activation dtype, and both caches.
    """
    qkv = quantize.activation_of(qkv, dtype)
    b, kv_heads, s, d = key_cache.shape
    heads = qkv.reshape(b, 1, -1, d)
    heads = heads if clip is None else jnp.clip(heads, -clip, clip)
    first = heads.shape[2] - 2 * kv_heads
    q, k, v = jnp.split(heads, [first, first + kv_heads], axis=2)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, epsilon=epsilon), rms_norm(k, k_norm, epsilon=epsilon)
    q, k = (rotate(x, cos[:, None], sin[:, None]) for x in (q, k))
    rows, places = jnp.arange(b), jnp.where(positions < 0, s, positions)

    def write(cache: jax.Array, x: jax.Array) -> jax.Array:
        return cache.at[rows, :, places].set(x[:, 0].astype(cache.dtype), mode="drop")

    return q[:, 0], write(key_cache, k), write(value_cache, v)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the first channels of each head, in float32, on any device.

    Args:
        x: float `[b, t, h, d]`.
        cos, sin: float32 `[b, t, rotary_dim / 2]`.
    Returns:
        `[b, t, h, d]` in the dtype of x.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    x1, x2 = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
    if 2 * half == x.shape[-1]:
        return turned
    return jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)


@functools.partial(jax.jit, static_argnames=("epsilon", "clip", "dtype", "config", "interpret"))
def rope_cache_triton(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    key_cache: jax.Array,
    value_cache: jax.Array,
    positions: jax.Array,
    *,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    epsilon: float = 0.0,
    clip: float | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same in one kernel, in place where the caches are donated.

    Args:
        qkv, cos, sin, key_cache, value_cache, positions, q_norm, k_norm, epsilon, clip, dtype: as
        in the reference.
        config: `default_config` if None.
        interpret: run on the CPU, to check the mathematics.
    Returns:
        q and both caches as in the reference.
    Raises:
        NotImplementedError: `why_not` says why.
        ValueError: shapes that do not belong together.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    *_, b, width = qkv.shape
    _, kv_heads, s, d = key_cache.shape
    dtype = jnp.dtype(qkv.dtype if qkv.ndim == 2 else dtype)
    h, half = width // d - 2 * kv_heads, cos.shape[1]
    _check_shapes(qkv, cos, sin, key_cache, value_cache, positions, q_norm, k_norm)
    if reason := why_not(h, d, kv_heads, dtype, key_cache.dtype):
        raise NotImplementedError(f"rope_cache: {reason}")
    config = config or default_config()
    group = h // kv_heads
    tile_heads = power_of_two(group + 1)  # the query heads of a key-value head, then its key
    normalises = q_norm is not None

    def kernel(*refs):
        # [b, (h + 2·kv_heads) · d] or [splits, b, …]; [b, half] float32 twice; [b] int32; [d] twice
        # if q and k are normalised
        qkv_ref, cos_ref, sin_ref, positions_ref, *norm_refs = refs[: 6 if normalises else 4]
        # [b, h, d]; [b, kv_heads, s, d] twice. The caches come as inputs too, for their buffers'
        # sake.
        q_ref, key_ref, value_ref = refs[-3:]
        row, kv_head = pl.program_id(0), pl.program_id(1)
        position = plgpu.load(positions_ref.at[row])
        in_cache = (position >= 0) & (position < s)
        place = jnp.arange(tile_heads, dtype=jnp.int32)[:, None]
        is_query, is_key = place < group, place == group
        query_head = kv_head * group + place
        head = jnp.where(is_query, query_head, h + kv_head)

        def load(first: int, size: int) -> tuple[jax.Array, ...]:
            """Channels `first` to `first + size` of the tile's heads: values, norm weights,
            numbers, and which are real."""
            channels = jnp.arange(power_of_two(size), dtype=jnp.int32)[None, :]
            inside = (channels < size) & (is_query | is_key)
            channels = jnp.broadcast_to(channels + first, inside.shape)
            rows = jnp.full(inside.shape, row, jnp.int32)
            x = quantize.load_activation(qkv_ref, rows, head * d + channels, inside, dtype)
            weight = x
            if normalises:
                of_query, of_key = (
                    plgpu.load(ref.at[channels], mask=inside, other=0.0) for ref in norm_refs
                )
                weight = jnp.where(is_query, of_query, of_key).astype(jnp.float32)
            return _clipped(x, clip, dtype), weight, channels, inside

        def normalised(x, weight, factor):
            return (
                ((x * factor).astype(dtype).astype(jnp.float32) * weight)
                .astype(dtype)
                .astype(jnp.float32)
            )

        def store(x, channels, inside):
            plgpu.store(
                q_ref.at[row, query_head, channels], x.astype(dtype), mask=inside & is_query
            )
            # Only the key's row of the tile passes the mask. The others name a position outside,
            # because interpret mode writes old values back to where a mask is False, and that must
            # not be the key's place.
            positions = jnp.broadcast_to(jnp.where(is_key & in_cache, position, s), channels.shape)
            key_place = key_ref.at[row, jnp.full_like(channels, kv_head), positions, channels]
            plgpu.store(key_place, x.astype(key_cache.dtype), mask=inside & is_key & in_cache)

        parts = [load(0, half), load(half, half)]
        if 2 * half < d:
            parts.append(load(2 * half, d - 2 * half))
        pairs, in_half = parts[0][2:]
        angle_rows = jnp.full(pairs.shape, row, jnp.int32)
        cosine = plgpu.load(cos_ref.at[angle_rows, pairs], mask=in_half, other=0.0)
        sine = plgpu.load(sin_ref.at[angle_rows, pairs], mask=in_half, other=0.0)
        if normalises:
            squares = functools.reduce(jnp.add, [jnp.sum(x * x, axis=1) for x, *_ in parts])
            factor = lax.rsqrt(squares * jnp.float32(1 / d) + jnp.float32(epsilon))[:, None]
            parts = [(normalised(x, weight, factor), weight, *at) for x, weight, *at in parts]
        (x1, _, *at1), (x2, _, *at2), *rest = parts
        store(x1 * cosine - x2 * sine, *at1)
        store(x2 * cosine + x1 * sine, *at2)
        for x, _, *at in rest:
            store(x, *at)

        channels = jnp.arange(power_of_two(d), dtype=jnp.int32)[None, :]
        first = jnp.full_like(channels, (h + kv_heads) * d) + kv_head * d
        value_row = jnp.full_like(channels, row)
        value = quantize.load_activation(qkv_ref, value_row, first + channels, channels < d, dtype)
        value_place = value_ref.at[
            row, jnp.full_like(channels, kv_head), jnp.full_like(channels, position), channels
        ]
        value = _clipped(value, clip, dtype).astype(value_cache.dtype)
        plgpu.store(value_place, value, mask=(channels < d) & in_cache)

    norms = (q_norm, k_norm) if normalises else ()
    inputs = (qkv, cos, sin, positions.astype(jnp.int32), *norms, key_cache, value_cache)
    q, key_cache, value_cache = pl.pallas_call(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct((b, h, d), dtype),
            jax.ShapeDtypeStruct(key_cache.shape, key_cache.dtype),
            jax.ShapeDtypeStruct(value_cache.shape, value_cache.dtype),
        ),
        grid=(b, kv_heads),
        input_output_aliases={len(inputs) - 2: 1, len(inputs) - 1: 2},
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=interpret,
        name="rope_cache",
    )(*inputs)
    return q, key_cache, value_cache


def why_not(
    h: int, d: int, kv_heads: int, dtype: jax.typing.DTypeLike, cache_dtype: jax.typing.DTypeLike
) -> str | None:
    """Why there is no kernel for this case, or None if there is one."""
    for what, given in (("activations are", dtype), ("the cache is", cache_dtype)):
        if jnp.dtype(given).name not in ACTIVATION_DTYPES:
            return (
                f"{what} {jnp.dtype(given).name}, the kernel takes {', '.join(ACTIVATION_DTYPES)}"
            )
    if h < 1 or h % kv_heads:
        return f"{h} query heads do not share {kv_heads} key-value heads evenly"
    if power_of_two(h // kv_heads + 1) * power_of_two(d) > 32768:
        return (
            f"{h // kv_heads} query heads of {d} channels share a key: more than a program holds "
            "in registers"
        )
    return None


def default_config() -> Config:
    """Four warps: a program is so short that its time is that of its first load, whatever the
    shape."""
    return Config(num_warps=4)


def _clipped(x: jax.Array, clip: float | None, dtype: jax.typing.DTypeLike) -> jax.Array:
    if clip is None:
        return x
    limit = float(
        np.asarray(clip, jnp.dtype(dtype))
    )  # in steps of the activation dtype, as a clip in that dtype has it
    lowest, highest = jnp.float32(-limit), jnp.float32(limit)
    # By comparisons, because min and max drop a NaN in Triton.
    return jnp.where(x > highest, highest, jnp.where(x < lowest, lowest, x))


def _check_shapes(qkv, cos, sin, key_cache, value_cache, positions, q_norm, k_norm) -> None:
    *_, b, width = qkv.shape
    problems = []
    if key_cache.ndim != 4 or key_cache.shape != value_cache.shape or key_cache.shape[0] != b:
        problems.append(
            f"both caches must be [{b}, kv_heads, s, d], got {key_cache.shape} and "
            f"{value_cache.shape}"
        )
    d = key_cache.shape[-1]
    if width % d:
        problems.append(f"qkv must hold whole heads of {d} channels, got a width of {width}")
    if (
        cos.shape != sin.shape
        or cos.ndim != 2
        or cos.shape[0] != b
        or not 0 < 2 * cos.shape[1] <= d
    ):
        problems.append(
            f"cos and sin must be [{b}, at most {d // 2}], got {cos.shape} and {sin.shape}"
        )
    if positions.shape != (b,):
        problems.append(f"positions must be [{b}], got {positions.shape}")
    norms = [None if norm is None else norm.shape for norm in (q_norm, k_norm)]
    if norms not in ([None, None], [(d,), (d,)]):
        problems.append(
            f"q_norm and k_norm must both be [{d}] or both None, got {norms[0]} and {norms[1]}"
        )
    if problems:
        raise ValueError(f"rope_cache: {'; '.join(problems)}")
