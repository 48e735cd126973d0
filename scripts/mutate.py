"""Do the tests see a fault? Plant faults one by one, and let the tests that should catch each one
run.

A fault is a few characters of the library that are exchanged: an epsilon a hundred times too large,
a window that is off by one, gate and up the wrong way round. Every one of them leaves a model that
loads, runs and writes plausible text. For each, the script copies the checkout, plants the fault in
the copy and runs the tests named beside it there. They must pass without the fault and fail with
it; the first test that failed is what the table shows.

    python scripts/mutate.py                    # all faults, two at a time; a table, then JSON
    python scripts/mutate.py --only epsilon      # those with this in their name
    python scripts/mutate.py --every-test       # each fault against all of `make test`

The named tests are part of `make test` (`-m "not slow"`). A fault whose text is no longer found, or
found twice, is an error: it has to follow the code that it is planted in.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from planted_faults import FAULTS, Fault
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SECONDS_A_FAULT = 600
_FIRST_FAILURE = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one fault: the test that failed first, or why it counts as not caught."""

    fault: Fault
    caught_by: str | None
    remark: str = ""


def main(
    only: Annotated[str, typer.Option(help="Faults with this in their name.")] = "",
    jobs: Annotated[int, typer.Option(help="Faults that are tried at the same time.")] = 2,
    every_test: Annotated[
        bool, typer.Option("--every-test", help="All of `make test` for each fault.")
    ] = False,
) -> None:
    """Plant each fault and see which test fails."""
    faults = [fault for fault in FAULTS if only in fault.name]
    if not faults:
        names = ", ".join(fault.name for fault in FAULTS)
        raise typer.BadParameter(
            f"no fault has {only!r} in its name; there are: {names}", param_hint="--only"
        )
    tests = sorted({test for fault in faults for test in fault.tests})
    if failed := run_tests(ROOT, [f"--numprocesses={jobs}", "--dist=loadfile", *tests]):
        sys.exit(f"{failed} fails without any fault; nothing can be said of faults until it passes")
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(faults), unit="fault") as bar:

        def one(fault: Fault) -> Verdict:
            verdict = judge(fault, ["tests"] if every_test else fault.tests)
            bar.update()
            return verdict

        verdicts = list(pool.map(one, faults))
    Console(width=160).print(table(verdicts))
    caught = sum(verdict.caught_by is not None for verdict in verdicts)
    rows = {verdict.fault.name: verdict.caught_by for verdict in verdicts}
    print(json.dumps({"faults": len(verdicts), "caught": caught, "caught_by": rows}))
    sys.exit(caught < len(verdicts))


def judge(fault: Fault, tests: Sequence[str]) -> Verdict:
    """Plant one fault in a copy of the checkout and run tests there."""
    with tempfile.TemporaryDirectory(prefix="fp8jax-fault-") as folder:
        copy = Path(folder) / "checkout"
        tracked = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(
            tracked, cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.split("\0")
        for name in filter(None, names):
            source, target = ROOT / name, copy / name
            if source.is_symlink() or source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)
        fault.plant(copy)
        try:
            failed = run_tests(copy, tests)
        except subprocess.TimeoutExpired:
            return Verdict(fault=fault, caught_by=None, remark=f"no end within {SECONDS_A_FAULT} s")
        except RuntimeError as error:
            return Verdict(fault=fault, caught_by=None, remark=str(error))
    return Verdict(fault=fault, caught_by=failed, remark="" if failed else "every test passed")


def run_tests(checkout: Path, tests: Sequence[str]) -> str | None:
    """The first of the tests (arguments of pytest) that fails in a checkout, None where all pass.

    Raises:
        RuntimeError: no test ran, or pytest itself went wrong: neither is a fault that was seen.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command,
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS_A_FAULT,
    )
    if done.returncode == 0:
        return None
    first = _FIRST_FAILURE.search(done.stdout)
    if done.returncode != 1 or first is None:
        raise RuntimeError(
            f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-400:]}"
        )
    return first[1]


def table(verdicts: Sequence[Verdict]) -> Table:
    result = Table("fault", "planted in", "caught by")
    for verdict in verdicts:
        result.add_row(
            verdict.fault.name,
            verdict.fault.file,
            verdict.caught_by or f"[red]nothing: {verdict.remark}",
        )
    return result


if __name__ == "__main__":
    typer.run(main)
