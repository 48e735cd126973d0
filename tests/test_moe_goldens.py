"""GraniteMoE, Mixtral, Qwen3-MoE and OLMoE against torch transformers, for every pair of linear and
MoE schemes."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
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

import fp8jax
from fp8jax.checkpoints.folder import Checkpoint

FAMILIES = ("granitemoe", "mixtral", "qwen3_moe", "olmoe")
PAIRS = [pair for pair in itertools.product((None, *SCHEMES), repeat=2) if any(pair)]
# Compiling is what costs time here, so the quick tests load one pair a family: each scheme on each
# side, experts alone twice.
QUICK = {
    "granitemoe": (None, "fp8_per_block"),
    "mixtral": ("fp8_per_block", "fp8_per_tensor"),
    "qwen3_moe": (None, "fp8_per_tensor"),
    "olmoe": ("fp8_per_tensor", "fp8_per_block"),
}
LAST = "model.layers.1"  # has experts in every family; layer 0 of qwen3_moe is dense


@functools.cache
def with_schemes(family: str, linear: str | None, moe: str | None) -> fp8jax.LanguageModel:
    config = {"linear_scheme_override": linear, "moe_scheme_override": moe}
    return fp8jax.load_quantized(
        GOLDENS / family, "online", quantization_config=config, dtype="float32"
    )


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
    "family, linear, moe",
    [
        pytest.param(family, *pair, marks=() if pair == QUICK[family] else pytest.mark.slow)
        for family in FAMILIES
        for pair in PAIRS
    ],
)
def test_fp8_logits_follow_the_fake_quantized_oracle(family, linear, moe):
    arrays = golden(family)
    logits = with_schemes(family, linear, moe).logits(arrays["token_ids"])
    share = share_of_quantization_error(
        logits, arrays[f"logits.linear={linear}.moe={moe}"], arrays["logits"]
    )
    # Of the quantization error: codes flip at rounding borders and a flip cascades. The goldens
    # were drawn so that float32 noise alone uses at most half of these bounds.
    assert share <= (0.25 if linear is None else 0.6)


@functools.cache
def golden_experts(family: str) -> tuple[np.ndarray, np.ndarray]:
    """gate_up [e, 2i, h] and down [e, h, i] of the last layer as the file has them, bfloat16."""
    with Checkpoint.open(GOLDENS / family) as checkpoint:
        if family == "granitemoe":
            names = (
                "block_sparse_moe.input_linear.weight",
                "block_sparse_moe.output_linear.weight",
            )
            gate_up, down = (np.array(checkpoint.read(f"{LAST}.{name}")) for name in names)
            return gate_up, down
        count = json.loads((GOLDENS / family / "config.json").read_text()).get(
            "num_local_experts", 8
        )
        pattern = "block_sparse_moe.experts.{}.{}" if family == "mixtral" else "mlp.experts.{}.{}"
        gate, up, down = (
            ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        )

        def read(expert, name):
            return checkpoint.read(f"{LAST}.{pattern.format(expert, name)}.weight")

        gate_up = np.stack([np.concatenate([read(e, gate), read(e, up)]) for e in range(count)])
        return gate_up, np.stack([read(e, down) for e in range(count)])


def numpy_codes(weight: np.ndarray, scheme: str, row_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """One expert's codes and scales from the formulas: numpy divides exactly, and rows are taken
    apart one group at a time."""
    wide = weight.astype(np.float32)
    if scheme == "fp8_per_tensor":
        scale = np.abs(wide).max() / np.float32(448)
        return (wide * (np.float32(1) / scale)).clip(-448, 448).astype(
            ml_dtypes.float8_e4m3fn
        ), scale
    codes, scales = np.zeros(wide.shape, ml_dtypes.float8_e4m3fn), []
    half = wide.shape[0] // row_groups
    for top in range(0, wide.shape[0], half):
        for row in range(top, top + half, 128):
            scales.append([])
            for column in range(0, wide.shape[1], 128):
                block = slice(row, min(row + 128, top + half)), slice(column, column + 128)
                scale = max(np.abs(wide[block]).max(), np.float32(1e-4)) / np.float32(448)
                codes[block] = (
                    (wide[block] * (np.float32(1) / scale)).clip(-448, 448).astype(codes.dtype)
                )
                scales[-1].append(scale)
    return codes, np.array(scales, np.float32)


@pytest.mark.parametrize(
    "family, linear, scheme",
    [
        pytest.param(family, *pair, marks=() if pair == QUICK[family] else pytest.mark.slow)
        for family in FAMILIES
        for pair in (
            QUICK[family],
            *((None, scheme) for scheme in SCHEMES if scheme != QUICK[family][1]),
        )
    ],
)
def test_codes_and_scales_of_experts_equal_numpy_to_the_bit(family, linear, scheme):
    lm = with_schemes(family, linear, scheme)
    for weight, name, row_groups in zip(
        golden_experts(family), ("gate_up_proj", "down_proj"), (2, 1), strict=True
    ):
        q = lm.weight(f"{LAST}.mlp.experts.{name}")
        assert isinstance(q, fp8jax.QArray) and q.shape == weight.shape
        q.validate()
        for expert, (codes, scale) in enumerate(
            zip(np.asarray(q.qvalue), np.asarray(q.scale), strict=True)
        ):
            expected_codes, expected_scale = numpy_codes(weight[expert], scheme, row_groups)
            np.testing.assert_array_equal(codes.view(np.uint8), expected_codes.view(np.uint8))
            np.testing.assert_array_equal(scale, expected_scale)


def test_gate_and_up_share_no_block_where_the_width_is_ragged():
    q = with_schemes("olmoe", *QUICK["olmoe"]).weight(f"{LAST}.mlp.experts.gate_up_proj")
    assert isinstance(q, fp8jax.QArray)
    assert q.shape == (8, 2 * 48, 64)
    assert q.scale.shape == (8, 2, 1)  # 96 rows in one go would be one block


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_lm_head_and_embeddings_stay_plain_arrays(family):
    lm = with_schemes(family, *QUICK[family])
    for name in (f"{LAST}.mlp.gate", "lm_head", "model.embed_tokens", "model.norm"):
        array = lm.weight(name)
        assert isinstance(array, jax.Array) and array.dtype == jnp.float32
    kinds = {layer.name: layer.kind for layer in lm.report.layers}
    assert kinds[f"{LAST}.mlp.gate"] == "other"
    assert (
        kinds[f"{LAST}.mlp.experts.gate_up_proj"] == kinds[f"{LAST}.mlp.experts.down_proj"] == "moe"
    )


def test_a_layer_without_experts_is_dense_in_a_mixture():
    lm = load("qwen3_moe")
    assert lm.weight("model.layers.0.mlp.gate_up_proj").shape == (2 * 96, 144)
    with pytest.raises(KeyError, match="has no 'experts'"):
        lm.weight("model.layers.0.mlp.experts.gate_up_proj")
