"""The loss of a model over known tokens, and its gradient with respect to the residual stream
before every layer."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax.models.layers import Step
from fp8jax.models.rotary_embedding import cos_sin
from fp8jax.ops.choice import choose
from fp8jax.ops.values import Reads, Stream
from fp8jax.pallas_kernels.rms_norm_quantize import times


def cross_entropy(logits: jax.Array, token_ids: jax.Array) -> jax.Array:
    """Of the next token, mean over all but the last position."""
    log_probabilities = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    return -jnp.mean(jnp.take_along_axis(log_probabilities, token_ids[:, 1:, None], axis=-1))


def loss_with(model: Any, added_to_stream: jax.Array, token_ids: jax.Array) -> jax.Array:
    """The loss with `added_to_stream` `[layers + 1, b, t, h]` added to what each layer, and the
    final norm, reads."""
    config, decoder = model.config, model.model
    positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1], dtype=jnp.int32), token_ids.shape)
    cos, sin = cos_sin(config.rope, positions)
    step = Step(positions, cos, sin, None, continues=False, choice=choose(model.implementation))
    stream = Stream(times(decoder.embed_tokens(token_ids), config.embedding_multiplier))
    for layer, more in zip(decoder.layers, added_to_stream[:-1], strict=True):
        stream, _ = layer(replace(stream, value=stream.value + more), step, None)
    last = replace(stream, value=stream.value + added_to_stream[-1])
    y, _ = decoder.norm.settle(last, step, Reads())
    return cross_entropy(model.logits(y), token_ids)


def stream_gradients(lm: Any, token_ids: np.ndarray) -> tuple[float, np.ndarray]:
    """The loss and its gradient `[layers + 1, b, t, h]` in float64."""
    config, (b, t) = lm.model.config, token_ids.shape
    nothing = jnp.zeros((config.num_layers + 1, b, t, config.hidden_size), config.dtype)
    value_and_grad = jax.jit(jax.value_and_grad(loss_with, argnums=1))
    loss, gradient = value_and_grad(lm.model, nothing, jnp.asarray(token_ids, jnp.int32))
    assert gradient.dtype == nothing.dtype
    return float(loss), np.asarray(gradient, np.float64)
