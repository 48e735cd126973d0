"""How experts come from disk: one by one or stacked, under whose names, with which scheme, and what
is refused."""

import json
import logging
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from golden_checkpoints import GOLDENS
from selection import mostly_slow

import fp8jax
from fp8jax.checkpoints.folder import Checkpoint
from fp8jax.models import read_decoder_config

Tensors = dict[str, np.ndarray]


def tensors_of(family: str) -> Tensors:
    with Checkpoint.open(GOLDENS / family) as checkpoint:
        return {name: np.array(checkpoint.read(name)) for name in checkpoint.tensors}


def write(folder: Path, family: str, tensors: Tensors, **changes) -> Path:
    """A folder with these tensors under a golden config.json, fields changed."""
    config = json.loads((GOLDENS / family / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def same_weights(one: fp8jax.LanguageModel, other: fp8jax.LanguageModel) -> None:
    leaves, others = jax.tree.leaves(one.model), jax.tree.leaves(other.model)
    assert len(leaves) == len(others) > 10
    for a, b in zip(leaves, others, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


# --- names on disk


def mixtral_stacked(tensors: Tensors) -> Tensors:
    """As transformers 5 holds them: mlp.gate, mlp.experts.gate_up_proj [e, 2i, h],
    mlp.experts.down_proj."""
    kept = {
        name.replace("block_sparse_moe", "mlp"): x
        for name, x in tensors.items()
        if ".experts." not in name
    }
    for layer in ("model.layers.0", "model.layers.1"):
        w1, w2, w3 = (
            np.stack(
                [tensors[f"{layer}.block_sparse_moe.experts.{e}.{w}.weight"] for e in range(4)]
            )
            for w in ("w1", "w2", "w3")
        )
        kept[f"{layer}.mlp.experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
        kept[f"{layer}.mlp.experts.down_proj"] = w2
    return kept


def granite_stacked(tensors: Tensors) -> Tensors:
    new = {
        "input_linear.weight": "experts.gate_up_proj",
        "output_linear.weight": "experts.down_proj",
    }
    new |= {"router.layer.weight": "router.weight"}
    renamed = {}
    for name, x in tensors.items():
        for before, after in new.items():
            name = name.replace(f"block_sparse_moe.{before}", f"block_sparse_moe.{after}")
        renamed[name] = x
    return renamed


def granite_one_by_one(tensors: Tensors) -> Tensors:
    """As quantization tools write them: one matrix an expert under the old prefix."""
    kept = {name: x for name, x in tensors.items() if "put_linear" not in name}
    for layer in ("model.layers.0", "model.layers.1"):
        experts = f"{layer}.block_sparse_moe.experts"
        for e, stacked in enumerate(tensors[f"{layer}.block_sparse_moe.input_linear.weight"]):
            gate, up = (np.ascontiguousarray(half) for half in np.split(stacked, 2))
            kept |= {f"{experts}.{e}.gate_proj.weight": gate, f"{experts}.{e}.up_proj.weight": up}
        for e, down in enumerate(tensors[f"{layer}.block_sparse_moe.output_linear.weight"]):
            kept[f"{experts}.{e}.down_proj.weight"] = np.ascontiguousarray(down)
    return kept


WAYS = [
    ("mixtral", mixtral_stacked),
    ("granitemoe", granite_stacked),
    ("granitemoe", granite_one_by_one),
]


@pytest.mark.parametrize(
    "family, rewritten, scheme",
    mostly_slow(
        [(*way, scheme) for way in WAYS for scheme in ("fp8_per_tensor", "fp8_per_block", None)],
        quick=[
            (*WAYS[0], "fp8_per_block"),
            (*WAYS[1], "fp8_per_tensor"),
            (*WAYS[2], "fp8_per_block"),
        ],
    ),
)
def test_every_way_of_writing_the_experts_gives_the_same_model(family, rewritten, scheme, tmp_path):
    folder = write(tmp_path, family, rewritten(tensors_of(family)))
    same_weights(
        fp8jax.load_quantized(folder, scheme), fp8jax.load_quantized(GOLDENS / family, scheme)
    )


def test_a_mixture_of_one_expert(tmp_path):
    """One expert's matrix is not mistaken for a stack, nor the other way round."""
    rows = slice(None, 1)
    keep = {
        name: x
        for name, x in tensors_of("mixtral").items()
        if ".experts." not in name or ".experts.0." in name
    }
    keep = {name: x[rows] if name.endswith("moe.gate.weight") else x for name, x in keep.items()}
    lm = fp8jax.load_quantized(
        write(tmp_path, "mixtral", keep, num_local_experts=1, num_experts_per_tok=1),
        "fp8_per_tensor",
    )
    full = fp8jax.load_quantized(GOLDENS / "mixtral", "fp8_per_tensor")
    for name in ("gate_up_proj", "down_proj"):
        one, all_four = (m.weight(f"model.layers.1.mlp.experts.{name}") for m in (lm, full))
        assert isinstance(one, fp8jax.QArray) and isinstance(all_four, fp8jax.QArray)
        np.testing.assert_array_equal(np.asarray(one.qvalue), np.asarray(all_four.qvalue)[:1])
        np.testing.assert_array_equal(one.scale, all_four.scale[:1])


@pytest.mark.parametrize("family", ["granitemoe", "mixtral"])
def test_loaded_experts_do_not_point_into_the_file(family, tmp_path):
    """Stacked and one by one, in the file's own dtype, where nothing would force a copy."""
    folder = write(tmp_path, family, tensors_of(family))
    lm = fp8jax.load_quantized(folder, None, dtype="bfloat16")
    before = np.array(lm.weight("model.layers.0.mlp.experts.gate_up_proj"))
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(1 << 14)  # behind the header
        file.write(bytes(file.seek(0, 2) - (1 << 14)))
    np.testing.assert_array_equal(
        before, np.asarray(lm.weight("model.layers.0.mlp.experts.gate_up_proj"))
    )
    assert before.any()


# --- what is refused


def fault_of(folder: Path, scheme: str | None = "fp8_per_block") -> str:
    with pytest.raises(fp8jax.CheckpointError) as caught:
        fp8jax.load_quantized(folder, scheme)
    return str(caught.value)


def test_missing_unknown_and_misshapen_experts_are_all_listed(tmp_path):
    tensors = tensors_of("mixtral")
    experts = "model.layers.1.block_sparse_moe.experts"
    del tensors[f"{experts}.2.w3.weight"], tensors[f"{experts}.0.w2.weight"]
    tensors[f"{experts}.4.w1.weight"] = tensors[f"{experts}.3.w1.weight"].copy()
    tensors[f"{experts}.1.w1.weight"] = np.zeros((143, 64), ml_dtypes.bfloat16)
    tensors["model.layers.0.block_sparse_moe.gate.weight"] = np.zeros((5, 64), ml_dtypes.bfloat16)
    text = fault_of(write(tmp_path, "mixtral", tensors))
    assert f"{experts}.2.w3.weight: missing, config.json asks for shape [144, 64]" in text
    assert f"{experts}.0.w2.weight: missing, config.json asks for shape [64, 144]" in text
    assert f"{experts}.4.w1.weight: in the checkpoint, but no weight of this architecture" in text
    assert (
        f"{experts}.1.w1.weight: the checkpoint has shape [143, 64], config.json says [144, 64]"
        in text
    )
    assert (
        "block_sparse_moe.gate.weight: the checkpoint has shape [5, 64], config.json says [4, 64]"
        in text
    )
    assert "5 faults" in text  # these and no others


def test_a_misshapen_stack_is_refused(tmp_path):
    tensors = tensors_of("granitemoe")
    name = "model.layers.1.block_sparse_moe.input_linear.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].swapaxes(1, 2))
    text = fault_of(write(tmp_path, "granitemoe", tensors))
    assert f"{name}: the checkpoint has shape [4, 72, 192], config.json says [4, 192, 72]" in text


@pytest.mark.parametrize("scheme", ["fp8_per_tensor", "fp8_per_block", None])
@pytest.mark.parametrize(
    "family, tensor, index",
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w3.weight", (143, 63)),
        ("granitemoe", "model.layers.0.block_sparse_moe.output_linear.weight", (3, 71, 95)),
    ],
)
def test_nan_and_inf_in_an_expert_are_found_and_named(family, tensor, index, scheme, tmp_path):
    tensors = tensors_of(family)
    tensors[tensor][index] = np.nan
    tensors["model.norm.weight"][0] = -np.inf
    text = fault_of(write(tmp_path, family, tensors), scheme)
    assert f"{tensor}: holds nan first at index {list(index)}" in text
    assert "model.norm.weight: holds -inf first at index [0]" in text


FIELDS = [
    (
        "mixtral",
        {"num_local_experts": None},
        "num_local_experts None is wrong: expected an integer",
    ),
    (
        "mixtral",
        {"num_experts": 8},
        r"one number of experts, got \{'num_local_experts': 4, 'num_experts': 8\}",
    ),
    ("olmoe", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but there are only 8 experts"),
    (
        "qwen3_moe",
        {"mlp_only_layers": [2]},
        r"mlp_only_layers names a layer outside the 2 there are",
    ),
    ("mixtral", {"norm_topk_prob": True}, "norm_topk_prob: True changes the forward pass"),
    ("granitemoe", {"shared_intermediate_size": 64}, "shared_intermediate_size: 64 is not a field"),
]


@pytest.mark.parametrize("family, changes, message", FIELDS)
def test_fields_that_do_not_describe_a_mixture_are_an_error(family, changes, message):
    raw = json.loads((GOLDENS / family / "config.json").read_text()) | changes
    with pytest.raises(ValueError, match=message):
        read_decoder_config(raw, dtype="float32")


DENSE_LAYERS = [  # decoder_sparse_step, mlp_only_layers, dense layers of 4
    (1, [], ()),
    (2, [], (0, 2)),
    (1, [3], (3,)),
    (2, [1], (0, 1, 2)),
]


@pytest.mark.parametrize("step, only, dense", DENSE_LAYERS)
def test_layers_without_experts_of_qwen3_moe(step, only, dense):
    raw = json.loads((GOLDENS / "qwen3_moe" / "config.json").read_text())
    raw |= {"decoder_sparse_step": step, "mlp_only_layers": only, "num_hidden_layers": 4}
    config = read_decoder_config(raw, dtype="float32")
    assert tuple(i for i in range(4) if not config.has_experts(i)) == dense


# --- schemes


def schemes_of(lm: fp8jax.LanguageModel) -> dict[str, str]:
    """Per layer, what it was quantized with or why not; what is never quantized is left out."""
    layers = [layer for layer in lm.report.layers if layer.kind != "other"]
    return {layer.name: layer.scheme.name if layer.scheme else layer.outcome for layer in layers}


def granite(**config) -> fp8jax.LanguageModel:
    scheme = config.pop("scheme", "online")
    return fp8jax.load_quantized(GOLDENS / "granitemoe", scheme, quantization_config=config or None)


LINEARS = [
    f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("qkv_proj", "o_proj")
]
EXPERTS = [
    f"model.layers.{i}.mlp.experts.{name}"
    for i in range(2)
    for name in ("gate_up_proj", "down_proj")
]
TENSOR, BLOCK = "fp8_per_tensor", "fp8_per_block"
CONFIGS = [  # what the user writes, scheme of linears, scheme of experts
    ({"scheme": TENSOR}, TENSOR, TENSOR),
    ({"scheme": BLOCK}, BLOCK, BLOCK),
    ({"scheme": TENSOR, "linear_scheme_override": BLOCK}, BLOCK, TENSOR),
    ({"scheme": BLOCK, "moe_scheme_override": TENSOR}, BLOCK, TENSOR),
    ({"linear_scheme_override": BLOCK, "moe_scheme_override": TENSOR}, BLOCK, TENSOR),
    ({"linear": TENSOR, "moe": BLOCK}, TENSOR, BLOCK),
    ({"global_scheme": BLOCK, "moe": TENSOR}, BLOCK, TENSOR),
    ({"moe": BLOCK}, "no scheme", BLOCK),
    ({"linear": TENSOR}, TENSOR, "no scheme"),
]


@pytest.mark.parametrize("config, linear, moe", CONFIGS, ids=str)
def test_linears_and_experts_get_their_own_scheme(config, linear, moe):
    assert schemes_of(granite(**config)) == dict.fromkeys(LINEARS, linear) | dict.fromkeys(
        EXPERTS, moe
    )


def test_a_side_without_a_scheme_stays_unquantized_and_the_log_says_so(caplog):
    with caplog.at_level(logging.INFO, "fp8jax"):
        lm = granite(linear=TENSOR)
    assert isinstance(lm.weight(EXPERTS[0]), jax.Array)
    assert "self_attn.qkv_proj: 2 (from linear: fp8_per_tensor)" in caplog.text
    assert "left unquantized: 4 of kind moe, which was given no scheme" in caplog.text


IGNORED = [  # entries, the layers that they leave alone
    (["model.layers.1.self_attn.o_proj", "re:.*[qkv]_proj"], {LINEARS[0], LINEARS[2], LINEARS[3]}),
    (["model.layers.1.mlp.experts"], set(EXPERTS[2:])),
    (["re:.*experts"], set(EXPERTS)),
    (["re:.*mlp.*"], set(EXPERTS)),
    (
        ["model.layers.0.block_sparse_moe.experts"],
        set(EXPERTS[:2]),
    ),  # the name in the family's own files
    (["re:.*block_sparse_moe\\.experts"], set(EXPERTS)),
]


@pytest.mark.parametrize(
    "entries, left_alone", IGNORED, ids=lambda names: str(sorted(names))
)  # workers must agree
def test_ignored_layers_of_a_mixture(entries, left_alone):
    found = schemes_of(granite(scheme=BLOCK, ignore=entries))
    assert {name for name, outcome in found.items() if outcome == "ignored"} == left_alone
    assert {outcome for name, outcome in found.items() if name not in left_alone} <= {BLOCK}


@pytest.mark.parametrize(
    "entry", ["model.layers.1.mlp.experts.3.down_proj", r"re:.*experts\.3\..*", "re:.*down_proj"]
)
def test_single_experts_cannot_be_ignored_and_a_warning_says_that_nothing_matched(entry):
    with pytest.warns(UserWarning, match="matched no layer"):
        lm = granite(scheme=TENSOR, ignore=[entry])
    assert set(schemes_of(lm).values()) == {TENSOR}


@pytest.mark.parametrize("entry", [r"re:.*mlp\.gate$", r"re:.*block_sparse_moe\.router.*"])
def test_naming_a_router_is_redundant_and_no_mistake(entry):
    lm = granite(scheme=TENSOR, ignore=[entry])  # warnings are errors here
    assert set(schemes_of(lm).values()) == {TENSOR}


def test_the_report_has_a_row_for_each_stack_of_experts():
    lm = granite(scheme=BLOCK)
    layer = next(layer for layer in lm.report.layers if layer.name == EXPERTS[0])
    assert (layer.type, layer.kind, layer.outcome) == (
        "mlp.experts.gate_up_proj",
        "moe",
        "quantized",
    )
    weight = tensors_of("granitemoe")["model.layers.0.block_sparse_moe.input_linear.weight"].astype(
        np.float32
    )
    assert layer.bytes_before == weight.size * 2
    assert (
        layer.bytes_after == weight.size + 4 * 4 * 2
    )  # codes, and two row blocks of one scale in each of four experts
    np.testing.assert_array_equal(
        layer.shard_amax, [np.abs(weight[:, :96]).max(), np.abs(weight[:, 96:]).max()]
    )
    q = lm.weight(EXPERTS[0])
    assert isinstance(q, fp8jax.QArray) and layer.relative_error is not None
    error = np.linalg.norm(np.asarray(fp8jax.dequantize(q)) - weight) / np.linalg.norm(weight)
    assert (
        abs(layer.relative_error - error) < 1e-3 * error
    )  # float32 sums of 55 296 squares, taken expert by expert
    assert "mlp.experts.gate_up_proj" in str(lm.report)
