"""The routing kernel in interpret mode against its reference, whose parts tests/test_moe.py
proves.

Integers must be equal; so must weights, but for what exp and a division leave open in float32.
"""

import dataclasses
import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from strict_memory import strict_memory

from fp8jax.pallas_kernels import expert_routing
from fp8jax.pallas_kernels.expert_routing import (
    Rule,
    route_experts_reference,
    route_experts_triton,
)

# The families: Mixtral; Qwen3-MoE and OLMoE with and without norm_topk_prob; GraniteMoE.
FAMILIES = [
    ("all", True, "float32"),
    ("all", True, "activation"),
    ("all", False, "activation"),
    ("chosen", False, "activation"),
]


def rule_of(family, top_k: int, dtype: str) -> Rule:
    softmax_over, renormalise, weight_dtype = family
    return Rule(
        top_k=top_k,
        softmax_over=softmax_over,
        renormalise=renormalise,
        weight_dtype=dtype if weight_dtype == "activation" else "float32",
    )


def name_of(family) -> str:
    softmax_over, renormalise, weight_dtype = family
    return f"{softmax_over}{'-renormalised' if renormalise else ''}-{weight_dtype}"


@pytest.fixture(scope="module", autouse=True)
def checked_memory():
    with strict_memory():
        yield


def check(logits: jax.Array, top_k: int, block_m: int, family=FAMILIES[1], valid=None) -> None:
    rule = rule_of(family, top_k, logits.dtype.name)
    valid = None if valid is None else jnp.asarray(valid)
    expected = route_experts_reference(logits, rule, block_m, valid=valid)
    found = route_experts_triton(logits, rule, block_m, valid=valid, interpret=True)
    for name in ("row", "out_row", "sizes", "block_m"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    # exp, a sum and two divisions; where weights are rounded, one step of the narrower dtype.
    dtype, weight = rule.weight_dtype, np.asarray(found.weight)
    tolerance = max(2.0**-20, float(jnp.finfo(dtype).eps)) if dtype != "float32" else 2.0**-20
    np.testing.assert_allclose(weight, np.asarray(expected.weight), rtol=tolerance)
    rounded = np.asarray(jnp.asarray(weight, dtype), np.float32)
    np.testing.assert_array_equal(weight, rounded)
    work, wanted = np.asarray(found.work), np.asarray(expected.work)
    np.testing.assert_array_equal(work[1:], wanted[1:])
    # Without an expert, any number will do.
    has_expert = wanted[3] == 1
    np.testing.assert_array_equal(work[0][has_expert], wanted[0][has_expert])


def normal(seed: int, *shape: int, dtype="float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize(
    "t, e, top_k, dtype, family, block_m",
    [  # each family, shape, dtype and tile size with several of the others
        (1, 32, 8, "bfloat16", FAMILIES[3], 16),
        (16, 128, 8, "bfloat16", FAMILIES[1], 16),
        (16, 128, 8, "float32", FAMILIES[3], 32),
        (7, 5, 2, "float32", FAMILIES[0], 16),
        (7, 5, 2, "bfloat16", FAMILIES[2], 32),
        (33, 8, 1, "float32", FAMILIES[1], 16),
        (33, 8, 2, "bfloat16", FAMILIES[0], 16),
        (3, 6, 6, "bfloat16", FAMILIES[0], 32),
        (1, 32, 8, "float32", FAMILIES[2], 32),
    ],
)
def test_slots_weights_and_tiles_are_those_of_the_reference(t, e, top_k, dtype, family, block_m):
    check(normal(t + e, t, e, dtype=dtype), top_k, block_m, family)


def test_padding_tokens_come_last():
    valid = np.random.default_rng(0).random(21) < 0.6
    check(normal(1, 21, 12), 3, 16, valid=valid)
    check(normal(1, 21, 12), 3, 16, valid=np.zeros(21, bool))


def test_all_tokens_to_one_expert_are_several_tiles():
    check(jnp.zeros((40, 9)).at[:, 4].set(3.0), 1, 16)


@hypothesis.given(
    hnp.arrays(np.float32, (5, 6), elements=st.sampled_from([-2.0, -1.0, -0.5, 1.0, 1.5, 3.0])),
    st.sampled_from(FAMILIES),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_of_equal_logits_the_lower_expert_is_taken(logits, family):
    check(jnp.asarray(logits), 3, 16, family)


@pytest.mark.parametrize("family", FAMILIES, ids=name_of)
def test_whatever_the_logits_are_every_slot_is_written_once(family):
    """NaN and infinities give nonsense for their own token, and places inside the arrays for
    all."""
    logits = np.array(normal(3, 6, 7))
    logits[0], logits[1, 2], logits[2, 3], logits[3, 4] = np.nan, np.nan, np.inf, -np.inf
    rule = rule_of(family, 3, "float32")
    run = functools.partial(route_experts_triton, rule=rule, block_m=16, interpret=True)
    slots = run(jnp.asarray(logits))
    row, out_row = np.asarray(slots.row), np.asarray(slots.out_row)
    assert sorted(out_row) == list(range(18))
    assert np.sum(slots.sizes) == 18 and np.min(slots.sizes) >= 0
    assert (row == out_row % 6).all()
    first, end, has_expert = np.asarray(slots.work)[1:]
    assert sum(end[has_expert == 1] - first[has_expert == 1]) == 18

    def clean(slots) -> list[float]:
        return sorted(np.asarray(slots.weight)[np.isin(slots.row, [4, 5])])

    logits[:4] = 0
    assert clean(slots) == clean(run(jnp.asarray(logits)))


def test_what_does_not_fit_is_refused_with_its_reason():
    for (t, e, top_k, dtype), reason in (
        ((65, 128, 8, "bfloat16"), "65 tokens × 128 experts"),
        ((0, 8, 2, "bfloat16"), "at least one token"),
        ((1, 64, 13, "bfloat16"), "top_k = 13"),
        ((1, 64, 2, "int32"), "logits are int32"),
    ):
        assert reason in (expert_routing.why_not(t, e, top_k, dtype) or "")
    assert expert_routing.why_not(64, 128, 8, "bfloat16") is None
    rule = rule_of(FAMILIES[2], 8, "float32")
    with pytest.raises(NotImplementedError, match="65 tokens"):
        route_experts_triton(jnp.zeros((65, 128)), rule, 16, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES, ids=name_of)
@pytest.mark.parametrize("t, e, top_k", [(1, 32, 8), (16, 128, 8), (64, 128, 8), (5, 8, 2)])
def test_routing_on_a_gpu(t, e, top_k, family):
    logits = normal(t, t, e, dtype="bfloat16")
    rule = dataclasses.replace(rule_of(family, top_k, "bfloat16"), weight_dtype="bfloat16")
    run = functools.partial(route_experts_triton, rule=rule, block_m=16)
    found, expected = run(logits), jax.jit(functools.partial(run, interpret=True))(logits)
    for name in ("row", "out_row", "weight", "sizes", "work"):
        one, other = getattr(found, name), getattr(expected, name)
        if name == "weight":  # exp2 and division are approximate: one step of bfloat16
            np.testing.assert_allclose(one, other, rtol=2**-7)
        else:
            np.testing.assert_array_equal(one, other, err_msg=name)
