"""How fast a whole model reads prompts and generates, in BF16 and under both FP8 schemes, on random
weights.

    python scripts/benchmark_generate.py --model llama-3.1-8b --batch 1,16 --json FILE
    JAX_PLATFORMS=cpu python scripts/benchmark_generate.py --model tiny --batch 1,2 --prompt 16

Speed does not depend on what the weights say, so none are downloaded: a model of the named shape is
filled layer by layer, each layer quantized as soon as it is drawn, and the BF16 model exists only
where BF16 is measured.

Prefill reads `prompt` tokens a row into an empty cache. Decode takes `steps` single steps behind
it, each choosing its token greedily on the device; the host waits once, after the last. Times are
the median of three runs after a first one that compiles. Floor: a decode step must read all weights
but the embedding table, and the used part of the cache, once. Memory is that of the compiled decode
step: weights, cache and temporaries.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from flax import nnx
from rich.console import Console
from rich.table import Table

from fp8jax.device import gpu_named
from fp8jax.devtools import shapes
from fp8jax.devtools.benchmarking import Deadline, ResultFile
from fp8jax.generation import decode_step, prefill
from fp8jax.models import CausalLM, DecoderConfig, read_decoder_config
from fp8jax.models.layers import Linear
from fp8jax.models.moe import Experts
from fp8jax.ops.choice import IMPLEMENTATIONS, Implementation
from fp8jax.qarray import quantize
from fp8jax.quantization_config import never_quantized
from fp8jax.schemes import SCHEMES, Scheme

UNQUANTIZED = "bf16"
_RUNS = 3
MODELS = shapes.MODELS | shapes.TINY_MODELS


def shape_of(name: str, *, layers: int | None = None) -> DecoderConfig:
    """The decoder of a named shape, with fewer layers if wanted."""
    if name not in MODELS:
        raise ValueError(f"model {name!r} is unknown; choose one of {', '.join(MODELS)}")
    raw = MODELS[name] | ({} if layers is None else {"num_hidden_layers": layers})
    return read_decoder_config(raw, dtype="bfloat16", where=name)


def filled(
    config: DecoderConfig,
    scheme: Scheme | None,
    make: Callable[[jax.ShapeDtypeStruct, Scheme | None, int], Any],
    *,
    implementation: Implementation = "auto",
) -> CausalLM:
    """A model whose weights are what `make` gives for (shape and dtype, scheme, row groups), one
    after the other.

    The scheme is None for what is never quantized: embeddings, norms, biases, routers and lm_head.
    """
    model = CausalLM(config, implementation=implementation)
    for path, module in list(nnx.iter_modules(model)):
        is_layer = isinstance(module, Experts) or (
            isinstance(module, Linear) and not never_quantized(".".join(map(str, path)))
        )
        for attribute, row_groups in (
            ("weight", 1),
            ("bias", 1),
            ("gate_up_proj", 2),
            ("down_proj", 1),
        ):
            spec = getattr(module, attribute, None)
            if isinstance(spec, jax.ShapeDtypeStruct):
                of_layer = scheme if is_layer and attribute != "bias" else None
                setattr(module, attribute, nnx.data(make(spec, of_layer, row_groups)))
    return model


def random_weights(seed: int = 0) -> Callable[[jax.ShapeDtypeStruct, Scheme | None, int], Any]:
    """Weights of standard deviation 1/√k for `filled`; vectors are ones. Each is finished before
    the next is begun."""
    count = iter(range(1 << 30))

    def make(spec: jax.ShapeDtypeStruct, scheme: Scheme | None, row_groups: int) -> Any:
        if len(spec.shape) == 1:
            return jnp.ones(spec.shape, spec.dtype)
        key = jax.random.fold_in(jax.random.key(seed), next(count))
        return jax.block_until_ready(_matrix(key, spec.shape, spec.dtype.name, scheme, row_groups))

    return make


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _matrix(
    key: jax.Array, shape: tuple[int, ...], dtype: str, scheme: Scheme | None, row_groups: int
) -> Any:
    weight = jax.random.normal(key, shape, jnp.dtype(dtype)) * jnp.asarray(shape[-1] ** -0.5, dtype)
    return weight if scheme is None else quantize(weight, scheme, row_groups=row_groups)


def measure(
    name: str,
    schemes: list[str],
    batches: list[int],
    results: ResultFile,
    deadline: Deadline,
    *,
    prompt: int,
    steps: int,
    layers: int | None,
    implementation: Implementation,
) -> None:
    """Time what is not in `results` yet, until the deadline."""
    config = shape_of(name, layers=layers)
    for scheme in schemes:
        cases = [
            {
                "model": name,
                "layers": config.num_layers,
                "scheme": scheme,
                "batch": batch,
                "prompt": prompt,
                "steps": steps,
                "implementation": implementation,
            }
            for batch in batches
        ]
        missing = [case for case in cases if not results.find(**case)]
        if not missing or deadline.passed:
            continue
        try:
            model = filled(
                config, SCHEMES.get(scheme), random_weights(), implementation=implementation
            )
        except jax.errors.JaxRuntimeError as error:  # out of memory
            results.add(missing[0] | {"error": str(error)[:300]})
            continue
        for case in missing:
            if deadline.passed:
                break
            try:
                measured = _time(model, batch=case["batch"], prompt=prompt, steps=steps)
            except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
                measured = {"error": f"{type(error).__name__}: {error}"[:300]}
            results.add(case | measured)
        del model


def _time(model: CausalLM, *, batch: int, prompt: int, steps: int) -> dict[str, Any]:
    # Flattened once: walking the module again in every step would cost more than some steps take.
    leaves, structure = jax.tree.flatten(model)

    def read(
        leaves: list[Any], cache: Any, token_ids: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, Any]:
        logits, cache = prefill(jax.tree.unflatten(structure, leaves), cache, token_ids, lengths)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    def step(
        leaves: list[Any], cache: Any, tokens: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, Any, jax.Array]:
        logits, cache = decode_step(jax.tree.unflatten(structure, leaves), cache, tokens, positions)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache, positions + 1

    token_ids = jax.random.randint(
        jax.random.key(1), (batch, prompt), 0, model.config.vocab_size, jnp.int32
    )
    lengths = jnp.full(batch, prompt, jnp.int32)
    length = prompt + steps
    empty = jax.jit(functools.partial(model.empty_cache, batch, length))
    cache = empty()
    # Compiled ahead, because the compiled program says how much memory it takes.
    run_prefill = jax.jit(read, donate_argnums=1).lower(leaves, cache, token_ids, lengths).compile()
    run_step = jax.jit(step, donate_argnums=1).lower(leaves, cache, lengths, lengths).compile()
    prefill_times, decode_times = [], []
    for _ in range(_RUNS + 1):
        cache = jax.block_until_ready(empty())
        start = time.perf_counter()
        tokens, cache = jax.block_until_ready(run_prefill(leaves, cache, token_ids, lengths))
        read_until = time.perf_counter()
        positions = lengths
        for _ in range(steps):
            tokens, cache, positions = run_step(leaves, cache, tokens, positions)
        jax.block_until_ready(tokens)
        prefill_times.append(read_until - start)
        decode_times.append((time.perf_counter() - read_until) / steps)
    prefill_seconds, decode_seconds = (
        statistics.median(times[1:]) for times in (prefill_times, decode_times)
    )

    weight_bytes = sum(leaf.nbytes for leaf in leaves)
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    embedding = 0 if model.config.tied else model.model.embed_tokens.weight.nbytes
    read_bytes = weight_bytes - embedding - _untouched_expert_bytes(model, batch)
    memory = run_step.memory_analysis()
    return {
        "prefill_ms": 1e3 * prefill_seconds,
        "prefill_tokens_per_second": batch * prompt / prefill_seconds,
        "decode_ms": 1e3 * decode_seconds,
        "decode_tokens_per_second": batch / decode_seconds,
        "decode_floor_ms": _floor_ms(read_bytes + cache_bytes * (prompt + steps / 2) / length),
        "weight_bytes": weight_bytes,
        "cache_bytes": cache_bytes,
        "memory_bytes": None
        if memory is None
        else weight_bytes + cache_bytes + memory.temp_size_in_bytes,
    }


def _untouched_expert_bytes(model: CausalLM, batch: int) -> float:
    """Bytes of experts that a step does not read, on average over routings where every expert is as
    likely as another."""
    if (moe := model.config.moe) is None:
        return 0.0
    stacks = [module for _, module in nnx.iter_modules(model) if isinstance(module, Experts)]
    in_stacks = sum(leaf.nbytes for stack in stacks for leaf in jax.tree.leaves(stack))
    return in_stacks * (1 - moe.top_k / moe.num_experts) ** batch


def _floor_ms(bytes_read: float) -> float | None:
    gpu = gpu_named(jax.devices()[0].device_kind)
    return 1e3 * bytes_read / gpu.bandwidth if gpu and gpu.bandwidth else None


def speedups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each timed row with its speed relative to the BF16 row of the same case."""
    same = ("model", "layers", "batch", "prompt", "steps", "implementation")
    plain = {
        tuple(r[name] for name in same): r
        for r in rows
        if r["scheme"] == UNQUANTIZED and "error" not in r
    }
    found = []
    for row in rows:
        base = plain.get(tuple(row[name] for name in same))
        factors = {}
        if base is not None and "error" not in row:
            factors = {
                f"{phase}_times_bf16": base[f"{phase}_ms"] / row[f"{phase}_ms"]
                for phase in ("prefill", "decode")
            }
        found.append(row | factors)
    return found


def render(results: ResultFile) -> Table:
    table = Table(title=f"{results.header['title']}, {results.header['device']}")
    for heading in (
        "model",
        "batch",
        "scheme",
        "prefill tok/s",
        "× BF16",
        "decode tok/s",
        "× BF16",
        "ms/step",
        "floor",
        "GB",
    ):
        table.add_column(heading, justify="left" if heading in ("model", "scheme") else "right")
    for r in sorted(speedups(results.rows), key=lambda r: (r["model"], r["batch"])):
        start = (f"{r['model']}, {r['layers']} layers", str(r["batch"]), r["scheme"])
        if "error" in r:
            table.add_row(*start, r["error"].splitlines()[0][:60])
            continue
        factors = [
            f"{r[name]:.2f}" if name in r else ""
            for name in ("prefill_times_bf16", "decode_times_bf16")
        ]
        table.add_row(
            *start,
            f"{r['prefill_tokens_per_second']:.0f}",
            factors[0],
            f"{r['decode_tokens_per_second']:.1f}",
            factors[1],
            f"{r['decode_ms']:.2f}",
            "" if r["decode_floor_ms"] is None else f"{r['decode_floor_ms']:.2f}",
            "" if r["memory_bytes"] is None else f"{r['memory_bytes'] / 1e9:.2f}",
        )
    return table


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "llama-3.1-8b",
    schemes: Annotated[
        str, typer.Option(help="Comma-separated.")
    ] = f"fp8_per_tensor,fp8_per_block,{UNQUANTIZED}",
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,16",
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 2048,
    steps: Annotated[int, typer.Option(help="Decode steps.")] = 64,
    layers: Annotated[int | None, typer.Option(help="Only so many layers.")] = None,
    implementation: Annotated[str, typer.Option(help="auto, xla or triton.")] = "auto",
    minutes: Annotated[
        float, typer.Option(help="Stop after; a later run goes on if --json is given.")
    ] = 60,
    json_file: Annotated[Path | None, typer.Option("--json", help="Written row by row.")] = None,
) -> None:
    """Time prefill and decode of a model with random weights."""
    chosen = schemes.split(",")
    known = (UNQUANTIZED, *SCHEMES)
    if unknown := set(chosen) - set(known):
        raise SystemExit(
            f"benchmark_generate: unknown schemes {sorted(unknown)}; choose of {', '.join(known)}"
        )
    if implementation not in IMPLEMENTATIONS:
        raise SystemExit(
            f"benchmark_generate: implementation is one of {', '.join(IMPLEMENTATIONS)}"
        )
    batches = [int(part) for part in batch.split(",")]
    options: dict[str, Any] = {
        "prompt": prompt,
        "steps": steps,
        "layers": layers,
        "implementation": implementation,
    }
    try:
        results = ResultFile(
            json_file, title="prefill and decode", device=jax.devices()[0].device_kind
        )
        measure(model, chosen, batches, results, Deadline(minutes), **options)
    except ValueError as error:
        raise SystemExit(f"benchmark_generate: {error}") from None
    Console(width=140).print(render(results))
    print(json.dumps({**results.header, "rows": speedups(results.rows)}))


if __name__ == "__main__":
    typer.run(main)
