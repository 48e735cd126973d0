"""Loading: from a BF16 checkpoint on disk to a model whose linear weights are FP8, without ever holding the BF16 model.

    headers ──> abstract model ──> plan: which tensors of the file make which weight, and its scheme
                                    │        every fault of names, shapes and dtypes in one error, before any work
    mapped file ──> one layer's shards ──> fuse, quantize (one jitted function on the device) ──> the model's weight

At any moment the process holds the finished weights plus one layer in the checkpoint's dtype. The loaded model owns its
memory: nothing in it points into the mapped file. NaN and Inf are looked for in every tensor on its way and reported
together at the end.
"""

import dataclasses
import difflib
import functools
import logging
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
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
from fp8jax.layers import Linear
from fp8jax.load_report import LayerReport, LoadReport, Outcome
from fp8jax.models import CausalLM, DecoderConfig, read_decoder_config
from fp8jax.qarray import QArray, dequantize, quantize
from fp8jax.quantization_config import LayerKind, QuantizationConfig
from fp8jax.schemes import Scheme

logger = logging.getLogger("fp8jax")

DTYPES = ("bfloat16", "float16", "float32")
_FLOAT_DTYPES = ("bfloat16", "float16", "float32")
# Buffers that old checkpoints carry and that follow from config.json.
_DERIVED_TENSORS = re.compile(r".*\.(rotary_emb\.inv_freq|self_attn\.(masked_bias|bias))")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One weight of the model and where it comes from.

    Args:
        module, attribute: where it goes.
        name: the module's name; the attribute is not part of it.
        sources: the checkpoint's tensors that are stacked along the first dimension to make it, with the rows each must
            have.
        shape: its shape.
        kind: what it counts as for the quantization config.
        shards: last components of the unfused names, for `ignore`.
    """

    module: nnx.Module
    attribute: str
    name: str
    sources: tuple[tuple[str, tuple[int, ...]], ...]
    shape: tuple[int, ...]
    kind: LayerKind | Literal["other"]
    shards: tuple[str, ...] = ()


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
        config = read_decoder_config(checkpoint.config, dtype=dtype, where=where)
        config = _tie(config, checkpoint)
        model = CausalLM(config, implementation=implementation)
        parameters = list(model_parameters(model))
        schemes, told = _resolve(parameters, quantization)
        _check_against(checkpoint, parameters)
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


def model_parameters(model: CausalLM) -> Iterator[Parameter]:
    """Every weight of a model with the checkpoint's names of what it is made of, in the order of the forward pass."""
    for path, module in nnx.iter_modules(model):
        name = ".".join(str(part) for part in path)
        if isinstance(module, Linear):
            yield from _linear_parameters(name, module)
        elif isinstance(getattr(module, "weight", None), jax.ShapeDtypeStruct):
            yield _plain_parameter(module, "weight", name, (f"{name}.weight",))


def _linear_parameters(name: str, module: Linear) -> Iterator[Parameter]:
    parent, _, last = name.rpartition(".")
    prefix = f"{parent}." if parent else ""
    names = [f"{prefix}{shard}" for shard, _ in module.shards]
    n, k = module.weight.shape
    yield Parameter(
        module=module,
        attribute="weight",
        name=name,
        sources=tuple((f"{source}.weight", (rows, k)) for source, (_, rows) in zip(names, module.shards, strict=True)),
        shape=(n, k),
        kind="other" if last == "lm_head" else "linear",
        shards=tuple(shard for shard, _ in module.shards),
    )
    if module.bias is not None:
        yield Parameter(
            module=module,
            attribute="bias",
            name=name,
            sources=tuple((f"{source}.bias", (rows,)) for source, (_, rows) in zip(names, module.shards, strict=True)),
            shape=(n,),
            kind="other",
        )


def _plain_parameter(module: nnx.Module, attribute: str, name: str, sources: tuple[str, ...]) -> Parameter:
    shape = getattr(module, attribute).shape
    return Parameter(
        module=module,
        attribute=attribute,
        name=name,
        sources=tuple((source, shape) for source in sources),
        shape=shape,
        kind="other",
    )


def _tie(config: DecoderConfig, checkpoint: Checkpoint) -> DecoderConfig:
    """The config with `tied` as the files have it: an lm_head of its own wins over the flag, an equal one is not held
    twice."""
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    if not config.tied or head not in checkpoint.tensors or table not in checkpoint.tensors:
        return config
    one, other = checkpoint.tensors[head], checkpoint.tensors[table]
    if (one.shape, one.dtype) == (other.shape, other.dtype):
        one_bytes, other_bytes = (checkpoint.read(name).reshape(-1).view(np.uint8) for name in (head, table))
        if np.array_equal(one_bytes, other_bytes):
            return config
    return dataclasses.replace(config, tied=False)


def _resolve(
    parameters: Sequence[Parameter], quantization: QuantizationConfig
) -> tuple[dict[str, Scheme | None], list[str]]:
    """Each layer's scheme by name, and warnings about `ignore` entries that matched nothing."""
    candidates: list[tuple[str, LayerKind, Sequence[str]]] = [
        (p.name, p.kind, p.shards) for p in parameters if p.kind != "other"
    ]
    schemes = {name: quantization.resolve(name, kind, shards) for name, kind, shards in candidates}
    others = [p.name for p in parameters if p.kind == "other"]
    return schemes, quantization.unmatched(candidates, [*others, "lm_head"])


def _check_against(checkpoint: Checkpoint, parameters: Sequence[Parameter]) -> None:
    """Compare names, shapes and dtypes of the model and of the headers; one error for all faults."""
    faults = []
    wanted = {source: shape for p in parameters for source, shape in p.sources}
    for source, shape in wanted.items():
        info = checkpoint.tensors.get(source)
        if info is None:
            close = difflib.get_close_matches(source, set(checkpoint.tensors) - set(wanted), n=1)
            hint = f"; the checkpoint has {close[0]!r}, which the model does not" if close else ""
            faults.append(f"{source}: missing, config.json asks for shape {list(shape)}{hint}")
        elif tuple(info.shape) != shape:
            faults.append(
                f"{source}: the checkpoint has shape {list(info.shape)}, config.json says {list(shape)}; do the two files belong "
                "together?"
            )
        elif info.dtype.name not in _FLOAT_DTYPES:
            faults.append(
                f"{source}: dtype {info.dtype.name}; online quantization starts from {', '.join(_FLOAT_DTYPES)} weights"
            )
    for name in sorted(set(checkpoint.tensors) - set(wanted) - {"lm_head.weight"}):  # a tied head was seen to in `_tie`
        if not _DERIVED_TENSORS.fullmatch(name):
            faults.append(
                f"{name}: in the checkpoint, but no weight of this architecture; config.json may ask for too few layers, or for a "
                "switch (a bias, say) that it leaves out"
            )
    if faults:
        raise CheckpointError.gather(str(checkpoint.folder), faults)


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

    total = sum(checkpoint.tensors[source].nbytes for p in parameters for source, _ in p.sources)
    layers, faults = [], []
    with tqdm(
        total=total,
        desc="loading",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable={"auto": None, "on": False, "off": True}[progress],
    ) as bar:
        for p in parameters:
            views = [checkpoint.read(source) for source, _ in p.sources]
            scheme = schemes.get(p.name) if p.attribute == "weight" else None
            error = None
            if scheme is not None:
                value, amax, error = _quantized(views, scheme)
            else:
                value, amax = _plain(views, dtype)
            limit = float(jnp.finfo(jnp.float32 if scheme else dtype).max)
            faults += [
                _misfit(source, view, limit)
                for (source, _), view, largest in zip(p.sources, views, amax, strict=True)
                if not largest <= limit
            ]
            setattr(p.module, p.attribute, nnx.data(value))
            size = sum(view.nbytes for view in views)
            layers.append(
                LayerReport(
                    name=p.name if p.attribute == "weight" else f"{p.name}.{p.attribute}",
                    kind=p.kind,
                    outcome=_outcome(p, scheme, quantization),
                    scheme=scheme,
                    bytes_before=size,
                    bytes_after=value.nbytes,
                    relative_error=error,
                    shard_amax=tuple(float(a) for a in amax),
                )
            )
            for source, _ in p.sources:
                checkpoint.release(source)
            bar.update(size)
    if faults:
        raise CheckpointError.gather(str(checkpoint.folder), faults)
    return layers


def _quantized(views: Sequence[np.ndarray], scheme: Scheme) -> tuple[QArray, np.ndarray, float]:
    value, amax, error = _fuse_and_quantize([jax.device_put(view) for view in views], scheme)
    jax.block_until_ready(value)
    return value, np.asarray(amax), float(error)


@functools.partial(jax.jit, static_argnums=1)
def _fuse_and_quantize(shards: list[jax.Array], scheme: Scheme) -> tuple[QArray, jax.Array, jax.Array]:
    """The fused weight quantized, each shard's largest |w| (NaN and Inf show in it), and the relative error."""
    weight = shards[0] if len(shards) == 1 else jnp.concatenate(shards, axis=0)
    q = quantize(weight, scheme)
    amax = jnp.stack([jnp.max(jnp.abs(shard)).astype(jnp.float32) for shard in shards])
    # Relative to the largest weight, so that squares of tiny weights do not vanish.
    unit = jnp.maximum(jnp.max(amax), jnp.float32(np.finfo(np.float32).tiny))
    wide = weight.astype(jnp.float32) / unit
    difference = dequantize(q) / unit - wide
    norm = jnp.sqrt(jnp.sum(jnp.square(wide)))
    error = jnp.sqrt(jnp.sum(jnp.square(difference))) / jnp.maximum(norm, jnp.float32(1e-30))
    return q, amax, error


def _plain(views: Sequence[np.ndarray], dtype: str) -> tuple[jax.Array, np.ndarray]:
    # may_alias=False: on a CPU, device_put of a well-aligned view would keep pointing into the file.
    shards = [jax.device_put(view, may_alias=False) for view in views]
    value, amax = _fuse_and_cast(shards, dtype)
    jax.block_until_ready(value)
    return value, np.asarray(amax)


@functools.partial(jax.jit, static_argnums=1)
def _fuse_and_cast(shards: list[jax.Array], dtype: str) -> tuple[jax.Array, jax.Array]:
    amax = jnp.stack([jnp.max(jnp.abs(shard), initial=0).astype(jnp.float32) for shard in shards])
    value = shards[0] if len(shards) == 1 else jnp.concatenate(shards, axis=0)
    return value.astype(dtype), amax


def _outcome(p: Parameter, scheme: Scheme | None, quantization: QuantizationConfig) -> Outcome:
    if scheme is not None:
        return "quantized"
    if p.kind == "other":
        return "never quantized"
    return "no scheme" if getattr(quantization, p.kind) is None else "ignored"


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
