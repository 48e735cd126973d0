"""The products that a layer calls, and the choice of what runs them.

`implementation` says what:
    "xla"     the plain-jnp reference in the kernel's file; works on every device
    "triton"  the Pallas-Triton kernel; raises where there is none for the device, shape or scheme
    "auto"    what is fastest for device and shape, see `kernel_choice`

x is quantized here unless it comes quantized (`QActivation`), so that an operation which has just
produced x can hand over codes instead (`fused_ops`). At the other end a product may stay in pieces
(`PartialSums`): a kernel that splits k leaves a sum to its successor, which reads the result
anyway.

Where "auto" finds a GPU without FP8 tensor cores, weights stay FP8 in memory and products are those
of the activation dtype: x @ (q Â· s).T with x as it is.

All of them differentiate with respect to x, the bias and the weights of slots; see `gradients`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax import no_gradient
from fp8jax.ops import choice as kernel_choice
from fp8jax.ops import gradients
from fp8jax.ops.choice import IMPLEMENTATIONS as IMPLEMENTATIONS
from fp8jax.ops.choice import Implementation as Implementation
from fp8jax.pallas_kernels import block_scaled_matmul as block_kernel
from fp8jax.pallas_kernels import grouped_matmul as grouped_kernel
from fp8jax.pallas_kernels import matmul_config, matmul_tiles, quantize, widened_dot
from fp8jax.pallas_kernels import scaled_matmul as scaled_kernel
from fp8jax.pallas_kernels.formats import BLOCK, ActivationGranularity
from fp8jax.pallas_kernels.grouped_matmul import (
    grouped_matmul_reference,
    grouped_scaled_matmul_reference,
)
from fp8jax.pallas_kernels.grouped_matmul_kernel import grouped_scaled_matmul_triton
from fp8jax.pallas_kernels.interpret_mode import interpreting
from fp8jax.pallas_kernels.quantize import ScaleLayout
from fp8jax.qarray import QArray, SplitQArray, dequantize


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
            if self.granularity == "group" and self.scale_layout == "gm"
            else self.scale
        )

    def dequantized(self) -> jax.Array:
        """The activations that the codes stand for: float32 `[m, k]`."""
        scale, k = self.scale_by_row(), self.shape[1]
        if self.granularity == "group":
            scale = jnp.repeat(scale, BLOCK, axis=1)[:, :k]
        return self.qvalue.astype(jnp.float32) * scale.reshape(-1, scale.shape[-1])

    def without_carrier(self) -> "QActivation":
        """Codes and scales alone, and an error for who differentiates with respect to them."""
        codes, scale = gradients.constant_activation((self.qvalue, self.scale))
        return QActivation(codes, scale, self.granularity, self.scale_layout)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PartialSums:
    """A product `[..., n]` in pieces that are still to be added up.

    Args:
        parts: float32 `[splits, ..., n]`.
        dtype: what their sum is rounded to (static).
    """

    parts: jax.Array
    dtype: jax.typing.DTypeLike = field(metadata={"static": True})

    def total(self) -> jax.Array:
        return matmul_tiles.sum_of_splits(self.parts, self.dtype)


def quantize_activation(
    x: jax.Array,
    granularity: ActivationGranularity,
    *,
    valid: jax.Array | None = None,
    scale_layout: ScaleLayout = "mg",
    implementation: Implementation = "auto",
) -> QActivation:
    """Quantize rows of activations. The gradient passes as if nothing were rounded.

    Args:
        x: float `[m, k]`.
        granularity: "token", "group" or "tensor".
        valid: bool `[m]`, rows that count for the amax of "tensor".
        scale_layout: of "group" scales.
        implementation: what runs it.
    Raises:
        NotImplementedError: "triton" was named and has no kernel for this.
    """
    m, k = x.shape
    unsupported = quantize.why_not(m, k, x.dtype, granularity)
    carrier, x = x, lax.stop_gradient(x)
    if kernel_choice.runs_kernel("quantize_activation", implementation, unsupported):
        codes, scale = quantize.quantize_activation_triton(
            x, granularity, scale_layout=scale_layout, interpret=interpreting()
        )
    else:
        codes, scale = quantize.quantize_activation_reference(x, granularity, valid=valid)
        scale = scale.T if granularity == "group" and scale_layout == "gm" else scale
    return QActivation(codes, scale, granularity, scale_layout, carrier=carrier)


def scaled_matmul(
    x: jax.Array | QActivation,
    w: QArray,
    *,
    bias: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    valid: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """x @ w.T + bias in FP8, activations quantized as the weight's scheme says.

    Args:
        x: float `[m, k]`, or the same quantized with the granularity of the scheme.
        w: quantized weight `[n, k]`, any n and k.
        bias: float `[n]`.
        out_dtype: dtype of the result; that of a float x by default, bfloat16 for a quantized one.
        valid: bool `[m]`, rows that count for per-tensor activations.
        implementation: what runs it.
    Returns:
        `[m, n]`.
    Raises:
        ValueError: shapes or granularities that do not belong together.
        NotImplementedError: "triton" was named and has no kernel for this.
    """
    out = _scaled_matmul(x, w, bias, out_dtype, valid, implementation, sums="added")
    assert isinstance(out, jax.Array)
    return out


def scaled_matmul_in_parts(
    x: jax.Array | QActivation,
    w: QArray,
    *,
    bias: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    valid: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array | PartialSums:
    """`scaled_matmul` for an operation that can add up the pieces itself; an array where k was not
    split."""
    return _scaled_matmul(x, w, bias, out_dtype, valid, implementation, sums="in parts")


def _scaled_matmul(
    x: jax.Array | QActivation,
    w: QArray,
    bias: jax.Array | None,
    out_dtype: jax.typing.DTypeLike | None,
    valid: jax.Array | None,
    implementation: Implementation,
    *,
    sums: Literal["added", "in parts"],
) -> jax.Array | PartialSums:
    if out_dtype is None:
        out_dtype = jnp.dtype(jnp.bfloat16 if isinstance(x, QActivation) else x.dtype)
    (m, k), w_shape = x.shape, w.shape
    if len(w_shape) != 2 or k != w_shape[1]:
        raise ValueError(
            f"scaled_matmul: x [m, k] is {(m, k)} and w [n, k] is {w_shape}; k must be the same"
        )
    w = no_gradient.constant_weight(w)
    if not isinstance(x, QActivation):
        if kernel_choice.weight_only(implementation):
            return _weight_only_matmul(x, w, bias, out_dtype)
        layout: ScaleLayout = (
            "gm" if kernel_choice.device_kind(implementation) else "mg"
        )  # as the kernel reads them
        x = quantize_activation(
            x, w.scheme.activation, valid=valid, scale_layout=layout, implementation=implementation
        )
    if x.granularity != w.scheme.activation:
        raise ValueError(
            f"scaled_matmul: x was quantized per {x.granularity}, but scheme {w.scheme.name!r} "
            f"wants {w.scheme.activation}"
        )
    out_dtype = jnp.dtype(out_dtype)
    config = _kernel_config(w, m, out_dtype, implementation)
    splits, per_split = config.splits(k) if config and m else (1, 0)
    in_parts = sums == "in parts" and splits > 1
    width = (
        per_split * config.block_k if config and in_parts else k
    )  # of the inputs that a part sums over
    interpret = interpreting()
    x_dtype, bias_dtype = (None if array is None else array.dtype for array in (x.carrier, bias))

    def forward(
        carrier: jax.Array | None, x: QActivation, w: QArray, bias: jax.Array | None
    ) -> jax.Array | PartialSums:
        del carrier
        return _product_of_codes(
            x, w, bias, out_dtype, config, "in parts" if in_parts else "added", interpret
        )

    def backward(
        w: QArray, dy: jax.Array | PartialSums
    ) -> tuple[jax.Array | None, None, None, jax.Array | None]:
        parts, dx, d_bias = dy.parts if isinstance(dy, PartialSums) else dy[None], None, None
        if x_dtype is not None:
            columns = jnp.split(dequantize(w), list(range(width, k, width)), axis=1)
            pieces = [
                gradients.product_with(*of_part, x_dtype)
                for of_part in zip(parts, columns, strict=True)
            ]
            dx = jnp.concatenate(pieces, axis=1).astype(x_dtype)
        if bias_dtype is not None:
            d_bias = jnp.sum(parts[0].astype(jnp.float32), axis=0).astype(
                bias_dtype
            )  # the first part adds it
        return dx, None, None, d_bias

    operands = x.carrier, x.without_carrier(), w, bias
    return gradients.with_backward(forward, backward, *operands, kept=lambda carrier, x, w, bias: w)


def _product_of_codes(
    x: QActivation,
    w: QArray,
    bias: jax.Array | None,
    out_dtype: jnp.dtype,
    config: matmul_config.Config | None,
    sums: Literal["added", "in parts"],
    interpret: bool,
) -> jax.Array | PartialSums:
    blocks = w.scheme.weight == "block"
    operands = (x.qvalue, x.scale, w.qvalue, w.scale)
    if config is None:
        reference = (
            block_kernel.block_scaled_matmul_reference
            if blocks
            else scaled_kernel.scaled_matmul_reference
        )
        return reference(
            x.qvalue, x.scale_by_row(), w.qvalue, w.scale, bias=bias, out_dtype=out_dtype
        )
    options = {"bias": bias, "config": config, "interpret": interpret}
    if blocks:
        options["x_scale_layout"] = x.scale_layout
    if sums == "in parts":
        in_parts = (
            block_kernel.block_scaled_matmul_partials
            if blocks
            else scaled_kernel.scaled_matmul_partials
        )
        return PartialSums(in_parts(*operands, **options), out_dtype)
    whole = (
        block_kernel.block_scaled_matmul_triton if blocks else scaled_kernel.scaled_matmul_triton
    )
    return whole(*operands, out_dtype=out_dtype, **options)


def _kernel_config(
    w: QArray, m: int, out_dtype: jnp.dtype, implementation: Implementation
) -> matmul_config.Config | None:
    """The tiles that the kernel for m rows runs with: measured, else by rule; None where the
    reference runs instead."""
    (n, k), op = w.shape, "block_scaled_matmul" if w.scheme.weight == "block" else "scaled_matmul"
    kind = kernel_choice.device_kind(implementation)
    unsupported = matmul_config.why_not(kind, m, n, k) if kind else None
    if not kernel_choice.runs_kernel(op, implementation, unsupported):
        return None
    if (
        op == "scaled_matmul" and out_dtype == jnp.float32
    ):  # who asks for float32 asks for a sum that loses nothing
        return matmul_config.default_scaled_config(kind, m, n, k, precise=True)
    measured = kernel_choice.tuned(op, implementation, m=m, n=n, k=k)
    if measured is not None and implementation == "auto" and measured.implementation == "xla":
        return None
    if measured is not None:
        return matmul_config.Config(**measured.config)
    by_rule = scaled_kernel.default_config if op == "scaled_matmul" else block_kernel.default_config
    return by_rule(kind, m, n, k)


def _weight_only_matmul(
    x: jax.Array, w: QArray, bias: jax.Array | None, out_dtype: jax.typing.DTypeLike
) -> jax.Array:
    if w.scheme.weight == "block":
        # One rounding more than scaling the sums, but a sum over k meets many blocks.
        return float_matmul(x, dequantize(w).astype(x.dtype), bias=bias).astype(out_dtype)
    # Codes are exact in every activation dtype, also times the power of two in the scale, without
    # which sums might overflow. It ends at 2⁻¹⁰⁰, where they no longer can and the smallest code
    # would vanish; float16 activations are too small for either.
    scale = jnp.atleast_1d(w.scale).reshape(-1, 1)
    power = lax.bitcast_convert_type(
        lax.bitcast_convert_type(scale, jnp.uint32) & jnp.uint32(255 << 23), jnp.float32
    )
    power = (
        jnp.ones_like(scale)
        if x.dtype == jnp.float16
        else jnp.maximum(power, jnp.float32(2.0**-100))
    )
    codes = w.qvalue.astype(x.dtype) * power.astype(x.dtype)
    out = lax.dot_general(
        x,
        codes,
        (((1,), (1,)), ((), ())),
        precision=precision_of(x.dtype),
        preferred_element_type=jnp.float32,
    )
    out = out * (scale / power).reshape(1, -1)
    return _with_bias(out, bias).astype(out_dtype)


def float_matmul(x: jax.Array, w: jax.Array, *, bias: jax.Array | None = None) -> jax.Array:
    """x @ w.T + bias with an unquantized weight; float32 means float32 on GPUs too, not TF32.

    Args:
        x: float `[..., k]`.
        w: float `[n, k]` of the same dtype.
        bias: float `[n]`, added in float32.
    Returns:
        `[..., n]` in the dtype of x.
    """
    return _with_bias(product(x, w), bias).astype(x.dtype)


def _with_bias(out: jax.Array, bias: jax.Array | None) -> jax.Array:
    return (
        out
        if bias is None
        else out + bias.astype(jnp.float32).reshape((1,) * (out.ndim - 1) + (-1,))
    )


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w.T in float32, for x `[..., k]` and w `[n, k]` of one dtype."""
    return widened_dot.dot(x, w) if x.dtype == jnp.float32 else widened_dot.narrow_dot(x, w)


def grouped_scaled_matmul(
    x: jax.Array | QActivation,
    w: QArray | SplitQArray,
    sizes: jax.Array,
    *,
    rows: jax.Array | None = None,
    row_weight: jax.Array | None = None,
    out_rows: jax.Array | None = None,
    work: jax.Array | None = None,
    block_m_of_work: int = 0,
    sums: Literal["fast", "precise"] = "fast",
    out_dtype: jax.typing.DTypeLike | None = None,
    valid: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Every row times the weight of its own expert, in FP8; rows come sorted by expert.

    Args:
        x: float `[m, k]`, or the same quantized with the granularity of the scheme.
        w: quantized stack `[e, n, k]`, whole or in parts.
        sizes: int32 `[e]`, how many of the r sorted slots each expert has; slots beyond their sum
            give zeros.
        rows: int32 `[r]`, the row of x that a slot reads; None where slot i reads row i.
        row_weight: float32 `[r]`, multiplies a slot's result before it is rounded.
        out_rows: int32 `[r]`, a permutation: the row of the result that a slot becomes; None where
            slot i becomes row i.
        work, block_m_of_work: the kernel's list of tiles of so many slots, from who has it already.
        sums: "precise" for what float32 activations deserve: partial sums promoted every 128 inputs
            whatever k is.
        out_dtype: dtype of the result; that of a float x by default, bfloat16 for a quantized one.
        valid: bool `[m]`, rows of x that count for per-tensor activations.
        implementation: what runs it.
    Returns:
        `[r, n]`.
    Raises:
        ValueError: shapes or granularities that do not belong together.
        NotImplementedError: "triton" was named and has no kernel for this.
    """
    if out_dtype is None:
        out_dtype = jnp.dtype(jnp.bfloat16 if isinstance(x, QActivation) else x.dtype)
    per_slot = {"rows": rows, "row_weight": row_weight, "out_rows": out_rows}
    _check_groups("grouped_scaled_matmul", x.shape, w.shape, sizes, per_slot)
    w, out_dtype = no_gradient.constant_weight(w), jnp.dtype(out_dtype)
    if not isinstance(x, QActivation):
        if kernel_choice.weight_only(implementation):
            return _weight_only_grouped_matmul(x, w, sizes, per_slot, out_dtype)
        x = quantize_activation(x, w.scheme.activation, valid=valid, implementation=implementation)
    if x.granularity != w.scheme.activation:
        raise ValueError(
            f"grouped_scaled_matmul: x was quantized per {x.granularity}, but scheme "
            f"{w.scheme.name!r} wants {w.scheme.activation}"
        )
    if w.scheme.weight == "channel":
        raise ValueError(
            f"grouped_scaled_matmul: stacks of experts have no scales per channel, got {w.scheme}"
        )
    slots = x.shape[0] if rows is None else rows.shape[0]
    interpret = interpreting()
    configs = [
        _grouped_kernel_config(part, x.shape[0], slots, implementation, sums=sums)
        for part in _parts(w)
    ]

    def forward(carrier, per_slot, x, w, sizes, work) -> jax.Array:
        del carrier
        outputs = [
            _grouped_product_of_codes(
                x,
                part,
                sizes,
                per_slot,
                work if config and block_m_of_work == config.block_m else None,
                out_dtype,
                config,
                interpret,
            )
            for part, config in zip(_parts(w), configs, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)

    operands = (x.carrier, per_slot, x.without_carrier(), w, sizes, work)
    return gradients.with_backward(
        forward, _grouped_backward(x.carrier), *operands, kept=lambda _, *kept: kept
    )


def _grouped_backward(carrier: jax.Array | None) -> Callable[[Any, jax.Array], tuple[Any, ...]]:
    """The backward rule of a grouped product of (carrier, per_slot, x, w, sizes, work)."""
    dtype = None if carrier is None else carrier.dtype

    def backward(kept: tuple[Any, ...], dy: jax.Array) -> tuple[Any, ...]:
        per_slot, x, w, sizes, _ = kept

        def weight_of(expert: jax.Array) -> jax.Array:
            return jnp.concatenate([dequantize(_expert(part, expert)) for part in _parts(w)])

        dx, d_row_weight = gradients.grouped_backward(
            dy,
            weight_of,
            lambda: x.dequantized() if isinstance(x, QActivation) else x,
            x.shape,
            sizes,
            **per_slot,
            dtype=jnp.float32 if dtype is None else dtype,
        )
        d_per_slot = {"rows": None, "row_weight": d_row_weight, "out_rows": None}
        return None if dtype is None else dx, d_per_slot, None, None, None, None

    return backward


def _parts(w: QArray | SplitQArray) -> tuple[QArray, ...]:
    return w.parts if isinstance(w, SplitQArray) else (w,)


def _expert(stack: QArray, expert: jax.Array) -> QArray:
    codes, scale = (
        grouped_kernel.pick_codes(stack.qvalue, expert),
        grouped_kernel.pick(stack.scale, expert),
    )
    return QArray(codes, scale, stack.scheme, stack.row_groups)


def _grouped_product_of_codes(
    x: QActivation,
    w: QArray,
    sizes: jax.Array,
    per_slot: dict[str, Any],
    work: jax.Array | None,
    out_dtype: jnp.dtype,
    config: matmul_config.Config | None,
    interpret: bool,
) -> jax.Array:
    if config is None:
        options = {"row_groups": w.row_groups, "out_dtype": out_dtype}
        return grouped_scaled_matmul_reference(
            x.qvalue, x.scale_by_row(), w.qvalue, w.scale, sizes, **per_slot, **options
        )
    return grouped_scaled_matmul_triton(
        x.qvalue,
        x.scale,
        w.qvalue,
        w.scale,
        sizes,
        **per_slot,
        work=work,
        row_groups=w.row_groups,
        out_dtype=out_dtype,
        x_scale_layout=x.scale_layout,
        config=config,
        interpret=interpret,
    )


def grouped_block_m(
    w: jax.Array | QArray | SplitQArray, m: int, slots: int, implementation: Implementation
) -> int | None:
    """Slots a tile of the kernel that multiplies m rows in so many slots with a stack; None where
    no kernel does."""
    w = w.parts[0] if isinstance(w, SplitQArray) else w
    config = _grouped_kernel_config(w, m, slots, implementation) if isinstance(w, QArray) else None
    return config.block_m if config else None


def _grouped_kernel_config(
    w: QArray,
    m: int,
    slots: int,
    implementation: Implementation,
    *,
    sums: Literal["fast", "precise"] = "fast",
) -> matmul_config.Config | None:
    """As `_kernel_config`, for a stack of experts."""
    (e, n, k), op = w.shape, "grouped_scaled_matmul"
    kind = kernel_choice.device_kind(implementation)
    unsupported = grouped_kernel.why_not(kind, m, e, n, k) if kind else None
    if not kernel_choice.runs_kernel(op, implementation, unsupported):
        return None
    scales: grouped_kernel.ExpertScales = "block" if w.scheme.weight == "block" else "tensor"
    shape: dict[str, int | str] = {
        "slots": slots,
        "experts": e,
        "n": n,
        "k": k,
        "row_groups": w.row_groups,
    }
    measured = kernel_choice.tuned(op, implementation, **shape, scales=scales)
    if measured is None or (sums == "precise" and scales == "tensor"):
        return grouped_kernel.default_config(
            kind, slots, e, n, k, row_groups=w.row_groups, scales=scales, sums=sums
        )
    if implementation == "auto" and measured.implementation == "xla":
        return None
    return matmul_config.Config(**measured.config)


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    rows: jax.Array | None = None,
    row_weight: jax.Array | None = None,
    out_rows: jax.Array | None = None,
) -> jax.Array:
    """The same with unquantized experts.

    Args:
        x: float `[m, k]`.
        w: stack `[e, n, k]` of the same dtype.
        sizes, rows, row_weight, out_rows: as in `grouped_scaled_matmul`.
    Returns:
        `[r, n]` in the dtype of x.
    """
    per_slot: dict[str, Any] = {"rows": rows, "row_weight": row_weight, "out_rows": out_rows}
    _check_groups("grouped_matmul", x.shape, w.shape, sizes, per_slot)

    def forward(
        x: jax.Array, w: jax.Array, per_slot: dict[str, Any], sizes: jax.Array
    ) -> jax.Array:
        return grouped_matmul_reference(x, w, sizes, **per_slot)

    def backward(kept: tuple[Any, ...], dy: jax.Array) -> tuple[Any, ...]:
        x, w, per_slot, sizes = kept
        dx, d_row_weight = gradients.grouped_backward(
            dy,
            lambda expert: grouped_kernel.pick(w, expert),
            lambda: x,
            x.shape,
            sizes,
            **per_slot,
            dtype=x.dtype,
        )
        dw = gradients.grouped_weight_gradient(x, dy, sizes, **per_slot)
        return dx, dw, {"rows": None, "row_weight": d_row_weight, "out_rows": None}, None

    return gradients.with_backward(forward, backward, x, w, per_slot, sizes)


def _weight_only_grouped_matmul(
    x: jax.Array,
    w: QArray | SplitQArray,
    sizes: jax.Array,
    per_slot: dict[str, Any],
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    def forward(x, per_slot, codes, w, sizes, work) -> jax.Array:
        del codes, work

        def product(expert: jax.Array, tile_rows: jax.Array) -> jax.Array:
            parts = (
                _weight_only_matmul(x[tile_rows], _expert(part, expert), None, jnp.float32)
                for part in _parts(w)
            )
            return jnp.concatenate(list(parts), axis=1)

        return grouped_kernel.over_tiles(
            product, x.shape[0], w.shape, sizes, **per_slot, out_dtype=out_dtype
        )

    operands = (x, per_slot, lax.stop_gradient(x), w, sizes, None)
    return gradients.with_backward(
        forward, _grouped_backward(x), *operands, kept=lambda _, *kept: kept
    )


def precision_of(dtype: jax.typing.DTypeLike) -> lax.Precision:
    """Full precision for float32 operands; the narrower dtypes have only one."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def _check_groups(
    name: str,
    x: tuple[int, ...],
    w: tuple[int, ...],
    sizes: jax.Array,
    per_slot: dict[str, jax.Array | None],
) -> None:
    if len(w) != 3 or len(x) != 2 or x[1] != w[2] or sizes.shape != w[:1]:
        raise ValueError(
            f"{name}: x [m, k] is {x}, w [e, n, k] is {w} and sizes [e] is {sizes.shape}; e and k "
            "must be the same"
        )
    rows = per_slot["rows"]
    slots = x[0] if rows is None else rows.size
    for of_slot, array in per_slot.items():
        if array is not None and array.shape != (slots,):
            raise ValueError(f"{name}: {of_slot} is {array.shape}, wanted [{slots}], one a slot")
