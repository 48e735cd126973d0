"""scripts/gpu_session.py: parts under nine minutes that go on where they stopped, and nothing of it
without a GPU but a rehearsal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def session(script, monkeypatch, tmp_path):
    """`gpu_session` with child processes that do nothing but remember that they were asked for."""
    module = script("gpu_session")
    asked, codes = [], {}

    def run(arguments, environment, *, seconds):
        asked.append((arguments, seconds))
        out = (
            "tests/test_a.py::test_x\ntests/test_b.py::test_y\n"
            if "--collect-only" in arguments
            else "done"
        )
        code = next((code for part, code in codes.items() if part in arguments), 0)
        return module.subprocess.CompletedProcess(arguments, code, out, "")

    monkeypatch.setattr(module, "_run", run)
    monkeypatch.setattr(module, "_device", lambda environment: ("gpu", "NVIDIA H200"))
    return module, asked, codes, tmp_path


def test_gpu_tests_that_passed_are_not_run_again_and_others_are(session, capsys):
    module, asked, codes, results = session
    codes["tests/test_b.py"] = 1
    with pytest.raises(SystemExit):  # so that a caller sees that something failed
        module.main(part="tests", results=results)
    asked.clear()
    codes.clear()
    module.main(part="tests", results=results)
    files = [part for arguments, _ in asked for part in arguments if part.startswith("tests/")]
    assert files == ["tests/test_b.py"]
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["tests"] is True
    rows = json.loads((results / "nvidia_h200" / "session.json").read_text())["rows"]
    assert [row["outcome"] for row in rows] == ["ended well", "failed (1)", "ended well"]


@pytest.mark.parametrize("part", ["tests", "tune", "benchmark"])
def test_a_part_stays_under_nine_minutes(session, part):
    module, asked, _, results = session
    module.main(part=part, results=results)
    for arguments, seconds in asked:
        assert seconds <= 9 * 60
        if "--minutes" in arguments:  # its own limit comes before it is cut off
            assert 60 * float(arguments[arguments.index("--minutes") + 1]) < seconds


@pytest.mark.parametrize(
    "part, expected",
    [
        ("tune", [("tune_kernels", 0.6), ("tune_kernels", 1.0)]),
        (
            "benchmark",
            [("benchmark_matmul", 0.3), ("benchmark_moe", 0.3), ("benchmark_generate", 1.0)],
        ),
    ],
)
def test_experts_get_their_share_of_a_part_behind_linear_layers(session, part, expected):
    module, asked, _, results = session
    module.main(part=part, results=results)
    assert [Path(arguments[0]).stem for arguments, _ in asked] == [name for name, _ in expected]
    for (_, seconds), (_, share) in zip(asked, expected, strict=True):
        assert seconds == pytest.approx(
            share * 60 * module._PART_MINUTES, abs=5
        )  # nothing was run in between
    of_experts = asked[1][0]
    assert of_experts[of_experts.index("--shapes") + 1] == "granite-3.0-1b-a400m,qwen3-30b-a3b"
    if part == "tune":
        ops = [arguments[arguments.index("--op") + 1] for arguments, _ in asked]
        assert ops == ["scaled_matmul,block_scaled_matmul", "grouped_scaled_matmul"]


def test_a_plan_made_beforehand_is_used(session):
    module, asked, _, results = session
    (results / "nvidia_h200").mkdir(parents=True)
    (results / "nvidia_h200" / "plan.json").write_text("{}")
    module.main(part="tune", results=results)
    assert all("--plan" in arguments for arguments, _ in asked)


def test_without_a_gpu_only_a_rehearsal_runs(session, monkeypatch):
    module, asked, _, results = session
    monkeypatch.setattr(module, "_device", lambda environment: ("cpu", "cpu"))
    with pytest.raises(SystemExit, match="--rehearse"):
        module.main(part="all", results=results)
    assert not asked


def test_a_step_that_takes_too_long_is_cut_off_and_keeps_what_it_printed(script):
    run = script("gpu_session")._run
    done = run(
        ["-c", "import time; print('a row', flush=True); time.sleep(60)"],
        dict(os.environ),
        seconds=3,
    )
    assert (done.returncode, done.stdout) == (124, "a row\n")


@pytest.mark.slow
def test_a_rehearsal_runs_every_part(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "scripts" / "gpu_session.py"),
        "--part",
        "all",
        "--rehearse",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command += ["--results", str(tmp_path)]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout.strip().splitlines()[-1])
    assert all(found[part] for part in ("tests", "tune", "benchmark"))
    names = {"session.json", "tuning.json", "matmul.json", "moe.json", "generate.json", "tuned"}
    assert {path.name for path in (tmp_path / "cpu").iterdir()} == names
