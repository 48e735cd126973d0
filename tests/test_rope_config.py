"""The rope of a config.json: which table counts, frequencies against torch transformers, and how
long the context is."""

from typing import Any

import numpy as np
import pytest

from fp8jax.models import DecoderConfig, read_decoder_config
from fp8jax.models.rotary_embedding import Rope

SHAPE = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
    "intermediate_size": 96,
    "vocab_size": 64, "max_position_embeddings": 256,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def read(told: list[str] | None = None, /, **changes: Any) -> DecoderConfig:
    raw = {key: value for key, value in (SHAPE | changes).items() if value is not ...}
    return read_decoder_config(raw, dtype="float32", told=told)


PLAIN = [
    1.0,
    0.42169651,
    0.17782794,
    0.074989416,
    0.031622779,
    0.013335215,
    0.0056234132,
    0.0023713738,
]
YARNED = [
    1.0,
    0.31627238,
    0.08891397,
    0.018747354,
    0.0079056947,
    0.0033338037,
    0.0014058533,
    0.00059284345,
]
UNTRUNCATED = [1.0, 0.30403566, 0.078593604, *YARNED[3:]]
STEP = [
    1.0,
    0.42169651,
    0.022228492,
    0.009373677,
    0.0039528473,
    0.0016669019,
    0.00070292666,
    0.00029642173,
]
# A table, and what LlamaRotaryEmbedding of torch transformers 5.23 makes of it with theta 1000:
# inv_freq, attention_scaling.
FROM_TORCH = [
    ({"rope_type": "default"}, PLAIN, 1),
    ({"rope_type": "dynamic", "factor": 4.0}, PLAIN, 1),
    ({"rope_type": "linear", "factor": 4.0}, [f / 4 for f in PLAIN], 1),
    (LLAMA3, [1.0, 0.42169651, 0.064309873, *STEP[3:]], 1),
    (LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 2.0}, STEP, 1),
    (LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 1.0}, STEP, 1),
    (YARN, YARNED, 1.13862944),
    (YARN | {"beta_fast": 0, "beta_slow": 0.0}, YARNED, 1.13862944),  # zero means the default
    (YARN | {"truncate": None}, UNTRUNCATED, 1.13862944),  # null is false
    (YARN | {"truncate": False}, UNTRUNCATED, 1.13862944),
    (YARN | {"beta_fast": 1, "beta_slow": 32}, [0.5, 0.31627238, *PLAIN[2:]], 1.13862944),
    (
        YARN | {"beta_fast": 4, "beta_slow": 4, "truncate": False},
        [1.0, 0.42169651, 0.044456985, *YARNED[3:]],
        1.13862944,
    ),
    (YARN | {"factor": None}, YARNED, 1.13862944),  # 256 / 64
    (YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}, YARNED, 0.929523492),
    (YARN | {"mscale": 0.7, "mscale_all_dim": 0}, YARNED, 1.13862944),
    (YARN | {"attention_factor": 0.5}, YARNED, 0.5),
    (YARN | {"finetuned": True}, YARNED, 1.13862944),
    (
        YARN | {"factor": 0.5},
        [
            1.0,
            0.56226206,
            0.29637989,
            0.14997883,
            0.063245557,
            0.02667043,
            0.011246826,
            0.0047427476,
        ],
        1,
    ),
]


@pytest.mark.parametrize("table, frequencies, multiplier", FROM_TORCH)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_frequencies_are_those_of_torch(table, frequencies, multiplier, spelling):
    rope = read(rope_theta=1000, **{spelling: table}).rope
    # The constants have eight digits; torch computes powers in float32.
    np.testing.assert_allclose(rope.frequencies(), frequencies, rtol=5e-7)
    assert abs(rope.multiplier() - multiplier) < 1e-8


LINEAR, INNER = {"type": "linear", "factor": 2.0}, {"rope_type": "default", "rope_theta": 500.0}
TABLES = [  # fields, rope type, theta
    ({"rope_scaling": {}, "rope_parameters": INNER}, "default", 500),
    ({"rope_scaling": None, "rope_parameters": INNER, "rope_theta": 77}, "default", 500),
    ({"rope_scaling": LINEAR, "rope_parameters": INNER}, "linear", 10000),
    ({"rope_scaling": LINEAR, "rope_parameters": INNER, "rope_theta": 77}, "linear", 77),
    (
        {"rope_scaling": LINEAR | {"rope_theta": 88}, "rope_parameters": INNER, "rope_theta": 77},
        "linear",
        88,
    ),
    ({"rope_scaling": LINEAR | {"rope_type": "dynamic"}}, "dynamic", 10000),
    ({}, "default", 10000),
]


@pytest.mark.parametrize("fields, rope_type, theta", TABLES)
def test_the_table_that_counts_brings_its_own_theta(fields, rope_type, theta):
    rope = read(**fields).rope
    assert (rope.rope_type, rope.theta) == (rope_type, theta)


def test_the_original_context_at_top_level_wins():
    assert (
        read(
            rope_scaling=YARN, original_max_position_embeddings=32
        ).rope.original_max_position_embeddings
        == 32
    )
    assert (
        read(original_max_position_embeddings=32) == read()
    )  # with a rope that is not scaled, it says nothing


CARD = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CONTEXTS = [  # fields, context
    ({}, 256),
    ({"max_position_embeddings": ...}, 2048),
    ({"max_position_embeddings": 32768, "rope_scaling": CARD}, 131072),  # Qwen2.5's model card
    ({"max_position_embeddings": 40960, "rope_scaling": CARD}, 131072),  # Qwen3's
    (
        {"max_position_embeddings": 131072, "rope_scaling": CARD},
        131072,
    ),  # DeepSeek-R1-0528-Qwen3-8B
    (
        {
            "max_position_embeddings": 4096,
            "rope_scaling": LINEAR | {"factor": 4.0},
            "max_sequence_length": 16384,
        },
        16384,
    ),  # Vicuna-16k
    ({"max_position_embeddings": 2048, "max_sequence_length": 4096}, 2048),  # nothing is stretched
    (
        {
            "max_position_embeddings": 131072,
            "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192},
        },
        131072,
    ),
]


@pytest.mark.parametrize("fields, context", CONTEXTS)
def test_the_context_is_what_the_rope_reaches(fields, context):
    assert read(**fields).max_position_embeddings == context


def test_dual_chunk_attention_is_plain_attention_up_to_where_the_chunks_begin():
    chunks = {
        "chunk_size": 262144,
        "local_size": 8192,
        "original_max_position_embeddings": 262144,
    }  # Qwen2.5-7B-Instruct-1M
    told = []
    config = read(told, max_position_embeddings=1010000, dual_chunk_attention_config=chunks)
    assert config.max_position_embeddings == 262144
    assert len(told) == 1 and "up to 262144 tokens it is plain attention" in told[0]
    with pytest.raises(
        ValueError,
        match=r"dual_chunk_attention_config\.original_max_position_embeddings None is wrong",
    ):
        read(dual_chunk_attention_config={"chunk_size": 8})


def test_attn_factor_is_ignored_as_transformers_ignores_it_and_that_is_told_once():
    told = []
    # DeepSeek-R1-0528-Qwen3-8B
    rope = read(told, rope_scaling=YARN | {"attn_factor": 0.8782488562869419}).rope
    assert rope == read(rope_scaling=YARN).rope
    assert (
        len(told) == 1
        and "rope_scaling.attn_factor 0.878" in told[0]
        and "multiplied by 1.139" in told[0]
    )


@pytest.mark.parametrize(
    "fields",
    [{"partial_rotary_factor": 0.5}, {"rope_parameters": INNER | {"partial_rotary_factor": 0.5}}],
)
def test_a_partial_rotary_factor_turns_whole_heads_as_in_transformers(fields):
    told = []
    config = read(told, **fields)
    assert config.rope.rotary_dim == config.head_dim == 16
    assert len(told) == 1 and "partial_rotary_factor 0.5 is ignored" in told[0]
    with pytest.raises(ValueError, match=r"partial_rotary_factor 0\.5 is wrong: expected 1"):
        read(
            rope_scaling=LINEAR, partial_rotary_factor=0.5
        )  # with a scaled rope, transformers fails


def test_fields_of_another_rope_type_are_told_about_and_unknown_ones_refused():
    told = []
    assert read(told, rope_scaling=LINEAR | {"beta_fast": 3}).rope == read(rope_scaling=LINEAR).rope
    assert (
        len(told) == 1
        and "rope_scaling.beta_fast changes nothing with rope type 'linear'" in told[0]
    )
    with pytest.raises(
        ValueError,
        match=r"rope_scaling\.warp: 0 is nothing that rope type 'linear' computes with; known: fac",
    ):
        read(rope_scaling=LINEAR | {"warp": 0})
    for key, value in [("rope_type", "longrope"), ("type", "mrope")]:
        with pytest.raises(
            ValueError, match=f"rope_scaling.{key} '{value}' is not implemented; known: .*llama3"
        ):
            read(rope_scaling={key: value, "factor": 2.0})


ODD = [
    None, True, False, 0, 0.0, 1, -1, 0.5, 1e-30, 1e30, 1e300, float("inf"), float("nan"), 10**400,
    "4", "", [], [2], {}, {"a": 1},
]  # fmt: skip


def outcome(table: dict) -> tuple[str, Rope | None]:
    """The rope of a table, or what a ValueError says; any other exception goes through."""
    try:
        return "", read([], rope_scaling=table).rope
    except ValueError as error:
        return str(error), None


@pytest.mark.parametrize(
    "table", [{"rope_type": "default"}, LINEAR, LINEAR | {"type": "dynamic"}, LLAMA3, YARN]
)
def test_an_odd_value_in_a_table_is_computed_with_or_refused_by_name(table):
    keys = {
        *LLAMA3,
        *YARN,
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "truncate",
        "type",
        "rope_theta",
    }
    for key in keys | {"partial_rotary_factor"}:
        for value in ODD:
            text, rope = outcome(table | {key: value})
            assert (
                key in text
                if rope is None
                else np.isfinite([*rope.frequencies(), rope.multiplier()]).all()
            ), (
                key,
                value,
            )


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("value", [True, 0, 1, "yarn", [], [YARN], {"full_attention": YARN}])
def test_a_table_that_is_none_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=key if not isinstance(value, dict) else "full_attention"):
        read(**{key: value})
