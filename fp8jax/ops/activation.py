"""The gated activation of an MLP, quantized for the product behind it where a kernel does both."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from fp8jax.ops import gradients
from fp8jax.ops.choice import Choice, Implementation, choose
from fp8jax.ops.values import PartialSums, QActivation, Summed, rows_or_parts, total
from fp8jax.pallas_kernels import silu_mul_quantize as kernel_file
from fp8jax.pallas_kernels.formats import ActivationGranularity


def silu_mul(
    gate_up: Summed,
    *,
    quantized: ActivationGranularity | None = None,
    implementation: Implementation | Choice = "auto",
) -> jax.Array | QActivation:
    """silu(gate) · up, gate and up side by side in the last dimension.

    Args:
        gate_up: float `[..., 2i]`, or its pieces.
        quantized: how the weight that reads the result wants it; None for floats.
        implementation: what runs it.
    Returns:
        `[..., i]`; a `QActivation` `[m, i]` where it is wanted quantized and a kernel does it on
        the way.
    """
    choice, dtype = choose(implementation), gate_up.dtype
    *rows, width = gate_up.shape
    m = math.prod(rows)
    if quantized is None or not choice.runs_kernel(
        "silu_mul_quantize",
        lambda _: kernel_file.why_not(m, width // 2, dtype, quantized),
        fusion=True,
    ):
        return kernel_file.silu_mul(total(gate_up))
    interpret = choice.interpret

    def plain(rows: jax.Array) -> jax.Array:
        return kernel_file.silu_mul(rows if rows.ndim == 2 else PartialSums(rows, dtype).total())

    def kernel(rows: jax.Array) -> tuple[Any, Any]:
        codes_and_scale = kernel_file.silu_mul_quantize_triton(
            rows, quantized, dtype=dtype, scale_layout="gm", interpret=interpret
        )
        return jnp.zeros((m, width // 2), dtype), codes_and_scale

    carrier, (codes, scale) = gradients.with_gradient_of(plain, kernel, rows_or_parts(gate_up))
    return QActivation(codes, scale, quantized, "gm", carrier=carrier)
