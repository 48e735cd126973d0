"""What generation refuses, with a sentence, and what it does with numbers that are not finite."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_model

import fp8jax
from fp8jax.models.layers import Linear

NAN = float("nan")


@functools.cache
def small(**numbers):
    return random_model(**numbers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5, expected a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"max_new_tokens": "3"}, "max_new_tokens is '3'"),
        ({"batch_size": -1}, "batch_size is -1, expected a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.0}, "batch_size is 2.0"),
        ({"top_k": 2.7}, "top_k is 2.7, expected a whole number"),
        ({"top_k": -2}, "top_k is -2, expected a number from -1"),
        ({"top_k": [1, True]}, re.escape("top_k is [1, True]")),
        ({"top_k": 2**31}, "top_k is 2147483648"),
        ({"seed": 1.5}, "seed is 1.5, expected a whole number"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": True}, "seed is True"),
        ({"temperature": NAN}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": "warm"}, "temperature is 'warm', expected a number"),
        ({"temperature": [0.5, [1]]}, "temperature is .*flat list"),
        ({"top_p": NAN}, "top_p is nan"),
        ({"min_p": [0.1, NAN]}, "min_p is nan"),
        ({"eos_token_ids": 1.5}, "eos_token_ids is 1.5"),
        ({"eos_token_ids": [[1], [2, 3]]}, "eos_token_ids is .*flat list"),
        ({"eos_token_ids": 2**40}, "eos_token_ids holds 1099511627776"),
    ],
)
def test_options_that_are_not_what_they_should_be_are_named(options, message, monkeypatch):
    lm = random_model()
    monkeypatch.setattr(lm, "_functions", lambda: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        lm.generate([[1], [2]], **{"max_new_tokens": 4, **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda lm: lm.generate([[1, 2], [3, [4]]]),
            r"prompts\[1\]: expected a string or a flat list of token ids",
        ),
        (
            lambda lm: lm.generate([[[1, 2]]]),
            r"prompts\[0\]: expected a string or a list of token ids",
        ),
        (lambda lm: lm.generate({0: [1]}), "list of prompts"),
        (lambda lm: lm.generate(5), "list of prompts, got a int"),
        (
            lambda lm: lm.logits([[1, 2], [3]]),
            r"logits takes token ids \[b, t\], got rows of different lengths",
        ),
        (lambda lm: lm.logits([[1.0, 2.0]]), "integers"),
        (lambda lm: lm.score([[1, 2], [3, [4]]]), r"texts\[1\]: expected"),
        (lambda lm: lm.score([1, 2]), "list of texts"),
        (lambda lm: lm.score("text"), "list of texts"),
        (lambda lm: lm.score([[1, 2]], batch_size=0), "batch_size is 0"),
        (lambda lm: lm.score([[1]]), "1 tokens; score takes 2 to 64"),
        (lambda lm: lm.stream([1], max_new_tokens=2.5), "max_new_tokens is 2.5"),
    ],
)
def test_token_ids_of_another_form_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(small())


def test_top_k_minus_1_keeps_all_as_elsewhere():
    rules = fp8jax.Sampling.of(2, temperature=1.0, top_k=-1)
    assert rules.top_k.tolist() == [0, 0] and rules.mode == "plain"


def test_a_model_without_a_pair_of_channels_to_turn_is_refused_when_built():
    with pytest.raises(ValueError, match="head_dim is 1"):
        random_model(head_dim=1)


IDS: Any = np.ones((2, 4), np.int32)
TWO: Any = np.asarray([4, 3], np.int32)
RULES = fp8jax.Sampling.of(2)
ENDS: Any = np.asarray([-1], np.int32)


def whole_loop(
    lm, ids=IDS, lengths=TWO, rules=RULES, ends=ENDS, new: Any = 4, *, capacity=4, cache_length=16
):
    return fp8jax.generate(
        lm.model, ids, lengths, rules, ends, new, capacity=capacity, cache_length=cache_length
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: whole_loop(lm, new=5), "max_new_tokens is 5, expected 1 to 4 .*capacity"),
        (lambda lm: whole_loop(lm, new=0), "max_new_tokens is 0"),
        (lambda lm: whole_loop(lm, new=2.5), "max_new_tokens is float"),
        (lambda lm: whole_loop(lm, capacity=0), "capacity"),
        (
            lambda lm: whole_loop(lm, rules=fp8jax.Sampling.of(3)),
            "rules are of .3,. rows, the logits of 2",
        ),
        (
            lambda lm: whole_loop(lm, cache_length=3),
            "cache_length is 3; it must hold the padded prompts of 4 tokens",
        ),
        (lambda lm: whole_loop(lm, cache_length=65), "context of 64"),
        (
            lambda lm: whole_loop(lm, lengths=np.asarray([4, 5], np.int32)),
            "lengths holds 5, expected 0 to 4",
        ),
        (
            lambda lm: whole_loop(lm, lengths=np.asarray([4], np.int32)),
            r"lengths is int32\[1\], expected int \[2\]",
        ),
        (lambda lm: whole_loop(lm, ids=IDS.astype(np.float32)), r"token_ids is float32\[2, 4\]"),
        (
            lambda lm: whole_loop(lm, ids=IDS[0]),
            r"token_ids is int32\[4\], expected int \[any, any\]",
        ),
        (lambda lm: whole_loop(lm, ids=IDS.tolist()), "token_ids is a list, expected an array"),
        (lambda lm: whole_loop(lm, ends=np.int32(3)), "eos_token_ids"),
        (
            lambda lm: lm.model(np.ones((1, 65), np.int32)),
            "65 tokens are more than the model's context of 64",
        ),
        (lambda lm: lm.model(np.ones((1, 6), np.float32)), "token ids are float32"),
        (
            lambda lm: fp8jax.prefill(lm.model, lm.model.empty_cache(3, 8), IDS, TWO),
            r"\[3, 1, 8, 8\], expected \[2, 1,",
        ),
        (
            lambda lm: fp8jax.prefill(lm.model, lm.model.empty_cache(2, 3), IDS, TWO),
            "room for 3 tokens a row, fewer",
        ),
        (
            lambda lm: fp8jax.prefill(lm.model, 2 * lm.model.empty_cache(2, 8), IDS, TWO),
            "cache is of 2 layers, the model of 1",
        ),
        (
            lambda lm: fp8jax.decode_step(
                lm.model, lm.model.empty_cache(2, 8), IDS[:, 0], TWO + np.int32(4)
            ),
            "positions holds 8, expected 0 to 7",
        ),
        (
            lambda lm: fp8jax.decode_step(lm.model, lm.model.empty_cache(2, 8), IDS, TWO),
            r"tokens is int32\[2, 4\], expected int \[any\]",
        ),
        (
            lambda lm: fp8jax.decode_step(
                lm.model, lm.model.empty_cache(2, 8), IDS[:, 0], TWO, TWO
            ),
            r"active is int32\[2\], expected bool",
        ),
        (lambda lm: lm.model.empty_cache(0, 8), "batch is 0"),
        (lambda lm: lm.model.empty_cache(1, 8.5), "length is 8.5"),
        (
            lambda lm: fp8jax.sample(jnp.zeros((2, 5)), fp8jax.Sampling.of(1), jnp.int32(0)),
            "rules are of .1,. rows",
        ),
        (
            lambda lm: fp8jax.sample(jnp.zeros(5), fp8jax.Sampling.of(1), jnp.int32(0)),
            r"expected float32 \[b, vocab\]",
        ),
        (
            lambda lm: fp8jax.sample(jnp.zeros((2, 5)), RULES, jnp.zeros(3, jnp.int32)),
            "step has shape",
        ),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused_with_their_sizes(call, message):
    with pytest.raises(ValueError, match=message):
        call(small())


def test_rows_end_where_outputs_or_cache_are_full_when_the_number_of_tokens_is_traced():
    loop = jax.jit(fp8jax.generate, static_argnames=("capacity", "cache_length"))
    args = (small().model, IDS, TWO, RULES, ENDS)
    assert loop(*args, 100, capacity=4, cache_length=16).counts.tolist() == [4, 4]
    # The last token needs no place in the cache: nothing reads it.
    assert loop(*args, 100, capacity=16, cache_length=8).counts.tolist() == [5, 6]


def poisoned(token, value=3e37):
    """A model with a large embedding multiplier and its own head: all weights are finite, this
    token's hidden state is not."""
    lm = random_model(
        architectures=["GraniteForCausalLM"],
        embedding_multiplier=1e3,
        attention_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=1.0,
        num_hidden_layers=2,  # infinite after the first layer, NaN in the second one's keys
    )
    table = lm.model.model.embed_tokens.weight
    lm.model.lm_head = Linear((("lm_head", table.shape[0]),), table.shape[1], dtype="float32")
    lm.model.lm_head.weight = table
    lm.model.model.embed_tokens.weight = table.at[token].set(value)
    return lm


@functools.cache
def _forward():
    return jax.jit(lambda model, ids: model(ids))


def plain_logits(lm, row):
    """`[t, vocab]` without padding: the model itself on exactly these tokens."""
    return np.asarray(_forward()(lm.model, jnp.asarray([row])))[0]


def assert_close(found, expected):
    np.testing.assert_allclose(
        found, expected, rtol=1e-4, atol=1e-5
    )  # float32 sums in another order


def test_filler_tokens_do_not_reach_the_rows_they_fill():
    """Token 0 gives NaN here. Rows that do not hold it get what they get without padding, in every
    call."""
    lm, rows = poisoned(0), [[5, 6, 7, 8, 9], [11] * 17]
    assert np.isnan(plain_logits(lm, [0, 1])).all()
    generated, scores = lm.generate(rows, max_new_tokens=2, eos_token_ids=[]), lm.score(rows)
    for row, new, score in zip(rows, generated, scores, strict=True):
        expected = plain_logits(lm, row)
        assert_close(lm.logits([row])[0], expected)
        logprobs = np.asarray(jax.nn.log_softmax(expected))
        assert_close(new.logprobs[0], logprobs[-1, new.token_ids[0]])
        assert np.isfinite(new.logprobs).all()
        assert_close(score.logprobs, logprobs[np.arange(len(row) - 1), row[1:]])


@pytest.mark.parametrize("attends", ["fresh", "cache"])
def test_padding_and_an_old_cache_may_hold_nan(attends):
    """The caller's own padding is any token, and a cache may be one that another request left
    behind."""
    lm = poisoned(0)
    row, t = [5, 6, 7], 8
    ids, lengths = np.asarray([row + [0] * (t - 3)], np.int32), np.asarray([3], np.int32)
    cache = lm.model.empty_cache(1, 16)
    if attends == "cache":
        cache = jax.tree.map(lambda x: jnp.full_like(x, NAN), cache)
    logits, cache = jax.jit(fp8jax.prefill)(lm.model, cache, ids, lengths)
    assert_close(logits[0], plain_logits(lm, row)[-1])
    logits, cache = jax.jit(fp8jax.decode_step)(lm.model, cache, np.asarray([9]), lengths)
    assert_close(logits[0], plain_logits(lm, [*row, 9])[-1])
    # Two tokens at once after the cache, the second of them padding.
    valid = np.asarray([[True, False]])
    step = jax.jit(
        lambda model, ids, cache: model.hidden_states(
            ids, cache=cache, start=lengths + 1, valid=valid
        )[0]
    )
    hidden = step(lm.model, np.asarray([[4, 0]]), cache)
    assert_close(lm.model.logits(hidden[0, 0]), plain_logits(lm, [*row, 9, 4])[-1])


def test_logits_that_are_not_finite_raise_and_name_prompt_and_place():
    lm = poisoned(31)
    good, bad = [5, 6, 7], [5, 7, 31]
    with pytest.raises(FloatingPointError, match=r"prompts\[2\].*new token 0 .*float32"):
        lm.generate([good, good, bad], max_new_tokens=1, batch_size=2)
    with pytest.raises(FloatingPointError, match=r"texts\[1\].*for token 1 "):
        lm.score([good, [5, 31, 7]])
    with pytest.raises(FloatingPointError, match=r"prompt: .*new token 0 "):
        next(lm.stream(bad, max_new_tokens=3))


def test_a_row_whose_logits_turn_nan_later_ends_there_and_its_neighbour_goes_on():
    """The pure function cannot raise; a row's last log-probability says it."""
    prompts, options = (
        [[3], [4]],
        {"max_new_tokens": 4, "temperature": 5.0, "seed": [0, 1], "eos_token_ids": []},
    )
    lm = poisoned(0, value=1.0)
    first, second = (g.token_ids for g in lm.generate(prompts, **options))
    assert first[1] not in [3, first[0], *second]
    lm.model = poisoned(first[1]).model
    with pytest.raises(FloatingPointError, match=r"prompts\[0\].*new token 2 "):
        lm.generate(prompts, **options)
    loop = jax.jit(fp8jax.generate, static_argnames=("capacity", "cache_length"))
    rules = fp8jax.Sampling.of(2, temperature=5.0, seed=[0, 1])
    ids, lengths = np.asarray(prompts, np.int32), np.asarray([1, 1], np.int32)
    out = loop(lm.model, ids, lengths, rules, ENDS, 4, capacity=4, cache_length=8)
    assert out.counts.tolist() == [3, 4] and out.token_ids[1].tolist() == second
    assert np.isfinite(out.logprobs).tolist() == [[True, True, False, True], [True] * 4]


def test_neighbouring_seeds_share_no_row():
    lm, prompt = small(), [3, 4]
    options = {"max_new_tokens": 12, "temperature": 5.0, "eos_token_ids": []}
    rows = [
        tuple(g.token_ids)
        for seed in (0, 1, 2)
        for g in lm.generate([prompt] * 4, seed=seed, **options)
    ]
    assert len(set(rows)) == 12  # of 32 ** 12 continuations that are about equally likely
    assert tuple(lm.stream(prompt, seed=1, **options)) == rows[4]


def test_draws_of_a_row_with_its_own_seed_are_those_of_key_seed_and_step():
    """As they were in every earlier version, spelled out with jax.random."""
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((3, 50)), jnp.float32)
    tokens, _ = fp8jax.sample(
        logits, fp8jax.Sampling.of(3, temperature=1.0, seed=[7, 8, 7]), jnp.int32(4)
    )
    for row, seed in enumerate([7, 8, 7]):
        noise = jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), 4), (50,), jnp.float32)
        assert tokens[row] == np.argmax(logits[row] - logits[row].max() + noise)
