"""All that needs a GPU, in three parts of under nine minutes each, so that half an hour of GPU time
does it.

    python scripts/gpu_session.py --part tests         # pytest -m gpu, one file after the other
    python scripts/gpu_session.py --part tune          # tuned tables: linear layers, then experts
    python scripts/gpu_session.py --part benchmark     # products, expert layers, prefill and decode
    python scripts/gpu_session.py --part all --rehearse    # tiny shapes on the CPU: that it runs

Run a part again to go on where it stopped: what is done is not done twice. Everything lands under
`scripts/results/<device>/` as it comes (tuned tables in `pallas_kernels/tuned/<device>/`), with
device, versions and date: `session.json` says which steps ran and how they ended, and keeps the end
of what they printed. A plan made beforehand without a GPU
(`tune_kernels.py --device … --plan scripts/results/<device>/plan.json`) spares tuning the configs
that cannot win; it is used if it is there.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from fp8jax.devtools.benchmarking import Deadline, ResultFile
from fp8jax.pallas_kernels import tuning

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("tests", "tune", "benchmark")
_PART_MINUTES = 8.3  # three of them and the way between fit into 25 minutes
_EXPERT_MODELS = "granite-3.0-1b-a400m,qwen3-30b-a3b"
_GRACE_SECONDS = 20  # for a step to finish its row after its own limit
_TAIL = 3000


@dataclasses.dataclass(frozen=True)
class Step:
    """One child process.

    Args:
        name: under which it is remembered.
        arguments: of the Python interpreter.
        minutes: how long it may take, if the part has so much left.
        repeat: "until passed" for a test file, "always" for what knows itself where it stopped.
        takes_minutes: it has the option --minutes and stops by itself.
    """

    name: str
    arguments: list[str]
    minutes: float
    repeat: Literal["until passed", "always"]
    takes_minutes: bool = True


def gpu_test_steps(environment: dict[str, str], *, rehearse: bool) -> Iterator[Step]:
    """A step a file with GPU tests; in a rehearsal one file of quick tests stands in for them."""
    if rehearse:
        files = ["tests/test_tuning.py"]
    else:
        listed = _run(
            ["-m", "pytest", "-m", "gpu", "--collect-only", "-q"], environment, seconds=120
        )
        files = list(
            dict.fromkeys(
                line.split("::")[0] for line in listed.stdout.splitlines() if "::" in line
            )
        )
    for file in files:
        marker = [] if rehearse else ["-m", "gpu"]
        arguments = ["-m", "pytest", *marker, file, "-q", "-p", "no:cacheprovider"]
        yield Step(f"test {file}", arguments, _PART_MINUTES, "until passed", takes_minutes=False)


def tune_steps(results: Path, *, rehearse: bool) -> Iterator[Step]:
    """The tuned tables: linear layers in at most 60 % of the time, then experts."""
    arguments = ["scripts/tune_kernels.py", "--json", str(results / "tuning.json")]
    dense, experts = (
        ["--op", "scaled_matmul,block_scaled_matmul"],
        ["--op", "grouped_scaled_matmul"],
    )
    if rehearse:
        arguments += [
            "--shapes",
            "tiny",
            "--m",
            "1",
            "--tokens",
            "1",
            "--most",
            "1",
            "--samples",
            "1",
        ]
        arguments += ["--tuned", str(results / "tuned")]
    else:
        experts += ["--shapes", _EXPERT_MODELS]
        if (plan := results / "plan.json").exists():
            arguments += ["--plan", str(plan)]
    yield Step("tune", [*arguments, *dense], 0.6 * _PART_MINUTES, "always")
    yield Step("tune experts", [*arguments, *experts], _PART_MINUTES, "always")


def benchmark_steps(results: Path, *, rehearse: bool) -> Iterator[Step]:
    """Matrix products and expert layers in 30 % of the time each, whole models in what is left."""
    matmul = ["scripts/benchmark_matmul.py", "--json", str(results / "matmul.json")]
    experts = ["scripts/benchmark_moe.py", "--json", str(results / "moe.json")]
    generate = ["scripts/benchmark_generate.py", "--json", str(results / "generate.json")]
    if rehearse:
        tiny = ["--shapes", "tiny", "--samples", "1"]
        matmul += [*tiny, "--m", "1", "--only", "bf16,per_tensor,per_block"]
        experts += [*tiny, "--tokens", "1", "--only", "bf16,per_block,block_per_tensor"]
        generate += ["--model", "tiny", "--batch", "1", "--prompt", "16", "--steps", "2"]
    else:
        experts += ["--shapes", _EXPERT_MODELS]
    yield Step("matrix products", matmul, 0.3 * _PART_MINUTES, "always")
    yield Step("expert layers", experts, 0.3 * _PART_MINUTES, "always")
    yield Step("prefill and decode", generate, _PART_MINUTES, "always")


def run_part(
    part: str, results: Path, environment: dict[str, str], session: ResultFile, *, rehearse: bool
) -> bool:
    """Run a part's steps until its time is over; returns whether all of them ended well."""
    deadline = Deadline(_PART_MINUTES)
    steps = {
        "tests": lambda: gpu_test_steps(environment, rehearse=rehearse),
        "tune": lambda: tune_steps(results, rehearse=rehearse),
        "benchmark": lambda: benchmark_steps(results, rehearse=rehearse),
    }[part]()
    well = True
    for step in steps:
        if step.repeat == "until passed" and session.find(step=step.name, outcome="ended well"):
            continue
        seconds = min(60 * step.minutes, deadline.seconds_left)
        if seconds <= _GRACE_SECONDS:
            print(f"{part}: out of time before {step.name!r}; run the part again", flush=True)
            return False
        own_limit = (
            ["--minutes", f"{(seconds - _GRACE_SECONDS) / 60:.2f}"] if step.takes_minutes else []
        )
        print(f"==> {part}: {step.name}, at most {seconds:.0f} s", flush=True)
        start = time.monotonic()
        done = _run([*step.arguments, *own_limit], environment, seconds=seconds)
        outcome = {0: "ended well", _TIMED_OUT: "cut off"}.get(
            done.returncode, f"failed ({done.returncode})"
        )
        row = {
            "part": part,
            "step": step.name,
            "outcome": outcome,
            "seconds": round(time.monotonic() - start, 1),
        }
        session.add(
            row
            | {
                "command": step.arguments,
                "output": done.stdout[-_TAIL:],
                "errors": done.stderr[-_TAIL:],
            }
        )
        print(
            done.stdout[-_TAIL:],
            done.stderr[-_TAIL:] if done.returncode else "",
            sep="",
            flush=True,
        )
        well = well and done.returncode == 0
    return well


_TIMED_OUT = 124


def _run(
    arguments: list[str], environment: dict[str, str], *, seconds: float
) -> subprocess.CompletedProcess[str]:
    """A Python child in the checkout; code 124 where it was cut off."""
    command = [sys.executable, *arguments]
    try:
        return subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        printed, errors = (
            text.decode(errors="replace") if isinstance(text, bytes) else text or ""
            for text in (late.stdout, late.stderr)
        )
        return subprocess.CompletedProcess(command, _TIMED_OUT, printed, errors)


def _device(environment: dict[str, str]) -> tuple[str, str]:
    """Platform and device kind, asked in a child: this process must not hold the GPU's memory."""
    ask = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep='|')"
    found = _run(["-c", ask], environment, seconds=120)
    if found.returncode:
        raise SystemExit(f"gpu_session: JAX does not start: {found.stderr[-_TAIL:]}")
    platform, _, kind = found.stdout.strip().splitlines()[-1].partition("|")
    return platform, kind


def main(
    part: Annotated[str, typer.Option(help=f"One of {', '.join(PARTS)}, or all.")],
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="On the CPU, on tiny shapes.")
    ] = False,
    results: Annotated[
        Path | None, typer.Option(help="Folder for results; scripts/results by default.")
    ] = None,
) -> None:
    """Run a part of what needs a GPU."""
    if part not in (*PARTS, "all"):
        raise SystemExit(
            f"gpu_session: part {part!r} is unknown; choose one of {', '.join(PARTS)} or all"
        )
    environment = (
        os.environ | {"PYTHONPATH": str(ROOT)} | ({"JAX_PLATFORMS": "cpu"} if rehearse else {})
    )
    platform, kind = _device(environment)
    if platform != "gpu" and not rehearse:
        raise SystemExit(
            f"gpu_session: JAX sees {kind!r} and no GPU; --rehearse runs everything on the CPU on "
            "tiny shapes"
        )
    if results is None:  # a rehearsal measures nothing that anyone should keep
        results = (
            Path(tempfile.mkdtemp(prefix="fp8jax-rehearsal-"))
            if rehearse
            else ROOT / "scripts" / "results"
        )
    folder = results.resolve() / tuning.device_folder(kind)
    try:
        session = ResultFile(folder / "session.json", title="GPU session", device=kind)
    except ValueError as error:
        raise SystemExit(f"gpu_session: {error}") from None
    parts = PARTS if part == "all" else (part,)
    well = [run_part(name, folder, environment, session, rehearse=rehearse) for name in parts]
    print(
        json.dumps(
            {**session.header, "results": str(folder), **dict(zip(parts, well, strict=True))}
        )
    )
    if not all(well):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
