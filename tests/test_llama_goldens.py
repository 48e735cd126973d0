"""The Llama family against torch transformers: frozen logits, greedy tokens, and fake-quantized
logits of both schemes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_checkpoints import (
    ALL_KINDS,
    GOLDENS,
    LLAMAS,
    SCHEMES,
    golden,
    ignore_all_but,
    load,
    relative_error,
    share_of_quantization_error,
)
from selection import mostly_slow

import fp8jax

# Codes flip where a value lies at a rounding border, and a flip cascades through the layers behind
# it. The bounds are shares of the quantization error itself: float32 noise alone was seen to use up
# to half of them when the goldens were drawn.
ONE_KIND, ALL = 0.25, 0.6


@pytest.mark.smoke
@pytest.mark.parametrize("variant", LLAMAS)
def test_float32_logits_equal_torch(variant):
    logits = load(variant).logits(golden(variant)["token_ids"])
    # float32 sums in another order: at most 1.7e-6 was measured.
    assert relative_error(logits, golden(variant)["logits"]) < 5e-6


@pytest.mark.parametrize("variant", mostly_slow(LLAMAS, quick=LLAMAS[:4]))
def test_greedy_tokens_equal_torch(variant):
    prompts = golden(variant)["token_ids"][:, :8].tolist()
    expected = golden(variant)["greedy"]
    generations = load(variant).generate(
        prompts, max_new_tokens=expected.shape[1], temperature=0, eos_token_ids=[]
    )
    np.testing.assert_array_equal([g.token_ids for g in generations], expected)


@pytest.mark.parametrize(
    "variant, scheme",
    mostly_slow(
        itertools.product(LLAMAS, SCHEMES),
        quick=[
            *itertools.product(["llama31", "llama_bias_headdim"], SCHEMES),
            ("llama_fp16", "fp8_per_tensor"),
            ("llama_yarn", "fp8_per_block"),
        ],
    ),
)
def test_fp8_logits_follow_the_fake_quantized_oracle(variant, scheme):
    arrays = golden(variant)
    logits = load(variant, scheme).logits(arrays["token_ids"])
    assert (
        share_of_quantization_error(logits, arrays[f"logits.{scheme}.all"], arrays["logits"]) <= ALL
    )


@pytest.mark.parametrize(
    "variant, scheme, which",
    mostly_slow(
        itertools.product(LLAMAS, SCHEMES, ALL_KINDS),
        quick=[*itertools.product(["llama31"], SCHEMES, ALL_KINDS)],
    ),
)
def test_one_quantized_kind_of_layer_follows_the_oracle(variant, scheme, which):
    lm = fp8jax.load_quantized(
        GOLDENS / variant,
        scheme,
        quantization_config={"ignore": ignore_all_but(which)},
        dtype="float32",
    )
    assert len(lm.report.quantized) == lm.config["num_hidden_layers"]
    arrays = golden(variant)
    logits = lm.logits(arrays["token_ids"])
    assert (
        share_of_quantization_error(logits, arrays[f"logits.{scheme}.{which}"], arrays["logits"])
        <= ONE_KIND
    )


def test_one_activation_scale_for_the_batch_follows_the_oracle():
    arrays = golden("llama2")
    lm = fp8jax.load_quantized(
        GOLDENS / "llama2",
        "fp8_per_tensor",
        quantization_config={"activation": "tensor"},
        dtype="float32",
    )
    logits = lm.logits(arrays["token_ids"])
    oracle = arrays["logits.fp8_per_tensor.all.activation_tensor"]
    assert share_of_quantization_error(logits, oracle, arrays["logits"]) <= ALL


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_never_quantized_stays_a_plain_array(scheme):
    for variant in ("llama2", "smollm2"):  # untied, tied
        lm = load(variant, scheme)
        norm = lm.weight("model.layers.0.input_layernorm")
        for array in (
            lm.weight("lm_head"),
            lm.weight("model.embed_tokens"),
            lm.weight("model.norm"),
            norm,
        ):
            assert isinstance(array, jax.Array) and array.dtype == jnp.float32


@pytest.mark.smoke
@pytest.mark.parametrize("case", ["17x96x160", "5x200x300", "128x256x256"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("with_bias", ["out", "out_bias"])
def test_one_matmul_on_frozen_operands(case, scheme, with_bias):
    with np.load(GOLDENS / "matmul.npz") as arrays:
        frozen = {
            key.removeprefix(f"{case}."): arrays[key] for key in arrays if key.startswith(case)
        }
    recipe = fp8jax.SCHEMES[scheme]

    def codes(name):
        return jnp.asarray(frozen[f"{scheme}.{name}_codes"]).view(jnp.float8_e4m3fn)

    w = fp8jax.QArray(codes("weight"), jnp.asarray(frozen[f"{scheme}.weight_scale"]), recipe)
    w.validate()
    x = fp8jax.QActivation(
        codes("activation"), jnp.asarray(frozen[f"{scheme}.activation_scale"]), recipe.activation
    )
    bias = jnp.asarray(frozen["bias"]) if with_bias == "out_bias" else None
    out = fp8jax.scaled_matmul(x, w, bias=bias, out_dtype=jnp.float32, implementation="xla")
    assert (
        relative_error(out, frozen[f"{scheme}.{with_bias}"]) < 1e-5
    )  # float32 against float64 sums
