"""What FP8 saves and costs on a checkpoint: one table, and the same as JSON and as a plot.

    python scripts/evaluate.py MODEL --text tests/data/jargon_file_excerpt.txt
    python scripts/evaluate.py MODEL --text FILE --schemes bf16,fp8_per_block \\
        --prompt "The capital of France is" \\
        --quantization-config '{"ignore": ["re:.*down_proj"]}' --json table.json --plot table.png

MODEL is a local folder or a hub repository id. Without --text (a checkpoint without tokenizer)
random tokens from a fixed seed are scored. `fp8jax.evaluation.comparison` explains each column.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import fp8jax
from fp8jax.evaluation import comparison as scheme_comparison
from fp8jax.evaluation.comparison import UNQUANTIZED, EvaluationInputs, SchemeComparison

DEFAULT_PROMPTS = ("The capital of France is", "Photosynthesis is the process by which")


def evaluate(
    model: str,
    schemes: list[str],
    *,
    text: Path | None,
    prompts: list[str],
    window: int,
    max_tokens: int,
    new_tokens: int,
    batch_size: int,
    dtype: str,
    quantization_config: dict | None = None,
) -> SchemeComparison:
    """Measure and print; the demo calls this too."""
    console = Console()
    if text is None and prompts:
        raise ValueError(
            "prompts are given without a text: without --text random tokens are continued; give "
            "both"
        )
    for scheme in schemes:  # a misspelt one is told now, not after the others were measured
        if scheme != UNQUANTIZED:
            fp8jax.QuantizationConfig.parse(scheme, quantization_config)

    def load(scheme: str | None) -> fp8jax.LanguageModel:
        config = None if scheme is None else quantization_config
        return fp8jax.load_quantized(model, scheme, quantization_config=config, dtype=dtype)

    def make_inputs(lm: fp8jax.LanguageModel) -> EvaluationInputs:
        if text is None:
            return scheme_comparison.random_inputs(
                lm.config["vocab_size"], window=window, max_tokens=max_tokens
            )
        return scheme_comparison.text_inputs(
            lm,
            text.read_text(encoding="utf-8"),
            prompts=prompts or DEFAULT_PROMPTS,
            window=window,
            max_tokens=max_tokens,
            source=text.name,
        )

    comparison = scheme_comparison.compare_schemes(
        load,
        schemes,
        make_inputs,
        model=model,
        dtype=dtype,
        new_tokens=new_tokens,
        batch_size=batch_size,
        report=lambda line: console.print(f"[dim]{line} ...[/dim]"),
    )
    console.print(scheme_comparison.render_table(comparison))
    return comparison


def save_json(comparison: SchemeComparison, path: Path) -> None:
    """The table as JSON, with versions, device and date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"speed_label": comparison.speed_label, **dataclasses.asdict(comparison)}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub repository id.")],
    schemes: Annotated[
        str, typer.Option(help="Comma-separated; bf16 is the unquantized model.")
    ] = (f"{UNQUANTIZED},fp8_per_tensor,fp8_per_block"),
    text: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="UTF-8 text to score.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    max_tokens: Annotated[
        int, typer.Option(help="Use at most this many tokens of the text.")
    ] = 4096,
    batch_size: Annotated[int, typer.Option(help="Windows a forward pass.")] = 2,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Repeatable; continued greedily.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="New tokens a prompt.")] = 24,
    dtype: Annotated[
        str, typer.Option(help="Of activations and unquantized weights.")
    ] = "bfloat16",
    quantization_config: Annotated[
        str | None, typer.Option(help="JSON object, for the FP8 schemes.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Save the table here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Save a PNG here.")] = None,
) -> None:
    """Compare a checkpoint under several schemes: memory, quality, speed, continuations."""
    try:
        comparison = evaluate(
            model,
            [scheme.strip() for scheme in schemes.split(",")],
            text=text,
            prompts=prompt or [],
            window=window,
            max_tokens=max_tokens,
            new_tokens=new_tokens,
            batch_size=batch_size,
            dtype=dtype,
            quantization_config=_parse_json(quantization_config),
        )
    except (
        ValueError
    ) as error:  # the library's own words for a mistake in the input; no traceback needed
        raise SystemExit(f"evaluate: {error}") from None
    if json_file is not None:
        save_json(comparison, json_file)
    if plot is not None:
        scheme_comparison.save_plot(comparison, plot)


def _parse_json(text: str | None) -> dict | None:
    try:
        return None if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--quantization-config is not JSON ({error}): {text}") from None


if __name__ == "__main__":
    typer.run(main)
