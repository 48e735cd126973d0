"""Which arrays Pallas-Triton addresses wrongly.

Offsets into an array, counted in elements, are 32-bit unless the array has more than 2³² bytes, and they are signed: beyond 2³¹
elements they turn negative. For one-byte elements that leaves a gap of 2 to 4 GiB; wider ones have none. Wrappers refuse such
arrays; stacks of experts are split while loading (`fp8jax/qarray.py`).
"""


def unaddressable(size: int) -> bool:
    """Whether kernels must not take an array of so many one-byte elements."""
    return 2**31 < size <= 2**32
