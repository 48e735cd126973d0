"""A decode step or a prefill of a named model, to compile offline: for tests and for
`scripts/inspect_kernels.py`.

The model is abstract, shapes without numbers, so that Llama-3.1-8B costs no memory; a few of its
layers are enough, since all are alike. Run with `fp8jax/devtools/offline_compile.py`:

    with OfflineCompiler() as compiler:
        program = "fp8jax.devtools.offline_models:decode_step"
        compiler.compile("h100", program, {"model": "llama-3.1-8b", "batch": 1, "layers": 2})
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fp8jax import generation
from fp8jax.devtools.offline_compile import Program
from fp8jax.devtools.shapes import MODELS
from fp8jax.models import CausalLM, DecoderConfig, read_decoder_config
from fp8jax.models.layers import Linear
from fp8jax.models.moe import Experts
from fp8jax.ops.choice import Implementation
from fp8jax.qarray import QArray, SplitQArray, quantize, rows_of_parts, split_rows
from fp8jax.quantization_config import never_quantized


def abstract_model(
    model: str,
    scheme: str | None,
    *,
    layers: int | None = None,
    implementation: Implementation = "auto",
) -> CausalLM:
    """A named model without numbers, every linear layer but lm_head and every stack of experts
    quantized.

    Args:
        model: a key of `shapes.MODELS`.
        scheme: "fp8_per_tensor" or "fp8_per_block"; None for bfloat16.
        layers: how many; None for all.
        implementation: what runs the operations, see `ops`.
    Raises:
        ValueError: an unknown model.
    """
    if model not in MODELS:
        raise ValueError(f"model {model!r} is unknown; choose one of {', '.join(MODELS)}")
    numbers = MODELS[model] if layers is None else MODELS[model] | {"num_hidden_layers": layers}
    config: DecoderConfig = read_decoder_config(numbers, dtype="bfloat16", where=model)
    made = CausalLM(config, implementation=implementation)
    if scheme is not None:
        for path, module in nnx.iter_modules(made):
            if isinstance(module, Linear) and not never_quantized(".".join(map(str, path))):
                module.weight = _quantized(module.weight, scheme)
            elif isinstance(module, Experts):
                module.gate_up_proj = _quantized(module.gate_up_proj, scheme, row_groups=2)
                module.down_proj = _quantized(module.down_proj, scheme)
    return made


def decode_step(
    model: str,
    batch: int,
    *,
    scheme: str | None = "fp8_per_tensor",
    layers: int = 2,
    cache_length: int = 8192,
    implementation: Implementation = "auto",
) -> Program:
    """`generation.decode_step` with a donated cache.

    Args:
        model, scheme, layers, implementation: as for `abstract_model`.
        batch: rows.
        cache_length: room of each row.
    """
    made = abstract_model(model, scheme, layers=layers, implementation=implementation)
    cache = jax.eval_shape(lambda: made.empty_cache(batch, cache_length))
    token = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return Program(generation.decode_step, (made, cache, token, token), donate_argnums=(1,))


def prefill(
    model: str,
    batch: int,
    tokens: int,
    *,
    scheme: str | None = "fp8_per_tensor",
    layers: int = 2,
    cache_length: int = 8192,
    implementation: Implementation = "auto",
) -> Program:
    """`generation.prefill` of prompts of so many tokens with a donated cache.

    Args:
        model, scheme, layers, implementation: as for `abstract_model`.
        batch, tokens: prompts, and the length they are padded to.
        cache_length: room of each row.
    """
    made = abstract_model(model, scheme, layers=layers, implementation=implementation)
    cache = jax.eval_shape(lambda: made.empty_cache(batch, cache_length))
    prompts, lengths = (
        jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, tokens), (batch,))
    )
    return Program(generation.prefill, (made, cache, prompts, lengths), donate_argnums=(1,))


def _quantized(weight: jax.ShapeDtypeStruct, scheme: str, *, row_groups: int = 1) -> Any:
    def as_loaded(weight: jax.Array) -> QArray | SplitQArray:
        q = quantize(weight, scheme, row_groups=row_groups)
        rows = (
            rows_of_parts(weight.shape, q.scheme.granularity, row_groups=row_groups)
            if weight.ndim == 3
            else (weight.shape[0],)
        )
        return q if len(rows) == 1 else split_rows(q, rows)

    return nnx.data(jax.eval_shape(as_loaded, weight))
