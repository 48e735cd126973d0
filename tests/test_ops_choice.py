"""What runs an operation on which device, and the kernels inside the model: interpreted on the CPU
against XLA's references.

What a device would run shows in the traced program: a kernel is a `pallas_call` with a name. A mesh
that names an H100 stands in for one; nothing is compiled for it here (tests/test_offline_decode.py
does that).
"""

import functools
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_checkpoints import GOLDENS, SCHEMES, golden, load, relative_error
from selection import mostly_slow

import fp8jax
from fp8jax.devtools import offline_models, tuned_tables
from fp8jax.explanation import on_device as on
from fp8jax.ops import choice, experts
from fp8jax.ops import matmul as ops
from fp8jax.ops.choice import Choice, Implementation, choose
from fp8jax.ops.decisions import noted
from fp8jax.ops.values import QActivation
from fp8jax.pallas_kernels import tuning
from fp8jax.pallas_kernels.expert_routing import Rule
from fp8jax.pallas_kernels.grouped_matmul import Slots
from fp8jax.pallas_kernels.matmul_config import Config
from fp8jax.qarray import split_rows

rng = np.random.default_rng(20)
X = jnp.asarray(rng.standard_normal((17, 160)), jnp.bfloat16)
W = jnp.asarray(rng.standard_normal((96, 160)), jnp.bfloat16)
INTERPRETED = "triton_interpreted"
QUANTIZED = {
    scheme: jax.jit(functools.partial(fp8jax.quantize, scheme=scheme))(W) for scheme in SCHEMES
}


def kernels_of(function, *arguments) -> list[str]:
    """Names of the kernels in a traced program, in order."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                yield equation.params["name"]
                continue
            for value in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
            ):
                if hasattr(value, "eqns"):
                    yield from walk(value)

    return list(walk(jax.make_jaxpr(function)(*arguments)))


def product(implementation: Implementation, scheme: str = "fp8_per_block"):
    return lambda x: ops.scaled_matmul(x, QUANTIZED[scheme], implementation=implementation)


def test_an_unknown_implementation_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'cutlass' is unknown; choose one of auto, xla, triton"):
        ops.quantize_activation(X, "token", implementation="cutlass")  # pyright: ignore


@pytest.mark.parametrize("scheme", SCHEMES)
def test_auto_on_a_cpu_is_the_reference_to_the_bit(scheme):
    assert kernels_of(product("auto", scheme), X) == []
    np.testing.assert_array_equal(product("auto", scheme)(X), product("xla", scheme)(X))


def test_triton_without_a_gpu_raises_instead_of_running_something_else():
    for call in (
        lambda: ops.quantize_activation(X, "token", implementation="triton"),
        lambda: product("triton")(X),
    ):
        with pytest.raises(
            NotImplementedError, match="needs an NVIDIA GPU with FP8 tensor cores .* this is a cpu"
        ):
            call()


@pytest.mark.parametrize("scheme, activation, matmul", [
    ("fp8_per_tensor", "quantize_token", "scaled_matmul"), ("fp8_per_block", "quantize_group",
    "block_scaled_matmul")
])  # fmt: skip
def test_on_a_gpu_with_fp8_auto_and_triton_run_the_kernels_and_xla_does_not(
    scheme, activation, matmul
):
    for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA L40", "NVIDIA B200"):
        with on(kind):
            assert kernels_of(product("auto", scheme), X) == [activation, matmul]
            assert kernels_of(product("triton", scheme), X) == [activation, matmul]
            assert kernels_of(product("xla", scheme), X) == []


def test_a_case_without_a_kernel_runs_on_xla_under_auto_and_raises_under_triton():
    with on("NVIDIA H100"):
        assert kernels_of(lambda x: ops.quantize_activation(x, "tensor").qvalue, X) == []
        with pytest.raises(NotImplementedError, match="one scale for all rows"):
            ops.quantize_activation(X, "tensor", implementation="triton")


def test_a_gpu_that_is_not_known_to_have_fp8_gets_no_kernel():
    """Triton's compiler would end the process there."""
    with on("NVIDIA A100-SXM4-80GB"):
        assert kernels_of(product("auto"), X) == []
        with pytest.raises(NotImplementedError, match="this is NVIDIA A100"):
            product("triton")(X)


def test_group_scales_in_either_layout_give_the_same_product():
    w = QUANTIZED["fp8_per_block"]
    by_row = ops.quantize_activation(X, "group")
    by_group = ops.quantize_activation(X, "group", scale_layout="gm")
    assert by_group.scale.shape == by_row.scale.shape[::-1] == (2, 17)
    np.testing.assert_array_equal(ops.scaled_matmul(by_group, w), ops.scaled_matmul(by_row, w))
    first, second = (
        ops.scaled_matmul(x, w, implementation="triton_interpreted") for x in (by_row, by_group)
    )
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_ampere_gpu_keeps_activations_as_they_are_and_says_so_once(monkeypatch, caplog, scheme):
    ampere = SimpleNamespace(platform="gpu", device_kind="NVIDIA A10", compute_capability="8.6")
    monkeypatch.setattr(choice, "current_device", lambda: ampere)
    choice._say_weight_only.cache_clear()
    w, bias = QUANTIZED[scheme], jnp.arange(96, dtype=jnp.bfloat16)
    with caplog.at_level(logging.WARNING, "fp8jax"):
        out = ops.scaled_matmul(X, w, bias=bias)
        ops.scaled_matmul(X, w)
    assert [record.message[:38] for record in caplog.records] == [
        "NVIDIA A10 has no FP8 tensor cores: FP"
    ]
    exact = np.asarray(X, np.float64) @ np.asarray(fp8jax.dequantize(w), np.float64).T + np.arange(
        96
    )
    # bfloat16 roundings of the result and of a block's weights are 2⁻⁹; quantized activations would
    # be off by some 2 %.
    assert relative_error(out, exact) < 2**-8
    assert relative_error(ops.scaled_matmul(X, w, bias=bias, implementation="xla"), exact) > 2**-8


def entry(config: Config, **changes) -> tuning.Entry:
    fields = {
        name: getattr(config, name)
        for name in ("block_m", "block_n", "block_k", "num_warps", "swap_operands")
    }
    measurement = {"microseconds": 5.0, "versions": {"jax": "0"}, "date": "2000-01-01"}
    return tuning.Entry(
        shape={"m": 16, "n": 96, "k": 160}, config=fields, **(measurement | changes)
    )


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Write a table for the H100 that lasts as long as the test."""
    load_from_there = functools.partial(tuning.load, folder=tmp_path)
    monkeypatch.setattr(
        choice, "tuning", SimpleNamespace(load=load_from_there, nearest=tuning.nearest)
    )
    return lambda entries: tuned_tables.save(
        "NVIDIA H100", "block_scaled_matmul", entries, folder=tmp_path
    )


def test_a_measured_config_beats_the_rule_where_the_shape_is_near(tuned):
    measured = Config(block_m=32, block_n=128, block_k=128, num_warps=8, swap_operands=True)
    tuned([entry(measured)])

    def chosen(kind: str, m: int) -> Config | None:
        with on(kind):
            bfloat16 = jnp.dtype(jnp.bfloat16)
            return ops._kernel_config(QUANTIZED["fp8_per_block"], m, bfloat16, choose("auto"))

    assert chosen("NVIDIA H100", 17) == measured
    assert chosen("NVIDIA H100", 17 * 64) != measured
    assert chosen("NVIDIA L40", 17) != measured


def some_slots() -> Slots:
    """14 slots of two of three experts, and two that belong to no one."""
    sizes, rows = [5, 0, 9], rng.integers(0, 17, 16)
    return Slots(sizes=jnp.asarray(sizes, jnp.int32), row=jnp.asarray(rows, jnp.int32))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_on_an_ampere_gpu_keep_activations_as_they_are_too(monkeypatch, scheme, split):
    ampere = SimpleNamespace(platform="gpu", device_kind="NVIDIA A10", compute_capability="8.6")
    w = fp8jax.quantize(
        jnp.asarray(rng.standard_normal((3, 2 * 96, 160)), jnp.bfloat16), scheme, row_groups=2
    )
    slots = some_slots()
    exact = np.zeros((16, 192))
    for slot, expert in enumerate([0] * 5 + [2] * 9):
        exact[slot] = (
            np.asarray(fp8jax.dequantize(w), np.float64)[expert]
            @ np.asarray(X, np.float64)[np.asarray(slots.row)[slot]]
        )
    stack = split_rows(w, (96, 96)) if split else w
    quantized = experts.grouped_scaled_matmul(X, stack, slots)
    monkeypatch.setattr(choice, "current_device", lambda: ampere)
    out = experts.grouped_scaled_matmul(X, stack, slots)
    assert relative_error(out, exact) < 2**-8 < relative_error(quantized, exact)  # as above


@pytest.mark.parametrize("name", ["weight", "out_row"])
def test_an_array_that_is_not_one_a_slot_is_refused(name):
    w = fp8jax.quantize(jnp.ones((3, 96, 160)), "fp8_per_block")
    wrong = jnp.zeros(4, jnp.float32 if name == "weight" else jnp.int32)
    slots = replace(Slots(jnp.asarray([5, 0, 9], jnp.int32)), **{name: wrong})
    with pytest.raises(
        ValueError, match=rf"grouped_scaled_matmul: {name} is \(4,\), wanted \[17\]"
    ):
        experts.grouped_scaled_matmul(X, w, slots)
    with pytest.raises(ValueError, match=rf"grouped_matmul: {name} is \(4,\), wanted \[17\]"):
        experts.grouped_matmul(X, jnp.ones((3, 96, 160), jnp.bfloat16), slots)


@pytest.mark.parametrize("dtype, promoted", [("float32", "tensor_core"), ("bfloat16", "none")])
def test_float32_experts_come_from_promoted_sums(dtype, promoted):
    with on("NVIDIA H100"):
        program = offline_models.decode_step("granite-3.0-1b-a400m", 1, layers=1)
        layer = program.arguments[0].model.layers[0].mlp.experts
        layer.dtype = jnp.dtype(dtype)
        logits = jax.ShapeDtypeStruct((2, 32), dtype)
        rule = Rule(top_k=2, softmax_over="all", renormalise=True, weight_dtype="float32")

        def both(x, logits):
            return layer(x, experts.route(logits, rule, layer.gate_up_proj))

        with noted() as decisions:
            jax.eval_shape(both, jax.ShapeDtypeStruct((2, 1024), dtype), logits)
    configs = [d.config for d in decisions if d.op == "grouped_scaled_matmul"]
    assert [config.promotion for config in configs] == [promoted, promoted]


def test_float32_results_come_from_promoted_sums():
    w = QUANTIZED["fp8_per_tensor"]
    with on("NVIDIA H100"):
        configs = [
            ops._kernel_config(w, 17, jnp.dtype(dtype), choose("auto"))
            for dtype in ("float32", "bfloat16")
        ]
    assert [config and config.promotion for config in configs] == ["tensor_core", "none"]


def test_auto_takes_xla_where_xla_measured_faster_and_triton_does_what_it_is_told(tuned):
    tuned(
        [
            entry(
                Config(block_m=16, block_n=64, block_k=128, swap_operands=True),
                xla_microseconds=4.0,
            )
        ]
    )
    with on("NVIDIA H100"):
        assert kernels_of(product("auto"), X) == ["quantize_group"]
        assert kernels_of(product("triton"), X) == ["quantize_group", "block_scaled_matmul"]


def layer_of(matmul: str, granularity: str) -> list[str]:
    """The kernels of a dense layer in decode, in their order."""
    attention = ["rope_cache", "decode_attention"]
    merge = f"decode_attention_merge_quantize_{granularity}"
    norm = f"rms_norm_quantize_{granularity}"
    mlp = [matmul, f"silu_mul_quantize_{granularity}", matmul]
    return [norm, matmul, *attention, merge, matmul, norm, *mlp]


LAYER = {
    "fp8_per_tensor": layer_of("scaled_matmul", "token"),
    "fp8_per_block": layer_of("block_scaled_matmul", "group"),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_decoding_layer_is_ten_kernels_in_this_order(scheme):
    program = offline_models.decode_step("llama-3.1-8b", 1, scheme=scheme, layers=3)
    with on("NVIDIA H100"):
        assert kernels_of(program.function, *program.arguments) == 3 * LAYER[scheme]


# Of a layer with experts what follows o_proj; the router's own product is XLA's.
EXPERTS = (
    "rms_norm_quantize_{0} route_experts grouped_scaled_matmul silu_mul_quantize_{0} "
    "grouped_scaled_matmul"
)


@pytest.mark.parametrize("model", ["granite-3.0-1b-a400m", "qwen3-30b-a3b"])
@pytest.mark.parametrize(
    "scheme, granularity", [("fp8_per_tensor", "token"), ("fp8_per_block", "group")]
)
def test_a_decoding_layer_with_experts_is_eleven_kernels_in_this_order(model, scheme, granularity):
    program = offline_models.decode_step(model, 1, scheme=scheme, layers=2)
    layer = [*LAYER[scheme][:6], *EXPERTS.format(granularity).split()]
    with on("NVIDIA H100"):
        assert kernels_of(program.function, *program.arguments) == 2 * layer


def test_prefill_quantizes_and_multiplies_in_kernels_and_leaves_attention_to_xla():
    program = offline_models.prefill("llama-3.1-8b", 2, 256, layers=1)
    with on("NVIDIA H100"):
        found = kernels_of(program.function, *program.arguments)
    assert found == [
        name.replace("decode_attention_merge_", "")
        for name in LAYER["fp8_per_tensor"]
        if name not in ("rope_cache", "decode_attention")
    ]


@functools.cache
def loaded(
    variant: str, scheme: str | None, implementation: Implementation
) -> fp8jax.LanguageModel:
    return fp8jax.load_quantized(
        GOLDENS / variant, scheme, dtype="float32", implementation=implementation
    )


def shallow(lm: fp8jax.LanguageModel, layers: int) -> Any:
    """The model with its first layers alone: an interpreted layer takes seconds to compile, and the
    others are like it."""
    model: Any = jax.tree.unflatten(jax.tree.structure(lm.model), jax.tree.leaves(lm.model))
    model.model.layers = nnx.data(list(model.model.layers)[:layers])
    windows = model.config.windows[:layers]
    model.config = replace(model.config, num_layers=layers, windows=windows)
    return model


def two_decode_steps(
    variant: str, scheme: str | None, implementation: Implementation
) -> np.ndarray:
    """Logits of two decode steps after a prefill by XLA, `[2, b, vocab]`."""
    tokens = golden(variant)["token_ids"][:, :12].astype(np.int32)
    lengths = np.asarray([12, 7], np.int32)
    layers = 2 if variant == "qwen3_moe" else 1  # whose first one has an MLP instead of experts
    xla, model = (shallow(loaded(variant, scheme, i), layers) for i in ("xla", implementation))
    _, cache = jax.jit(fp8jax.prefill)(xla, xla.empty_cache(2, 16), tokens, lengths)
    step = jax.jit(functools.partial(fp8jax.decode_step))  # traced anew for every test
    first, cache = step(model, cache, tokens[:, 0], lengths)
    second, _ = step(model, cache, tokens[:, 1], lengths + 1)
    return np.stack([first, second])


@functools.cache
def decoded_by_xla(variant: str, scheme: str | None) -> np.ndarray:
    return two_decode_steps(variant, scheme, "xla")


def assert_tokens_agree(found: Any, expected: Any, unquantized: Any) -> None:
    """Logits `[..., vocab]` of two float32 implementations of the same quantized model.

    Two sums in another order differ by 3e-7 of a token (measured: 1e-7 to 8e-7). A last bit can
    move a value over the border between two codes, and then that token differs by some 1e-3: hence
    the median of the tokens, and a wide bound for the worst of them in units of e, the token's own
    quantization error.
    """
    found, expected, unquantized = (
        np.asarray(x, np.float64) for x in (found, expected, unquantized)
    )
    error = np.linalg.norm(found - expected, axis=-1)
    assert np.median(error / np.linalg.norm(expected, axis=-1)) < 5e-6
    assert (error <= 0.6 * np.linalg.norm(expected - unquantized, axis=-1)).all()


@pytest.mark.parametrize(
    "variant, scheme",
    [
        ("llama31", "fp8_per_tensor"),
        ("llama31", "fp8_per_block"),
        ("llama31", None),
        ("llama_bias_headdim", "fp8_per_tensor"),  # biases, heads of another width
        ("mistral", "fp8_per_block"),  # a window shorter than the rows
        ("granitemoe", "fp8_per_block"),  # experts, softmax over the chosen, multipliers
        ("qwen3_moe", "fp8_per_tensor"),  # RMSNorm of each head; layers with and without experts
        ("mixtral", "fp8_per_channel"),  # a scale an output row, of experts too
    ],
)
def test_interpreted_kernels_decode_like_xla(variant, scheme):
    expected = decoded_by_xla(variant, scheme)
    found = two_decode_steps(variant, scheme, INTERPRETED)
    if scheme is None:
        assert relative_error(found, expected) < 5e-6  # float32 sums in another order
    else:
        assert_tokens_agree(found, expected, decoded_by_xla(variant, None))


OPS = {
    ("mistral", "fp8_per_block"): [
        "block_scaled_matmul",
        "rms_norm_quantize",
        "silu_mul_quantize",
        "decode_attention",
    ],
    ("granitemoe", "fp8_per_tensor"): [
        "scaled_matmul",
        "grouped_scaled_matmul",
        "rms_norm_quantize",
    ],
}


@pytest.mark.parametrize(
    "variant, scheme, op",
    mostly_slow(
        [(*model, op) for model, ops_of in OPS.items() for op in ops_of],
        quick=[
            ("mistral", "fp8_per_block", "rms_norm_quantize"),
            ("mistral", "fp8_per_block", "decode_attention"),
            ("granitemoe", "fp8_per_tensor", "grouped_scaled_matmul"),
        ],
    ),
)
def test_one_interpreted_kernel_in_a_model_of_references_decodes_like_xla(
    monkeypatch, variant, scheme, op
):
    """What a whole model of kernels hides in its error shows when one of them runs alone."""
    ran, why_not = set(), Choice._why_not

    def only_this(choice: Choice, name: str, *arguments: Any, **options: Any) -> str | None:
        reason = why_not(choice, name, *arguments, **options)
        if choice.interpret and name != op:
            return "another kernel runs alone"
        ran.update([name] if reason is None else [])
        return reason

    monkeypatch.setattr(Choice, "_why_not", only_this)
    expected, unquantized = decoded_by_xla(variant, scheme), decoded_by_xla(variant, None)
    found = two_decode_steps(variant, scheme, INTERPRETED)
    assert ran == {op}
    assert_tokens_agree(found, expected, unquantized)


@pytest.mark.parametrize("scheme", mostly_slow(SCHEMES, quick=["fp8_per_block"]))
def test_interpreted_kernels_read_a_prompt_like_xla(scheme):
    tokens = golden("llama31")["token_ids"][:, :5].tolist()
    expected = loaded("llama31", scheme, "xla").logits(tokens)
    found = loaded("llama31", scheme, INTERPRETED).logits(tokens)
    assert_tokens_agree(found, expected, load("llama31").logits(tokens))


def test_interpreted_kernels_generate_the_tokens_of_xla():
    prompts = [
        row[:n].tolist() for row, n in zip(golden("llama31")["token_ids"], (6, 3), strict=False)
    ]
    expected = loaded("llama31", None, "xla").generate(prompts, max_new_tokens=5, temperature=0)
    found = loaded("llama31", None, INTERPRETED).generate(prompts, max_new_tokens=5, temperature=0)
    assert [out.token_ids for out in found] == [out.token_ids for out in expected]


def test_a_model_of_named_kernels_does_not_run_without_a_gpu():
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        loaded("llama31", "fp8_per_block", "triton").logits([[1, 2, 3]])


def test_a_quantized_activation_of_another_granularity_is_refused():
    x = ops.quantize_activation(X, "token")
    assert isinstance(x, QActivation)
    with pytest.raises(
        ValueError, match="quantized per token, but scheme 'fp8_per_block' wants group"
    ):
        ops.scaled_matmul(x, QUANTIZED["fp8_per_block"])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_run_in_their_kernel_and_as_the_reference_says(scheme):
    stack = jnp.asarray(rng.standard_normal((3, 96, 160)), jnp.float32)
    w = fp8jax.quantize(stack, scheme, row_groups=2 if scheme == "fp8_per_block" else 1)
    slots = some_slots()
    # Once: the two quantizers may differ in a code.
    x = ops.quantize_activation(X, w.scheme.activation)

    def run(implementation):
        return experts.grouped_scaled_matmul(
            x, w, slots, out_dtype=jnp.float32, implementation=implementation
        )

    with on("NVIDIA H100 80GB HBM3"):
        assert any("grouped" in name for name in kernels_of(lambda: run("auto")))
    # The same codes, float32 sums in another order.
    assert relative_error(run(INTERPRETED), run("xla")) < 1e-6


def test_a_forward_pass_asks_for_its_device_once(monkeypatch):
    asked, real = [], choice.current_gpu
    monkeypatch.setattr(choice, "current_gpu", lambda: asked.append(1) or real())
    program = offline_models.decode_step("qwen3-30b-a3b", 1, layers=2)
    with on("NVIDIA H100"):
        jax.eval_shape(functools.partial(program.function), *program.arguments)
    assert len(asked) == 1


def test_a_choice_is_taken_as_it_is():
    assert choose(made := Choice(implementation="xla")) is made


def test_operations_carry_the_names_of_the_checkpoint():
    program = offline_models.decode_step("llama-3.1-8b", 1, layers=2, implementation="xla")
    text = jax.jit(program.function).lower(*program.arguments).as_text(debug_info=True)
    for name in ("layers.0/self_attn/qkv_proj", "layers.1/mlp/down_proj", "lm_head"):
        assert f"model/{name}" in text or f"/{name}" in text
