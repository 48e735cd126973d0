"""FP8 as numbers and tables: what a code is, and how many numbers share a scale.

A number x is stored as a code q in e4m3 and a float32 scale s: x ≈ q · s. e4m3fn ("finite, no
infinity") has 4 bits of exponent and 3 of mantissa, ends at 448 and has 2⁻⁶ as its smallest normal
number.

A *granularity* says how many numbers share a scale: a block of so many rows and columns, of which
`None` takes all there are. Everything else about a granularity follows from these two numbers: the
shape of the scales, where they are applied (once behind a sum over k, or in steps along it), and
which kernel that is. The tables below are the only place where they stand.

    weight [n, k]    block        scales                 experts [e, n, k]         amax is at least
    "tensor"         all          [1]                    [e]                       448 · 2⁻¹²⁶
    "channel"        1 × all      [n, 1]                 [e, n, 1]                 448 · 2⁻¹²⁶
    "block"          128 × 128    [⌈n/128⌉, ⌈k/128⌉]     [e, ⌈n/128⌉, ⌈k/128⌉]     1e-4

    activation [m, k]
    "tensor"         all          [1]
    "token"          1 × all      [m, 1]
    "group"          1 × 128      [m, ⌈k/128⌉]

The floor of the amax keeps a block of zeros from a scale of zero. 448 · 2⁻¹²⁶ is the smallest that
leaves the scale a normal number. Source: vLLM 0.20.2, `scaled_fp8_quant` and
`per_block_cast_to_fp8`.

A stack of gate and up rows is two *row groups*: blocks are laid out in each half for itself, so
that none mixes the two where a half is no multiple of 128 rows. The scales of "block" are then
`[e, 2⌈i/128⌉, ⌈k/128⌉]`, gate first.
"""

import math
from dataclasses import dataclass
from typing import Literal

E4M3_MAX = 448.0
SMALLEST_CODE = 2.0**-9
SMALLEST_NORMAL = 2.0**-126  # of float32 and bfloat16
BLOCK = 128

WeightGranularity = Literal["tensor", "channel", "block"]
ActivationGranularity = Literal["tensor", "token", "group"]


@dataclass(frozen=True, kw_only=True)
class Granularity:
    """The block of a matrix that shares a scale; hashable.

    Args:
        name: "tensor", "block".
        rows, columns: of the block; None for all there are. A block of all rows has all columns
            too.
        activations: names of the activation granularities that products with such a weight can
            take; () for a granularity of activations.
        amax_floor: a smaller amax of a weight's block is taken for this one.
    """

    name: str
    rows: int | None
    columns: int | None
    activations: tuple[ActivationGranularity, ...] = ()
    amax_floor: float = E4M3_MAX * SMALLEST_NORMAL

    def __post_init__(self) -> None:
        assert self.rows is not None or self.columns is None, self

    @property
    def one_scale(self) -> bool:
        """Whether a matrix has one scale, which no part of it knows by itself."""
        return self.rows is None

    @property
    def changes_along_k(self) -> bool:
        """Whether a row has several scales, which a sum over k has to apply on its way."""
        return self.columns is not None

    @property
    def subnormals_count(self) -> bool:
        """Whether a subnormal weight can become a code other than 0.

        A weight becomes 0 below half the smallest code times the scale, whose floor decides.
        """
        smallest_scale = self.amax_floor / E4M3_MAX
        return smallest_scale * SMALLEST_CODE / 2 < SMALLEST_NORMAL

    @property
    def row_step(self) -> int:
        """Where a matrix may be cut: at multiples of this, between blocks and tiles of a kernel."""
        return math.lcm(BLOCK, self.rows or 1)

    def scale_shape(self, shape: tuple[int, ...], *, row_groups: int = 1) -> tuple[int, ...]:
        """The shape of the scales of a matrix `[n, k]` or of a stack `[e, n, k]`."""
        *experts, n, k = shape
        if self.one_scale:
            return tuple(experts) or (1,)
        return (*experts, self.scale_rows(n, row_groups=row_groups), blocks(k, self.columns))

    def scale_rows(self, n: int, *, row_groups: int = 1) -> int:
        """How many rows of scales n rows have; 0 where one scale is all there is."""
        if self.rows is None:
            return 0
        return row_groups * blocks(n // row_groups, self.rows)


def blocks(size: int, block: int | None) -> int:
    """How many blocks, the last one perhaps shorter, cover a dimension."""
    return 1 if block is None else -(-size // block)


WEIGHTS: dict[WeightGranularity, Granularity] = {
    "tensor": Granularity(name="tensor", rows=None, columns=None, activations=("token", "tensor")),
    "channel": Granularity(name="channel", rows=1, columns=None, activations=("token", "tensor")),
    "block": Granularity(
        name="block", rows=BLOCK, columns=BLOCK, activations=("group",), amax_floor=1e-4
    ),
}
ACTIVATIONS: dict[ActivationGranularity, Granularity] = {
    "tensor": Granularity(name="tensor", rows=None, columns=None),
    "token": Granularity(name="token", rows=1, columns=None),
    "group": Granularity(name="group", rows=1, columns=BLOCK),
}


def unaddressable(size: int) -> bool:
    """Whether kernels must not take an array of so many one-byte elements.

    Pallas-Triton counts offsets in elements, in 32 bits unless the array has more than 2³² bytes,
    and signed: beyond 2³¹ elements they turn negative. For one-byte elements that leaves a gap of
    2 to 4 GiB; wider ones have none. Wrappers refuse such arrays; stacks of experts are split while
    they are loaded (`fp8jax/qarray.py`).
    """
    return 2**31 < size <= 2**32
