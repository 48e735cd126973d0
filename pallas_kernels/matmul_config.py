"""Tiles of the FP8 matmul kernels, and which to take where nothing was measured.

A program computes `[block_m, block_n]` outputs in steps of block_k along k. Three shapes of work:

- **Prefill**, many rows: large tiles, since each byte from L2 should feed as many products as
  registers allow. The grid is one-dimensional and visits group_m row tiles per column tile, so that
  the weight tile is still in L2 when the next row tile wants it.
- **Decode**, m ≤ 64: the weight is read once and nothing else matters. Hopper's and Blackwell's
  instructions want 64 rows on the left, so the operands are swapped: weights left, tokens right,
  and a token tile of 16 wastes nothing that costs.
- **Few tiles**: below about two programs an SM the memory pipes stay idle, so k is split. Each
  split writes float32 partial sums `[split_k, m, n]`, added up afterwards in a fixed order:
  deterministic, which atomics are not.

The figures below come from compiling offline (registers, spills, shared memory, blocks per SM;
tests/test_offline_matmul.py) and from published tunings. No GPU has timed them yet: a tuned table
is to replace them where there is one.
"""

from dataclasses import dataclass, replace
from typing import Literal

from fp8jax.device import Architecture, Gpu, needs_gpu
from fp8jax.pallas_kernels.formats import BLOCK, unaddressable

Promotion = Literal["none", "tensor_core", "separate"]

# What Hopper's short accumulator loses grows with k (calc_diff 5e-6 at 4096, 8e-5 at 16384,
# simulated); from here on the promoted kernel is the default.
PROMOTE_FROM_K = 8192
_SMALLEST_SPLIT = 512  # of k: fewer steps than this do not fill the pipeline of copies
_MOST_SPLITS = 8

# How each keeps the bits of a long sum. Blackwell's accumulator is wide; Ada's is as short as
# Hopper's, but heeds no attribute.
PROMOTIONS: dict[Architecture, Promotion] = {
    "hopper": "tensor_core",
    "ada": "separate",
    "blackwell": "none",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """How one matmul is cut up.

    Args:
        block_m: rows of x in a tile; powers of two, as the other two.
        block_n: rows of w, that is outputs, in a tile.
        block_k: inputs of a step.
        num_warps: warps of a program.
        num_stages: steps whose tiles are in shared memory or on their way.
        split_k: programs that share the k of one tile.
        swap_operands: the weight tile is the left operand of the tensor cores.
        group_m: row tiles that share a column tile while it is in L2.
        promotion: how `scaled_matmul` keeps the bits of a long sum. "none": one running sum in the
            tensor core. "tensor_core": it adds to a float32 register every 128 inputs (an attribute
            that only Hopper heeds). "separate": every step starts from zero and is added outside,
            on any GPU. `block_scaled_matmul` always does the last, since each step has scales of
            its own.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    split_k: int = 1
    swap_operands: bool = False
    group_m: int = 8
    promotion: Promotion = "none"

    def check(self) -> None:
        """Raise ValueError for what no kernel can run."""
        for name in ("block_m", "block_n", "block_k"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"Config.{name} is {size}, wanted a power of two of at least 16")
        for name in ("num_warps", "num_stages", "split_k", "group_m"):
            if getattr(self, name) < 1:
                raise ValueError(f"Config.{name} is {getattr(self, name)}, wanted at least 1")
        if self.promotion not in ("none", "tensor_core", "separate"):
            raise ValueError(
                f"Config.promotion is {self.promotion!r}; choose 'none', 'tensor_core' or "
                "'separate'"
            )

    def splits(self, k: int) -> tuple[int, int]:
        """How many splits there really are, none of them empty, and steps in each (the last may
        have fewer)."""
        steps = -(-k // self.block_k)
        per_split = -(-steps // min(self.split_k, steps))
        return -(-steps // per_split), per_split


def why_not(gpu: Gpu | None, m: int, n: int, k: int) -> str | None:
    """Why no FP8 matmul kernel runs there, or None.

    Args:
        gpu: as `device.current_gpu` finds it.
        m, n, k: rows, outputs, inputs.
    """
    if gpu is None:
        return f"the kernel {needs_gpu()}"
    for name, shape in (("x [m, k]", (m, k)), ("w [n, k]", (n, k))):
        if unaddressable(shape[0] * shape[1]):
            return (
                f"{name} is {list(shape)}: Pallas-Triton addresses one-byte arrays between 2 and 4 "
                "GiB with offsets that overflow; split the array"
            )
    return None


def default_scaled_config(
    gpu: Gpu, m: int, n: int, k: int, *, precise: bool | None = None
) -> Config:
    """A config for `scaled_matmul`.

    Args:
        gpu: what it runs on.
        m, n, k: rows, outputs, inputs.
        precise: promote partial sums; by default from k = 8192 on.
    """
    arch = gpu.architecture
    precise = k >= PROMOTE_FROM_K if precise is None else precise
    if m <= 64:
        config = _decode_config(arch, m)
        # Unaligned copies of steps of 256 spill on Blackwell.
        if arch != "ada" and m <= 16 and k > 256 and k % 16 == 0:
            config = replace(config, block_k=256, num_stages=4)
        elif arch == "ada" and precise and m > 32:
            config = replace(config, num_stages=3)
    else:
        large = Config(block_m=128, block_n=128, block_k=128, num_warps=8, num_stages=3)
        medium = Config(
            block_m=64, block_n=128, block_k=128, num_warps=4, num_stages=4 if arch != "ada" else 3
        )
        candidates = [large, medium, replace(medium, block_n=64)]
        # Promoted, 128×256 spills on Hopper.
        if arch != "ada" and m >= 1024 and not (precise and arch == "hopper"):
            candidates.insert(0, replace(large, block_n=256, num_stages=4))
        config = _largest_that_fills(gpu, candidates, m, n)
    if precise:
        config = replace(config, promotion=PROMOTIONS[arch])
    return _with_splits(gpu, config, m, n, k)


def default_block_scaled_config(gpu: Gpu, m: int, n: int, k: int) -> Config:
    """A config for `block_scaled_matmul`; its step along k is the group of 128.

    Args:
        gpu: what it runs on.
        m, n, k: rows, outputs, inputs.
    """
    arch = gpu.architecture
    if m <= 64:
        config = _decode_config(arch, m)
    elif arch == "ada":
        large = Config(block_m=128, block_n=128, block_k=BLOCK, num_warps=8, num_stages=3)
        small = Config(block_m=64, block_n=64, block_k=BLOCK, num_warps=4, num_stages=4)
        config = _largest_that_fills(gpu, [large, small], m, n)
    else:
        # Each step waits for its own product (its scale is needed), so three programs an SM hide
        # the wait for one another.
        medium = Config(block_m=64, block_n=128, block_k=BLOCK, num_warps=4, num_stages=3)
        config = _largest_that_fills(gpu, [medium, replace(medium, block_n=64, num_stages=4)], m, n)
    return _with_splits(gpu, config, m, n, k)


def _decode_config(arch: Architecture, m: int) -> Config:
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64
    if arch == "ada":  # mma.sync takes 16 rows on the left: no need to swap
        return Config(block_m=block_m, block_n=64, block_k=128, num_warps=4, num_stages=4)
    return Config(
        block_m=block_m, block_n=64, block_k=128, num_warps=4, num_stages=5, swap_operands=True
    )


def _largest_that_fills(gpu: Gpu, candidates: list[Config], m: int, n: int) -> Config:
    """The first candidate with at least a tile an SM, else the last."""
    filling = (config for config in candidates if _tiles(config, m, n) >= gpu.programs_to_fill)
    return next(filling, candidates[-1])


def _tiles(config: Config, m: int, n: int) -> int:
    return -(-m // config.block_m) * -(-n // config.block_n)


def _with_splits(gpu: Gpu, config: Config, m: int, n: int, k: int) -> Config:
    """As many splits, a power of two, as keep the programs within two an SM and each split long
    enough."""
    splits = 1
    while (
        splits < _MOST_SPLITS
        and 2 * splits * _tiles(config, m, n) <= 2 * gpu.programs_to_fill
        and k // (2 * splits) >= _SMALLEST_SPLIT
    ):
        splits *= 2
    return replace(config, split_k=splits)
