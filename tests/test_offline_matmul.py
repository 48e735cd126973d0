"""The matmul kernels as compiled for GPUs that are not here: FP8 tensor cores only, nothing
spilled, copies 16 bytes wide and asynchronous.

Every linear layer of Llama-3.1-8B and -70B, m from 1 to 4096, with the default config of each
device. Kernels that differ in nothing but sizes which the code treats alike are compiled once: that
leaves about 70 of 384. H200 is H100 to the compiler.
"""

import dataclasses

import pytest

from fp8jax.devtools.offline_targets import TARGETS
from fp8jax.devtools.shapes import LINEAR_SHAPES
from fp8jax.pallas_kernels import block_scaled_matmul, scaled_matmul
from fp8jax.pallas_kernels.matmul_config import Config

OPS = {"scaled_matmul": scaled_matmul, "block_scaled_matmul": block_scaled_matmul}
ROWS = (1, 4, 16, 64, 256, 4096)
PROGRAM = "fp8jax.devtools.offline_programs:matmul"


def distinct_kernels(device: str, op: str) -> list[dict]:
    """Arguments of the programs to compile; n and k of all these layers are multiples of every
    tile."""
    kernels = {}
    for shapes in LINEAR_SHAPES.values():
        for n, k in shapes.values():
            for m in ROWS:
                config = OPS[op].default_config(TARGETS[device], m, n, k)
                same_code = (
                    dataclasses.replace(config, split_k=min(config.split_k, 2)),
                    m % config.block_m == 0,
                )
                assert n % config.block_n == k % config.block_k == 0
                kernels.setdefault(same_code, {"op": op, "m": m, "n": n, "k": k})
    return list(kernels.values())


def faults(report, device: str, op: str, *, widths=frozenset({"16"})) -> list[str]:
    kernel = report.kernels[op]
    found = []
    if not kernel.fp8_only:
        found.append(f"instructions {dict(kernel.instructions)}")
    if kernel.spill_bytes:
        found.append(f"{kernel.spill_bytes} bytes spilled at {kernel.registers} registers")
    if set(kernel.copy_widths) != widths:
        found.append(f"asynchronous copies by width {dict(kernel.copy_widths)}")
    if kernel.shared_bytes > TARGETS[device].shared_per_block or kernel.blocks_per_sm < 1:
        found.append(
            f"{kernel.shared_bytes} bytes of shared memory, {kernel.blocks_per_sm} blocks an SM"
        )
    return found


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", ["h100", "b200", "l40"])
def test_llama_layers_compile_to_fp8_tensor_cores_without_spills(compiler, device, op):
    problems = {}
    for arguments in distinct_kernels(device, op):
        report = compiler.compile(device, PROGRAM, arguments)
        if found := faults(report, device, op):
            problems[str(arguments)] = found
        splits = (
            OPS[op]
            .default_config(TARGETS[device], arguments["m"], arguments["n"], arguments["k"])
            .split_k
        )
        if len(report.launches) != (
            2 if splits > 1 else 1
        ):  # the sum of the splits is the only other kernel
            problems[str(arguments)] = [f"launches {report.launches}"]
    assert not problems


def test_h200_gets_the_kernels_of_h100(compiler):
    arguments = {"op": "scaled_matmul", "m": 16, "n": 4096, "k": 4096}
    h100, h200 = (
        compiler.compile(device, PROGRAM, arguments).kernels["scaled_matmul"]
        for device in ("h100", "h200")
    )
    assert h100 == h200
    for op, module in OPS.items():
        for m in ROWS:
            for n, k in LINEAR_SHAPES["llama-3.1-8b"].values():
                configs = [
                    module.default_config(TARGETS[device], m, n, k) for device in ("h100", "h200")
                ]
                assert configs[0] == configs[1], (op, m, n, k)


@pytest.mark.parametrize("device", ["h100", "b200", "l40"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "ragged, widths",
    [
        ({"m": 3, "n": 7176, "k": 592, "bias": True, "out_dtype": "float32"}, {"16"}),
        (
            {"m": 1000, "n": 2112 + 8, "k": 7168, "per_channel": True, "x_scale_layout": "mg"},
            {"16"},
        ),
        (
            {"m": 1000, "n": 4096, "k": 3884},
            {"4"},
        ),  # the documented exception: k is no multiple of 16
    ],
    ids=["decode", "prefill", "unaligned k"],
)
def test_ragged_shapes_keep_fp8_instructions_and_registers(compiler, device, op, ragged, widths):
    assert not faults(
        compiler.compile(device, PROGRAM, {"op": op, **ragged}),
        device,
        op,
        widths=frozenset(widths),
    )


def test_promotion_costs_one_float32_addition_an_output_and_128_inputs(compiler):
    def additions(promotion: str, block_k: int) -> int:
        config = Config(block_m=64, block_n=128, block_k=block_k, num_stages=3, promotion=promotion)  # pyright: ignore
        arguments = {
            "op": "scaled_matmul",
            "m": 4096,
            "n": 4096,
            "k": 16384,
            "config": dataclasses.asdict(config),
        }
        return (
            compiler.compile("h100", PROGRAM, arguments)
            .kernels["scaled_matmul"]
            .instructions.get("float32 add", 0)
        )

    # 64·128 outputs over 128 threads are 64 a thread.
    assert (
        additions("none", 128),
        additions("tensor_core", 128),
        additions("tensor_core", 256),
    ) == (0, 64, 128)


def test_a_tile_too_large_is_seen(compiler):
    """The checks above can fail: block-scaled 128×128 on four warps needs more registers than there
    are."""
    config = dataclasses.asdict(
        Config(block_m=128, block_n=128, block_k=128, num_warps=4, num_stages=3)
    )
    report = compiler.compile(
        "h100",
        PROGRAM,
        {"op": "block_scaled_matmul", "m": 4096, "n": 4096, "k": 4096, "config": config},
    )
    assert any("spilled" in fault for fault in faults(report, "h100", "block_scaled_matmul"))
