"""The kernel that ends gate_up of experts in silu·mul and quantization, interpreted, against the
three kernels it stands for."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden_checkpoints import relative_error
from strict_memory import strict_memory

import fp8jax
from fp8jax.device import H100, gpu_named
from fp8jax.devtools.offline_compile import OfflineCompiler, available
from fp8jax.devtools.shapes import MODELS
from fp8jax.models.config import MoEConfig
from fp8jax.models.moe import Experts
from fp8jax.ops.values import total
from fp8jax.pallas_kernels import grouped_gate_up
from fp8jax.pallas_kernels.expert_routing import sort_by_expert
from fp8jax.pallas_kernels.grouped_gate_up import grouped_gate_up_triton
from fp8jax.pallas_kernels.grouped_matmul import Slots, grouped_scaled_matmul_reference
from fp8jax.pallas_kernels.matmul_config import Config
from fp8jax.pallas_kernels.silu_mul_quantize import silu_mul_quantize_reference
from fp8jax.schemes import SCHEMES

E4M3 = ml_dtypes.float8_e4m3fn
CONFIG = Config(block_m=16, block_n=128, block_k=128, num_warps=4)


@pytest.fixture(scope="module", autouse=True)
def checked_memory():
    with strict_memory():
        yield


def problem(sizes: list[int], *, i: int, k: int, padding: int, m: int = 20) -> dict[str, Any]:
    rng, e, groups = np.random.default_rng(sum(sizes) + k), len(sizes), -(-k // 128)
    codes = {
        name: rng.normal(scale=30, size=shape).clip(-448, 448)
        for name, shape in (("x", (m, k)), ("w", (e, 2 * i, k)))
    }
    arrays = {
        "x": codes["x"].astype(E4M3),
        # gate and up of size 1 to 10, where silu bends
        "x_scale": rng.uniform(0.5, 2, (m, groups)).astype(np.float32) / 100,
        "w": codes["w"].astype(E4M3),
        "w_scale": rng.uniform(0.5, 2, (e, 2 * i // 128, groups)).astype(np.float32) / 100,
    }
    row = jnp.asarray(rng.integers(0, m, sum(sizes) + padding), jnp.int32)
    slots = Slots(jnp.asarray(sizes, jnp.int32), row=row)
    return {name: jnp.asarray(array) for name, array in arrays.items()} | {"slots": slots}


def gate_up_of(arrays: dict[str, Any], dtype: jax.typing.DTypeLike) -> jax.Array:
    return grouped_scaled_matmul_reference(
        **arrays, granularity="block", row_groups=2, out_dtype=jnp.dtype(dtype)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "sizes, i, k, padding, layout",
    [
        ([17, 0, 1, 33], 128, 256, 5, "mg"),
        ([0, 40, 0], 256, 200, 0, "gm"),
        ([0, 0], 128, 128, 7, "mg"),
    ],
)
def test_codes_and_scales_are_those_of_three_steps(sizes, i, k, padding, layout, dtype):
    arrays = problem(sizes, i=i, k=k, padding=padding)
    gate_up = gate_up_of(arrays, jnp.float32)
    codes, scale = silu_mul_quantize_reference(gate_up.astype(dtype), "group")
    if layout == "gm":
        arrays["x_scale"] = arrays["x_scale"].T
    slots = arrays["slots"]
    # Padding is not looked at.
    arrays["slots"] = dataclasses.replace(slots, row=slots.row.at[sum(sizes) :].set(2**30))
    found, found_scale = grouped_gate_up_triton(
        **arrays, dtype=dtype, x_scale_layout=layout, config=CONFIG, interpret=True
    )
    assert not np.asarray(found, np.float32)[sum(sizes) :].any()
    # float32 sums in another order, which may turn a rounding to bfloat16; that moves a value by
    # 2^-8, and its group's scale.
    np.testing.assert_allclose(found_scale.T, scale, rtol=2**-7 if dtype == "bfloat16" else 2**-18)
    wide = np.asarray(found, np.float32) * np.repeat(np.asarray(found_scale).T, 128, axis=1)
    expected = np.asarray(codes, np.float32) * np.repeat(np.asarray(scale), 128, axis=1)
    # A code off by one step is 1/8 of its value at most; few are. Measured: 0 (float32) and 2e-3
    # (bfloat16).
    assert np.linalg.norm(wide - expected) <= 0.01 * np.linalg.norm(expected)


def experts_of(e: int, i: int, h: int) -> Experts:
    config = MoEConfig(
        num_experts=e,
        top_k=2,
        intermediate_size=i,
        softmax_over="all",
        renormalise=True,
        weight_dtype="float32",
        names=(),
    )
    experts, rng = Experts(config, h, dtype="float32"), np.random.default_rng(0)
    make = functools.partial(fp8jax.quantize, scheme=SCHEMES["fp8_per_block"])
    experts.gate_up_proj = make(
        jnp.asarray(rng.normal(size=(e, 2 * i, h)) / h**0.5, jnp.float32), row_groups=2
    )
    experts.down_proj = make(jnp.asarray(rng.normal(size=(e, h, i)) / i**0.5, jnp.float32))
    return experts


@pytest.mark.slow
def test_a_long_prompt_takes_it_and_gets_what_xla_gives():
    experts, rng, t = experts_of(2, 128, 128), np.random.default_rng(1), 80
    x = jnp.asarray(rng.normal(size=(t, 128)), jnp.float32)
    chosen = jnp.asarray(np.stack([rng.permutation(2) for _ in range(t)]), jnp.int32)
    slots = sort_by_expert(chosen, jnp.full((t, 2), 0.5, jnp.float32), 2)
    expected = experts(x, slots, implementation="xla")
    assert isinstance(expected, jax.Array)
    run = functools.partial(experts, slots=slots, implementation="triton_interpreted")
    assert "grouped_gate_up" in str(jax.make_jaxpr(lambda x: total(run(x)))(x))
    found = total(run(x))
    # Codes that the two sums round apart, as between any two float32 implementations.
    assert relative_error(found, expected) <= 0.01


def test_it_is_for_prompts_that_give_an_expert_64_slots_but_not_256():
    slots = (128, 8191, 8192, 32767, 32768)
    pays = [grouped_gate_up.pays(count, 128) for count in slots]
    assert pays == [False, False, True, True, False]


def test_what_does_not_fit_is_refused_with_its_reason():
    for kind, slots, n, k, reason in (
        ("NVIDIA H100", 512, 2 * 192, 256, "192 wide"),
        ("NVIDIA L40", 512, 512, 256, "Ada"),
        ("NVIDIA H100", 0, 512, 256, "at least one slot"),
        ("NVIDIA H100", 512, 2 * 2**15, 2**13, "between 2 and 4 GiB"),
    ):
        assert reason in (grouped_gate_up.why_not(gpu_named(kind), 64, slots, 8, n, k) or "")
    assert grouped_gate_up.why_not(H100, 64, 512, 8, 512, 256) is None
    arrays = problem([3, 4], i=128, k=128, padding=0)
    with pytest.raises(ValueError, match=r"w_scale is \(2, 1, 1\)"):
        grouped_gate_up_triton(**arrays | {"w_scale": arrays["w_scale"][:, :1]}, interpret=True)
    wrong = Config(block_m=16, block_n=64, block_k=128)
    with pytest.raises(ValueError, match="block_n and block_k must be 128"):
        grouped_gate_up_triton(**arrays, config=wrong, interpret=True)


@pytest.mark.parametrize("device", ["h100", "b200"])
def test_a_prompt_of_qwen3_moe_compiles_to_fp8_tensor_cores_without_spills(device):
    if reason := available():
        pytest.skip(reason)
    with OfflineCompiler() as compiler:
        arguments = {
            "model": "qwen3-30b-a3b",
            "batch": 1,
            "tokens": 2048,
            "scheme": "fp8_per_block",
            "layers": 1,
        }
        report = compiler.compile(device, "fp8jax.devtools.offline_models:prefill", arguments)
    kernel = report.kernels["grouped_gate_up"]
    assert kernel.fp8_only and not kernel.spill_bytes and set(kernel.copy_widths) == {"16"}
    slots, numbers = 2048 * 8, MODELS["qwen3-30b-a3b"]
    tiles = 128 + -(-(slots - 128) // 64)  # the static bound
    assert kernel.grid == (tiles * numbers["moe_intermediate_size"] // 128, 1, 1)
    assert not any(name.startswith("silu_mul") for name in report.launches)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_on_a_gpu_it_agrees_with_three_steps(dtype):
    arrays = problem([200, 0, 70, 500], i=768, k=2048, padding=30, m=300)
    gate_up = gate_up_of(arrays, dtype)
    codes, scale = silu_mul_quantize_reference(gate_up, "group")
    found, found_scale = grouped_gate_up_triton(**arrays, dtype=dtype)
    np.testing.assert_allclose(found_scale.T, scale, rtol=2**-6)  # one or two steps of bfloat16
    wide = np.asarray(found, np.float32) * np.repeat(np.asarray(found_scale).T, 128, axis=1)
    expected = np.asarray(codes, np.float32) * np.repeat(np.asarray(scale), 128, axis=1)
    # Codes off by one step, as above.
    assert np.linalg.norm(wide - expected) <= 0.02 * np.linalg.norm(expected)
