"""What holds for every test: JAX on the CPU unless a GPU is asked for, no silent promotion, no
network.

- `JAX_PLATFORMS=cpu` unless the caller set it or runs `pytest -m gpu`. It is set before any test
  module imports JAX.
- `jax_numpy_dtype_promotion=strict`: bf16 + f32 is an error in tests, so every cast in the library
  is written down.
- Hub clients are offline: a test that would reach for the network fails instead of passing on a
  good day.
- JAX's persistent compilation cache stays off: a test must not depend on what an earlier run
  compiled.
- Tests marked `gpu` are skipped, with the reason, where JAX sees no GPU.

Fixtures that several files use: `compiler` (for GPUs that are not here; skips where that cannot be)
and `script`.
"""

import importlib
import os
import re
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    asks_for_gpu = re.search(r"(?<!not )\bgpu\b", config.option.markexpr)
    if not asks_for_gpu:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

    import jax  # not earlier: JAX reads JAX_PLATFORMS when it is imported

    jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import jax

    if jax.default_backend() != "gpu":
        reason = f"needs an NVIDIA GPU, JAX runs on {jax.default_backend()} (on a GPU machine: pytest -m gpu)"
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))


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
