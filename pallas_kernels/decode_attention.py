"""Attention of one new token a row over a cache of keys and values.

    out[b, j] = Σ_s softmax_s(scale · q[b, j] · k[b, g, s]) · v[b, g, s]
                                                        g = j // (h / kv_heads),  s < lengths[b]

    q [b, h, d]      k, v [b, kv_heads, s, d]      lengths [b]      out [b, h, d]

Nothing is reused but within a group of query heads, so speed is that of reading the cache, and the
cache is mostly unused capacity: each row's loop ends at its own length, and a window begins it
late. The query heads that share keys are the rows of one tensor-core tile of at least 16; what pads
it costs nothing that the memory does not cost anyway.

A few rows times a few key-value heads cannot fill a GPU, so the keys of a row are split over
`splits` programs ("flash decoding"). Each keeps the running maximum and sum of the online softmax
and writes its normalised part and the log2 of its sum; a second kernel adds the parts in a fixed
order, so results are the same in every run and do not depend on what other rows hold:

    M = max_i lse_i      out = Σ_i 2^(lse_i − M) · part_i / Σ_i 2^(lse_i − M)

The split follows the row's length, not the capacity: every split of a short row gets a few keys
rather than one split all of them. The second kernel can quantize at once what o_proj reads next,
one program a row for "token". Source: FlashAttention's online softmax, flash-decoding's split.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from fp8jax.device import Gpu, required_gpu
from fp8jax.pallas_kernels import quantize
from fp8jax.pallas_kernels.attention import attention
from fp8jax.pallas_kernels.formats import ActivationGranularity
from fp8jax.pallas_kernels.quantize import ScaleLayout, power_of_two

CACHE_DTYPES = ("bfloat16", "float16", "float32")
MAX_SPLITS = 32


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the keys are cut.

    Args:
        block_s: keys a step, a power of two from 16.
        splits: programs that share a row's keys, a power of two; 1 needs no second kernel.
        num_warps: warps a program.
        num_stages: key and value blocks in flight, counting the one in use.
    """

    block_s: int
    splits: int
    num_warps: int
    num_stages: int

    def check(self) -> None:
        """Raise ValueError unless the kernel can use this."""
        if any(
            size < 1 or size & (size - 1) for size in (self.block_s, self.splits, self.num_warps)
        ):
            raise ValueError(f"{self}: block_s, splits and num_warps must be powers of two")
        if self.block_s < 16 or self.num_stages < 1:
            raise ValueError(f"{self}: block_s must be at least 16 and num_stages at least 1")


def decode_attention_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    window: int | None = None,
) -> jax.Array:
    """The specification; softmax in float32.

    Args:
        q: bfloat16, float16 or float32 `[b, h, d]`.
        k, v: the cache `[b, kv_heads, s, d]` in q's dtype; what lies at and beyond a row's length
            is not looked at.
        lengths: int32 `[b]`, keys of each row, that of the new token included; 0 gives a row of
            zeros.
        scale: multiplies the scores.
        window: how many of the last keys count; None for all.
    Returns:
        `[b, h, d]` in q's dtype.
    """
    out = attention(q[:, :, None], k, v, positions=lengths[:, None] - 1, scale=scale, window=window)
    return out[:, :, 0]


@functools.partial(jax.jit, static_argnames=("scale", "window", "config", "interpret"))
def decode_attention_triton(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The same in one kernel, or two where keys are split.

    Args:
        q, k, v, lengths, scale, window: as in the reference.
        config: `default_config` if None.
        interpret: run on the CPU, to check the mathematics.
    Returns:
        `[b, h, d]` in q's dtype.
    Raises:
        NotImplementedError: `why_not` says why.
        ValueError: shapes, dtypes or config that do not belong together.
    """
    config = _checked(q, k, v, lengths, window, config, interpret)
    parts, lse = _attend(
        q, k, v, lengths, scale=scale, window=window, config=config, interpret=interpret
    )
    if lse is None:
        return parts
    (out,) = _merge(parts, lse, None, scale_layout="mg", dtype=q.dtype, interpret=interpret)
    return out.reshape(q.shape)


@functools.partial(
    jax.jit,
    static_argnames=("granularity", "scale", "window", "scale_layout", "config", "interpret"),
)  # fmt: skip
def decode_attention_quantize_triton(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    granularity: ActivationGranularity,
    *,
    scale: float,
    window: int | None = None,
    scale_layout: ScaleLayout = "mg",
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention, then quantization of its rows `[b, h · d]` for o_proj.

    Two kernels, whether keys are split or not; a third only for groups that heads straddle, where d
    is no power of two.

    Args:
        q, k, v, lengths, scale, window: as in the reference.
        granularity: "token" or "group", see `quantize.py`.
        scale_layout: layout of group scales, `[b, groups]` or `[groups, b]`.
        config: `default_config` if None.
        interpret: run on the CPU, to check the mathematics.
    Returns:
        codes float8_e4m3fn `[b, h · d]` and scales float32: the attention output in q's dtype,
        quantized.
    Raises:
        NotImplementedError: `why_not` says why, here or in `quantize.py`.
        ValueError: shapes, dtypes or config that do not belong together.
    """
    b, h, d = q.shape
    config = _checked(q, k, v, lengths, window, config, interpret)
    if reason := quantize.why_not(b, h * d, q.dtype, granularity):
        raise NotImplementedError(f"decode_attention_quantize: {reason}")
    parts, lse = _attend(
        q, k, v, lengths, scale=scale, window=window, config=config, interpret=interpret
    )
    if lse is not None and (
        granularity == "token" or power_of_two(d) == d
    ):  # then whole heads make whole groups
        codes, scales = _merge(
            parts, lse, granularity, scale_layout=scale_layout, dtype=q.dtype, interpret=interpret
        )
        return codes, scales
    if lse is not None:
        (parts,) = _merge(parts, lse, None, scale_layout="mg", dtype=q.dtype, interpret=interpret)
    return quantize.quantize_activation_triton(
        parts.reshape(b, h * d), granularity, scale_layout=scale_layout, interpret=interpret
    )


def why_not(h: int, d: int, kv_heads: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Why there is no kernel for this case, or None if there is one."""
    if jnp.dtype(dtype).name not in CACHE_DTYPES:
        return f"the cache is {jnp.dtype(dtype).name}, the kernel takes {', '.join(CACHE_DTYPES)}"
    if h % kv_heads:
        return f"{h} query heads do not share {kv_heads} key-value heads evenly"
    if h // kv_heads > 64:
        return (
            f"{h // kv_heads} query heads share keys: their accumulators are one tile, at most 64"
        )
    if d > 256:
        return f"head_dim = {d}: a tile of keys holds whole heads, at most 256"
    return None


def default_config(
    gpu: Gpu, b: int, kv_heads: int, s: int, d: int, dtype: jax.typing.DTypeLike
) -> Config:
    """16 KiB of keys a step, about one program for each multiprocessor, at least 128 keys of
    capacity a split.

    More splits than that make the second kernel read more; a program keeps 64 KiB in flight, enough
    for its share of the bandwidth.
    """
    wanted, affordable = max(1, gpu.programs_to_fill // (b * kv_heads)), max(1, s // 128)
    splits = min(1 << (min(wanted, affordable).bit_length() - 1), MAX_SPLITS)
    block_s = max(16, min(64, 16384 // (power_of_two(d) * jnp.dtype(dtype).itemsize)))
    return Config(block_s=block_s, splits=splits, num_warps=4, num_stages=3)


def _checked(q, k, v, lengths, window, config: Config | None, interpret: bool) -> Config:
    b, h, d = q.shape
    if (
        k.ndim != 4
        or k.shape != v.shape
        or (k.shape[0], k.shape[3]) != (b, d)
        or lengths.shape != (b,)
    ):
        raise ValueError(
            f"decode_attention: q is [b, h, d] = {q.shape}, so k and v must be [{b}, kv_heads, s, "
            f"{d}] and lengths [{b}]; got k {k.shape}, v {v.shape}, lengths {lengths.shape}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"decode_attention: q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if window is not None and window < 1:
        raise ValueError(
            f"decode_attention: a window holds at least the new token itself, got window={window}"
        )
    if reason := why_not(h, d, k.shape[1], q.dtype):
        raise NotImplementedError(f"decode_attention: {reason}")
    if config is None:
        gpu = required_gpu("decode_attention", interpret=interpret)
        config = default_config(gpu, b, k.shape[1], k.shape[2], d, q.dtype)
    config.check()
    return config


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    scale,
    window,
    config: Config,
    interpret: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """The output `[b, h, d]` and None, or parts `[b, h, splits, d]` and their lse `[b, h, splits]`,
    float32."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    b, h, d = q.shape
    _, kv_heads, s, _ = k.shape
    group, splits, block_s = h // kv_heads, config.splits, config.block_s
    block_g = max(16, power_of_two(group))  # tensor cores take no fewer than 16 rows
    block_d = max(16, power_of_two(d))
    # float32 stays float32, not TF32.
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def dot(a, b, contracting):
        dims = (((1,), (contracting,)), ((), ()))
        return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)

    def kernel(
        q_ref,  # [b, h, d]
        k_ref,  # [b, kv_heads, s, d]
        v_ref,  # [b, kv_heads, s, d]
        lengths_ref,  # [b] int32
        out_ref,  # [b, h, d], or [b, h, splits, d] float32
        *lse_refs,  # [b, h, splits] float32
    ):
        row, kv_head = (
            lax.div(pl.program_id(0), jnp.int32(kv_heads)),
            lax.rem(pl.program_id(0), jnp.int32(kv_heads)),
        )
        split = pl.program_id(1)
        heads = kv_head * group + jnp.arange(block_g, dtype=jnp.int32)
        in_group = jnp.arange(block_g) < group
        dims = jnp.arange(block_d, dtype=jnp.int32)[None, :]

        length = jnp.minimum(plgpu.load(lengths_ref.at[row]), s)
        begin_key = jnp.int32(0) if window is None else jnp.maximum(length - window, 0)
        first, last = (
            lax.div(begin_key, jnp.int32(block_s)),
            lax.div(length + (block_s - 1), jnp.int32(block_s)),
        )
        blocks = lax.div(last - first + (splits - 1), jnp.int32(splits))
        begin = first + split * blocks
        end = jnp.minimum(begin + blocks, last)

        q_mask = in_group[:, None] & (dims < d)
        query = plgpu.load(q_ref.at[row, heads[:, None], dims], mask=q_mask, other=0.0)

        def step(block, carry):
            highest, total, acc = carry
            keys = block * block_s + jnp.arange(block_s, dtype=jnp.int32)
            inside = (keys < length)[:, None] & (dims < d)
            # Beyond the length lies whatever was there before, possibly NaN: it is not read, and 0
            # stands for it.
            key = plgpu.load(k_ref.at[row, kv_head, keys[:, None], dims], mask=inside, other=0.0)
            value = plgpu.load(v_ref.at[row, kv_head, keys[:, None], dims], mask=inside, other=0.0)
            visible = keys < length
            if window is not None:
                visible &= keys >= begin_key
            scores = jnp.where(
                visible[None, :],
                dot(query, key, 1) * jnp.float32(scale * math.log2(math.e)),
                -jnp.inf,
            )
            # Every block between first and last has a visible key, so new_highest is finite.
            new_highest = jnp.maximum(highest, jnp.max(scores, axis=1))
            shrink = jnp.exp2(highest - new_highest)
            weights = jnp.exp2(scores - new_highest[:, None])
            total = total * shrink + jnp.sum(weights, axis=1)
            return (
                new_highest,
                total,
                acc * shrink[:, None] + dot(weights.astype(value.dtype), value, 0),
            )

        start = (
            jnp.full((block_g,), -jnp.inf, jnp.float32),
            jnp.zeros((block_g,), jnp.float32),
            jnp.zeros((block_g, block_d), jnp.float32),
        )
        highest, total, acc = lax.fori_loop(begin, end, step, start)
        # A split without keys has total 0: its part is 0 and its weight 2^-inf.
        part = acc / jnp.where(total == 0, jnp.float32(1), total)[:, None]
        if not lse_refs:
            plgpu.store(
                out_ref.at[row, heads[:, None], dims], part.astype(out_ref.dtype), mask=q_mask
            )
        else:
            plgpu.store(out_ref.at[row, heads[:, None], split, dims], part, mask=q_mask)
            plgpu.store(lse_refs[0].at[row, heads, split], highest + jnp.log2(total), mask=in_group)

    if splits == 1:
        out_shape = [jax.ShapeDtypeStruct((b, h, d), q.dtype)]
    else:
        out_shape = [
            jax.ShapeDtypeStruct((b, h, splits, d), jnp.float32),
            jax.ShapeDtypeStruct((b, h, splits), jnp.float32),
        ]
    parts, *lse = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=(b * kv_heads, splits),
        compiler_params=plgpu.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        interpret=interpret,
        name="decode_attention",
    )(q, k, v, lengths.astype(jnp.int32))
    return parts, lse[0] if lse else None


def _merge(
    parts: jax.Array,
    lse: jax.Array,
    granularity: ActivationGranularity | None,
    *,
    scale_layout: ScaleLayout,
    dtype: jax.typing.DTypeLike,
    interpret: bool,
) -> list[jax.Array]:
    """The parts of each row added up: `[b, h · d]`, or its codes and scales."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    b, h, splits, d = parts.shape
    width, block_d = h * d, power_of_two(d)
    block_h = {None: 1, "group": max(1, quantize.BLOCK // block_d), "token": power_of_two(h)}[
        granularity
    ]

    def kernel(
        parts_ref,  # [b, h, splits, d] float32
        lse_ref,  # [b, h, splits] float32
        *out_refs,  # [b, h · d]; or [b, h · d] float8_e4m3fn and scales
    ):
        row = pl.program_id(0)
        heads = pl.program_id(1) * block_h + jnp.arange(block_h, dtype=jnp.int32)[:, None]
        dims = jnp.arange(block_d, dtype=jnp.int32)[None, :]
        inside = (heads < h) & (dims < d)

        each = jnp.arange(splits, dtype=jnp.int32)[None, :]
        all_lse = plgpu.load(
            lse_ref.at[row, heads, each],
            mask=jnp.broadcast_to(heads < h, (block_h, splits)),
            other=0.0,
        )
        highest = jnp.max(all_lse, axis=1)[:, None]
        # A row without keys: all its weights become 2^-inf = 0 instead of 2^(inf - inf).
        highest = jnp.where(highest == -jnp.inf, jnp.float32(0), highest)
        total, out = (
            jnp.zeros((block_h, 1), jnp.float32),
            jnp.zeros((block_h, block_d), jnp.float32),
        )
        for split in range(splits):  # unrolled, so that all loads are under way at once
            at = jnp.full_like(heads, split)
            weight = jnp.exp2(
                plgpu.load(lse_ref.at[row, heads, at], mask=heads < h, other=0.0) - highest
            )
            part = plgpu.load(parts_ref.at[row, heads, at, dims], mask=inside, other=0.0)
            total, out = total + weight, out + weight * part
        out = (out / jnp.where(total == 0, jnp.float32(1), total)).astype(dtype)
        if granularity is None:
            plgpu.store(out_refs[0].at[row, heads * d + dims], out, mask=inside)
        elif (
            granularity == "token"
        ):  # all heads are here; flattening them into one long row would spill registers
            wide = out.astype(jnp.float32)
            scale = quantize.scale_of(jnp.max(jnp.abs(wide)))
            codes_ref, scale_ref = out_refs
            plgpu.store(
                codes_ref.at[row, heads * d + dims],
                quantize.codes_of(wide, 1.0 / scale),
                mask=inside,
            )
            plgpu.store(scale_ref.at[row, jnp.int32(0)], scale)
        else:
            flat = out.astype(jnp.float32).reshape(1, block_h * block_d)
            codes_ref, scale_ref = out_refs
            quantize.store_quantized(flat, codes_ref, scale_ref, width, granularity, scale_layout)

    if granularity is None:
        out_shape = (jax.ShapeDtypeStruct((b, width), dtype),)
    else:
        out_shape = quantize.quantized_shapes(b, width, granularity, scale_layout)
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=(b, pl.cdiv(h, block_h)),
        compiler_params=plgpu.CompilerParams(
            num_warps=quantize.warps_for(block_h * block_d, values=8), num_stages=1
        ),
        interpret=interpret,
        name="decode_attention_merge"
        if granularity is None
        else f"decode_attention_merge_quantize_{granularity}",
    )(parts, lse)
