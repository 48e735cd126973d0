"""The table of `fp8jax.evaluation.comparison` on stub models whose every number is known
beforehand."""

import dataclasses
import io
import json
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import Bigram
from rich.console import Console

from fp8jax.evaluation import comparison as scheme_comparison

V = 7


class StubTokenizer:
    """One token a letter; begins every text with token 1 unless told otherwise."""

    def encode(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(letter) % V for letter in text]


def stub_lm(*, shift: float, weight_bytes: int, tokenizer: Any = None, text: str = "") -> Any:
    table = np.eye(V, dtype=np.float32) * (4 + shift)
    layer = types.SimpleNamespace(bytes_before=200, bytes_after=101)
    generations = [types.SimpleNamespace(token_ids=[1, 2, 3], text=text)] * 2
    return types.SimpleNamespace(
        model=Bigram(jnp.asarray(table)),
        tokenizer=tokenizer,
        generate=lambda prompts, **kwargs: generations,
        report=types.SimpleNamespace(
            bytes_after=weight_bytes,
            seconds=1.5,
            peak_host_bytes=7_000_000,
            quantized=(layer, layer) if shift else (),
        ),
    )


def compare(*, tokenizer: Any = None, schemes: tuple[str, ...] = ("bf16", "fp8_per_block")) -> Any:
    models = {
        None: stub_lm(
            shift=0.0, weight_bytes=4_000_000, tokenizer=tokenizer, text=" as [bold]is[/bold]"
        ),
        "fp8_per_block": stub_lm(
            shift=0.5, weight_bytes=2_000_000, tokenizer=tokenizer, text=" now"
        ),
    }
    return scheme_comparison.compare_schemes(
        models.__getitem__,
        schemes,
        lambda lm: scheme_comparison.random_inputs(V, window=4, max_tokens=11),
        model="a/model",
        dtype="float32",
        new_tokens=3,
        report=lambda line: None,
    )


def rendered(comparison: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(scheme_comparison.render_table(comparison))
    file: Any = console.file
    return file.getvalue()


def test_each_scheme_gets_a_row_measured_against_the_unquantized_model():
    comparison = compare()
    plain, block = comparison.results
    assert (plain.scheme, plain.kl, plain.top1_agreement) == ("bf16", 0.0, 1.0)
    assert (block.weight_bytes, block.load_seconds, block.peak_host_bytes) == (
        2_000_000,
        1.5,
        7_000_000,
    )
    assert (plain.quantized_share, block.quantized_share) == (None, 0.505)
    assert block.kl > 0
    assert plain.perplexity != block.perplexity
    assert (
        comparison.scored_tokens == 2 * 3
    )  # two whole windows of four, their first tokens not scored
    assert all(result.tokens_per_second > 0 for result in comparison.results)


def test_reference_is_loaded_even_if_its_row_is_not_wanted():
    (block,) = compare(schemes=("fp8_per_block",)).results
    assert block.kl > 0


def test_table_shows_the_numbers_and_never_reads_generated_text_as_markup():
    text = rendered(compare(tokenizer=StubTokenizer()))
    for wanted in (
        "fp8_per_block",
        "4.0",
        "2.0",
        "as [bold]is[/bold]",
        "now",
        "random tokens, seed 0",
    ):
        assert wanted in text


def test_speed_on_a_cpu_is_labelled_as_no_gpu_speed():
    assert "not GPU speed" in rendered(compare())
    assert "GPU" not in dataclasses.replace(compare(), on_cpu=False).speed_label


def test_without_a_tokenizer_continuations_are_token_ids():
    assert compare().results[0].continuations == ["[1, 2, 3]", "[1, 2, 3]"]


def test_json_carries_everything_needed_to_repeat_the_measurement():
    content = json.loads(json.dumps(dataclasses.asdict(compare())))
    assert {
        "model",
        "text",
        "window",
        "dtype",
        "device",
        "versions",
        "date",
        "prompts",
        "results",
    } <= set(content)
    assert content["versions"]["jax"] == jax.__version__


def test_every_window_of_a_text_begins_as_the_tokenizer_begins_a_text():
    lm = stub_lm(shift=0, weight_bytes=0, tokenizer=StubTokenizer())
    inputs = scheme_comparison.text_inputs(
        lm, "abcdefgh", prompts=["a"], window=4, max_tokens=7, source="x.txt"
    )
    letters = [ord(letter) % V for letter in "abcdef"]
    np.testing.assert_array_equal(inputs.windows, [[1, *letters[:3]], [1, *letters[3:]]])


def test_a_text_for_a_checkpoint_without_tokenizer_is_an_error_that_says_so():
    lm = stub_lm(shift=0, weight_bytes=0)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        scheme_comparison.text_inputs(lm, "abc", prompts=[], window=2, max_tokens=9, source="x.txt")


def test_plot_is_a_png(tmp_path: Path):
    scheme_comparison.save_plot(compare(), tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")
