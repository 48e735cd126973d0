"""The frozen checkpoints under tests/goldens and what torch computed with them (see
scripts/make_goldens.py)."""

import functools
from pathlib import Path

import numpy as np

import fp8jax

GOLDENS = Path(__file__).parent / "goldens"
LLAMAS = (
    "llama2",
    "llama31",
    "smollm2",
    "llama_bias_headdim",
    "llama_fp16",
    "llama_fp32_sharded",
    "llama_linear_rope",
    "llama_yarn",
)
SCHEMES = ("fp8_per_tensor", "fp8_per_block")
# `ignore` entries that leave one kind of layer quantized.
ALL_KINDS = {
    "qkv": r"re:.*\.[qkv]_proj$",
    "o": r"re:.*\.o_proj$",
    "gate_up": r"re:.*\.(gate|up)_proj$",
    "down": r"re:.*\.down_proj$",
}


def ignore_all_but(which: str) -> list[str]:
    return [entry for kind, entry in ALL_KINDS.items() if kind != which]


@functools.cache
def golden(variant: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / variant / "golden.npz") as arrays:
        return dict(arrays)


@functools.cache
def load(variant: str, scheme: str | None = None) -> fp8jax.LanguageModel:
    """A golden checkpoint in float32, loaded once a test run."""
    return fp8jax.load_quantized(GOLDENS / variant, scheme, dtype="float32")


def relative_error(found, expected) -> float:
    """‖found − expected‖ / ‖expected‖, Frobenius, in float64."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def share_of_quantization_error(found, oracle, unquantized) -> float:
    """‖found − oracle‖ as a share of e = ‖oracle − unquantized‖."""
    oracle, unquantized = np.asarray(oracle, np.float64), np.asarray(unquantized, np.float64)
    return float(
        np.linalg.norm(np.asarray(found, np.float64) - oracle)
        / np.linalg.norm(oracle - unquantized)
    )
