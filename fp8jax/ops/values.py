"""What operations hand to each other beside plain arrays.

A fused kernel computes more, or less, than one array: it quantizes what it has just computed, or
leaves a sum to whoever reads it next. Three small pytrees say so:

    QActivation    rows that are quantized already: codes and scales
    PartialSums    an array in pieces that are still to be added up: splits of k, experts of a token
    Stream         the residual stream and what is still to be added to it; the norm that reads the
                   stream settles it

`Reads` tells a norm how the block behind it wants its input.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from fp8jax.ops import gradients
from fp8jax.pallas_kernels import matmul_tiles
from fp8jax.pallas_kernels.formats import ACTIVATIONS, ActivationGranularity
from fp8jax.pallas_kernels.quantize import ScaleLayout
from fp8jax.pallas_kernels.rms_norm_quantize import times


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QActivation:
    """Quantized activations: codes `[m, k]` and scales as in `pallas_kernels/quantize.py`.

    Args:
        scale_layout: of "group" scales, `[m, groups]` or `[groups, m]` (static).
        plain: the float array that was quantized, `[..., k]`, where something else reads it too (a
            router).
        carrier: `[m, k]` in the dtype that was quantized; what it holds is read by no one, its
            cotangent is that of the activations (see `gradients`). None for codes that are
            constants.
    """

    qvalue: jax.Array
    scale: jax.Array
    granularity: ActivationGranularity = field(metadata={"static": True})
    scale_layout: ScaleLayout = field(default="mg", metadata={"static": True})
    plain: jax.Array | None = None
    carrier: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.qvalue.shape

    def scale_by_row(self) -> jax.Array:
        """The scales as the references take them."""
        return (
            self.scale.T
            if self.scale_layout == "gm" and self.granularity == "group"
            else self.scale
        )

    def dequantized(self) -> jax.Array:
        """The activations that the codes stand for: float32 `[m, k]`."""
        scale, width = self.scale_by_row(), ACTIVATIONS[self.granularity].columns
        if width is not None:
            scale = jnp.repeat(scale, width, axis=1)[:, : self.shape[1]]
        return self.qvalue.astype(jnp.float32) * scale.reshape(-1, scale.shape[-1])

    def without_carrier(self) -> "QActivation":
        """Codes and scales alone, and an error for who differentiates with respect to them."""
        codes, scale = gradients.constant_activation((self.qvalue, self.scale))
        return QActivation(codes, scale, self.granularity, self.scale_layout)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PartialSums:
    """An array `[..., n]` in pieces that are still to be added up.

    Args:
        parts: float32 `[pieces, ..., n]`.
        dtype: what their sum is rounded to (static).
    """

    parts: jax.Array
    dtype: jax.typing.DTypeLike = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts.shape[1:]

    def reshape(self, *shape: int) -> "PartialSums":
        """The same pieces of the array in another shape."""
        return PartialSums(self.parts.reshape(self.parts.shape[0], *shape), self.dtype)

    def total(self) -> jax.Array:
        return matmul_tiles.sum_of_splits(self.parts, self.dtype)


Summed = jax.Array | PartialSums
"""An array, or the pieces that it is the sum of."""


def total(x: Summed) -> jax.Array:
    """The array itself."""
    return x.total() if isinstance(x, PartialSums) else x


def rows_or_parts(x: Summed) -> jax.Array:
    """`[m, n]`, or the pieces `[pieces, m, n]`: kernels take either."""
    x = x.reshape(-1, x.shape[-1])
    return x.parts if isinstance(x, PartialSums) else x


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stream:
    """The residual stream of a decoder, which may owe a sum.

        stream = stream.add(attention(…))       nothing is computed yet
        x, stream = norm.settle(stream, …)      the addition happens in the norm's kernel

    Args:
        value: float `[..., h]`.
        owed: `[..., h]`, what is to be added; None for nothing.
        multiplier: what `owed` is multiplied by (static).
    """

    value: jax.Array
    owed: Summed | None = None
    multiplier: float = field(default=1.0, metadata={"static": True})

    def add(self, x: Summed, *, multiplier: float = 1.0) -> "Stream":
        """The stream that owes multiplier · x."""
        return Stream(self.settled(), x, multiplier)

    def settled(self) -> jax.Array:
        """Stream and what it owes, added in the activations' dtype, `[..., h]`."""
        return (
            self.value
            if self.owed is None
            else self.value + times(total(self.owed), self.multiplier)
        )


@dataclass(frozen=True)
class Reads:
    """How a block reads the rows that a norm gives it.

    Args:
        quantized: the granularity of the block's first weight; None where that is not quantized.
        floats: whether it reads the float rows as well (a router does).
    """

    quantized: ActivationGranularity | None = None
    floats: bool = False


def granularity_of(weight: Any) -> ActivationGranularity | None:
    """How activations that meet a weight are quantized; None for a weight that is not."""
    scheme = getattr(weight, "scheme", None)
    return None if scheme is None else scheme.activation
