"""Attention over fresh tokens or over the cache.

One new token a row runs in kernels, where there are some:

rope_and_write       turns the new token's q and k, and writes k and v into the cache
decode_attention     attends to the cache; quantizes for o_proj on the way
attention, rotate    the same for any number of tokens: what the kernels are held against
"""

import jax

from fp8jax import no_gradient
from fp8jax.ops.choice import Choice, Implementation, choose
from fp8jax.ops.values import QActivation, Summed, rows_or_parts
from fp8jax.pallas_kernels import decode_attention as attention_kernel
from fp8jax.pallas_kernels import quantize, rope_cache
from fp8jax.pallas_kernels.attention import attention as attention
from fp8jax.pallas_kernels.formats import ActivationGranularity
from fp8jax.pallas_kernels.rope_cache import rotate as rotate

_DECODE_HAS_NO_GRADIENT = (
    "the kernels of a decode step (rope and cache write, attention over the cache) have no "
    "gradient. Run the whole sequence at once without a cache, model(token_ids), or load the model "
    "with implementation='xla', whose steps can be differentiated"
)


def decodes_in_kernels(
    h: int,
    key_cache: jax.Array,
    dtype: jax.typing.DTypeLike,
    implementation: Implementation | Choice = "auto",
) -> bool:
    """Whether `rope_and_write` and `decode_attention` have kernels for h query heads of this dtype
    over this cache."""
    _, kv_heads, _, d = key_cache.shape

    def why_not(_) -> str | None:
        if key_cache.dtype != dtype:
            return f"the cache is {key_cache.dtype} and activations {dtype}"
        return rope_cache.why_not(
            h, d, kv_heads, dtype, key_cache.dtype
        ) or attention_kernel.why_not(h, d, kv_heads, dtype)

    return choose(implementation).runs_kernel("decode_attention", why_not, fusion=True)


def rope_and_write(
    qkv: Summed,
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
    implementation: Implementation | Choice,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Turn the new token's q and k, and write k and v at its position; only where
    `decodes_in_kernels`.

    Args:
        qkv: float `[b, 1, (h + 2·kv_heads) · d]`, or its pieces.
        cos, sin: float32 `[b, rotary_dim / 2]`.
        key_cache, value_cache: the layer's, float `[b, kv_heads, s, d]`.
        positions: int32 `[b]`.
        q_norm, k_norm: float `[d]`, weights of an RMSNorm over each head; None for no norm.
        epsilon: of that norm.
        clip: q, k and v are clipped to ± this.
        implementation: what runs it.
    Returns:
        q `[b, h, d]` and both caches.
    """
    qkv, key_cache, value_cache = no_gradient.refused(
        (qkv, key_cache, value_cache), NotImplementedError(_DECODE_HAS_NO_GRADIENT)
    )
    return rope_cache.rope_cache_triton(
        rows_or_parts(qkv),
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
        interpret=choose(implementation).interpret,
    )


def decode_attention(
    q: jax.Array,
    key_cache: jax.Array,
    value_cache: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    window: int | None,
    quantized: ActivationGranularity | None = None,
    implementation: Implementation | Choice,
) -> jax.Array | QActivation:
    """Attention of one token a row over the cache; only where `decodes_in_kernels`.

    Args:
        q: float `[b, h, d]`.
        key_cache, value_cache: the layer's, the new token in them.
        lengths: int32 `[b]`, the new token included.
        scale: multiplies the scores.
        window: how many of the last keys count; None for all.
        quantized: how the weight that reads the result wants it; None for floats.
        implementation: what runs it.
    Returns:
        `[b, 1, h · d]`, or a `QActivation` `[b, h · d]`.
    """
    b, h, d = q.shape
    interpret = choose(implementation).interpret
    q, key_cache, value_cache = no_gradient.refused(
        (q, key_cache, value_cache), NotImplementedError(_DECODE_HAS_NO_GRADIENT)
    )
    operands = q, key_cache, value_cache, lengths
    if quantized is not None and quantize.why_not(b, h * d, q.dtype, quantized) is None:
        codes, scales = attention_kernel.decode_attention_quantize_triton(
            *operands,
            quantized,
            scale=scale,
            window=window,
            scale_layout="gm",
            interpret=interpret,
        )
        return QActivation(codes, scales, quantized, "gm")
    out = attention_kernel.decode_attention_triton(
        *operands, scale=scale, window=window, interpret=interpret
    )
    return out.reshape(b, 1, h * d)
