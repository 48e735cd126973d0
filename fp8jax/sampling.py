"""Choosing the next token, for every row by its own rules and its own random numbers.

    p = softmax(logits / temperature)      then keep only
    top_k    the k most likely tokens
    top_p    the fewest most likely tokens whose probabilities, renormalised after top_k, reach p
    min_p    tokens at least min_p times as likely as the likeliest

and draw from what is left. temperature 0 takes the likeliest token. A row's random number depends
on its seed and on how many tokens it has generated, on nothing else, so its tokens do not depend on
who shares the batch:

    key = fold_in(key(seed), n)                       a row with a seed of its own
    key = fold_in(fold_in(key(seed), row), n)         row `row` of those that share one seed

The row's number is folded in, not added to the seed: with seed + row, row 1 of seed 0 would draw
what row 0 of seed 1 draws, and repeating an experiment with the next seed would repeat most of its
samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

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
        row: int32 `[b]`, the row's number among those that share its seed; −1 where the seed is the
            row's own.
        mode: "greedy" when no row draws, "plain" when none filters, so that sorting the vocabulary
            can be left out (static).
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array
    row: jax.Array
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
        """Rules for a batch from single values or one a row.

        Args:
            batch: rows.
            temperature: 0 or more; 0 is greedy.
            top_k: 0 or more; 0 keeps all, and so does −1.
            top_p, min_p: 0 to 1.
            seed: 0 to 2³² − 1. One for all is combined with each row's number; of several, each is
                its row's own.
        Raises:
            ValueError: a value out of range or not a number, a broken number where a whole one is
                meant, or a sequence whose length is not the batch's.
        """

        def rows(name: str, value: Any, low: float, high: float, dtype: Any) -> np.ndarray:
            array = numbers(name, value, "whole" if np.issubdtype(dtype, np.integer) else "real")
            if array.ndim and array.shape != (batch,):
                raise ValueError(
                    f"{name}: {array.size} values for {batch} prompts; give one, or one a prompt"
                )
            outside = array[~((array >= low) & (array <= high))]  # NaN is outside
            if outside.size:
                raise ValueError(
                    f"{name} is {outside[0]}, expected a number from {low:g} to {high:g}"
                )
            return np.broadcast_to(array.astype(dtype), (batch,))

        temperatures = rows(
            "temperature", temperature, 0, float(np.finfo(np.float32).max), np.float32
        )
        top_ks = np.maximum(rows("top_k", top_k, -1, np.iinfo(np.int32).max, np.int32), 0)
        top_ps = rows("top_p", top_p, 0, 1, np.float32)
        min_ps = rows("min_p", min_p, 0, 1, np.float32)
        seeds = rows("seed", seed, 0, 2**32 - 1, np.uint32)
        row = (
            np.arange(batch, dtype=np.int32) if np.ndim(seed) == 0 else np.full(batch, -1, np.int32)
        )
        mode: SamplingMode = "greedy"
        if (temperatures > 0).any():
            mode = (
                "filtered"
                if (top_ks > 0).any() or (top_ps < 1).any() or (min_ps > 0).any()
                else "plain"
            )
        put = jax.device_put  # jnp.asarray compiles a program for every new number of rows
        return cls(
            temperature=put(temperatures),
            top_k=put(top_ks),
            top_p=put(top_ps),
            min_p=put(min_ps),
            seed=put(seeds),
            row=put(row),
            mode=mode,
        )


def numbers(name: str, value: Any, kind: Literal["whole", "real"]) -> np.ndarray:
    """A number or a sequence of numbers as an array `[]` or `[n]`.

    Raises:
        ValueError: anything else; True and False, and 2.5 or 2.0 where whole numbers are meant, are
            no numbers here.
    """
    wanted = "a whole number" if kind == "whole" else "a number"
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{name} is {value!r}, expected {wanted} or a flat list of them"
        ) from error
    mixed = isinstance(value, list | tuple) and any(isinstance(x, bool | np.bool_) for x in value)
    wrong = array.size > 0 and array.dtype.kind not in ("iu" if kind == "whole" else "iuf")
    if array.ndim > 1 or mixed or wrong:
        raise ValueError(
            f"{name} is {value!r}, expected {wanted}"
            + (" or a flat list of them" if array.ndim else "")
        )
    return array


def sample(logits: jax.Array, sampling: Sampling, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The next token of every row.

    Args:
        logits: float32 `[b, vocab]`.
        sampling: the rows' rules.
        step: int32 `[b]` or scalar, how many tokens the row has generated so far.
    Returns:
        tokens int32 `[b]`, and float32 `[b]` their log-probabilities under the model itself
        (temperature 1, unfiltered); NaN where the row's logits are not finite.
    Raises:
        ValueError: the rules are of another number of rows, or logits are not float32 `[b, vocab]`.
    """
    if logits.ndim != 2 or logits.dtype != jnp.float32:
        raise ValueError(
            f"sample: logits are {logits.dtype}{list(logits.shape)}, expected float32 [b, vocab]"
        )
    if np.shape(sampling.temperature) != logits.shape[:1]:
        raise ValueError(
            f"sample: the sampling rules are of {np.shape(sampling.temperature)} rows, the logits "
            f"of {logits.shape[0]}; make them with Sampling.of({logits.shape[0]}, …)"
        )
    if np.ndim(step) and np.shape(step) != logits.shape[:1]:
        raise ValueError(
            f"sample: step has shape {np.shape(step)}, expected a scalar or one a row of "
            f"{logits.shape[0]}"
        )
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    tokens = greedy
    if sampling.mode != "greedy":
        drawn = _draw(logits, sampling, jnp.broadcast_to(step, greedy.shape))
        tokens = jnp.where(sampling.temperature > 0, drawn, greedy)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def _key(seed: jax.Array, row: jax.Array, step: jax.Array) -> jax.Array:
    """The key of one row's draw; see the module docstring."""
    own = jax.random.key(seed)
    return jax.random.fold_in(jnp.where(row < 0, own, jax.random.fold_in(own, row)), step)


def _draw(logits: jax.Array, sampling: Sampling, step: jax.Array) -> jax.Array:
    # A tiny temperature must not turn the logits into Inf; relative to the largest they only ever
    # become very negative.
    temperature = jnp.maximum(sampling.temperature, jnp.float32(1e-6))[:, None]
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    noise = jax.vmap(lambda *row: jax.random.gumbel(_key(*row), logits.shape[-1:], jnp.float32))(
        sampling.seed, sampling.row, step
    )
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
