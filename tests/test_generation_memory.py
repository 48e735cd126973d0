"""Memory of scoring and of reading prompts, watched from outside a process of its own, and a loop
that Ctrl-C ends.

Two layers as wide as SmolLM2-135M's with its vocabulary, random weights. What is held while idle,
weights and compiled programs included, is taken off: what is left grows with the batch, and is what
a card must have free.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from memory_probe import private_bytes

HERE = Path(__file__).parent
MIB = 2**20
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 2,
    "max_position_embeddings": 8192,
}


def child(work: str, **numbers: Any) -> subprocess.Popen[str]:
    """A process that makes a model, says "idle", waits for a line, and works."""
    command = [sys.executable, __file__, json.dumps(numbers), work]
    return subprocess.Popen(
        command,
        cwd=HERE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def peak_above_idle(work: str) -> int:
    with child(work, **SMOLLM2) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline().strip() == "idle"
        idle = peak = private_bytes(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        while (now := private_bytes(process.pid)) > 0:
            peak = max(peak, now)
            time.sleep(0.002)
    assert process.returncode == 0
    return peak - idle


def test_scoring_needs_no_logits_of_all_positions():
    peak = peak_above_idle("lm.score([list(range(1024))] * 8)")
    # 486 MiB measured, compiling included; with the logits of all 8 × 1024 positions at once 4285
    # MiB.
    assert peak < 600 * MIB, peak / MIB


@pytest.mark.slow
def test_reading_prompts_needs_no_more_scores_than_are_bounded():
    peak = peak_above_idle("lm.generate([list(range(1000))] * 16, max_new_tokens=2)")
    # 759 MiB measured, compiling included; with the scores of 16 × 1024 queries at once 1922 MiB.
    assert peak < 900 * MIB, peak / MIB


def test_ctrl_c_ends_a_loop_of_many_tokens_within_seconds():
    numbers = {"max_position_embeddings": 2**15, "hidden_size": 64, "intermediate_size": 4096}
    with child("lm.generate([[3]] * 2, max_new_tokens=30_000)", **numbers) as process:
        assert (
            process.stdin is not None and process.stdout is not None and process.stderr is not None
        )
        assert process.stdout.readline().strip() == "idle"
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() == "decoding"
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        try:
            _, errors = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail("a minute after Ctrl-C the loop is still running")
    assert "KeyboardInterrupt" in errors.splitlines()[-1]
    # A portion of 32 tokens takes milliseconds here; ending a Python process with JAX in it takes
    # the rest.
    assert time.monotonic() - start < 10


def _work(numbers: str, work: str) -> None:
    from random_models import random_model

    lm = random_model(**json.loads(numbers))
    print("idle", flush=True)
    sys.stdin.readline()
    if "30_000" in work:
        advance = lm._functions()[1].advance

        def say_and_advance(*args: Any) -> Any:
            print("decoding", flush=True)
            lm._functions()[1].advance = advance
            return advance(*args)

        lm._functions()[1].advance = say_and_advance  # pyright: ignore[reportAttributeAccessIssue]
    eval(work, {"lm": lm})


if __name__ == "__main__":
    _work(*sys.argv[1:])
