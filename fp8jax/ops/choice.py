"""Which implementation runs the operations of a trace: asked once, then carried along as a value.

| implementation | NVIDIA GPU with FP8 tensor cores   | older NVIDIA GPU    | any other device    |
|----------------|------------------------------------|---------------------|---------------------|
| "xla"          | reference                          | reference           | reference           |
| "auto"         | kernel, or reference where there   | weight-only, see    | reference           |
|                | is none or XLA won                 | `matmul`            |                     |
| "triton"       | kernel, or NotImplementedError     | NotImplementedError | NotImplementedError |

"triton_interpreted" runs the H100's kernels statement by statement on any device: for tests of the
mathematics, slow, and right about nothing else.

The device is that of the mesh in use if it names one (so that offline compilation chooses as the
real GPU would), else JAX's default device. Triton's compiler aborts the process on GPUs without
FP8, so the choice is made before anything is traced. "XLA won" is an entry of a tuned table
(`pallas_kernels/tuning.py`) that measured both.

A forward pass resolves its `Choice` once (`choose`) and hands it to every operation, which take
either: a name from whoever calls them alone, a `Choice` from a model. A fusion that has no kernel
for a case is left to its parts, which have kernels of their own, also where "triton" was named.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from fp8jax.device import (
    H100,
    Gpu,
    current_device,
    current_gpu,
    has_no_fp8_products,
    needs_gpu,
)
from fp8jax.ops.decisions import note
from fp8jax.pallas_kernels import tuning
from fp8jax.pallas_kernels.matmul_config import Config

Implementation = Literal["auto", "xla", "triton", "triton_interpreted"]
IMPLEMENTATIONS = ("auto", "xla", "triton", "triton_interpreted")

WhyNot = Callable[[Gpu], str | None]
"""A GPU -> why there is no kernel for a case on it, None if there is one."""

_log = logging.getLogger("fp8jax")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What runs the operations of one trace; hashable, so that it can be static data of a pytree.

    Args:
        implementation: what was asked for.
        gpu: whose kernels may run; None where references do.
        weight_only: activations stay as they are and FP8 weights are widened, for GPUs that have
            FP8 numbers in memory but no FP8 products.
    """

    implementation: Implementation
    gpu: Gpu | None = None
    weight_only: bool = False

    @property
    def interpret(self) -> bool:
        """Whether kernels are run statement by statement instead of being compiled."""
        return self.implementation == "triton_interpreted"

    def runs_kernel(self, op: str, why_not: WhyNot, *, fusion: bool = False) -> bool:
        """Whether the kernel of an operation runs, rather than its reference.

        Args:
            op: its name, for errors and for `explain`.
            why_not: of the case.
            fusion: the operation has parts that run where it has no kernel.
        Raises:
            NotImplementedError: a kernel was asked for by name and there is none.
        """
        reason = self._why_not(op, why_not, fusion=fusion)
        note(op, kernel=reason is None, why_not=reason)
        return reason is None

    def config(
        self,
        op: str,
        why_not: WhyNot,
        by_rule: Callable[[Gpu], Config],
        *,
        shape: Mapping[str, int | str],
        measured: bool = True,
        told: bool = True,
    ) -> Config | None:
        """The tiles that the kernel of an operation runs with; None where its reference runs.

        Args:
            op, why_not: as for `runs_kernel`.
            by_rule: a GPU -> the config where nothing was measured.
            shape: as the tuned tables name it.
            measured: whether measured configs count.
            told: whether this is the operation's own decision, which `explain` shows.
        Raises:
            NotImplementedError: a kernel was asked for by name and there is none.
        """
        reason, source, config = self._why_not(op, why_not), "", None
        if reason is None:
            assert self.gpu is not None
            config, source = by_rule(self.gpu), "rule"
            entry = None
            if measured and not self.interpret:
                entry = tuning.nearest(tuning.load(self.gpu.kind, op), shape)
            if entry is not None:
                config, source = Config(**entry.config), f"measured {entry.date}"
                if self.implementation == "auto" and entry.implementation == "xla":
                    reason = (
                        f"XLA was faster when both were measured ({entry.xla_microseconds:.1f} and "
                        f"{entry.microseconds:.1f} us, {entry.date})"
                    )
        config = config if reason is None else None
        if told:
            note(op, kernel=not reason, why_not=reason, shape=shape, config=config, source=source)
        return config

    def _why_not(self, op: str, why_not: WhyNot, *, fusion: bool = False) -> str | None:
        if self.gpu is None:
            return (
                "implementation 'xla'"
                if self.implementation == "xla"
                else "no GPU with FP8 tensor cores"
            )
        reason = why_not(self.gpu)
        if reason and self.implementation != "auto" and not fusion:
            raise NotImplementedError(f"{op}: {reason}; use implementation='auto' or 'xla'")
        return reason


def choose(implementation: Implementation | Choice) -> Choice:
    """What runs here; a `Choice` that was made before comes back as it is.

    Raises:
        ValueError: an unknown implementation.
        NotImplementedError: "triton" on a device that cannot run its kernels.
    """
    if isinstance(implementation, Choice):
        return implementation
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation {implementation!r} is unknown; choose one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "xla":
        return Choice(implementation="xla")
    if implementation == "triton_interpreted":
        return Choice(implementation="triton_interpreted", gpu=H100)
    gpu = current_gpu()
    if gpu is None and implementation == "triton":
        raise NotImplementedError(
            f"implementation 'triton' {needs_gpu()}; use implementation='auto' or 'xla'"
        )
    weight_only = gpu is None and implementation == "auto" and _is_older_gpu()
    return Choice(implementation=implementation, gpu=gpu, weight_only=weight_only)


def _is_older_gpu() -> bool:
    """Whether this is an NVIDIA GPU before Ada."""
    device = current_device()
    if device is None or device.platform != "gpu":
        return False
    if not has_no_fp8_products(str(getattr(device, "compute_capability", ""))):
        return False
    _say_weight_only(device.device_kind)
    return True


@functools.cache
def _say_weight_only(kind: str) -> None:
    _log.warning(
        "%s has no FP8 tensor cores: FP8 weights are widened, products run in the activation dtype",
        kind,
    )
