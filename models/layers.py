"""The modules of a decoder, in Flax NNX: parameter trees whose attributes are called as in the
checkpoint.

A module is built abstract: its weights are `jax.ShapeDtypeStruct`, and the loader puts arrays in
their place. There is one `Linear`: if its weight is an array it multiplies, if it is a `QArray` the
scheme in it says how activations are quantized and which operation runs. What every layer of a
forward pass needs to know about the tokens is in a `Step`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fp8jax import ops
from fp8jax.models.kv_cache import LayerCache
from fp8jax.models.rotary_embedding import rotate
from fp8jax.ops import fused as fused_ops
from fp8jax.ops.fused import silu_mul as silu_mul
from fp8jax.ops.matmul import PartialSums, QActivation
from fp8jax.qarray import QArray

# Queries of long prompts are taken so many at a time that their float32 scores stay below this,
# whatever the batch.
_SCORE_BYTES = 2**27


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Step:
    """One forward pass over `[b, t]` tokens, as its layers see it.

    Args:
        positions: int32 `[b, t]`, each token's place in its row's sequence.
        cos, sin: float32 `[b, t, rotary_dim / 2]`.
        valid: bool `[b, t]`, which tokens are not padding; None for all.
        attends: "fresh" where rows begin at position 0 and attend to the tokens of this pass,
            "cache" where they continue what is in the cache (static).
        implementation: what runs the operations, see `ops` (static).
    """

    positions: jax.Array
    cos: jax.Array
    sin: jax.Array
    valid: jax.Array | None
    attends: Literal["fresh", "cache"] = field(metadata={"static": True})
    implementation: ops.Implementation = field(metadata={"static": True})


class Linear(nnx.Module):
    """y = x @ weight.T + bias; the weight is an array, a `QArray`, or abstract.

    Args:
        shards: (name, rows) of the checkpoint's matrices that are stacked to make this one, in
            order; a layer that is not fused has itself as its only shard.
        k: inputs.
        bias: dtype of a bias, None for no bias.
        dtype: dtype of an unquantized weight and of the outputs.
    """

    def __init__(
        self,
        shards: tuple[tuple[str, int], ...],
        k: int,
        *,
        dtype,
        bias: Literal["yes", "no"] = "no",
    ):
        n = sum(rows for _, rows in shards)
        self.shards = shards
        self.dtype = jnp.dtype(dtype)
        self.weight: Any = nnx.data(jax.ShapeDtypeStruct((n, k), dtype))
        self.bias: Any = nnx.data(jax.ShapeDtypeStruct((n,), dtype) if bias == "yes" else None)

    def __call__(self, x: jax.Array | QActivation, step: Step) -> jax.Array:
        """`[b, t, k]`, or its rows quantized as the weight wants them, to `[b, t, n]`."""
        y = self.in_parts(x, step)
        return y.total() if isinstance(y, PartialSums) else y

    def in_parts(self, x: jax.Array | QActivation, step: Step) -> jax.Array | PartialSums:
        """The same for an operation that adds up the pieces of a split product itself."""
        if not isinstance(self.weight, QArray):
            assert not isinstance(x, QActivation), (
                "activations are quantized for quantized weights only"
            )
            return ops.float_matmul(x, self.weight, bias=self.bias)
        leading = step.positions.shape if isinstance(x, QActivation) else x.shape[:-1]
        y = ops.scaled_matmul_in_parts(
            x if isinstance(x, QActivation) else x.reshape(-1, x.shape[-1]),
            self.weight,
            bias=self.bias,
            out_dtype=self.dtype,
            valid=None if step.valid is None else step.valid.reshape(-1),
            implementation=step.implementation,
        )
        if isinstance(y, PartialSums):
            return PartialSums(y.parts.reshape(-1, *leading, y.parts.shape[-1]), y.dtype)
        return y.reshape(*leading, -1)


class Embedding(nnx.Module):
    """A table of token vectors, `[vocab, hidden]`."""

    def __init__(self, vocab: int, hidden: int, *, dtype):
        self.weight: Any = nnx.data(jax.ShapeDtypeStruct((vocab, hidden), dtype))

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        return self.weight[token_ids]


class RMSNorm(nnx.Module):
    """x / rms(x) Â· weight."""

    def __init__(self, size: int, *, epsilon: float, dtype):
        self.epsilon = epsilon
        self.weight: Any = nnx.data(jax.ShapeDtypeStruct((size,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return fused_ops.rms_norm(x, self.weight, epsilon=self.epsilon)

    def after_adding(
        self,
        stream: jax.Array,
        added: jax.Array | PartialSums | None,
        step: Step,
        *,
        multiplier: float,
        reader: Any,
        keep: Literal["codes", "codes and rows"] = "codes",
    ) -> tuple[jax.Array | QActivation, jax.Array]:
        """The residual stream plus multiplier Â· added, normalised for the weight that reads it; and
        that new stream."""
        return fused_ops.add_rms_norm(
            stream,
            added,
            self.weight,
            epsilon=self.epsilon,
            multiplier=multiplier,
            reader=reader,
            keep=keep,
            implementation=step.implementation,
        )


class Attention(nnx.Module):
    """Grouped-query attention: query head j reads key-value head j // (h / kv_heads).

    Args:
        config: a `DecoderConfig`.
        window: how many keys a query sees, itself included; None for all before it.
    """

    def __init__(self, config, *, window: int | None):
        c, dtype = config, config.dtype
        if c.rope.rotary_dim % 2 or not 0 < c.rope.rotary_dim <= c.head_dim:
            raise ValueError(
                f"head_dim is {c.head_dim}, of which {c.rope.rotary_dim} channels turn: rotary "
                "embedding turns channels in pairs, so their number is even and at most head_dim"
            )
        self.num_heads, self.num_kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.head_dim
        self.scale, self.window, self.clip_qkv = c.attention_scale, window, c.clip_qkv
        self.qk_norm = c.qk_norm
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        shards = (("q_proj", q), ("k_proj", kv), ("v_proj", kv))
        self.qkv_proj = Linear(shards, c.hidden_size, dtype=dtype, bias=c.qkv_bias)
        self.o_proj = Linear((("o_proj", c.hidden_size),), q, dtype=dtype, bias=c.o_bias)
        if c.qk_norm != "none":
            widths = (c.head_dim, c.head_dim) if c.qk_norm == "head" else (q, kv)
            self.q_norm, self.k_norm = (
                RMSNorm(width, epsilon=c.rms_norm_eps, dtype=dtype) for width in widths
            )

    def __call__(
        self, x: jax.Array | QActivation, step: Step, cache: LayerCache | None
    ) -> tuple[jax.Array | PartialSums, LayerCache | None]:
        b, t = step.positions.shape
        if (
            cache is not None
            and step.attends == "cache"
            and t == 1
            and self._decodes_in_kernels(step, cache)
        ):
            return self._decode(x, step, cache)
        widths = [self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim]
        q, k, v = jnp.split(self.qkv_proj(x, step), [widths[0], sum(widths)], axis=-1)
        if self.qk_norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip_qkv is not None:
            q, k, v = (jnp.clip(part, -self.clip_qkv, self.clip_qkv) for part in (q, k, v))
        q, k, v = (part.reshape(b, t, -1, self.head_dim) for part in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, step.cos, step.sin), rotate(k, step.cos, step.sin)
        q, k, v = (part.swapaxes(1, 2) for part in (q, k, v))  # [b, heads, t, d]

        if cache is not None:
            cache = (
                cache.write_prompt(k, v)
                if step.attends == "fresh"
                else cache.write_at(step.positions, k, v)
            )
        if cache is not None and step.attends == "cache":
            k, v = cache.key, cache.value
        out = attention(
            q,
            k,
            v,
            positions=step.positions,
            scale=self.scale,
            window=self.window,
            valid=step.valid,
        )
        return self.o_proj.in_parts(out.swapaxes(1, 2).reshape(b, t, -1), step), cache

    def _decodes_in_kernels(self, step: Step, cache: LayerCache) -> bool:
        return self.qk_norm != "whole" and fused_ops.decodes_in_kernels(
            self.num_heads, cache.key, self.o_proj.dtype, step.implementation
        )

    def _decode(
        self, x: jax.Array | QActivation, step: Step, cache: LayerCache
    ) -> tuple[jax.Array | PartialSums, LayerCache]:
        """The same for one token a row, in three kernels between the two products."""
        normalises, positions = self.qk_norm == "head", step.positions[:, 0]
        q, *written = fused_ops.rope_and_write(
            self.qkv_proj.in_parts(x, step),
            step.cos[:, 0],
            step.sin[:, 0],
            cache.key,
            cache.value,
            positions,
            q_norm=self.q_norm.weight if normalises else None,
            k_norm=self.k_norm.weight if normalises else None,
            epsilon=self.q_norm.epsilon if normalises else 0.0,
            clip=self.clip_qkv,
        )
        cache = LayerCache(*written)
        out = fused_ops.decode_attention(
            q,
            cache.key,
            cache.value,
            positions + 1,
            scale=self.scale,
            window=self.window,
            reader=self.o_proj.weight,
        )
        return self.o_proj.in_parts(out, step), cache


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

    A key that none sees has weight 0, but 0 Â· NaN is NaN: what padding, or an earlier user of the
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
    precision = ops.precision_of(q.dtype)
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


class MLP(nnx.Module):
    """down(act(gate(x)) Â· up(x)), gate and up as one matrix."""

    def __init__(self, config, *, intermediate_size: int):
        c = config
        shards = (("gate_proj", intermediate_size), ("up_proj", intermediate_size))
        self.gate_up_proj = Linear(shards, c.hidden_size, dtype=c.dtype, bias=c.mlp_bias)
        self.down_proj = Linear(
            (("down_proj", c.hidden_size),), intermediate_size, dtype=c.dtype, bias=c.mlp_bias
        )

    def __call__(self, x: jax.Array | QActivation, step: Step) -> jax.Array | PartialSums:
        gate_up = self.gate_up_proj.in_parts(x, step)
        y = fused_ops.silu_mul_for(
            self.down_proj.weight, gate_up, implementation=step.implementation
        )
        return self.down_proj.in_parts(y, step)
