"""Mixture of experts between the router's logits and the residual stream.

    route                  logits -> which slots belong to whom (`Slots`)
    gate_up                silu(x @ gate.T) · (x @ up.T) of each slot's expert
    grouped_linear         one product of sorted slots with a stack, floats or FP8
    down                   the second product, weighted and put back in the order of the tokens

A stack is an array `[e, n, k]`, a `QArray`, or a `SplitQArray`. In decode on a GPU the layer's
experts are four kernels: route, gate_up, silu·mul with quantization, down; the sum over a token's
experts is left to the norm that follows. Where an expert gets 64 to 255 slots, gate_up and silu·mul
are one kernel with block scales (`pallas_kernels/grouped_gate_up.py`).

All of them differentiate with respect to x and the weights of slots; see `gradients`.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax import no_gradient
from fp8jax.ops import gradients
from fp8jax.ops.activation import silu_mul
from fp8jax.ops.choice import Choice, Implementation, choose
from fp8jax.ops.matmul import quantize_activation, weight_only_matmul
from fp8jax.ops.values import PartialSums, QActivation, Summed
from fp8jax.pallas_kernels import expert_routing, grouped_gate_up
from fp8jax.pallas_kernels import grouped_matmul as grouped_kernel
from fp8jax.pallas_kernels.expert_routing import Rule
from fp8jax.pallas_kernels.formats import ActivationGranularity
from fp8jax.pallas_kernels.grouped_matmul import Slots
from fp8jax.pallas_kernels.grouped_matmul_kernel import grouped_scaled_matmul_triton
from fp8jax.pallas_kernels.matmul_config import Config
from fp8jax.pallas_kernels.silu_mul_quantize import silu_mul as plain_silu_mul
from fp8jax.qarray import QArray, SplitQArray, dequantize

Stack = jax.Array | QArray | SplitQArray

# So few slots that writing what each expert gives in float32 costs next to nothing.
_FEW_SLOTS = 1024


def route(
    logits: jax.Array,
    rule: Rule,
    stack: Stack,
    *,
    valid: jax.Array | None = None,
    implementation: Implementation | Choice = "auto",
) -> Slots:
    """Send each token to its experts, in one kernel where there is one.

    Args:
        logits: float `[t, e]`.
        rule: the family's way.
        stack: the first weights that the slots meet, whose kernel reads the list of tiles.
        valid: bool `[t]`, which tokens are not padding; None for all.
        implementation: what runs it.
    """
    choice, (t, e) = choose(implementation), logits.shape
    first = _parts(stack)[0]
    config = None
    if isinstance(first, QArray):
        config = _kernel_config(first, t, t * rule.top_k, choice, told=False)
    block_m = config.block_m if config else 0

    def why_not(_: Any) -> str | None:
        if not block_m:
            return "no kernel reads its list"
        return expert_routing.why_not(t, e, rule.top_k, logits.dtype)

    if not choice.runs_kernel("route_experts", why_not, fusion=True):
        return expert_routing.sort_by_expert(*expert_routing.route(logits, rule), e, valid)
    interpret = choice.interpret

    def plain(logits: jax.Array, valid: jax.Array | None) -> jax.Array:
        slots = expert_routing.sort_by_expert(*expert_routing.route(logits, rule), e, valid)
        assert slots.weight is not None
        return slots.weight

    def kernel(logits: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, Any]:
        slots = expert_routing.route_experts_triton(
            logits, rule, block_m, valid=valid, interpret=interpret
        )
        return slots.weight, replace(slots, weight=None)

    weight, slots = gradients.with_gradient_of(plain, kernel, logits, valid)
    return replace(slots, weight=weight)


def gate_up(
    x: jax.Array | QActivation,
    w: Stack,
    slots: Slots,
    *,
    dtype: jax.typing.DTypeLike,
    quantized: ActivationGranularity | None = None,
    valid: jax.Array | None = None,
    implementation: Implementation | Choice = "auto",
) -> jax.Array | QActivation:
    """silu(gate) · up of every slot.

    Args:
        x: `[t, k]`.
        w: the stack of gate and up `[e, 2i, k]`.
        slots: which of them read which row.
        dtype: of activations.
        quantized: how the weight that reads the result wants it.
        valid: bool `[t]`, rows that count for per-tensor activations.
        implementation: what runs it.
    Returns:
        `[r, i]`.
    """
    choice = choose(implementation)
    fused = _fused_gate_up(x, w, slots, dtype, quantized, choice)
    if fused is not None:
        return fused
    y = grouped_linear(
        x,
        w,
        slots.reading(),
        out_dtype=dtype,
        precise=dtype == jnp.float32,
        valid=valid,
        implementation=choice,
    )
    return silu_mul(y, quantized=quantized, implementation=choice)


def down(
    x: jax.Array | QActivation,
    w: Stack,
    slots: Slots,
    tokens: int,
    *,
    dtype: jax.typing.DTypeLike,
    implementation: Implementation | Choice = "auto",
) -> Summed:
    """The weighted sum of what each token's experts say.

    Args:
        x: `[r, i]`, one row a slot.
        w: the stack `[e, h, i]`.
        slots: whose results they are.
        tokens: t.
        dtype: of activations.
        implementation: what runs it.
    Returns:
        `[t, h]`, zeros for padding; in a decode step in pieces, one a choice.
    """
    choice, h = choose(implementation), w.shape[1]
    assert slots.row is not None
    in_use = jnp.arange(slots.row.size, dtype=jnp.int32) < jnp.sum(slots.sizes)
    in_pieces = isinstance(x, QActivation) and slots.row.size <= _FEW_SLOTS
    out = grouped_linear(
        x,
        w,
        slots.writing(),
        out_dtype=jnp.float32 if in_pieces else dtype,
        precise=dtype == jnp.float32,
        valid=in_use,
        implementation=choice,
    ).reshape(-1, tokens, h)
    if in_pieces:
        return PartialSums(out, dtype)
    # In float32, in the order of the choices.
    return functools.reduce(jnp.add, (part.astype(jnp.float32) for part in out)).astype(dtype)


def grouped_linear(
    x: jax.Array | QActivation,
    w: Stack,
    slots: Slots,
    *,
    out_dtype: jax.typing.DTypeLike,
    precise: bool = False,
    valid: jax.Array | None = None,
    implementation: Implementation | Choice = "auto",
) -> jax.Array:
    """A product of sorted slots with whichever stack a layer has: `grouped_scaled_matmul` or
    `grouped_matmul`."""
    if isinstance(w, QArray | SplitQArray):
        return grouped_scaled_matmul(
            x,
            w,
            slots,
            out_dtype=out_dtype,
            precise=precise,
            valid=valid,
            implementation=implementation,
        )
    assert isinstance(x, jax.Array), "activations are quantized for quantized weights only"
    return grouped_matmul(x, w, slots)


def grouped_scaled_matmul(
    x: jax.Array | QActivation,
    w: QArray | SplitQArray,
    slots: Slots,
    *,
    out_dtype: jax.typing.DTypeLike | None = None,
    precise: bool = False,
    valid: jax.Array | None = None,
    implementation: Implementation | Choice = "auto",
) -> jax.Array:
    """Every row times the weight of its own expert, in FP8.

    Args:
        x: float `[m, k]`, or the same quantized with the granularity of the scheme.
        w: quantized stack `[e, n, k]`, whole or in parts.
        slots: r of them, sorted by expert.
        out_dtype: dtype of the result; that of a float x by default, bfloat16 for a quantized one.
        precise: what float32 activations deserve: partial sums promoted every 128 inputs whatever k
            is. Of out_dtype alone it could not be said: in decode, pieces are float32 in every
            model.
        valid: bool `[m]`, rows of x that count for per-tensor activations.
        implementation: what runs it.
    Returns:
        `[r, n]`, zeros for slots that belong to no expert.
    Raises:
        ValueError: shapes or granularities that do not belong together.
        NotImplementedError: "triton" was named and has no kernel for this.
    """
    choice = choose(implementation)
    if out_dtype is None:
        out_dtype = jnp.dtype(jnp.bfloat16 if isinstance(x, QActivation) else x.dtype)
    slots.check("grouped_scaled_matmul", x.shape, w.shape)
    w, out_dtype = no_gradient.constant_weight(w), jnp.dtype(out_dtype)
    if not isinstance(x, QActivation):
        if choice.weight_only:
            return _weight_only_grouped_matmul(x, w, slots, out_dtype)
        x = quantize_activation(x, w.scheme.activation, valid=valid, implementation=choice)
    if x.granularity != w.scheme.activation:
        raise ValueError(
            f"grouped_scaled_matmul: x was quantized per {x.granularity}, but scheme "
            f"{w.scheme.name!r} wants {w.scheme.activation}"
        )
    m, count, interpret = x.shape[0], slots.count(x.shape[0]), choice.interpret
    configs = [_kernel_config(part, m, count, choice, precise=precise) for part in _parts(w)]

    def forward(carrier: Any, weight: Any, x: QActivation, w: Any, slots: Slots) -> jax.Array:
        del carrier
        slots = replace(slots, weight=weight)
        outputs = [
            _product_of_codes(x, part, slots, out_dtype, config, interpret=interpret)
            for part, config in zip(_parts(w), configs, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)

    operands = (x.carrier, slots.weight, x.without_carrier(), w, replace(slots, weight=None))
    dtype = None if x.carrier is None else x.carrier.dtype
    return gradients.with_backward(forward, _backward(dtype), *operands, kept=lambda _, *kept: kept)


def grouped_matmul(x: jax.Array, w: jax.Array, slots: Slots) -> jax.Array:
    """The same with unquantized experts.

    Args:
        x: float `[m, k]`.
        w: stack `[e, n, k]` of the same dtype.
        slots: r of them, sorted by expert.
    Returns:
        `[r, n]` in the dtype of x.
    """
    slots.check("grouped_matmul", x.shape, w.shape)

    def forward(x: jax.Array, w: jax.Array, weight: Any, slots: Slots) -> jax.Array:
        return grouped_kernel.grouped_matmul_reference(x, w, replace(slots, weight=weight))

    def backward(kept: tuple[Any, ...], dy: jax.Array) -> tuple[Any, ...]:
        x, w, weight, slots = kept
        slots = replace(slots, weight=weight)
        dx, d_weight = gradients.grouped_backward(
            dy,
            lambda expert: grouped_kernel.pick(w, expert),
            lambda: x,
            x.shape,
            slots,
            dtype=x.dtype,
        )
        return dx, gradients.grouped_weight_gradient(x, dy, slots), d_weight, None

    return gradients.with_backward(
        forward, backward, x, w, slots.weight, replace(slots, weight=None)
    )


def _fused_gate_up(
    x: jax.Array | QActivation,
    w: Stack,
    slots: Slots,
    dtype: jax.typing.DTypeLike,
    quantized: ActivationGranularity | None,
    choice: Choice,
) -> QActivation | None:
    """`gate_up` in one kernel, where there is one and it pays; None elsewhere."""
    if not isinstance(w, QArray) or w.row_groups != 2 or quantized != "group":
        return None
    if (w.scheme.weight, w.scheme.activation) != ("block", "group"):
        return None
    (num_experts, n, k), count, m = w.shape, slots.count(x.shape[0]), x.shape[0]

    def why_not(gpu: Any) -> str | None:
        if not grouped_gate_up.pays(count, num_experts):
            return f"it does not pay with {count} slots for {num_experts} experts"
        return grouped_gate_up.why_not(gpu, m, count, num_experts, n, k)

    if not choice.runs_kernel("grouped_gate_up", why_not, fusion=True):
        return None
    if not isinstance(x, QActivation):
        x = quantize_activation(x, "group", scale_layout="gm", implementation=choice)
    if x.granularity != "group":
        raise ValueError(
            f"grouped_gate_up: x was quantized per {x.granularity}, but scheme {w.scheme.name!r} "
            "wants group"
        )
    layout, interpret = x.scale_layout, choice.interpret
    x_dtype = None if x.carrier is None else x.carrier.dtype

    def kernel(carrier: Any, x: QActivation, w: QArray, slots: Slots) -> tuple[jax.Array, ...]:
        del carrier
        codes, scale = grouped_gate_up.grouped_gate_up_triton(
            x.qvalue,
            x.scale,
            w.qvalue,
            w.scale,
            slots,
            dtype=dtype,
            x_scale_layout=layout,
            interpret=interpret,
        )
        return jnp.zeros((count, n // 2), dtype), codes, scale

    def backward(kept: tuple[Any, ...], cotangents: tuple[jax.Array, ...]) -> tuple[Any, ...]:
        if x_dtype is None:
            return (None,) * 4
        x, w, slots = kept

        def plain(carrier: jax.Array) -> jax.Array:
            # gate_up is computed once more, which is what not writing it costs.
            runs: Any = "xla" if interpret else choice
            carrying = replace(x, carrier=carrier)
            y = grouped_scaled_matmul(carrying, w, slots, out_dtype=dtype, implementation=runs)
            return plain_silu_mul(y)

        (dx,) = jax.vjp(plain, jnp.zeros(x.shape, x_dtype))[1](cotangents[0])
        return dx, None, None, None

    operands = x.carrier, x.without_carrier(), no_gradient.constant_weight(w), slots.reading()
    carrier, codes, scale = gradients.with_backward(
        kernel, backward, *operands, kept=lambda _, *kept: kept
    )
    codes, scale = lax.stop_gradient((codes, scale))
    return QActivation(codes, scale, "group", "gm", carrier=carrier)


def _product_of_codes(
    x: QActivation,
    w: QArray,
    slots: Slots,
    out_dtype: jnp.dtype,
    config: Config | None,
    *,
    interpret: bool,
) -> jax.Array:
    options: dict[str, Any] = {"granularity": w.scheme.weight, "row_groups": w.row_groups}
    if config is None:
        return grouped_kernel.grouped_scaled_matmul_reference(
            x.qvalue, x.scale_by_row(), w.qvalue, w.scale, slots, out_dtype=out_dtype, **options
        )
    return grouped_scaled_matmul_triton(
        x.qvalue,
        x.scale,
        w.qvalue,
        w.scale,
        slots,
        out_dtype=out_dtype,
        x_scale_layout=x.scale_layout,
        config=config,
        interpret=interpret,
        **options,
    )


def _kernel_config(
    w: QArray, m: int, slots: int, choice: Choice, *, precise: bool = False, told: bool = True
) -> Config | None:
    """The tiles that the kernel for m rows in so many slots runs with; None where the reference
    runs instead."""
    e, n, k = w.shape
    granularity = w.scheme.granularity
    scales = "block" if granularity.changes_along_k else "tensor"  # what decides about tiles
    precise = precise and not granularity.changes_along_k
    return choice.config(
        "grouped_scaled_matmul",
        lambda gpu: grouped_kernel.why_not(gpu, m, e, n, k),
        lambda gpu: grouped_kernel.default_config(
            gpu,
            slots,
            e,
            n,
            k,
            row_groups=w.row_groups,
            scales=w.scheme.weight,
            precise=precise,
        ),
        shape={
            "slots": slots,
            "experts": e,
            "n": n,
            "k": k,
            "row_groups": w.row_groups,
            "scales": scales,
        },
        measured=not precise,
        told=told,
    )


def _weight_only_grouped_matmul(
    x: jax.Array, w: QArray | SplitQArray, slots: Slots, out_dtype: jax.typing.DTypeLike
) -> jax.Array:
    def forward(x: jax.Array, weight: Any, codes: Any, w: Any, slots: Slots) -> jax.Array:
        del codes

        def product(expert: jax.Array, tile_rows: jax.Array) -> jax.Array:
            parts = (
                weight_only_matmul(x[tile_rows], _expert(part, expert), None, jnp.float32)
                for part in _parts(w)
            )
            return jnp.concatenate(list(parts), axis=1)

        slots = replace(slots, weight=weight)
        return grouped_kernel.over_tiles(
            product, slots, m=x.shape[0], n=w.shape[1], out_dtype=out_dtype
        )

    operands = (x, slots.weight, lax.stop_gradient(x), w, replace(slots, weight=None))
    return gradients.with_backward(
        forward, _backward(x.dtype), *operands, kept=lambda _, *kept: kept
    )


def _backward(
    dtype: jax.typing.DTypeLike | None,
) -> Callable[[Any, jax.Array], tuple[Any, ...]]:
    """The backward rule of a grouped product of (carrier, weight of slots, x, w, slots)."""

    def backward(kept: tuple[Any, ...], dy: jax.Array) -> tuple[Any, ...]:
        weight, x, w, slots = kept

        def weight_of(expert: jax.Array) -> jax.Array:
            return jnp.concatenate([dequantize(_expert(part, expert)) for part in _parts(w)])

        dx, d_weight = gradients.grouped_backward(
            dy,
            weight_of,
            lambda: x.dequantized() if isinstance(x, QActivation) else x,
            x.shape,
            replace(slots, weight=weight),
            dtype=jnp.float32 if dtype is None else dtype,
        )
        return None if dtype is None else dx, d_weight, None, None, None

    return backward


def _parts(w: Stack) -> tuple[Any, ...]:
    return w.parts if isinstance(w, SplitQArray) else (w,)


def _expert(stack: QArray, expert: jax.Array) -> QArray:
    codes = grouped_kernel.pick_codes(stack.qvalue, expert)
    scale = grouped_kernel.pick(stack.scale, expert)
    return QArray(codes, scale, stack.scheme, stack.row_groups)
