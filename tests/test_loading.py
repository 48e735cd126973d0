"""Loading is strict, owns its memory and says what it did."""

import itertools
import json
import logging
import shutil
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden_checkpoints import GOLDENS, SCHEMES, golden, load, relative_error
from safetensors.numpy import load_file, save_file
from selection import mostly_slow
from test_qarray import bits, oracle_block, oracle_channel, oracle_tensor

import fp8jax
from fp8jax import CheckpointError
from fp8jax.checkpoints.folder import Checkpoint
from fp8jax.checkpoints.parameters import model_parameters
from fp8jax.models import CausalLM, read_decoder_config
from fp8jax.quantization_config import never_quantized

FILE = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A copy of a golden checkpoint that a test may spoil."""
    return shutil.copytree(GOLDENS / "llama2", tmp_path / "llama2")


def rewrite(folder, change):
    """Apply `change` to the tensors of a checkpoint."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def reconfigure(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.smoke
@pytest.mark.parametrize(
    "variant, scheme",
    mostly_slow(
        itertools.product(
            ["llama2", "llama31", "smollm2", "llama_fp16", "llama_fp32_sharded"], SCHEMES
        ),
        quick=[
            ("llama31", "fp8_per_tensor"),
            ("llama31", "fp8_per_block"),
            ("llama_fp16", "fp8_per_tensor"),
            ("llama_fp32_sharded", "fp8_per_block"),
        ],
    ),
)
def test_fused_layers_are_quantized_as_one_matrix_to_the_bit(variant, scheme):
    tensors = {}
    for file in (GOLDENS / variant).glob("*.safetensors"):
        tensors |= load_file(file)
    oracle = {"fp8_per_tensor": oracle_tensor, "fp8_per_block": oracle_block}[scheme]
    fused = {
        "self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "self_attn.o_proj": ["self_attn.o_proj"],
        "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down_proj": ["mlp.down_proj"],
    }
    for name, shards in fused.items():
        q: Any = load(variant, scheme).weight(f"model.layers.1.{name}")
        codes, scale = oracle(
            np.concatenate([tensors[f"model.layers.1.{shard}.weight"] for shard in shards])
        )
        np.testing.assert_array_equal(bits(q.qvalue), bits(codes))
        np.testing.assert_array_equal(bits(q.scale), bits(scale))


def test_weights_take_at_most_0_51_of_their_bf16_bytes():
    # At these tiny sizes a block's scale is a larger share than in a real model: 4 bytes for as few
    # as 64 × 64 weights.
    for scheme in SCHEMES:
        layers = load("llama31", scheme).report.quantized
        assert layers
        assert sum(layer.bytes_after for layer in layers) <= 0.51 * sum(
            layer.bytes_before for layer in layers
        )


@pytest.mark.parametrize(
    "dtype, scheme",
    mostly_slow(
        itertools.product(["float32", "bfloat16"], [None, *SCHEMES]),
        quick=[("float32", None), ("bfloat16", "fp8_per_block")],
    ),
)
def test_overwriting_the_file_afterwards_changes_nothing(folder, scheme, dtype):
    """No array of the model points into the file or into the buffers it was read into."""
    tensors = load_file(folder / FILE)
    if dtype == "float32":  # the dtype that needs no cast, so that aliasing would be possible
        tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    save_file(tensors, folder / FILE)
    content = bytearray((folder / FILE).read_bytes())
    length = int.from_bytes(content[:8], "little")
    pad = -(8 + length) % 64
    aligned = (
        (length + pad).to_bytes(8, "little")
        + content[8 : 8 + length]
        + b" " * pad
        + content[8 + length :]
    )
    (folder / FILE).write_bytes(aligned)

    lm = fp8jax.load_quantized(folder, scheme, dtype=dtype)
    ids = golden("llama2")["token_ids"]
    before = np.asarray(lm.logits(ids))
    with (folder / FILE).open("r+b") as file:
        file.seek(8 + length + pad)
        file.write(b"\x3f" * (len(content) - 8 - length))
    np.testing.assert_array_equal(np.asarray(lm.logits(ids)), before)


@pytest.mark.smoke
def test_all_faults_of_names_shapes_and_dtypes_come_in_one_error(folder):
    def spoil(tensors):
        del tensors["model.layers.0.mlp.down_proj.weight"]
        tensors["model.layers.0.mlp.dwn_proj.weight"] = np.zeros((2, 2), np.float32)
        tensors["model.norm.weight"] = np.zeros(65, ml_dtypes.bfloat16)
        tensors["model.layers.1.self_attn.o_proj.weight"] = np.zeros((64, 64), np.int16)

    rewrite(folder, spoil)
    with pytest.raises(CheckpointError) as error:
        fp8jax.load_quantized(folder, "fp8_per_block")
    for part in (
        "model.layers.0.mlp.down_proj.weight: missing",
        "model.layers.0.mlp.dwn_proj.weight",
        "model.norm.weight",
        "[65]",
        "[64]",
        "model.layers.1.self_attn.o_proj.weight",
        "int16",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_nan_and_inf_are_gathered_with_the_first_index_of_each(folder, scheme):
    def spoil(tensors):
        tensors["model.layers.0.self_attn.k_proj.weight"][3, 5:9] = np.nan
        tensors["model.layers.1.mlp.down_proj.weight"][0, 7] = -np.inf
        tensors["model.norm.weight"][9] = np.nan
        tensors["model.embed_tokens.weight"][2, 1] = np.inf

    rewrite(folder, spoil)
    with pytest.raises(CheckpointError) as error:
        fp8jax.load_quantized(folder, scheme)
    for name, what, index in (
        ("model.layers.0.self_attn.k_proj.weight", "nan", "[3, 5]"),
        ("model.layers.1.mlp.down_proj.weight", "-inf", "[0, 7]"),
        ("model.norm.weight", "nan", "[9]"),
        ("model.embed_tokens.weight", "inf", "[2, 1]"),
    ):
        assert any(
            name in fault and what in fault and index in fault for fault in error.value.faults
        )
    assert len(error.value.faults) == 4


def test_a_number_beyond_the_dtype_is_an_error_that_shows_it(folder):
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(4, 1e6))
    with pytest.raises(CheckpointError, match=r"model.norm.weight.*index \[4\].*65504"):
        fp8jax.load_quantized(folder, None, dtype="float16")


def test_float16_weights_are_quantized_from_float16(folder):
    """Not by way of BF16, which would lose three bits."""
    lm = load("llama_fp16", "fp8_per_tensor")
    tensors = load_file(GOLDENS / "llama_fp16" / FILE)
    w = tensors["model.layers.0.self_attn.o_proj.weight"]
    assert w.dtype == np.float16
    codes, _ = oracle_tensor(w)
    rounded_codes, _ = oracle_tensor(w.astype(ml_dtypes.bfloat16))
    assert (bits(codes) != bits(rounded_codes)).any()
    q: Any = lm.weight("model.layers.0.self_attn.o_proj")
    np.testing.assert_array_equal(bits(q.qvalue), bits(codes))


def test_an_ignored_layer_stays_and_an_entry_that_matched_nothing_warns():
    config = {"ignore": ["model.layers.1.self_attn.o_proj", "re:.*[qkv]_proj", "o_prj"]}
    with pytest.warns(UserWarning, match="o_prj.*matched no layer"):
        lm = fp8jax.load_quantized(GOLDENS / "llama2", "fp8_per_block", quantization_config=config)
    assert isinstance(lm.weight("model.layers.1.self_attn.o_proj"), jax.Array)
    assert isinstance(lm.weight("model.layers.0.self_attn.qkv_proj"), jax.Array)
    assert isinstance(lm.weight("model.layers.0.self_attn.o_proj"), fp8jax.QArray)
    assert len(lm.report.warnings) == 1


@pytest.mark.parametrize(
    ("scheme", "config", "kinds"),
    [
        ("fp8_per_tensor", None, {"fp8_per_tensor"}),
        ("online", {"global_scheme": "fp8_per_block"}, {"fp8_per_block"}),
        (
            "online",
            {"linear_scheme_override": "fp8_per_block", "moe_scheme_override": "fp8_per_tensor"},
            {"fp8_per_block"},
        ),
        ("fp8_per_tensor", {"linear_scheme_override": "fp8_per_block"}, {"fp8_per_block"}),
        ("online", {"moe_scheme_override": "fp8_per_tensor"}, set()),
        (None, None, set()),
    ],
)
def test_configurations_as_the_reference_documents_them(scheme, config, kinds):
    lm = fp8jax.load_quantized(GOLDENS / "llama2", scheme, quantization_config=config)
    assert {layer.scheme.name for layer in lm.report.quantized if layer.scheme} == kinds


def test_the_report_and_the_log_tell_what_was_done(caplog):
    with caplog.at_level(logging.INFO, logger="fp8jax"):
        lm = fp8jax.load_quantized(
            GOLDENS / "llama2",
            "fp8_per_tensor",
            quantization_config={"ignore": ["model.layers.0.mlp.down_proj"]},
        )
    assert (
        "Quantizing 7 layers of types: mlp.down_proj: 1 (from linear: fp8_per_tensor); "
        "mlp.gate_up_proj: 2" in caplog.text
    )
    assert "1 ignored" in caplog.text
    assert "Online quantization as part of model loading took" in caplog.text
    table = str(lm.report)
    for part in (
        "mlp.gate_up_proj",
        "fp8_per_tensor",
        "tensor",
        "token",
        "ignored",
        "the rest",
        "MiB",
    ):
        assert part in table
    errors = [layer.relative_error for layer in lm.report.quantized]
    assert all(
        error is not None and 0.01 < error < 0.04 for error in errors
    )  # e4m3 rounds Gaussians by 2.6 %
    assert json.loads(json.dumps(lm.report.to_dict()))["bytes_after"] == lm.report.bytes_after
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.model))
    assert lm.report.bytes_after == held


def test_tied_embeddings_are_held_once_and_a_head_of_its_own_is_used(tmp_path):
    folder = shutil.copytree(GOLDENS / "smollm2", tmp_path / "tied")
    ids = golden("smollm2")["token_ids"]
    tied = load("smollm2").logits(ids)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    lm = fp8jax.load_quantized(folder, None, dtype="float32")
    assert lm.model.lm_head is None
    np.testing.assert_array_equal(lm.logits(ids), tied)
    rewrite(
        folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] * ml_dtypes.bfloat16(2)})
    )
    lm = fp8jax.load_quantized(folder, None, dtype="float32")
    np.testing.assert_array_equal(lm.logits(ids), 2 * tied)  # doubling is exact


def test_both_spellings_of_config_json_give_the_same_logits(folder):
    config = json.loads((folder / "config.json").read_text())
    assert "rope_parameters" in config
    ids = golden("llama2")["token_ids"]
    expected = load("llama2").logits(ids)
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(
        fp8jax.load_quantized(folder, None, dtype="float32").logits(ids), expected
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["FooForCausalLM"]}, "FooForCausalLM.*LlamaForCausalLM"),
        ({"architectures": None, "model_type": "foo"}, "foo.*LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "su", "factor": 2.0}}, "'su' is not implemented.*llama3"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "warp": 3}}, "warp"),
        ({"sliding_window": 8}, "sliding_window"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers"),
        ({"logit_zoom": 1.5}, "logit_zoom"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_a_config_that_is_not_understood_is_an_error_that_names_the_field(folder, fields, message):
    reconfigure(folder, **fields)
    with pytest.raises(ValueError, match=message):
        fp8jax.load_quantized(folder, None)


@pytest.mark.parametrize(
    "fields",
    [{"unsloth_version": "2026.1"}, {"use_cache": False}, {"pretraining_tp": 2}, {"new": None}],
)
def test_a_field_that_changes_nothing_is_no_error(folder, fields):
    reconfigure(folder, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp8jax.load_quantized(folder, None)


def test_what_is_to_be_known_about_a_config_is_warned_of_once_and_stays_in_the_report(folder):
    reconfigure(folder, partial_rotary_factor=0.5)
    with pytest.warns(
        UserWarning, match=r"config\.json of .*partial_rotary_factor 0\.5 is ignored"
    ) as caught:
        lm = fp8jax.load_quantized(folder, None, dtype="float32")
    assert [str(warning.message) for warning in caught] == list(lm.report.warnings)
    ids = golden("llama2")["token_ids"]
    np.testing.assert_array_equal(
        lm.logits(ids), load("llama2").logits(ids)
    )  # torch gives the same with it, to the bit


def test_a_layer_too_few_in_config_json_is_noticed(folder):
    reconfigure(folder, num_hidden_layers=1)
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\..*no weight of this architecture"
    ):
        fp8jax.load_quantized(folder, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float8"}, "bfloat16, float16, float32"),
        ({"dtype": np.float64}, "bfloat16, float16, float32"),
        ({"dtype": None}, "dtype None is not supported"),
        ({"dtype": 16}, "dtype 16 is not supported"),
        ({"dtype": "BF16"}, "dtype 'BF16' is not supported"),
        ({"progress": "yes"}, "progress is 'yes'; choose one of True, False, 'auto'"),
        ({"progress": None}, "progress is None"),
        ({"progress": 1}, "progress is 1"),
        ({"progress": ["on"]}, "progress is"),
        ({"scheme": ["fp8_per_block"]}, "scheme is"),
        ({"scheme": 8}, "scheme is 8; give the name of one"),
        (
            {"quantization_config": "fp8_per_block"},
            "quantization_config is 'fp8_per_block'; give a dict",
        ),
        ({"quantization_config": [("ignore", [])]}, "quantization_config is"),
        ({"revision": 3}, "revision is 3"),
        ({"revision": b"main"}, "revision is b'main'"),
        ({"repo": None}, "repo is None"),
        ({"repo": b"x"}, "repo is b'x'"),
        ({"implementation": None}, "auto, xla, triton"),
        ({"implementation": ["xla"]}, "auto, xla, triton"),
        ({"implementation": "cuda"}, "auto, xla, triton"),
        ({"scheme": "fp8"}, "fp8_per_tensor, fp8_per_channel, fp8_per_block, online"),
    ],
)
def test_wrong_arguments_list_the_right_ones_before_any_file_is_opened(
    arguments, message, monkeypatch
):
    monkeypatch.setattr(Checkpoint, "open", None)
    with pytest.raises(ValueError, match=message):
        fp8jax.load_quantized(**{"repo": GOLDENS / "llama2"} | arguments)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (jnp.bfloat16, "bfloat16"),
        (jnp.dtype("bfloat16"), "bfloat16"),
        ("bf16", "bfloat16"),
        ("torch.bfloat16", "bfloat16"),
        (np.float16, "float16"),
        ("fp16", "float16"),
        (np.dtype(np.float32), "float32"),
        (jnp.float32, "float32"),
        ("fp32", "float32"),
    ],
)
def test_a_dtype_may_be_a_name_a_short_name_or_a_dtype(folder, dtype, expected):
    assert fp8jax.load_quantized(folder, None, dtype=dtype).model.config.dtype == expected


@pytest.mark.parametrize(
    ("fields", "stored", "expected"),
    [
        ({"dtype": "float16", "torch_dtype": None}, ml_dtypes.bfloat16, "float16"),
        ({"dtype": None, "torch_dtype": "float32"}, ml_dtypes.bfloat16, "float32"),
        ({"dtype": None, "torch_dtype": None}, np.float16, "float16"),
        ({"dtype": None, "torch_dtype": None}, ml_dtypes.bfloat16, "bfloat16"),
    ],
)
def test_auto_is_the_dtype_that_the_checkpoint_names_or_has(folder, fields, stored, expected):
    reconfigure(folder, **fields)
    rewrite(
        folder,
        lambda tensors: tensors.update({name: x.astype(stored) for name, x in tensors.items()}),
    )
    lm = fp8jax.load_quantized(folder, None, dtype="auto")
    table: Any = lm.weight("model.embed_tokens")
    assert (lm.model.config.dtype, table.dtype) == (expected, expected)


def test_auto_under_a_dtype_that_is_none_of_ours_says_where_it_stands(folder):
    reconfigure(folder, dtype="float64")
    with pytest.raises(ValueError, match="config.json.*dtype is 'float64'.*choose one of bfloat16"):
        fp8jax.load_quantized(folder, None, dtype="auto")


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False)])
def test_progress_is_on_or_off(folder, progress, shown, capsys):
    fp8jax.load_quantized(folder, None, progress=progress)
    assert ("loading" in capsys.readouterr().err) is shown


def test_an_already_quantized_checkpoint_is_refused(folder):
    reconfigure(
        folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}
    )
    with pytest.raises(CheckpointError, match="already quantized.*fp8"):
        fp8jax.load_quantized(folder, "fp8_per_block")


def test_bfloat16_is_the_default_dtype():
    lm = fp8jax.load_quantized(GOLDENS / "llama2", "fp8_per_block")
    table: Any = lm.weight("model.embed_tokens")
    assert table.dtype == jnp.bfloat16
    assert lm.logits([[1, 2, 3]]).dtype == jnp.float32


def test_a_scheme_can_be_given_as_itself():
    given = fp8jax.load_quantized(
        GOLDENS / "llama2",
        fp8jax.FP8_PER_CHANNEL,
        dtype="float32",
        quantization_config={"ignore": ["re:.*down_proj"]},
    )
    name = "model.layers.0.self_attn.o_proj"
    q: Any = given.weight(name)
    codes, scale = oracle_channel(load_file(GOLDENS / "llama2" / FILE)[f"{name}.weight"])
    np.testing.assert_array_equal(bits(q.qvalue), bits(codes))
    np.testing.assert_array_equal(bits(q.scale), bits(scale))
    assert isinstance(given.weight("model.layers.0.mlp.down_proj"), jax.Array)
    assert {layer.scheme for layer in given.report.quantized} == {fp8jax.FP8_PER_CHANNEL}
    ids = golden("llama2")["token_ids"]
    # Two layers of random weights: as far off as one scale a matrix brings them, about 0.16.
    assert 0.01 < relative_error(given.logits(ids), load("llama2").logits(ids)) < 0.3


@pytest.mark.parametrize(
    "variant", sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))
)
def test_what_a_model_never_quantizes_is_what_the_names_say(variant):
    with Checkpoint.open(GOLDENS / variant) as checkpoint:
        config = read_decoder_config(checkpoint.config, dtype="float32", where=variant)
        parameters = list(model_parameters(CausalLM(config), checkpoint.tensors))
    assert {p.kind for p in parameters} >= {"other"}
    for p in parameters:
        name = p.name if p.attribute != "bias" else f"{p.name}.bias"
        assert never_quantized(name) == (p.kind == "other"), name
