"""A model runs where JAX is told not to add dimensions by itself
(`JAX_NUMPY_RANK_PROMOTION=raise`), as strict projects do."""

import itertools

import jax
import pytest
from golden_checkpoints import GOLDENS, SCHEMES, golden
from selection import mostly_slow

import fp8jax

SAMPLING = {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "seed": 1}


@pytest.mark.parametrize(
    "variant, scheme",
    mostly_slow(
        itertools.product(["llama_bias_headdim", "qwen3_moe"], SCHEMES),
        quick=[("llama_bias_headdim", "fp8_per_tensor")],
    ),
)
def test_loading_logits_and_generation_name_every_dimension(variant, scheme):
    token_ids = golden(variant)["token_ids"]
    with jax.numpy_rank_promotion("raise"):
        lm = fp8jax.load_quantized(GOLDENS / variant, scheme)
        lm.logits(token_ids)
        (generation,) = lm.generate(token_ids[:1, :8].tolist(), max_new_tokens=3, **SAMPLING)
    assert len(generation.token_ids) > 0


@pytest.mark.parametrize(
    "variant, scheme",
    [
        ("llama_bias_headdim", "fp8_per_tensor"),
        pytest.param("qwen3_moe", "fp8_per_block", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_kernels_do_too(variant, scheme):
    token_ids = golden(variant)["token_ids"]
    with jax.numpy_rank_promotion("raise"):
        lm = fp8jax.load_quantized(GOLDENS / variant, scheme, implementation="triton_interpreted")
        (generation,) = lm.generate(token_ids[:1, :8].tolist(), max_new_tokens=2, temperature=0)
    assert len(generation.token_ids) > 0
