"""How fast expert layers are: the two grouped products and the whole block, in FP8 beside BF16.

    python scripts/benchmark_moe.py --shapes qwen3-30b-a3b --tokens 1,16,2048 --json FILE
    JAX_PLATFORMS=cpu python scripts/benchmark_moe.py --shapes tiny --tokens 2      # that it runs

    bf16                        XLA's `ragged_dot` of gathered rows, with stacks laid out as it
                                likes them, [e, k, n]
    bf16_loop                   one product a tile, in a loop: what an unquantized model runs here
    per_tensor, per_block       the grouped kernel on quantized rows and stacks
    block_bf16, block_per_…     all behind the router's product: choose, sort, gate_up, silu·mul,
                                down, weighted
                                sum; in FP8 with the quantization of both activations

gate_up reads tokens by id, down reads slot by slot and weighs the result. The list of tiles, which
a model makes once when it routes, is an operand of the FP8 products and part of the blocks. On GPUs
XLA makes one product over all experts of a `ragged_dot`, of e times the work (seen in what it
compiles offline), so "× BF16" is relative to the faster of the two BF16 ways; that of a block to
`block_bf16`.

    uniform     every expert is as likely as another
    zipf        expert j is as likely as 1/(j + 1)
    same        every token goes to the same top_k experts, the fewest that a batch can touch

A token's experts are different ones, drawn by a fixed seed. Roofline: weights of the experts that
the routing touches, x, scales and the result count once, and so do the products of r = tokens .
top_k rows. `fp8jax.devtools.benchmarking` says how time is taken. On a CPU the kernels run
interpreted and times mean nothing.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import typer
from benchmark_matmul import (
    CODE_SPREAD,
    JsonFile,
    Minutes,
    Only,
    Samples,
    config_gpu,
    opened,
    parts,
    random_operand,
    table_of,
    tuned_config,
)
from flax import nnx
from jax import lax
from rich.console import Console

from fp8jax.device import current_device_kind
from fp8jax.devtools import benchmarking
from fp8jax.devtools.benchmarking import Contender, Deadline, ResultFile
from fp8jax.devtools.shapes import EXPERT_SHAPES, TINY_EXPERTS
from fp8jax.models.config import MoEConfig
from fp8jax.models.moe import Experts
from fp8jax.ops.choice import choose
from fp8jax.ops.experts import route
from fp8jax.ops.values import total
from fp8jax.pallas_kernels import grouped_matmul
from fp8jax.pallas_kernels.formats import BLOCK, WeightGranularity
from fp8jax.pallas_kernels.grouped_matmul import Slots, grouped_matmul_reference, work_list
from fp8jax.pallas_kernels.grouped_matmul_kernel import grouped_scaled_matmul_triton
from fp8jax.pallas_kernels.matmul_config import Config
from fp8jax.qarray import QArray
from fp8jax.schemes import FP8_PER_BLOCK, FP8_PER_TENSOR, Scheme

SHAPES = EXPERT_SHAPES | {"tiny": TINY_EXPERTS}
ROUTINGS = ("uniform", "zipf", "same")
Routing = Literal["uniform", "zipf", "same"]
TILE_SIZES = (16, 32, 64, 128)  # slots a tile, of all configs there are
_SCHEMES: dict[WeightGranularity, Scheme] = {"tensor": FP8_PER_TENSOR, "block": FP8_PER_BLOCK}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertProduct:
    """One product of a batch with the stack `[experts, n, k]`; that with two row groups is gate_up,
    the other is down."""

    tokens: int
    top_k: int
    experts: int
    n: int
    k: int
    row_groups: int
    routing: Routing = "uniform"

    @property
    def gathered(self) -> bool:
        """Whether slots read rows of x by id, as gate_up does; down reads row i in slot i."""
        return self.row_groups == 2

    @property
    def slots(self) -> int:
        return self.tokens * self.top_k

    @property
    def rows_of_x(self) -> int:
        return self.tokens if self.gathered else self.slots

    @property
    def choices(self) -> np.ndarray:
        return choices(self.routing, self.tokens, self.top_k, self.experts)

    @property
    def touched(self) -> int:
        """Experts that have a slot."""
        return np.unique(self.choices).size

    def tuned_shape(self, scales: WeightGranularity) -> dict[str, int | str]:
        """As tuned tables name it."""
        sizes = {
            "slots": self.slots,
            "experts": self.experts,
            "n": self.n,
            "k": self.k,
            "row_groups": self.row_groups,
        }
        return {**sizes, "scales": scales}

    def stack_bytes(self, scales: WeightGranularity | None) -> int:
        """Weights and scales of the experts touched; None for BF16."""
        shape = (self.touched, self.n, self.k)
        if scales is None:
            return 2 * math.prod(shape)
        return math.prod(shape) + 4 * math.prod(
            _SCHEMES[scales].granularity.scale_shape(shape, row_groups=self.row_groups)
        )

    def bytes_moved(self, scales: WeightGranularity | None) -> int:
        """The fewest bytes of a product: stacks, x, its scales, the result in bfloat16."""
        scales_of_row = {None: 0, "tensor": 1, "block": -(-self.k // BLOCK)}[scales]
        row_of_x = (2 if scales is None else 1) * self.k + 4 * scales_of_row
        return self.stack_bytes(scales) + self.rows_of_x * row_of_x + 2 * self.slots * self.n

    @property
    def flops(self) -> float:
        return 2.0 * self.slots * self.n * self.k


def product_of(name: str, layer: str, tokens: int, routing: Routing = "uniform") -> ExpertProduct:
    """The product of a named shape, `layer` being "gate_up" or "down"."""
    of_model = SHAPES[name]
    row_groups, n, k = of_model.stack(layer)
    sizes = {"top_k": of_model.top_k, "experts": of_model.num_experts, "n": n, "k": k}
    return ExpertProduct(tokens=tokens, **sizes, row_groups=row_groups, routing=routing)


@functools.cache
def choices(routing: Routing, tokens: int, top_k: int, experts: int) -> np.ndarray:
    """Which experts each token goes to: int32 `[tokens, top_k]`, different ones in a row, always
    the same."""
    if routing == "same":
        return np.tile(np.arange(top_k, dtype=np.int32), (tokens, 1))
    likely = np.ones(experts) if routing == "uniform" else 1 / np.arange(1, experts + 1)
    # The largest of log-probabilities with Gumbel noise are a draw without replacement.
    noisy = np.log(likely) + np.random.default_rng(0).gumbel(size=(tokens, experts))
    return np.argsort(-noisy, axis=1)[:, :top_k].astype(np.int32)


def contenders(p: ExpertProduct) -> Iterator[tuple[str, Contender]]:
    """The ways to do one product, by name."""
    plain = functools.partial(
        Contender, operands="bf16", flops=p.flops, bytes_moved=p.bytes_moved(None)
    )
    make = functools.partial(_plain_operands, p=p, axes="ekn")
    yield "bf16", plain(make=make, run=functools.partial(_ragged, gathered=p.gathered))
    make = functools.partial(_plain_operands, p=p, axes="enk")
    yield "bf16_loop", plain(make=make, run=functools.partial(_loop, gathered=p.gathered))
    scales: WeightGranularity
    for scales in ("tensor", "block"):
        yield f"per_{scales}", kernel(p, scales)


def kernel(p: ExpertProduct, scales: WeightGranularity) -> Contender:
    """The grouped kernel with its tuned config, or its default; `run` takes another as `config`."""
    config = tuned_config("grouped_scaled_matmul", p.tuned_shape(scales))
    config = config or grouped_matmul.default_config(
        config_gpu(), p.slots, p.experts, p.n, p.k, row_groups=p.row_groups, scales=scales
    )
    return Contender(
        operands="fp8",
        make=functools.partial(_quantized_operands, p=p, scales=scales),
        run=functools.partial(
            _kernel,
            gathered=p.gathered,
            granularity=scales,
            row_groups=p.row_groups,
            config=config,
        ),
        flops=p.flops,
        bytes_moved=p.bytes_moved(scales),
        config=dataclasses.asdict(config),
    )


def block_contenders(
    gate_up: ExpertProduct, down: ExpertProduct
) -> Iterator[tuple[str, Contender]]:
    """The ways to do all of an expert layer behind the router's product, by name."""
    scales: WeightGranularity | None
    for scales in (None, "tensor", "block"):
        weights = gate_up.stack_bytes(scales) + down.stack_bytes(scales)
        yield (
            f"block_{f'per_{scales}' if scales else 'bf16'}",
            Contender(
                operands="fp8" if scales else "bf16",
                make=functools.partial(_block_operands, gate_up=gate_up, down=down, scales=scales),
                run=functools.partial(_block, top_k=gate_up.top_k),
                flops=gate_up.flops + down.flops,
                bytes_moved=weights + 2 * gate_up.tokens * (gate_up.k + down.n),
            ),
        )


def cases_of(
    names: list[str], tokens: list[int], routings: list[Any]
) -> Iterator[tuple[dict[str, Any], Contender]]:
    """What `benchmarking.measure` takes, in the order in which it is timed."""
    for t, name, routing in itertools.product(tokens, names, routings):
        gate_up, down = (product_of(name, layer, t, routing) for layer in ("gate_up", "down"))
        batch = {
            "tokens": t,
            "routing": routing,
            "experts": gate_up.experts,
            "touched": gate_up.touched,
        }
        listed = {
            "gate_up": contenders(gate_up),
            "down": contenders(down),
            "block": block_contenders(gate_up, down),
        }
        for layer, of_layer in listed.items():
            for contender, c in of_layer:
                yield {"shape": f"{name} {layer}", **batch, "contender": contender}, c


def ratios(rows: list[dict[str, Any]]) -> list[float | None]:
    """Speed relative to the faster way in BF16."""

    def baselines(contender: str) -> tuple[str, ...]:
        return ("block_bf16",) if contender.startswith("block_") else ("bf16", "bf16_loop")

    return benchmarking.ratios(rows, same=("shape", "tokens", "routing"), baselines=baselines)


def summary(results: ResultFile) -> dict[str, Any]:
    """Geometric means of the ratio to BF16 over shapes and routings, by contender, for decode and
    for prefill."""
    phases = {"decode tokens <= 16": range(1, 17), "prefill tokens >= 2048": range(2048, 1 << 30)}
    means = benchmarking.mean_ratios(results.rows, ratios(results.rows), phases, size="tokens")
    return {**results.header, "rows": len(results.rows), "times_bf16": means}


def main(
    shapes: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join(SHAPES)}.")
    ] = "granite-3.0-1b-a400m,qwen3-30b-a3b",
    tokens: Annotated[
        str, typer.Option(help="Tokens of a batch; in this order.")
    ] = "1,2048,16,256,4,64,4096,1024",
    routing: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join(ROUTINGS)}.")
    ] = "uniform",
    only: Only = "",
    samples: Samples = 5,
    minutes: Minutes = 60,
    json_file: JsonFile = None,
) -> None:
    """Time expert layers in FP8 and BF16."""
    names, routings = parts(shapes), parts(routing)
    if unknown := set(routings) - set(ROUTINGS):
        raise SystemExit(
            f"benchmark_moe: unknown routing {sorted(unknown)}; choose of {', '.join(ROUTINGS)}"
        )
    results = opened("benchmark_moe", json_file, title="expert layers", chosen=names, known=SHAPES)
    cases = cases_of(names, [int(part) for part in parts(tokens)], routings)
    benchmarking.measure(cases, results, Deadline(minutes), only=parts(only), samples=samples)
    touched = {"experts": lambda r: f"{r['touched']} of {r['experts']}"}
    fields = {"shape": "shape", "tokens": "tokens", "routing": "routing", **touched}
    Console(width=140).print(
        table_of(results, fields, ratios(results.rows), by=("shape", "routing", "tokens"))
    )
    print(json.dumps(summary(results)))


def _routed(p: ExpertProduct) -> tuple[jax.Array, jax.Array]:
    """Slots of each expert, and what a slot brings along: the row of x that it reads, or its
    weight."""
    chosen = p.choices.reshape(-1)
    sizes = jnp.asarray(np.bincount(chosen, minlength=p.experts), jnp.int32)
    if p.gathered:
        return sizes, jnp.asarray(np.argsort(chosen, kind="stable") // p.top_k, jnp.int32)
    return sizes, jnp.full(p.slots, 1 / p.top_k, jnp.float32)


def _plain_operands(
    key: jax.Array, *, p: ExpertProduct, axes: Literal["ekn", "enk"]
) -> tuple[jax.Array, ...]:
    of_x, of_w = jax.random.split(key)
    stack = (p.experts, p.n, p.k) if axes == "enk" else (p.experts, p.k, p.n)
    return (
        random_operand(of_x, (p.rows_of_x, p.k), "bfloat16"),
        random_operand(of_w, stack, "bfloat16"),
        *_routed(p),
    )


def _quantized_operands(
    key: jax.Array, *, p: ExpertProduct, scales: WeightGranularity
) -> tuple[Any, ...]:
    of_x, of_w = jax.random.split(key)
    x = random_operand(of_x, (p.rows_of_x, p.k), "float8_e4m3fn")
    x_scale = jnp.full(
        (p.rows_of_x, 1 if scales == "tensor" else -(-p.k // BLOCK)), 1 / CODE_SPREAD, jnp.float32
    )
    w, (sizes, per_slot) = _stack(of_w, p, scales), _routed(p)
    assert isinstance(w, QArray)
    return x, x_scale, w.qvalue, w.scale, sizes, per_slot, _work_lists(p, sizes)


@functools.partial(jax.jit, static_argnums=0)
def _work_lists(p: ExpertProduct, sizes: jax.Array) -> dict[int, jax.Array]:
    """By slots a tile: what a model's routing hands to the kernel."""
    return {block_m: work_list(sizes, p.slots, block_m) for block_m in TILE_SIZES}


def _block_operands(
    key: jax.Array, *, gate_up: ExpertProduct, down: ExpertProduct, scales: WeightGranularity | None
) -> tuple[Any, ...]:
    keys = jax.random.split(key, 3)
    logits = np.full((gate_up.tokens, gate_up.experts), -8.0)
    np.put_along_axis(
        logits, gate_up.choices, 4 - np.arange(gate_up.top_k) / 8, axis=1
    )  # exact in bfloat16
    x = random_operand(keys[0], (gate_up.tokens, gate_up.k), "bfloat16")
    return (
        x,
        jnp.asarray(logits, jnp.bfloat16),
        _stack(keys[1], gate_up, scales),
        _stack(keys[2], down, scales),
    )


def _stack(
    key: jax.Array, p: ExpertProduct, scales: WeightGranularity | None
) -> jax.Array | QArray:
    shape = (p.experts, p.n, p.k)
    if scales is None:
        return random_operand(key, shape, "bfloat16")
    scheme = _SCHEMES[scales]
    scale = jnp.full(
        scheme.granularity.scale_shape(shape, row_groups=p.row_groups), 1 / CODE_SPREAD, jnp.float32
    )
    return QArray(random_operand(key, shape, "float8_e4m3fn"), scale, scheme, p.row_groups)


def _ragged(
    x: jax.Array, w: jax.Array, sizes: jax.Array, per_slot: jax.Array, *, gathered: bool
) -> jax.Array:
    if gathered:
        return lax.ragged_dot(x[per_slot], w, sizes)
    y = lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32)
    return (y * per_slot[:, None]).astype(x.dtype)


def _loop(
    x: jax.Array, w: jax.Array, sizes: jax.Array, per_slot: jax.Array, *, gathered: bool
) -> jax.Array:
    return grouped_matmul_reference(x, w, slots_of(sizes, per_slot, gathered=gathered))


def _kernel(
    x: jax.Array,
    x_scale: jax.Array,
    w: jax.Array,
    w_scale: jax.Array,
    sizes: jax.Array,
    per_slot: jax.Array,
    work: dict[int, jax.Array],
    *,
    gathered: bool,
    granularity: WeightGranularity,
    row_groups: int,
    config: Config,
) -> jax.Array:
    slots = slots_of(sizes, per_slot, gathered=gathered)
    slots = dataclasses.replace(slots, work=work[config.block_m], block_m=config.block_m)
    return grouped_scaled_matmul_triton(
        x,
        x_scale,
        w,
        w_scale,
        slots,
        granularity=granularity,
        row_groups=row_groups,
        config=config,
        interpret=not current_device_kind(),
    )


def slots_of(sizes: jax.Array, per_slot: jax.Array, *, gathered: bool) -> Slots:
    """Slots as the grouped products take them, with what each brings along."""
    return Slots(sizes, row=per_slot) if gathered else Slots(sizes, weight=per_slot)


def _block(x: jax.Array, logits: jax.Array, gate_up: Any, down: Any, *, top_k: int) -> jax.Array:
    experts, rows, hidden = gate_up.shape
    config = MoEConfig(
        num_experts=experts,
        top_k=top_k,
        intermediate_size=rows // 2,
        softmax_over="all",
        renormalise=True,
        weight_dtype="float32",
        names=(),
    )
    layer = Experts(config, hidden, dtype=x.dtype.name)
    layer.gate_up_proj, layer.down_proj = nnx.data(gate_up), nnx.data(down)
    choice = choose("auto" if current_device_kind() else "triton_interpreted")
    slots = route(logits, config.rule("float32"), gate_up, implementation=choice)
    return total(layer(x, slots, implementation=choice))


if __name__ == "__main__":
    typer.run(main)
