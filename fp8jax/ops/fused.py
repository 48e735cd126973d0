"""The operations between the products, and what they can do on the way: add up a split product,
quantize for the next.

A layer in decode is ten kernels where these fuse, and more than twenty where XLA does the parts one
by one:

    rms_norm   residual + what a split product left, RMSNorm, quantization for qkv_proj or gate_up_proj
    rope       of the new token's q and k, and the write of k and v into the cache
    attention  over the cache; its merge of the splits quantizes for o_proj
    silu_mul   of what a split product left, quantization for down_proj

Each takes `reader`, the weight of the layer that reads its result. If that is a `QArray` and a
fused kernel exists for the case and the device, the result is a `QActivation`; in any other case it
is a float array, computed by the plain lines below, and the reader quantizes it itself. So a fusion
that is missing costs time, never an error.

The gradient of a fused kernel is that of the plain lines (`gradients.with_gradient_of`). The two
kernels that only decode has refuse to be differentiated: training runs whole sequences, without a
cache.
"""

from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax import no_gradient
from fp8jax.ops import gradients
from fp8jax.ops import matmul as ops
from fp8jax.ops.choice import Implementation, device_kind, runs_kernel
from fp8jax.ops.matmul import PartialSums, QActivation
from fp8jax.pallas_kernels import decode_attention as attention_kernel
from fp8jax.pallas_kernels import (
    grouped_gate_up,
    quantize,
    rms_norm_quantize,
    rope_cache,
    silu_mul_quantize,
)
from fp8jax.pallas_kernels.formats import ActivationGranularity
from fp8jax.pallas_kernels.interpret_mode import interpreting
from fp8jax.qarray import QArray, SplitQArray

# Of group scales: those of one tile are neighbours for the matmul kernel that reads them.
_LAYOUT = "gm"
_DECODE_HAS_NO_GRADIENT = (
    "the kernels of a decode step (rope and cache write, attention over the cache) have no "
    "gradient. Run the whole sequence at once without a cache, model(token_ids), or load the "
    "model with implementation='xla', whose steps can be differentiated"
)


def rms_norm(x: jax.Array, weight: jax.Array, *, epsilon: float) -> jax.Array:
    """x / rms(x) Â· weight, the mean square in float32, the normalised value cast to x's dtype
    before the weight comes in."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * lax.rsqrt(mean_square + jnp.float32(epsilon))).astype(x.dtype) * weight.reshape(
        (1,) * (x.ndim - 1) + (-1,)
    )


def add_rms_norm(
    stream: jax.Array,
    added: jax.Array | PartialSums | None,
    weight: jax.Array,
    *,
    epsilon: float,
    multiplier: float = 1.0,
    reader: Any = None,
    keep: Literal["codes", "codes and rows"] = "codes",
    implementation: Implementation = "auto",
) -> tuple[jax.Array | QActivation, jax.Array]:
    """The residual stream after an addition, normalised for who reads it.

    Args:
        stream: float `[..., h]`.
        added: `[..., h]` of the same dtype, what the layer before gave; None for nothing.
        weight: float `[h]`.
        epsilon: added to the mean square.
        multiplier: what `added` is multiplied by.
        reader: the weight that the result meets; None where it stays float.
        keep: whether a quantized result carries the float rows too, for another reader.
        implementation: what runs it.
    Returns:
        the normalised rows, `[..., h]` or a `QActivation` `[m, h]`; and the new stream.
    """
    granularity, h = _granularity(reader), stream.shape[-1]

    def plain(
        stream: jax.Array, added: jax.Array | PartialSums | None, weight: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        if added is not None:
            stream = stream + times(_whole(added), multiplier)
        return rms_norm(stream, weight, epsilon=epsilon), stream

    m = stream.size // h
    unsupported = (
        None if granularity is None else rms_norm_quantize.why_not(m, h, stream.dtype, granularity)
    )
    if granularity is None or not runs_kernel(
        "rms_norm_quantize", implementation, unsupported, otherwise="reference"
    ):
        return plain(stream, added, weight)
    interpret = interpreting()

    def kernel(
        stream: jax.Array, added: jax.Array | PartialSums | None, weight: jax.Array
    ) -> tuple[Any, Any]:
        new, codes, scale, *rows = rms_norm_quantize.rms_norm_quantize_triton(
            stream.reshape(m, h) if added is None else _rows(added),
            weight,
            granularity,
            epsilon=epsilon,
            residual=None if added is None else stream.reshape(m, h),
            residual_multiplier=multiplier,
            dtype=stream.dtype,
            scale_layout=_LAYOUT,
            keep=keep,
            interpret=interpret,
        )
        normalised = rows[0].reshape(stream.shape) if rows else jnp.zeros_like(stream)
        return (normalised, new.reshape(stream.shape)), (codes, scale)

    (normalised, new), (codes, scale) = gradients.with_gradient_of(
        plain, kernel, stream, added, weight
    )
    rows = normalised if keep == "codes and rows" else None
    return QActivation(
        codes, scale, granularity, _LAYOUT, rows, carrier=normalised.reshape(m, h)
    ), new


def silu_mul(gate_up: jax.Array) -> jax.Array:
    """silu(gate) Â· up in float32, for gate and up side by side in the last dimension."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return silu_mul_quantize.silu_mul(gate, up).astype(gate_up.dtype)


def silu_mul_for(
    reader: Any, gate_up: jax.Array | PartialSums, *, implementation: Implementation = "auto"
) -> jax.Array | QActivation:
    """`silu_mul` for who reads it.

    Args:
        reader: the weight that the result meets.
        gate_up: float `[..., 2i]`.
        implementation: what runs it.
    Returns:
        `[..., i]`, or a `QActivation` `[m, i]`.
    """
    granularity = _granularity(reader)
    *_, m, width = (rows := _rows(gate_up)).shape
    unsupported = (
        None
        if granularity is None
        else silu_mul_quantize.why_not(m, width // 2, gate_up.dtype, granularity)
    )
    if granularity is None or not runs_kernel(
        "silu_mul_quantize", implementation, unsupported, otherwise="reference"
    ):
        return silu_mul(_whole(gate_up))
    dtype, interpret = gate_up.dtype, interpreting()

    def plain(rows: jax.Array) -> jax.Array:
        return silu_mul(rows if rows.ndim == 2 else PartialSums(rows, dtype).total())

    def kernel(rows: jax.Array) -> tuple[Any, Any]:
        quantized = silu_mul_quantize.silu_mul_quantize_triton(
            rows, granularity, dtype=dtype, scale_layout=_LAYOUT, interpret=interpret
        )
        return jnp.zeros((m, width // 2), dtype), quantized

    carrier, (codes, scale) = gradients.with_gradient_of(plain, kernel, rows)
    return QActivation(codes, scale, granularity, _LAYOUT, carrier=carrier)


def grouped_gate_up_for(
    reader: Any,
    x: jax.Array | QActivation,
    w: Any,
    sizes: jax.Array,
    rows: jax.Array,
    *,
    work: jax.Array | None,
    block_m_of_work: int,
    dtype: Any,
    implementation: Implementation = "auto",
) -> QActivation | None:
    """gate_up of experts and `silu_mul` in one kernel, where there is one and it pays; None
    elsewhere.

    Args:
        reader: the stack that the result meets.
        x: `[m, k]`.
        w: the stack of gate and up.
        sizes, rows, work, block_m_of_work: as for `ops.grouped_scaled_matmul`.
        dtype: of activations.
        implementation: what runs it.
    Returns:
        `[r, i]`.
    """
    in_blocks = isinstance(w, QArray) and (w.scheme.weight, w.scheme.activation) == (
        "block",
        "group",
    )
    if not in_blocks or w.row_groups != 2 or _granularity(reader) != "group":
        return None
    (num_experts, n, k), slots, kind = w.shape, rows.shape[0], device_kind(implementation)
    unsupported = "there are too few slots or too many"
    if kind and grouped_gate_up.pays(slots, num_experts):
        unsupported = grouped_gate_up.why_not(kind, x.shape[0], slots, num_experts, n, k)
    if not runs_kernel("grouped_gate_up", implementation, unsupported, otherwise="reference"):
        return None
    if not isinstance(x, QActivation):
        x = ops.quantize_activation(x, "group", scale_layout=_LAYOUT, implementation=implementation)
    assert isinstance(x, QActivation)
    if x.granularity != "group":
        raise ValueError(
            f"grouped_gate_up: x was quantized per {x.granularity}, but scheme {w.scheme.name!r} "
            "wants group"
        )
    layout, interpret = x.scale_layout, interpreting()
    x_dtype = None if x.carrier is None else x.carrier.dtype

    def kernel(carrier, x, w, sizes, rows, work) -> tuple[jax.Array, jax.Array, jax.Array]:
        del carrier
        codes, scale = grouped_gate_up.grouped_gate_up_triton(
            x.qvalue,
            x.scale,
            w.qvalue,
            w.scale,
            sizes,
            rows,
            dtype=dtype,
            x_scale_layout=layout,
            work=work,
            interpret=interpret,
        )
        return jnp.zeros((slots, n // 2), dtype), codes, scale

    def backward(kept: tuple[Any, ...], cotangents: tuple[jax.Array, ...]) -> tuple[Any, ...]:
        if x_dtype is None:
            return (None,) * 6
        x, w, sizes, rows, _ = kept

        def plain(carrier: jax.Array) -> jax.Array:
            # gate_up is computed once more, which is what not writing it costs.
            runs = "xla" if interpret else implementation
            carrying = replace(x, carrier=carrier)
            return silu_mul(
                ops.grouped_scaled_matmul(
                    carrying, w, sizes, rows=rows, out_dtype=dtype, implementation=runs
                )
            )

        (dx,) = jax.vjp(plain, jnp.zeros(x.shape, x_dtype))[1](cotangents[0])
        return dx, None, None, None, None, None

    fits = block_m_of_work == grouped_gate_up.default_config().block_m
    operands = (
        x.carrier,
        x.without_carrier(),
        no_gradient.constant_weight(w),
        sizes,
        rows,
        work if fits else None,
    )
    carrier, codes, scale = gradients.with_backward(
        kernel, backward, *operands, kept=lambda _, *kept: kept
    )
    codes, scale = lax.stop_gradient((codes, scale))
    return QActivation(codes, scale, "group", _LAYOUT, carrier=carrier)


def decodes_in_kernels(
    h: int, key_cache: jax.Array, dtype: Any, implementation: Implementation
) -> bool:
    """Whether `rope_and_write` and `decode_attention` have kernels for h query heads of this dtype
    over this cache."""
    _, kv_heads, _, d = key_cache.shape
    unsupported = (
        rope_cache.why_not(h, d, kv_heads, dtype, key_cache.dtype)
        or attention_kernel.why_not(h, d, kv_heads, dtype)
        or (
            f"the cache is {key_cache.dtype} and activations {dtype}"
            if key_cache.dtype != dtype
            else None
        )
    )
    return runs_kernel("decode_attention", implementation, unsupported, otherwise="reference")


def rope_and_write(
    qkv: jax.Array | PartialSums,
    cos: jax.Array,
    sin: jax.Array,
    key_cache: jax.Array,
    value_cache: jax.Array,
    positions: jax.Array,
    *,
    q_norm: jax.Array | None,
    k_norm: jax.Array | None,
    epsilon: float,
    clip: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Turn the new token's q and k, and write k and v at its position; only where
    `decodes_in_kernels`.

    Args:
        qkv: float `[b, 1, (h + 2·kv_heads) Â· d]`.
        cos, sin: float32 `[b, rotary_dim / 2]`.
        key_cache, value_cache: the layer's, float `[b, kv_heads, s, d]`.
        positions: int32 `[b]`.
        q_norm, k_norm: float `[d]`, weights of an RMSNorm over each head; None for no norm.
        epsilon: of that norm.
        clip: q, k and v are clipped to ± this.
    Returns:
        q `[b, h, d]` and both caches.
    """
    qkv, key_cache, value_cache = no_gradient.refused(
        (qkv, key_cache, value_cache), NotImplementedError(_DECODE_HAS_NO_GRADIENT)
    )
    return rope_cache.rope_cache_triton(
        _rows(qkv),
        cos,
        sin,
        key_cache,
        value_cache,
        positions,
        q_norm=q_norm,
        k_norm=k_norm,
        epsilon=epsilon,
        clip=clip,
        dtype=qkv.dtype,
        interpret=interpreting(),
    )


def decode_attention(
    q: jax.Array,
    key_cache: jax.Array,
    value_cache: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    window: int | None,
    reader: Any,
) -> jax.Array | QActivation:
    """Attention of one token a row over the cache; only where `decodes_in_kernels`.

    Args:
        q: float `[b, h, d]`.
        key_cache, value_cache: the layer's, the new token in it.
        lengths: int32 `[b]`, the new token included.
        scale: multiplies the scores.
        window: how many of the last keys count; None for all.
        reader: the weight that the result meets.
    Returns:
        `[b, 1, h Â· d]`, or a `QActivation` `[b, h Â· d]`.
    """
    granularity, (b, h, d) = _granularity(reader), q.shape
    q, key_cache, value_cache = no_gradient.refused(
        (q, key_cache, value_cache), NotImplementedError(_DECODE_HAS_NO_GRADIENT)
    )
    if granularity is not None and quantize.why_not(b, h * d, q.dtype, granularity) is None:
        codes, scales = attention_kernel.decode_attention_quantize_triton(
            q,
            key_cache,
            value_cache,
            lengths,
            granularity,
            scale=scale,
            window=window,
            scale_layout=_LAYOUT,
            interpret=interpreting(),
        )
        return QActivation(codes, scales, granularity, _LAYOUT)
    out = attention_kernel.decode_attention_triton(
        q, key_cache, value_cache, lengths, scale=scale, window=window, interpret=interpreting()
    )
    return out.reshape(b, 1, h * d)


def times(x: jax.Array, factor: float) -> jax.Array:
    """x Â· factor in float32, rounded once to the dtype of x, as torch multiplies by a Python
    number."""
    return x if factor == 1 else (x.astype(jnp.float32) * jnp.float32(factor)).astype(x.dtype)


def _granularity(reader: Any) -> ActivationGranularity | None:
    return reader.scheme.activation if isinstance(reader, QArray | SplitQArray) else None


def _rows(x: jax.Array | PartialSums) -> jax.Array:
    """`[m, n]`, or the parts `[splits, m, n]`, as the kernels take either."""
    if isinstance(x, PartialSums):
        return x.parts.reshape(x.parts.shape[0], -1, x.parts.shape[-1])
    return x.reshape(-1, x.shape[-1])


def _whole(x: jax.Array | PartialSums) -> jax.Array:
    return x.total() if isinstance(x, PartialSums) else x
