"""Generation over arrays: prefill, one decode step, and the whole loop, each a pure function to put
under `jax.jit`.

Rows of a batch are padded on the right. A row's token at position p sits at index p of the cache,
whatever its neighbours do; padding behind a row's end is masked, and overwritten as the row grows.
A row of length 0 is unused: it fills a batch up to a shape that is compiled already, and nothing of
it counts. `LanguageModel` builds prompts, buckets and text around these functions; RL and
evaluation loops call them directly:

    cache = model.empty_cache(batch, length)
    logits, cache = jax.jit(prefill, donate_argnums=1)(model, cache, token_ids, lengths)
    logits, cache = jax.jit(decode_step, donate_argnums=1)(model, cache, next_tokens, lengths)

The loop is two functions: `begin` reads the prompts and chooses each row's first token, `advance`
goes on up to a given number of tokens. `generate` is one after the other in one program. Whoever
wants to look in between (to be interrupted, to show how far it is) calls `advance` in portions
instead and gets the same tokens.

Sizes are checked while tracing. What is only known on the device cannot raise there and has a
defined result: a row ends where the cache or the outputs are full, and where the model's logits are
not finite.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from fp8jax.explicit_sharding import on_mesh_of
from fp8jax.models import CausalLM
from fp8jax.models.kv_cache import KVCache
from fp8jax.sampling import Sampling, sample


def prefill(
    model: CausalLM, cache: KVCache, token_ids: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, KVCache]:
    """Read the prompts and give the logits of each one's last token.

    Args:
        model: the model.
        cache: an empty cache for b rows of at least t tokens.
        token_ids: int `[b, t]`, padded on the right with any valid token.
        lengths: int32 `[b]`, how many of them count; 0 for a row that is not used, whose logits
            mean nothing.
    Returns:
        float32 `[b, vocab]`, and the cache with the prompts in it.
    Raises:
        ValueError: shapes or dtypes that do not fit together, more tokens than the cache or the
            context holds; lengths outside 0 … t where they are known (not traced).
    """
    _expect("prefill", "token_ids", token_ids, (None, None), "int")
    batch, t = token_ids.shape
    _expect("prefill", "lengths", lengths, (batch,), "int")
    _expect_between("prefill", "lengths", lengths, 0, t)
    lengths = jnp.asarray(lengths, jnp.int32)
    valid = jnp.arange(t)[None] < lengths[:, None]
    hidden, cache = model.hidden_states(  # pyright: ignore[reportAssignmentType]
        token_ids, cache=cache, valid=valid
    )
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
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
        positions: int32 `[b]`, each token's position: the number of tokens its row has in the
            cache. A position at or behind the cache's end is an error where it is known; where it
            is traced, the token's key and value are dropped and the row's logits mean nothing: give
            the cache room for every step.
        active: bool `[b]`, which rows still count: experts and per-tensor activations leave out the
            others. None for all.
    Returns:
        float32 `[b, vocab]`, and the cache with the tokens in it.
    Raises:
        ValueError: shapes or dtypes that do not fit together; positions outside the cache where
            they are known.
    """
    _expect("decode_step", "tokens", tokens, (None,), "int")
    batch = tokens.shape[0]
    _expect("decode_step", "positions", positions, (batch,), "int")
    if active is not None:
        _expect("decode_step", "active", active, (batch,), "bool")
        active = jnp.asarray(active)
    if cache:
        _expect_between("decode_step", "positions", positions, 0, cache[0].key.shape[2] - 1)
    tokens, positions = jnp.asarray(tokens), jnp.asarray(positions)
    hidden, cache = model.hidden_states(  # pyright: ignore[reportAssignmentType]
        tokens[:, None],
        cache=cache,
        start=positions,
        valid=None if active is None else active[:, None],
    )
    return model.logits(hidden[:, 0]), cache


class Generated(NamedTuple):
    """What came out, padded on the right.

    token_ids int32 `[b, n]`, logprobs float32 `[b, n]`, counts int32 `[b]`: how many of the row's
    tokens count, an end token included. A last log-probability that is not finite says that the
    model's logits were not, and that the token beside it means nothing.
    """

    token_ids: jax.Array
    logprobs: jax.Array
    counts: jax.Array


class Decoding(NamedTuple):
    """A batch between two tokens.

    step int32 scalar: tokens chosen so far. tokens int32 `[b]`: the last ones, not in the cache
    yet. lengths int32 `[b]`: of the prompts. active bool `[b]`: rows that go on.
    """

    step: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    active: jax.Array
    out: Generated
    cache: KVCache


def begin(
    model: CausalLM,
    token_ids: jax.Array,
    lengths: jax.Array,
    sampling: Sampling,
    eos_token_ids: jax.Array,
    *,
    capacity: int,
    cache_length: int,
) -> Decoding:
    """Read the prompts and choose each row's first token; arguments as for `generate`."""
    _expect("generate", "token_ids", token_ids, (None, None), "int")
    batch, t = token_ids.shape
    _expect("generate", "eos_token_ids", eos_token_ids, (None,), "int")
    if capacity < 1:
        raise ValueError(
            f"generate: capacity is {capacity}, expected room for at least one new token"
        )
    if not t <= cache_length <= model.config.max_position_embeddings:
        raise ValueError(
            f"generate: cache_length is {cache_length}; it must hold the padded prompts of {t} "
            "tokens and what is generated, and be at most the model's context of "
            f"{model.config.max_position_embeddings}"
        )
    lengths = jnp.asarray(lengths)
    logits, cache = prefill(model, model.empty_cache(batch, cache_length), token_ids, lengths)
    out = Generated(
        jnp.zeros((batch, capacity), jnp.int32),
        jnp.zeros((batch, capacity), jnp.float32),
        jnp.zeros(batch, jnp.int32),
    )
    start = Decoding(
        step=jnp.int32(0),
        tokens=jnp.zeros(batch, jnp.int32),
        lengths=lengths.astype(jnp.int32),
        active=lengths > 0,
        out=out,
        cache=cache,
    )
    return _choose(start, logits, cache, sampling, eos_token_ids)


def advance(
    model: CausalLM,
    decoding: Decoding,
    sampling: Sampling,
    eos_token_ids: jax.Array,
    until: jax.Array,
) -> Decoding:
    """Go on until every row has `until` tokens (int32 scalar, traced) or has ended."""
    limit = jnp.minimum(jnp.asarray(until, jnp.int32), decoding.out.token_ids.shape[1])

    def more(state: Decoding) -> jax.Array:
        return (state.step < limit) & state.active.any()

    def next_token(state: Decoding) -> Decoding:
        positions = jnp.maximum(state.lengths + state.step - 1, 0)
        active = state.active & (positions < state.cache[0].key.shape[2])
        logits, cache = decode_step(model, state.cache, state.tokens, positions, active)
        return _choose(state._replace(active=active), logits, cache, sampling, eos_token_ids)

    return lax.while_loop(more, next_token, decoding)


def _choose(
    state: Decoding, logits: jax.Array, cache: KVCache, sampling: Sampling, eos_token_ids: jax.Array
) -> Decoding:
    """One more token a row."""
    tokens, logprobs = sample(logits, sampling, state.step)
    active, out = state.active, state.out
    out = Generated(
        out.token_ids.at[:, state.step].set(jnp.where(active, tokens, 0)),
        out.logprobs.at[:, state.step].set(jnp.where(active, logprobs, 0)),
        out.counts + active.astype(jnp.int32),
    )
    # NaN logits never become numbers again: the row ends, and its last log-probability says why.
    active = active & ~is_end(tokens, eos_token_ids) & jnp.isfinite(logprobs)
    return Decoding(state.step + 1, tokens, state.lengths, active, out, cache)


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
        lengths: int32 `[b]`; 0 for a row that is not used.
        sampling: the rows' rules.
        eos_token_ids: int32 `[e]`, tokens that end a row; −1 matches none.
        max_new_tokens: int32 scalar, 1 … `capacity`. It is traced: a new value does not compile
            anew. Where it is traced by the caller too, a larger value counts as `capacity`.
        capacity: width of the outputs (static).
        cache_length: room in the cache, at least the longest prompt plus max_new_tokens (static). A
            row that fills it ends there.
    Raises:
        ValueError: shapes or dtypes that do not fit together, a cache shorter than the prompts or
            longer than the context, and, where it is known, max_new_tokens outside 1 … capacity.
    """
    _expect("generate", "max_new_tokens", max_new_tokens, (), "int")
    _expect_between(
        "generate",
        "max_new_tokens",
        max_new_tokens,
        1,
        capacity,
        "capacity, the width of the outputs",
    )
    with on_mesh_of(model.model.embed_tokens.weight):
        decoding = begin(
            model,
            token_ids,
            lengths,
            sampling,
            eos_token_ids,
            capacity=capacity,
            cache_length=cache_length,
        )
        return advance(model, decoding, sampling, eos_token_ids, max_new_tokens).out


def is_end(tokens: jax.Array, eos_token_ids: jax.Array) -> jax.Array:
    """Which tokens `[b]` are among the end tokens `[e]`."""
    return (tokens[:, None] == eos_token_ids[None]).any(axis=1)


_KINDS = {"int": np.integer, "bool": np.bool_}


def _expect(function: str, name: str, array: Any, shape: tuple[int | None, ...], kind: str) -> None:
    """Raise where an argument has another rank, size (None: any) or kind of number."""
    found, dtype = (
        np.shape(array),
        np.asarray(array).dtype if np.isscalar(array) else getattr(array, "dtype", None),
    )
    if dtype is None:
        raise ValueError(f"{function}: {name} is a {type(array).__name__}, expected an array")
    fits = len(found) == len(shape) and all(
        size in (None, got) for size, got in zip(shape, found, strict=True)
    )
    if not fits or not jnp.issubdtype(dtype, _KINDS[kind]) or 0 in found[:1]:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{function}: {name} is {dtype}{list(found)}, expected {kind} [{sizes}], at least one "
            "row"
        )


def _expect_between(
    function: str, name: str, array: Any, low: int, high: int, what: str = ""
) -> None:
    """Raise where an argument that is known, not traced, lies outside."""
    if isinstance(array, Tracer):
        return
    values = np.asarray(array)
    outside = values[(values < low) | (values > high)]
    if outside.size:
        raise ValueError(
            f"{function}: {name} {'holds' if values.ndim else 'is'} {outside[0]}, expected {low} "
            f"to {high}" + (f" ({what})" if what else "")
        )
