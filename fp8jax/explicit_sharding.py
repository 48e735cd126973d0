"""A model whose weights lie on a mesh with Explicit axes, which is what `jax.make_mesh` makes
unless told otherwise.

With Explicit axes an array's sharding is part of its type, and every operation whose result could
be sharded in more than one way (a look-up in a sharded table, a product over a sharded axis) must
be told which. The model leaves that to XLA: inside it all axes are Auto, whatever the weights'
shardings are, and what comes out, hidden states, logits and cache, is replicated. Meshes with Auto
axes and single devices go through unchanged.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def with_automatic_axes(function: Callable[..., Any], weight: jax.Array, *args: Any) -> Any:
    """`function(*args)`, its axes Auto where those of a weight's mesh are Explicit; traceable.

    Args:
        function: of pytrees of arrays; everything that lies on the mesh must be among its
            arguments.
        weight: says on which mesh they lie.
    """
    if not _is_explicit(weight):
        return function(*args)
    with on_mesh_of(weight):
        return jax.sharding.auto_axes(function, out_sharding=PartitionSpec())(*args)


def on_mesh_of(weight: jax.Array) -> contextlib.AbstractContextManager[Any]:
    """A context in which new arrays belong to a weight's mesh, where its axes are Explicit and no
    mesh is set."""
    if not _is_explicit(weight) or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    if not isinstance(weight, Tracer) and isinstance(weight.sharding, NamedSharding):
        return jax.sharding.set_mesh(weight.sharding.mesh)  # pyright: ignore[reportArgumentType]
    return jax.sharding.use_abstract_mesh(jax.typeof(weight).sharding.mesh)


def _is_explicit(weight: jax.Array) -> bool:
    return AxisType.Explicit in jax.typeof(weight).sharding.mesh.axis_types
