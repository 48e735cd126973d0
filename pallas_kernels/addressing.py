"""Which arrays Pallas-Triton addresses wrongly.

Indices into an array are 32-bit where its size allows, and the limit that JAX's lowering goes by is 2³² elements, while the
offsets are signed: beyond 2³¹ they turn negative. Arrays of more than 2³² elements get 64-bit offsets and are right. For FP8
codes the gap is 2 to 4 GiB. Wrappers refuse such arrays; stacks of experts are split while loading (`fp8jax/qarray.py`).
"""


def unaddressable(size: int) -> bool:
    """Whether kernels must not take an array of so many elements."""
    return 2**31 < size <= 2**32
