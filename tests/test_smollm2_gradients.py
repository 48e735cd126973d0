"""Loss gradients through a real FP8 model point where those of the model with the same, dequantized
weights point.

Cosines to the gradient of the BF16 model, layer by layer, over 2 × 128 tokens of English prose.
Rounding the weights alone turns the gradient by so much; rounding the activations may not turn it
by much more. Needs SmolLM2 as tests/test_smollm2_quality.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_checkpoints import SCHEMES
from stream_gradients import stream_gradients
from test_smollm2_quality import TEXT, smollm2

from fp8jax.evaluation.metrics import token_windows
from fp8jax.qarray import QArray, dequantize

pytestmark = pytest.mark.slow


class Dequantized:
    """The FP8 model with its weights as BF16: the control."""

    def __init__(self, lm: Any):
        self.model = jax.tree.map(
            lambda leaf: (
                dequantize(leaf).astype(jnp.bfloat16) if isinstance(leaf, QArray) else leaf
            ),
            lm.model,
            is_leaf=lambda leaf: isinstance(leaf, QArray),
        )


def cosines(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """One a layer."""
    found, expected = (gradient.reshape(len(gradient), -1) for gradient in (found, expected))
    return (
        np.sum(found * expected, axis=1)
        / np.linalg.norm(found, axis=1)
        / np.linalg.norm(expected, axis=1)
    )


@pytest.fixture(scope="module")
def token_ids() -> np.ndarray:
    tokenizer: Any = smollm2(None).tokenizer
    return token_windows(
        tokenizer.encode(TEXT.read_text(encoding="utf-8"), verbose=False)[:256], 128
    )


@pytest.fixture(scope="module")
def unquantized(token_ids) -> np.ndarray:
    return stream_gradients(smollm2(None), token_ids)[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_in_every_layer_the_gradient_is_as_right_as_dequantized_weights_make_it(
    scheme, token_ids, unquantized
):
    lm = smollm2(scheme)
    found = cosines(stream_gradients(lm, token_ids)[1], unquantized)
    control = cosines(stream_gradients(Dequantized(lm), token_ids)[1], unquantized)
    for name, values in (("fp8", found), ("dequantized", control)):
        print(
            f"\n{scheme} {name}: min {values.min():.4f} median "
            f"{np.median(values):.4f}\n{values.round(3).tolist()}"
        )
    print(f"largest loss against the control: {(control - found).max():.4f}")
    assert np.all(found > control - 0.1)  # the project's gate
