"""Run the kernels on a CPU, statement by statement: for tests of the mathematics, slow, and right
about nothing else.

    with interpreted_kernels():
        lm = fp8jax.load_quantized(folder, "fp8_per_block", implementation="triton")
        lm.logits(token_ids)

Inside, operations that name the implementation "triton" interpret the kernels that an H100 would
get; "auto" and "xla" do what they do anywhere else. `jax.jit` knows nothing of this: a function
that was traced inside stays interpreted outside.
"""

import contextlib
import contextvars
from collections.abc import Iterator

INTERPRETED_DEVICE = "NVIDIA H100"

_interpreting = contextvars.ContextVar("fp8jax_interpreting", default=False)


@contextlib.contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Make "triton" work without a GPU, in interpret mode, for what is traced inside."""
    token = _interpreting.set(True)
    try:
        yield
    finally:
        _interpreting.reset(token)


def interpreting() -> bool:
    """Whether kernels are to be interpreted."""
    return _interpreting.get()
