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

import logging
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fp8jax import ops
from fp8jax.checkpoint import Checkpoint
from fp8jax.filling import fill
from fp8jax.host_memory import PeakMemory
from fp8jax.language_model import LanguageModel
from fp8jax.load_report import LoadReport
from fp8jax.models import CausalLM, read_decoder_config
from fp8jax.parameters import ExpertParameter, Parameter, check_against, model_parameters, tied_as_stored
from fp8jax.quantization_config import LayerKind, QuantizationConfig
from fp8jax.schemes import Scheme

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
        config = read_decoder_config(checkpoint.config, dtype=dtype, where=where)
        config = tied_as_stored(config, checkpoint)
        model = CausalLM(config, implementation=implementation)
        parameters = list(model_parameters(model, checkpoint.tensors))
        schemes, told = _resolve(parameters, quantization)
        check_against(checkpoint, parameters)
        opened = time.perf_counter()
        bar = {"auto": None, "on": False, "off": True}[progress]
        layers = fill(checkpoint, parameters, schemes, quantization, dtype=dtype, disable_bar=bar)
        checkpoint.verify_unchanged()
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
