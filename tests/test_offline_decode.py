"""A decode step of Llama-3.1-8B, and of two mixtures of experts, as compiled for an H100 that is
not here: few kernels, nothing large moved.

Full widths and two layers, all others being alike; a cache of 8192 tokens.
"""

import math

import pytest
from golden_checkpoints import SCHEMES

from fp8jax.devtools.offline_compile import OfflineCompiler
from fp8jax.devtools.offline_report import CompileReport
from fp8jax.devtools.shapes import EXPERT_SHAPES, LINEAR_SHAPES, MODELS

LAYERS, LENGTH = 2, 8192
NUMBERS = MODELS["llama-3.1-8b"]
SMALLEST_WEIGHT = NUMBERS["hidden_size"] ** 2  # o_proj's codes
SIDE_OF_CACHE = (
    NUMBERS["num_key_value_heads"] * LENGTH * NUMBERS["head_dim"] * 2
)  # a row's keys in one layer, bfloat16


def decode_step(compiler: OfflineCompiler, **arguments) -> CompileReport:
    arguments = {"model": "llama-3.1-8b", "layers": LAYERS, "cache_length": LENGTH} | arguments
    return compiler.compile("h100", "fp8jax.devtools.offline_models:decode_step", arguments)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("batch", [1, 16])
def test_a_layer_is_ten_kernels_and_nothing_as_large_as_a_weight_is_moved(compiler, batch, scheme):
    report = decode_step(compiler, batch=batch, scheme=scheme)
    assert "kCopy" not in report.launches and "kMemset" not in report.launches
    ropes = [place for place, name in enumerate(report.launches) if name.startswith("rope_cache")]
    assert len(ropes) == LAYERS
    # From one layer's rope to the next one's lies a whole layer. Attention is two of its kernels.
    assert ropes[1] - ropes[0] == 10, report.launches
    # Beside the layers: embedding, cos and sin, the final norm, lm_head.
    assert len(report.launches) - 10 * LAYERS <= 8, report.launches
    # The logits are an output. What is left are activations, and parts of split products and of
    # attention.
    assert report.bytes_by_use["temporary"] < 2**20
    check_nothing_large_moves(report, SMALLEST_WEIGHT, 2 * LAYERS * batch * SIDE_OF_CACHE)


def check_nothing_large_moves(
    report: CompileReport, smallest_weight: int, cache_bytes: int
) -> None:
    assert not report.buffers_of_at_least(smallest_weight)
    assert report.bytes_by_use["aliased"] == cache_bytes  # updated in place
    matmuls = {name: kernel for name, kernel in report.kernels.items() if "scaled_matmul" in name}
    assert matmuls and all(kernel.fp8_only for kernel in matmuls.values())
    assert not [name for name, kernel in report.kernels.items() if kernel.spill_bytes]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("model", ["granite-3.0-1b-a400m", "qwen3-30b-a3b"])
def test_a_layer_with_experts_is_twelve_kernels_and_its_grid_is_the_static_bound(
    compiler, model, batch, scheme
):
    report, numbers = decode_step(compiler, model=model, batch=batch, scheme=scheme), MODELS[model]
    ropes = [place for place, name in enumerate(report.launches) if name.startswith("rope_cache")]
    layer = report.launches[ropes[0] : ropes[1]]
    assert len(layer) == (12 if batch == 1 else 13), (
        layer
    )  # at batch 16 XLA makes two of the router's product
    experts, linears = EXPERT_SHAPES[model], LINEAR_SHAPES[model].values()
    num_experts, top_k = experts.num_experts, experts.top_k
    stacks = [experts.gate_up[1:], experts.down[1:]]
    # At batch 16 a prompt's worth of float32 logits is larger than a small expert, and no weight.
    smallest = max(
        min(n * k for n, k in [*linears, *stacks]), 4 * batch * numbers["vocab_size"] + 1
    )
    head_dim = numbers.get("head_dim", numbers["hidden_size"] // numbers["num_attention_heads"])
    cache = 2 * LAYERS * batch * LENGTH * numbers["num_key_value_heads"] * head_dim * 2
    check_nothing_large_moves(report, smallest, cache)

    slots = batch * top_k
    in_use = min(num_experts, slots)
    slot_tiles = in_use + math.ceil(
        (slots - in_use) / 16
    )  # a tile is 16 slots of one expert; the static bound
    grouped = [kernel for name, kernel in report.kernels.items() if name.startswith("grouped")]
    columns = [n // 64 for n, _ in stacks]
    assert sorted(kernel.grid for kernel in grouped) == sorted(
        (slot_tiles * tiles, 1, 1) for tiles in columns
    ), grouped


def test_the_references_take_more_than_twelve_kernels_a_layer(compiler):
    """What the fusions are for, and the count above can fail."""
    launches = [
        len(decode_step(compiler, batch=1, layers=n, implementation="xla").launches) for n in (1, 2)
    ]
    assert launches[1] - launches[0] > 12
