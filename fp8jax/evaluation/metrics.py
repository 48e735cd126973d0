"""How much a quantized model differs from its unquantized self: perplexity, KL divergence, top-1
agreement.

A text is cut into windows of equal length; every window is one causal forward pass and every token
but a window's first is scored, given the tokens before it in the window. With p the reference's
distribution for the next token, q the quantized model's, both a log-softmax in float32, and x_t the
token that the text has there:

    nll           = mean_t -log q(x_t)                    natural logarithm, over all scored tokens
    perplexity    = exp(nll)
    KL(p || q)    = mean_t sum_v p(v) (log p(v) - log q(v))      nats a token
    top-1         = share of t with argmax p = argmax q

Perplexity alone is a poor gate for quantization: it may fall by luck, and on a few thousand tokens
+-1 % is noise. KL and top-1 compare whole distributions against the reference's own, token by
token, need no large text to settle, and are zero and one only for a model that behaves the same.

Logits never exist but for some positions at once (a window of 8192 tokens of a 128k-word vocabulary
would have 4 GB of them, twice, and their log-softmax): each batch of windows goes through both
models up to the last hidden states, and these become four numbers a token, chunk by chunk; only
those are kept.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax.compiled_model import by_position

if TYPE_CHECKING:
    from fp8jax.language_model import LanguageModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model beside its reference, averaged over `tokens` scored tokens; formulas in the module
    docstring."""

    perplexity: float
    reference_perplexity: float
    kl: float  # KL(reference || model), nats a token
    top1_agreement: float  # 0 to 1
    tokens: int


class TokenScores(NamedTuple):
    """What one scored token contributes; each field has the shape of the targets."""

    nll: jax.Array  # -log q(target)
    reference_nll: jax.Array  # -log p(target)
    kl: jax.Array  # sum over the vocabulary of p (log p - log q)
    agrees: jax.Array  # bool: both models put the same token first


def token_windows(
    token_ids: Sequence[int] | np.ndarray, window: int, *, prefix: Sequence[int] = ()
) -> np.ndarray:
    """Cut a text into windows of equal length; what does not fill a last window is left out.

    Args:
        token_ids: the text, without special tokens.
        window: tokens a window, the prefix included.
        prefix: put before every window, for models that expect a beginning-of-sequence token.

    Returns:
        [n, window] int32.

    Raises:
        ValueError: the text does not fill one window, or a window would score nothing.
    """
    step = window - len(prefix)
    if window < 2 or step < 1:
        raise ValueError(
            f"window is {window} with a prefix of {len(prefix)}: wanted room for a token and its "
            "context"
        )
    ids = np.asarray(token_ids, dtype=np.int32)
    n = len(ids) // step
    if n == 0:
        raise ValueError(
            f"the text has {len(ids)} tokens, less than one window of {step}; give a longer text"
        )
    body = ids[: n * step].reshape(n, step)
    head = np.broadcast_to(np.asarray(prefix, dtype=np.int32), (n, len(prefix)))
    return np.concatenate([head, body], axis=1)


def compare_logits(
    reference_logits: jax.Array, logits: jax.Array, targets: jax.Array
) -> TokenScores:
    """Score each target token under two sets of logits; traceable.

    Args:
        reference_logits, logits: [..., v], any float dtype; the arithmetic is float32.
        targets: [...] int, the token that follows in the text.
    """
    if reference_logits.shape != logits.shape:
        raise ValueError(
            f"reference logits are {reference_logits.shape}, the model's {logits.shape}: two "
            "models can be compared only over one vocabulary"
        )
    log_p = jax.nn.log_softmax(reference_logits.astype(jnp.float32), axis=-1)
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return TokenScores(
        nll=-_pick(log_q, targets),
        reference_nll=-_pick(log_p, targets),
        kl=jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1),
        agrees=jnp.argmax(reference_logits, axis=-1) == jnp.argmax(logits, axis=-1),
    )


def compare(
    reference: "LanguageModel", lm: "LanguageModel", windows: np.ndarray, *, batch_size: int = 2
) -> Comparison:
    """Compare a model with its reference on [n, window] token ids, as `token_windows` makes them.

    Args:
        reference: usually the same checkpoint, loaded without quantization.
        lm: the model to judge; it must have the reference's vocabulary.
        batch_size: windows a forward pass.
    """
    parts = []
    for batch, valid in _batches(windows, batch_size):
        reference_hidden = _hidden_states(reference.model, batch)
        hidden = reference_hidden if lm is reference else _hidden_states(lm.model, batch)
        scores = _compare_batch(reference.model, lm.model, reference_hidden, hidden, batch)
        parts.append([np.asarray(field)[:valid] for field in scores])
    nll, reference_nll, kl, agrees = (np.concatenate(fields) for fields in zip(*parts, strict=True))
    _require_finite(nll + reference_nll + kl)
    return Comparison(
        perplexity=math.exp(_mean(nll)),
        reference_perplexity=math.exp(_mean(reference_nll)),
        kl=_mean(kl),
        top1_agreement=_mean(agrees),
        tokens=nll.size,
    )


def score_windows(
    lm: "LanguageModel", windows: np.ndarray, *, batch_size: int = 2
) -> Iterator[np.ndarray]:
    """Yield [b, window - 1] float32 log-probabilities: what the model gave to each token but a
    window's first."""
    for batch, valid in _batches(windows, batch_size):
        yield np.asarray(_score_batch(lm.model, _hidden_states(lm.model, batch), batch))[:valid]


def perplexity(lm: "LanguageModel", windows: np.ndarray, *, batch_size: int = 2) -> float:
    """Perplexity of one model on [n, window] token ids."""
    log_probs = np.concatenate(list(score_windows(lm, windows, batch_size=batch_size)))
    _require_finite(log_probs)
    return math.exp(-_mean(log_probs))


# A jit for each model, not one around both: the reference is compiled once for all that it is
# compared with. What takes both has their heads in it only.
@jax.jit
def _hidden_states(model: Any, token_ids: jax.Array) -> jax.Array:
    # The last position predicts a token that the window does not hold.
    return model.hidden_states(token_ids)[0][:, :-1]


@jax.jit
def _compare_batch(
    reference: Any, model: Any, reference_hidden, hidden, token_ids: jax.Array
) -> TokenScores:
    def compare_position(reference_hidden, hidden, target) -> TokenScores:
        return compare_logits(reference.logits(reference_hidden), model.logits(hidden), target)

    vocab = 2 * _vocab_size(model, hidden)  # the logits of both
    return by_position(compare_position, vocab, reference_hidden, hidden, token_ids[:, 1:])


@jax.jit
def _score_batch(model: Any, hidden: jax.Array, token_ids: jax.Array) -> jax.Array:
    def score_position(hidden, target) -> jax.Array:
        return _pick(jax.nn.log_softmax(model.logits(hidden).astype(jnp.float32)), target)

    return by_position(score_position, _vocab_size(model, hidden), hidden, token_ids[:, 1:])


def _vocab_size(model: Any, hidden: jax.Array) -> int:
    return jax.eval_shape(lambda: model.logits(hidden[0, 0])).size


def _pick(log_probs: jax.Array, targets: jax.Array) -> jax.Array:
    # A token id past the vocabulary gives NaN, which `_require_finite` reports, not the last word's
    # probability.
    return jnp.take_along_axis(
        log_probs, targets[..., None], axis=-1, mode="fill", fill_value=jnp.nan
    )[..., 0]


def _batches(windows: np.ndarray, batch_size: int) -> Iterator[tuple[jax.Array, int]]:
    """Batches of one shape, so that one compilation serves all: the last is filled up with its
    first row."""
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(
            f"windows have shape {windows.shape}, wanted [n >= 1, window >= 2]; see token_windows"
        )
    if windows.min() < 0:
        raise ValueError(f"windows hold the token id {windows.min()}, wanted ids from 0 up")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, wanted at least 1")
    batch_size = min(batch_size, len(windows))
    for start in range(0, len(windows), batch_size):
        rows = windows[start : start + batch_size]
        filler = np.repeat(rows[:1], batch_size - len(rows), axis=0)
        yield jnp.asarray(np.concatenate([rows, filler]), dtype=jnp.int32), len(rows)


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values, dtype=np.float64))  # thousands of float32 terms: summed in float64


def _require_finite(scores: np.ndarray) -> None:
    if not np.isfinite(scores).all():
        row, position = (int(i) for i in np.argwhere(~np.isfinite(scores))[0])
        raise ValueError(
            f"window {row}, position {position + 1}: the score is {scores[row, position]}; either "
            "the token id lies outside the vocabulary (was the text tokenized for another model?) "
            "or the model computes NaN or Inf"
        )
