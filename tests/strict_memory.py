"""Make Pallas' interpreter notice what a GPU would do silently: read or write outside an array.

The interpreter clamps an index that is too large when it reads and drops the value when it writes,
so that a missing mask shows in no result. Inside `strict_memory()` every load and store of a kernel
checks its unmasked indices first; if one is outside, all values of that load or store become NaN,
which no test overlooks.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp


@contextlib.contextmanager
def strict_memory() -> Iterator[None]:
    """While kernels are traced inside, an access outside its array gives NaN. Kernels traced before
    are traced again.

    Does nothing on a GPU, where the kernels are compiled.
    """
    if jax.default_backend() == "gpu":
        yield
        return
    from jax.experimental.pallas import triton as plgpu

    load, store = plgpu.load, plgpu.store

    def strict_load(ref, *, mask=None, **options):
        loaded = load(ref, mask=mask, **options)
        if not jnp.issubdtype(loaded.dtype, jnp.floating):
            return loaded
        return jnp.where(_any_outside(ref, mask), jnp.asarray(jnp.nan, loaded.dtype), loaded)

    def strict_store(ref, value, *, mask=None, **options):
        if jnp.issubdtype(value.dtype, jnp.floating):
            value = jnp.where(_any_outside(ref, mask), jnp.asarray(jnp.nan, value.dtype), value)
        store(ref, value, mask=mask, **options)

    jax.clear_caches()
    with (
        mock.patch.object(plgpu, "load", strict_load),
        mock.patch.object(plgpu, "store", strict_store),
    ):
        yield
    jax.clear_caches()


def _any_outside(ref, mask) -> jax.Array:
    indexer = ref.transforms[-1]
    outside = jnp.asarray(False)
    for index, size in zip(indexer.indices, indexer.shape, strict=True):
        index = jnp.asarray(index)  # slices are not understood, and the kernels here use none
        outside = outside | (index < 0) | (index >= size)
    return jnp.any(outside if mask is None else outside & mask)
