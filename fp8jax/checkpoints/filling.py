"""Filling an abstract model from a checkpoint, some megabytes at a time.

    file ──read──> a buffer of PIECE_BYTES
         ──> rows quantized (one jitted function)
         ──> written into the finished weight

A *piece* is some rows of a matrix, whole blocks of them; a matrix that fits is one piece. The
finished weight is there from the start, is donated to each write and so changes in place. At any
moment the process holds the finished weights and what belongs to two pieces: while the device works
on one, the next is read. A large layer costs no more than a small one, in whichever dtype it is
stored.

Cutting changes no bit: scales of blocks and rows lie within a piece. The scale of a whole tensor
does not, so where such a matrix is more than one piece, it is read twice, for its largest |w|
first; the second time the file is in the page cache.

What a piece has as its largest |w| in each row is also how NaN, Inf and numbers too large are
found, and where.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fp8jax.checkpoints.errors import CheckpointError, Faults
from fp8jax.checkpoints.file_reading import aligned_empty
from fp8jax.checkpoints.folder import Checkpoint
from fp8jax.checkpoints.load_report import LayerReport, Outcome, mebibytes
from fp8jax.checkpoints.parameters import Parameter, Span
from fp8jax.pallas_kernels.formats import BLOCK, Granularity, blocks
from fp8jax.qarray import QArray, SplitQArray, dequantize_rows, quantize, rows_of_parts
from fp8jax.quantization_config import QuantizationConfig
from fp8jax.schemes import Scheme

PIECE_BYTES = 16 << 20  # of the checkpoint; larger ones load no faster
_ERROR_ROWS = 256


def fill(
    checkpoint: Checkpoint,
    parameters: Sequence[Parameter],
    schemes: Mapping[str, Scheme | None],
    quantization: QuantizationConfig,
    *,
    dtype: str,
    disable_bar: bool | None,
) -> list[LayerReport]:
    """Fill in every parameter of a model.

    Args:
        checkpoint: whose headers fit the parameters, see `check_against`.
        parameters: with the modules that they go into.
        schemes: by name of the parameter; None for what stays unquantized.
        quantization: for the report, why a layer stays as it is.
        dtype: of what is not quantized.
        disable_bar: no progress bar; None for one on terminals only.
    Returns:
        One entry a parameter.
    Raises:
        CheckpointError: NaN, Inf or numbers beyond `dtype`, those of all tensors; or a file changed
            meanwhile.
        MemoryError: host or device ran out of it; names the layer, its size and how far loading
            was.
    """
    from tqdm import tqdm

    sizes = [sum(checkpoint.tensors[source].nbytes for source, _ in p.sources) for p in parameters]
    buffers, reports, faults = _Buffers(), [], Faults()
    with tqdm(
        total=sum(sizes),
        desc="loading",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=disable_bar,
    ) as bar:

        def report(filled: _Filled, size: int) -> LayerReport:
            faults.extend(_misfits(checkpoint, filled, dtype))
            p, amax = filled.parameter, filled.shard_amax()
            return LayerReport(
                name=p.name if p.attribute == "weight" else f"{p.name}.{p.attribute}",
                kind=p.kind,
                outcome=_outcome(p, filled.scheme, quantization),
                scheme=filled.scheme,
                bytes_before=size,
                bytes_after=getattr(p.module, p.attribute).nbytes,
                relative_error=filled.relative_error(),
                shard_amax=amax,
            )

        previous = None
        for i, p in enumerate(parameters):
            scheme = schemes[p.name] if p.kind != "other" else None
            try:
                current = _fill_one(checkpoint, p, scheme, dtype, buffers, bar.update)
                # One behind, so that the device still works on a layer while the next is being
                # read.
                if previous is not None:
                    reports.append(report(previous, sizes[i - 1]))
            except (MemoryError, jax.errors.JaxRuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                # The device may have been at work on the one before.
                before = f" (or {parameters[i - 1].name} before it)" if i else ""
                raise MemoryError(
                    f"{p.name}.{p.attribute}: out of memory while loading it{before}: it has "
                    f"{mebibytes(sizes[i])} in the checkpoint; {mebibytes(sum(sizes[:i]))} of "
                    f"{mebibytes(sum(sizes))} were read before. Free memory, raise the limit of "
                    f"this process, or quantize more of the model. ({type(error).__name__}: "
                    f"{error})"
                ) from error
            previous = current
        if previous is not None:
            reports.append(report(previous, sizes[-1]))
    if faults:
        raise CheckpointError.gather(str(checkpoint.folder), faults)
    return reports


@dataclass(frozen=True)
class _Piece:
    """Rows of a matrix that are read and quantized together.

    Args:
        first, rows: which rows.
        row_groups: how many row groups it holds; 1 for a share of one.
        part: which part of a stack that is cut (`rows_of_parts`) it goes into.
        start, scale_row: row of that part, and row of its scales, where it begins.
    """

    first: int
    rows: int
    row_groups: int
    part: int
    start: int
    scale_row: int


def _cut(
    n: int,
    row_bytes: int,
    granularity: Granularity | None,
    *,
    row_groups: int,
    parts: Sequence[int],
) -> Iterator[_Piece]:
    """Cuts n rows into pieces of about PIECE_BYTES.

    A piece ends where a part or a row group ends, or else between whole blocks; `granularity` is
    None for what is not quantized.
    """
    if n * row_bytes <= PIECE_BYTES and len(parts) == 1:
        yield _Piece(0, n, row_groups, 0, 0, 0)
        return
    unit = BLOCK if granularity is None else granularity.row_step
    scale_rows = (lambda rows: 0) if granularity is None else granularity.scale_rows
    group_rows, first = n // row_groups, 0
    for part, part_rows in enumerate(parts):
        scale_row = 0
        for group in range(0, part_rows, group_rows):
            rows = min(group_rows, part_rows - group)
            count = blocks(rows * row_bytes, PIECE_BYTES)
            # Of about equal size: few shapes to compile for.
            step = blocks(blocks(rows, count), unit) * unit
            for start in range(0, rows, step):
                yield _Piece(
                    first=first + start,
                    rows=min(step, rows - start),
                    row_groups=1,
                    part=part,
                    start=group + start,
                    scale_row=scale_row + scale_rows(start),
                )
            first, scale_row = first + rows, scale_row + scale_rows(rows)


class _Buffers:
    """Host memory for two pieces in turn: while the device works from one, the file is read into
    the other."""

    def __init__(self) -> None:
        self._memory = [aligned_empty(0), aligned_empty(0)]
        self._turn = 0
        self._result: jax.Array | None = None

    def next(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The buffer that nothing is computed from; valid until the call after the next."""
        self._turn = 1 - self._turn
        size = math.prod(shape) * dtype.itemsize
        if len(self._memory[self._turn]) < size:
            self._memory[self._turn] = aligned_empty(size)
        return self._memory[self._turn][:size].view(dtype).reshape(shape)

    def wait(self) -> None:
        """Waits until the device is done with the buffer before; to be called when this one is
        full.

        That frees the other buffer, which on a CPU the device may read in place, and leaves the
        device one piece at a time.
        """
        if self._result is not None:
            self._result.block_until_ready()

    def used_by(self, result: jax.Array) -> None:
        """Says what was computed from the buffer given last."""
        self._result = result


@dataclass(frozen=True)
class _Filled:
    """What is known of a weight that has been filled in, still on the device.

    Args:
        row_amax: by expert, piece and row, the largest |w|; NaN and Inf show in it.
        norms: what `_convert` gives for each piece.
    """

    parameter: Parameter
    scheme: Scheme | None
    row_amax: list[list[jax.Array]]
    norms: list[jax.Array]

    @functools.cached_property
    def span_rows(self) -> list[list[tuple[Span, np.ndarray]]]:
        """By expert, each span with the largest |w| of its rows."""
        found = []
        for expert, pieces in enumerate(self.row_amax):
            spans = self.parameter.spans_of(expert if self.parameter.experts is not None else None)
            rows = np.concatenate([np.asarray(piece) for piece in pieces])
            found.append(
                list(
                    zip(
                        spans,
                        np.split(rows, np.cumsum([span.rows for span in spans])[:-1]),
                        strict=True,
                    )
                )
            )
        return found

    def shard_amax(self) -> tuple[float, ...]:
        """The largest |w| of each shard, over all experts."""
        amax = np.asarray([[rows.max(initial=0) for _, rows in spans] for spans in self.span_rows])
        return tuple(map(float, amax.max(axis=0)))

    def relative_error(self) -> float | None:
        """‖dequantized − w‖ / ‖w‖ from rows of (unit, ‖difference‖ / unit, ‖w‖ / unit), one a
        piece."""
        if self.scheme is None:
            return None
        unit, difference, weight = np.asarray(self.norms, np.float64).T
        norm = np.linalg.norm(unit * weight)
        return float(np.linalg.norm(unit * difference) / norm) if norm else 0.0


def _fill_one(
    checkpoint: Checkpoint,
    p: Parameter,
    scheme: Scheme | None,
    dtype: str,
    buffers: _Buffers,
    advance: Callable[[int], Any],
) -> _Filled:
    """Reads, quantizes and places one weight; returns while the device may still be at work."""
    stored = _stored_dtype(checkpoint, p)
    row_groups, row_shape = getattr(p, "row_groups", 1), p.shape[max(1, len(p.shape) - 1) :]
    n, width = p.shape[len(p.shape) - 1 - len(row_shape)], math.prod(row_shape)
    granularity = scheme.granularity if scheme is not None else None
    parts = (n,)
    if p.experts is not None and granularity is not None:
        parts = rows_of_parts((p.experts, n, width), granularity, row_groups=row_groups)
    row_bytes = width * stored.itemsize
    pieces = list(_cut(n, row_bytes, granularity, row_groups=row_groups, parts=parts))
    whole_at_once = len(pieces) == 1 and p.experts is None
    finished: list[Any] = [] if whole_at_once else _empty(p.shape, parts, scheme, dtype, row_groups)

    def put_on_device(spans: Sequence[Span], piece: _Piece) -> jax.Array:
        rows = buffers.next((piece.rows, *row_shape), stored)
        _read_rows(checkpoint, spans, piece.first, rows)
        buffers.wait()
        # A weight that needs no cast would be the buffer itself.
        return jax.device_put(rows, may_alias=False if whole_at_once and scheme is None else None)

    row_amax, norms = [], []
    for expert in range(p.experts or 1):
        spans = p.spans_of(expert if p.experts is not None else None)
        amax = None
        if granularity is not None and granularity.one_scale and len(pieces) > 1:
            for piece in pieces:
                amax = _larger(amax, put_on_device(spans, piece))
                buffers.used_by(amax)
        row_amax.append([])
        for piece in pieces:
            rows = put_on_device(spans, piece)
            value, of_rows, norm = _convert(
                rows, amax, scheme, dtype, piece.row_groups, blocks(_ERROR_ROWS * piece.rows, n)
            )
            buffers.used_by(of_rows)
            if whole_at_once:
                finished.append(value)
            else:
                where = np.asarray([expert, piece.start, piece.scale_row], np.int32)
                finished[piece.part] = _put(finished[piece.part], value, where)
            row_amax[-1].append(of_rows)
            norms.append(norm)
            advance(rows.nbytes)
    weight = finished[0] if len(finished) == 1 else SplitQArray(tuple(finished), row_groups)
    setattr(p.module, p.attribute, nnx.data(weight))
    return _Filled(p, scheme, row_amax, norms)


def _stored_dtype(checkpoint: Checkpoint, p: Parameter) -> np.dtype:
    """The dtype of a weight's tensors; float32, which holds each exactly, where they differ."""
    dtypes = {checkpoint.tensors[source].dtype for source, _ in p.sources}
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def _read_rows(checkpoint: Checkpoint, spans: Sequence[Span], first: int, out: np.ndarray) -> None:
    """Fills `out` with rows, from `first` on, of the matrix that the spans make."""
    top, width = 0, out[:1].size
    for span in spans:
        begin, end = max(first, top), min(first + len(out), top + span.rows)
        if begin < end:
            target, dtype = out[begin - first : end - first], checkpoint.tensors[span.source].dtype
            read = target if target.dtype == dtype else np.empty(target.shape, dtype)
            checkpoint.read_into(span.source, read, first=(span.first + begin - top) * width)
            if read is not target:
                target[...] = read.astype(target.dtype)
        top += span.rows


@jax.jit
def _larger(amax: jax.Array | None, weight: jax.Array) -> jax.Array:
    """float32 `[1]`: the larger of `amax` and the largest |w|."""
    own = jnp.max(jnp.abs(weight)).astype(jnp.float32)[None]
    return own if amax is None else jnp.maximum(amax, own)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _convert(
    weight: jax.Array,
    amax: jax.Array | None,
    scheme: Scheme | None,
    dtype: str,
    row_groups: int,
    error_rows: int,
) -> tuple[QArray | jax.Array, jax.Array, jax.Array]:
    """Rows quantized or cast, the largest |w| of each row, and what `_Filled.relative_error`
    needs."""
    magnitude = jnp.abs(weight)
    row_amax = (jnp.max(magnitude, axis=-1) if weight.ndim > 1 else magnitude).astype(jnp.float32)
    if scheme is None:
        return weight.astype(dtype), row_amax, jnp.zeros(3, jnp.float32)
    q = quantize(weight, scheme, row_groups=row_groups, amax=amax)
    # The error of some rows is error enough for a report.
    n = weight.shape[0]
    rows = np.unique(np.linspace(0, n - 1, min(n, error_rows)).astype(int))
    # Relative to the largest weight, so that squares of tiny weights do not vanish.
    unit = jnp.maximum(jnp.max(row_amax), jnp.float32(np.finfo(np.float32).tiny))
    wide = weight[rows, :].astype(jnp.float32) / unit
    difference = dequantize_rows(q, rows) / unit - wide
    return (
        q,
        row_amax,
        jnp.stack([unit, *(jnp.sqrt(jnp.sum(jnp.square(part))) for part in (difference, wide))]),
    )


def _empty(
    shape: tuple[int, ...], parts: Sequence[int], scheme: Scheme | None, dtype: str, row_groups: int
) -> list[QArray | jax.Array]:
    """The weight before anything is written into it, or each of its parts."""
    if scheme is None:
        return [jnp.zeros(shape, dtype)]
    groups = row_groups if len(parts) == 1 else 1
    empty = []
    for rows in parts:
        part = (*shape[:-2], rows, shape[-1])
        scale_shape = scheme.granularity.scale_shape(part, row_groups=groups)
        scale = jnp.zeros(scale_shape, jnp.float32)
        empty.append(QArray(jnp.zeros(part, jnp.float8_e4m3fn), scale, scheme, groups))
    return empty


@functools.partial(jax.jit, donate_argnums=0)
def _put(
    whole: QArray | jax.Array, rows: QArray | jax.Array, where: jax.Array
) -> QArray | jax.Array:
    """The weight with some rows written into it, in place; `where` is expert, row, row of scales.

    A program of its own: fused with what computes the codes, XLA's CPU backend does it all in one
    slow loop. And a slice, for `.at[…].set` is a scatter, which copies the weight.
    """

    def write(whole: jax.Array, rows: jax.Array, row: jax.Array) -> jax.Array:
        zero = jnp.int32(0)
        start = {1: (where[0],), 2: (row, zero), 3: (where[0], row, zero)}[whole.ndim]
        return jax.lax.dynamic_update_slice(
            whole, rows.reshape((1,) * (whole.ndim - rows.ndim) + rows.shape), start
        )

    if not isinstance(whole, QArray):
        assert not isinstance(rows, QArray)
        return write(whole, rows, where[1])
    assert isinstance(rows, QArray)
    # As bytes: where a device has no FP8, XLA would take the whole weight to float16 and back to
    # change a part of it.
    codes, new = (jax.lax.bitcast_convert_type(q.qvalue, jnp.uint8) for q in (whole, rows))
    codes = jax.lax.bitcast_convert_type(write(codes, new, where[1]), jnp.float8_e4m3fn)
    return QArray(codes, write(whole.scale, rows.scale, where[2]), whole.scheme, whole.row_groups)


def _misfits(checkpoint: Checkpoint, filled: _Filled, dtype: str) -> Iterator[str]:
    """Of each tensor its first NaN, Inf or number that the dtype does not hold, as a sentence."""
    limit = float(jnp.finfo(jnp.float32 if filled.scheme else dtype).max)
    told = set()
    for spans in filled.span_rows:
        for span, amax in spans:
            wrong = np.flatnonzero(~(amax <= limit))
            if wrong.size and span.source not in told:
                told.add(span.source)
                yield _misfit(checkpoint, span, int(wrong[0]), limit)


def _misfit(checkpoint: Checkpoint, span: Span, row: int, limit: float) -> str:
    """Where a row holds its first value beyond the limit, which NaN is too."""
    info = checkpoint.tensors[span.source]
    width = info.shape[-1] if len(info.shape) > 1 else 1
    values, first = np.empty(width, info.dtype), (span.first + row) * width
    checkpoint.read_into(span.source, values, first=first)
    wide = values.astype(np.float32)
    column = int(np.flatnonzero(~(np.abs(wide) <= limit))[0])
    value, index = (
        float(wide[column]),
        [int(i) for i in np.unravel_index(first + column, info.shape)],
    )
    if np.isfinite(value):
        return (
            f"{span.source}: {value:g} at index {index} is beyond {limit:g}, the largest value of "
            "the dtype asked for"
        )
    return (
        f"{span.source}: holds {value} first at index {index}; every weight must be finite. Is "
        "the file damaged?"
    )


def _outcome(p: Parameter, scheme: Scheme | None, quantization: QuantizationConfig) -> Outcome:
    if scheme is not None:
        return "quantized"
    if p.kind == "other":
        return "never quantized"
    return "no scheme" if getattr(quantization, p.kind) is None else "ignored"


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "resource_exhausted" in text or "out of memory" in text
