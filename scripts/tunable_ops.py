"""What there is to tune: kernels on shapes, each with the configs worth timing, its operands, and
the result to compare with.

A case is one kernel on one shape. Configs come in the order default, then the rest; how partial
sums are promoted is a matter of accuracy and stays as the default has it. Two regimes, as in
`pallas_kernels/matmul_config.py`:

    few rows (m ≤ 64)    one tile of tokens, which the default has right; the weight's tile, the
                         pipeline and the splits are open
    many rows            tiles of 64 or 128 rows, whose accumulators fill the registers but do not
                         overflow them

For experts, rows are those that an expert gets if the slots spread evenly. There k is never split:
every expert in use is a tile of its own. An uneven routing gives some experts more rows, so tiles
of twice the even share are tried, too.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

import benchmark_matmul
import benchmark_moe
import jax

from fp8jax.device import Gpu
from fp8jax.devtools.benchmarking import Contender
from fp8jax.pallas_kernels import block_scaled_matmul, grouped_matmul, scaled_matmul
from fp8jax.pallas_kernels.formats import BLOCK, WeightGranularity
from fp8jax.pallas_kernels.matmul_config import Config

DenseOp = Literal["scaled_matmul", "block_scaled_matmul"]
OPS = ("scaled_matmul", "block_scaled_matmul", "grouped_scaled_matmul")
SHAPES = {
    **benchmark_matmul.SHAPES,
    **benchmark_moe.SHAPES,
}  # by name; one name may stand for linear layers, experts or both
_SMALLEST_SPLIT = 512  # of k: fewer steps do not fill the pipeline
_ACCUMULATORS = (32, 64, 128)  # of a thread


class Case(Protocol):
    """One kernel on one shape."""

    @property
    def op(self) -> str: ...

    @property
    def shape(self) -> Mapping[str, int | str]:
        """As the tuned table names it."""
        ...

    def candidates(self, gpu: Gpu) -> list[Config]:
        """The default config and, behind it, what is worth timing."""
        ...

    @property
    def contender(self) -> Contender:
        """Operands, and the kernel; its `run` takes `config`."""
        ...

    def reference(self, *operands: Any) -> jax.Array:
        """The XLA path on the contender's operands."""
        ...

    def program(self, config: Config) -> tuple[str, dict[str, Any]]:
        """What the offline compiler takes."""
        ...

    def tile(self, config: Config) -> tuple[Any, ...]:
        """All that the compiled kernel's registers and instructions depend on."""
        ...


@dataclasses.dataclass(frozen=True)
class DenseCase:
    """A product of m rows with a weight `[n, k]`."""

    op: DenseOp
    m: int
    n: int
    k: int

    @property
    def shape(self) -> dict[str, int | str]:
        return {"m": self.m, "n": self.n, "k": self.k}

    def candidates(self, gpu: Gpu) -> list[Config]:
        m, k, block = self.m, self.k, self.op == "block_scaled_matmul"
        default = (block_scaled_matmul if block else scaled_matmul).default_config(
            gpu, m, self.n, k
        )
        if m <= 64:
            splits = {
                split_k
                for split_k in (1, 2, 4, 8)
                if split_k == 1 or k // split_k >= _SMALLEST_SPLIT
            }
            choices = {
                "block_n": (32, 64, 128),
                "block_k": (128, 256),
                "num_warps": (4,),
                "num_stages": (3, 4, 5, 6),
                "split_k": sorted(splits | {default.split_k}),
            }
        else:
            choices = {
                "block_m": (64, 128),
                "block_n": (64, 128, 256),
                "num_warps": (4, 8),
                "num_stages": (3, 4),
            }
        found = [c for c in _combinations(default, choices) if _worth_timing(c, k, block=block)]
        return list(dict.fromkeys([default, *(c for c in found if m <= 64 or _fills_registers(c))]))

    @property
    def contender(self) -> Contender:
        name = "per_tensor" if self.op == "scaled_matmul" else "per_block"
        return dict(benchmark_matmul.contenders(self.m, self.n, self.k))[name]

    def reference(self, *operands: Any) -> jax.Array:
        x, x_scale, w, w_scale = operands
        if self.op == "scaled_matmul":
            return scaled_matmul.scaled_matmul_reference(x, x_scale, w, w_scale)
        return block_scaled_matmul.block_scaled_matmul_reference(
            x, x_scale.T, w, w_scale
        )  # made in the layout "gm"

    def program(self, config: Config) -> tuple[str, dict[str, Any]]:
        arguments = {"op": self.op, **self.shape, "config": dataclasses.asdict(config)}
        return "fp8jax.devtools.offline_programs:matmul", arguments

    def tile(self, config: Config) -> tuple[Any, ...]:
        return self.op, dataclasses.replace(config, split_k=1), self.m % config.block_m == 0


@dataclasses.dataclass(frozen=True)
class ExpertCase:
    """A product of sorted slots with a stack of experts."""

    product: benchmark_moe.ExpertProduct
    scales: WeightGranularity

    @property
    def op(self) -> str:
        return "grouped_scaled_matmul"

    @property
    def shape(self) -> dict[str, int | str]:
        return self.product.tuned_shape(self.scales)

    def candidates(self, gpu: Gpu) -> list[Config]:
        p, block = self.product, self.scales == "block"
        default = grouped_matmul.default_config(
            gpu, p.slots, p.experts, p.n, p.k, row_groups=p.row_groups, scales=self.scales
        )
        share = -(-p.slots // p.experts)
        choices = {
            "block_m": (64, 128),
            "block_n": (64, 128),
            "num_warps": (4, 8),
            "num_stages": (3, 4),
        }
        few = {
            "block_n": (32, 64, 128),
            "block_k": (128, 256),
            "num_warps": (4,),
            "num_stages": (3, 4, 5, 6),
        }
        found = list(_combinations(default, {"block_m": (16, 32), **few})) if share <= 64 else []
        if share > 16:
            found += [
                c
                for c in _combinations(default, choices | {"block_k": (BLOCK,)})
                if _fills_registers(c)
            ]
        # Hopper and Blackwell want 64 rows on the left, Ada 16: see `matmul_config`.
        swaps = gpu.architecture != "ada"
        found = [dataclasses.replace(c, swap_operands=swaps and c.block_m <= 32) for c in found]
        found = [
            c
            for c in found
            if _worth_timing(c, p.k, block=block) and c.block_n <= max(64, p.n // p.row_groups)
        ]
        return list(dict.fromkeys([default, *found]))

    @property
    def contender(self) -> Contender:
        return benchmark_moe.kernel(self.product, self.scales)

    def reference(self, *operands: Any) -> jax.Array:
        x, x_scale, w, w_scale, sizes, per_slot, _work = operands
        slots = benchmark_moe.slots_of(sizes, per_slot, gathered=self.product.gathered)
        return grouped_matmul.grouped_scaled_matmul_reference(
            x,
            x_scale,
            w,
            w_scale,
            slots,
            granularity=self.scales,
            row_groups=self.product.row_groups,
        )

    def program(self, config: Config) -> tuple[str, dict[str, Any]]:
        p = self.product
        sizes = {"tokens": p.tokens, "top_k": p.top_k, "num_experts": p.experts, "n": p.n, "k": p.k}
        arguments = {
            "scales": self.scales,
            **sizes,
            "row_groups": p.row_groups,
            "gathered": p.gathered,
        }
        return "fp8jax.devtools.offline_programs:grouped_matmul", arguments | {
            "config": dataclasses.asdict(config)
        }

    def tile(self, config: Config) -> tuple[Any, ...]:
        p = self.product
        ragged = p.k % config.block_k == 0, p.n // p.row_groups % config.block_n == 0
        return self.op, self.scales, p.gathered, config, *ragged


def cases_of(
    names: list[str], rows: list[int], tokens: list[int], ops: list[str]
) -> Iterator[Case]:
    """In the order in which they are tuned: linear layers, each m over all layers and ops; then
    experts in the same way.

    Args:
        names: keys of `SHAPES`.
        rows: of linear layers.
        tokens: of batches that meet experts.
        ops: of `OPS`.
    """
    dense: list[DenseOp] = [op for op in ("scaled_matmul", "block_scaled_matmul") if op in ops]
    for m, name in itertools.product(rows, names):
        for (n, k), op in itertools.product(benchmark_matmul.SHAPES.get(name, {}).values(), dense):
            yield DenseCase(op, m, n, k)
    experts = [
        name for name in names if name in benchmark_moe.SHAPES and "grouped_scaled_matmul" in ops
    ]
    scales: tuple[WeightGranularity, ...] = ("tensor", "block")
    for t, name, layer, of_weights in itertools.product(
        tokens, experts, ("gate_up", "down"), scales
    ):
        yield ExpertCase(benchmark_moe.product_of(name, layer, t), of_weights)


def _combinations(default: Config, choices: Mapping[str, Any]) -> Iterator[Config]:
    """The default with every combination of these fields."""
    for values in itertools.product(*choices.values()):
        yield dataclasses.replace(default, **dict(zip(choices, values, strict=True)))


def _worth_timing(config: Config, k: int, *, block: bool) -> bool:
    if config.block_k > max(k, BLOCK) or (
        block and (config.block_k > BLOCK or config.block_n > BLOCK)
    ):
        return False
    return (
        not config.swap_operands or config.block_n >= 64
    )  # weights are on the left there, which wants 64 rows


def _fills_registers(config: Config) -> bool:
    return config.block_m * config.block_n // (32 * config.num_warps) in _ACCUMULATORS
