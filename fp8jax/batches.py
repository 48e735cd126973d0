"""Prompts of many lengths as few arrays of few shapes, as many at a time as memory holds.

Every new shape is a new compilation, of seconds to a minute, so lengths and numbers of rows are
rounded up:

    tokens    16, 32, 64, 128, 256, 512, then 768, 1024, 1536, 2048, …    at most the context
    rows      1, 2, 4, 8, …                                               at most what runs at once
    end ids   8, 16, 32, …                                                filled with −1, no token

Up to 512 tokens a prompt costs about as much as its padding (reading the weights is what takes
time), so powers of two do; beyond, both time and cache grow with the length, and the halves between
keep the waste below a third to a half. Padding repeats a token of its own row, and unused rows
repeat a row, because any other token, 0 say, may be one whose hidden state is not finite. An unused
row has length 0 and is never decoded.

Rows that run at once follow from an estimate of what a row needs (`row_bytes`) against the device's
free memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from fp8jax.models import DecoderConfig

# Of free memory: the rest is for fragments, the program itself, and for what the estimate does not
# know.
_SHARE_OF_FREE_MEMORY = 0.7
# Scores of attention and chunks of logits are bounded whatever the batch; about three arrays of
# each live at once.
_BOUNDED_BYTES = 2**29


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of token ids as arrays.

    Args:
        first: number of the first row among all.
        rows: how many are used; the others only fill the shape.
        token_ids: int32 `[b, t]`.
        lengths: int32 `[b]`, 0 for unused rows.
    """

    first: int
    rows: int
    token_ids: np.ndarray
    lengths: np.ndarray

    def filled(self, values: np.ndarray) -> np.ndarray:
        """What belongs to the batch's rows, of an array over all rows; unused rows repeat the
        first."""
        chosen = values[self.first : self.first + self.rows]
        return np.concatenate(
            [chosen, np.repeat(chosen[:1], len(self.lengths) - self.rows, axis=0)]
        )


def batches(
    rows: Sequence[Sequence[int]],
    config: DecoderConfig,
    *,
    batch_size: int,
    new_tokens: int | None,
    device: Any,
) -> Iterator[Batch]:
    """Cut rows into batches, in order.

    Args:
        rows: token ids, none empty.
        config: the model's.
        batch_size: at most this many rows at once.
        new_tokens: how many each row may get; None where nothing is generated and there is no
            cache.
        device: the `jax.Device` in whose memory they have to fit.
    """
    first = 0
    while first < len(rows):
        chosen = rows[first : first + batch_size]
        t = bucket(max(len(row) for row in chosen), config.max_position_embeddings)
        room = (
            0 if new_tokens is None else cache_room(t, new_tokens, config.max_position_embeddings)
        )
        limit = min(batch_size, rows_that_fit(config, t, room, free_bytes(device)))
        yield pad(
            chosen[:limit], limit=config.max_position_embeddings, first=first, most_rows=limit
        )
        first += min(limit, len(chosen))


def pad(
    rows: Sequence[Sequence[int]], *, limit: int, first: int = 0, most_rows: int | None = None
) -> Batch:
    """Rows of token ids as one array, padded on the right and below.

    Args:
        rows: token ids, none empty.
        limit: the model's context.
        first: number of the first row among all.
        most_rows: the batch is rounded up to a power of two, but not beyond this; None for no
            rounding.
    """
    longest = bucket(max(len(row) for row in rows), limit)
    b = len(rows) if most_rows is None else min(2 ** (len(rows) - 1).bit_length(), most_rows)
    lengths = np.asarray([len(row) for row in rows] + [0] * (b - len(rows)), np.int32)
    token_ids = np.empty((b, longest), np.int32)
    for i, row in enumerate(rows):
        token_ids[i, : len(row)], token_ids[i, len(row) :] = row, row[-1]
    token_ids[len(rows) :] = token_ids[0]
    return Batch(first=first, rows=len(rows), token_ids=token_ids, lengths=lengths)


def bucket(length: int, limit: int) -> int:
    """The padded length for `length` tokens: a power of two from 16, or half-way between two from
    512 on; at most `limit`, the model's context."""
    size = max(16, 2 ** (length - 1).bit_length())
    if size > 512 and length <= size * 3 // 4:
        size = size * 3 // 4
    return min(size, limit)


def cache_room(padded_length: int, new_tokens: int, limit: int) -> int:
    """Length of the cache: it follows from the two buckets, so that a bucket of prompts is one
    compilation."""
    return min(padded_length + bucket(new_tokens, limit), limit)


def end_ids(ids: Sequence[int]) -> np.ndarray:
    """End tokens as int32 `[8]`, `[16]`, …"""
    padded = np.full(max(8, 2 ** (max(len(ids), 1) - 1).bit_length()), -1, np.int32)
    padded[: len(ids)] = ids
    return padded


def row_bytes(config: DecoderConfig, tokens: int, cache_length: int) -> int:
    """About how much one row of `tokens` tokens needs beside the weights, in bytes: its cache, and
    the activations of the layer that runs.
    """
    c = config
    cache = (
        2 * c.num_layers * c.num_kv_heads * cache_length * c.head_dim * np.dtype(c.dtype).itemsize
    )
    attention = 3 * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    mlp = 3 * c.intermediate_size
    if c.moe is not None:
        mlp = max(mlp, c.moe.top_k * (3 * c.moe.intermediate_size + 2 * c.hidden_size))
    # In float32: the references widen, and kernels leave float32 sums of split products.
    activations = 4 * (6 * c.hidden_size + max(attention, mlp)) * tokens
    logits = (
        6 * 4 * c.vocab_size
    )  # of the last position: sorted, ranked and summed up where rows filter
    return cache + activations + logits


def rows_that_fit(config: DecoderConfig, tokens: int, cache_length: int, free: int | None) -> int:
    """How many rows run at once in so much memory: a power of two, so that it hardly ever changes;
    at least one."""
    if free is None:
        return 2**30
    room = free * _SHARE_OF_FREE_MEMORY - _BOUNDED_BYTES
    most = int(max(room // row_bytes(config, tokens, cache_length), 1))
    return 2 ** (most.bit_length() - 1)


def free_bytes(device: Any) -> int | None:
    """Memory of a `jax.Device` that is free; None where that is not known."""
    if device.platform == "cpu":
        return psutil.virtual_memory().available
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
