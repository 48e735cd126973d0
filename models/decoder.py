"""One parametric decoder for every family: numbers in, logits out.

    x = embed(tokens) Â· embedding_multiplier
    for each layer:  x += residual_multiplier Â· attention(norm(x));   x += residual_multiplier Â· mlp(norm(x))
                     (an MLP, or in mixtures of experts a `SparseMoE` in its place)
    logits = lm_head(norm(x)) / logits_divisor

A family is a `DecoderConfig` made from its config.json (see `llama.py`); the forward pass below is
the same for all. Attributes are called as in the checkpoint, so that
`model.layers.0.self_attn.o_proj` is both a tensor's name and a path through the module. Layers are
unrolled: scanning over stacked weights would make XLA copy each weight before each kernel.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fp8jax import ops
from fp8jax.explicit_sharding import with_automatic_axes
from fp8jax.models.kv_cache import KVCache, LayerCache, empty_cache
from fp8jax.models.layers import MLP, Attention, Embedding, Linear, RMSNorm, Step
from fp8jax.models.moe import MoEConfig, SparseMoE
from fp8jax.models.rotary_embedding import Rope, cos_sin
from fp8jax.ops.fused import times
from fp8jax.ops.matmul import PartialSums, QActivation


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The architecture of a decoder, in numbers.

    Args:
        attention_scale: multiplies the scores; head_dim ** -0.5 in most families.
        qk_norm: RMSNorm of q and k over each head or over the whole projection, before rope.
        clip_qkv: q, k and v are clipped to ± this.
        windows: a layer's attention window, itself included, None for all; one entry a layer.
        moe: experts and router of the layers that have them; None for a dense model.
        tied: lm_head is the embedding table.
        dtype: of activations and unquantized weights.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: Rope
    rms_norm_eps: float
    attention_scale: float
    qkv_bias: Literal["yes", "no"] = "no"
    o_bias: Literal["yes", "no"] = "no"
    mlp_bias: Literal["yes", "no"] = "no"
    qk_norm: Literal["none", "head", "whole"] = "none"
    clip_qkv: float | None = None
    windows: tuple[int | None, ...] = ()
    moe: MoEConfig | None = None
    tied: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    dtype: str = "bfloat16"

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def has_experts(self, layer: int) -> bool:
        return self.moe is not None and layer not in self.moe.dense_layers


class DecoderLayer(nnx.Module):
    """Attention, then MLP, each on a normalised copy of the residual stream.

    What a part gives is added to the stream by the norm that comes next, which reads both anyway;
    so the output of a layer's MLP is handed on beside the stream.
    """

    def __init__(self, config: DecoderConfig, index: int):
        def norm():
            return RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=config.dtype)

        self.residual_multiplier = config.residual_multiplier
        self.input_layernorm = norm()
        self.self_attn = Attention(config, window=config.window(index))
        self.post_attention_layernorm = norm()
        self.mlp = (
            SparseMoE(config)
            if config.has_experts(index)
            else MLP(config, intermediate_size=config.intermediate_size)
        )

    def __call__(
        self,
        x: jax.Array,
        added: jax.Array | PartialSums | None,
        step: Step,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, jax.Array | PartialSums, LayerCache | None]:
        """Stream and what is to be added to it -> the same after this layer, and the layer's
        cache."""
        multiplier, attention, mlp = self.residual_multiplier, self.self_attn, self.mlp
        y, x = self.input_layernorm.after_adding(
            x, added, step, multiplier=multiplier, reader=attention.qkv_proj.weight
        )
        attended, cache = attention(y, step, cache)
        sparse = isinstance(mlp, SparseMoE)
        y, x = self.post_attention_layernorm.after_adding(
            x,
            attended,
            step,
            multiplier=multiplier,
            reader=mlp.experts.gate_up_proj if sparse else mlp.gate_up_proj.weight,
            keep="codes and rows"
            if sparse
            else "codes",  # a router reads what the experts read quantized
        )
        return x, mlp(y, step), cache


class Decoder(nnx.Module):
    """Embedding, layers and the final norm: tokens to hidden states."""

    def __init__(self, config: DecoderConfig):
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=config.dtype)
        # A plain list, not nnx.List: that one mixes numbers and words as keys of one node, which
        # Orbax cannot sort.
        self.layers = nnx.data([DecoderLayer(config, index) for index in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=config.dtype)

    def __call__(
        self, token_ids: jax.Array, step: Step, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache | None]:
        x = times(self.embed_tokens(token_ids), self.config.embedding_multiplier)
        added, caches = None, []
        for index, layer in enumerate(self.layers):
            x, added, layer_cache = layer(x, added, step, None if cache is None else cache[index])
            caches.append(layer_cache)
        y, _ = self.norm.after_adding(
            x, added, step, multiplier=self.config.residual_multiplier, reader=None
        )
        assert not isinstance(y, QActivation)
        return y, None if cache is None else tuple(caches)


class CausalLM(nnx.Module):
    """A decoder and its output head. Any `jax.jit` function takes it as an argument: it is a plain
    pytree.

    Args:
        config: the architecture. Weights are abstract (`jax.ShapeDtypeStruct`) until `loading`
            fills them in.
        implementation: what runs the operations, see `ops`.
    """

    def __init__(self, config: DecoderConfig, *, implementation: ops.Implementation = "auto"):
        self.config = config
        self.implementation: ops.Implementation = implementation
        self.model = Decoder(config)
        self.lm_head = nnx.data(
            None
            if config.tied
            else Linear((("lm_head", config.vocab_size),), config.hidden_size, dtype=config.dtype)
        )

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        """Logits of every position, causal, without a cache.

        Args:
            token_ids: int `[b, t]`.
        Returns:
            float32 `[b, t, vocab]`.
        """
        hidden, _ = self.hidden_states(token_ids)
        return self.logits(hidden)

    def hidden_states(
        self,
        token_ids: jax.Array,
        *,
        cache: KVCache | None = None,
        start: jax.Array | None = None,
        valid: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Hidden states after the final norm, and the cache with these tokens written to it.

        Args:
            token_ids: int `[b, t]`.
            cache: where keys and values go; None for none.
            start: int32 `[b]`, position of each row's first token here, its predecessors being in
                the cache; None for rows that begin here.
            valid: bool `[b, t]`, which tokens are not padding; padding comes last in a row.
        Returns:
            `[b, t, hidden]` in the config's dtype, and the cache.
        Raises:
            ValueError: `start` without a cache, a cache that is not this model's or batch's or is
                shorter than the tokens, more tokens than the context.
        """
        if start is not None and cache is None:
            raise ValueError(
                "hidden_states: rows that continue (start=…) need the cache that holds what they "
                "continue"
            )
        if token_ids.ndim != 2 or not jnp.issubdtype(token_ids.dtype, jnp.integer):
            raise ValueError(
                f"token ids are {token_ids.dtype}{list(token_ids.shape)}, expected int [b, t]"
            )
        b, t = token_ids.shape
        if t > self.config.max_position_embeddings:
            raise ValueError(
                f"{t} tokens are more than the model's context of "
                f"{self.config.max_position_embeddings} (max_position_embeddings, or what else "
                "config.json says of it)"
            )
        if cache is not None:
            self._check_cache(cache, b, t)
        return with_automatic_axes(
            _hidden_states, self.model.embed_tokens.weight, self, token_ids, cache, start, valid
        )

    def _hidden_states(self, token_ids, cache, start, valid) -> tuple[jax.Array, KVCache | None]:
        b, t = token_ids.shape
        positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
        if start is not None:
            positions = positions + start[:, None].astype(jnp.int32)
        cos, sin = cos_sin(self.config.rope, positions)
        step = Step(
            positions=positions,
            cos=cos,
            sin=sin,
            valid=valid,
            attends="fresh" if start is None else "cache",
            implementation=self.implementation,
        )
        return self.model(token_ids, step, cache)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits of hidden states `[..., hidden]`: float32 `[..., vocab]`."""
        weight = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return with_automatic_axes(self._logits, weight, hidden, weight)

    def _logits(self, hidden: jax.Array, weight: jax.Array) -> jax.Array:
        logits = ops.product(hidden, weight)
        return (
            logits / jnp.float32(self.config.logits_divisor)
            if self.config.logits_divisor != 1
            else logits
        )

    def empty_cache(self, batch: int, length: int) -> KVCache:
        """A cache for `batch` rows of up to `length` tokens."""
        c = self.config
        for name, value in (("batch", batch), ("length", length)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(
                    f"empty_cache: {name} is {value!r}, expected a whole number of at least 1"
                )
        return empty_cache(
            layers=c.num_layers,
            batch=batch,
            kv_heads=c.num_kv_heads,
            length=length,
            head_dim=c.head_dim,
            dtype=c.dtype,
        )

    def _check_cache(self, cache: KVCache, batch: int, tokens: int) -> None:
        c = self.config
        if len(cache) != c.num_layers:
            raise ValueError(
                f"the cache is of {len(cache)} layers, the model of {c.num_layers}; see empty_cache"
            )
        for index, layer in enumerate(cache):
            for side in (layer.key, layer.value):
                length = side.shape[2] if side.ndim == 4 else 0
                if side.shape != (batch, c.num_kv_heads, length, c.head_dim):
                    raise ValueError(
                        f"layer {index} of the cache is {list(side.shape)}, expected [{batch}, "
                        f"{c.num_kv_heads}, length, {c.head_dim}] for {batch} rows; see empty_cache"
                    )
                if length < tokens:
                    raise ValueError(
                        f"the cache has room for {length} tokens a row, fewer than the {tokens} "
                        "given"
                    )


def _hidden_states(
    model: CausalLM, token_ids, cache, start, valid
) -> tuple[jax.Array, KVCache | None]:
    return model._hidden_states(token_ids, cache, start, valid)
