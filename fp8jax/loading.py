"""Loading: from a BF16 checkpoint on disk to a model whose linear weights are FP8, without ever holding the BF16 model.

    headers ──> abstract model ──> plan: which tensors of the file make which weight, and its scheme
                                    │        every fault of names, shapes and dtypes in one error, before any work
    mapped file ──> one layer's shards ──> fuse, quantize (one jitted function on the device) ──> the model's weight

At any moment the process holds the finished weights plus one layer in the checkpoint's dtype; of a stack of experts, plus
one expert: each is quantized for itself and written into the stack that is already there. The loaded model owns its memory:
nothing in it points into the mapped file. NaN and Inf are looked for in every tensor on its way and reported together at the
end.

A stack of experts that kernels could not address as one array (2 to 4 GiB) becomes a `SplitQArray` at once.
"""

import functools
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fp8jax import ops
from fp8jax.checkpoint import Checkpoint, CheckpointError
from fp8jax.host_memory import PeakMemory
from fp8jax.language_model import LanguageModel
from fp8jax.load_report import LayerReport, LoadReport, Outcome
from fp8jax.models import CausalLM, read_decoder_config
from fp8jax.parameters import ExpertParameter, Parameter, check_against, model_parameters, tied_as_stored
from fp8jax.qarray import QArray, SplitQArray, dequantize_rows, quantize, rows_of_parts, scale_shape, split_rows
from fp8jax.quantization_config import LayerKind, QuantizationConfig
from fp8jax.schemes import BLOCK, Scheme

logger = logging.getLogger("fp8jax")
_ERROR_ROWS = 256

DTYPES = ("bfloat16", "float16", "float32")


def load_quantized(
    repo: str | os.PathLike[str],
    scheme: str | None = "fp8_per_tensor",
    *,
    quantization_config: Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
    implementation: ops.Implementation = "auto",
    revision: str | None = None,
    progress: Literal["auto", "on", "off"] = "auto",
) -> LanguageModel:
    """Load a checkpoint and quantize its linear and expert weights on the way.

    Args:
        repo: a folder in Hugging Face layout, or a hub repository id.
        scheme: "fp8_per_tensor", "fp8_per_block", "online" (everything is in `quantization_config`), or None for no
            quantization.
        quantization_config: overrides and exceptions, see `QuantizationConfig`.
        dtype: of activations and unquantized weights: "bfloat16", "float16" or "float32" (which is full float32, no
            TF32).
        implementation: "xla", "triton" or "auto", see `ops`.
        revision: branch, tag or commit of a hub repository.
        progress: a progress bar on stderr; "auto" shows it on terminals.
    Returns:
        The model with its tokenizer, configuration and load report.
    Raises:
        CheckpointError: a malformed, already quantized or mismatching checkpoint; lists every fault by tensor.
        ValueError: an unknown scheme, a wrong quantization_config, an architecture or config field that is not
            implemented.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
    if implementation not in ops.IMPLEMENTATIONS:
        raise ValueError(
            f"implementation {implementation!r} is unknown; choose one of {', '.join(ops.IMPLEMENTATIONS)}"
        )
    quantization = QuantizationConfig.parse(scheme, quantization_config)
    start = time.perf_counter()
    with PeakMemory() as memory, Checkpoint.open(repo, revision=revision) as checkpoint:
        checkpoint.require_unquantized()
        where = f"config.json of {repo}"
        about_config: list[str] = []
        config = read_decoder_config(checkpoint.config, dtype=dtype, where=where, told=about_config)
        config = tied_as_stored(config, checkpoint)
        model = CausalLM(config, implementation=implementation)
        parameters = list(model_parameters(model, checkpoint.tensors))
        schemes, unmatched = _resolve(parameters, quantization)
        told = [*about_config, *unmatched]
        check_against(checkpoint, parameters)
        opened = time.perf_counter()
        layers = _fill(checkpoint, parameters, schemes, quantization, dtype=dtype, progress=progress)
    finished = time.perf_counter()

    report = LoadReport(
        source=str(repo),
        layers=tuple(layers),
        seconds=finished - start,
        seconds_by_phase={"headers and plan": opened - start, "read and quantize": finished - opened},
        peak_host_bytes=memory.peak - memory.start,
        warnings=tuple(told),
    )
    if scheme is not None:
        logger.info(report.log_line())
        logger.info("Online quantization as part of model loading took %.2f seconds", report.seconds)
    for warning in told:
        warnings.warn(warning, stacklevel=2)
    return LanguageModel(
        model,
        config=checkpoint.config,
        generation_config=checkpoint.generation_config,
        folder=checkpoint.folder,
        report=report,
    )


def _resolve(
    parameters: Sequence[Parameter], quantization: QuantizationConfig
) -> tuple[dict[str, Scheme | None], list[str]]:
    """Each layer's scheme by name, and warnings about `ignore` entries that matched nothing."""
    candidates: dict[str, tuple[str, LayerKind, Sequence[str]]] = {}
    schemes, others = {}, ["lm_head"]
    for p in parameters:
        if p.kind == "other":
            # Under the checkpoint's name, too, if it has another one.
            others += [
                p.name,
                *(source.removesuffix(".weight") for source, _ in p.sources if source.endswith(".weight")),
            ]
        elif p.name not in candidates:
            candidates[p.name] = p.name, p.kind, p.shards
            schemes[p.name] = quantization.resolve(p.name, p.kind, p.shards)
            if isinstance(p, ExpertParameter) and p.alias != p.name:
                others.append(p.alias)
                if quantization.resolve(p.alias, p.kind) is None:
                    schemes[p.name] = None
    return schemes, quantization.unmatched(candidates.values(), others)


@dataclass(frozen=True)
class _Loaded:
    """A finished weight, the largest |w| of each of its shards, its relative error, and what is wrong with it."""

    value: QArray | SplitQArray | jax.Array
    shard_amax: tuple[float, ...]
    relative_error: float | None
    faults: tuple[str, ...]


def _fill(
    checkpoint: Checkpoint,
    parameters: Sequence[Parameter],
    schemes: Mapping[str, Scheme | None],
    quantization: QuantizationConfig,
    *,
    dtype: str,
    progress: Literal["auto", "on", "off"],
) -> list[LayerReport]:
    """Stream every parameter into the model; NaN and Inf of all tensors in one error at the end."""
    from tqdm import tqdm

    sizes = [sum(checkpoint.tensors[source].nbytes for source, _ in p.sources) for p in parameters]
    layers, faults = [], []
    with tqdm(
        total=sum(sizes),
        desc="loading",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable={"auto": None, "on": False, "off": True}[progress],
    ) as bar:
        for p, size in zip(parameters, sizes, strict=True):
            scheme = schemes[p.name] if p.kind != "other" else None
            if isinstance(p, ExpertParameter):
                loaded = _experts(checkpoint, p, scheme, dtype, bar.update)
            else:
                loaded = _layer(checkpoint, p, scheme, dtype)
                bar.update(size)
            faults += loaded.faults
            setattr(p.module, p.attribute, nnx.data(loaded.value))
            layers.append(
                LayerReport(
                    name=p.name if p.attribute == "weight" else f"{p.name}.{p.attribute}",
                    kind=p.kind,
                    outcome=_outcome(p, scheme, quantization),
                    scheme=scheme,
                    bytes_before=size,
                    bytes_after=loaded.value.nbytes,
                    relative_error=loaded.relative_error,
                    shard_amax=loaded.shard_amax,
                )
            )
    if faults:
        raise CheckpointError.gather(str(checkpoint.folder), faults)
    return layers


def _layer(checkpoint: Checkpoint, p: Parameter, scheme: Scheme | None, dtype: str) -> _Loaded:
    """One weight from its shards, at once."""
    sources = [source for source, _ in p.sources]
    # may_alias=False: on a CPU, device_put of a well-aligned view would keep pointing into the file.
    shards = [jax.device_put(checkpoint.read(source), may_alias=None if scheme else False) for source in sources]
    value, amax, norms = jax.block_until_ready(_fuse(shards, scheme, dtype))
    amax = np.asarray(amax)
    faults = _misfits(checkpoint, sources, amax, scheme, dtype)
    for source in sources:
        checkpoint.release(source)
    return _Loaded(value, tuple(map(float, amax)), _relative_error([norms], scheme), tuple(faults.values()))


def _experts(
    checkpoint: Checkpoint,
    p: ExpertParameter,
    scheme: Scheme | None,
    dtype: str,
    advance: Callable[[int], Any],
) -> _Loaded:
    """A stack of experts, one expert at a time; shard_amax is over all of them."""
    if scheme is None:
        stack = jnp.zeros(p.shape, dtype)
    else:
        stack = _empty_stack(p.shape, scheme, p.row_groups)
    largest, norms, faults = np.zeros(p.row_groups, np.float32), [], {}
    for expert in range(p.shape[0]):
        sources, views = p.shards_of(checkpoint, expert)
        value, amax, norm = _fuse([jax.device_put(view) for view in views], scheme, dtype, p.row_groups)
        stack = _put(stack, np.int32(expert), value)
        # Waiting here is what bounds memory: the next expert comes when this one's BF16 copy is gone.
        amax = np.asarray(jax.block_until_ready((stack, amax))[1])
        largest = np.maximum(largest, amax)
        norms.append(norm)
        faults |= _misfits(checkpoint, sources, amax, scheme, dtype)
        if not p.stacked or expert == p.shape[0] - 1:
            for source in sources:
                checkpoint.release(source)
        advance(sum(view.nbytes for view in views))
    return _Loaded(stack, tuple(map(float, largest)), _relative_error(norms, scheme), tuple(faults.values()))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _fuse(
    shards: list[jax.Array], scheme: Scheme | None, dtype: str, row_groups: int = 1
) -> tuple[QArray | jax.Array, jax.Array, jax.Array]:
    """The fused weight quantized or cast, each shard's largest |w| (NaN and Inf show in it), and what `_relative_error`
    needs."""
    weight = shards[0] if len(shards) == 1 else jnp.concatenate(shards, axis=0)
    amax = jnp.stack([jnp.max(jnp.abs(shard), initial=0).astype(jnp.float32) for shard in shards])
    if scheme is None:
        return weight.astype(dtype), amax, jnp.zeros(3, jnp.float32)
    q = _quantize_shards(shards, scheme) if row_groups == 1 else quantize(weight, scheme, row_groups=row_groups)
    # The error of some rows is error enough for a report: over all of them XLA would hold two float32 copies of the weight.
    n = weight.shape[-2]
    rows = np.unique(np.linspace(0, n - 1, min(n, _ERROR_ROWS)).astype(int))
    # Relative to the largest weight, so that squares of tiny weights do not vanish.
    unit = jnp.maximum(jnp.max(amax), jnp.float32(np.finfo(np.float32).tiny))
    wide = weight[..., rows, :].astype(jnp.float32) / unit
    difference = dequantize_rows(q, rows) / unit - wide
    return q, amax, jnp.stack([unit, *(jnp.sqrt(jnp.sum(jnp.square(part))) for part in (difference, wide))])


def _quantize_shards(shards: Sequence[jax.Array], scheme: Scheme) -> QArray:
    """The shards quantized as one matrix; where no block lies across two of them, without making that matrix."""
    if scheme.weight != "block" or any(shard.shape[0] % BLOCK for shard in shards[:-1]):
        return quantize(jnp.concatenate(shards, axis=0), scheme)
    parts = [quantize(shard, scheme) for shard in shards]
    codes = jnp.concatenate([part.qvalue for part in parts], axis=0)
    return QArray(codes, jnp.concatenate([part.scale for part in parts], axis=0), scheme)


def _empty_stack(shape: tuple[int, ...], scheme: Scheme, row_groups: int) -> QArray | SplitQArray:
    def empty(rows: int, row_groups: int) -> QArray:
        part = (shape[0], rows, shape[2])
        scales = scale_shape(part, scheme, row_groups=row_groups)
        return QArray(jnp.zeros(part, jnp.float8_e4m3fn), jnp.zeros(scales, jnp.float32), scheme, row_groups)

    rows = rows_of_parts(shape, row_groups=row_groups)
    if len(rows) == 1:
        return empty(shape[1], row_groups)
    return SplitQArray(tuple(empty(count, 1) for count in rows), row_groups)


@functools.partial(jax.jit, donate_argnums=0)
def _put(
    stack: QArray | SplitQArray | jax.Array, expert: jax.Array, value: QArray | jax.Array
) -> QArray | SplitQArray | jax.Array:
    """The stack with one expert written into it, in place.

    A program of its own: fused with what computes the codes, XLA's CPU backend does it all in one slow loop. And a slice, for
    `.at[expert].set` is a scatter, which copies the stack.
    """

    def write(whole: jax.Array, part: jax.Array) -> jax.Array:
        part = part.reshape(whole.shape[1:])
        if whole.dtype != jnp.float8_e4m3fn:
            return jax.lax.dynamic_update_index_in_dim(whole, part, expert, axis=0)
        # As bytes: where a device has no FP8, XLA would take the whole stack to float16 and back to change a part of it.
        whole, part = (jax.lax.bitcast_convert_type(codes, jnp.uint8) for codes in (whole, part))
        whole = jax.lax.dynamic_update_index_in_dim(whole, part, expert, axis=0)
        return jax.lax.bitcast_convert_type(whole, jnp.float8_e4m3fn)

    written = split_rows(value, stack.rows) if isinstance(stack, SplitQArray) and isinstance(value, QArray) else value
    return jax.tree.map(write, stack, written)


def _relative_error(norms: Sequence[jax.Array], scheme: Scheme | None) -> float | None:
    """‖dequantized − w‖ / ‖w‖ from rows of (unit, ‖difference‖ / unit, ‖w‖ / unit), one an expert."""
    if scheme is None:
        return None
    unit, difference, weight = np.asarray(norms, np.float64).T
    norm = np.linalg.norm(unit * weight)
    return float(np.linalg.norm(unit * difference) / norm) if norm else 0.0


def _outcome(p: Parameter, scheme: Scheme | None, quantization: QuantizationConfig) -> Outcome:
    if scheme is not None:
        return "quantized"
    if p.kind == "other":
        return "never quantized"
    return "no scheme" if getattr(quantization, p.kind) is None else "ignored"


def _misfits(
    checkpoint: Checkpoint, sources: Sequence[str], amax: np.ndarray, scheme: Scheme | None, dtype: str
) -> dict[str, str]:
    """By source, what does not fit the dtype, given the largest |w| of each."""
    limit = float(jnp.finfo(jnp.float32 if scheme else dtype).max)
    wrong = {source for source, largest in zip(sources, amax, strict=True) if not largest <= limit}
    return {source: _misfit(source, checkpoint.read(source), limit) for source in sources if source in wrong}


def _misfit(source: str, view: np.ndarray, limit: float) -> str:
    """Where a tensor holds its first NaN, Inf or number beyond the dtype's range, for the error.

    Searched in pieces, so that nothing weight-sized is made.
    """
    flat, piece = view.reshape(-1), 1 << 20
    for begin in range(0, flat.size, piece):
        part = flat[begin : begin + piece].astype(np.float32)
        bad = np.flatnonzero(~(np.abs(part) <= limit))
        if bad.size:
            value = float(part[bad[0]])
            index = [int(i) for i in np.unravel_index(begin + int(bad[0]), view.shape)]
            if np.isfinite(value):
                return f"{source}: {value:g} at index {index} is beyond {limit:g}, the largest value of the dtype asked for"
            return f"{source}: holds {value} first at index {index}; every weight must be finite. Is the file damaged?"
    raise AssertionError(f"{source}: the device found a misfit and the host does not")
