"""The FP8 matmul kernels in interpret mode: they compute what NumPy computes in float64, for every
shape, tile and layout.

Expected values come from NumPy on the dequantized operands, not from the references beside the
kernels; those are tested against the same values here. `calc_diff` = 1 - 2 Σxy / Σ(x² + y²) is the
measure that DeepGEMM and its users quote.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fp8jax.device import GPUS, H100, gpu_named, required_gpu
from fp8jax.pallas_kernels import block_scaled_matmul, matmul_config, matmul_tiles, scaled_matmul
from fp8jax.pallas_kernels.block_scaled_matmul import (
    block_scaled_matmul_reference,
    block_scaled_matmul_triton,
)
from fp8jax.pallas_kernels.matmul_config import Config
from fp8jax.pallas_kernels.scaled_matmul import scaled_matmul_reference, scaled_matmul_triton

E4M3 = ml_dtypes.float8_e4m3fn
BLOCK = 128

# The smallest sizes that are not a tile, one past a tile, k with a short last group, k that is no
# multiple of 16.
SHAPES = [(1, 64, 128), (17, 96, 160), (3, 130, 400), (70, 65, 33)]
CONFIGS = {
    "prefill": Config(block_m=64, block_n=64, block_k=128, group_m=1),
    "swapped": Config(block_m=16, block_n=64, block_k=128, swap_operands=True),
    "swapped, split": Config(block_m=16, block_n=64, block_k=128, swap_operands=True, split_k=3),
    "split": Config(block_m=32, block_n=32, block_k=128, split_k=2),
}


def calc_diff(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)
    return float(1 - 2 * np.sum(x * y) / np.sum(x * x + y * y))


def codes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(scale=30, size=shape).clip(-448, 448).astype(E4M3)


def scaled_problem(
    seed: int, m: int, n: int, k: int, *, per_channel: bool = False
) -> tuple[list[np.ndarray], np.ndarray]:
    """Operands and their product in float64."""
    rng = np.random.default_rng(seed)
    x, w = codes(rng, m, k), codes(rng, n, k)
    x_scale = rng.uniform(0.5, 2, (m, 1)).astype(np.float32)
    w_scale = rng.uniform(0.5, 2, (n, 1) if per_channel else (1,)).astype(np.float32)
    dequantized = w.astype(np.float64) * w_scale.astype(np.float64).reshape(-1, 1)
    return [x, x_scale, w, w_scale], (x.astype(np.float64) * x_scale) @ dequantized.T


def block_scaled_problem(seed: int, m: int, n: int, k: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Operands and their product in float64."""
    rng = np.random.default_rng(seed)
    groups, blocks = -(-k // BLOCK), -(-n // BLOCK)
    x, w = codes(rng, m, k), codes(rng, n, k)
    x_scale = rng.uniform(0.5, 2, (m, groups)).astype(np.float32)
    w_scale = rng.uniform(0.5, 2, (blocks, groups)).astype(np.float32)
    x_wide = x.astype(np.float64) * x_scale[:, np.arange(k) // BLOCK]
    w_wide = (
        w.astype(np.float64)
        * w_scale[np.arange(n)[:, None] // BLOCK, np.arange(k)[None, :] // BLOCK]
    )
    return [x, x_scale, w, w_scale], x_wide @ w_wide.T


def scaled(operands, **options) -> np.ndarray:
    return np.asarray(scaled_matmul_triton(*map(jnp.asarray, operands), interpret=True, **options))


def block_scaled(operands, **options) -> np.ndarray:
    return np.asarray(
        block_scaled_matmul_triton(*map(jnp.asarray, operands), interpret=True, **options)
    )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scaled_matmul_is_the_float64_product_of_the_dequantized_operands(shape, config):
    operands, expected = scaled_problem(sum(shape), *shape)
    out = scaled(operands, config=config, out_dtype=jnp.float32)
    assert (
        calc_diff(out, expected) < 1e-10
    )  # float32 rounding only: interpret mode has no short accumulator; measured 1e-14


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_scaled_matmul_is_the_float64_product_of_the_dequantized_operands(shape, config):
    operands, expected = block_scaled_problem(sum(shape), *shape)
    out = block_scaled(operands, config=config, out_dtype=jnp.float32)
    assert calc_diff(out, expected) < 1e-10  # as above


@pytest.mark.parametrize("shape", [(17, 96, 160), (3, 130, 400)], ids=str)
def test_the_references_are_the_float64_product_too(shape):
    operands, expected = scaled_problem(1, *shape, per_channel=True)
    out = scaled_matmul_reference(*map(jnp.asarray, operands), out_dtype=jnp.float32)
    assert calc_diff(np.asarray(out), expected) < 1e-10  # float32 rounding
    operands, expected = block_scaled_problem(1, *shape)
    out = block_scaled_matmul_reference(*map(jnp.asarray, operands), out_dtype=jnp.float32)
    assert calc_diff(np.asarray(out), expected) < 1e-10  # float32 rounding


@pytest.mark.parametrize("promotion", ["none", "tensor_core", "separate"])
def test_every_promotion_adds_up_all_of_k(promotion):
    operands, expected = scaled_problem(2, 5, 40, 700)
    config = Config(block_m=16, block_n=32, block_k=256, promotion=promotion, split_k=2)
    assert (
        calc_diff(scaled(operands, config=config, out_dtype=jnp.float32), expected) < 1e-10
    )  # float32 rounding


def test_one_scale_an_output_channel_and_one_scale_for_all_rows():
    operands, expected = scaled_problem(3, 20, 70, 130, per_channel=True)
    assert (
        calc_diff(scaled(operands, config=CONFIGS["swapped"], out_dtype=jnp.float32), expected)
        < 1e-10
    )  # float32 rounding
    x, x_scale, w, w_scale = operands
    one = np.asarray([0.75], np.float32)
    out = scaled([x, one, w, w_scale], config=CONFIGS["prefill"], out_dtype=jnp.float32)
    assert calc_diff(out, expected / x_scale * 0.75) < 1e-10  # float32 rounding


@pytest.mark.parametrize("m", [3, 65])
def test_without_a_config_the_default_runs(m):
    operands, expected = scaled_problem(16, m, 200, 1100)
    assert calc_diff(scaled(operands, out_dtype=jnp.float32), expected) < 1e-10  # float32 rounding
    operands, expected = block_scaled_problem(16, m, 200, 1100)
    assert (
        calc_diff(block_scaled(operands, out_dtype=jnp.float32), expected) < 1e-10
    )  # float32 rounding


def test_activation_scales_may_come_transposed():
    operands, _ = block_scaled_problem(4, 9, 140, 300)
    x, x_scale, w, w_scale = operands
    plain = block_scaled(operands, config=CONFIGS["swapped"])
    transposed = block_scaled(
        [x, x_scale.T.copy(), w, w_scale], config=CONFIGS["swapped"], x_scale_layout="gm"
    )
    np.testing.assert_array_equal(plain, transposed)


@pytest.mark.parametrize(
    "run, problem",
    [(scaled, scaled_problem), (block_scaled, block_scaled_problem)],
    ids=["scaled", "block"],
)
@pytest.mark.parametrize("split_k", [1, 2])
def test_bias_is_added_once_before_the_cast(run, problem, split_k):
    operands, product = problem(5, 6, 70, 260)
    bias = np.random.default_rng(5).normal(scale=1e5, size=70).astype(np.float32)
    config = Config(block_m=16, block_n=64, block_k=128, split_k=split_k)
    out = run(operands, config=config, bias=jnp.asarray(bias), out_dtype=jnp.float32)
    assert (
        calc_diff(out - bias, product) < 1e-7
    )  # float32 rounding of sums that the bias has made ten times larger


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_outputs_are_the_float32_result_rounded_once(dtype):
    operands, _ = scaled_problem(6, 5, 33, 128)
    operands[1] *= np.float32(1e-3)  # products fit float16
    for config in (CONFIGS["prefill"], CONFIGS["swapped, split"]):
        wide = scaled(operands, config=config, out_dtype=jnp.float32)
        narrow = scaled(operands, config=config, out_dtype=dtype)
        np.testing.assert_array_equal(narrow, wide.astype(dtype))


@pytest.mark.parametrize(
    "config", [CONFIGS["prefill"], CONFIGS["swapped, split"]], ids=["prefill", "swapped, split"]
)
def test_a_row_does_not_depend_on_the_other_rows(config):
    for run, problem in ((scaled, scaled_problem), (block_scaled, block_scaled_problem)):
        operands, _ = problem(7, 20, 70, 300)
        before = run(operands, config=config, out_dtype=jnp.float32)
        others = np.arange(20) != 11
        operands[0][others] = codes(np.random.default_rng(8), 19, 300)
        operands[1][others] *= np.float32(100)
        after = run(operands, config=config, out_dtype=jnp.float32)
        np.testing.assert_array_equal(before[11], after[11])
        assert (before[others] != after[others]).any()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("op", ["scaled", "block_scaled"])
def test_margins_are_neither_read_nor_written_and_everything_inside_is_written(op, config):
    """Interpret mode drops stores outside an array, so the arrays are larger than the problem, with
    NaN in the margins."""
    from jax.experimental import pallas as pl

    m, n, k = 19, 70, 300
    problem = matmul_tiles.Problem(m, n, k, config)
    if op == "scaled":
        (x, x_scale, w, w_scale), expected = scaled_problem(10, m, n, k, per_channel=True)
        kernel = scaled_matmul.kernel_of(problem, scale_per_row=True, scale_per_channel=True)
        x_scale, w_scale = x_scale[:, 0], w_scale[:, 0]
    else:
        (x, x_scale, w, w_scale), expected = block_scaled_problem(10, m, n, k)
        kernel = block_scaled_matmul.kernel_of(problem, "mg")
    bias = np.zeros(n, np.float32)
    margin = 150  # more than a tile

    def poisoned(a: np.ndarray) -> jax.Array:
        larger = np.full([size + margin for size in a.shape], np.nan, np.float32).astype(a.dtype)
        larger[tuple(slice(size) for size in a.shape)] = a
        return jnp.asarray(larger)

    operands = [poisoned(a) for a in (x, x_scale, w, w_scale, bias)]
    splits = config.splits(k)[0]
    poison = jnp.full((splits * m + margin, n + margin), jnp.nan, jnp.float32)
    out = pl.pallas_call(
        lambda *refs: kernel(*refs[:5], refs[-1]),
        out_shape=jax.ShapeDtypeStruct(poison.shape, poison.dtype),
        grid=(problem.programs,),
        input_output_aliases={5: 0},
        interpret=True,
    )(*operands, poison)
    inside = np.asarray(out)[: splits * m, :n]
    assert np.isfinite(inside).all()
    assert np.isnan(np.asarray(out)[splits * m :]).all()
    assert np.isnan(np.asarray(out)[:, n:]).all()
    assert calc_diff(inside.reshape(splits, m, n).sum(0), expected) < 1e-10  # float32 rounding


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_no_row_beyond_the_end_of_an_operand_is_addressed(config, monkeypatch):
    """What such a row gives is never stored, so reading it would not show above: here it poisons
    the whole tile."""
    load = matmul_tiles.load_operand

    def load_or_poison(ref, rows, *where):
        tile = load(ref, rows, *where)
        return jnp.where(jnp.any(rows >= ref.shape[0]), jnp.full_like(tile, jnp.nan), tile)

    monkeypatch.setattr(matmul_tiles, "load_operand", load_or_poison)
    m, n, k = 19, 70, 200
    operands, expected = scaled_problem(15, m, n, k)
    problem = matmul_tiles.Problem(m, n, k, config)
    kernel = scaled_matmul.kernel_of(problem, scale_per_row=True, scale_per_channel=False)
    x, x_scale, w, w_scale = map(jnp.asarray, operands)
    # Not through the jitted function, which may have been traced with the loads of before.
    out = matmul_tiles.launch(
        kernel,
        problem,
        [x, x_scale[:, 0], w, w_scale],
        out_dtype=jnp.float32,
        name="scaled_matmul",
        interpret=True,
    )
    assert calc_diff(np.asarray(out).sum(0), expected) < 1e-10  # float32 rounding


def test_partials_add_up_to_the_product():
    config = CONFIGS["swapped, split"]
    operands, expected = scaled_problem(11, 5, 70, 700)
    bias = np.full(70, 3e5, np.float32)
    partials = scaled_matmul.scaled_matmul_partials(
        *map(jnp.asarray, operands), bias=jnp.asarray(bias), config=config, interpret=True
    )
    assert partials.shape == (3, 5, 70)
    assert partials.dtype == jnp.float32
    assert calc_diff(np.asarray(partials).sum(0), expected + bias) < 1e-10  # float32 rounding
    operands, expected = block_scaled_problem(11, 5, 70, 700)
    partials = block_scaled_matmul.block_scaled_matmul_partials(
        *map(jnp.asarray, operands), config=config, interpret=True
    )
    assert calc_diff(np.asarray(partials).sum(0), expected) < 1e-10  # float32 rounding


def test_no_split_is_empty():
    config = Config(block_m=16, block_n=64, block_k=128, split_k=8)
    assert config.splits(9 * 128) == (
        5,
        2,
    )  # eight splits of one or two steps would be uneven: five, of which the last has one
    assert config.splits(100) == (1, 1)


def test_no_rows_give_no_rows():
    x, w = jnp.zeros((0, 128), jnp.float8_e4m3fn), jnp.zeros((64, 128), jnp.float8_e4m3fn)
    one = jnp.ones((1,), jnp.float32)
    assert scaled_matmul_triton(x, one, w, one, interpret=True).shape == (0, 64)


@pytest.mark.parametrize("m", [1, 40, 100, 2000])
@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS if gpu.name in ("H200", "L40S", "B200")])
def test_default_configs_fit_the_kernels(gpu, m):
    for n, k in ((4096, 4096), (7168, 18432), (576, 7168), (100, 200)):
        for module in (scaled_matmul, block_scaled_matmul):
            config = module.default_config(gpu, m, n, k)
            config.check()
            operands = (config.block_m + config.block_n) * config.block_k
            if gpu.architecture == "ada":
                assert (config.num_stages - 1) * operands <= 101376  # shared memory of an Ada block
            else:
                assert (
                    config.num_stages * operands + 1024 <= 232448
                )  # of a Hopper or Blackwell block
                if config.swap_operands:
                    assert config.block_n >= 64  # wgmma wants 64 rows on the left
                else:
                    assert config.block_m >= 64
            if module is block_scaled_matmul:
                assert config.block_k == BLOCK
                assert config.promotion == "none"
            elif k >= 8192 and gpu.architecture != "blackwell":
                assert config.promotion != "none"


def test_a_device_without_fp8_tensor_cores_is_refused_before_tracing():
    for name in ("NVIDIA A100-SXM4-40GB", "Tesla T4", "AMD Instinct MI300X"):
        assert "FP8" in (scaled_matmul.why_not(gpu_named(name), 16, 4096, 4096) or "")
    assert scaled_matmul.why_not(gpu_named("NVIDIA L40S"), 16, 4096, 4096) is None


def test_arrays_whose_offsets_would_overflow_are_refused():
    for m, n, k, named in ((1, 32 * 28672, 4096, "w"), (2**20, 64, 4096, "x")):
        reason = block_scaled_matmul.why_not(H100, m, n, k) or ""
        assert reason.startswith(named)
        assert "4 GiB" in reason
    two_gib = 2**19, 4096  # the last offset still fits
    assert scaled_matmul.why_not(H100, 1, *two_gib) is None


def test_without_a_gpu_the_kernel_says_so():
    operands, _ = scaled_problem(12, 4, 64, 128)
    with pytest.raises(NotImplementedError, match="implementation='xla'"):
        scaled_matmul_triton(*map(jnp.asarray, operands))


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: np.zeros((4, 100), E4M3)}, r"x \[m, k\] is \(4, 100\) and w \[n, k\] is \(64, 128\)"),
        ({0: np.zeros((4, 128), np.float32)}, "float8_e4m3fn codes, got x float32"),
        ({1: np.ones((3, 1), np.float32)}, r"x_scale is \(3, 1\)"),
        ({3: np.ones((5,), np.float32)}, r"w_scale is \(5,\)"),
    ],
)
def test_operands_that_do_not_belong_together_are_named(change, message):
    operands, _ = scaled_problem(13, 4, 64, 128)
    for index, array in change.items():
        operands[index] = array
    with pytest.raises(ValueError, match=message):
        scaled(operands)


def test_configs_that_cannot_work_are_named():
    operands, _ = block_scaled_problem(14, 4, 64, 128)
    good = functools.partial(Config, block_m=16, block_n=64, block_k=128)
    with pytest.raises(ValueError, match="block_m is 24"):
        block_scaled(operands, config=good(block_m=24))
    with pytest.raises(ValueError, match="block_k must be 128"):
        block_scaled(operands, config=good(block_k=64))
    with pytest.raises(ValueError, match="out_dtype 'int8'"):
        block_scaled(operands, config=good(), out_dtype=jnp.int8)
    with pytest.raises(ValueError, match=r"x_scale is \(4, 1\)"):
        block_scaled(operands, config=good(), x_scale_layout="gm")


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 17, 64, 200, 2048])
@pytest.mark.parametrize("precise", [False, True])
def test_scaled_matmul_on_a_gpu(m, precise):
    n, k = 4096 + 72, 4096 + 16
    operands, expected = scaled_problem(m, m, n, k)
    gpu = required_gpu("scaled_matmul")
    config = matmul_config.default_scaled_config(gpu, m, n, k, precise=precise)
    run = functools.partial(
        scaled_matmul_triton, *map(jnp.asarray, operands), config=config, out_dtype=jnp.float32
    )
    out = np.asarray(run())
    bound = (
        1e-5 if precise else 1e-4
    )  # a simulated 13-bit accumulator gives 7e-9 and 5e-6 at this k
    assert calc_diff(out, expected) <= bound
    for _ in range(5):
        np.testing.assert_array_equal(np.asarray(run()), out)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 17, 64, 200, 2048])
def test_block_scaled_matmul_on_a_gpu(m):
    operands, expected = block_scaled_problem(m, m, 4096 + 72, 4096 + 16)
    operands[1] = operands[1].T.copy()
    run = functools.partial(
        block_scaled_matmul_triton,
        *map(jnp.asarray, operands),
        x_scale_layout="gm",
        out_dtype=jnp.float32,
    )
    out = np.asarray(run())
    assert (
        calc_diff(out, expected) <= 1e-5
    )  # groups are promoted: a simulated 13-bit accumulator gives 7e-9
    for _ in range(5):
        np.testing.assert_array_equal(np.asarray(run()), out)
