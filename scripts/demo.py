"""The main job, end to end: load a real BF16 language model as FP8 and see what it saved and what
it cost.

    python scripts/demo.py                          # SmolLM2-135M-Instruct; what `make demo` runs
    python scripts/demo.py --checkpoint FOLDER      # any other; random tokens without a tokenizer

Gets SmolLM2 (`get_smollm2.py`), loads it unquantized and with both FP8 schemes, and prints one
table: memory, load time, perplexity, KL divergence and top-1 agreement on a bundled public-domain
text, speed, and how each version continues two prompts. The table is saved as JSON and as a plot.
"""

import time
from pathlib import Path
from typing import Annotated

import typer
from evaluate import evaluate, save_json
from get_smollm2 import FetchError, get_smollm2

from fp8jax.evaluation import comparison as scheme_comparison
from fp8jax.tokenizer import load_tokenizer

TEXT = Path(__file__).resolve().parent.parent / "tests" / "data" / "jargon_file_excerpt.txt"
SCHEMES = [scheme_comparison.UNQUANTIZED, "fp8_per_tensor", "fp8_per_block"]


def main(
    checkpoint: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Instead of SmolLM2.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the table and the plot.")] = Path(
        "demo_output"
    ),
) -> None:
    """Load a BF16 model as FP8 by both schemes and print what was saved and what was lost."""
    start = time.perf_counter()
    if checkpoint is None:
        try:
            folder = get_smollm2()
        except FetchError as error:
            raise SystemExit(f"demo: {error}") from None
        window, max_tokens, new_tokens = 256, 2304, 24  # 9 windows: 2295 scored tokens
    else:
        folder = checkpoint
        window, max_tokens, new_tokens = 32, 256, 8  # a tiny checkpoint may have a tiny context
    comparison = evaluate(
        str(folder),
        SCHEMES,
        text=None if load_tokenizer(folder) is None else TEXT,
        prompts=[],
        batch_size=3,
        dtype="bfloat16",
        window=window,
        max_tokens=max_tokens,
        new_tokens=new_tokens,
    )
    save_json(comparison, output / "comparison.json")
    scheme_comparison.save_plot(comparison, output / "comparison.png")
    print(
        f"Saved {output / 'comparison.json'} and {output / 'comparison.png'} "
        f"({time.perf_counter() - start:.0f} s)."
    )


if __name__ == "__main__":
    typer.run(main)
