"""RMSNorm of the residual stream, with the addition before it and the quantization behind it."""

from typing import Any

import jax
import jax.numpy as jnp

from fp8jax.ops import gradients
from fp8jax.ops.choice import Choice, Implementation, choose
from fp8jax.ops.values import QActivation, Reads, Stream, rows_or_parts
from fp8jax.pallas_kernels import rms_norm_quantize as kernel_file
from fp8jax.pallas_kernels.rms_norm_quantize import rms_norm as rms_norm


def norm_of_stream(
    stream: Stream,
    weight: jax.Array,
    *,
    epsilon: float,
    reads: Reads,
    implementation: Implementation | Choice = "auto",
) -> tuple[jax.Array | QActivation, Stream]:
    """The residual stream normalised for the block that reads it.

    Args:
        stream: float `[..., h]`, and what is to be added to it first.
        weight: float `[h]`.
        epsilon: added to the mean square.
        reads: how the block wants the rows.
        implementation: what runs it.
    Returns:
        The normalised rows, `[..., h]` or a `QActivation` `[m, h]`; and the stream, which owes
        nothing any more.
    """
    choice, shape, h = choose(implementation), stream.value.shape, stream.value.shape[-1]
    granularity, m, dtype = reads.quantized, stream.value.size // h, stream.value.dtype

    def plain(stream: Stream, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        settled = stream.settled()
        return kernel_file.rms_norm(settled, weight, epsilon=epsilon), settled

    if granularity is None or not choice.runs_kernel(
        "rms_norm_quantize",
        lambda _: kernel_file.why_not(m, h, dtype, granularity),
        fusion=True,
    ):
        normalised, settled = plain(stream, weight)
        return normalised, Stream(settled)
    interpret = choice.interpret

    def kernel(stream: Stream, weight: jax.Array) -> tuple[Any, Any]:
        value = stream.value.reshape(m, h)
        settled, codes, scale, *rows = kernel_file.rms_norm_quantize_triton(
            value if stream.owed is None else rows_or_parts(stream.owed),
            weight,
            granularity,
            epsilon=epsilon,
            residual=None if stream.owed is None else value,
            residual_multiplier=stream.multiplier,
            dtype=dtype,
            scale_layout="gm",
            keep_rows=reads.floats,
            interpret=interpret,
        )
        normalised = rows[0].reshape(shape) if rows else jnp.zeros(shape, dtype)
        return (normalised, settled.reshape(shape)), (codes, scale)

    floats, (codes, scale) = gradients.with_gradient_of(plain, kernel, stream, weight)
    normalised, settled = floats
    rows = normalised if reads.floats else None
    carrier = normalised.reshape(m, h)
    return QActivation(codes, scale, granularity, "gm", rows, carrier=carrier), Stream(settled)
