"""Causal attention for any number of queries a row, in plain jnp.

It runs on every device, and it is the specification of the kernel for one new token
(`decode_attention.py`).

    out[b, j, i] = Σ_s softmax_s(scale · q[b, j, i] · k[b, g, s]) · v[b, g, s]
                            g = j // (h / kv_heads),  s ≤ positions[b, i], and within the window

Scores are float32 and exist for some queries at a time, so that a long prompt needs no more memory
than a bounded number of them.
"""

import jax
import jax.numpy as jnp
from jax import lax

# Queries of long prompts are taken so many at a time that their float32 scores stay below this,
# whatever the batch.
_SCORE_BYTES = 2**27


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    positions: jax.Array,
    scale: float,
    window: int | None,
    valid: jax.Array | None = None,
) -> jax.Array:
    """Causal attention; softmax in float32.

    Args:
        q: `[b, h, t, d]`, query i of a row at that row's `positions[:, i]`.
        k, v: `[b, kv_heads, s, d]`, key j at position j.
        positions: int32 `[b, t]`.
        scale: multiplies the scores.
        window: how many keys a query sees, itself included; None for all before it.
        valid: bool `[b, t]`, which queries are not padding, None for all; values that only padding
            sees do not count, not even as NaN.
    Returns:
        `[b, h, t, d]` in the dtype of q.
    """
    b, h, t, d = q.shape
    s = k.shape[2]
    v = jnp.where(_seen(positions, valid, s, window)[:, None, :, None], v, jnp.zeros((), v.dtype))
    chunk = _query_chunk(b * h * s, t)
    if chunk == t:
        return _attend(q, k, v, positions=positions, scale=scale, window=window)
    chunks = -(-t // chunk)
    missing = chunks * chunk - t
    queries = jnp.pad(q, ((0, 0), (0, 0), (0, missing), (0, 0))).reshape(b, h, chunks, chunk, d)
    places = jnp.pad(positions, ((0, 0), (0, missing)), mode="edge").reshape(b, chunks, chunk)
    out = lax.map(
        lambda part: _attend(part[0], k, v, positions=part[1], scale=scale, window=window),
        (jnp.moveaxis(queries, 2, 0), jnp.moveaxis(places, 1, 0)),
    )
    return jnp.moveaxis(out, 0, 2).reshape(b, h, chunks * chunk, d)[:, :, :t]


def _seen(positions: jax.Array, valid: jax.Array | None, s: int, window: int | None) -> jax.Array:
    """bool `[b, s]`: the keys that any valid query of the row sees.

    A key that none sees has weight 0, but 0 · NaN is NaN: what padding, or an earlier user of the
    cache, left in v must not be multiplied at all.
    """
    keys = jnp.arange(s)[None]
    last = positions if valid is None else jnp.where(valid, positions, -1)
    seen = keys <= last.max(axis=1)[:, None]
    if window is not None:
        first = positions if valid is None else jnp.where(valid, positions, s)
        seen &= keys > first.min(axis=1)[:, None] - window
    return seen


def _query_chunk(scores_a_query: int, t: int) -> int:
    """How many of t queries run at once: all, or a power of two."""
    most = max(_SCORE_BYTES // (4 * scores_a_query), 1)
    return t if t <= most else 2 ** (most.bit_length() - 1)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    positions: jax.Array,
    scale: float,
    window: int | None,
) -> jax.Array:
    """`attention` of queries whose scores exist all at once."""
    b, h, t, d = q.shape
    kv_heads, s = k.shape[1:3]
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT
    grouped = q.reshape(b, kv_heads, h // kv_heads, t, d)
    scores = jnp.einsum(
        "bkgtd,bksd->bkgts", grouped, k, precision=precision, preferred_element_type=jnp.float32
    )
    key_positions = jnp.arange(s)[None, None, :]
    visible = key_positions <= positions[:, :, None]
    if window is not None:
        visible &= key_positions > positions[:, :, None] - window
    scores = jnp.where(
        visible[:, None, None], scores * jnp.float32(scale), jnp.finfo(jnp.float32).min
    )
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum(
        "bkgts,bksd->bkgtd", weights, v, precision=precision, preferred_element_type=jnp.float32
    )
    return out.reshape(b, h, t, d).astype(q.dtype)
