"""config.json, field by field: against the config classes and the modeling code of the installed
transformers."""

import dataclasses
import importlib
import inspect
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from golden_checkpoints import GOLDENS
from transformers import GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fp8jax.models import ARCHITECTURES, DecoderConfig, read_decoder_config
from fp8jax.models.config_fields import HARMLESS, NEUTRAL
from fp8jax.models.hf_config import HFConfig

FAMILIES = {module.FAMILY.model_type: module for module in ARCHITECTURES.values()}
OF_ALL_FAMILIES = pytest.mark.parametrize("family", FAMILIES)
TRANSFORMERS = Path(transformers.__file__).parent


def read(family: str, told: list[str] | None = None, /, **changes: Any) -> DecoderConfig:
    """A config.json that says nothing but these fields; sentences about it fail the test unless
    they are collected."""
    return read_decoder_config({"model_type": family} | changes, dtype="float32", told=told)


def golden(name: str, told: list[str] | None = None, /, **changes: Any) -> DecoderConfig:
    """A golden config.json with fields changed."""
    return read_decoder_config(
        json.loads((GOLDENS / name / "config.json").read_text()) | changes,
        dtype="float32",
        told=told,
    )


def reader(family: str) -> HFConfig:
    """The config of a family after it was read."""
    config = HFConfig({"model_type": family}, FAMILIES[family].FAMILY)
    FAMILIES[family].decoder_config(config, dtype="float32")
    config.check_token_ids(
        "bos_token_id", "eos_token_id", "pad_token_id"
    )  # what `read_decoder_config` does beside
    return config


def known_fields(family: str) -> set[str]:
    config = reader(family)
    return config.read | config.harmless.keys() | config.neutral.keys()


def class_fields(family: str) -> set[str]:
    """The fields of the transformers config class, its other spellings, and what the constructor
    takes out of the file."""
    cls = CONFIG_MAPPING[family]
    constructor = inspect.getsource(PreTrainedConfig.__post_init__) + inspect.getsource(
        cls.convert_rope_params_to_dict
    )
    return (
        {field.name for field in dataclasses.fields(cls)}
        | set(cls.attribute_map)
        | set(re.findall(r'kwargs\.(?:pop|get)\(\s*"(\w+)"', constructor))
        | set(GenerationConfig._get_default_generation_params())
    )


@OF_ALL_FAMILIES
def test_every_field_of_the_transformers_class_is_read_harmless_or_judged(family):
    fields = class_fields(family)
    assert {
        "vocab_size",
        "rope_theta",
        "per_layer_config",
        "return_dict",
        "top_k",
    } <= fields  # the walk sees all places
    assert fields - known_fields(family) == set()


@OF_ALL_FAMILIES
def test_every_field_that_the_code_of_transformers_looks_at_is_read_harmless_or_judged(family):
    sources = [
        f"models/{family}/modeling_{family}.py",
        "masking_utils.py",
        "cache_utils.py",
        "modeling_rope_utils.py",
    ]
    code = "".join((TRANSFORMERS / source).read_text() for source in sources)
    looked_at = set(re.findall(r'(?:get|has)attr\((?:self\.|layer_)?config, "(\w+)"', code))
    looked_at |= set(re.findall(r"\bconfig\.([a-z_]+)\b(?!\()", code))
    assert {
        "is_causal",
        "sliding_window",
        "rms_norm_eps",
    } <= looked_at  # the patterns find something
    # A class attribute, the words "config.json", and what caches of recurrent layers ask for.
    assert looked_at - known_fields(family) == {"default_theta", "json", "number_of_conv_states"}


@OF_ALL_FAMILIES
def test_defaults_are_those_of_the_transformers_class(family):
    made = CONFIG_MAPPING[family]()
    for key, default in FAMILIES[family].FAMILY.defaults.items():
        if key == "rope_theta":
            expected = made.default_theta
        elif key == "sliding_window":  # an instance has lost it where its switch is off
            expected = getattr(CONFIG_MAPPING[family], key)
        else:
            expected = getattr(made, key)
        assert (key, default) == (key, expected)
    silent = read(family)
    found = {
        "vocab_size": silent.vocab_size,
        "num_key_value_heads": silent.num_kv_heads,
        "max_position_embeddings": silent.max_position_embeddings,
        "num_experts": silent.moe.num_experts if silent.moe else getattr(made, "num_experts", None),
        "num_experts_per_tok": silent.moe.top_k
        if silent.moe
        else getattr(made, "num_experts_per_tok", None),
    }
    assert found == {key: getattr(made, key, found[key]) for key in found}
    assert silent.head_dim == (
        getattr(made, "head_dim", None) or made.hidden_size // made.num_attention_heads
    )


# What a field is changed to, to see whether it does something.
OTHER = {
    "num_attention_heads": 64, "num_key_value_heads": 2, "hidden_act": "gelu",
    "rope_parameters": {"rope_theta": 3.0},
    "layer_types": ["chunked_attention"], "mlp_only_layers": [1], "is_encoder_decoder": True,
    "per_layer_config": {"0": {}},
    "sliding_window": 77, "rope_scaling": {"type": "linear", "factor": 3.0}, "num_experts": 96,
    "num_local_experts": 96,
    "clip_qkv": 3.0, "head_dim": 64, "max_window_layers": 3,
}  # fmt: skip


@OF_ALL_FAMILIES
def test_a_field_that_is_not_called_harmless_does_something(family):
    config = reader(family)
    switches = {"use_sliding_window": True} if family.startswith("qwen") else {}
    base = read(family, **switches)
    for key in sorted(class_fields(family) - config.harmless.keys() - {"partial_rotary_factor"}):
        if key.endswith("_token_id"):  # enters no forward pass, but must be one
            with pytest.raises(ValueError, match=key):
                read(family, **{key: ["2"]})
            continue
        default = (dict(config.family.defaults) | switches).get(key)
        other = (
            not default if isinstance(default, bool) else OTHER.get(key, default and default * 2)
        )
        try:
            done = read(family, **switches | {key: other}) != base
        except (ValueError, NotImplementedError) as error:
            done = key in str(error)
        assert done, key


def test_every_harmless_field_has_its_reason_and_is_not_judged_elsewhere():
    for module in FAMILIES.values():
        family = module.FAMILY
        for key, reason in (HARMLESS | dict(family.harmless)).items():
            assert len(reason) > 20, key
        assert not set(family.harmless) & set(family.neutral)
    assert not HARMLESS.keys() & NEUTRAL.keys()


@pytest.mark.parametrize("value", [None, 0, 1, "word", True, [], {"a": 1}, 10**400])
def test_a_harmless_field_passes_whatever_it_says(value):
    config = golden(
        "llama2", **{key: value for key in HARMLESS if key not in ("architectures", "model_type")}
    )
    assert config == golden("llama2")


UNKNOWN = {
    "position_embedding_type": "alibi", "scoring_func": "sigmoid", "norm_type": "layernorm",
    "hidden_activation": "gelu",
    "use_mrope": True, "topk_method": "noaux_tc", "router_type": "sigmoid", "num_zebras": 0,
    "zebra": False, "zebras": [],
    "striped": "", "stripes": {}, "spots": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama2", "qwen3_moe"])
def test_unknown_words_zeros_and_switches_are_errors_and_all_are_named_at_once(family):
    for key, value in UNKNOWN.items():
        with pytest.raises(ValueError, match=key):
            golden(family, **{key: value})
    with pytest.raises(ValueError, match=r"remove it from config\.json") as caught:
        golden(family, **UNKNOWN, num_attention_head=4, new=None)
    for key in UNKNOWN:
        assert f"{key}: {UNKNOWN[key]!r} " in str(caught.value)
    assert (
        "num_attention_head: 4 is not a field that fp8jax knows (known and alike: "
        "num_attention_heads" in str(caught.value)
    )
    assert "new" not in str(caught.value).split()


def test_a_hundred_thousand_unknown_fields_are_counted_not_listed():
    with pytest.raises(ValueError, match="and 99950 more that are not known") as caught:
        golden("llama2", **{f"zebra_{i}": "z" * 10_000 for i in range(100_000)})
    assert len(str(caught.value)) < 20_000


NEUTRAL_AT = [  # golden, fields and the value at which they change nothing, one at which they do
    ("llama2", "is_causal", True, False),
    ("qwen2", "is_causal", True, None),  # transformers takes null for false here, nowhere else
    ("llama2", "is_encoder_decoder", False, True),
    ("llama2", "per_layer_config", {}, {"0": {"intermediate_size": 8}}),
    ("llama2", "transformers_weights", None, "other.safetensors"),
    ("llama2", "attn_logit_softcapping", None, 50.0),
    ("mistral", "pretraining_tp", 1, True),
    ("qwen3_moe", "use_qk_norm", True, False),
    ("qwen3", "use_qk_norm", True, False),
    ("llama2", "use_qk_norm", False, True),
    ("qwen3_moe", "qkv_bias", False, True),
    ("qwen3_moe", "shared_expert_intermediate_size", 0, 64),
    ("mixtral", "scoring_func", "softmax", "sigmoid"),
    ("qwen2", "use_mrope", False, True),
    ("llama2", "activation", "swiglu", "gelu"),
    (
        "llama2",
        "layer_types",
        ["full_attention", "full_attention"],
        ["full_attention", "sliding_attention"],
    ),
    ("llama2", "rotary_emb_base", 10000, 500),
]


@pytest.mark.parametrize("family, key, neutral, other", NEUTRAL_AT)
def test_a_field_that_is_neutral_at_one_value_is_refused_by_name_at_another(
    family, key, neutral, other
):
    assert golden(family, **{key: neutral}) == golden(family)
    with pytest.raises(ValueError, match=key):
        golden(family, **{key: other})


PUBLISHED = [  # what a published file says besides, of which nothing changes the result
    ("llama2", {"pretraining_tp": 2}),  # Llama-2-13b, as first uploaded
    ("llama2", {"max_sequence_length": 128}),  # huggyllama
    ("qwen2", {"rotary_emb_base": 1000000, "seq_length": 65536, "rope_theta": 1000000,
    "rope_parameters": None}),  # CodeQwen1.5
    ("qwen3_moe", {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0,
    "max_window_layers": 28}),
    ("llama_yarn",
    {"auto_map": {"AutoModelForCausalLM": "modeling_llama_together_yarn.LlamaForCausalLM"}}),
    ("smollm2", {"transformers.js_config": {"dtype": "q4"}, "is_llama_config": True,
    "rope_interleaved": False}),
]  # fmt: skip


@pytest.mark.parametrize("family, fields", PUBLISHED)
def test_fields_of_published_files_that_change_nothing_load_without_a_word(family, fields):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert golden(family, **fields) == golden(family)


def test_transformers_own_code_decides_which_layers_slide():
    # Its Mistral, Mixtral and Qwen3-MoE do not look at layer_types: seen with torch, equal to the
    # bit.
    mixed = {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}
    for family, switch in [
        ("mistral", {}),
        ("mixtral", {}),
        ("qwen3_moe", {"use_sliding_window": True}),
    ]:
        told = []
        assert golden(family, told, **mixed | switch).windows == (8, 8)
        assert len(told) == 1 and "layer 0 is 'full_attention' by layer_types" in told[0]
        with pytest.raises(
            ValueError,
            match="layer 1 is 'sliding_attention' by layer_types, but there is no sliding_window",
        ):
            golden(family, **mixed | switch | {"sliding_window": None})
    assert golden("qwen2", **mixed, use_sliding_window=True).windows == (None, 8)
    for family in ("mistral", "qwen2"):
        with pytest.raises(ValueError, match="sliding_window 0 is wrong"):
            golden(
                family,
                sliding_window=0,
                **{"use_sliding_window": True} if family == "qwen2" else {},
            )
    assert golden("qwen2", sliding_window=0) == golden("qwen2")  # switched off


def test_null_key_value_heads_are_the_query_heads_and_absent_ones_the_familys_default():
    assert golden("qwen2", num_attention_heads=32, num_key_value_heads=None).num_kv_heads == 32
    assert golden("mistral", num_key_value_heads=None).num_kv_heads == 4
    assert read("mistral").num_kv_heads == 8
    with pytest.raises(
        ValueError, match=r"rms_norm_eps None is wrong: expected .* leave it out for the default"
    ):
        golden("llama2", rms_norm_eps=None)


CONTRADICTIONS = [
    (
        {"architectures": ["MistralForCausalLM"]},
        r"architectures says MistralForCausalLM.*model_type is 'llama'",
    ),
    (
        {"model_type": "qwen3"},
        "architectures says LlamaForCausalLM, whose model_type is 'llama', but model_type is "
        "'qwen3'",
    ),
    ({"model_type": ["llama"]}, "model_type"),
    (
        {"architectures": [["LlamaForCausalLM"]]},
        "architectures .* is not implemented; known.*LlamaForCausalLM",
    ),
    ({"architectures": "LlamaModel"}, "architectures 'LlamaModel' is not implemented"),
    ({"architectures": [], "model_type": "bert"}, "model_type 'bert' is not implemented"),
    ({"architectures": None, "model_type": None}, "model_type None is not implemented"),
]


@pytest.mark.parametrize("changes, message", CONTRADICTIONS)
def test_architectures_and_model_type_must_name_one_known_family(changes, message):
    with pytest.raises(ValueError, match=message):
        golden("llama2", **changes)


ODD = [
    None, True, False, 0, 1, -1, 3, 10**9, 2**31 + 1, 10**30, 10**400, 0.0, 0.5, -2.5, 1e30,
    float("inf"), float("nan"), "4", "",
    "silu", [], [1], ["a"], [[]], {}, {"a": 1}, {"__float__": "Infinity"},
]  # fmt: skip


def refusal(family: str, /, **changes: Any) -> str | None:
    """What a ValueError says; any other exception goes through."""
    try:
        golden(family, [], **changes)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("family", ["llama2", "mistral", "qwen3_moe", "olmoe", "granitemoe"])
def test_an_odd_value_is_computed_with_or_refused_by_name(family):
    config = reader(family.rstrip("2"))
    # Numbers that must divide one another may be refused in each other's name.
    divided = ("num_attention_heads", "hidden_size", "num_experts", "num_hidden_layers", "head_dim")
    for key in sorted(config.read | config.neutral.keys() | {"architectures", "model_type"}):
        for value in ODD:
            text = refusal(family, **{key: value})
            if text is not None:
                assert any(name in text for name in (key, *divided)), (key, value, text)
                assert len(text) < 1000


HUGE = [
    ("num_hidden_layers", 10_001),
    ("num_hidden_layers", 10**9),
    ("head_dim", 10**9),
    ("num_local_experts", 2**31 + 1),
    ("vocab_size", 10**12),
]


@pytest.mark.parametrize("key, value", HUGE)
def test_a_size_that_no_model_has_is_refused_before_anything_is_built(key, value):
    with pytest.raises(
        ValueError, match=f"{key} {value} is wrong: expected a positive integer of at most"
    ):
        golden("qwen3_moe", **{key: value})


@pytest.mark.parametrize(
    "changes",
    [{"logits_scaling": 0}, {"residual_multiplier": 1e30}, {"embedding_multiplier": -1e30}],
)
def test_multipliers_with_which_nothing_is_finite_are_refused_by_name(changes):
    for family in ("granite", "granitemoe"):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} .* is wrong"):
            golden(family, **changes)


def test_heads_without_channels_and_odd_heads_are_refused_by_name():
    for changes in (
        {"num_attention_heads": 128, "num_key_value_heads": 1},
        {"head_dim": 1},
        {"head_dim": 3},
    ):
        with pytest.raises(ValueError, match="head_dim|channels a head"):
            golden("mistral", **changes if "head_dim" in changes else changes | {"head_dim": None})
    # Families but Llama round down, as transformers does: 64 / 5.
    assert (
        golden("mistral", num_attention_heads=5, num_key_value_heads=5, head_dim=None).head_dim
        == 12
    )
    with pytest.raises(
        ValueError, match="hidden_size 64 does not divide into num_attention_heads 5"
    ):
        golden("llama2", num_attention_heads=5, num_key_value_heads=5, head_dim=None)


def test_what_is_told_comes_as_a_list_or_as_warnings():
    told: list[str] = []
    config = golden("llama2", told, partial_rotary_factor=0.5)
    assert len(told) == 1 and told[0].startswith(
        "config.json: partial_rotary_factor 0.5 is ignored"
    )
    with pytest.warns(UserWarning, match="partial_rotary_factor") as caught:
        assert golden("llama2", partial_rotary_factor=0.5) == config
    assert len(caught) == 1


def test_modules_of_families_are_called_as_their_model_type():
    for family, module in FAMILIES.items():
        assert module is importlib.import_module(f"fp8jax.models.{family}")
