"""The expert kernels as compiled for GPUs that are not here: FP8 tensor cores only, nothing
spilled, copies 16 bytes wide and asynchronous although rows are gathered, a grid of the static
bound, no copy of the stack, and routing in one kernel.

Expert layers of two models (on H100, else of one) at 1, 16 and 512 tokens, both schemes, with the
default config of each device.
"""

import itertools

import pytest

from fp8jax.devtools.offline_targets import TARGETS
from fp8jax.devtools.shapes import EXPERT_SHAPES
from fp8jax.pallas_kernels import grouped_matmul
from fp8jax.pallas_kernels.grouped_matmul_kernel import GroupedProblem

KERNEL = "grouped_scaled_matmul"
PROGRAM = "fp8jax.devtools.offline_programs:grouped_matmul"
DEVICES = ("h100", "b200", "l40")
TOKENS = (1, 16, 512)
MODELS = ("granite-3.0-1b-a400m", "qwen3-30b-a3b")


def arguments_of(model: str, name: str, scales: str, tokens: int) -> dict:
    experts = EXPERT_SHAPES[model]
    num_experts, top_k = experts.num_experts, experts.top_k
    row_groups, n, k = experts.stack(name)
    return {
        "scales": scales,
        "tokens": tokens,
        "top_k": top_k,
        "num_experts": num_experts,
        "n": n,
        "k": k,
        "row_groups": row_groups,
        "gathered": name == "gate_up",
    }


def faults(report, device: str, arguments: dict) -> list[str]:
    kernel = report.kernels[KERNEL]
    slots, num_experts = arguments["tokens"] * arguments["top_k"], arguments["num_experts"]
    n, k, row_groups = arguments["n"], arguments["k"], arguments["row_groups"]
    config = grouped_matmul.default_config(
        TARGETS[device],
        slots,
        num_experts,
        n,
        k,
        row_groups=row_groups,
        scales=arguments["scales"],
    )
    found = []
    if not kernel.fp8_only:
        found.append(f"instructions {dict(kernel.instructions)}")
    if kernel.spill_bytes:
        found.append(f"{kernel.spill_bytes} bytes spilled at {kernel.registers} registers")
    if set(kernel.copy_widths) != {"16"}:
        found.append(f"asynchronous copies by width {dict(kernel.copy_widths)}")
    if kernel.shared_bytes > TARGETS[device].shared_per_block or kernel.blocks_per_sm < 1:
        found.append(
            f"{kernel.shared_bytes} bytes of shared memory, {kernel.blocks_per_sm} blocks an SM"
        )
    if kernel.grid != (GroupedProblem(slots, num_experts, n, k, row_groups, config).programs, 1, 1):
        found.append(f"grid {kernel.grid}")
    if copies := report.buffers_of_at_least(
        n * k
    ):  # one expert's codes; lists of tiles are far smaller
        found.append(f"moves {copies}")
    return found


@pytest.mark.parametrize("scales", ["tensor", "block"])
@pytest.mark.parametrize("device", DEVICES)
def test_expert_layers_compile_to_fp8_tensor_cores_without_spills_or_copies(
    compiler, device, scales
):
    problems = {}
    models = (
        MODELS if device == "h100" else ["qwen3-30b-a3b"]
    )  # the other one has the same tiles in other numbers
    for model, name, tokens in itertools.product(models, ("gate_up", "down"), TOKENS):
        arguments = arguments_of(model, name, scales, tokens)
        if found := faults(compiler.compile(device, PROGRAM, arguments), device, arguments):
            problems[model, name, tokens] = found
    assert not problems


@pytest.mark.parametrize("model", MODELS)
def test_a_decode_step_has_a_tile_for_each_expert_that_can_be_in_use(compiler, model):
    """min(e, t·k) slot tiles times tiles of 64 outputs, counted from the shapes alone."""
    experts = EXPERT_SHAPES[model]
    num_experts, top_k, n = experts.num_experts, experts.top_k, experts.gate_up[1]
    for tokens in (1, num_experts // top_k):
        report = compiler.compile("h100", PROGRAM, arguments_of(model, "gate_up", "block", tokens))
        assert report.kernels[KERNEL].grid == (min(num_experts, tokens * top_k) * (n // 64), 1, 1)


@pytest.mark.parametrize("scales", ["tensor", "block"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 3, "top_k": 2, "num_experts": 8, "n": 2 * 192, "k": 576, "row_groups": 2},
        {"tokens": 300, "top_k": 2, "num_experts": 8, "n": 576, "k": 192, "gathered": False},
        {
            "tokens": 700,
            "top_k": 2,
            "num_experts": 4,
            "n": 2 * 80,
            "k": 576,
            "row_groups": 2,
            "x_scale_layout": "gm",
        },
        {"tokens": 4096, "top_k": 2, "num_experts": 8, "n": 4096, "k": 14336, "gathered": False},
    ],
    ids=["decode, i = 192", "down, i = 192", "i = 80", "mixtral down"],
)
def test_ragged_and_long_shapes_keep_fp8_instructions_and_registers(
    compiler, device, scales, shape
):
    arguments = {"scales": scales, "row_groups": 1} | shape
    assert not faults(compiler.compile(device, PROGRAM, arguments), device, arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens, num_experts, top_k", [(1, 32, 8), (64, 128, 12), (16, 512, 8)])
def test_routing_is_one_kernel_that_keeps_its_tiles_in_registers(
    compiler, device, tokens, num_experts, top_k
):
    arguments = {"tokens": tokens, "num_experts": num_experts, "top_k": top_k}
    report = compiler.compile(device, "fp8jax.devtools.offline_programs:routing", arguments)
    assert report.launches == ("route_experts",)
    assert not report.kernels["route_experts"].spill_bytes, report.kernels


def test_a_tile_too_large_is_seen(compiler):
    """The checks above can fail: block-scaled 128×128 on four warps needs more registers than there
    are."""
    config = {"block_m": 128, "block_n": 128, "block_k": 128, "num_warps": 4, "num_stages": 3}
    arguments = arguments_of("qwen3-30b-a3b", "gate_up", "block", 512)
    report = compiler.compile("h100", PROGRAM, arguments | {"config": config})
    assert {fault.split()[0] for fault in faults(report, "h100", arguments)} >= {"grid"}
    assert any("spilled" in fault for fault in faults(report, "h100", arguments))
