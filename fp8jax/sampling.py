"""Choosing the next token, for every row by its own rules and its own random numbers.

    p = softmax(logits / temperature)      then keep only
    top_k    the k most likely tokens
    top_p    the fewest most likely tokens whose probabilities, renormalised after top_k, reach p
    min_p    tokens at least min_p times as likely as the likeliest

and draw from what is left. temperature 0 takes the likeliest token. A row's random number depends on its seed and on
how many tokens it has generated, on nothing else, so its tokens do not depend on who shares the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

SamplingMode = Literal["greedy", "plain", "filtered"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """Each row's rules.

    Args:
        temperature: float32 `[b]`; 0 is greedy.
        top_k: int32 `[b]`; 0 keeps all.
        top_p: float32 `[b]`; 1 keeps all.
        min_p: float32 `[b]`; 0 keeps all.
        seed: uint32 `[b]`.
        mode: "greedy" when no row draws, "plain" when none filters, so that sorting the vocabulary can be left out
            (static).
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array
    mode: SamplingMode = field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        batch: int,
        *,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        min_p: float | Sequence[float] = 0.0,
        seed: int | Sequence[int] = 0,
    ) -> "Sampling":
        """Rules for a batch from single values or one a row. One `seed` gives row i the seed `seed + i`.

        Raises:
            ValueError: a value out of range, or a sequence whose length is not the batch's.
        """

        def rows(name: str, value, low: float, high: float, dtype) -> np.ndarray:
            array = np.asarray(value)
            if array.ndim and array.shape != (batch,):
                raise ValueError(f"{name}: {array.size} values for {batch} prompts; give one, or one a prompt")
            if not ((array >= low) & (array <= high)).all():
                raise ValueError(f"{name} is {value}, expected a number from {low:g} to {high:g}")
            return np.broadcast_to(array.astype(dtype), (batch,))

        temperatures = rows("temperature", temperature, 0, np.inf, np.float32)
        top_ks = rows("top_k", top_k, 0, np.iinfo(np.int32).max, np.int32)
        top_ps = rows("top_p", top_p, 0, 1, np.float32)
        min_ps = rows("min_p", min_p, 0, 1, np.float32)
        seeds = np.asarray(seed, np.int64)
        seeds = rows("seed", seeds + np.arange(batch) if seeds.ndim == 0 else seeds, 0, 2**32 - 1, np.uint32)
        mode: SamplingMode = "greedy"
        if (temperatures > 0).any():
            mode = "filtered" if (top_ks > 0).any() or (top_ps < 1).any() or (min_ps > 0).any() else "plain"
        return cls(
            temperature=jnp.asarray(temperatures),
            top_k=jnp.asarray(top_ks),
            top_p=jnp.asarray(top_ps),
            min_p=jnp.asarray(min_ps),
            seed=jnp.asarray(seeds),
            mode=mode,
        )


def sample(logits: jax.Array, sampling: Sampling, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The next token of every row.

    Args:
        logits: float32 `[b, vocab]`.
        sampling: the rows' rules.
        step: int32 `[b]` or scalar, how many tokens the row has generated so far.
    Returns:
        tokens int32 `[b]`, and float32 `[b]` their log-probabilities under the model itself (temperature 1,
        unfiltered).
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    tokens = greedy
    if sampling.mode != "greedy":
        drawn = _draw(logits, sampling, jnp.broadcast_to(step, greedy.shape))
        tokens = jnp.where(sampling.temperature > 0, drawn, greedy)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def _draw(logits: jax.Array, sampling: Sampling, step: jax.Array) -> jax.Array:
    # A tiny temperature must not turn the logits into Inf; relative to the largest they only ever become very negative.
    temperature = jnp.maximum(sampling.temperature, jnp.float32(1e-6))[:, None]
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    keys = jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(sampling.seed, step)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], jnp.float32))(keys)
    if sampling.mode == "plain":
        return jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32)

    order = jnp.argsort(-scaled, axis=-1, stable=True)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])[None]
    top_k = sampling.top_k[:, None]
    kept = (top_k == 0) | (rank < top_k)
    probability = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept &= before < sampling.top_p[:, None]
    kept &= probability >= sampling.min_p[:, None] * probability[:, :1]
    kept |= rank == 0  # the likeliest token always stays, whatever rounding or top_p = 0 say
    place = jnp.argmax(jnp.where(kept, ranked + noise, -jnp.inf), axis=-1)
    return jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0].astype(jnp.int32)
