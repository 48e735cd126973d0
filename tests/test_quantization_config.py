"""Which layer gets which scheme: the reference's rules, as executed with its own functions (see the
design's semantics page)."""

from typing import Any

import pytest

from fp8jax import FP8_PER_BLOCK, FP8_PER_CHANNEL, FP8_PER_TENSOR, QuantizationConfig

L1, L11, L12 = (f"model.layers.{i}." for i in (1, 11, 12))
QUANTIZED, IGNORED, ERROR = "quantized", "ignored", "error"


def outcome(ignore, layer):
    kind = "moe" if layer.endswith("experts") else "linear"
    config = QuantizationConfig.parse("fp8_per_block", {"ignore": ignore})
    try:
        return IGNORED if config.resolve(layer, kind) is None else QUANTIZED
    except ValueError:
        return ERROR


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("entry", "layer", "expected"),
    [
        ("model.layers.1.self_attn.o_proj", L1 + "self_attn.o_proj", IGNORED),
        ("model.layers.1.self_attn.o_proj", L11 + "self_attn.o_proj", QUANTIZED),
        ("model.layers.1.self_attn.o_proj.weight", L1 + "self_attn.o_proj", QUANTIZED),
        ("o_proj", L1 + "self_attn.o_proj", QUANTIZED),
        ("model.layers.1", L1 + "self_attn.o_proj", QUANTIZED),
        ("re:o_proj", L1 + "self_attn.o_proj", QUANTIZED),
        ("Model.layers.1.self_attn.o_proj", L1 + "self_attn.o_proj", QUANTIZED),
        ("re:.*o_proj", L1 + "self_attn.o_proj", IGNORED),
        (r"re:.*\.o_proj$", L1 + "self_attn.o_proj", IGNORED),
        ("re:", L1 + "self_attn.o_proj", IGNORED),
        (r"re:model\.layers\.1", L12 + "self_attn.o_proj", IGNORED),
        (r"re:model\.layers\.1\.", L12 + "self_attn.o_proj", QUANTIZED),
        ("*.o_proj", L1 + "self_attn.o_proj", QUANTIZED),
        ("model.layers.*.self_attn.o_proj", L1 + "self_attn.o_proj", QUANTIZED),
        ("re:.*[qkv]_proj", L1 + "self_attn.qkv_proj", IGNORED),
        ("re:.*(q|k|v)_proj$", L1 + "self_attn.qkv_proj", IGNORED),
        ("re:.*attn.*", L1 + "self_attn.qkv_proj", IGNORED),
        ("model.layers.1.self_attn.qkv_proj", L1 + "self_attn.qkv_proj", IGNORED),
        ("re:.*qkv_proj.*", L1 + "self_attn.qkv_proj", QUANTIZED),
        ("re:.*q_proj", L1 + "self_attn.qkv_proj", ERROR),
        (r"re:.*self_attn\.(q|k)_proj", L1 + "self_attn.qkv_proj", ERROR),
        ("model.layers.1.self_attn.q_proj", L1 + "self_attn.qkv_proj", ERROR),
        ("re:.*[qkv]_proj", L1 + "self_attn.q_b_proj", QUANTIZED),
        ("re:.*[qkv]_proj", L1 + "self_attn.kv_a_proj_with_mqa", QUANTIZED),
        ("re:.*q_proj", L1 + "self_attn.q_proj_extra", IGNORED),
        ("re:.*(gate|up)_proj", L1 + "mlp.gate_up_proj", IGNORED),
        ("re:.*mlp.*", L1 + "mlp.gate_up_proj", IGNORED),
        ("re:.*gate_up_proj", L1 + "mlp.gate_up_proj", QUANTIZED),
        ("re:.*gate_proj", L1 + "mlp.gate_up_proj", ERROR),
        ("re:.*up_proj", L1 + "mlp.gate_up_proj", ERROR),
        ("re:.*gate", L1 + "mlp.gate_up_proj", ERROR),
        ("re:.*gate", L1 + "mlp.gate", IGNORED),
        (r"re:.*mlp\.gate$", L1 + "mlp.gate", IGNORED),
        ("re:.*experts", L1 + "mlp.experts", IGNORED),
        ("model.layers.1.mlp.experts", L1 + "mlp.experts", IGNORED),
        ("model.layers.1.mlp.experts.3.down_proj", L1 + "mlp.experts", QUANTIZED),
        (r"re:.*experts\.3\..*", L1 + "mlp.experts", QUANTIZED),
        ("re:.*down_proj", L1 + "mlp.experts", QUANTIZED),
        (r"re:.*shared_expert\..*", L1 + "mlp.shared_expert.gate_up_proj", IGNORED),
    ],
)
def test_ignore_follows_the_reference(entry, layer, expected):
    assert outcome([entry], layer) == expected


def test_entries_may_name_the_shards_one_by_one():
    assert outcome([f"{L1}self_attn.{x}_proj" for x in "qkv"], L1 + "self_attn.qkv_proj") == IGNORED


def test_shards_can_be_named_by_the_caller():
    config = QuantizationConfig.parse("fp8_per_block", {"ignore": [r"re:.*\.[ab]_proj"]})
    assert config.resolve("layer.ab_proj_fused", "linear", ("a_proj", "b_proj")) is None
    assert config.resolve("layer.ab_proj_fused", "linear") is FP8_PER_BLOCK


def test_disagreeing_shards_are_named_with_the_entry_that_hit_them():
    config = QuantizationConfig.parse("fp8_per_block", {"ignore": ["re:.*up_proj"]})
    with pytest.raises(ValueError) as error:
        config.resolve(L1 + "mlp.gate_up_proj")
    for part in (L1 + "mlp.gate_up_proj", L1 + "mlp.gate_proj", L1 + "mlp.up_proj", "re:.*up_proj"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "lm_head",
        "model.embed_tokens",
        "model.norm",
        L1 + "mlp.gate",
        L1 + "block_sparse_moe.router.layer",
    ],
)
def test_what_is_never_quantized(name):
    assert QuantizationConfig.parse("fp8_per_tensor").resolve(name, kind="linear") is None


@pytest.mark.parametrize(
    ("scheme", "mapping", "linear", "moe"),
    [
        ("fp8_per_tensor", None, FP8_PER_TENSOR, FP8_PER_TENSOR),
        ("fp8_per_block", {}, FP8_PER_BLOCK, FP8_PER_BLOCK),
        (None, None, None, None),
        ("online", {"global_scheme": "fp8_per_block"}, FP8_PER_BLOCK, FP8_PER_BLOCK),
        ("fp8_per_tensor", {"linear_scheme_override": "fp8_per_block"}, FP8_PER_BLOCK,
        FP8_PER_TENSOR),
        ("fp8_per_block", {"moe_scheme_override": "fp8_per_tensor"}, FP8_PER_BLOCK, FP8_PER_TENSOR),
        ("online", {"linear_scheme_override": "fp8_per_block",
        "moe_scheme_override": "fp8_per_tensor"},
         FP8_PER_BLOCK, FP8_PER_TENSOR),
        ("online", {"linear": "fp8_per_block", "moe": "fp8_per_tensor"}, FP8_PER_BLOCK,
        FP8_PER_TENSOR),
        ("online", {"linear": "fp8_per_block"}, FP8_PER_BLOCK, None),
        ("online", {"moe_scheme_override": "fp8_per_tensor"}, None, FP8_PER_TENSOR),
        ("fp8_per_block", {"global_scheme": "fp8_per_block", "linear": None}, FP8_PER_BLOCK,
        FP8_PER_BLOCK),
        ("fp8_per_block", {"linear": "fp8_per_tensor", "linear_scheme_override": "fp8_per_tensor"},
         FP8_PER_TENSOR, FP8_PER_BLOCK),
    ],
)  # fmt: skip
def test_a_kind_has_its_override_or_the_global_scheme(scheme, mapping, linear, moe):
    config = QuantizationConfig.parse(scheme, mapping)
    assert config.resolve(L1 + "mlp.down_proj", kind="linear") == linear
    assert config.resolve(L1 + "mlp.experts", kind="moe") == moe


def test_activation_tensor_applies_to_every_kind_under_fp8_per_tensor():
    config = QuantizationConfig.parse(
        "fp8_per_block", {"moe": "fp8_per_tensor", "activation": "tensor"}
    )
    assert config.moe is not None and config.moe.activation == "tensor"
    assert config.linear == FP8_PER_BLOCK
    assert (
        QuantizationConfig.parse("fp8_per_tensor", {"activation": "token"}).linear == FP8_PER_TENSOR
    )


@pytest.mark.parametrize(
    ("scheme", "mapping", "parts"),
    [
        ("fp8_per_row", None, ["fp8_per_row", "fp8_per_tensor", "fp8_per_block", "online"]),
        ("mxfp8", None, ["mxfp8", "not supported"]),
        ("online", None, ["at least one of", "global_scheme", "linear_scheme_override",
        "moe_scheme_override"]),
        ("online", {"ignore": ["re:.*"]}, ["at least one of"]),
        (None, {"ignore": []}, ["only supported when", "fp8_per_tensor", "None"]),
        ("fp8_per_tensor", {"global_scheme": "fp8_per_block"}, ["conflicts", "fp8_per_tensor",
        "fp8_per_block"]),
        ("fp8_per_tensor", {"linear_sheme_override": "fp8_per_block"}, ["linear_sheme_override",
        "linear_scheme_override"]),
        ("online", {"global_scheme": "int3"}, ["global_scheme", "int3", "fp8_per_block"]),
        ("fp8_per_tensor", {"linear": "fp8_per_block", "linear_scheme_override": "fp8_per_tensor"},
         ["linear", "linear_scheme_override", "fp8_per_block", "fp8_per_tensor"]),
        ("fp8_per_tensor", {"ignore": "lm_head"}, ["'ignore'", "list of strings"]),
        ("fp8_per_tensor", {"ignore": [3]}, ["'ignore'", "list of strings"]),
        ("fp8_per_tensor", {"ignore": ["re:["]}, ["re:[", "regex"]),
        ("fp8_per_tensor", {"targets": {}}, ["targets", "not supported"]),
        ("fp8_per_block", {"activation": "tensor"}, ["activation", "fp8_per_tensor", "no layer"]),
        ("fp8_per_tensor", {"activation": "row"}, ["activation", "row", "token"]),
        ("fp8_per_tensor", ["ignore"], ["mapping", "list"]),
    ],
)  # fmt: skip
def test_mistakes_are_value_errors_that_say_what_to_do(scheme, mapping, parts):
    with pytest.raises(ValueError) as error:
        QuantizationConfig.parse(scheme, mapping)
    for part in parts:
        assert part in str(error.value)


LAYERS: list[Any] = [
    (L1 + "self_attn.qkv_proj", "linear", ()),
    (L1 + "self_attn.o_proj", "linear", ()),
    (L1 + "mlp.experts", "moe", ()),
]


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ("o_proj", L1 + "self_attn.o_proj"),
        (L1 + "self_attn.o_prj", L1 + "self_attn.o_proj"),
        (L1 + "self_attn.o_proj.weight", L1 + "self_attn.o_proj"),
        ("re:.*qkv_proj", "q_proj, k_proj, v_proj"),
        ("*.o_proj", "re:"),
        (r"re:.*experts\.3\..*", L1 + "mlp.experts"),
    ],
)
def test_an_entry_that_matched_nothing_is_a_warning_with_what_may_be_meant(entry, part):
    (warning,) = QuantizationConfig.parse("fp8_per_block", {"ignore": [entry]}).unmatched(LAYERS)
    assert entry in warning and part in warning


@pytest.mark.parametrize(
    "entry",
    ["re:.*o_proj", "re:.*[qkv]_proj", L1 + "self_attn.qkv_proj", "lm_head", "re:.*experts"],
)
def test_an_entry_that_matched_is_no_warning(entry):
    assert (
        QuantizationConfig.parse("fp8_per_block", {"ignore": [entry]}).unmatched(
            LAYERS, ["lm_head"]
        )
        == []
    )


def test_a_scheme_can_be_given_as_itself_beside_the_other_keys():
    config = QuantizationConfig.parse(
        FP8_PER_CHANNEL, {"moe": FP8_PER_BLOCK, "ignore": ["re:.*o_proj"]}
    )
    assert config.resolve(L1 + "mlp.down_proj") is FP8_PER_CHANNEL
    assert config.resolve(L1 + "mlp.experts", kind="moe") is FP8_PER_BLOCK
    assert config.resolve(L1 + "self_attn.o_proj") is None
    assert config.resolve("lm_head") is None
    given = QuantizationConfig.parse(FP8_PER_TENSOR, {"activation": "tensor"})
    assert given == QuantizationConfig.parse("fp8_per_tensor", {"activation": "tensor"})
    assert QuantizationConfig.parse(FP8_PER_BLOCK, {"global_scheme": "fp8_per_block"}).linear
    with pytest.raises(ValueError, match="conflicts"):
        QuantizationConfig.parse(FP8_PER_CHANNEL, {"global_scheme": "fp8_per_block"})
