"""QArray: a weight as e4m3 codes and float32 scales, and the way there and back.

    s = amax / 448        q = round_e4m3(clip(w · (1/s), ±448))        w ≈ q · s

amax is the largest |w| of everything that shares the scale. Division and reciprocal are correctly
rounded on every device (see `exact_division`), so scales and codes equal the reference's (vLLM's
`scaled_fp8_quant` and `per_block_cast_to_fp8`) to the bit.

| granularity | shares a scale                     | floor                            | scale shape          |
|-------------|------------------------------------|----------------------------------|----------------------|
| tensor      | the matrix; for experts, an expert | s ≥ 2⁻¹²⁶: zeros give q = 0      | `[1]`, experts `[e]` |
| channel     | an output row                      | s ≥ 2⁻¹²⁶                        | `[n, 1]`             |
| block       | 128×128, edge blocks their rest    | amax ≥ 1e-4                      | `[⌈n/128⌉, ⌈k/128⌉]` |

A stack of gate and up rows is two *row groups*: blocks are laid out in each half for itself, so
that no block mixes the two when the half is not a multiple of 128 rows. Scales are then
`[e, 2⌈i/128⌉, ⌈k/128⌉]`, gate first.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fp8jax import exact_division, no_gradient
from fp8jax.pallas_kernels.formats import BLOCK, E4M3_MAX, unaddressable
from fp8jax.schemes import Scheme, scheme_named

_SMALLEST_NORMAL = 2.0**-126
_BLOCK_AMAX_FLOOR = 1e-4
_QUANTIZING_HAS_NO_GRADIENT = (
    "quantize has no gradient: rounding is a staircase. For the straight-through estimate write "
    "fixed = jax.lax.stop_gradient(w); w + (fp8jax.dequantize(fp8jax.quantize(fixed, scheme)) - "
    "fixed)"
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QArray:
    """A quantized weight: a pytree with the leaves `qvalue` and `scale`.

    Args:
        qvalue: float8_e4m3fn `[n, k]`, or `[e, n, k]` for a stack of experts.
        scale: float32 in the shape of the table above; the scale multiplies.
        scheme: how it was made and how activations that meet it are quantized (static).
        row_groups: into how many equal groups of rows the blocks were laid out (static); 2 for an
            experts' gate and up.
    """

    qvalue: jax.Array
    scale: jax.Array
    scheme: Scheme = field(metadata={"static": True})
    row_groups: int = field(default=1, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.qvalue.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return (
            self.qvalue.size * self.qvalue.dtype.itemsize
            + self.scale.size * self.scale.dtype.itemsize
        )

    def validate(self) -> None:
        """Raise ValueError where dtypes or shapes do not belong together."""
        if self.qvalue.dtype != jnp.float8_e4m3fn or self.scale.dtype != jnp.float32:
            raise ValueError(
                f"QArray holds float8_e4m3fn codes and float32 scales, got {self.qvalue.dtype} and "
                f"{self.scale.dtype}"
            )
        expected = scale_shape(self.qvalue.shape, self.scheme, row_groups=self.row_groups)
        if self.scale.shape != expected:
            raise ValueError(
                f"QArray of shape {self.qvalue.shape} under {self.scheme} has scales "
                f"{self.scale.shape}, expected {expected}"
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SplitQArray:
    """A stack of experts that kernels cannot address as one array, cut along its rows: each part
    has some rows of every expert.

    Args:
        parts: stacks `[e, n_i, k]` with the n_i adding up to n, whose blocks are those of the
            whole.
        row_groups: of the whole (static).
    """

    parts: tuple[QArray, ...]
    row_groups: int = field(default=1, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        *experts, _, k = self.parts[0].shape
        return (*experts, sum(self.rows), k)

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of each part."""
        return tuple(part.shape[-2] for part in self.parts)

    @property
    def scheme(self) -> Scheme:
        return self.parts[0].scheme

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(part.nbytes for part in self.parts)

    def joined(self) -> QArray:
        """The stack in one piece, copied."""
        codes = jnp.concatenate([part.qvalue for part in self.parts], axis=-2)
        scales = [part.scale for part in self.parts]
        scale = jnp.concatenate(scales, axis=-2) if self.scheme.weight != "tensor" else scales[0]
        return QArray(codes, scale, self.scheme, self.row_groups)


def rows_of_parts(shape: tuple[int, ...], *, row_groups: int = 1) -> tuple[int, ...]:
    """Into how many rows each a stack `[e, n, k]` has to be cut, `(n,)` where it can stay whole.

    Parts end where a row group ends, or else at whole blocks of 128 rows, so that cutting changes
    no scale. A stack of fewer than 256 rows and as large as that (16 million inputs and experts) is
    left as it is; its kernel refuses it.
    """
    e, n, k = shape
    if not unaddressable(e * n * k):
        return (n,)
    width = n // row_groups if row_groups > 1 else max(BLOCK, n // 2 // BLOCK * BLOCK)
    starts = range(0, n, width)
    return tuple(min(width, n - start) for start in starts)


def split_rows(q: QArray, rows: tuple[int, ...]) -> SplitQArray:
    """Cut a weight `[n, k]` or `[e, n, k]` into parts of so many rows, as `rows_of_parts` gives
    them."""
    group_rows = q.shape[-2] // q.row_groups
    codes = lax.bitcast_convert_type(
        q.qvalue, jnp.uint8
    )  # as bytes: a CPU would slice FP8 as float16
    parts, start, block = [], 0, 0
    for count in rows:
        part = lax.bitcast_convert_type(codes[..., start : start + count, :], jnp.float8_e4m3fn)
        groups = max(1, count // group_rows)
        scale, blocks = q.scale, groups * -(-(count // groups) // BLOCK)
        if q.scheme.weight == "block":
            scale = scale[..., block : block + blocks, :]
        elif q.scheme.weight == "channel":
            scale = scale[..., start : start + count, :]
        parts.append(QArray(part, scale, q.scheme, groups))
        start, block = start + count, block + blocks
    return SplitQArray(tuple(parts), q.row_groups)


def scale_shape(shape: tuple[int, ...], scheme: Scheme, *, row_groups: int = 1) -> tuple[int, ...]:
    """Shape of the scales of a weight of this shape, `[n, k]` or `[e, n, k]`."""
    *experts, n, k = shape
    match scheme.weight:
        case "tensor":
            return tuple(experts) or (1,)
        case "channel":
            return (*experts, n, 1)
        case "block":
            return (*experts, row_groups * -(-n // row_groups // BLOCK), -(-k // BLOCK))


def quantize(
    weight: jax.Array, scheme: str | Scheme, *, row_groups: int = 1, amax: jax.Array | None = None
) -> QArray:
    """Quantize a weight; traceable, so it works inside `jax.jit` and under `jax.eval_shape`.

    It has no derivative, and asking for one is an error. Quantization-aware training takes the
    straight-through estimate:

        fixed = jax.lax.stop_gradient(w)
        w + (dequantize(quantize(fixed, scheme)) - fixed)

    Args:
        weight: bfloat16, float16 or float32, `[n, k]` or `[e, n, k]`. NaN and Inf are not looked
            for here; the loader does.
        scheme: `"fp8_per_tensor"`, `"fp8_per_block"` or a `Scheme`.
        row_groups: number of equal row groups whose blocks never mix (see the module's text).
        amax: float32 `[1]`, the largest |w| of all that shares the scale, where `weight` is a part
            of a matrix that has one scale; None for what `weight` itself has.
    Returns:
        QArray whose codes and scales equal the reference's to the bit.
    Raises:
        ValueError: not a 2-D or 3-D float array, an empty one, or rows that `row_groups` does not
            divide.
        TypeError: someone differentiates with respect to the weight.
    Source: vLLM 0.20.2, scaled_fp8_quant (dynamic) and per_block_cast_to_fp8.
    """
    scheme = scheme_named(scheme) if isinstance(scheme, str) else scheme
    weight = jnp.asarray(weight)
    if weight.ndim not in (2, 3) or weight.size == 0:
        raise ValueError(
            "quantize takes a weight [n, k] or [e, n, k] without empty dimensions, got shape "
            f"{weight.shape}"
        )
    if weight.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"quantize takes bfloat16, float16 or float32 weights, got {weight.dtype}")
    if weight.shape[-2] % row_groups:
        raise ValueError(f"{weight.shape[-2]} rows do not split into {row_groups} equal row groups")
    weight = no_gradient.refused(weight, TypeError(_QUANTIZING_HAS_NO_GRADIENT))

    if amax is not None and (scheme.weight != "tensor" or weight.ndim != 2):
        raise ValueError(
            f"quantize takes amax for a matrix with one scale, got it for {weight.shape} under "
            f"{scheme}"
        )
    if scheme.weight == "block":
        qvalue, scale = _quantize_blocks(weight, row_groups)
    else:
        axes = (-2, -1) if scheme.weight == "tensor" else (-1,)
        if amax is None:
            amax = jnp.max(jnp.abs(weight), axis=axes, keepdims=True).astype(jnp.float32)
        else:
            amax = amax.reshape(1, 1)
        scale = jnp.maximum(
            exact_division.divide(amax, jnp.float32(E4M3_MAX)), jnp.float32(_SMALLEST_NORMAL)
        )
        qvalue = _to_e4m3(
            _multiply_with_subnormals(weight, exact_division.divide(jnp.float32(1), scale))
        )
        scale = scale.reshape(scale_shape(weight.shape, scheme))
    return QArray(qvalue, scale, scheme, row_groups)


def dequantize(q: QArray) -> jax.Array:
    """The weight that the codes stand for: q · s, float32, of the shape of `q.qvalue`. Codes and
    scales have no gradient."""
    q = no_gradient.constant_weight(q)
    codes = q.qvalue.astype(jnp.float32)
    match q.scheme.weight:
        case "tensor":
            return codes * q.scale.reshape(*q.shape[:-2], 1, 1)
        case "channel":
            return codes * q.scale
        case "block":
            return codes * expand_block_scale(q.scale, q.shape, row_groups=q.row_groups)


def dequantize_rows(q: QArray, rows: np.ndarray) -> jax.Array:
    """`dequantize(q)[..., rows, :]` without making the rest: float32 `[..., len(rows), k]`.

    Args:
        q: `[n, k]` or `[e, n, k]`.
        rows: int `[r]`, known at trace time.
    """
    codes = q.qvalue[..., rows, :].astype(jnp.float32)
    match q.scheme.weight:
        case "tensor":
            return codes * q.scale.reshape(*q.shape[:-2], 1, 1)
        case "channel":
            return codes * q.scale[..., rows, :]
        case "block":
            group, row = np.divmod(rows, q.shape[-2] // q.row_groups)
            block = group * (q.scale.shape[-2] // q.row_groups) + row // BLOCK
            return codes * jnp.repeat(q.scale[..., block, :], BLOCK, axis=-1)[..., : q.shape[-1]]


def expand_block_scale(
    scale: jax.Array, shape: tuple[int, ...], *, row_groups: int = 1
) -> jax.Array:
    """Scales of 128×128 blocks repeated to one per element, `[..., n, k]`."""
    *experts, n, k = shape
    rows = scale.reshape(*experts, row_groups, -1, scale.shape[-1])
    rows = jnp.repeat(rows, BLOCK, axis=-2)[..., : n // row_groups, :].reshape(
        *experts, n, scale.shape[-1]
    )
    return jnp.repeat(rows, BLOCK, axis=-1)[..., :k]


def _quantize_blocks(weight: jax.Array, row_groups: int) -> tuple[jax.Array, jax.Array]:
    *experts, n, k = weight.shape
    rows = n // row_groups
    row_blocks, column_blocks = -(-rows // BLOCK), -(-k // BLOCK)
    # Zeros around an edge block do not change its amax: its scale comes from its real elements.
    margin = [(0, 0)] * (len(experts) + 1) + [
        (0, row_blocks * BLOCK - rows),
        (0, column_blocks * BLOCK - k),
    ]
    padded = jnp.pad(weight.reshape(*experts, row_groups, rows, k), margin)
    blocks = padded.reshape(*experts, row_groups, row_blocks, BLOCK, column_blocks, BLOCK)
    amax = jnp.max(jnp.abs(blocks), axis=(-3, -1)).astype(jnp.float32)
    amax = jnp.maximum(amax, jnp.float32(_BLOCK_AMAX_FLOOR))
    scale = exact_division.divide(amax, jnp.float32(E4M3_MAX))
    scale = scale.reshape(*experts, row_groups * row_blocks, column_blocks)
    reciprocal = exact_division.divide(jnp.float32(1), scale)
    # With s ≥ 1e-4/448 a subnormal weight is far below half the smallest code: flushing it to zero
    # gives the right code, 0.
    qvalue = _to_e4m3(
        weight.astype(jnp.float32)
        * expand_block_scale(reciprocal, weight.shape, row_groups=row_groups)
    )
    return qvalue, scale


def _to_e4m3(x: jax.Array) -> jax.Array:
    # JAX's cast gives NaN above 464 instead of saturating.
    return jnp.clip(x, jnp.float32(-E4M3_MAX), jnp.float32(E4M3_MAX)).astype(jnp.float8_e4m3fn)


def _multiply_with_subnormals(weight: jax.Array, reciprocal: jax.Array) -> jax.Array:
    """float32(weight) · reciprocal with subnormal weights taken at their value.

    XLA flushes subnormal operands to zero, NumPy and torch do not. It matters only where a whole
    tensor is below 1e-31, but "to the bit" has no exceptions. A subnormal is m · 2⁻¹⁴⁹ with an
    integer m; m · 2⁻²³ and reciprocal · 2⁻¹²⁶ are both exact, so their product is rounded once,
    like the product it stands for.
    """
    wide = weight.astype(jnp.float32)
    if weight.dtype == jnp.float16:  # the smallest float16 subnormal, 2⁻²⁴, is a normal float32
        return wide * reciprocal
    if weight.dtype == jnp.bfloat16:
        bits = lax.bitcast_convert_type(weight, jnp.uint16).astype(jnp.uint32) << jnp.uint32(16)
    else:
        bits = lax.bitcast_convert_type(weight, jnp.uint32)
    mantissa = (bits & jnp.uint32((1 << 23) - 1)).astype(jnp.float32) * jnp.float32(2.0**-23)
    sign = jnp.where(bits >> jnp.uint32(31) == 0, jnp.float32(1), jnp.float32(-1))
    subnormal = ((bits >> jnp.uint32(23)) & jnp.uint32(255)) == 0
    tiny = sign * mantissa * (reciprocal * jnp.float32(_SMALLEST_NORMAL))
    return jnp.where(subnormal, tiny, wide * reciprocal)
