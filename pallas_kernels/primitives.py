"""The one primitive that reaches the FP8 tensor cores: acc[m, n] + Σ_k a[m, k] · b[n, k] on e4m3
tiles.

Why not `plgpu.dot`. Triton uses Hopper's FP8 instruction (`wgmma` on e4m3) only where a dot carries
`maxNumImpreciseAcc` ≥ 32. Pallas leaves that attribute at 0, and then Hopper silently converts both
tiles to float16 and multiplies these: half the peak at best. The primitive below is a dot with the
attribute set; on Ada (`mma.sync` e4m3) and Blackwell (`tcgen05` f8f6f4) it changes nothing.

What the attribute means. Hopper sums FP8 products in an accumulator of about 14 significant bits.
The number is how many products along k go through it before the sum is added to a real float32
register:

| promote_every | attribute         | cost on Hopper                                      |
|---------------|-------------------|-----------------------------------------------------|
| None          | 2³⁰: never        | none; calc_diff grows with k, 5e-6 at k = 4096      |
| 128           | min(128, tile k)  | a float32 addition per output and 128 products      |

It works inside one dot: a k tile shorter than the attribute would never be promoted, hence the
minimum.

This file is the only one that touches private names of JAX: Pallas has no public way to add a
Triton lowering. They are looked up on first use, so that importing the package costs nothing, and
one error says what to do when an upgrade has moved them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex_core

NEVER_PROMOTED = 2**30
_SMALLEST_FOR_WGMMA = 32

fp8_dot_p = jex_core.Primitive("fp8_dot")


def fp8_dot(a: jax.Array, b: jax.Array, acc: jax.Array, *, promote_every: int | None) -> jax.Array:
    """acc + a @ b.T, on FP8 tensor cores inside a Pallas-Triton kernel, in float32 anywhere else.

    For `wgmma` the tiles must have m a multiple of 64, n ≥ 16, k ≥ 32, and the kernel a multiple of
    4 warps; smaller tiles still work but fall back to float16 instructions on Hopper.

    Args:
        a: float8_e4m3fn `[m, k]`.
        b: float8_e4m3fn `[n, k]`, as loaded: contiguous along k.
        acc: float32 `[m, n]`.
        promote_every: products along k that Hopper may sum in its short accumulator, at least 32;
            None for no limit.
    Returns:
        float32 `[m, n]`.
    Raises:
        ValueError: shapes or dtypes that do not belong together.
        ImportError: this JAX has moved the private names that the Triton lowering needs.
    """
    _check(a, b, acc, promote_every)
    register_lowerings()
    imprecise = NEVER_PROMOTED if promote_every is None else min(promote_every, a.shape[1])
    return fp8_dot_p.bind(a, b, acc, imprecise=imprecise)


def _check(a: jax.Array, b: jax.Array, acc: jax.Array, promote_every: int | None) -> None:
    if a.dtype != jnp.float8_e4m3fn or b.dtype != jnp.float8_e4m3fn or acc.dtype != jnp.float32:
        raise ValueError(
            f"fp8_dot takes float8_e4m3fn a and b and a float32 acc, got {a.dtype}, {b.dtype} and "
            f"{acc.dtype}; cast them first"
        )
    if (
        a.ndim != 2
        or b.ndim != 2
        or a.shape[1] != b.shape[1]
        or acc.shape != (a.shape[0], b.shape[0])
    ):
        raise ValueError(
            f"fp8_dot takes a [m, k], b [n, k] and acc [m, n], got {a.shape}, {b.shape} and "
            f"{acc.shape}; b is not transposed beforehand"
        )
    if promote_every is not None and promote_every < _SMALLEST_FOR_WGMMA:
        raise ValueError(
            f"fp8_dot: promote_every is {promote_every}, but below {_SMALLEST_FOR_WGMMA} Triton "
            "does not use FP8 instructions on Hopper; use 128, or None for no promotion"
        )


@fp8_dot_p.def_abstract_eval
def _shape(a, b, acc, *, imprecise):
    del a, b, imprecise
    return jax.core.ShapedArray(acc.shape, acc.dtype)  # pyright: ignore[reportAttributeAccessIssue]


@fp8_dot_p.def_impl
def _in_float32(a, b, acc, *, imprecise):
    """What interpret mode runs: products of e4m3 values are exact in float32, and the accumulator
    is never short."""
    del imprecise
    return acc + lax.dot_general(
        a.astype(jnp.float32),
        b.astype(jnp.float32),
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


@functools.cache
def register_lowerings() -> None:
    """Teach XLA and Pallas-Triton the primitive; `fp8_dot` calls it."""
    try:
        from jax._src.interpreters import mlir
        from jax._src.lib.triton import dialect as triton_dialect
        from jax._src.pallas.triton import lowering as triton_lowering

        register_triton_rule = triton_lowering.register_lowering
        dot, transpose = triton_dialect.dot, triton_dialect.trans
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"fp8_dot: JAX {jax.__version__} no longer has the private names behind its Triton "
            f"lowering ({error}); use a JAX of the range in pyproject.toml, or implementation='xla'"
        ) from error

    mlir.register_lowering(fp8_dot_p, mlir.lower_fun(_in_float32, multiple_results=False))

    @register_triton_rule(fp8_dot_p)
    def _triton_dot(context, a, b, acc, *, imprecise):
        del context
        return dot(a, transpose(b, (1, 0)), acc, max_num_imprecise_acc=imprecise)
