"""What quantization costs: perplexity, KL divergence, top-1 agreement, tables of schemes."""

from fp8jax.evaluation.metrics import (
    Comparison,
    compare,
    compare_logits,
    perplexity,
    score_windows,
    token_windows,
)

__all__ = [
    "Comparison",
    "compare",
    "compare_logits",
    "perplexity",
    "score_windows",
    "token_windows",
]
