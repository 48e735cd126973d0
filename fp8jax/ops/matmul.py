"""Products with a weight `[n, k]`, quantized or not; and the quantization of what they multiply.

    linear            what a layer calls: any weight, rows quantized or not
    scaled_matmul     FP8 × FP8 with a `QArray`, activations quantized on the fly
    float_matmul      floats × floats

x is quantized here unless it comes quantized (`QActivation`), so that an operation which has just
produced x can hand over codes instead. At the other end `linear` may leave a product in pieces
(`PartialSums`): a kernel that splits k leaves the sum to its successor, which reads it anyway.

Where a GPU has no FP8 tensor cores ("auto" only), weights stay FP8 in memory and products are those
of the activation dtype: x @ (q · s).T with x as it is.

All of them differentiate with respect to x and the bias; see `gradients`. An `implementation` is a
name or a `Choice`, see `choice`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax import no_gradient
from fp8jax.ops import gradients
from fp8jax.ops.choice import Choice, Implementation, choose
from fp8jax.ops.values import PartialSums, QActivation, Summed
from fp8jax.pallas_kernels import block_scaled_matmul as block_kernel
from fp8jax.pallas_kernels import matmul_config, quantize, widened_dot
from fp8jax.pallas_kernels import scaled_matmul as scaled_kernel
from fp8jax.pallas_kernels.formats import ActivationGranularity
from fp8jax.pallas_kernels.matmul_config import Config
from fp8jax.pallas_kernels.quantize import ScaleLayout
from fp8jax.qarray import QArray, dequantize


def quantize_activation(
    x: jax.Array,
    granularity: ActivationGranularity,
    *,
    valid: jax.Array | None = None,
    scale_layout: ScaleLayout = "mg",
    implementation: Implementation | Choice = "auto",
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
    choice, (m, k) = choose(implementation), x.shape
    carrier, x = x, lax.stop_gradient(x)
    if choice.runs_kernel(
        "quantize_activation", lambda _: quantize.why_not(m, k, x.dtype, granularity)
    ):
        codes, scale = quantize.quantize_activation_triton(
            x, granularity, scale_layout=scale_layout, interpret=choice.interpret
        )
    else:
        codes, scale = quantize.quantize_activation_reference(x, granularity, valid=valid)
        scale = scale.T if granularity == "group" and scale_layout == "gm" else scale
    return QActivation(codes, scale, granularity, scale_layout, carrier=carrier)


def linear(
    x: jax.Array | QActivation,
    weight: jax.Array | QArray,
    *,
    bias: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike,
    valid: jax.Array | None = None,
    implementation: Implementation | Choice = "auto",
) -> Summed:
    """x @ weight.T + bias for whichever weight a layer has.

    Args:
        x: float `[..., k]`; quantized, `[m, k]`, only for a quantized weight.
        weight: float or quantized `[n, k]`.
        bias: float `[n]`.
        out_dtype: dtype of the result, that of x where the weight is float.
        valid: bool `[m]`, rows that count for per-tensor activations.
        implementation: what runs it.
    Returns:
        `[..., n]` for a float weight, `[m, n]` for a quantized one, in pieces where a kernel split
        k.
    """
    if isinstance(weight, QArray):
        x = x if isinstance(x, QActivation) else x.reshape(-1, x.shape[-1])
        return _scaled_matmul(
            x, weight, bias, out_dtype, valid, choose(implementation), whole=False
        )
    assert isinstance(x, jax.Array), "activations are quantized for quantized weights only"
    return float_matmul(x, weight, bias=bias)


def scaled_matmul(
    x: jax.Array | QActivation,
    w: QArray,
    *,
    bias: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    valid: jax.Array | None = None,
    implementation: Implementation | Choice = "auto",
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
    out = _scaled_matmul(x, w, bias, out_dtype, valid, choose(implementation), whole=True)
    assert isinstance(out, jax.Array)
    return out


def _scaled_matmul(
    x: jax.Array | QActivation,
    w: QArray,
    bias: jax.Array | None,
    out_dtype: jax.typing.DTypeLike,
    valid: jax.Array | None,
    choice: Choice,
    *,
    whole: bool,
) -> Summed:
    (m, k), w_shape, out_dtype = x.shape, w.shape, jnp.dtype(out_dtype)
    if len(w_shape) != 2 or k != w_shape[1]:
        raise ValueError(
            f"scaled_matmul: x [m, k] is {(m, k)} and w [n, k] is {w_shape}; k must be the same"
        )
    w = no_gradient.constant_weight(w)
    if not isinstance(x, QActivation):
        if choice.weight_only:
            return weight_only_matmul(x, w, bias, out_dtype)
        # As the kernel reads group scales: those of many rows side by side.
        layout: ScaleLayout = "gm" if choice.gpu else "mg"
        x = quantize_activation(
            x, w.scheme.activation, valid=valid, scale_layout=layout, implementation=choice
        )
    if x.granularity != w.scheme.activation:
        raise ValueError(
            f"scaled_matmul: x was quantized per {x.granularity}, but scheme {w.scheme.name!r} "
            f"wants {w.scheme.activation}"
        )
    config = _kernel_config(w, m, out_dtype, choice)
    splits, steps = config.splits(k) if config and m else (1, 0)
    in_pieces = not whole and splits > 1
    width = steps * config.block_k if config and in_pieces else k  # inputs that a piece sums over
    interpret = choice.interpret
    x_dtype, bias_dtype = (None if a is None else a.dtype for a in (x.carrier, bias))

    def forward(
        carrier: jax.Array | None, x: QActivation, w: QArray, bias: jax.Array | None
    ) -> Summed:
        del carrier
        return _product_of_codes(
            x, w, bias, out_dtype, config, in_pieces=in_pieces, interpret=interpret
        )

    def backward(w: QArray, dy: Summed) -> tuple[jax.Array | None, None, None, jax.Array | None]:
        parts, dx, d_bias = dy.parts if isinstance(dy, PartialSums) else dy[None], None, None
        if x_dtype is not None:
            columns = jnp.split(dequantize(w), list(range(width, k, width)), axis=1)
            pieces = [
                gradients.product_with(part, of_part, x_dtype)
                for part, of_part in zip(parts, columns, strict=True)
            ]
            dx = jnp.concatenate(pieces, axis=1).astype(x_dtype)
        if bias_dtype is not None:  # the first piece adds it
            d_bias = jnp.sum(parts[0].astype(jnp.float32), axis=0).astype(bias_dtype)
        return dx, None, None, d_bias

    operands = x.carrier, x.without_carrier(), w, bias
    return gradients.with_backward(forward, backward, *operands, kept=lambda carrier, x, w, bias: w)


def _product_of_codes(
    x: QActivation,
    w: QArray,
    bias: jax.Array | None,
    out_dtype: jnp.dtype,
    config: Config | None,
    *,
    in_pieces: bool,
    interpret: bool,
) -> Summed:
    operands: tuple[jax.Array, ...] = (x.qvalue, x.scale, w.qvalue, w.scale)
    options: dict[str, Any] = {"bias": bias, "config": config, "interpret": interpret}
    if w.scheme.granularity.changes_along_k:
        kernel, options["x_scale_layout"] = block_kernel, x.scale_layout
        reference, partials, whole = (
            kernel.block_scaled_matmul_reference,
            kernel.block_scaled_matmul_partials,
            kernel.block_scaled_matmul_triton,
        )
    else:
        kernel = scaled_kernel
        reference, partials, whole = (
            kernel.scaled_matmul_reference,
            kernel.scaled_matmul_partials,
            kernel.scaled_matmul_triton,
        )
    if config is None:
        rows = x.qvalue, x.scale_by_row()
        return reference(*rows, w.qvalue, w.scale, bias=bias, out_dtype=out_dtype)
    if in_pieces:
        return PartialSums(partials(*operands, **options), out_dtype)
    return whole(*operands, out_dtype=out_dtype, **options)


def _kernel_config(w: QArray, m: int, out_dtype: jnp.dtype, choice: Choice) -> Config | None:
    """The tiles that the kernel for m rows runs with; None where the reference runs instead."""
    n, k = w.shape
    in_blocks = w.scheme.granularity.changes_along_k
    # Who asks for float32 asks for a sum that loses nothing.
    precise = not in_blocks and out_dtype == jnp.float32
    by_rule = block_kernel.default_config if in_blocks else scaled_kernel.default_config
    return choice.config(
        "block_scaled_matmul" if in_blocks else "scaled_matmul",
        lambda gpu: matmul_config.why_not(gpu, m, n, k),
        lambda gpu: (
            matmul_config.default_scaled_config(gpu, m, n, k, precise=True)
            if precise
            else by_rule(gpu, m, n, k)
        ),
        shape={"m": m, "n": n, "k": k},
        measured=not precise,
    )


def weight_only_matmul(
    x: jax.Array, w: QArray, bias: jax.Array | None, out_dtype: jax.typing.DTypeLike
) -> jax.Array:
    """x @ (q · s).T + bias with x as it is, in x's dtype: x `[m, k]` -> `[m, n]`."""
    if w.scheme.granularity.changes_along_k:
        # One rounding more than scaling the sums, but a sum over k meets many scales.
        return float_matmul(x, dequantize(w).astype(x.dtype), bias=bias).astype(out_dtype)
    # Codes are exact in every activation dtype, also times the power of two in the scale, without
    # which sums might overflow. It ends at 2⁻¹⁰⁰, where they no longer can and the smallest code
    # would vanish; float16 activations are too small for either.
    scale = jnp.atleast_1d(w.scale).reshape(-1, 1)
    bits = lax.bitcast_convert_type(scale, jnp.uint32)
    power = lax.bitcast_convert_type(bits & jnp.uint32(255 << 23), jnp.float32)
    if x.dtype == jnp.float16:
        power = jnp.ones_like(scale)
    else:
        power = jnp.maximum(power, jnp.float32(2.0**-100))
    codes = w.qvalue.astype(x.dtype) * power.astype(x.dtype)
    out = widened_dot.dot(x, codes) * (scale / power).reshape(1, -1)
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


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w.T in float32, for x `[..., k]` and w `[n, k]` of one dtype."""
    return widened_dot.dot(x, w) if x.dtype == jnp.float32 else widened_dot.narrow_dot(x, w)


def _with_bias(out: jax.Array, bias: jax.Array | None) -> jax.Array:
    if bias is None:
        return out
    return out + bias.astype(jnp.float32).reshape((1,) * (out.ndim - 1) + (-1,))
