"""Qwen2, Qwen3, Mistral and Granite against torch transformers, and how their config.json is
read."""

import itertools
import json

import numpy as np
import pytest
from golden_checkpoints import (
    GOLDENS,
    SCHEMES,
    golden,
    load,
    relative_error,
    share_of_quantization_error,
)
from selection import mostly_slow

from fp8jax.models import read_decoder_config

FAMILIES = ("qwen2", "qwen3", "mistral", "granite")


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_logits_equal_torch(family):
    logits = load(family).logits(golden(family)["token_ids"])
    # float32 sums in another order: at most 1.7e-6 was measured.
    assert relative_error(logits, golden(family)["logits"]) < 5e-6


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, quick=FAMILIES[:2]))
def test_greedy_tokens_equal_torch(family):
    prompts = golden(family)["token_ids"][:, :8].tolist()
    expected = golden(family)["greedy"]
    generations = load(family).generate(
        prompts, max_new_tokens=expected.shape[1], temperature=0, eos_token_ids=[]
    )
    np.testing.assert_array_equal([g.token_ids for g in generations], expected)


@pytest.mark.parametrize(
    "family, scheme",
    mostly_slow(
        itertools.product(FAMILIES, SCHEMES),
        quick=list(zip(FAMILIES, itertools.cycle(SCHEMES), strict=False)),
    ),
)
def test_fp8_logits_follow_the_fake_quantized_oracle(family, scheme):
    arrays = golden(family)
    logits = load(family, scheme).logits(arrays["token_ids"])
    # 0.6: codes flip at rounding borders and a flip cascades; float32 noise alone was seen to use
    # half of it
    assert (
        share_of_quantization_error(logits, arrays[f"logits.{scheme}.all"], arrays["logits"]) <= 0.6
    )


def raw_config(family: str, **changes) -> dict:
    """The golden config.json with fields changed; `...` removes one."""
    raw = json.loads((GOLDENS / family / "config.json").read_text()) | changes
    return {key: value for key, value in raw.items() if value is not ...}


def read(family: str, **changes):
    return read_decoder_config(raw_config(family, **changes), dtype="float32")


SLIDING = {"use_sliding_window": True, "sliding_window": 8}
WINDOWS = [
    ("mistral", {}, (8, 8)),
    ("mistral", {"sliding_window": None}, ()),
    ("mistral", {"sliding_window": ...}, (4096, 4096)),  # absent is not null in this family
    ("mistral", {"layer_types": ["sliding_attention", "sliding_attention"]}, (8, 8)),
    ("mistral", {"sliding_window": None, "layer_types": ["attention", "full_attention"]}, ()),
    (
        "qwen2",
        {"sliding_window": 8, "max_window_layers": 0, "layer_types": ...},
        (),
    ),  # switched off
    ("qwen2", SLIDING | {"max_window_layers": 1, "layer_types": ...}, (None, 8)),
    ("qwen3", SLIDING | {"max_window_layers": 0, "layer_types": ...}, (8, 8)),
    (
        "qwen3",
        SLIDING | {"max_window_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
        (8, None),
    ),
    ("qwen3_moe", {"sliding_window": 8, "max_window_layers": 48}, ()),  # as published files have it
    ("qwen3_moe", SLIDING | {"max_window_layers": 48}, (8, 8)),
    ("mixtral", {"sliding_window": ...}, ()),
    ("mixtral", {"sliding_window": 8}, (8, 8)),
    ("granite", {}, ()),
]


@pytest.mark.parametrize("family, changes, windows", WINDOWS)
def test_attention_windows_come_from_the_fields_of_the_family(family, changes, windows):
    assert read(family, **changes).windows == windows


def test_a_sliding_layer_without_a_window_is_an_error():
    with pytest.raises(
        ValueError,
        match="layer 1 is 'sliding_attention' by layer_types, but there is no sliding_window",
    ):
        read("qwen2", sliding_window=8, layer_types=["full_attention", "sliding_attention"])


@pytest.mark.parametrize("types", [["full_attention"], ["full_attention", "chunked_attention"]])
def test_layer_types_that_are_not_understood_are_an_error(types):
    with pytest.raises(ValueError, match=r"layer_types is .* expected 2 words"):
        read("qwen3", layer_types=types)


def test_defaults_of_absent_fields_are_those_of_the_family():
    assert read("qwen3", head_dim=...).head_dim == 128
    assert read("mistral", head_dim=...).head_dim == 16  # 64 / 4
    assert read("mistral", num_attention_heads=16, num_key_value_heads=...).num_kv_heads == 8
    assert read("granite", num_key_value_heads=...).num_kv_heads == 4
    silent = read("granite", attention_multiplier=..., residual_multiplier=..., logits_scaling=...)
    assert (silent.attention_scale, silent.residual_multiplier, silent.logits_divisor) == (1, 1, 1)


FOREIGN = [
    ("qwen2", {"attention_bias": True}, "attention_bias: True changes the forward pass"),
    ("llama2", {"sliding_window": 8}, "sliding_window: 8 changes the forward pass"),
    ("mistral", {"logits_scaling": 2.0}, "logits_scaling: 2.0 changes the forward pass"),
    ("granite", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not implemented"),
    ("qwen3", {"num_zebras": 3}, "num_zebras: 3 is not a field that fp8jax knows"),
]


@pytest.mark.parametrize("family, changes, message", FOREIGN)
def test_a_field_that_the_family_does_not_compute_with_is_an_error(family, changes, message):
    with pytest.raises(ValueError, match=message):
        read(family, **changes)


def test_the_model_type_stands_in_for_a_missing_architecture():
    for family in (*FAMILIES, "llama2", "granitemoe", "mixtral", "qwen3_moe", "olmoe"):
        assert read(family, architectures=...) == read(family)
