"""generation_config.json: what is applied, what is refused, and what is named because it is not
applied."""

import json
import shutil
import warnings

import numpy as np
import pytest
from golden_checkpoints import GOLDENS, golden, load

import fp8jax
from fp8jax.generation_config import APPLIED, NEUTRAL, read_generation_config


def read(**fields):
    return read_generation_config(fields, {})


def every_field() -> dict[str, object]:
    """Every field of the installed transformers' class, with the value it takes where nobody sets
    it."""
    from transformers import GenerationConfig

    fields = {
        name: value for name, value in vars(GenerationConfig()).items() if not name.startswith("_")
    }
    return fields | GenerationConfig._get_default_generation_params()


def test_every_field_of_transformers_is_applied_or_neutral_or_named():
    fields = every_field()
    assert (
        len(fields) > 60 and fields.keys() >= APPLIED and fields.keys() >= NEUTRAL
    )  # no name misspelled here
    for name in fields.keys() - APPLIED:
        for asked in (7, 0.5, [[1, 2]], {"a": 1}):
            told = read(**{name: asked}).warnings
            assert (name in NEUTRAL) == (not told), name
            assert all(f"{name}={asked!r}" in line for line in told)


def test_what_transformers_takes_where_nobody_says_anything_is_no_reason_to_warn():
    for name, value in every_field().items():
        assert not read(**{name: value}).warnings, name


def test_what_is_not_applied_is_named_once_at_loading(tmp_path):
    # stop_words_ids is no field of transformers' at all: somebody's own code reads it.
    fields = {
        "repetition_penalty": 1.1,
        "suppress_tokens": [1, 2],
        "stop_strings": ["\n"],
        "stop_words_ids": [[5]],
    }
    folder = shutil.copytree(GOLDENS / "llama2", tmp_path / "c")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **fields}))
    with pytest.warns(UserWarning, match="does not apply") as caught:
        lm = fp8jax.load_quantized(folder, None, dtype="float32")
    (told,) = [str(warning.message) for warning in caught]
    assert (
        all(f"{name}={value!r}" in told for name, value in fields.items()) and str(folder) in told
    )
    assert lm.report.warnings == (told,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm.generate([[3]], max_new_tokens=1)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (0.0, 0, 1.0, 0.0)),
        ({"do_sample": True}, (1.0, 0, 1.0, 0.0)),  # and not transformers' top_k of 50
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1},
            (0.6, 20, 0.9, 0.1),
        ),
        ({"do_sample": True, "temperature": 0}, (0.0, 0, 1.0, 0.0)),
        ({"do_sample": False, "temperature": 0.6}, (0.0, 0, 1.0, 0.0)),
        (
            {"do_sample": True, "temperature": None, "top_k": None, "top_p": None},
            (1.0, 0, 1.0, 0.0),
        ),
        ({"do_sample": True, "top_k": -1}, (1.0, 0, 1.0, 0.0)),
        ({"do_sample": True, "top_k": 50.0}, (1.0, 50, 1.0, 0.0)),
    ],
)
def test_sampling_defaults_are_those_of_the_file(monkeypatch, fields, expected):
    lm = load("llama2")
    monkeypatch.setattr(lm, "generation_config", fields)
    rules = lm._sampling(1, None, None, None, None, 0)
    found = [x[0] for x in (rules.temperature, rules.top_k, rules.top_p, rules.min_p)]
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


def test_sampling_at_temperature_0_is_greedy_and_said():
    (told,) = read(do_sample=True, temperature=0).warnings
    assert "do_sample: true with temperature: 0" in told and "greedy" in told
    assert not read(do_sample=False, temperature=0).warnings


@pytest.mark.parametrize(
    ("fields", "prompts", "tokens"),
    [
        ({"max_length": 12}, [5], 7),
        (
            {"max_length": 12},
            [5, 9],
            3,
        ),  # what the longest prompt leaves, as in transformers' padded batches
        ({"max_length": 12, "max_new_tokens": 2}, [5], 2),
        ({"max_length": 100_000}, [100], 28),  # the context is 128
        ({}, [5], 123),
    ],
)
def test_the_number_of_new_tokens_is_that_of_the_file(monkeypatch, fields, prompts, tokens):
    lm = load("llama2")
    monkeypatch.setattr(lm, "generation_config", fields)
    row = golden("llama2")["token_ids"][0]
    _, new_tokens, _ = lm._prepare([np.resize(row, n).tolist() for n in prompts], None, None)
    assert new_tokens == tokens


def test_a_prompt_that_max_length_leaves_nothing_is_refused(monkeypatch):
    lm = load("llama2")
    monkeypatch.setattr(lm, "generation_config", {"max_length": 5})
    with pytest.raises(
        ValueError,
        match=r"longest prompt has 5 tokens, and 5 is the limit.*max_length.*max_new_tokens",
    ):
        lm.generate([[3] * 5])
    assert lm._prepare([[3] * 5], 2, None)[1] == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("temperature", -0.5),
        ("temperature", True),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("temperature", 1e39),  # infinite in float32
        ("temperature", [0.5]),
        ("top_k", "50"),
        ("top_k", 2.5),
        ("top_k", -2),
        ("top_k", 10**30),
        ("top_p", 1.5),
        ("top_p", {}),
        ("min_p", -1),
        ("do_sample", "yes"),
        ("max_new_tokens", 0),
        ("max_new_tokens", "128"),
        ("max_new_tokens", False),
        ("max_length", -1),
        ("eos_token_id", "x"),
        ("eos_token_id", -5),
        ("eos_token_id", 2**31),
        ("eos_token_id", 1.5),
        ("eos_token_id", [1, "x"]),
        ("eos_token_id", [1, [2]]),
        ("eos_token_id", {"a": 1}),
        ("eos_token_id", True),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_file_and_field(name, value):
    with pytest.raises(
        fp8jax.CheckpointError, match=f"generation_config.json: {name} is .*expected"
    ):
        read(**{name: value})


def test_loading_refuses_it_and_names_the_folder(tmp_path):
    folder = shutil.copytree(GOLDENS / "llama2", tmp_path / "c")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": "hot"}))
    with pytest.raises(fp8jax.CheckpointError, match="temperature is 'hot'") as caught:
        fp8jax.load_quantized(folder, None)
    assert str(folder) in str(caught.value)


def test_faults_are_listed_together_and_an_end_token_of_config_json_is_named_as_its():
    with pytest.raises(fp8jax.CheckpointError, match="2 faults"):
        read(temperature="hot", top_p=2)
    with pytest.raises(fp8jax.CheckpointError, match="config.json: eos_token_id is 'x'"):
        read_generation_config({}, {"eos_token_id": "x"})
    assert read_generation_config({"eos_token_id": None}, {"eos_token_id": 2}).eos_token_ids == ()
    assert read_generation_config({}, {"eos_token_id": [2, 5]}).eos_token_ids == (2, 5)
