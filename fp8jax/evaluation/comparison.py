"""One table that shows what each scheme saves and costs on a checkpoint: what `scripts/evaluate.py`
and the demo print.

The checkpoint is loaded once unquantized, as the reference, then once a scheme, never more than two
models at a time. Of each load the table shows

- weight bytes, load seconds and peak private host memory above what the process held before, from
  the load report;
- perplexity, KL divergence and top-1 agreement against the reference (`fp8jax.metrics.metrics` has
  the formulas);
- decoding speed: new tokens over seconds of one `generate` call on all prompts, prefill included,
  the median of a few calls after a first one that compiles. On a CPU this is the speed of the plain
  reference path, where FP8 operands are widened before they are multiplied, and says nothing about
  a GPU;
- the greedy continuation of each prompt.

A checkpoint without tokenizer is scored on random tokens from a fixed seed: its perplexity then
means nothing, KL and top-1 still say whether quantization changed the model.
"""

import ctypes
import dataclasses
import datetime
import gc
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from fp8jax.evaluation import metrics

if TYPE_CHECKING:
    from rich.table import Table

    from fp8jax.language_model import LanguageModel

UNQUANTIZED = "bf16"
TIMED_CALLS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationInputs:
    """What is scored and what is continued."""

    windows: np.ndarray  # [n, window] int32
    prompts: list[str] | list[list[int]]
    source: str  # where the windows come from, for the table's title


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchemeResult:
    """One row of the table."""

    scheme: str
    weight_bytes: int  # of the whole model, embeddings and norms included
    quantized_share: (
        float | None
    )  # bytes of the quantized layers, scales included, over their bytes in the checkpoint
    load_seconds: float
    peak_host_bytes: int  # while loading, above what the process held before
    perplexity: float
    kl: float  # against the unquantized model, nats a token
    top1_agreement: float  # against the unquantized model, 0 to 1
    tokens_per_second: float
    continuations: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchemeComparison:
    """The table with everything needed to read or repeat it; `dataclasses.asdict` of it is its
    JSON."""

    model: str
    text: str
    window: int
    scored_tokens: int
    dtype: str
    device: str
    on_cpu: bool
    versions: dict[str, str]
    date: str
    prompts: list[str]
    new_tokens: int
    results: list[SchemeResult]

    @property
    def speed_label(self) -> str:
        """Column title of the decoding speed."""
        return "tok/s (CPU reference path, not GPU speed)" if self.on_cpu else "tok/s"


def text_inputs(
    lm: "LanguageModel",
    text: str,
    *,
    prompts: Sequence[str],
    window: int,
    max_tokens: int,
    source: str,
) -> EvaluationInputs:
    """Windows of a text under the model's own tokenizer, each beginning as the tokenizer begins a
    text.

    Raises:
        ValueError: the checkpoint has no tokenizer, or the text is shorter than a window.
    """
    if lm.tokenizer is None:
        raise ValueError(
            "the checkpoint folder has no tokenizer files, so a text cannot be scored nor a "
            "prompt read; add tokenizer.json to it, or leave the text out to score random tokens"
        )
    prefix = lm.tokenizer.encode("")  # [bos] for models that want one, else nothing
    ids = lm.tokenizer.encode(
        text, add_special_tokens=False, verbose=False
    )  # the text is longer than the context
    windows = metrics.token_windows(ids[:max_tokens], window, prefix=prefix)
    return EvaluationInputs(windows=windows, prompts=list(prompts), source=source)


def random_inputs(
    vocab_size: int, *, window: int, max_tokens: int, seed: int = 0
) -> EvaluationInputs:
    """Random windows, and the beginnings of the first two as prompts, for a checkpoint without
    tokenizer."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, max_tokens)
    windows = metrics.token_windows(ids, window)
    prompts = [[int(token) for token in row[:8]] for row in windows[:2]]
    return EvaluationInputs(windows=windows, prompts=prompts, source=f"random tokens, seed {seed}")


def compare_schemes(
    load: Callable[[str | None], "LanguageModel"],
    schemes: Sequence[str],
    make_inputs: Callable[["LanguageModel"], EvaluationInputs],
    *,
    model: str,
    dtype: str,
    new_tokens: int,
    batch_size: int = 2,
    report: Callable[[str], Any] = print,
) -> SchemeComparison:
    """Load, score and time a checkpoint under each scheme.

    Args:
        load: from a scheme's name, or None for no quantization, to a loaded model.
        schemes: rows of the table in order; "bf16" is the unquantized model.
        make_inputs: from the unquantized model to what is scored; called once.
        model, dtype: how the checkpoint was named and which dtype `load` uses, for the record.
        new_tokens: greedy tokens a prompt.
        report: called with a line before each step.
    """
    report(f"{UNQUANTIZED}: loading")
    reference = load(None)
    inputs = make_inputs(reference)
    results = []
    for scheme in schemes:
        if scheme == UNQUANTIZED:
            lm = reference
        else:
            report(f"{scheme}: loading")
            _return_freed_memory()
            lm = load(scheme)
        report(f"{scheme}: scoring {inputs.windows[:, 1:].size} tokens")
        quality = metrics.compare(reference, lm, inputs.windows, batch_size=batch_size)
        report(
            f"{scheme}: generating {len(inputs.prompts)} x {new_tokens} tokens, {1 + TIMED_CALLS} "
            "times"
        )
        speed, continuations = _time_generation(lm, inputs.prompts, new_tokens)
        results.append(
            SchemeResult(
                scheme=scheme,
                weight_bytes=lm.report.bytes_after,
                quantized_share=_quantized_share(lm),
                load_seconds=lm.report.seconds,
                peak_host_bytes=lm.report.peak_host_bytes,
                perplexity=quality.perplexity,
                kl=quality.kl,
                top1_agreement=quality.top1_agreement,
                tokens_per_second=speed,
                continuations=continuations,
            )
        )
        del lm  # before the next one is loaded: never more than two models
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    host = f", {os.cpu_count()} cores, {platform.machine()}" if on_cpu else ""
    return SchemeComparison(
        model=model,
        text=inputs.source,
        window=inputs.windows.shape[1],
        scored_tokens=inputs.windows[:, 1:].size,
        dtype=dtype,
        device=f"{jax.device_count()} x {device.device_kind}{host}",
        on_cpu=on_cpu,
        versions={
            name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")
        },
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        prompts=[str(prompt) for prompt in inputs.prompts],
        new_tokens=new_tokens,
        results=results,
    )


def _return_freed_memory() -> None:
    """Give what the C allocator keeps of freed memory back to the system.

    The load report counts growth: what a load took from memory that earlier scoring had left lying
    about (170 MB, seen with SmolLM2) would not count, and the later rows of the table would look
    better than they are.
    """
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _quantized_share(lm: "LanguageModel") -> float | None:
    before = sum(layer.bytes_before for layer in lm.report.quantized)
    return sum(layer.bytes_after for layer in lm.report.quantized) / before if before else None


def _time_generation(lm: "LanguageModel", prompts: Any, new_tokens: int) -> tuple[float, list[str]]:
    """Median tokens a second over warm calls, and the continuations (token ids where there is no
    tokenizer)."""
    generations = lm.generate(prompts, max_new_tokens=new_tokens, temperature=0.0)  # compiles
    count, seconds = sum(len(generation.token_ids) for generation in generations), []
    for _ in range(TIMED_CALLS):
        start = time.perf_counter()
        lm.generate(prompts, max_new_tokens=new_tokens, temperature=0.0)
        seconds.append(time.perf_counter() - start)
    texts = [str(list(g.token_ids)) if lm.tokenizer is None else g.text for g in generations]
    return count / statistics.median(seconds), texts


def render_table(comparison: SchemeComparison) -> "Table":
    """The comparison as a rich table: quantities as rows, schemes as columns, so that it fits a
    terminal."""
    from rich.table import Table
    from rich.text import Text

    title = (
        f"{comparison.model}\n{comparison.scored_tokens} tokens scored in windows of "
        f"{comparison.window} ({comparison.text}), {comparison.dtype}, {comparison.device}"
    )
    table = Table(title=title, show_lines=True)
    table.add_column("")
    for result in comparison.results:
        table.add_column(result.scheme, justify="right", overflow="fold")
    for label, read in _quantities(comparison).items():
        table.add_row(label, *(read(result) for result in comparison.results))
    for i, prompt in enumerate(comparison.prompts):
        # Text, not str: a model may well generate what rich would read as markup.
        cells = [
            Text(result.continuations[i].strip(), justify="left") for result in comparison.results
        ]
        table.add_row(Text(f"“{prompt}” ..."), *cells)
    return table


def _quantities(comparison: SchemeComparison) -> Mapping[str, Callable[[SchemeResult], str]]:
    return {
        "weights, MB": lambda r: f"{r.weight_bytes / 1e6:,.1f}",
        "quantized layers, of their bytes on disk": lambda r: (
            "none" if r.quantized_share is None else f"{r.quantized_share:.2%}"
        ),
        "load, s": lambda r: f"{r.load_seconds:.1f}",
        "peak host memory while loading, MB": lambda r: f"{r.peak_host_bytes / 1e6:,.0f}",
        "perplexity": lambda r: f"{r.perplexity:.2f}",
        "KL against bf16, nats": lambda r: f"{r.kl:.4f}",
        "top-1 agreement with bf16": lambda r: f"{r.top1_agreement:.3f}",
        comparison.speed_label: lambda r: f"{r.tokens_per_second:.1f}",
    }


def save_plot(comparison: SchemeComparison, path: Path) -> None:
    """Bars of weight bytes, peak memory, perplexity, KL, top-1 agreement and speed, a panel each,
    as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    panels: list[tuple[str, str, Callable[[SchemeResult], float]]] = [
        ("weights, MB", "{:,.1f}", lambda r: r.weight_bytes / 1e6),
        ("peak host memory while loading, MB", "{:,.0f}", lambda r: r.peak_host_bytes / 1e6),
        ("perplexity", "{:.2f}", lambda r: r.perplexity),
        ("KL divergence from bf16, nats a token", "{:.4f}", lambda r: r.kl),
        ("top-1 agreement with bf16", "{:.3f}", lambda r: r.top1_agreement),
        (comparison.speed_label, "{:.1f}", lambda r: r.tokens_per_second),
    ]
    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    names = [result.scheme.replace("fp8_", "fp8\n") for result in comparison.results]
    colors = [f"C{i}" for i in range(len(names))]
    for axis, (title, form, read) in zip(axes.flat, panels, strict=True):
        values = [read(result) for result in comparison.results]
        bars = axis.bar(names, values, color=colors, width=0.6)
        axis.bar_label(bars, [form.format(value) for value in values], padding=2)
        axis.set_title(title, fontsize=10)
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{Path(comparison.model).name}: {comparison.scored_tokens} tokens of {comparison.text}, "
        f"{comparison.dtype}, {comparison.device}, {comparison.date[:10]}",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
