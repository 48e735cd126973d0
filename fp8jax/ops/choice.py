"""Which implementation runs an operation here.

| implementation | NVIDIA GPU with FP8 tensor cores                       | older NVIDIA GPU       | any other device   |
|----------------|--------------------------------------------------------|------------------------|--------------------|
| "xla"          | reference                                              | reference              | reference          |
| "auto"         | kernel, or reference where there is none or XLA won    | weight-only, see `ops` | reference          |
| "triton"       | kernel, or NotImplementedError with the reason         | NotImplementedError    | NotImplementedError |

"Here" is the device of the mesh in use if it names one (so that offline compilation chooses as the
real GPU would), else JAX's default device. Triton's compiler aborts the process on GPUs without
FP8, so the choice is made before anything is traced. "XLA won" is an entry of a tuned table
(`pallas_kernels/tuning.py`) that measured both.
"""

import functools
import logging
from typing import Literal

import jax

from fp8jax.pallas_kernels import tuning
from fp8jax.pallas_kernels.interpret_mode import INTERPRETED_DEVICE, interpreting
from fp8jax.pallas_kernels.matmul_config import architecture
from fp8jax.pallas_kernels.matmul_tiles import current_device, current_device_kind

Implementation = Literal["auto", "xla", "triton"]
IMPLEMENTATIONS = ("auto", "xla", "triton")

_FIRST_WITH_FP8 = (8, 9)
_log = logging.getLogger("fp8jax")


def device_kind(implementation: Implementation) -> str:
    """`device_kind` of the GPU whose kernels this implementation may run, "" where there is none.

    Raises:
        ValueError: an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation {implementation!r} is unknown; choose one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "xla":
        return ""
    if implementation == "triton" and interpreting():
        return INTERPRETED_DEVICE
    kind = current_device_kind()
    return kind if architecture(kind) else ""


def runs_kernel(
    op: str,
    implementation: Implementation,
    unsupported: str | None,
    *,
    otherwise: Literal["raise", "reference"] = "raise",
) -> bool:
    """Whether the kernel of an operation runs, rather than its reference.

    Args:
        op: name for errors.
        implementation: what was asked for.
        unsupported: why there is no kernel for the case, or None.
        otherwise: what "triton" does with such a case on a GPU that has kernels: "reference" for
            fusions, whose parts have kernels of their own.
    Raises:
        ValueError: an unknown implementation.
        NotImplementedError: "triton" was named and there is no kernel.
    """
    kind = device_kind(implementation)
    if implementation == "triton":
        if not kind:
            found = current_device_kind() or f"a {jax.default_backend()}"
            raise NotImplementedError(
                f"{op}: implementation 'triton' needs an NVIDIA GPU with FP8 tensor cores (Ada, "
                f"Hopper, Blackwell data center) and this is {found}; use implementation='auto' or "
                "'xla'"
            )
        if unsupported and otherwise == "raise":
            raise NotImplementedError(f"{op}: {unsupported}; use implementation='auto' or 'xla'")
    return bool(kind) and unsupported is None


def tuned(op: str, implementation: Implementation, **shape: int | str) -> tuning.Entry | None:
    """The measured entry nearest to a shape, None where nothing near was measured."""
    return tuning.nearest(tuning.load(device_kind(implementation), op), shape)


def weight_only(implementation: Implementation) -> bool:
    """Whether "auto" keeps activations as they are: an NVIDIA GPU before Ada has FP8 numbers in
    memory but no FP8 products."""
    if implementation != "auto":
        return False
    device = current_device()
    if device is None or device.platform != "gpu":
        return False
    if not has_no_fp8_products(str(getattr(device, "compute_capability", ""))):
        return False
    _say_weight_only(device.device_kind)
    return True


def has_no_fp8_products(compute_capability: str) -> bool:
    """By CUDA compute capability, "8.0"; False for what is no such number (other vendors')."""
    major, _, minor = compute_capability.partition(".")
    return major.isdecimal() and minor.isdecimal() and (int(major), int(minor)) < _FIRST_WITH_FP8


@functools.cache
def _say_weight_only(kind: str) -> None:
    _log.warning(
        "%s has no FP8 tensor cores: FP8 weights are widened, products run in the activation dtype",
        kind,
    )
