"""Arrays that cannot be differentiated say so, rather than give zeros.

Weights as codes and scales cannot be trained: a gradient step is far smaller than the distance of
two codes. Whoever asks for their derivative gets an error that says what to do, while JAX traces
the derivative.
"""

import functools
from typing import Any

import jax

_WEIGHTS_ARE_CONSTANT = (
    "an FP8 weight (a QArray: e4m3 codes and scales) has no gradient. Differentiate with respect "
    "to what is float: inputs, embeddings, norms, biases, or adapters beside the layer; close "
    "over the rest of the model or pass it as an argument that jax.grad does not differentiate. "
    "To train the weight itself, keep it as floats: fp8jax.dequantize(weight)"
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _refusing(refusal: Exception, tree: Any) -> Any:
    del refusal
    return tree


@_refusing.defjvp
def _refuse(refusal: Exception, primals: Any, tangents: Any) -> Any:
    del primals, tangents
    raise refusal


def refused(tree: Any, refusal: Exception) -> Any:
    """The same arrays, and an error for who differentiates with respect to any of them.

    Args:
        tree: arrays.
        refusal: what is raised while JAX traces the derivative.
    """
    return _refusing(refusal, tree)


def constant_weight(weight: Any) -> Any:
    """A quantized weight, and an error for who differentiates with respect to it."""
    return refused(weight, TypeError(_WEIGHTS_ARE_CONSTANT))
