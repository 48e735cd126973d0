"""Weights on a mesh as `jax.make_mesh` makes it, with Explicit axes: one device is enough to meet
every type error."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from random_models import random_model

import fp8jax

IDS = [[3, 4, 5, 6], [7, 8, 9, 10]]
OPTIONS = {"max_new_tokens": 3, "temperature": 1.0, "eos_token_ids": []}


def on_explicit_mesh(lm):
    """Every weight sharded over its rows: types of all kinds meet, on one device."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))
    lm.model = jax.device_put(lm.model, NamedSharding(mesh, PartitionSpec("x")))
    return lm, mesh


def test_generation_and_scoring_under_explicit_axes():
    plain = random_model()
    lm, mesh = on_explicit_mesh(random_model())
    expected = [g.token_ids for g in plain.generate(IDS, **OPTIONS)]
    with jax.sharding.set_mesh(mesh):
        assert [g.token_ids for g in lm.generate(IDS, **OPTIONS)] == expected
        np.testing.assert_array_equal(lm.logits(IDS), plain.logits(IDS))
    assert [g.token_ids for g in lm.generate(IDS, **OPTIONS)] == expected  # no mesh is set
    assert lm.score(IDS)[0].logprobs == plain.score(IDS)[0].logprobs


def test_the_pure_functions_under_explicit_axes():
    plain = random_model().model
    lm, _ = on_explicit_mesh(random_model())
    args: Any = (
        np.asarray(IDS, np.int32),
        np.asarray([4, 3], np.int32),
        fp8jax.Sampling.of(2),
        np.asarray([-1]),
        3,
    )
    loop = jax.jit(fp8jax.generate, static_argnames=("capacity", "cache_length"))
    found, expected = (
        loop(model, *args, capacity=4, cache_length=8) for model in (lm.model, plain)
    )
    np.testing.assert_array_equal(found.token_ids, expected.token_ids)
    logits, cache = jax.jit(fp8jax.prefill)(lm.model, lm.model.empty_cache(2, 8), *args[:2])
    next_logits, _ = jax.jit(fp8jax.decode_step)(lm.model, cache, np.argmax(logits, -1), args[1])
    np.testing.assert_array_equal(np.argmax(next_logits, -1), expected.token_ids[:, 1])
    np.testing.assert_allclose(
        lm.model(args[0])[0, -1], logits[0], rtol=1e-4, atol=1e-6
    )  # op by op, float32
