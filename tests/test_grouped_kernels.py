"""The grouped FP8 matmul kernel in interpret mode: each row meets its own expert, for every
routing, tile and layout.

Expected values come from NumPy: float64 products of the dequantized operands, one slot at a time.
All kernels here run in `strict_memory`, where an access outside an array gives NaN.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from strict_memory import strict_memory

from fp8jax.device import GPUS, H100, gpu_named
from fp8jax.pallas_kernels import grouped_matmul
from fp8jax.pallas_kernels.formats import WeightGranularity
from fp8jax.pallas_kernels.grouped_matmul import (
    Slots,
    grouped_scaled_matmul_reference,
    tiles_needed,
    work_list,
)
from fp8jax.pallas_kernels.grouped_matmul_kernel import (
    GroupedProblem,
    grouped_scaled_matmul_triton,
)
from fp8jax.pallas_kernels.matmul_config import Config

E4M3 = ml_dtypes.float8_e4m3fn
BLOCK = 128
SCALES: tuple[WeightGranularity, ...] = ("tensor", "block")
OF_SLOTS = ("sizes", "row", "out_row", "weight", "work")
SWAPPED = Config(block_m=16, block_n=64, block_k=128, swap_operands=True)
PREFILL = Config(block_m=64, block_n=128, block_k=128, group_m=2)


@pytest.fixture(scope="module", autouse=True)
def checked_memory():
    with strict_memory():
        yield


@dataclass
class Problem:
    """Operands and fields of `Slots` by name, and the float64 result in which padding slots are
    zeros."""

    operands: dict[str, np.ndarray]
    row_groups: int
    granularity: WeightGranularity
    expected: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        o = self.operands
        k, width = o["x"].shape[1], o["w"].shape[1] // self.row_groups
        wide_x, wide_w = o["x"].astype(np.float64), o["w"].astype(np.float64)
        if self.granularity != "block":
            wide_x, wide_w = (
                wide_x * o["x_scale"],
                wide_w * o["w_scale"].reshape(len(o["w"]), -1, 1),
            )
        else:
            row = np.arange(o["w"].shape[1])
            block_row = row // width * -(-width // BLOCK) + row % width // BLOCK
            group = np.arange(k) // BLOCK
            wide_x = wide_x * o["x_scale"][:, group]
            wide_w = wide_w * o["w_scale"][:, block_row[:, None], group[None, :]]
        experts = np.repeat(np.arange(len(o["sizes"])), o["sizes"])
        self.expected = np.zeros((len(o["row"]), o["w"].shape[1]))
        for slot, expert in enumerate(experts):
            self.expected[slot] = wide_w[expert] @ wide_x[o["row"][slot]] * o["weight"][slot]

    def arguments(self, *, without: tuple[str, ...] = (), block_m: int = 0) -> dict[str, Any]:
        """What both functions take, but for options; slots without some of their fields."""
        arrays = {name: jnp.asarray(array) for name, array in self.operands.items()}
        fields = {name: arrays.pop(name) for name in OF_SLOTS if name in arrays}
        fields = {name: array for name, array in fields.items() if name not in without}
        return {**arrays, "slots": Slots(**fields, block_m=block_m)} | {
            "granularity": self.granularity,
            "row_groups": self.row_groups,
        }

    def run(
        self,
        function: Callable[..., jax.Array] = grouped_scaled_matmul_triton,
        *,
        without: tuple[str, ...] = (),
        block_m: int = 0,
        **options,
    ) -> np.ndarray:
        if function is grouped_scaled_matmul_triton:
            options["interpret"] = True
        arguments = self.arguments(without=without, block_m=block_m)
        return np.asarray(function(**(arguments | {"out_dtype": jnp.float32} | options)))


def codes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(scale=30, size=shape).clip(-448, 448).astype(E4M3)


def problem_of(
    scales: WeightGranularity,
    sizes: list[int],
    *,
    m: int,
    n: int,
    k: int,
    row_groups: int = 1,
    padding: int = 0,
) -> Problem:
    """Random operands; slots read random rows, `padding` slots belong to no expert."""
    rng = np.random.default_rng(sum(sizes) + m + n + k)
    e, slots, groups = len(sizes), sum(sizes) + padding, -(-k // BLOCK)
    block_rows = row_groups * -(-(n // row_groups) // BLOCK)
    x_shape, w_shape = (m, groups), (e, block_rows, groups)
    if scales != "block":
        x_shape, w_shape = (m, 1), (e,) if scales == "tensor" else (e, n, 1)
    operands = {
        "x": codes(rng, m, k),
        "x_scale": rng.uniform(0.5, 2, x_shape).astype(np.float32),
        "w": codes(rng, e, n, k),
        "w_scale": rng.uniform(0.5, 2, w_shape).astype(np.float32),
        "sizes": np.asarray(sizes, np.int32),
        "row": rng.integers(0, m, slots).astype(np.int32),
        "weight": rng.uniform(0.1, 1, slots).astype(np.float32),
    }
    return Problem(operands, row_groups, scales)


def calc_diff(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)
    return float(1 - 2 * np.sum(x * y) / np.sum(x * x + y * y))


# Of 64 slots and 6 experts, what is left is padding: the kernel is compiled once for all of them.
ROUTINGS = {
    "all tokens to one expert": ([0, 0, 37, 0, 0, 0], 27),
    "experts without a token": ([17, 0, 1, 0, 33, 0], 13),
    "one token": ([0, 1, 0, 1, 0, 0], 62),
    "top_k = e": ([10, 10, 10, 10, 10, 10], 4),
    "full tiles": ([16, 16, 0, 0, 0, 32], 0),
    "no token": ([0, 0, 0, 0, 0, 0], 64),
}


@pytest.mark.parametrize("config", [SWAPPED, PREFILL], ids=["swapped", "prefill"])
@pytest.mark.parametrize("scales", SCALES)
def test_every_routing_gives_the_float64_product_and_zeros_in_padding_whatever_lies_in_its_place(
    scales, config
):
    """Row 0 is what slots outside a tile read, so it is poisoned too; ids of padding slots lie
    outside x."""
    for name, (sizes, padding) in ROUTINGS.items():
        problem = problem_of(scales, sizes, m=12, n=96, k=160, padding=padding)
        o, used = problem.operands, sum(sizes)
        o["row"][:used] = 1 + o["row"][:used] % 11
        problem.__post_init__()
        o["x"][0], o["x_scale"][0] = np.nan, np.nan
        o["row"][used:], o["weight"][used:] = 2**30, np.nan
        out = problem.run(config=config)
        np.testing.assert_array_equal(out[used:], 0, err_msg=name)
        if used:
            # float32 rounding only; measured 1e-14
            assert calc_diff(out, problem.expected) < 1e-10, name


WIDTHS = {
    "gate_up, i = 192, h = 576": {"n": 2 * 192, "k": 576, "row_groups": 2},
    "down, i = 192, h = 576": {"n": 576, "k": 192},
    "gate_up, i = 80, unaligned k": {"n": 2 * 80, "k": 200, "row_groups": 2},
    "three groups": {"n": 3 * 130, "k": 128, "row_groups": 3},
}


@pytest.mark.parametrize(
    "scales, config",
    [
        (s, c)
        for s in (*SCALES, "channel")
        for c in (SWAPPED, PREFILL)
        if (s, c) != ("tensor", PREFILL)
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.block_m} slots",
)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
def test_a_row_group_of_any_width_has_its_own_blocks(widths, scales, config):
    problem = problem_of(scales, [3, 0, 18], m=9, padding=2, **widths)
    out = problem.run(config=config)
    assert calc_diff(out, problem.expected) < 1e-10  # float32 rounding, as above


@pytest.mark.parametrize("scales", SCALES)
def test_without_a_config_the_default_runs(scales):
    problem = problem_of(scales, [3, 0, 18], m=9, n=2 * 80, k=400, row_groups=2)
    assert calc_diff(problem.run(), problem.expected) < 1e-10  # float32 rounding


def test_no_slots_give_no_rows():
    assert problem_of("tensor", [0, 0], m=4, n=64, k=128).run().shape == (0, 64)


@pytest.mark.parametrize("scales", SCALES)
def test_without_ids_slot_i_reads_row_i_and_without_weights_none_is_applied(scales):
    problem = problem_of(scales, [3, 9], m=14, n=64, k=128, padding=2)
    problem.operands["row"] = np.arange(14, dtype=np.int32)
    problem.operands["weight"][:] = 1
    problem.__post_init__()
    out = problem.run(config=SWAPPED, without=("row", "weight"))
    assert calc_diff(out, problem.expected) < 1e-10  # float32 rounding
    np.testing.assert_array_equal(out, problem.run(config=SWAPPED))


@pytest.mark.parametrize(
    "function", [grouped_scaled_matmul_triton, grouped_scaled_matmul_reference]
)
@pytest.mark.parametrize("config", [SWAPPED, PREFILL], ids=["swapped", "prefill"])
def test_slots_go_to_the_rows_they_are_told_to(function, config):
    problem = problem_of("block", [7, 0, 25, 1], m=20, n=96, k=160, padding=3)
    to = np.random.default_rng(5).permutation(36).astype(np.int32)
    problem.operands["out_row"] = to
    options = {"config": config} if function is grouped_scaled_matmul_triton else {}
    scattered = problem.run(function, **options)
    in_order = problem.run(function, without=("out_row",), **options)
    np.testing.assert_array_equal(scattered[to], in_order)
    assert not scattered[to[33:]].any()  # padding


def test_a_list_of_tiles_may_come_ready_made():
    problem = problem_of("tensor", [7, 0, 25, 1], m=20, n=96, k=160, padding=3)
    expected, o = problem.run(config=SWAPPED), problem.operands
    o["work"] = np.array(work_list(jnp.asarray(o["sizes"]), 36, 16))
    np.testing.assert_array_equal(problem.run(config=SWAPPED, block_m=16), expected)
    o["work"][1:3] = 0  # tiles without slots, so that it shows whether the list is read
    assert not np.array_equal(problem.run(config=SWAPPED, block_m=16), expected)
    np.testing.assert_array_equal(problem.run(config=SWAPPED, block_m=32), expected)
    o["work"] = o["work"][:, :3]
    message = r"work is \(4, 3\), wanted \(4, 6\) for tiles of 16 slots"
    with pytest.raises(ValueError, match=message):
        problem.run(config=SWAPPED, block_m=16)


@pytest.mark.parametrize("scales", (*SCALES, "channel"))
def test_kernel_and_reference_agree(scales):
    problem = problem_of(scales, [7, 0, 25, 1], m=20, n=2 * 80, k=200, row_groups=2, padding=3)
    reference = problem.run(grouped_scaled_matmul_reference)
    # float32 rounding on both sides
    assert calc_diff(problem.run(config=SWAPPED), reference) < 1e-10


def test_one_scale_for_all_rows():
    problem = problem_of("tensor", [3, 9], m=6, n=64, k=128)
    problem.operands["x_scale"][:] = 0.75
    problem.__post_init__()
    problem.operands["x_scale"] = np.asarray([0.75], np.float32)
    assert calc_diff(problem.run(config=SWAPPED), problem.expected) < 1e-10  # float32 rounding


def test_activation_scales_may_come_transposed():
    problem = problem_of("block", [3, 9], m=6, n=140, k=300)
    plain = problem.run(config=SWAPPED)
    problem.operands["x_scale"] = problem.operands["x_scale"].T.copy()
    np.testing.assert_array_equal(problem.run(config=SWAPPED, x_scale_layout="gm"), plain)


@pytest.mark.parametrize("promotion", ["none", "tensor_core", "separate"])
def test_every_promotion_adds_up_all_of_k(promotion):
    problem = problem_of("tensor", [5, 2], m=6, n=40, k=700)
    config = Config(block_m=16, block_n=32, block_k=256, promotion=promotion)
    assert calc_diff(problem.run(config=config), problem.expected) < 1e-10  # float32 rounding


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_outputs_are_the_float32_result_rounded_once(dtype):
    problem = problem_of("tensor", [5, 0, 2], m=6, n=33, k=128)
    problem.operands["x_scale"] *= np.float32(1e-3)  # products fit float16
    wide = problem.run(config=SWAPPED)
    np.testing.assert_array_equal(problem.run(config=SWAPPED, out_dtype=dtype), wide.astype(dtype))


@pytest.mark.parametrize("config", [SWAPPED, PREFILL], ids=["swapped", "prefill"])
@pytest.mark.parametrize("scales", SCALES)
def test_a_row_does_not_depend_on_the_other_rows(scales, config):
    problem = problem_of(scales, [5, 21], m=26, n=70, k=300)
    problem.operands["row"] = np.arange(26, dtype=np.int32)
    before = problem.run(config=config)
    others = np.arange(26) != 11
    problem.operands["x"][others] = codes(np.random.default_rng(8), 25, 300)
    problem.operands["x_scale"][others] *= np.float32(100)
    after = problem.run(config=config)
    np.testing.assert_array_equal(before[11], after[11])
    assert (before[others] != after[others]).any()


# --- the grid


@pytest.mark.parametrize("block_m", [16, 32])
@pytest.mark.parametrize("slots, num_experts", [(60, 5), (7, 9)])
def test_every_slot_is_in_exactly_one_tile_and_with_its_own_expert(slots, num_experts, block_m):
    listed = jax.jit(functools.partial(work_list, slots=slots, block_m=block_m))

    @hypothesis.given(st.lists(st.integers(-1, num_experts - 1), min_size=slots, max_size=slots))
    @hypothesis.settings(max_examples=50, deadline=None)
    def check(owners):
        sizes = np.bincount([owner for owner in owners if owner >= 0], minlength=num_experts)
        owner = np.append(
            np.repeat(np.arange(num_experts), sizes), np.full(slots - sizes.sum(), -1)
        )
        seen = []
        for expert, start, end, works in np.asarray(listed(jnp.asarray(sizes, jnp.int32))).T:
            assert end - start <= block_m and works in (0, 1)
            assert (owner[start:end] == (expert if works else -1)).all()
            assert not works or end > start
            seen += range(start, end)
        assert seen == list(range(slots))

    check()


def test_the_grid_is_the_static_bound_and_some_routing_needs_all_of_it():
    for slots, num_experts, tiles in (
        (8, 32, 8),
        (128, 128, 128),
        (128, 32, 32 + 6),
        (1, 1, 1),
        (40, 1, 4),
        (33, 2, 4),
    ):
        problem = GroupedProblem(slots, num_experts, 64, 256, 1, SWAPPED)
        assert problem.slot_tiles == tiles == problem.programs
        assert tiles == tiles_needed(slots, num_experts, 16)
        in_use = min(slots, num_experts)
        worst = [1] * in_use + [0] * (num_experts - in_use)
        worst[0] += slots - in_use
        used = int(np.sum(work_list(jnp.asarray(worst, jnp.int32), slots, 16)[3]))
        # The remainder, if any, is there for padding.
        assert used == in_use + (slots - in_use) // 16


def test_decode_needs_no_tile_beyond_the_experts_in_use():
    sizes = jnp.zeros(128, jnp.int32).at[jnp.asarray([3, 99])].set(jnp.asarray([5, 3], jnp.int32))
    expert, _, _, works = np.asarray(work_list(sizes, 8, 16))
    assert expert[works > 0].tolist() == [3, 99]


# --- what is refused, and what is chosen


@pytest.mark.parametrize("slots", [8, 128, 1024, 4096, 65536])
@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS if gpu.name in ("H200", "L40S", "B200")])
@pytest.mark.parametrize("scales", SCALES)
def test_default_configs_fit_the_kernel(gpu, slots, scales):
    for num_experts, n, k, row_groups in (
        (32, 1024, 1024, 2),
        (128, 2048, 768, 1),
        (8, 28672, 4096, 2),
        (8, 4096, 14336, 1),
    ):
        config = grouped_matmul.default_config(
            gpu, slots, num_experts, n, k, row_groups=row_groups, scales=scales
        )
        config.check()
        share = -(-slots // num_experts)
        assert config.block_m == (
            16 if share <= 16 else 32 if share <= 32 else 64 if share < 256 else 128
        )
        operands = (config.block_m + config.block_n) * config.block_k
        if gpu.architecture == "ada":
            assert (config.num_stages - 1) * operands <= 101376  # shared memory of an Ada block
        else:
            assert config.num_stages * operands + 1024 <= 232448  # of a Hopper or Blackwell block
            left = config.block_n if config.swap_operands else config.block_m
            assert left >= 64  # rows on the left of wgmma
        if scales == "block":
            assert (
                config.block_k == BLOCK and config.block_n <= BLOCK and config.promotion == "none"
            )
        elif k >= 8192 and gpu.architecture != "blackwell":
            assert config.promotion != "none"


def test_stacks_whose_offsets_would_overflow_and_devices_without_fp8_are_refused():
    assert "split the stack" in (grouped_matmul.why_not(H100, 16, 64, 14336, 4096) or "")  # 3.5 GiB
    # 2 GiB: the last offset still fits. 7 GiB: offsets are 64 bits wide.
    assert grouped_matmul.why_not(H100, 16, 128, 4096, 4096) is None
    assert grouped_matmul.why_not(H100, 16, 128, 14336, 4096) is None
    assert "FP8" in (
        grouped_matmul.why_not(gpu_named("NVIDIA A100-SXM4-40GB"), 16, 8, 64, 128) or ""
    )


def test_without_a_gpu_the_kernel_says_so():
    problem = problem_of("tensor", [3, 9], m=6, n=64, k=128)
    with pytest.raises(NotImplementedError, match="implementation='xla'"):
        grouped_scaled_matmul_triton(**problem.arguments())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": np.zeros((6, 100), E4M3)}, r"x \[m, k\] is \(6, 100\)"),
        ({"x": np.zeros((6, 128), np.float32)}, "float8_e4m3fn codes, got x float32"),
        ({"sizes": np.zeros(3, np.int32)}, r"sizes \[e\] is \(3,\)"),
        ({"w_scale": np.ones((2, 2, 1), np.float32)}, r"w_scale is \(2, 2, 1\)"),
        ({"x_scale": np.ones((12, 1), np.float32)}, r"x_scale is \(12, 1\)"),
        ({"weight": np.ones(11, np.float32)}, r"weight is \(11,\), wanted \[12\]"),
        ({"out_row": np.zeros(13, np.int32)}, r"out_row is \(13,\), wanted \[12\]"),
    ],
)
def test_operands_that_do_not_belong_together_are_named(change, message):
    problem = problem_of("block", [3, 9], m=6, n=64, k=128)
    problem.operands |= change
    with pytest.raises(ValueError, match=message):
        problem.run()


@pytest.mark.parametrize(
    "function", [grouped_scaled_matmul_triton, grouped_scaled_matmul_reference]
)
def test_the_granularity_says_what_scales_mean_and_not_their_shape(function):
    problem = problem_of("block", [3, 9], m=6, n=64, k=128)
    with pytest.raises(ValueError, match=r"wanted \(6, 1\) or \(1,\), and \(2,\), for x"):
        problem.run(function, granularity="tensor")
    with pytest.raises(ValueError, match=r"wanted \(6, 1\) or \(1,\), and \(2, 64, 1\), for x"):
        problem.run(function, granularity="channel")


def test_configs_that_cannot_work_are_named():
    good = functools.partial(Config, block_m=16, block_n=64, block_k=128)
    for config, message in (
        (good(split_k=2), "k is not split"),
        (good(block_k=64), "block_k must be 128"),
        (good(block_n=256), "block_n at most 128"),
        (good(block_m=24), "block_m is 24"),
    ):
        with pytest.raises(ValueError, match=message):
            problem_of("block", [3, 9], m=6, n=64, k=128).run(config=config)
    with pytest.raises(ValueError, match="row_groups 3"):
        problem_of("block", [3, 9], m=6, n=64, k=128).run(row_groups=3)


@pytest.mark.gpu
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("tokens", [1, 16, 512, 4096])
@pytest.mark.parametrize(
    "widths", [{"n": 1024, "k": 1024, "row_groups": 2}, {"n": 576, "k": 192}], ids=str
)
def test_grouped_matmul_on_a_gpu(widths, tokens, scales):
    num_experts, top_k, unused = 16, 4, 5
    rng = np.random.default_rng(tokens)
    sizes = rng.multinomial(
        tokens * top_k, np.append(np.full(num_experts - 1, 1 / (num_experts - 1)), 0)
    )
    problem = problem_of(scales, sizes.tolist(), m=tokens, padding=unused, **widths)
    run = functools.partial(
        grouped_scaled_matmul_triton, **problem.arguments(), out_dtype=jnp.float32
    )
    out = np.asarray(run())
    # As for the dense kernels: groups are promoted, a short k is not.
    bound = 1e-5 if scales == "block" else 1e-4
    assert calc_diff(out, problem.expected) <= bound
    np.testing.assert_array_equal(out[-unused:], 0)
    for _ in range(5):
        np.testing.assert_array_equal(np.asarray(run()), out)
