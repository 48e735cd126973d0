"""Grouped-query attention: query head j reads key-value head j // (h / kv_heads).

    q, k, v = split(x @ qkv_proj.T)          in some families normalised (q, k) and clipped
    q, k turned by their positions; k, v into the cache
    out = softmax(scale · q @ k.T, over the keys that a query sees) @ v
    out @ o_proj.T

One token a row over a cache runs in three kernels between the two products, where there are some.
"""

import jax
import jax.numpy as jnp

from fp8jax.models.config import DecoderConfig
from fp8jax.models.kv_cache import LayerCache
from fp8jax.models.layers import Linear, Module, RMSNorm, Step, scoped
from fp8jax.ops import attention as ops
from fp8jax.ops.values import QActivation, Reads, Summed, total


class Attention(Module):
    """The attention block of a layer.

    Args:
        window: how many keys a query sees, itself included; None for all before it.
    """

    def __init__(self, config: DecoderConfig, *, window: int | None):
        c = config
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
        self.qkv_proj = Linear(shards, c.hidden_size, dtype=c.dtype, bias=c.qkv_bias)
        self.o_proj = Linear((("o_proj", c.hidden_size),), q, dtype=c.dtype, bias=c.o_bias)
        if c.qk_norm != "none":
            widths = (c.head_dim, c.head_dim) if c.qk_norm == "head" else (q, kv)
            self.q_norm, self.k_norm = (
                RMSNorm(width, epsilon=c.rms_norm_eps, dtype=c.dtype) for width in widths
            )

    @property
    def reads(self) -> Reads:
        return Reads(self.qkv_proj.quantizes)

    @scoped
    def __call__(
        self, x: jax.Array | QActivation, step: Step, cache: LayerCache | None
    ) -> tuple[Summed, LayerCache | None]:
        """`[b, t, hidden]`, or its rows quantized as `reads` says, to `[b, t, hidden]`."""
        qkv = self.qkv_proj(x, step)
        if cache is not None and self._decodes_in_kernels(step, cache):
            out, cache = self._decode(qkv, step, cache)
        else:
            out, cache = self._attend(total(qkv), step, cache)
        return self.o_proj(out, step), cache

    def _attend(
        self, qkv: jax.Array, step: Step, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        b, t = step.positions.shape
        widths = [self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim]
        q, k, v = jnp.split(qkv, [widths[0], sum(widths)], axis=-1)
        if self.qk_norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip_qkv is not None:
            q, k, v = (jnp.clip(part, -self.clip_qkv, self.clip_qkv) for part in (q, k, v))
        q, k, v = (part.reshape(b, t, -1, self.head_dim) for part in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = ops.rotate(q, step.cos, step.sin), ops.rotate(k, step.cos, step.sin)
        q, k, v = (part.swapaxes(1, 2) for part in (q, k, v))  # [b, heads, t, d]

        if cache is not None and step.continues:
            cache = cache.write_at(step.positions, k, v)
            k, v = cache.key, cache.value
        elif cache is not None:
            cache = cache.write_prompt(k, v)
        out = ops.attention(
            q,
            k,
            v,
            positions=step.positions,
            scale=self.scale,
            window=self.window,
            valid=step.valid,
        )
        return out.swapaxes(1, 2).reshape(b, t, -1), cache

    def _decodes_in_kernels(self, step: Step, cache: LayerCache) -> bool:
        one_token = step.continues and step.positions.shape[1] == 1
        # A norm over all heads at once is none of the kernel's.
        return (
            one_token
            and self.qk_norm != "whole"
            and ops.decodes_in_kernels(self.num_heads, cache.key, self.o_proj.dtype, step.choice)
        )

    def _decode(
        self, qkv: Summed, step: Step, cache: LayerCache
    ) -> tuple[jax.Array | QActivation, LayerCache]:
        normalises, positions = self.qk_norm == "head", step.positions[:, 0]
        q, *written = ops.rope_and_write(
            qkv,
            step.cos[:, 0],
            step.sin[:, 0],
            cache.key,
            cache.value,
            positions,
            q_norm=self.q_norm.weight if normalises else None,
            k_norm=self.k_norm.weight if normalises else None,
            epsilon=self.q_norm.epsilon if normalises else 0.0,
            clip=self.clip_qkv,
            implementation=step.choice,
        )
        cache = LayerCache(*written)
        out = ops.decode_attention(
            q,
            cache.key,
            cache.value,
            positions + 1,
            scale=self.scale,
            window=self.window,
            quantized=self.o_proj.quantizes,
            implementation=step.choice,
        )
        return out, cache
