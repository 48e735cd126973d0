"""Mixture of experts: a router sends each token to top_k of e, whose outputs are added by weight.

    logits = x @ gate.T                        [t, e], in the activations' dtype
    experts, weights = route(logits)           [t, k] each, in float32
    slots: the t · k pairs (token, choice), sorted by expert, stably
    y[slot] = down_e(silu(gate_e(x)) · up_e(x)) · weight              e the slot's expert
    out[token] = y[slot of choice 1] + … + y[slot of choice k]        in float32, in this order

Experts are two stacks, `gate_up_proj` [e, 2i, h] (gate rows first) and `down_proj` [e, h, i], each
an array, a `QArray`, or a `SplitQArray`. All shapes are static: what depends on the routing is only
which slots belong to whom (`pallas_kernels/grouped_matmul.py`). Tokens that are padding are sorted
behind everything, belong to no expert and come out as zeros. Activations are quantized per token or
per group, so a token's result does not depend on who shares its batch.

Families differ in the router alone, and say how in a `MoEConfig`:

    softmax over    "all" experts, then top-k of the probabilities    Mixtral, Qwen3-MoE, OLMoE
                    the "chosen" k logits                             GraniteMoE
    renormalise     the k probabilities are divided by their sum      Mixtral; if norm_topk_prob,
                                                                      Qwen3-MoE and OLMoE
    weight dtype    weights are rounded to the activations' dtype     all but Mixtral

Source: the routers of transformers 5.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fp8jax.models.config import DecoderConfig, MoEConfig
from fp8jax.models.layers import Module, Step, scoped
from fp8jax.ops import experts as ops
from fp8jax.ops.choice import Choice, Implementation
from fp8jax.ops.matmul import float_matmul
from fp8jax.ops.values import QActivation, Reads, Summed, granularity_of
from fp8jax.pallas_kernels.grouped_matmul import Slots


class Router(Module):
    """The weight `[e, h]` whose product with a token is its affinity to each expert. Never
    quantized."""

    def __init__(self, num_experts: int, hidden: int, *, dtype: str):
        self.weight: Any = nnx.data(jax.ShapeDtypeStruct((num_experts, hidden), dtype))

    @scoped
    def __call__(self, x: jax.Array) -> jax.Array:
        return float_matmul(x, self.weight)


class Experts(Module):
    """The stacks of all experts of a layer."""

    def __init__(self, config: MoEConfig, hidden: int, *, dtype: str):
        e, i = config.num_experts, config.intermediate_size
        self.dtype = jnp.dtype(dtype)
        self.gate_up_proj: Any = nnx.data(jax.ShapeDtypeStruct((e, 2 * i, hidden), dtype))
        self.down_proj: Any = nnx.data(jax.ShapeDtypeStruct((e, hidden, i), dtype))

    @scoped
    def __call__(
        self,
        x: jax.Array | QActivation,
        slots: Slots,
        *,
        valid: jax.Array | None = None,
        implementation: Implementation | Choice = "auto",
    ) -> Summed:
        """The weighted sum of what each token's experts say.

        Args:
            x: `[t, h]`, floats or quantized.
            slots: who meets whom.
            valid: bool `[t]`, which tokens are not padding; None for all.
            implementation: what runs the products.
        Returns:
            `[t, h]`, zeros for padding.
        """
        y = ops.gate_up(
            x,
            self.gate_up_proj,
            slots,
            dtype=self.dtype,
            quantized=granularity_of(self.down_proj),
            valid=valid,
            implementation=implementation,
        )
        return ops.down(
            y,
            self.down_proj,
            slots,
            x.shape[0],
            dtype=self.dtype,
            implementation=implementation,
        )


class SparseMoE(Module):
    """Router and experts, in the place of an MLP."""

    def __init__(self, config: DecoderConfig):
        assert config.moe is not None
        self.config = config.moe
        self.gate = Router(config.moe.num_experts, config.hidden_size, dtype=config.dtype)
        self.experts = Experts(config.moe, config.hidden_size, dtype=config.dtype)

    @property
    def reads(self) -> Reads:
        return Reads(granularity_of(self.experts.gate_up_proj), floats=True)

    @scoped
    def __call__(self, x: jax.Array | QActivation, step: Step) -> Summed:
        """`[b, t, hidden]`, or its rows quantized as `reads` says, to `[b, t, hidden]`."""
        b, t = step.positions.shape
        floats = x.plain if isinstance(x, QActivation) else x
        assert floats is not None, "the router reads what was not quantized"
        rows = floats.reshape(b * t, -1)
        valid = None if step.valid is None else step.valid.reshape(-1)
        logits = self.gate(rows)
        slots = ops.route(
            logits,
            self.config.rule(logits.dtype.name),
            self.experts.gate_up_proj,
            valid=valid,
            implementation=step.choice,
        )
        x = x if isinstance(x, QActivation) else rows
        out = self.experts(x, slots, valid=valid, implementation=step.choice)
        return out.reshape(b, t, -1)
