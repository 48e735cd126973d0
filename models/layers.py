"""The modules that a decoder is made of: projections, table, norm, MLP; and what a pass knows.

A module is built abstract: its weights are `jax.ShapeDtypeStruct`, and the loader puts arrays in
their place. Attributes are called as in the checkpoint. There is one `Linear`: if its weight is an
array it multiplies, if it is a `QArray` the scheme in it says how activations are quantized and
which operation runs. What every layer of a forward pass needs to know about the tokens is in a
`Step`.

A result may be left in pieces (`Summed`) for the operation behind it, and rows may come quantized
(`QActivation`): then a kernel did both in passing. Neither changes what is computed.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Concatenate

import jax
import jax.numpy as jnp
from flax import nnx

from fp8jax.models.config import DecoderConfig
from fp8jax.ops.activation import silu_mul
from fp8jax.ops.choice import Choice
from fp8jax.ops.decisions import scope
from fp8jax.ops.matmul import linear
from fp8jax.ops.norm import norm_of_stream, rms_norm
from fp8jax.ops.values import QActivation, Reads, Stream, Summed, granularity_of, total
from fp8jax.pallas_kernels.formats import ActivationGranularity


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Step:
    """One forward pass over `[b, t]` tokens, as its layers see it.

    Args:
        positions: int32 `[b, t]`, each token's place in its row's sequence.
        cos, sin: float32 `[b, t, rotary_dim / 2]`.
        valid: bool `[b, t]`, which tokens are not padding; None for all.
        continues: whether rows continue what is in the cache; otherwise they begin at position 0
            and attend to the tokens of this pass (static).
        choice: what runs the operations, asked once a trace (static).
    """

    positions: jax.Array
    cos: jax.Array
    sin: jax.Array
    valid: jax.Array | None
    continues: bool = field(metadata={"static": True})
    choice: Choice = field(metadata={"static": True})


class Module(nnx.Module):
    """A module whose operations carry its name in the checkpoint; see `scoped`.

    Args:
        name: what the module around it calls it, "self_attn" or "layers.3"; see `name_modules`.
    """

    name = ""


def scoped[M: Module, **P, R](
    call: Callable[Concatenate[M, P], R],
) -> Callable[Concatenate[M, P], R]:
    """A method of a module, traced under the module's name: profiles, HLO and `explain` show it."""

    @functools.wraps(call)
    def inside(self: M, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self.name:
            return call(self, *args, **kwargs)
        with scope(self.name):
            return call(self, *args, **kwargs)

    return inside


def name_modules(root: nnx.Module) -> None:
    """Tell every module below a root what the one around it calls it."""
    paths = dict(nnx.iter_modules(root))
    for path, module in paths.items():
        if path and isinstance(module, Module):
            around = next(n for n in range(len(path) - 1, -1, -1) if path[:n] in paths)
            module.name = ".".join(map(str, path[around:]))


class Linear(Module):
    """y = x @ weight.T + bias; the weight is an array, a `QArray`, or abstract.

    Args:
        shards: (name, rows) of the checkpoint's matrices that are stacked to make this one, in
            order; a layer that is not fused has itself as its only shard.
        k: inputs.
        bias: whether it has one.
        dtype: dtype of an unquantized weight, of a bias and of the outputs.
    """

    def __init__(
        self, shards: tuple[tuple[str, int], ...], k: int, *, dtype: str, bias: bool = False
    ):
        n = sum(rows for _, rows in shards)
        self.shards = shards
        self.dtype = jnp.dtype(dtype)
        self.weight: Any = nnx.data(jax.ShapeDtypeStruct((n, k), dtype))
        self.bias: Any = nnx.data(jax.ShapeDtypeStruct((n,), dtype) if bias else None)

    @property
    def quantizes(self) -> ActivationGranularity | None:
        """How it wants its input quantized; None where its weight is not."""
        return granularity_of(self.weight)

    @scoped
    def __call__(self, x: jax.Array | QActivation, step: Step) -> Summed:
        """`[b, t, k]`, or its rows quantized as the weight wants them, to `[b, t, n]`."""
        b, t = step.positions.shape
        y = linear(
            x,
            self.weight,
            bias=self.bias,
            out_dtype=self.dtype,
            valid=None if step.valid is None else step.valid.reshape(-1),
            implementation=step.choice,
        )
        return y.reshape(b, t, -1)


class Embedding(Module):
    """A table of token vectors, `[vocab, hidden]`."""

    def __init__(self, vocab: int, hidden: int, *, dtype: str):
        self.weight: Any = nnx.data(jax.ShapeDtypeStruct((vocab, hidden), dtype))

    @scoped
    def __call__(self, token_ids: jax.Array) -> jax.Array:
        return self.weight[token_ids]


class RMSNorm(Module):
    """x / rms(x) · weight."""

    def __init__(self, size: int, *, epsilon: float, dtype: str):
        self.epsilon = epsilon
        self.weight: Any = nnx.data(jax.ShapeDtypeStruct((size,), dtype))

    @scoped
    def __call__(self, x: Summed) -> jax.Array:
        return rms_norm(total(x), self.weight, epsilon=self.epsilon)

    @scoped
    def settle(
        self, stream: Stream, step: Step, reads: Reads
    ) -> tuple[jax.Array | QActivation, Stream]:
        """The stream normalised for the block that reads it, and the stream that owes nothing."""
        return norm_of_stream(
            stream, self.weight, epsilon=self.epsilon, reads=reads, implementation=step.choice
        )


class MLP(Module):
    """down(silu(gate(x)) · up(x)), gate and up as one matrix."""

    def __init__(self, config: DecoderConfig):
        c, i = config, config.intermediate_size
        shards = (("gate_proj", i), ("up_proj", i))
        self.gate_up_proj = Linear(shards, c.hidden_size, dtype=c.dtype, bias=c.mlp_bias)
        self.down_proj = Linear((("down_proj", c.hidden_size),), i, dtype=c.dtype, bias=c.mlp_bias)

    @property
    def reads(self) -> Reads:
        return Reads(self.gate_up_proj.quantizes)

    @scoped
    def __call__(self, x: jax.Array | QActivation, step: Step) -> Summed:
        """`[b, t, hidden]`, or its rows quantized as `reads` says, to `[b, t, hidden]`."""
        gate_up = self.gate_up_proj(x, step)
        y = silu_mul(gate_up, quantized=self.down_proj.quantizes, implementation=step.choice)
        return self.down_proj(y, step)
