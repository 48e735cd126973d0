"""What holds for every test: JAX on the CPU unless a GPU is asked for, no silent promotion, no
network.

- `JAX_PLATFORMS=cpu` unless the caller set it or runs `pytest -m gpu`. It is set before any test
  module imports JAX.
- `jax_numpy_dtype_promotion=strict`: bf16 + f32 is an error in tests, so every cast in the library
  is written down.
- Hub clients are offline: a test that would reach for the network fails instead of passing on a
  good day.
- What one test compiled is there for the others of the run: JAX's persistent cache lies in a
  folder that is new with every run, so that no test depends on an earlier one.
- Tests marked `gpu` are skipped, with the reason, where JAX sees no GPU.

Fixtures that several files use: `compiler` (for GPUs that are not here; skips where that cannot be)
and `script`.
"""

import importlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

CACHE = "FP8JAX_TEST_COMPILATION_CACHE"
MADE_HERE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    asks_for_gpu = re.search(r"(?<!not )\bgpu\b", config.option.markexpr)
    if not asks_for_gpu:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

    import jax  # not earlier: JAX reads JAX_PLATFORMS when it is imported

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    # Workers of pytest-xdist find the folder in the environment that they inherit.
    if CACHE not in os.environ:
        config.stash[MADE_HERE] = os.environ[CACHE] = tempfile.mkdtemp(prefix="fp8jax-tests-")
    jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_unconfigure(config: pytest.Config) -> None:
    if folder := config.stash.get(MADE_HERE, None):
        os.environ.pop(CACHE, None)
        shutil.rmtree(folder, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import jax

    if jax.default_backend() != "gpu":
        backend = jax.default_backend()
        reason = f"needs an NVIDIA GPU, JAX runs on {backend} (on a GPU machine: pytest -m gpu)"
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))


# What is left out, by a word of the reason: what to call it, and which command has it.
LEFT_OUT = {
    "NVIDIA GPU": ("need a GPU", "pytest -m gpu"),
    "offline-gpu": ("compile for GPUs that are not here", "EXTRAS=test,offline-gpu make test-all"),
    "get_smollm2": ("need real weights", "python scripts/get_smollm2.py"),
}
DESELECTED = pytest.StashKey[int]()


def pytest_deselected(items: list[pytest.Item]) -> None:
    config = items[0].config
    config.stash[DESELECTED] = config.stash.get(DESELECTED, 0) + len(items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)  # of a worker, for its controller
    if output is not None:
        output["deselected"] = session.config.stash.get(DESELECTED, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    # Every worker collects all tests, so that all of them deselect the same.
    node.config.stash[DESELECTED] = getattr(node, "workeroutput", {}).get("deselected", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One line: what did not run, and which command runs it."""
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    parts = []
    if "not slow" in config.option.markexpr and (slow := config.stash.get(DESELECTED, 0)):
        parts.append(f"{slow} slow tests (make test-all)")
    for word, (what, command) in LEFT_OUT.items():
        if count := sum(word in reason for reason in reasons):
            parts.append(f"{count} that {what} ({command})")
    if other := sum(not any(word in reason for word in LEFT_OUT) for reason in reasons):
        parts.append(f"{other} for other reasons (pytest -rs names them)")
    if parts:
        terminalreporter.write_line(f"not run: {', '.join(parts)}", yellow=True)


@pytest.fixture(scope="module")
def compiler():
    from fp8jax.devtools.offline_compile import OfflineCompiler, available

    if reason := available():
        pytest.skip(reason)
    with OfflineCompiler() as compiler:
        yield compiler


@pytest.fixture
def script(monkeypatch):
    """Imports a script by name, as Python finds it when one script imports another."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "scripts"))
    return importlib.import_module
