"""Generation: the cache against the plain forward pass, rows against their neighbours, streaming
against the whole loop."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_checkpoints import GOLDENS, SCHEMES, golden, load, relative_error
from selection import mostly_slow

import fp8jax

prefill = jax.jit(fp8jax.prefill, donate_argnums=1)
decode_step = jax.jit(fp8jax.decode_step, donate_argnums=1)
ALL_SCHEMES = (None, *SCHEMES)


def padded(rows, width):
    out = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out, np.asarray([len(row) for row in rows], np.int32)


def prefill_logits(lm, rows, width=16):
    model = lm.model
    return prefill(model, model.empty_cache(len(rows), 32), *padded(rows, width))


@pytest.mark.smoke
@pytest.mark.parametrize(
    "variant, scheme",
    mostly_slow(
        itertools.product(["llama31", "smollm2"], ALL_SCHEMES),
        quick=[*itertools.product(["llama31"], ALL_SCHEMES)],
    ),
)
def test_prefill_of_n_equals_prefill_of_n_minus_1_and_one_decode_step(variant, scheme):
    lm, arrays = load(variant, scheme), golden(variant)
    rows = [row[:12].tolist() for row in arrays["token_ids"]]
    whole, _ = prefill_logits(lm, rows)
    _, cache = prefill_logits(lm, [row[:-1] for row in rows])
    last = np.asarray([row[-1] for row in rows], np.int32)
    stepped, _ = decode_step(lm.model, cache, last, np.asarray([11, 11], np.int32))
    if scheme is None:
        assert (
            relative_error(stepped, whole) < 1e-5
        )  # float32 products of other shapes sum in another order
        np.testing.assert_array_equal(np.argmax(stepped, -1), np.argmax(whole, -1))
    else:
        # Other shapes, other roundings, flipped codes: less than the quantization error itself.
        unquantized, _ = prefill_logits(load(variant), rows)
        assert np.linalg.norm(stepped - whole) <= 0.6 * np.linalg.norm(whole - unquantized)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fp8_decoding_repeats_bit_for_bit_at_equal_shapes(scheme):
    lm = load("smollm2", scheme)
    rows = golden("smollm2")["token_ids"][:, :8].tolist()

    def run():
        logits, cache = prefill_logits(lm, rows)
        stepped, _ = decode_step(
            lm.model, cache, np.argmax(logits, -1).astype(np.int32), np.asarray([8, 8], np.int32)
        )
        return np.asarray(stepped)

    np.testing.assert_array_equal(run(), run())


def test_logits_of_prefill_are_those_of_the_plain_forward_pass():
    lm, rows = load("llama31"), golden("llama31")["token_ids"][:, :9].tolist()
    logits, _ = prefill_logits(lm, rows)
    assert (
        relative_error(logits, lm.logits(rows)[:, -1]) < 1e-5
    )  # sums over padded keys in another order


@pytest.mark.smoke
@pytest.mark.parametrize("scheme", ALL_SCHEMES)
def test_other_rows_change_nothing_in_a_row_bit_for_bit(scheme):
    """Prompts of different lengths in one batch: the neighbours' tokens and lengths do not
    matter."""
    lm, tokens = load("smollm2", scheme), golden("smollm2")["token_ids"]
    mine = tokens[0, :7].tolist()
    results = []
    for others in (
        [tokens[1, :3].tolist(), tokens[1, 4:15].tolist()],
        [tokens[1, :12].tolist(), [5]],
    ):
        logits, cache = prefill_logits(lm, [mine, *others])
        lengths = np.asarray([len(mine), *map(len, others)], np.int32)
        stepped, _ = decode_step(lm.model, cache, np.argmax(logits, -1).astype(np.int32), lengths)
        results.append((np.asarray(logits[0]), np.asarray(stepped[0])))
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(first, second)


def test_padding_does_not_count_for_a_whole_batch_activation_scale():
    """With one activation scale for all rows, valid tokens still decide alone: prompts in a wider
    bucket give the same bits."""
    config = {"activation": "tensor"}
    lm = fp8jax.load_quantized(
        GOLDENS / "llama2", "fp8_per_tensor", quantization_config=config, dtype="float32"
    )
    row = golden("llama2")["token_ids"][0, :7].tolist()
    loud = np.full((1, 16), row[0], np.int32)
    loud[0, :7] = row
    quiet, lengths = padded([row], 16)
    model = lm.model
    first, _ = prefill(model, model.empty_cache(1, 32), quiet, lengths)
    second, _ = prefill(model, model.empty_cache(1, 32), loud, lengths)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("scheme", mostly_slow(ALL_SCHEMES, quick=[None, "fp8_per_block"]))
def test_prompts_of_different_lengths_generate_what_each_generates_alone(scheme):
    lm, tokens = load("smollm2", scheme), golden("smollm2")["token_ids"]
    prompts = [tokens[0, :5].tolist(), tokens[1, :14].tolist(), tokens[0, 3:11].tolist()]
    options = {"max_new_tokens": 6, "temperature": 0, "eos_token_ids": []}
    together = lm.generate(prompts, **options)
    alone = [lm.generate([prompt], **options)[0] for prompt in prompts]
    if scheme is None:
        assert [g.token_ids for g in together] == [g.token_ids for g in alone]
    # In FP8 another batch is another shape, whose roundings may flip codes: the first token's
    # probability stays close.
    for a, b in zip(together, alone, strict=True):
        assert abs(a.logprobs[0] - b.logprobs[0]) < (1e-4 if scheme is None else 0.5)


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 7}]
)
def test_streaming_gives_the_tokens_of_generate(options):
    lm, prompt = load("llama31"), golden("llama31")["token_ids"][0, :8].tolist()
    options = {"max_new_tokens": 10, "eos_token_ids": [], **options}
    assert list(lm.stream(prompt, **options)) == lm.generate([prompt], **options)[0].token_ids


def test_an_end_token_ends_its_own_row_only():
    lm, arrays = load("llama2"), golden("llama2")
    prompts, expected = arrays["token_ids"][:, :8].tolist(), arrays["greedy"].tolist()
    end = expected[0][3]
    stop = expected[0].index(end)
    other_stop = expected[1].index(end) if end in expected[1] else None
    ended, other = lm.generate(prompts, max_new_tokens=16, temperature=0, eos_token_ids=[63, end])
    assert (ended.token_ids, ended.finish_reason) == (expected[0][: stop + 1], "stop")
    if other_stop is None:
        assert (other.token_ids, other.finish_reason) == (expected[1], "length")
    assert (
        list(lm.stream(prompts[0], max_new_tokens=16, temperature=0, eos_token_ids=end))
        == expected[0][: stop + 1]
    )
    assert len(ended.logprobs) == stop + 1


def test_logprobs_are_those_of_the_model():
    lm, arrays = load("llama2"), golden("llama2")
    prompt = arrays["token_ids"][0, :8].tolist()
    (out,) = lm.generate([prompt], max_new_tokens=5, temperature=0, eos_token_ids=[])
    logits = np.asarray(lm.logits([prompt + out.token_ids])[0], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [logprobs[7 + i, token] for i, token in enumerate(out.token_ids)]
    np.testing.assert_allclose(out.logprobs, expected, atol=1e-4)  # float32 against float64
    (score,) = lm.score([prompt + out.token_ids])
    np.testing.assert_allclose(score.logprobs[7:], expected, atol=1e-4)  # the same, through score


def test_a_rows_draws_depend_on_its_seed_alone():
    lm, tokens = load("llama31"), golden("llama31")["token_ids"]
    a, b, c = tokens[0, :8].tolist(), tokens[1, :8].tolist(), tokens[1, 8:16].tolist()
    options = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0, "eos_token_ids": []}
    first = lm.generate([a, b], seed=[3, 4], **options)
    second = lm.generate([a, c], seed=[3, 9], **options)
    assert first[0].token_ids == second[0].token_ids
    assert lm.generate([a, a], seed=[3, 4], **options)[1].token_ids != first[0].token_ids


def test_every_step_of_a_row_draws_anew():
    rows, flat = 200, jnp.zeros((200, 1000), jnp.float32)
    sampling = fp8jax.Sampling.of(rows, temperature=1.0, seed=list(range(rows)))
    first, second = (
        np.asarray(fp8jax.sample(flat, sampling, jnp.int32(step))[0]) for step in (0, 1)
    )
    assert (first == second).sum() < 5  # of 200 independent pairs of 1000 values: 0.2 expected


def test_generation_config_gives_the_defaults_and_arguments_beat_it():
    lm = load("llama31")
    assert lm.generation_config["do_sample"] and lm.eos_token_ids == (2, 5)
    rules = lm._sampling(1, None, None, None, None, 0)
    np.testing.assert_allclose(
        [rules.temperature[0], rules.top_p[0]], [0.6, 0.9], rtol=1e-6
    )  # as in the file
    assert lm._sampling(1, 0, None, None, None, 0).mode == "greedy"
    assert load("llama2")._sampling(1, None, None, None, None, 0).mode == "greedy"


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1] * 510], {"max_new_tokens": 10}, "510 prompt tokens and max_new_tokens=10.*512"),
        ([[1], []], {}, r"prompts\[1\] is empty"),
        ([[1, 64]], {}, "token id 64 is outside the vocabulary of 64"),
        ([[-1]], {}, "token id -1"),
        (["text"], {}, "no tokenizer"),
        ("text", {}, "list of prompts"),
        ([1, 2, 3], {}, "list of prompts"),
        ([[1]], {"temperature": -1}, "temperature"),
        ([[1]], {"top_p": 1.5}, "top_p"),
        ([[1]], {"temperature": [1.0, 0.5]}, "2 values for 1 prompts"),
        ([[1]], {"max_new_tokens": 0}, "at least 1"),
        ([[1.5]], {}, "token ids"),
    ],
)
def test_mistakes_are_found_before_any_work(prompts, options, message, monkeypatch):
    lm = load("llama31")
    monkeypatch.setattr(lm, "_functions", lambda: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        lm.generate(prompts, **{"max_new_tokens": 4, **options})


def numpy_filter(logits, temperature, top_k, top_p, min_p):
    """The probabilities left after filtering, in float64: the definitions, one token at a time."""
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-p, kind="stable")
    kept = order[: top_k or None]
    share = p[kept] / p[kept].sum()
    reached, nucleus = 0.0, []
    for token, s in zip(kept, share, strict=True):
        if reached < top_p:
            nucleus.append(token)
        reached += s
    kept = [t for t in nucleus if p[t] >= min_p * p.max()] or [order[0]]
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize(
    "rules",
    [
        {"temperature": 1.0},
        {"temperature": 0.5, "top_k": 3},
        {"temperature": 1.5, "top_p": 0.6},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 0.8, "top_k": 5, "top_p": 0.7, "min_p": 0.1},
        {
            "temperature": 1.0,
            "top_k": 3,
            "top_p": 0.75,
        },  # two tokens; three if top_k's three did not add up to one
        {"temperature": 1.0, "top_p": 0.0},
    ],
)
def test_draws_follow_the_filtered_distribution(rules):
    draws = 20_000
    logits = np.random.default_rng(0).standard_normal(12).astype(np.float32) * 2
    rules = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **rules}
    sampling = fp8jax.Sampling.of(draws, **rules, seed=11)
    tokens, logprobs = jax.jit(fp8jax.sample)(
        jnp.broadcast_to(logits, (draws, 12)), sampling, jnp.int32(0)
    )
    expected = numpy_filter(logits.astype(np.float64), **rules)
    counts = np.bincount(tokens, minlength=12)
    assert not counts[expected == 0].any()
    # five standard deviations of a binomial count
    assert (
        np.abs(counts - draws * expected) <= 5 * np.sqrt(draws * expected * (1 - expected)) + 1e-9
    ).all()
    full = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    np.testing.assert_allclose(logprobs, full[np.asarray(tokens)], atol=1e-5)  # float32


def test_float32_asks_for_full_precision_products():
    """On GPUs float32 dots run in TF32 unless the highest precision is asked for: every dot of the
    float32 model asks."""
    model = load("smollm2").model
    text = jax.jit(lambda m, ids: m(ids)).lower(model, jnp.zeros((1, 16), jnp.int32)).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(dots) > 10
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in dots)


def test_the_model_is_a_pytree_that_any_jit_takes():
    lm, ids = load("smollm2", "fp8_per_block"), jnp.asarray(golden("smollm2")["token_ids"][:, :16])
    logits = jax.jit(lambda model, token_ids: model(token_ids))(lm.model, ids)
    np.testing.assert_array_equal(logits, lm.logits(ids))


def test_a_loop_of_ones_own_traces_each_function_once():
    """Positions, tokens and the number of the step are data: no step compiles anything new."""
    model = load("smollm2", "fp8_per_block").model
    token_ids, lengths = padded([[5, 6, 7], [9]], 4)
    chex.clear_trace_counter()
    read, step, choose = (
        jax.jit(chex.assert_max_traces(function, n=1))
        for function in (fp8jax.prefill, fp8jax.decode_step, fp8jax.sample)
    )
    rules = fp8jax.Sampling.of(2, temperature=0.8, seed=[1, 2])
    logits, cache = read(model, model.empty_cache(2, 16), token_ids, lengths)
    for number in range(4):
        tokens, logprobs = choose(logits, rules, jnp.int32(number))
        chex.assert_shape([tokens, logprobs], (2,))
        logits, following = step(model, cache, tokens, lengths + number)
        chex.assert_trees_all_equal_shapes_and_dtypes(following, cache)
        chex.assert_shape(logits, (2, model.config.vocab_size))
        cache = following


class CharacterTokenizer:
    """Token i is byte i: a character beyond ASCII takes several tokens."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", errors="replace")


def test_streams_never_show_half_a_character():
    from fp8jax.language_model import _as_text
    from fp8jax.tokenizer import TextStream

    text = "naïve 🙂 – done"
    pieces = list(_as_text(iter(text.encode()), TextStream(CharacterTokenizer())))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) == len(text)
    cut = list(_as_text(iter("ab🙂".encode()[:-1]), TextStream(CharacterTokenizer())))
    assert "".join(cut) == "ab\ufffd"


@functools.cache
def weights():
    return load("llama2", "fp8_per_block")


def test_weights_are_found_by_the_checkpoints_names():
    lm = weights()
    qkv = lm.weight("model.layers.0.self_attn.qkv_proj")
    assert isinstance(qkv, fp8jax.QArray) and qkv.shape == (3 * 64, 64)
    assert lm.weight("model.layers.0.self_attn.qkv_proj.weight") is qkv
    assert load("smollm2").weight("lm_head") is load("smollm2").weight("model.embed_tokens")
    for name, part in [
        ("model.layers.7.mlp", "'7'"),
        ("model.layers.0.self_attn.q_proj", "qkv_proj"),
        ("model", "layers"),
    ]:
        with pytest.raises(KeyError, match=part):
            lm.weight(name)
