"""One parametric decoder for every family: numbers in, logits out.

    x = embed(tokens) · embedding_multiplier
    for each layer:  x += residual_multiplier · attention(norm(x))
                     x += residual_multiplier · mlp(norm(x))          or experts (`SparseMoE`)
    logits = lm_head(norm(x)) / logits_divisor

A family is a `DecoderConfig` made from its config.json (see `llama.py`); the forward pass below is
the same for all. Attributes are called as in the checkpoint, so that
`model.layers.0.self_attn.o_proj` is both a tensor's name and a path through the module. Layers are
unrolled: scanning over stacked weights would make XLA copy each weight before each kernel.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fp8jax.explicit_sharding import with_automatic_axes
from fp8jax.models.attention import Attention
from fp8jax.models.config import DecoderConfig
from fp8jax.models.kv_cache import KVCache, LayerCache, empty_cache
from fp8jax.models.layers import MLP, Embedding, Linear, Module, RMSNorm, Step, name_modules, scoped
from fp8jax.models.moe import SparseMoE
from fp8jax.models.rotary_embedding import cos_sin
from fp8jax.ops.choice import Implementation, choose
from fp8jax.ops.decisions import scope
from fp8jax.ops.matmul import product
from fp8jax.ops.values import Reads, Stream, Summed
from fp8jax.pallas_kernels.rms_norm_quantize import times


class DecoderLayer(Module):
    """Attention, then an MLP or experts, each on a normalised copy of the residual stream."""

    def __init__(self, config: DecoderConfig, index: int):
        self.norms = config.norms
        for name in dataclasses.astuple(config.norms):
            if name is not None:
                norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=config.dtype)
                setattr(self, name, norm)
        self.residual_multiplier = config.residual_multiplier
        self.self_attn = Attention(config, window=config.window(index))
        self.mlp = SparseMoE(config) if config.has_experts(index) else MLP(config)

    @scoped
    def __call__(
        self, stream: Stream, step: Step, cache: LayerCache | None
    ) -> tuple[Stream, LayerCache | None]:
        norms, by = self.norms, self.residual_multiplier
        x, stream = self._norm(norms.before_attention).settle(stream, step, self.self_attn.reads)
        attended, cache = self.self_attn(x, step, cache)
        stream = stream.add(self._after(norms.after_attention, attended), multiplier=by)
        x, stream = self._norm(norms.before_mlp).settle(stream, step, self.mlp.reads)
        stream = stream.add(self._after(norms.after_mlp, self.mlp(x, step)), multiplier=by)
        return stream, cache

    def _norm(self, name: str) -> RMSNorm:
        return getattr(self, name)

    def _after(self, name: str | None, x: Summed) -> Summed:
        return x if name is None else self._norm(name)(x)


class Decoder(Module):
    """Embedding, layers and the final norm: tokens to hidden states."""

    def __init__(self, config: DecoderConfig):
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=config.dtype)
        # A plain list, not nnx.List: that one mixes numbers and words as keys of one node, which
        # Orbax cannot sort.
        self.layers = nnx.data([DecoderLayer(config, index) for index in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=config.dtype)

    @scoped
    def __call__(
        self, token_ids: jax.Array, step: Step, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache | None]:
        stream = Stream(times(self.embed_tokens(token_ids), self.config.embedding_multiplier))
        caches = []
        for index, layer in enumerate(self.layers):
            stream, layer_cache = layer(stream, step, None if cache is None else cache[index])
            caches.append(layer_cache)
        hidden, _ = self.norm.settle(stream, step, Reads())
        assert isinstance(hidden, jax.Array)
        return hidden, None if cache is None else tuple(caches)


class CausalLM(Module):
    """A decoder and its output head. Any `jax.jit` function takes it as an argument: it is a plain
    pytree.

    Args:
        config: the architecture. Weights are abstract (`jax.ShapeDtypeStruct`) until `loading`
            fills them in.
        implementation: what runs the operations, see `ops`.
    """

    def __init__(self, config: DecoderConfig, *, implementation: Implementation = "auto"):
        self.config = config
        self.implementation: Implementation = implementation
        self.model = Decoder(config)
        head = (("lm_head", config.vocab_size),)
        self.lm_head = nnx.data(
            None if config.tied else Linear(head, config.hidden_size, dtype=config.dtype)
        )
        name_modules(self)

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
            continues=start is not None,
            choice=choose(self.implementation),
        )
        return self.model(token_ids, step, cache)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits of hidden states `[..., hidden]`: float32 `[..., vocab]`."""
        weight = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return with_automatic_axes(self._logits, weight, hidden, weight)

    def _logits(self, hidden: jax.Array, weight: jax.Array) -> jax.Array:
        with scope("lm_head"):
            logits = product(hidden, weight)
            if self.config.logits_divisor != 1:
                logits = logits / jnp.float32(self.config.logits_divisor)
            return logits

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
