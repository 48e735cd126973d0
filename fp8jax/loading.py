"""Loading: from a BF16 checkpoint on disk to a model whose linear weights are FP8, without ever
holding the BF16 model.

    headers ──> abstract model ──> plan: which tensors of the file make which weight, and its scheme
                                    │        every fault of names, shapes and dtypes
                                    │        in one error, before any work
    file, piece by piece ──> quantize (one jitted function) ──> the model's weight      `filling`

At any moment the process holds the finished weights and two pieces of some megabytes, however large
a layer is. The loaded model owns its memory. NaN and Inf are looked for in every tensor on its way
and reported together at the end. A file that is replaced or written to meanwhile is an error: a
model is never made of two checkpoints.

A stack of experts that kernels could not address as one array (2 to 4 GiB) becomes a `SplitQArray`
at once.
"""

import logging
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jax.typing import DTypeLike

from fp8jax.checkpoints.filling import fill
from fp8jax.checkpoints.folder import Checkpoint
from fp8jax.checkpoints.host_memory import PeakMemory
from fp8jax.checkpoints.load_report import LoadReport
from fp8jax.checkpoints.parameters import (
    ExpertParameter,
    Parameter,
    check_against,
    check_expert_count,
    check_layer_count,
    model_parameters,
    tied_as_stored,
)
from fp8jax.generation_config import read_generation_config
from fp8jax.language_model import LanguageModel
from fp8jax.models import CausalLM, read_decoder_config
from fp8jax.ops.choice import IMPLEMENTATIONS, Implementation
from fp8jax.quantization_config import LayerKind, QuantizationConfig
from fp8jax.schemes import Scheme

logger = logging.getLogger("fp8jax")

DTYPES = ("bfloat16", "float16", "float32")
_SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}


def load_quantized(
    repo: str | os.PathLike[str],
    scheme: str | Scheme | None = "fp8_per_tensor",
    *,
    quantization_config: Mapping[str, Any] | None = None,
    dtype: DTypeLike = "bfloat16",
    implementation: Implementation = "auto",
    revision: str | None = None,
    progress: Literal["auto"] | bool = "auto",
) -> LanguageModel:
    """Load a checkpoint and quantize its linear and expert weights on the way.

    Args:
        repo: a folder in Hugging Face layout, or a hub repository id.
        scheme: one of `fp8jax.SCHEMES` by name ("fp8_per_block") or as a `Scheme`; "online" where
            everything is in `quantization_config`; None for no quantization.
        quantization_config: overrides and exceptions, see `QuantizationConfig`.
        dtype: of activations and unquantized weights: bfloat16, float16 or float32 (which is full
            float32, no TF32), as a name, a short name ("bf16", "fp16", "fp32") or a NumPy or JAX
            dtype; "auto" for the checkpoint's own, as config.json has it, or else most of its
            tensors.
        implementation: "xla", "triton" or "auto" ("triton_interpreted" in tests), see
            `ops/choice.py`.
        revision: branch, tag or commit of a hub repository.
        progress: whether to show a progress bar on stderr; "auto" for terminals only.
    Returns:
        The model with its tokenizer, configuration and load report.
    Raises:
        CheckpointError: a malformed, already quantized or mismatching checkpoint, which lists every
            fault by tensor; or one that was changed while it was being read.
        ValueError: an argument of the wrong type, an unknown scheme, a wrong quantization_config,
            an architecture or config field that is not implemented.
        MemoryError: host or device ran out of memory; names the layer, its size and how far loading
            was.

    Do not fork a process that has run a model: JAX's threads do not survive it, and the child
    hangs. Workers are started with `multiprocessing.get_context("spawn")`.
    """
    wanted_dtype = _dtype_name(dtype)
    _check_arguments(repo, scheme, quantization_config, implementation, revision, progress)
    quantization = QuantizationConfig.parse(scheme, quantization_config)
    start = time.perf_counter()
    with PeakMemory() as memory, Checkpoint.open(repo, revision=revision) as checkpoint:
        checkpoint.require_unquantized()
        check_layer_count(checkpoint)
        own_dtype = _own_dtype(checkpoint) if wanted_dtype == "auto" else wanted_dtype
        where = f"config.json of {repo}"
        about_config: list[str] = []
        config = read_decoder_config(
            checkpoint.config, dtype=own_dtype, where=where, told=about_config
        )
        check_expert_count(checkpoint, config)
        config = tied_as_stored(config, checkpoint)
        defaults = read_generation_config(
            checkpoint.generation_config, checkpoint.config, where=str(repo)
        )
        model = CausalLM(config, implementation=implementation)
        parameters = list(model_parameters(model, checkpoint.tensors))
        schemes, unmatched = _resolve(parameters, quantization)
        told = [*about_config, *unmatched, *defaults.warnings]
        check_against(checkpoint, parameters)
        opened = time.perf_counter()
        layers = fill(
            checkpoint,
            parameters,
            schemes,
            quantization,
            dtype=own_dtype,
            disable_bar=None if progress == "auto" else not progress,
        )
        checkpoint.verify_unchanged()
    finished = time.perf_counter()

    report = LoadReport(
        source=str(repo),
        layers=tuple(layers),
        seconds=finished - start,
        seconds_by_phase={
            "headers and plan": opened - start,
            "read and quantize": finished - opened,
        },
        peak_host_bytes=memory.peak - memory.start,
        warnings=tuple(told),
    )
    if scheme is not None:
        logger.info(report.log_line())
        logger.info(
            "Online quantization as part of model loading took %.2f seconds", report.seconds
        )
    for warning in told:
        warnings.warn(warning, stacklevel=2)
    return LanguageModel(
        model,
        config=checkpoint.config,
        generation_config=checkpoint.generation_config,
        folder=checkpoint.folder,
        report=report,
    )


def _dtype_name(dtype: Any) -> str:
    """One of DTYPES, or "auto"."""
    name = dtype
    if not isinstance(dtype, str):
        try:
            name = (
                np.dtype(dtype).name if dtype is not None else "None"
            )  # NumPy takes None for float64
        except TypeError:
            name = str(dtype)
    name = name.removeprefix("torch.")
    name = _SHORT_NAMES.get(name, name)
    if name not in (*DTYPES, "auto"):
        raise ValueError(
            f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPES)}, or auto"
        )
    return name


def _own_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that config.json names, in either spelling, or else that of most of the
    checkpoint's bytes."""
    for key in ("dtype", "torch_dtype"):
        if (named := checkpoint.config.get(key)) is not None:
            name = named.removeprefix("torch.") if isinstance(named, str) else named
            if name not in DTYPES:
                raise ValueError(
                    f"config.json of {checkpoint.folder}: {key} is {named!r}, so dtype='auto' "
                    f"finds none that is supported; choose one of {', '.join(DTYPES)}"
                )
            return name
    sizes = dict.fromkeys(DTYPES, 0)
    for info in checkpoint.tensors.values():
        if info.dtype.name in sizes:
            sizes[info.dtype.name] += info.nbytes
    return max(sizes, key=lambda name: sizes[name])


def _check_arguments(
    repo: Any,
    scheme: Any,
    quantization_config: Any,
    implementation: Any,
    revision: Any,
    progress: Any,
) -> None:
    """Raises ValueError for what would fail later, in words that are not ours."""
    if not isinstance(repo, str | os.PathLike) or not isinstance(os.fspath(repo), str):
        raise ValueError(
            f"repo is {repo!r}; give a checkpoint folder or a hub id such as 'org/name'"
        )
    if not isinstance(scheme, str | Scheme | None):
        raise ValueError(
            f"scheme is {scheme!r}; give the name of one, 'fp8_per_block' say, a Scheme, or None "
            "for no quantization"
        )
    if not isinstance(quantization_config, Mapping | None):
        raise ValueError(
            f"quantization_config is {quantization_config!r}; give a dict, or leave it out"
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation {implementation!r} is unknown; choose one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    if not isinstance(revision, str | None):
        raise ValueError(
            f"revision is {revision!r}; give a branch, tag or commit of the hub repository, or "
            "leave it out"
        )
    if progress != "auto" and not isinstance(progress, bool):
        raise ValueError(f"progress is {progress!r}; choose one of True, False, 'auto'")


def _resolve(
    parameters: Sequence[Parameter], quantization: QuantizationConfig
) -> tuple[dict[str, Scheme | None], list[str]]:
    """Each layer's scheme by name, and warnings about `ignore` entries that matched nothing."""
    candidates: dict[str, tuple[str, LayerKind, Sequence[str]]] = {}
    schemes = {}
    others = ["lm_head"]  # to name it is no mistake where it is tied and so has no parameter
    for p in parameters:
        if p.kind == "other":
            # Under the checkpoint's name, too, if it has another one.
            others += [
                p.name,
                *(
                    source.removesuffix(".weight")
                    for source, _ in p.sources
                    if source.endswith(".weight")
                ),
            ]
        elif p.name not in candidates:
            candidates[p.name] = p.name, p.kind, p.shards
            schemes[p.name] = quantization.resolve(p.name, p.kind, p.shards)
            if isinstance(p, ExpertParameter) and p.alias != p.name:
                others.append(p.alias)
                if quantization.resolve(p.alias, p.kind) is None:
                    schemes[p.name] = None
    return schemes, quantization.unmatched(candidates.values(), others)
