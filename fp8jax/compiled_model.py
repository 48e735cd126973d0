"""The compiled functions of a model: what `LanguageModel` calls, each once compiled for every
signature.

Weights go in as pre-flattened leaves, since flattening an NNX module costs milliseconds a call. The
decode loop runs on the device, in portions: `begin` reads prompts, `advance` decodes up to a given
number of tokens and returns, so that Python sees a Ctrl-C now and then. `first` and `next` are
single steps, for a stream that looks at every token: a loop of one step would make the host wait
for its condition before the next can be queued.

Logits `[b, t, vocab]` of a score would be the largest array by far (8 × 8192 tokens of 49152 words:
12 GiB); they are made for some positions at a time and reduced to one number each.
"""

import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fp8jax.explicit_sharding import on_mesh_of
from fp8jax.generation import advance, begin, decode_step, prefill
from fp8jax.models import CausalLM
from fp8jax.sampling import Sampling, sample

_LOGITS_BYTES = 2**27


class CompiledModel:
    """The jitted functions of one model structure; each takes the model's leaves first.

    Args:
        structure: tree structure of the model.
    """

    def __init__(self, structure: Any):
        def with_model(function: Callable[..., Any], **jit_options: Any) -> Program:
            def call(leaves, *args, **options):
                model = jax.tree.unflatten(structure, leaves)
                with on_mesh_of(model.model.embed_tokens.weight):
                    return function(model, *args, **options)

            return Program(jax.jit(call, **jit_options))

        self.structure = structure
        self.logits = with_model(_logits)
        self.score = with_model(_scores)
        self.begin = with_model(begin, static_argnames=("capacity", "cache_length"))
        self.advance = with_model(advance, donate_argnums=1)
        self.first = with_model(_first_token, static_argnames="cache_length")
        self.next = with_model(_next_token, donate_argnums=1)


class Program:
    """A jitted function that threads share: the first call of a signature runs alone, or each
    thread would compile it.

    JAX's own cache is filled only when a compilation is done, so that calls which arrive before
    start another one.
    """

    def __init__(self, function: Any):
        self._function = function
        self._compiled: set[Any] = set()
        self._locks: dict[Any, threading.Lock] = {}

    def __call__(self, leaves: list[jax.Array], *args: Any, **static: Any) -> Any:
        arrays, structure = jax.tree.flatten(args)
        signature = (
            structure,
            tuple((x.shape, x.dtype) for x in arrays),
            tuple(sorted(static.items())),
        )
        if signature not in self._compiled:
            with self._locks.setdefault(signature, threading.Lock()):
                if signature not in self._compiled:
                    out = self._function(leaves, *args, **static)
                    self._compiled.add(signature)
                    return out
        return self._function(leaves, *args, **static)

    @property
    def compilations(self) -> int:
        """How many programs JAX holds."""
        return self._function._cache_size()


def by_position(function: Callable[..., Any], vocab: int, *arrays: jax.Array) -> Any:
    """`function` of every position, for as many at a time as may have their logits in memory.

    Args:
        function: of one position's part of each array; it may make `[vocab]` float32 logits.
        vocab: their size.
        arrays: `[b, t, …]`.
    Returns:
        What the function gives, as `[b, t, …]`.
    """
    b, t = arrays[0].shape[:2]
    # A power of two that matrix products like, or all there are.
    most = max(_LOGITS_BYTES // (4 * vocab), 1)
    chunk = min(2 ** (most.bit_length() - 1), b * t)
    flat = [x.reshape(b * t, *x.shape[2:]) for x in arrays]
    out = jax.lax.map(lambda position: function(*position), tuple(flat), batch_size=chunk)
    return jax.tree.map(lambda x: x.reshape(b, t, *x.shape[1:]), out)


def _logits(model: CausalLM, token_ids: jax.Array, lengths: jax.Array) -> jax.Array:
    return model.logits(_hidden(model, token_ids, lengths))


def _hidden(model: CausalLM, token_ids: jax.Array, lengths: jax.Array) -> jax.Array:
    valid = jnp.arange(token_ids.shape[1])[None] < lengths[:, None]
    return model.hidden_states(token_ids, valid=valid)[0]


def _scores(model: CausalLM, token_ids: jax.Array, lengths: jax.Array) -> jax.Array:
    """float32 `[b, t]`: the log-probability of token i + 1 in column i; the last column means
    nothing."""

    def score(hidden: jax.Array, token: jax.Array) -> jax.Array:
        logits = model.logits(hidden)
        return logits[token] - jax.nn.logsumexp(logits)

    following = jnp.roll(token_ids, -1, axis=1)
    return by_position(
        score, model.config.vocab_size, _hidden(model, token_ids, lengths), following
    )


def _first_token(model: CausalLM, token_ids, lengths, sampling: Sampling, *, cache_length: int):
    logits, cache = prefill(
        model, model.empty_cache(token_ids.shape[0], cache_length), token_ids, lengths
    )
    return *sample(logits, sampling, jnp.int32(0)), cache


def _next_token(model: CausalLM, cache, token, position, sampling: Sampling, step):
    logits, cache = decode_step(model, cache, token, position)
    return *sample(logits, sampling, step), cache
