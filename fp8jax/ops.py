"""The operations that a layer calls, and the choice of what runs them.

`implementation` says what:
    "xla"     the plain-jnp reference in the kernel's file; works on every device
    "triton"  the Pallas-Triton kernel; raises where there is none for the device, shape or scheme
    "auto"    the fastest measured for device and shape

x is quantized here unless it comes quantized (`QActivation`), so that an operation which has just produced x can hand
over codes instead.
"""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.pallas_kernels.block_scaled_matmul import block_scaled_matmul_reference
from fp8jax.pallas_kernels.grouped_matmul import grouped_matmul_reference, grouped_scaled_matmul_reference
from fp8jax.pallas_kernels.quantize import quantize_activation_reference
from fp8jax.pallas_kernels.scaled_matmul import scaled_matmul_reference
from fp8jax.qarray import QArray
from fp8jax.schemes import ActivationGranularity

Implementation = Literal["auto", "xla", "triton"]
IMPLEMENTATIONS = ("auto", "xla", "triton")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QActivation:
    """Quantized activations: codes `[m, k]` and scales as in `pallas_kernels/quantize.py`."""

    qvalue: jax.Array
    scale: jax.Array
    granularity: ActivationGranularity = field(metadata={"static": True})


def quantize_activation(
    x: jax.Array,
    granularity: ActivationGranularity,
    *,
    valid: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> QActivation:
    """Quantize rows of activations.

    Args:
        x: float `[m, k]`.
        granularity: "token", "group" or "tensor".
        valid: bool `[m]`, rows that count for the amax of "tensor".
        implementation: what runs it.
    Raises:
        NotImplementedError: "triton" was named and has no kernel for this.
    """
    _choose(implementation)
    return QActivation(*quantize_activation_reference(x, granularity, valid=valid), granularity)


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
    if out_dtype is None:
        out_dtype = jnp.dtype(jnp.bfloat16 if isinstance(x, QActivation) else x.dtype)
    if not isinstance(x, QActivation):
        x = quantize_activation(x, w.scheme.activation, valid=valid, implementation=implementation)
    if x.granularity != w.scheme.activation:
        raise ValueError(
            f"scaled_matmul: x was quantized per {x.granularity}, but scheme {w.scheme.name!r} wants {w.scheme.activation}"
        )
    if len(w.shape) != 2 or x.qvalue.shape[1] != w.shape[1]:
        raise ValueError(f"scaled_matmul: x [m, k] is {x.qvalue.shape} and w [n, k] is {w.shape}; k must be the same")
    _choose(implementation)
    reference = block_scaled_matmul_reference if w.scheme.weight == "block" else scaled_matmul_reference
    return reference(x.qvalue, x.scale, w.qvalue, w.scale, bias=bias, out_dtype=out_dtype)


def matmul(x: jax.Array, w: jax.Array, *, bias: jax.Array | None = None) -> jax.Array:
    """x @ w.T + bias with an unquantized weight; float32 means float32 on GPUs too, not TF32.

    Args:
        x: float `[..., k]`.
        w: float `[n, k]` of the same dtype.
        bias: float `[n]`, added in float32.
    Returns:
        `[..., n]` in the dtype of x.
    """
    out = lax.dot_general(
        x, w, (((x.ndim - 1,), (1,)), ((), ())), precision=precision_of(x.dtype), preferred_element_type=jnp.float32
    )
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    return out.astype(x.dtype)


def grouped_scaled_matmul(
    x: jax.Array | QActivation,
    w: QArray,
    sizes: jax.Array,
    *,
    rows: jax.Array | None = None,
    row_weight: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    valid: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Every row times the weight of its own expert, in FP8; rows come sorted by expert.

    Args:
        x: float `[m, k]`, or the same quantized with the granularity of the scheme.
        w: quantized stack `[e, n, k]`.
        sizes: int32 `[e]`, how many of the r sorted slots each expert has; slots beyond their sum give zeros.
        rows: int32 `[r]`, the row of x that a slot reads; None where slot i reads row i.
        row_weight: float32 `[r]`, multiplies a slot's result before it is rounded.
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
    if not isinstance(x, QActivation):
        x = quantize_activation(x, w.scheme.activation, valid=valid, implementation=implementation)
    if x.granularity != w.scheme.activation:
        raise ValueError(
            f"grouped_scaled_matmul: x was quantized per {x.granularity}, but scheme {w.scheme.name!r} wants {w.scheme.activation}"
        )
    if w.scheme.weight == "channel":
        raise ValueError(f"grouped_scaled_matmul: stacks of experts have no scales per channel, got {w.scheme}")
    _check_groups("grouped_scaled_matmul", x.qvalue.shape, w.shape, sizes)
    _choose(implementation)
    return grouped_scaled_matmul_reference(
        x.qvalue,
        x.scale,
        w.qvalue,
        w.scale,
        sizes,
        rows=rows,
        row_weight=row_weight,
        row_groups=w.row_groups,
        out_dtype=out_dtype,
    )


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    rows: jax.Array | None = None,
    row_weight: jax.Array | None = None,
) -> jax.Array:
    """The same with unquantized experts.

    Args:
        x: float `[m, k]`.
        w: stack `[e, n, k]` of the same dtype.
        sizes, rows, row_weight: as in `grouped_scaled_matmul`.
    Returns:
        `[r, n]` in the dtype of x.
    """
    _check_groups("grouped_matmul", x.shape, w.shape, sizes)
    return grouped_matmul_reference(x, w, sizes, rows=rows, row_weight=row_weight)


def precision_of(dtype: jax.typing.DTypeLike) -> lax.Precision:
    """Full precision for float32 operands; the narrower dtypes have only one."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def _check_groups(name: str, x: tuple[int, ...], w: tuple[int, ...], sizes: jax.Array) -> None:
    if len(w) != 3 or len(x) != 2 or x[1] != w[2] or sizes.shape != w[:1]:
        raise ValueError(
            f"{name}: x [m, k] is {x}, w [e, n, k] is {w} and sizes [e] is {sizes.shape}; e and k must be the same"
        )


def _choose(implementation: Implementation) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "triton":
        raise NotImplementedError(
            "there is no Pallas-Triton kernel for this operation yet; use implementation='auto' or 'xla'"
        )
