"""Every script as a user starts it, in its own process, on a checkpoint of a few hundred
kilobytes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "goldens" / "smollm2"  # real architecture, random weights, no tokenizer


def run_script(name: str, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "COLUMNS": "160"}
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture
def tiny_with_tokenizer(tmp_path: Path) -> Path:
    """The tiny checkpoint with a tokenizer of one token a character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = shutil.copytree(TINY, tmp_path / "checkpoint")
    vocab = {"<unk>": 0} | {
        letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyzIA .,", start=3)
    }
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_demo_runs_on_a_checkpoint_without_tokenizer_and_saves_table_and_plot(tmp_path):
    run = run_script("demo.py", "--checkpoint", TINY, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    table = json.loads((tmp_path / "demo_output" / "comparison.json").read_text())
    plain, tensor, block = table["results"]
    assert [row["scheme"] for row in table["results"]] == [
        "bf16",
        "fp8_per_tensor",
        "fp8_per_block",
    ]
    assert (plain["kl"], plain["top1_agreement"]) == (0.0, 1.0)
    for row in (tensor, block):
        assert row["weight_bytes"] < plain["weight_bytes"]
        assert row["kl"] > 0
        assert len(row["continuations"]) == 2
    assert table["text"].startswith("random tokens")
    assert (tmp_path / "demo_output" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "not GPU speed" in " ".join(run.stdout.split())


@pytest.mark.slow
def test_evaluate_scores_a_text_and_continues_the_given_prompts(tmp_path, tiny_with_tokenizer):
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April, and the clocks were striking. " * 10)
    run = run_script(
        "evaluate.py",
        tiny_with_tokenizer,
        *("--schemes", "fp8_per_tensor", "--text", text, "--window", "32", "--max-tokens", "200"),
        *(
            "--prompt",
            "It was",
            "--prompt",
            "clocks",
            "--prompt",
            "x",
            "--new-tokens",
            "5",
            "--dtype",
            "float32",
        ),
        *("--quantization-config", '{"ignore": ["re:.*mlp.*"]}', "--json", tmp_path / "t.json"),
        *("--plot", tmp_path / "t.png"),
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    table = json.loads((tmp_path / "t.json").read_text())
    assert (table["prompts"], table["text"], table["dtype"]) == (
        ["It was", "clocks", "x"],
        "text.txt",
        "float32",
    )
    assert (
        table["scored_tokens"] == 6 * 31
    )  # 200 tokens hold six windows of 32, their first tokens are not scored
    (row,) = table["results"]
    assert row["kl"] > 0
    assert len(row["continuations"]) == 3
    assert (tmp_path / "t.png").is_file()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--text", ROOT / "tests" / "data" / "jargon_file_excerpt.txt"], "no tokenizer"),
        (["--prompt", "hello"], "without a text"),
        (["--schemes", "bf16,fp9"], "fp9"),
        (["--quantization-config", "{ignore}"], "--quantization-config"),
    ],
    ids=["text without tokenizer", "prompt without text", "unknown scheme", "bad JSON"],
)
def test_a_mistake_in_the_arguments_is_one_line_not_a_traceback(tmp_path, arguments, said):
    run = run_script("evaluate.py", TINY, *arguments, cwd=tmp_path)
    assert run.returncode == 1
    assert said in run.stderr
    assert "Traceback" not in run.stderr
