"""The scripts that inspect, time and tune kernels: each runs on a CPU on tiny shapes, and does not
do work twice.

Most run in this process, because what is slow about them is starting Python and compiling
interpreted kernels.
"""

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax.device import H100
from fp8jax.devtools import benchmarking, offline_compile
from fp8jax.devtools.benchmarking import ResultFile
from fp8jax.devtools.offline_targets import TARGETS
from fp8jax.devtools.shapes import EXPERT_SHAPES
from fp8jax.models import CausalLM
from fp8jax.pallas_kernels import tuning
from fp8jax.pallas_kernels.matmul_config import Config

ROOT = Path(__file__).resolve().parent.parent


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


# timing


def test_every_call_of_a_timing_gets_its_own_operands_and_really_runs():
    seen = []

    def function(x):
        jax.debug.callback(lambda value: seen.append(float(value)), x.sum())
        return x + 1

    timing = benchmarking.time_calls(
        function, [(jnp.full(4, i, jnp.float32),) for i in range(3)], rounds=2, samples=2
    )
    jax.effects_barrier()
    runs = 1 + 1 + 2  # the first one, the one that sets the depth, the samples
    assert sorted(seen) == sorted([0.0, 4.0, 8.0] * 2 * runs)
    assert (timing.calls, timing.samples) == (6, 2)
    assert timing.microseconds > 0


def test_operands_come_round_only_after_twice_the_cache():
    count, l2 = benchmarking.sets_needed(16 * 2**20, H100)
    assert (l2, (count - 1) * 16 * 2**20 >= 2 * 50 * 2**20) == ("cold", True)
    assert benchmarking.sets_needed(2**30, H100) == (2, "cold")
    assert benchmarking.sets_needed(4096, H100)[1] == "warm"  # 25 000 sets would be needed


def test_the_roofline_is_the_slower_of_arithmetic_and_memory():
    device = replace(H100, bandwidth=1e12, bf16_flops=1e14, fp8_flops=2e14)
    assert benchmarking.floor_microseconds(
        device, flops=1e9, bytes_moved=1e7, operands="fp8"
    ) == pytest.approx(10)
    assert benchmarking.floor_microseconds(
        device, flops=1e10, bytes_moved=1e7, operands="fp8"
    ) == pytest.approx(50)
    assert benchmarking.floor_microseconds(
        device, flops=1e10, bytes_moved=1e7, operands="bf16"
    ) == pytest.approx(100)
    for unknown in (None, replace(device, bandwidth=None), replace(device, fp8_flops=None)):
        assert (
            benchmarking.floor_microseconds(unknown, flops=1e9, bytes_moved=1e7, operands="fp8")
            is None
        )


def test_results_are_continued_on_the_same_device_only(tmp_path):
    path = tmp_path / "folder" / "r.json"
    ResultFile(path, title="t", device="cpu").add({"m": 1, "us": 2.0})
    again = ResultFile(path, title="t", device="cpu")
    found = again.find(m=1)
    assert found is not None and found["us"] == 2.0 and found["date"] == benchmarking.today()
    assert again.find(m=2) is None
    with pytest.raises(ValueError, match="name another file"):
        ResultFile(path, title="t", device="NVIDIA H100 80GB HBM3")


# matrix products


def test_matmul_benchmark_times_each_contender_once(script, tmp_path, capsys):
    benchmark = script("benchmark_matmul")
    wanted = "bf16,per_tensor,quantize_token,per_block_with_quantize"
    options = {
        "shapes": "tiny",
        "m": "3",
        "only": wanted,
        "samples": 2,
        "json_file": tmp_path / "r.json",
    }
    benchmark.main(**options, minutes=10)
    summary = last_json(capsys)
    assert summary["rows"] == 4
    assert set(summary["times_bf16"]["decode m <= 16"]) == set(wanted.split(",")) - {
        "quantize_token"
    }
    written = json.loads((tmp_path / "r.json").read_text())
    assert sorted(row["contender"] for row in written["rows"]) == sorted(wanted.split(","))
    for row in written["rows"]:
        assert row["microseconds"] > 0
        assert row["share_of_roofline"] is None  # nobody knows a CPU's

    before = (tmp_path / "r.json").read_text()
    benchmark.main(**options, minutes=10)
    assert (tmp_path / "r.json").read_text() == before


def test_what_the_matmul_benchmark_runs_is_the_product(script):
    """A benchmark of something else than it says would be worthless."""
    benchmark = script("benchmark_matmul")
    m, n, k = 3, 256, 256
    for name, contender in benchmark.contenders(m, n, k):
        operands = contender.make(jax.random.key(0))
        out = contender.run(*operands)
        if name.startswith("quantize"):
            codes, scale = out
            spread = (
                scale.T if name.endswith("token") else jnp.repeat(scale, 128, axis=0)
            )  # layout gm
            spread = scale if name.endswith("token") else spread.T
            values, expected = (
                np.asarray(codes, np.float64) * np.asarray(spread, np.float64),
                np.asarray(operands[0], np.float64),
            )
        else:
            x, w = operands[0], operands[-2] if len(operands) > 2 else operands[-1]
            quantized = 1 if name == "bf16" else 1 / 80  # the scale of each quantized operand
            x_scale = 1 if x.dtype == jnp.bfloat16 else quantized
            expected = (np.asarray(x, np.float64) * x_scale) @ (
                np.asarray(w, np.float64) * quantized
            ).T
            values = np.asarray(out, np.float64)
        error = np.linalg.norm(values - expected) / np.linalg.norm(expected)
        # codes have 3 mantissa bits: 2.6 % root mean square for each quantization done here;
        # bfloat16 output 0.3 %
        assert error < (0.04 if "quantize" in name else 0.005), name


def timed(contender: str, m: int) -> offline_compile.Program:
    """For the offline compiler: three calls of a contender, as they are timed on a GPU."""
    sys.path.insert(0, str(ROOT / "scripts"))
    benchmark = importlib.import_module("benchmark_matmul")
    chosen = dict(benchmark.contenders(m, 4096, 4096))[contender]
    operands = jax.eval_shape(lambda: chosen.make(jax.random.key(0)))
    return offline_compile.Program(benchmarking.one_after_another(chosen.run), ([operands] * 3,))


@pytest.mark.skipif(
    offline_compile.available() is not None, reason=f"{offline_compile.available()}"
)
def test_calls_of_a_timing_stay_apart_and_in_order_and_nothing_else_is_launched():
    expected = {
        ("cublaslt_fp8", 4096): ["kCublasLtMatmul"],
        ("per_tensor", 4096): ["scaled_matmul"],
        ("per_tensor", 16): ["scaled_matmul", "loop_convert_fusion"],  # the sum of its splits
        ("per_block_with_quantize", 4096): ["quantize_group", "block_scaled_matmul"],
        ("quantize_token", 4096): ["quantize_token"],
    }
    with offline_compile.OfflineCompiler() as compiler:
        for (contender, m), launches in expected.items():
            arguments = {"contender": contender, "m": m}
            report = compiler.compile("h100", "tests.test_kernel_scripts:timed", arguments)
            names = [re.sub(r"_\d+$", "", name) for name in report.launches]
            assert names == launches * 3, (contender, m)


def test_an_unknown_shape_is_said(script):
    with pytest.raises(SystemExit, match="unknown shapes.*tiny"):
        script("benchmark_matmul").main(
            shapes="llama", m="1", only="", samples=1, minutes=1, json_file=None
        )


# tuning


def tune_options(tmp_path: Path, **changes) -> dict:
    options = {
        "shapes": "tiny",
        "m": "16",
        "op": "scaled_matmul",
        "minutes": 10,
        "most": 2,
        "samples": 1,
    }
    return (
        options
        | {
            "device": "",
            "plan": None,
            "json_file": tmp_path / "t.json",
            "tuned": tmp_path / "tuned",
        }
        | changes
    )


def test_tuning_writes_a_table_with_its_measurement_and_does_not_repeat_it(
    script, tmp_path, capsys
):
    tune = script("tune_kernels")
    tune.main(**tune_options(tmp_path))
    assert last_json(capsys)["finished_now"] == 1
    (entry,) = tuning.load("cpu", "scaled_matmul", folder=tmp_path / "tuned")
    assert entry.shape == {"m": 16, "n": 256, "k": 256}
    assert entry.candidates == 2
    assert (
        entry.microseconds > 0
        and entry.xla_microseconds
        and entry.versions["jax"] == jax.__version__
    )
    timed = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert dict(entry.config) in [row["config"] for row in timed]
    tune.main(**tune_options(tmp_path))
    assert last_json(capsys)["finished_now"] == 0


def test_tuning_stops_when_time_is_up_and_goes_on_later(script, tmp_path, capsys):
    tune = script("tune_kernels")
    tune.main(**tune_options(tmp_path, minutes=0))
    assert last_json(capsys)["finished_now"] == 0
    assert not (tmp_path / "tuned").exists()


def test_a_config_with_a_wrong_result_never_wins(script, tmp_path, capsys, monkeypatch):
    tune = script("tune_kernels")

    def wrong(self, x, x_scale, w, w_scale):
        return jnp.ones((x.shape[0], w.shape[0]), jnp.bfloat16)

    monkeypatch.setattr(script("tunable_ops").DenseCase, "reference", wrong)
    tune.main(**tune_options(tmp_path, most=1))
    assert "is wrong" in capsys.readouterr().out
    assert tuning.load("cpu", "scaled_matmul", folder=tmp_path / "tuned") == ()


def test_calc_diff_of_nan_is_no_agreement(script):
    calc_diff = script("tune_kernels").calc_diff
    x = jnp.asarray([1.0, 2.0, 3.0])
    assert calc_diff(x, x) < 1e-6  # float32 sums of equal terms
    assert calc_diff(x, x.at[1].set(jnp.nan)) == float("inf")
    assert calc_diff(x, -x) > 1


def test_times_of_a_cpu_do_not_get_into_the_packaged_tables(script, tmp_path):
    with pytest.raises(SystemExit, match="no GPU here"):
        script("tune_kernels").main(**tune_options(tmp_path, tuned=tuning.TUNED))


@pytest.mark.parametrize("op", ["scaled_matmul", "block_scaled_matmul"])
@pytest.mark.parametrize("m", [1, 64, 65, 4096])
@pytest.mark.parametrize("device", ["h100", "l40"])
def test_candidates_begin_with_the_default_and_keep_its_accuracy(script, op, m, device):
    gpu = TARGETS[device]
    module = importlib.import_module(f"fp8jax.pallas_kernels.{op}")
    for k in (4096, 14336):
        found = script("tunable_ops").DenseCase(op, m, 4096, k).candidates(gpu)
        default = module.default_config(gpu, m, 4096, k)
        assert found[0] == default
        assert len(found) == len(set(found)) > 10
        for config in found:
            config.check()
            assert config.promotion == default.promotion
            if op == "block_scaled_matmul":
                assert config.block_k == 128 and config.block_n <= 128


def test_shared_memory_rules_out_tiles_before_they_are_compiled(script):
    fits = script("tune_kernels").fits
    tile = Config(block_m=128, block_n=128, block_k=128, num_warps=8, num_stages=4)
    assert fits(tile, TARGETS["h100"])  # 128 KiB of 227
    assert fits(tile, TARGETS["l40"])  # one stage less there: 96 KiB of 99
    assert not fits(
        Config(block_m=128, block_n=256, block_k=128, num_stages=4), TARGETS["l40"]
    )  # 144 KiB of 99


# whole models


@pytest.mark.parametrize("model", ["tiny", "tiny-moe"])
def test_generate_benchmark_goes_on_from_its_file_and_compares_with_bf16(
    model, script, tmp_path, capsys
):
    benchmark = script("benchmark_generate")
    options = {
        "model": model,
        "batch": "1",
        "prompt": 8,
        "steps": 2,
        "layers": 1,
        "implementation": "auto",
    }
    options |= {"minutes": 10, "json_file": tmp_path / "g.json"}
    benchmark.main(**options, schemes="fp8_per_tensor")
    assert len(last_json(capsys)["rows"]) == 1
    benchmark.main(**options, schemes="fp8_per_tensor,bf16")
    rows = last_json(capsys)["rows"]
    assert [row["scheme"] for row in rows] == ["fp8_per_tensor", "bf16"]
    quantized, plain = rows
    assert quantized["weight_bytes"] < plain["weight_bytes"]
    assert plain["decode_times_bf16"] == 1
    for row in rows:
        assert row["decode_tokens_per_second"] == pytest.approx(1e3 / row["decode_ms"])
        assert row["memory_bytes"] > row["weight_bytes"]


def test_a_filled_model_is_quantized_where_a_loaded_one_would_be(script):
    from fp8jax.qarray import QArray
    from fp8jax.schemes import FP8_PER_BLOCK

    benchmark = script("benchmark_generate")
    config = benchmark.shape_of("tiny", layers=1)
    model = benchmark.filled(config, FP8_PER_BLOCK, benchmark.random_weights())
    (layer,) = model.model.layers
    linears = (
        layer.self_attn.qkv_proj,
        layer.self_attn.o_proj,
        layer.mlp.gate_up_proj,
        layer.mlp.down_proj,
    )
    assert all(isinstance(linear.weight, QArray) for linear in linears)
    for plain in (model.lm_head, model.model.embed_tokens, model.model.norm, layer.input_layernorm):
        assert plain.weight.dtype == jnp.bfloat16
    assert bool(jnp.isfinite(jax.jit(CausalLM.__call__)(model, jnp.asarray([[1, 2, 3]]))).all())


def test_a_step_with_experts_reads_those_it_is_routed_to(script):
    from fp8jax.schemes import FP8_PER_BLOCK

    benchmark = script("benchmark_generate")
    model = benchmark.filled(
        benchmark.shape_of("tiny-moe", layers=2), FP8_PER_BLOCK, benchmark.random_weights()
    )
    codes, scales = (
        4 * 3 * 128 * 256,
        4 * (2 * 2 + 2 * 1) * 4,
    )  # 4 experts of gate, up and down; 4-byte scales of blocks
    # 2 of 4 experts: half of them for one token, a quarter left over for two
    assert benchmark._untouched_expert_bytes(model, 1) == 2 * (codes + scales) / 2
    assert benchmark._untouched_expert_bytes(model, 2) == 2 * (codes + scales) / 4
    dense = benchmark.filled(benchmark.shape_of("tiny", layers=1), None, benchmark.random_weights())
    assert benchmark._untouched_expert_bytes(dense, 1) == 0


@pytest.mark.parametrize(
    "changes, said", [({"model": "llama"}, "llama-3.1-8b"), ({"schemes": "fp9"}, "fp9")]
)
def test_an_unknown_model_or_scheme_is_said(script, changes, said):
    options = {
        "model": "tiny",
        "schemes": "bf16",
        "batch": "1",
        "prompt": 4,
        "steps": 1,
        "layers": 1,
    }
    options |= {"implementation": "auto", "minutes": 1, "json_file": None}
    with pytest.raises(SystemExit, match=said):
        script("benchmark_generate").main(**(options | changes))


# inspection


def inspect_options(**changes) -> dict:
    options = {
        "device": "h100",
        "op": "quantize",
        "model": "llama-3.1-8b",
        "m": "1",
        "step": "",
        "batch": 1,
    }
    return (
        options
        | {"scheme": "fp8_per_tensor", "implementation": "auto", "json_file": None}
        | changes
    )


def test_inspection_says_what_to_install(script, monkeypatch):
    inspect = script("inspect_kernels")
    monkeypatch.setattr(
        inspect, "available", lambda: "no plugin; pip install 'fp8jax[offline-gpu]'"
    )
    with pytest.raises(SystemExit, match=r"pip install 'fp8jax\[offline-gpu\]'"):
        inspect.main(**inspect_options())
    with pytest.raises(SystemExit, match=r"unknown \['a100'\].*h100"):
        inspect.main(**inspect_options(device="a100"))


def test_every_op_of_every_model_has_something_to_inspect(script):
    inspect = script("inspect_kernels")
    for op in inspect.OPS:
        for model in inspect.WIDTHS:
            listed = list(inspect.cases(op, model, "b200", 16))
            of_experts = op in ("route_experts", "grouped_scaled_matmul")
            assert bool(listed) == (model in EXPERT_SHAPES or not of_experts), (op, model)
            rows = (
                16 * EXPERT_SHAPES[model].top_k
                if op == "silu_mul_quantize" and model in EXPERT_SHAPES
                else 16
            )
            assert all(case.arguments["tokens" if of_experts else "m"] == rows for case in listed)


@pytest.mark.skipif(
    offline_compile.available() is not None, reason=f"{offline_compile.available()}"
)
def test_inspection_reports_registers_and_instructions_of_kernels(script, tmp_path):
    inspect = script("inspect_kernels")
    path = tmp_path / "i.json"
    inspect.main(
        **inspect_options(
            op="scaled_matmul,silu_mul_quantize,decode_attention,rope_cache", json_file=path
        )
    )
    found = json.loads(path.read_text())
    assert found["device"] == TARGETS["h100"].kind
    kernels = {row["name"]: row for row in found["kernels"]}
    expected = {"scaled_matmul", "silu_mul_quantize_token", "silu_mul_quantize_group", "rope_cache"}
    assert set(kernels) == expected | {"decode_attention", "decode_attention_merge"}
    assert all(row["registers"] > 0 and row["spill_bytes"] == 0 for row in found["kernels"])
    assert set(kernels["scaled_matmul"]["tensor_cores"]) == {"wgmma.e4m3"}
    assert kernels["scaled_matmul"]["config"]["swap_operands"]


def test_launches_are_counted_by_kind(script):
    kind = script("inspect_kernels")._kind
    assert [
        kind(name) for name in ("loop_add_fusion_12", "scaled_matmul__1", "scaled_matmul", "kCopy")
    ] == [
        "loop_add_fusion",
        "scaled_matmul",
        "scaled_matmul",
        "kCopy",
    ]
