"""The metrics against NumPy in float64, on models small enough to write down: a bigram table is a
causal model."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import Bigram

from fp8jax import compiled_model, evaluation

V = 11
lax_map = jax.lax.map


def bigram_model(table: np.ndarray) -> Any:
    """The part of a LanguageModel that evaluation uses: `.model`, a pytree with hidden states and
    their logits."""
    return SimpleNamespace(model=Bigram(jnp.asarray(table, jnp.float32)))


def random_table(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (V, V)).astype(np.float32)


def log_softmax64(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


def oracle(reference: np.ndarray, table: np.ndarray, windows: np.ndarray) -> dict[str, float]:
    """Token by token, as the formulas are written."""
    nll, reference_nll, kl, agree = [], [], [], []
    for row in windows:
        for given, target in itertools.pairwise(row):
            log_p, log_q = log_softmax64(reference[given]), log_softmax64(table[given])
            nll.append(-log_q[target])
            reference_nll.append(-log_p[target])
            kl.append(sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)))
            agree.append(reference[given].argmax() == table[given].argmax())
    return {
        "perplexity": math.exp(np.mean(nll)),
        "reference_perplexity": math.exp(np.mean(reference_nll)),
        "kl": float(np.mean(kl)),
        "top1_agreement": float(np.mean(agree)),
        "tokens": len(nll),
    }


@pytest.mark.parametrize("n, window, batch_size", [(1, 2, 1), (5, 7, 2), (4, 6, 4), (3, 9, 8)])
def test_comparison_equals_float64_numpy_whatever_the_batching(n, window, batch_size):
    reference, table = random_table(0), random_table(1)
    windows = np.random.default_rng(n).integers(0, V, (n, window)).astype(np.int32)
    got = evaluation.compare(
        bigram_model(reference), bigram_model(table), windows, batch_size=batch_size
    )
    wanted = oracle(reference, table, windows)
    assert got.tokens == wanted["tokens"] == n * (window - 1)
    assert got.top1_agreement == pytest.approx(
        wanted["top1_agreement"], abs=1e-12
    )  # a ratio of two counts
    for name in ("perplexity", "reference_perplexity", "kl"):
        # float32 log-softmax of logits up to 8: each term good to a few 1e-7 of 8
        assert getattr(got, name) == pytest.approx(wanted[name], rel=5e-6), name


def test_chunks_of_positions_change_nothing(monkeypatch):
    """Logits of both models for four positions at a time, of fifteen."""
    reference, table = bigram_model(random_table(6)), bigram_model(random_table(7))
    windows = np.random.default_rng(6).integers(0, V, (3, 6)).astype(np.int32)
    whole = evaluation.compare(reference, table, windows, batch_size=3)
    chunks = []
    monkeypatch.setattr(compiled_model, "_LOGITS_BYTES", 4 * 2 * V * 5)
    monkeypatch.setattr(
        jax.lax,
        "map",
        lambda f, xs, batch_size: (
            chunks.append(batch_size) or lax_map(f, xs, batch_size=batch_size)
        ),
    )
    jax.clear_caches()
    parts = evaluation.compare(reference, table, windows, batch_size=3)
    assert chunks == [4]
    for name in ("perplexity", "reference_perplexity", "kl", "top1_agreement", "tokens"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-6), (
            name
        )  # float32 sums


def test_a_model_compared_with_itself_differs_by_nothing():
    lm = bigram_model(random_table(2))
    got = evaluation.compare(lm, lm, np.arange(V, dtype=np.int32)[None], batch_size=1)
    assert (got.kl, got.top1_agreement) == (0.0, 1.0)
    assert got.perplexity == got.reference_perplexity


def test_kl_weighs_by_the_reference_not_by_the_model():
    # p is sure, q is not: KL(p || q) = log 2, while KL(q || p) would be 0.5 * 30 - log 2.
    sure, torn = np.full((V, V), -200.0), np.full((V, V), -200.0)
    sure[:, 0], sure[:, 1], torn[:, :2] = 30.0, 0.0, 0.0
    got = evaluation.compare(bigram_model(sure), bigram_model(torn), np.zeros((1, 3), np.int32))
    assert got.kl == pytest.approx(math.log(2), rel=1e-6)  # one float32 log-softmax


def test_uniform_logits_have_the_vocabulary_as_perplexity():
    got = evaluation.perplexity(bigram_model(np.zeros((V, V))), np.zeros((2, 5), np.int32))
    assert got == pytest.approx(V, rel=1e-6)  # one float32 logarithm


def test_scores_are_log_probabilities_of_the_tokens_that_follow():
    table = random_table(3)
    windows = np.random.default_rng(3).integers(0, V, (3, 4)).astype(np.int32)
    got = np.concatenate(list(evaluation.score_windows(bigram_model(table), windows, batch_size=2)))
    wanted = log_softmax64(table)[windows[:, :-1], windows[:, 1:]]
    assert got.shape == (3, 3)
    np.testing.assert_allclose(
        got, wanted, rtol=0, atol=2e-6
    )  # float32 log-softmax of logits up to 8


def test_windows_are_consecutive_and_the_ragged_tail_is_left_out():
    np.testing.assert_array_equal(evaluation.token_windows(range(8), 3), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(
        evaluation.token_windows(range(5), 3, prefix=[9]), [[9, 0, 1], [9, 2, 3]]
    )


@pytest.mark.parametrize(
    "count, window, prefix", [(2, 3, ()), (9, 1, ()), (9, 2, (1, 2)), (0, 2, ())]
)
def test_windows_that_cannot_be_scored_are_refused(count, window, prefix):
    with pytest.raises(ValueError, match="window"):
        evaluation.token_windows(range(count), window, prefix=prefix)


@pytest.mark.parametrize("token", [-1, V, 2**30])
def test_a_token_outside_the_vocabulary_is_an_error_not_a_score(token):
    lm = bigram_model(random_table(4))
    windows = np.array([[0, 1, 2], [0, 1, token]], np.int32)
    with pytest.raises(ValueError, match="token id"):
        evaluation.compare(lm, lm, windows)
    with pytest.raises(ValueError, match="token id"):
        evaluation.perplexity(lm, windows)


def test_two_vocabularies_cannot_be_compared():
    wide = bigram_model(np.zeros((V, V + 1)))
    with pytest.raises(ValueError, match="one vocabulary"):
        evaluation.compare(bigram_model(np.zeros((V, V))), wide, np.zeros((1, 2), np.int32))


@pytest.mark.parametrize(
    "windows", [np.zeros((0, 4), np.int32), np.zeros((2, 1), np.int32), np.zeros(5, np.int32)]
)
def test_misshapen_windows_are_refused(windows):
    lm = bigram_model(random_table(5))
    with pytest.raises(ValueError, match="shape"):
        evaluation.compare(lm, lm, windows)


def test_bfloat16_logits_are_scored_in_float32():
    # In bfloat16, log_softmax of 11 nearly equal logits would be off by up to 2 ** -8 of 2.4.
    logits = jnp.zeros((1, V), jnp.bfloat16)
    scores = evaluation.compare_logits(logits, logits, jnp.zeros(1, jnp.int32))
    assert scores.nll.dtype == jnp.float32
    assert float(scores.nll[0]) == pytest.approx(math.log(V), rel=1e-6)  # one float32 logarithm
