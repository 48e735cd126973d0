"""`explain` says what a trace decides, for a device that need not be here."""

import json

import jax
import pytest
from golden_checkpoints import load

import fp8jax
from fp8jax.devtools import offline_models
from fp8jax.explanation import explain, on_device
from fp8jax.ops.decisions import noted, scope

H100 = "NVIDIA H100 80GB HBM3"


def llama(scheme: str | None = "fp8_per_block", **options):
    return offline_models.abstract_model("llama-3.1-8b", scheme, layers=3, **options)


def test_layers_that_decide_alike_share_their_rows():
    found = explain(llama(), batch=16, device=H100)
    assert found.device == H100
    decode = list(zip(found.decisions["decode"], found.layers["decode"], strict=True))
    down, layers = next(pair for pair in decode if pair[0].where == "model.layers.*.mlp.down_proj")
    assert layers == (0, 1, 2)
    assert (down.op, down.kernel, down.source) == ("block_scaled_matmul", True, "rule")
    assert down.shape == {"m": 16, "n": 4096, "k": 14336}
    assert down.config.block_m == 16
    # What the traced program holds: ten kernels a layer, of which attention is two.
    assert sum(decision.kernel for decision, _ in decode) == 8


def test_it_says_why_no_kernel_runs():
    on_cpu = explain(llama(), batch=1)
    assert not any(d.kernel for phase in on_cpu.decisions.values() for d in phase)
    assert {d.why_not for d in on_cpu.decisions["decode"]} == {"no GPU with FP8 tensor cores"}
    by_name = explain(llama(implementation="xla"), batch=1, device=H100)
    assert {d.why_not for d in by_name.decisions["decode"]} == {"implementation 'xla'"}


def test_a_layer_that_differs_has_rows_of_its_own():
    model = llama()
    layers, unquantized = (of.model.layers for of in (model, llama(None)))
    layers[1].mlp = unquantized[1].mlp  # pyright: ignore[reportAttributeAccessIssue]
    found = explain(model, device=H100)
    rows = {
        layers
        for decision, layers in zip(found.decisions["decode"], found.layers["decode"], strict=True)
        if decision.where.endswith("mlp.down_proj")
    }
    assert rows == {(0, 2)}


def test_a_loaded_model_explains_itself_as_text_and_as_data():
    found = load("qwen3_moe", "fp8_per_tensor").explain(batch=2, prompt_tokens=8, device=H100)
    text = str(found)
    for part in (H100, "decode", "prefill", "route_experts", "grouped_scaled_matmul", "rule"):
        assert part in text
    rows = json.loads(json.dumps(found.rows()))
    assert {row["phase"] for row in rows} == {"decode", "prefill"}


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match="more than the model's context"):
        load("llama31").explain(prompt_tokens=10**6)


def test_what_runs_does_not_depend_on_who_listens():
    model, token_ids = load("llama31", "fp8_per_block").model, jax.numpy.ones((1, 4), int)

    def text(model):
        return jax.jit(lambda model: model(token_ids)).lower(model).as_text()

    with noted():
        listened_to = text(model)
    assert listened_to == text(model)
    with noted() as decisions, scope("outer"), scope("inner"), on_device(H100):
        fp8jax.quantize_activation(jax.numpy.ones((4, 128)), "token", implementation="xla")
    assert [d.where for d in decisions] == ["outer.inner"]
