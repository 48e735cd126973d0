"""The key-value cache: what attention remembers of the tokens before.

One array a layer and side, `[b, kv_heads, s, d]`, each a pytree leaf of its own. With
`[b, s, kv_heads, d]` XLA would transpose the whole cache in every decode step. A row's token at
position p lies at index p; what lies at and beyond a row's length is never looked at before it is
overwritten, so rows of different lengths need no bookkeeping but their length.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, each `[b, kv_heads, s, d]`."""

    key: jax.Array
    value: jax.Array

    def write_prompt(self, key: jax.Array, value: jax.Array) -> "LayerCache":
        """Write keys and values `[b, kv_heads, t, d]` at positions 0 … t−1 of every row."""
        start = (0, 0, 0, 0)
        return LayerCache(
            jax.lax.dynamic_update_slice(self.key, key.astype(self.key.dtype), start),
            jax.lax.dynamic_update_slice(self.value, value.astype(self.value.dtype), start),
        )

    def write_at(self, positions: jax.Array, key: jax.Array, value: jax.Array) -> "LayerCache":
        """Write keys and values `[b, kv_heads, t, d]` at each row's own positions `[b, t]`;
        positions outside are dropped."""
        rows = jnp.arange(positions.shape[0])[:, None]

        def write(cache: jax.Array, new: jax.Array) -> jax.Array:
            return cache.at[rows, :, positions].set(
                new.swapaxes(1, 2).astype(cache.dtype), mode="drop"
            )

        return LayerCache(write(self.key, key), write(self.value, value))


KVCache = tuple[LayerCache, ...]
"""One `LayerCache` a layer."""


def empty_cache(
    *,
    layers: int,
    batch: int,
    kv_heads: int,
    length: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
) -> KVCache:
    """A cache of zeros for `batch` rows of up to `length` tokens."""
    shape = (batch, kv_heads, length, head_dim)
    return tuple(
        LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers)
    )
