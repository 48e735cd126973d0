"""What layers call: products, norms, attention and activations, each with the choice of what runs
it."""

from fp8jax.ops.choice import IMPLEMENTATIONS, Implementation
from fp8jax.ops.matmul import (
    PartialSums,
    QActivation,
    float_matmul,
    grouped_block_m,
    grouped_matmul,
    grouped_scaled_matmul,
    precision_of,
    product,
    quantize_activation,
    scaled_matmul,
    scaled_matmul_in_parts,
)

__all__ = [
    "IMPLEMENTATIONS",
    "Implementation",
    "PartialSums",
    "QActivation",
    "float_matmul",
    "grouped_block_m",
    "grouped_matmul",
    "grouped_scaled_matmul",
    "precision_of",
    "product",
    "quantize_activation",
    "scaled_matmul",
    "scaled_matmul_in_parts",
]
