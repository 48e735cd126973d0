"""Expert layers in the benchmark and in tuning: what is timed is the product, what is counted is
right, nothing is done twice."""

import dataclasses
import importlib
import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from fp8jax.devtools import benchmarking, offline_compile
from fp8jax.devtools.offline_targets import TARGETS
from fp8jax.pallas_kernels import grouped_matmul, tuning
from fp8jax.pallas_kernels.matmul_config import Config

ROOT = Path(__file__).resolve().parent.parent
SCALE = 1 / 80  # of every quantized operand of the benchmarks


@pytest.fixture
def benchmark(script):
    return script("benchmark_moe")


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


# the benchmark


def test_expert_benchmark_times_each_contender_once(benchmark, tmp_path, capsys):
    products, blocks = ["bf16", "per_block"], ["block_bf16"]
    options = {"shapes": "tiny", "tokens": "3", "routing": "zipf", "samples": 2, "minutes": 10}
    options |= {"json_file": tmp_path / "r.json", "only": ",".join(products + blocks)}
    benchmark.main(**options)
    summary = last_json(capsys)
    assert set(summary["times_bf16"]["decode tokens <= 16"]) == {*products, *blocks}
    written = json.loads((tmp_path / "r.json").read_text())["rows"]
    expected = [
        *itertools.product(["tiny gate_up", "tiny down"], products),
        *(("tiny block", name) for name in blocks),
    ]
    assert [(row["shape"], row["contender"]) for row in written] == expected
    for row in written:
        assert row["microseconds"] > 0
        assert (row["tokens"], row["routing"], row["experts"]) == (3, "zipf", 4)
        assert (row["config"] is not None) == (row["contender"] == "per_block")

    before = (tmp_path / "r.json").read_text()
    benchmark.main(**options)
    assert (tmp_path / "r.json").read_text() == before


def test_speed_is_relative_to_the_faster_way_in_bf16_and_of_blocks_to_the_block(benchmark):
    times = {
        "bf16": 8.0,
        "bf16_loop": 6.0,
        "per_block": 3.0,
        "block_bf16": 20.0,
        "block_per_block": 5.0,
    }
    rows = [
        {"shape": "s", "tokens": 1, "routing": "same", "contender": c, "microseconds": us}
        for c, us in times.items()
    ]
    rows += [
        {
            "shape": "s",
            "tokens": 1,
            "routing": "same",
            "contender": "per_tensor",
            "error": "RESOURCE_EXHAUSTED",
        }
    ]
    rows += [
        {
            "shape": "s",
            "tokens": 2,
            "routing": "same",
            "contender": "per_tensor",
            "microseconds": 1.0,
        }
    ]
    assert benchmark.ratios(rows) == [0.75, 1, 2, 1, 4, None, None]


def test_bytes_are_those_of_the_experts_touched_and_of_each_operand_once(benchmark):
    """Three tokens to the same two of eight experts, i = 192, h = 576."""
    sizes = {"tokens": 3, "top_k": 2, "experts": 8, "routing": "same"}
    gate_up = benchmark.ExpertProduct(**sizes, n=384, k=576, row_groups=2)
    down = benchmark.ExpertProduct(**sizes, n=576, k=192, row_groups=1)
    of_gate_up, of_down = (
        {name: c.bytes_moved for name, c in benchmark.contenders(p)} for p in (gate_up, down)
    )
    # weights, x (three rows; down reads six), result of six slots
    assert (
        of_gate_up["bf16"]
        == of_gate_up["bf16_loop"]
        == 2 * 2 * 384 * 576 + 2 * 3 * 576 + 2 * 6 * 384
    )
    assert of_down["bf16"] == of_down["bf16_loop"] == 2 * 2 * 576 * 192 + 2 * 6 * 192 + 2 * 6 * 576
    # one scale an expert and a row
    assert of_gate_up["per_tensor"] == 2 * (384 * 576 + 4) + 3 * (576 + 4) + 2 * 6 * 384
    assert of_down["per_tensor"] == 2 * (576 * 192 + 4) + 6 * (192 + 4) + 2 * 6 * 576
    # gate and up have 2 × 5 blocks each, down 5 × 2; five groups a row of x, then two
    assert of_gate_up["per_block"] == 2 * (384 * 576 + 4 * 20) + 3 * (576 + 4 * 5) + 2 * 6 * 384
    assert of_down["per_block"] == 2 * (576 * 192 + 4 * 10) + 6 * (192 + 4 * 2) + 2 * 6 * 576
    blocks = {name: c.bytes_moved for name, c in benchmark.block_contenders(gate_up, down)}
    assert blocks == {
        "block_bf16": 2 * 2 * 3 * 192 * 576 + 2 * 2 * 3 * 576,
        "block_per_tensor": 2 * (3 * 192 * 576 + 8) + 2 * 2 * 3 * 576,
        "block_per_block": 2 * (3 * 192 * 576 + 4 * 30) + 2 * 2 * 3 * 576,
    }
    assert {c.flops for _, c in benchmark.contenders(down)} == {2 * 6 * 576 * 192}
    assert {c.flops for _, c in benchmark.block_contenders(gate_up, down)} == {
        2 * 6 * 3 * 576 * 192
    }


def test_a_token_goes_to_different_experts_and_a_skewed_routing_prefers_the_first(benchmark):
    drawn = {routing: benchmark.choices(routing, 200, 4, 64) for routing in benchmark.ROUTINGS}
    for chosen in drawn.values():
        assert chosen.shape == (200, 4)
        assert all(len(set(row)) == 4 for row in chosen.tolist())
        assert chosen.min() >= 0 and chosen.max() < 64
    of_first = {routing: int((chosen == 0).sum()) for routing, chosen in drawn.items()}
    assert of_first["same"] == 200
    # Expected are 200 · 4/64 = 12.5, standard deviation 3.4; and with 1/j of Σ1/j = 4.74 in the
    # first draw alone 42.
    assert of_first["uniform"] < 30 < 42 < of_first["zipf"]
    assert np.unique(drawn["same"]).tolist() == [0, 1, 2, 3]


def product_by_hand(p, x: np.ndarray, w: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Slots in the order of their experts, within an expert in that of the tokens."""
    slots = sorted((e, t, j) for t, row in enumerate(p.choices.tolist()) for j, e in enumerate(row))
    rows = [x[t] if p.gathered else x[i] for i, (_, t, _) in enumerate(slots)]
    return np.stack(
        [w[e] @ row * weight for (e, _, _), row, weight in zip(slots, rows, weights, strict=True)]
    )


def distance(values, expected: np.ndarray) -> float:
    return float(
        np.linalg.norm(np.asarray(values, np.float64) - expected) / np.linalg.norm(expected)
    )


@pytest.mark.parametrize("layer", ["gate_up", "down"])
def test_what_the_expert_benchmark_runs_is_the_product(benchmark, layer):
    p = benchmark.product_of("tiny", layer, 5, "zipf")
    for name, contender in benchmark.contenders(p):
        x, *middle = contender.make(jax.random.key(0))
        w = middle[0] if name.startswith("bf16") else middle[1]
        scale = 1 if name.startswith("bf16") else SCALE
        stack = np.asarray(w, np.float64) * scale
        stack = stack.transpose(0, 2, 1) if name == "bf16" else stack
        weights = np.full(p.slots, 1.0 if p.gathered else 0.5)
        expected = product_by_hand(p, np.asarray(x, np.float64) * scale, stack, weights)
        out = contender.run(*contender.make(jax.random.key(0)))
        assert distance(out, expected) < 0.005, (
            name
        )  # the result is rounded to bfloat16: 2⁻⁹ at most


def test_what_the_block_contenders_run_is_the_layer(benchmark):
    gate_up, down = (
        benchmark.product_of("tiny", layer, 5, "uniform") for layer in ("gate_up", "down")
    )
    mixing = np.exp(-np.arange(2) / 8) / np.exp(-np.arange(2) / 8).sum()  # logits 4 and 3.875
    for name, contender in benchmark.block_contenders(gate_up, down):
        operands = contender.make(jax.random.key(0))
        x = np.asarray(operands[0], np.float64)
        first, second = (
            np.asarray(stack if name == "block_bf16" else stack.qvalue, np.float64)
            * (1 if name == "block_bf16" else SCALE)
            for stack in operands[2:]
        )
        expected = np.zeros_like(x)
        for t, row in enumerate(gate_up.choices.tolist()):
            for weight, e in zip(mixing, row, strict=True):
                gate, up = np.split(first[e] @ x[t], 2)
                expected[t] += weight * second[e] @ (gate / (1 + np.exp(-gate)) * up)
        # bfloat16: roundings of gate_up, silu·mul and the result, 2⁻⁹ each at most. FP8: codes of x
        # and of the hidden activations are off by 2.6 % root mean square each, and x comes in
        # through gate and through up.
        assert distance(contender.run(*operands), expected) < (
            0.01 if name == "block_bf16" else 0.06
        ), name


def timed(layer: str, contender: str, tokens: int) -> offline_compile.Program:
    """For the offline compiler: three calls of a contender, as they are timed on a GPU."""
    sys.path.insert(0, str(ROOT / "scripts"))
    benchmark = importlib.import_module("benchmark_moe")
    gate_up, down = (
        benchmark.product_of("qwen3-30b-a3b", name, tokens) for name in ("gate_up", "down")
    )
    listed = (
        benchmark.block_contenders(gate_up, down)
        if layer == "block"
        else benchmark.contenders(gate_up)
    )
    chosen = dict(listed)[contender]
    operands = jax.eval_shape(chosen.make, jax.random.key(0))
    return offline_compile.Program(benchmarking.one_after_another(chosen.run), ([operands] * 3,))


@pytest.mark.skipif(
    offline_compile.available() is not None, reason=f"{offline_compile.available()}"
)
def test_a_product_is_one_launch_a_call_and_a_block_is_what_a_model_runs():
    with offline_compile.OfflineCompiler() as compiler:
        for scheme, granularity in (("per_tensor", "token"), ("per_block", "group")):
            product, quantize = "grouped_scaled_matmul", f"quantize_{granularity}"
            block = [
                "route_experts",
                quantize,
                product,
                f"silu_mul_{quantize}",
                product,
                "loop_convert_fusion",
            ]
            for layer, contender, tokens, launches in (
                ("gate_up", scheme, 16, [product]),
                ("gate_up", scheme, 2048, [product]),
                ("block", f"block_{scheme}", 16, block),  # the last adds up a token's experts
            ):
                arguments = {"layer": layer, "contender": contender, "tokens": tokens}
                report = compiler.compile("h100", "tests.test_benchmark_moe:timed", arguments)
                assert [re.sub(r"_+\d+$", "", name) for name in report.launches] == launches * 3, (
                    arguments
                )


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"shapes": "tiny,llama"}, r"unknown shapes \['llama'\].*mixtral-8x7b"),
        ({"routing": "one"}, r"\['one'\].*zipf"),
    ],
)
def test_an_unknown_shape_or_routing_is_said(benchmark, changes, said):
    options = {
        "shapes": "tiny",
        "tokens": "1",
        "routing": "same",
        "samples": 1,
        "minutes": 1,
        "json_file": None,
    }
    with pytest.raises(SystemExit, match=said):
        benchmark.main(**(options | changes))


# tuning


def tune_options(tmp_path: Path, **changes) -> dict:
    options = {
        "shapes": "tiny",
        "tokens": "3",
        "op": "grouped_scaled_matmul",
        "minutes": 10,
        "most": 2,
        "samples": 1,
    }
    return (
        options
        | {"plan": None, "json_file": tmp_path / "t.json", "tuned": tmp_path / "tuned"}
        | changes
    )


@pytest.fixture
def tune(script, monkeypatch):
    """`tune_kernels` with two of the four cases that there are for experts, since interpreted
    kernels take seconds to compile."""
    module, tunable = script("tune_kernels"), script("tunable_ops")
    monkeypatch.setattr(
        module, "cases_of", lambda *arguments: list(tunable.cases_of(*arguments))[1:3]
    )
    return module


def test_experts_are_tuned_after_linear_layers_for_each_product_and_kind_of_scale(script):
    cases = list(
        script("tunable_ops").cases_of(
            ["tiny", "mixtral-8x7b"], [16], [1, 64], list(script("tunable_ops").OPS)
        )
    )
    dense = ["scaled_matmul", "block_scaled_matmul"] * 3  # "tiny" has one layer, Mixtral qkv and o
    assert [case.op for case in cases] == dense + ["grouped_scaled_matmul"] * 16
    found = [
        (case.shape["slots"], case.shape["experts"], case.shape["row_groups"], case.shape["scales"])
        for case in cases[len(dense) :]
    ]
    pairs = [(2, "tensor"), (2, "block"), (1, "tensor"), (1, "block")]
    assert found == [(2 * tokens, e, *pair) for tokens in (1, 64) for e in (4, 8) for pair in pairs]


def test_tuning_experts_writes_entries_that_ops_looks_up_and_does_not_repeat_them(
    tune, tmp_path, capsys
):
    tune.main(**tune_options(tmp_path))
    assert last_json(capsys)["finished_now"] == 2
    entries = tuning.load("cpu", "grouped_scaled_matmul", folder=tmp_path / "tuned")
    wanted = [
        {"slots": 6, "experts": 4, "n": 256, "k": 128, "row_groups": 1, "scales": "tensor"},
        {"slots": 6, "experts": 4, "n": 256, "k": 256, "row_groups": 2, "scales": "block"},
    ]
    assert [dict(entry.shape) for entry in entries] == wanted
    for entry, shape in zip(entries, wanted, strict=True):
        assert tuning.nearest(entries, shape) == entry
        assert entry.candidates == 2
        assert entry.microseconds > 0 and entry.xla_microseconds
        Config(**entry.config).check()
    tune.main(**tune_options(tmp_path))
    assert last_json(capsys)["finished_now"] == 0


def test_a_grouped_config_with_a_wrong_result_never_wins(
    script, tune, tmp_path, capsys, monkeypatch
):
    case = script("tunable_ops").ExpertCase
    right = case.reference
    monkeypatch.setattr(case, "reference", lambda self, *operands: -right(self, *operands))
    tune.main(**tune_options(tmp_path, most=1))
    assert capsys.readouterr().out.count("is wrong") == 2
    assert tuning.load("cpu", "grouped_scaled_matmul", folder=tmp_path / "tuned") == ()


@pytest.mark.parametrize("scales", ["tensor", "block"])
@pytest.mark.parametrize("device", ["h100", "l40"])
def test_candidates_for_experts_begin_with_the_default_and_are_what_the_kernel_takes(
    script, device, scales
):
    tunable, benchmark = script("tunable_ops"), script("benchmark_moe")
    gpu = TARGETS[device]
    for name, layer, tokens in itertools.product(
        ("granite-3.0-1b-a400m", "qwen3-30b-a3b"), ("gate_up", "down"), (1, 16, 64, 256, 2048)
    ):
        p = benchmark.product_of(name, layer, tokens)
        found = tunable.ExpertCase(p, scales).candidates(gpu)
        default = grouped_matmul.default_config(
            gpu, p.slots, p.experts, p.n, p.k, row_groups=p.row_groups, scales=scales
        )
        assert found[0] == default
        assert 5 <= len(found) == len(set(found))
        share = p.slots / p.experts
        assert {c.block_m for c in found} <= (
            {16, 32} if share <= 16 else {16, 32, 64, 128} if share <= 64 else {64, 128}
        )
        for config in found:
            config.check()
            assert (config.split_k, config.promotion) == (1, default.promotion)
            assert config.swap_operands == (device == "h100" and config.block_m <= 32)
            assert config.block_n <= 128 and config.block_m in benchmark.TILE_SIZES
            assert scales == "tensor" or config.block_k == 128


def test_a_plan_keeps_the_configs_that_compile_well_and_tuning_takes_no_others(
    tune, tmp_path, capsys, monkeypatch
):
    asked = []

    class Compiler:
        __enter__ = __exit__ = lambda self, *_: self

        def compile(self, device, program, arguments):
            asked.append((program, arguments))
            spills = 8 if arguments["config"]["num_stages"] != 4 else 0
            kernel = SimpleNamespace(fp8_only=True, spill_bytes=spills, blocks_per_sm=1)
            return SimpleNamespace(kernels={"grouped_scaled_matmul": kernel})

    monkeypatch.setattr(tune, "OfflineCompiler", Compiler)
    monkeypatch.setattr(tune, "available", lambda: None)
    plan = tmp_path / "plan.json"
    tune.main(**tune_options(tmp_path, device="h100", plan=plan))
    printed = last_json(capsys)
    assert (printed["device"], printed["cases"]) == (TARGETS["h100"].kind, 2)
    assert {program for program, _ in asked} == {"fp8jax.devtools.offline_programs:grouped_matmul"}
    assert len({json.dumps(arguments, sort_keys=True) for _, arguments in asked}) == len(asked)
    tune.main(**tune_options(tmp_path, plan=plan, most=1))
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [row["config"]["num_stages"] for row in rows] == [4] * 2


def test_what_is_compiled_for_a_plan_is_what_is_timed(script):
    """The offline program and the benchmark's kernel agree about shapes."""
    tunable, benchmark = script("tunable_ops"), script("benchmark_moe")
    for layer, scales in itertools.product(("gate_up", "down"), ("tensor", "block")):
        case = tunable.ExpertCase(benchmark.product_of("granite-3.0-1b-a400m", layer, 3), scales)
        config = Config(block_m=16, block_n=64, block_k=128)
        place, arguments = case.program(config)
        module, function = place.split(":")
        assert arguments["config"] == dataclasses.asdict(config)
        program = getattr(importlib.import_module(module), function)(**arguments)
        timed = jax.eval_shape(case.contender.make, jax.random.key(0))[: len(program.arguments)]
        assert [(a.shape, a.dtype) for a in timed] == [
            (a.shape, a.dtype) for a in program.arguments
        ]
