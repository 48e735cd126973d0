"""Generation over arrays: prefill, one decode step, and the whole loop, each a pure function to put under `jax.jit`.

Rows of a batch are padded on the right. A row's token at position p sits at index p of the cache, whatever its
neighbours do; padding behind a row's end is masked, and overwritten as the row grows. `LanguageModel` builds prompts,
buckets and text around these functions; RL and
evaluation loops call them directly:

    cache = model.empty_cache(batch, length)
    logits, cache = jax.jit(prefill, donate_argnums=1)(model, cache, token_ids, lengths)
    logits, cache = jax.jit(decode_step, donate_argnums=1)(model, cache, next_tokens, lengths)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.kv_cache import KVCache
from fp8jax.models import CausalLM
from fp8jax.sampling import Sampling, sample


def prefill(model: CausalLM, cache: KVCache, token_ids: jax.Array, lengths: jax.Array) -> tuple[jax.Array, KVCache]:
    """Read the prompts and give the logits of each one's last token.

    Args:
        model: the model.
        cache: an empty cache for b rows.
        token_ids: int `[b, t]`, padded on the right with any valid token.
        lengths: int32 `[b]`, how many of them count; at least 1.
    Returns:
        float32 `[b, vocab]`, and the cache with the prompts in it.
    """
    valid = jnp.arange(token_ids.shape[1])[None] < lengths[:, None]
    hidden, cache = model.hidden_states(token_ids, cache=cache, valid=valid)  # pyright: ignore[reportAssignmentType]
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None].astype(jnp.int32), axis=1)[:, 0]
    return model.logits(last), cache


def decode_step(
    model: CausalLM,
    cache: KVCache,
    tokens: jax.Array,
    positions: jax.Array,
    active: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """Read one more token a row and give the logits of what comes next.

    Args:
        model: the model.
        cache: what came before.
        tokens: int `[b]`.
        positions: int32 `[b]`, each token's position: the number of tokens its row has in the cache.
        active: bool `[b]`, which rows still count; only per-tensor activations look at it. None for all.
    Returns:
        float32 `[b, vocab]`, and the cache with the tokens in it.
    """
    valid = None if active is None else active[:, None]
    hidden, cache = model.hidden_states(  # pyright: ignore[reportAssignmentType]
        tokens[:, None], cache=cache, start=positions, valid=valid
    )
    return model.logits(hidden[:, 0]), cache


class Generated(NamedTuple):
    """What came out, padded on the right.

    token_ids int32 `[b, n]`, logprobs float32 `[b, n]`, counts int32 `[b]`: how many of the row's tokens count, an end
    token included.
    """

    token_ids: jax.Array
    logprobs: jax.Array
    counts: jax.Array


def generate(
    model: CausalLM,
    token_ids: jax.Array,
    lengths: jax.Array,
    sampling: Sampling,
    eos_token_ids: jax.Array,
    max_new_tokens: jax.Array,
    *,
    capacity: int,
    cache_length: int,
) -> Generated:
    """Prompts in, new tokens out, the whole loop on the device.

    Args:
        model: the model.
        token_ids: int `[b, t]`, padded on the right.
        lengths: int32 `[b]`.
        sampling: the rows' rules.
        eos_token_ids: int32 `[e]`, tokens that end a row; −1 matches none.
        max_new_tokens: int32 scalar, at most `capacity`. It is traced: a new value does not compile anew.
        capacity: width of the outputs (static).
        cache_length: room in the cache, at least the longest prompt plus max_new_tokens (static).
    """
    batch = token_ids.shape[0]
    logits, cache = prefill(model, model.empty_cache(batch, cache_length), token_ids, lengths)

    def choose(state_logits: jax.Array, step: jax.Array, active: jax.Array, out: Generated):
        tokens, logprobs = sample(state_logits, sampling, step)
        out = Generated(
            out.token_ids.at[:, step].set(jnp.where(active, tokens, 0)),
            out.logprobs.at[:, step].set(jnp.where(active, logprobs, 0)),
            out.counts + active.astype(jnp.int32),
        )
        return tokens, active & ~is_end(tokens, eos_token_ids), out

    def more(state) -> jax.Array:
        step, _, active, _, _ = state
        return (step < max_new_tokens) & active.any()

    def advance(state):
        step, tokens, active, out, cache = state
        logits, cache = decode_step(model, cache, tokens, lengths + step - 1, active)
        tokens, active, out = choose(logits, step, active, out)
        return step + 1, tokens, active, out, cache

    empty = Generated(
        jnp.zeros((batch, capacity), jnp.int32), jnp.zeros((batch, capacity), jnp.float32), jnp.zeros(batch, jnp.int32)
    )
    first, active, out = choose(logits, jnp.int32(0), jnp.ones(batch, bool), empty)
    return lax.while_loop(more, advance, (jnp.int32(1), first, active, out, cache))[3]


def is_end(tokens: jax.Array, eos_token_ids: jax.Array) -> jax.Array:
    """Which tokens `[b]` are among the end tokens `[e]`."""
    return (tokens[:, None] == eos_token_ids[None]).any(axis=1)


def bucket(length: int, limit: int) -> int:
    """The padded length for `length` tokens: powers of two and their halves-between, so that new lengths rarely
    compile.

    16, 24, 32, 48, 64, 96, 128, … but never more than `limit`, the model's context.
    """
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return min(size, limit)
