"""Mixture of experts: a router sends each token to top_k of e experts, and their outputs are added
by weight.

    logits = x @ gate.T                        [t, e], in the activations' dtype; what follows of the router is float32
    experts, weights = route(logits)           [t, k] each
    slots: the t Â· k (token, choice) pairs, sorted by expert; a stable sort, so that the order is always the same
    y[slot] = down_e(silu(gate_e(x)) Â· up_e(x)) Â· weight,  e the slot's expert
    out[token] = y[slot of choice 1] + … + y[slot of choice k]       in float32, in the order of the choices

Experts are two stacks, `gate_up_proj` [e, 2i, h] (gate rows first) and `down_proj` [e, h, i], each
an array, a `QArray`, or a `SplitQArray`. All shapes are static: what depends on the routing is only
which slots belong to whom (`pallas_kernels/grouped_matmul.py`). Tokens that are padding are sorted
behind everything, belong to no expert and come out as zeros. Activations are quantized per token or
per group, so a token's result does not depend on who shares its batch.

In decode on a GPU a layer's experts are five kernels and the router's product: the norm that writes
rows and codes, routing (`pallas_kernels/expert_routing.py`), gate_up, silu·mul with quantization,
down. The sum is left to the norm that follows. Where an expert gets 64 to 255 slots, gate_up and
silu·mul are one kernel with block scales (`pallas_kernels/grouped_gate_up.py`).

Families differ in the router alone, and say how in a `MoEConfig`:

    softmax over      "all" experts, then top-k of the probabilities          Mixtral, Qwen3-MoE, OLMoE
                      the "chosen" k logits                                   GraniteMoE
    renormalise       the k probabilities are divided by their sum            Mixtral; Qwen3-MoE if norm_topk_prob
    weight dtype      weights rounded to the activations' dtype, or float32   all but Mixtral; Mixtral

Source: the routers of transformers 5.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fp8jax import ops
from fp8jax.models.layers import Step
from fp8jax.ops import fused as fused_ops
from fp8jax.ops import gradients
from fp8jax.ops.choice import runs_kernel
from fp8jax.ops.matmul import PartialSums, QActivation
from fp8jax.pallas_kernels import expert_routing
from fp8jax.pallas_kernels.interpret_mode import interpreting
from fp8jax.pallas_kernels.quantize import rounded
from fp8jax.qarray import QArray, SplitQArray

# So few that writing what each expert gives in float32 costs next to nothing.
_FEW_SLOTS = 1024


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """What the tensors of an MoE block are called in a checkpoint, below "model.layers.3.".

    Args:
        router: the router's weight `[e, h]`.
        gate_up: names that stack along rows to gate and up. With "{e}" in them, one name of gate
            and one of up an expert; without, one tensor `[e, 2i, h]` of all experts.
        down: the same for down, `[h, i]` an expert or `[e, h, i]`.
    """

    router: str
    gate_up: tuple[str, ...]
    down: str

    @property
    def experts(self) -> str:
        """The name of the experts as a module, "mlp.experts"."""
        return f"{self.router.partition('.')[0]}.experts"


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The experts and the router of a family, in numbers and words; see the module's table.

    Args:
        num_experts: e.
        top_k: experts a token goes to.
        intermediate_size: width i of an expert.
        softmax_over: "all" or "chosen".
        renormalise: whether the chosen probabilities are divided by their sum.
        weight_dtype: dtype that the weights are rounded to.
        dense_layers: the layers that have an ordinary MLP instead.
        names: how the tensors may be called in a checkpoint, the family's own way first.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    softmax_over: Literal["all", "chosen"]
    renormalise: Literal["yes", "no"]
    weight_dtype: Literal["activation", "float32"]
    names: tuple[ExpertNames, ...]
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"a token cannot go to {self.top_k} experts of {self.num_experts}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """The r = t Â· k pairs (token, choice), sorted by expert, stably.

    Args:
        row: int32 `[r]`, the token of a slot.
        out_row: int32 `[r]`, choice Â· t + token: where what a slot gives belongs in `[k, t]`
            flattened.
        weight: float32 `[r]`, what the expert's output is multiplied by.
        sizes: int32 `[e]`, slots of each expert.
        work: the grouped kernels' list of tiles of block_m slots, where it was made along with the
            rest.
        block_m: of work (static).
    """

    row: jax.Array
    out_row: jax.Array
    weight: jax.Array
    sizes: jax.Array
    work: jax.Array | None = None
    block_m: int = field(default=0, metadata={"static": True})


class Router(nnx.Module):
    """The weight `[e, h]` whose product with a token is its affinity to each expert. Never
    quantized."""

    def __init__(self, num_experts: int, hidden: int, *, dtype):
        self.weight: Any = nnx.data(jax.ShapeDtypeStruct((num_experts, hidden), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return ops.float_matmul(x, self.weight)


class Experts(nnx.Module):
    """The stacks of all experts of a layer."""

    def __init__(self, config: MoEConfig, hidden: int, *, dtype):
        e, i = config.num_experts, config.intermediate_size
        self.dtype = jnp.dtype(dtype)
        self.gate_up_proj: Any = nnx.data(jax.ShapeDtypeStruct((e, 2 * i, hidden), dtype))
        self.down_proj: Any = nnx.data(jax.ShapeDtypeStruct((e, hidden, i), dtype))

    def __call__(
        self,
        x: jax.Array,
        experts: jax.Array,
        weights: jax.Array,
        *,
        valid: jax.Array | None = None,
        implementation: ops.Implementation = "auto",
    ) -> jax.Array:
        """The weighted sum of what each token's experts say.

        Args:
            x: float `[t, h]`.
            experts: int32 `[t, k]`, different ones in a row.
            weights: float32 `[t, k]`.
            valid: bool `[t]`, which tokens are not padding; None for all.
            implementation: what runs the products, see `ops`.
        Returns:
            `[t, h]` in the dtype of x; zeros for padding.
        """
        slots = sort_by_expert(experts, weights, self.gate_up_proj.shape[0], valid)
        out = self.on_slots(x, slots, valid=valid, implementation=implementation)
        return out.total() if isinstance(out, PartialSums) else out

    def on_slots(
        self,
        x: jax.Array | QActivation,
        slots: Slots,
        *,
        valid: jax.Array | None = None,
        implementation: ops.Implementation = "auto",
    ) -> jax.Array | PartialSums:
        """The same for sorted slots and for rows that may come quantized; in decode, the sum over
        the choices is left to who reads the result, who reads it anyway."""
        t, h = x.shape
        dtype = x.dtype if isinstance(x, jax.Array) else self.dtype
        # Of out_dtype alone this could not be said: in decode, parts are float32 in every model.
        sums = "precise" if dtype == jnp.float32 else "fast"
        product = functools.partial(_grouped, slots=slots, sums=sums, implementation=implementation)
        y: jax.Array | QActivation | None = fused_ops.grouped_gate_up_for(
            self.down_proj,
            x,
            self.gate_up_proj,
            slots.sizes,
            slots.row,
            work=slots.work,
            block_m_of_work=slots.block_m,
            dtype=dtype,
            implementation=implementation,
        )
        if y is None:
            gate_up = product(x, self.gate_up_proj, rows=slots.row, valid=valid, out_dtype=dtype)
            y = fused_ops.silu_mul_for(self.down_proj, gate_up, implementation=implementation)
        in_use = jnp.arange(slots.row.size, dtype=jnp.int32) < jnp.sum(slots.sizes)
        in_parts = isinstance(y, QActivation) and slots.row.size <= _FEW_SLOTS
        out = product(
            y,
            self.down_proj,
            row_weight=slots.weight,
            out_rows=slots.out_row,
            valid=in_use,
            out_dtype=jnp.dtype(jnp.float32) if in_parts else dtype,
        ).reshape(-1, t, h)
        if in_parts:
            return PartialSums(out, dtype)
        return functools.reduce(jnp.add, (part.astype(jnp.float32) for part in out)).astype(dtype)


class SparseMoE(nnx.Module):
    """Router and experts, in the place of an MLP.

    Args:
        config: a `DecoderConfig` whose `moe` is set.
    """

    def __init__(self, config):
        self.config: MoEConfig = config.moe
        self.gate = Router(config.moe.num_experts, config.hidden_size, dtype=config.dtype)
        self.experts = Experts(config.moe, config.hidden_size, dtype=config.dtype)

    def __call__(self, x: jax.Array | QActivation, step: Step) -> jax.Array | PartialSums:
        """`[b, t, h]`, or its rows quantized and as they were, to `[b, t, h]`."""
        plain = x.plain if isinstance(x, QActivation) else x
        assert plain is not None, "the router reads what was not quantized"
        rows = plain.reshape(-1, plain.shape[-1])
        valid = None if step.valid is None else step.valid.reshape(-1)
        logits, implementation = self.gate(rows), step.implementation
        slots = assign(
            logits,
            self.config,
            valid=valid,
            stack=self.experts.gate_up_proj,
            implementation=implementation,
        )
        quantized = x if isinstance(x, QActivation) else rows
        out = self.experts.on_slots(quantized, slots, valid=valid, implementation=implementation)
        shape = (*step.positions.shape, rows.shape[-1])
        if isinstance(out, PartialSums):
            return PartialSums(out.parts.reshape(-1, *shape), out.dtype)
        return out.reshape(shape)


def assign(
    logits: jax.Array,
    config: MoEConfig,
    *,
    valid: jax.Array | None,
    stack: jax.Array | QArray | SplitQArray,
    implementation: ops.Implementation,
) -> Slots:
    """Send each token to its experts, in one kernel where there is one.

    Args:
        logits: float `[t, e]`.
        config: the family's way.
        valid: bool `[t]`, which tokens are not padding; None for all.
        stack: the first weights that the slots meet.
        implementation: what runs it.
    """
    (t, e), k = logits.shape, config.top_k
    block_m = ops.grouped_block_m(stack, t, t * k, implementation)
    unsupported = (
        "no kernel reads its list"
        if block_m is None
        else expert_routing.why_not(t, e, k, logits.dtype)
    )
    if block_m is None or not runs_kernel(
        "route_experts", implementation, unsupported, otherwise="reference"
    ):
        return sort_by_expert(*route(logits, config), e, valid)
    weight_dtype = logits.dtype.name if config.weight_dtype == "activation" else "float32"
    rule = expert_routing.Rule(k, config.softmax_over, config.renormalise, weight_dtype)
    interpret = interpreting()

    def plain(logits: jax.Array, valid: jax.Array | None) -> jax.Array:
        return sort_by_expert(*route(logits, config), e, valid).weight

    def kernel(logits: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, Any]:
        row, out_row, weight, *rest = expert_routing.route_experts_triton(
            logits, rule, block_m, valid=valid, interpret=interpret
        )
        return weight, (row, out_row, *rest)

    weight, (row, out_row, sizes, work) = gradients.with_gradient_of(plain, kernel, logits, valid)
    return Slots(row, out_row, weight, sizes, work, block_m)


def route(logits: jax.Array, config: MoEConfig) -> tuple[jax.Array, jax.Array]:
    """Choose experts and weigh them.

    Args:
        logits: float `[t, e]`.
        config: the family's way.
    Returns:
        experts int32 `[t, k]`, the strongest first, of equals the lower index; weights float32
        `[t, k]`.
    """
    wide = rounded(logits.astype(jnp.float32), logits.dtype)
    if config.softmax_over == "chosen":
        strongest, experts = lax.top_k(wide, config.top_k)
        weights = jax.nn.softmax(strongest, axis=-1)
    else:
        weights, experts = lax.top_k(jax.nn.softmax(wide, axis=-1), config.top_k)
    if config.renormalise == "yes":
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    if config.weight_dtype == "activation":
        weights = rounded(weights, logits.dtype)
    return experts, weights


def sort_by_expert(
    experts: jax.Array, weights: jax.Array, num_experts: int, valid: jax.Array | None = None
) -> Slots:
    """Sort the pairs (token, choice) by expert; those of padding come last and belong to no one.

    Args:
        experts: int32 `[t, k]`.
        weights: float32 `[t, k]`.
        num_experts: e.
        valid: bool `[t]`, which tokens are not padding; None for all.
    """
    t, k = experts.shape
    if valid is not None:
        experts = jnp.where(valid[:, None], experts, jnp.int32(num_experts))
    key = experts.reshape(-1)
    pair = jnp.argsort(key, stable=True).astype(jnp.int32)
    sizes = jnp.zeros(num_experts, jnp.int32).at[key].add(1, mode="drop")
    return Slots(
        row=pair // k,
        out_row=pair % k * t + pair // k,
        weight=weights.reshape(-1)[pair],
        sizes=sizes,
    )


def _grouped(
    x: jax.Array | QActivation,
    w: jax.Array | QArray | SplitQArray,
    *,
    slots: Slots,
    rows: jax.Array | None = None,
    row_weight: jax.Array | None = None,
    out_rows: jax.Array | None = None,
    valid: jax.Array | None = None,
    out_dtype: jnp.dtype,
    sums: Literal["fast", "precise"],
    implementation: ops.Implementation,
) -> jax.Array:
    per_slot = {"rows": rows, "row_weight": row_weight, "out_rows": out_rows}
    if not isinstance(w, QArray | SplitQArray):
        assert not isinstance(x, QActivation), (
            "activations are quantized for quantized weights only"
        )
        return ops.grouped_matmul(x, w, slots.sizes, **per_slot)
    return ops.grouped_scaled_matmul(
        x,
        w,
        slots.sizes,
        **per_slot,
        work=slots.work,
        block_m_of_work=slots.block_m,
        out_dtype=out_dtype,
        sums=sums,
        valid=valid,
        implementation=implementation,
    )
