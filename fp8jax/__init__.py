"""fp8jax: load a BF16 checkpoint as FP8 and run it in JAX.

    lm = fp8jax.load_quantized("meta-llama/Llama-3.1-8B", "fp8_per_block")
    lm.generate(["The capital of France is"], max_new_tokens=32)

To read the library, follow a weight,

    loading → checkpoints.parameters → checkpoints.filling → qarray → pallas_kernels.formats

or a token:

    language_model → generation → models.decoder → models.layers → ops → pallas_kernels

Imports run in the same direction and never back.
"""

from fp8jax.checkpoints.errors import CheckpointError
from fp8jax.checkpoints.load_report import LayerReport, LoadReport
from fp8jax.explanation import Explanation
from fp8jax.generation import Generated, decode_step, generate, prefill
from fp8jax.language_model import LanguageModel
from fp8jax.loading import load_quantized
from fp8jax.models.kv_cache import KVCache, LayerCache
from fp8jax.ops.matmul import QActivation, quantize_activation, scaled_matmul
from fp8jax.qarray import QArray, SplitQArray, dequantize, quantize
from fp8jax.quantization_config import QuantizationConfig
from fp8jax.results import Generation, Score
from fp8jax.sampling import Sampling, sample
from fp8jax.schemes import FP8_PER_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, SCHEMES, Scheme

__all__ = [
    "FP8_PER_BLOCK",
    "FP8_PER_CHANNEL",
    "FP8_PER_TENSOR",
    "SCHEMES",
    "CheckpointError",
    "Explanation",
    "Generated",
    "Generation",
    "KVCache",
    "LanguageModel",
    "LayerCache",
    "LayerReport",
    "LoadReport",
    "QActivation",
    "QArray",
    "QuantizationConfig",
    "Sampling",
    "Scheme",
    "Score",
    "SplitQArray",
    "decode_step",
    "dequantize",
    "generate",
    "load_quantized",
    "prefill",
    "quantize",
    "quantize_activation",
    "sample",
    "scaled_matmul",
]
__version__ = "0.1.0"
