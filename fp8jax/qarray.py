"""QArray: a weight as e4m3 codes and float32 scales, and the way there and back.

    s = amax / 448        q = round_e4m3(clip(w · (1/s), ±448))        w ≈ q · s

amax is the largest |w| of the block that shares a scale, or the floor of the granularity where that
is larger. Blocks at an edge are what is left of the matrix. The block, the floor and the shape of
the scales stand in the table of `pallas_kernels/formats.py`. The functions here work for any block
of rows × columns.

Division and reciprocal are correctly rounded on every device (see `exact_division`), so that scales
and codes equal the reference's (vLLM's `scaled_fp8_quant` and `per_block_cast_to_fp8`) to the bit.

A stack of gate and up rows is two *row groups*: blocks are laid out in each half for itself, so
that none mixes the two where a half is no multiple of the block.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fp8jax import exact_division, no_gradient
from fp8jax.pallas_kernels.formats import (
    E4M3_MAX,
    SMALLEST_NORMAL,
    Granularity,
    blocks,
    unaddressable,
)
from fp8jax.schemes import Scheme, scheme_named

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
        scale: float32, in the shape that the table of granularities gives; the scale multiplies.
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
        expected = self.scheme.granularity.scale_shape(
            self.qvalue.shape, row_groups=self.row_groups
        )
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
        one_scale = self.scheme.granularity.one_scale
        scale = scales[0] if one_scale else jnp.concatenate(scales, axis=-2)
        return QArray(codes, scale, self.scheme, self.row_groups)


def rows_of_parts(
    shape: tuple[int, ...], granularity: Granularity, *, row_groups: int = 1
) -> tuple[int, ...]:
    """Into how many rows each a stack `[e, n, k]` has to be cut, `(n,)` where it can stay whole.

    Parts end where a row group ends, or else between whole blocks, so that cutting changes no
    scale. A stack of fewer than 256 rows and as large as that (16 million inputs and experts) is
    left as it is; its kernel refuses it.
    """
    e, n, k = shape
    if not unaddressable(e * n * k):
        return (n,)
    step = granularity.row_step
    width = n // row_groups if row_groups > 1 else max(step, n // 2 // step * step)
    starts = range(0, n, width)
    return tuple(min(width, n - start) for start in starts)


def split_rows(q: QArray, rows: tuple[int, ...]) -> SplitQArray:
    """Cut a weight into parts of so many rows, as `rows_of_parts` gives them.

    Args:
        q: `[n, k]` or `[e, n, k]`.
        rows: of each part, whole row groups or whole blocks of one.
    """
    group_rows, granularity = q.shape[-2] // q.row_groups, q.scheme.granularity
    # As bytes: a CPU would slice FP8 as float16.
    codes = lax.bitcast_convert_type(q.qvalue, jnp.uint8)
    parts, row, scale_row = [], 0, 0
    for count in rows:
        part = lax.bitcast_convert_type(codes[..., row : row + count, :], jnp.float8_e4m3fn)
        groups = max(1, count // group_rows)
        scale_rows = granularity.scale_rows(count, row_groups=groups)
        scale = q.scale
        if not granularity.one_scale:
            scale = scale[..., scale_row : scale_row + scale_rows, :]
        parts.append(QArray(part, scale, q.scheme, groups))
        row, scale_row = row + count, scale_row + scale_rows
    return SplitQArray(tuple(parts), q.row_groups)


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
        scheme: the name of one, `"fp8_per_block"`, or a `Scheme`.
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
    scheme = scheme_named(scheme)
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

    granularity = scheme.granularity
    if amax is not None and not (granularity.one_scale and weight.ndim == 2):
        raise ValueError(
            f"quantize takes amax for a matrix with one scale, got it for {weight.shape} under "
            f"{scheme}"
        )
    amax = _block_amax(weight, granularity, row_groups) if amax is None else amax.reshape(1, 1)
    amax = jnp.maximum(amax, jnp.float32(granularity.amax_floor))
    scale = exact_division.divide(amax, jnp.float32(E4M3_MAX))
    scale = scale.reshape(*weight.shape[:-2], -1, scale.shape[-1])
    reciprocal = _per_element(
        exact_division.divide(jnp.float32(1), scale), weight.shape, granularity, row_groups
    )
    multiply = _multiply_with_subnormals if granularity.subnormals_count else _multiply
    qvalue = _to_e4m3(multiply(weight, reciprocal))
    scale = scale.reshape(granularity.scale_shape(weight.shape, row_groups=row_groups))
    return QArray(qvalue, scale, scheme, row_groups)


def dequantize(q: QArray) -> jax.Array:
    """The weight that the codes stand for: q · s.

    Codes and scales have no gradient.

    Returns:
        float32 of the shape of `q.qvalue`.
    """
    q = no_gradient.constant_weight(q)
    codes = q.qvalue.astype(jnp.float32)
    return codes * _per_element(_scale_matrix(q), q.shape, q.scheme.granularity, q.row_groups)


def dequantize_rows(q: QArray, rows: np.ndarray) -> jax.Array:
    """`dequantize(q)[..., rows, :]` without making the rest: float32 `[..., len(rows), k]`.

    Args:
        q: `[n, k]` or `[e, n, k]`.
        rows: int `[r]`, known at trace time.
    """
    granularity, (n, k) = q.scheme.granularity, q.shape[-2:]
    codes = q.qvalue[..., rows, :].astype(jnp.float32)
    scale = _scale_matrix(q)
    if granularity.rows is not None:
        group, row = np.divmod(rows, n // q.row_groups)
        scale_rows_of_group = granularity.scale_rows(n // q.row_groups)
        scale = scale[..., group * scale_rows_of_group + row // granularity.rows, :]
    return codes * _repeated(scale, granularity.columns, k, axis=-1)


def _scale_matrix(q: QArray) -> jax.Array:
    """The scales as `[..., rows of blocks, columns of blocks]`."""
    return q.scale.reshape(*q.shape[:-2], 1, 1) if q.scheme.granularity.one_scale else q.scale


def _block_amax(weight: jax.Array, granularity: Granularity, row_groups: int) -> jax.Array:
    """float32 `[..., row groups, rows of blocks, columns of blocks]`: the largest |w| of each."""
    *experts, n, k = weight.shape
    groups = 1 if granularity.one_scale else row_groups
    magnitude = jnp.abs(weight).reshape(*experts, groups, n // groups, k)
    magnitude = _largest(magnitude, granularity.rows, axis=-2)
    return _largest(magnitude, granularity.columns, axis=-1).astype(jnp.float32)


def _largest(magnitude: jax.Array, block: int | None, *, axis: int) -> jax.Array:
    """The largest of each block along one axis, which becomes as long as there are blocks."""
    if block == 1:
        return magnitude
    if block is None:
        return jnp.max(magnitude, axis=axis, keepdims=True)
    # Zeros behind an edge block do not change its amax, which comes from its real elements.
    size, axis = magnitude.shape[axis], axis % magnitude.ndim
    margin = [(0, 0)] * magnitude.ndim
    margin[axis] = (0, blocks(size, block) * block - size)
    shape = (*magnitude.shape[:axis], -1, block, *magnitude.shape[axis + 1 :])
    return jnp.max(jnp.pad(magnitude, margin).reshape(shape), axis=axis + 1)


def _per_element(
    scale: jax.Array, shape: tuple[int, ...], granularity: Granularity, row_groups: int
) -> jax.Array:
    """Scales `[..., rows of blocks, columns of blocks]` repeated until they broadcast to the
    elements of `shape`."""
    *experts, n, k = shape
    groups = 1 if granularity.one_scale else row_groups
    rows = scale.reshape(*experts, groups, -1, scale.shape[-1])
    rows = _repeated(rows, granularity.rows, n // groups, axis=-2)
    rows = rows.reshape(*experts, -1, scale.shape[-1])
    return _repeated(rows, granularity.columns, k, axis=-1)


def _repeated(scale: jax.Array, block: int | None, size: int, *, axis: int) -> jax.Array:
    """Each scale as often as its block is long, along one axis; as it is where it broadcasts."""
    if block is None or block == 1:
        return scale
    return lax.slice_in_dim(jnp.repeat(scale, block, axis=axis), 0, size, axis=axis)


def _to_e4m3(x: jax.Array) -> jax.Array:
    # JAX's cast gives NaN above 464 instead of saturating.
    return jnp.clip(x, jnp.float32(-E4M3_MAX), jnp.float32(E4M3_MAX)).astype(jnp.float8_e4m3fn)


def _multiply(weight: jax.Array, reciprocal: jax.Array) -> jax.Array:
    """float32(weight) · reciprocal, subnormal weights perhaps taken for 0."""
    return weight.astype(jnp.float32) * reciprocal


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
    tiny = sign * mantissa * (reciprocal * jnp.float32(SMALLEST_NORMAL))
    return jnp.where(subnormal, tiny, wide * reciprocal)
