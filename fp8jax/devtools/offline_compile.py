"""Compile for an NVIDIA GPU on a machine that has none, and read what came out.

XLA's GPU compiler needs a description of the target, not the target: with the CUDA plugin of JAX
(no CUDA libraries), `ptxas` and libdevice (the extra `[offline-gpu]`) a CPU machine produces the
code that the GPU would run. Speed cannot be seen this way; these can:

- per kernel: registers, spills, shared memory, blocks per SM, tensor-core instructions by kind,
  widths of asynchronous copies;
- per compiled function: its kernels and copies in order, temporary bytes, and every buffer it
  writes, so that a copied weight shows.

    with OfflineCompiler() as compiler:
        report = compiler.compile("h100", "my_package.programs:decode_step", {"batch": 1})
    report.kernels["scaled_matmul"].registers

A program is named as `module:function`. The function takes the given keyword arguments (JSON
values) and returns a `Program`: what to jit and the shapes to trace it with. It runs in a child
process, since XLA reads its environment once: there CUDA_ROOT points to a folder whose `ptxas` also
keeps its input and its `-v` output, and XLA_FLAGS asks for the list of launches. One child compiles
any number of programs, a small kernel in a few tenths of a second.

No autotuning takes place, so XLA's own choice of matmul kernels in such a report means nothing.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fp8jax.devtools.offline_report import CompileReport, read_report
from fp8jax.devtools.offline_targets import TARGETS, target_description

# Keeps the PTX and the `-v` log of each call side by side. XLA also probes with inputs that are no
# PTX: they leave a log only.
_PTXAS_STAND_IN = """#!/bin/sh
[ "$1" = --version ] && exec "$REAL_PTXAS" --version
id=$PTX_DIR/$(date +%s%N)-$$
for a; do [ -f "$a" ] && grep -q '^\\.version' "$a" && cp "$a" "$id.ptx"; done
"$REAL_PTXAS" -v "$@" 2>"$id.log"; rc=$?
cat "$id.log" >&2; exit $rc
"""


class OfflineCompileError(RuntimeError):
    """The program could not be built or compiled; the text is the compiler's."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What to compile.

    Args:
        function: a traceable function of `arguments`.
        arguments: a tuple of pytrees of `jax.ShapeDtypeStruct`.
        donate_argnums: arguments whose buffers the result may take over, as in `jax.jit`.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donate_argnums: tuple[int, ...] = ()


def available() -> str | None:
    """Why nothing can be compiled here, or None where it can."""
    if importlib.util.find_spec("jax_plugins") is None or not any(
        importlib.util.find_spec(f"jax_plugins.{name}") for name in ("xla_cuda13", "xla_cuda12")
    ):
        return "JAX's CUDA plugin is not installed; pip install 'fp8jax[offline-gpu]'"
    if _toolkit() is None:
        return (
            "no folder with bin/ptxas and nvvm/libdevice/libdevice.10.bc; pip install "
            "'fp8jax[offline-gpu]' or set CUDA_HOME"
        )
    return None


class OfflineCompiler:
    """A child process that compiles; a context manager.

    Raises:
        OfflineCompileError: on entry, where `available()` names a reason.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None
        self._folder: Path | None = None

    def __enter__(self) -> "OfflineCompiler":
        if reason := available():
            raise OfflineCompileError(reason)
        self._folder = Path(tempfile.mkdtemp(prefix="fp8jax-offline-"))
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def compile(
        self, device: str, program: str, arguments: Mapping[str, Any] | None = None
    ) -> CompileReport:
        """Compile one program for one device.

        Args:
            device: a key of `offline_targets.TARGETS`, such as "h100".
            program: "module:function" that returns a `Program`.
            arguments: keyword arguments of that function, JSON values.
        Raises:
            ValueError: an unknown device.
            OfflineCompileError: the program did not build or compile, or the compiler's process
                died.
        """
        if device not in TARGETS:
            raise ValueError(f"device {device!r} is unknown; choose one of {', '.join(TARGETS)}")
        child = self._started()
        assert child.stdin is not None and child.stdout is not None and self._folder is not None
        request = {"device": device, "program": program, "arguments": dict(arguments or {})}
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
        answer = child.stdout.readline()
        if not answer:
            self._stop()
            log = (self._folder / "stderr").read_text(errors="replace")
            raise OfflineCompileError(
                f"{program} for {device}: the compiler's process died:\n{log[-4000:]}"
            )
        reply = json.loads(answer)
        if "error" in reply:
            raise OfflineCompileError(
                f"{program}({request['arguments']}) for {device}: {reply['error']}"
            )
        return CompileReport.from_json(reply)

    def _started(self) -> subprocess.Popen[str]:
        if self._child is None:
            assert self._folder is not None, "use OfflineCompiler in a with statement"
            environment = _prepare_environment(self._folder)
            # Not `-m`: the package imports this file under its own name, and two copies of its
            # classes would not be the same.
            start = "from fp8jax.devtools import offline_compile; offline_compile.serve()"
            with (self._folder / "stderr").open("w") as log:
                self._child = subprocess.Popen(
                    [sys.executable, "-c", start],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment,
                    text=True,
                )
        return self._child

    def _stop(self) -> None:
        if self._child is not None:
            assert self._child.stdin is not None and self._child.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                self._child.stdin.close()  # end of input ends the child
            self._child.stdout.close()
            try:
                self._child.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
            self._child = None


def _prepare_environment(folder: Path) -> dict[str, str]:
    toolkit = _toolkit()
    assert toolkit is not None, "available() was not asked"
    root, launches, ptx = folder / "cuda", folder / "launches", folder / "ptx"
    for made in (root / "bin", launches, ptx):
        made.mkdir(parents=True, exist_ok=True)
    for program in ("nvlink", "fatbinary"):
        if (toolkit / "bin" / program).exists() and not (root / "bin" / program).exists():
            (root / "bin" / program).symlink_to(toolkit / "bin" / program)
    if not (root / "nvvm").exists():
        (root / "nvvm").symlink_to(toolkit / "nvvm")
    (root / "bin" / "ptxas").write_text(_PTXAS_STAND_IN)
    (root / "bin" / "ptxas").chmod(0o755)
    return os.environ | {
        "JAX_PLATFORMS": "cpu",  # the plugin is loaded for compiling only
        "CUDA_ROOT": str(root),
        "REAL_PTXAS": str(toolkit / "bin" / "ptxas"),
        "PTX_DIR": str(ptx),
        "FP8JAX_LAUNCHES": str(launches),
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={launches}".strip(),
        "PYTHONPATH": os.pathsep.join(path for path in [*sys.path, str(Path.cwd())] if path),
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what comes from a cache leaves no PTX
    }


@functools.cache
def _toolkit() -> Path | None:
    """The first folder with ptxas and libdevice: the NVIDIA wheels beside JAX, what the environment
    names, a toolkit on PATH."""
    candidates = [Path(path) / "nvidia" / "cu13" for path in sys.path]
    candidates += [
        Path(os.environ[name])
        for name in ("CUDA_ROOT", "CUDA_HOME", "CUDA_PATH")
        if os.environ.get(name)
    ]
    if found := shutil.which("ptxas"):
        candidates.append(Path(found).resolve().parent.parent)
    candidates.append(Path("/usr/local/cuda"))
    for folder in candidates:
        if (
            os.access(folder / "bin" / "ptxas", os.X_OK)
            and (folder / "nvvm/libdevice/libdevice.10.bc").is_file()
        ):
            return folder
    return None


def serve() -> None:
    """The child's loop: a request a line on standard input, a report a line on what was standard
    output."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a program prints goes to the log, not between the replies
    for line in sys.stdin:
        try:
            reply = dataclasses.asdict(_compile_here(**json.loads(line)))
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _compile_here(device: str, program: str, arguments: dict[str, Any]) -> CompileReport:
    import jax

    launches, ptx = Path(os.environ["FP8JAX_LAUNCHES"]), Path(os.environ["PTX_DIR"])
    for old in (*launches.iterdir(), *ptx.iterdir()):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    mesh = _mesh(device)
    module, _, name = program.partition(":")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        built: Program = getattr(importlib.import_module(module), name)(**arguments)
        placed = jax.tree.map(functools.partial(_placed, mesh), built.arguments)
        jitted = jax.jit(built.function, donate_argnums=built.donate_argnums)
        compiled = jitted.trace(*placed).lower(lowering_platforms=("cuda",)).compile()
    memory: Any = compiled.memory_analysis()
    return read_report(
        gpu=TARGETS[device],
        launches=_read_launches(launches),
        hlo=compiled.as_text() or "",
        ptxas=[
            (path.with_suffix(".ptx").read_text(), path.read_text())
            for path in sorted(ptx.glob("*.log"))
            if path.with_suffix(".ptx").exists()
        ],
        bytes_by_use=collections.defaultdict(
            int,
            {
                "arguments": memory.argument_size_in_bytes,
                "outputs": memory.output_size_in_bytes,
                "aliased": memory.alias_size_in_bytes,
                "temporary": memory.temp_size_in_bytes,
            },
        ),
    )


@functools.cache
def _mesh(device: str) -> Any:
    from jax.experimental import topologies
    from jax.sharding import Mesh

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target_description(TARGETS[device]), topology="1x1x1"
    )
    return Mesh(topology.devices, ("x",))


def _placed(mesh: Any, argument: Any) -> Any:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    return jax.ShapeDtypeStruct(
        argument.shape, argument.dtype, sharding=NamedSharding(mesh, PartitionSpec())
    )


def _read_launches(folder: Path) -> str:
    """The list of launches before command buffers are formed: the same kernels, one a line."""
    # The module of the program is the last one dumped; tracing may have compiled smaller ones on
    # the way.
    files = sorted(
        folder.glob("*thunk_sequence.txt"),
        key=lambda path: int(re.findall(r"module_(\d+)", path.name)[0]),
    )
    return files[-1].read_text() if files else ""
