"""Rotary position embedding: the frequencies of every published rope type, and their angles.

Channel pair i of a head turns by the angle position · f_i with f_i = theta^(−2i/D), D the rotated
width of a head. The halves of a head are the pairs ("rotate half"); the rotation itself is in
`pallas_kernels/rope_cache.py`. To reach longer contexts, models scale f:

    linear    f / factor
    llama3    long waves / factor, short ones as they are, a linear blend between
    yarn      the same with the blend laid over channel numbers; cos and sin times a factor m
    dynamic   nothing up to max_position_embeddings, beyond which fp8jax does not generate

Source: the formulas of transformers 5, modeling_rope_utils.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

RopeType = Literal["default", "linear", "llama3", "yarn", "dynamic"]
ROPE_TYPES: tuple[RopeType, ...] = ("default", "linear", "llama3", "yarn", "dynamic")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The numbers of one rope: names as in a checkpoint's `rope_parameters`.

    Args:
        rotary_dim: channels of a head that turn, the first ones; even.
        theta: base of the frequencies.
        rope_type: which formula.
        factor: by how much the context was stretched.
        original_max_position_embeddings: context before stretching (llama3, yarn).
    """

    rotary_dim: int
    theta: float
    rope_type: RopeType = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def frequencies(self) -> np.ndarray:
        """f_i in radians a position, float32 `[rotary_dim / 2]`.

        Raises:
            ArithmeticError, ValueError: a logarithm of nothing, a division by zero: numbers that
                make no rope.
        """
        with np.errstate(
            all="ignore"
        ):  # what is not finite in the end is for the reader of the config to judge
            return self._scaled(self._unscaled(self._base())).astype(np.float32)

    def multiplier(self) -> float:
        """What cos and sin are multiplied by: yarn's attention factor, 1 elsewhere."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor

        def growth(scale: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return growth(self.mscale) / growth(self.mscale_all_dim)
        return growth(1.0)

    def _base(self) -> float:
        if (
            self.rope_type != "dynamic" or self.rotary_dim == 2
        ):  # a single pair turns by one radian, whatever the base
            return self.theta
        # Stretched by (s·n/M − (s − 1))^(D/(D−2)), n = M tokens: 1, or what rounding makes of it.
        return self.theta * (self.factor - (self.factor - 1)) ** (
            self.rotary_dim / (self.rotary_dim - 2)
        )

    def _unscaled(self, base: float) -> np.ndarray:
        return base ** (-np.arange(0, self.rotary_dim, 2, dtype=np.float64) / self.rotary_dim)

    def _scaled(self, f: np.ndarray) -> np.ndarray:
        match self.rope_type:
            case "linear":
                return f / self.factor
            case "llama3":
                low, high = self.low_freq_factor, self.high_freq_factor
                length, wave = self.original_max_position_embeddings, 2 * math.pi / f
                is_long, is_short = wave > length / low, wave < length / high
                blend = (length / wave - low) / (high - low) if high != low else np.zeros_like(f)
                # Bounds in the wrong order leave nothing between them: what is long comes first.
                between = np.where(is_short, f, f * (blend + (1 - blend) / self.factor))
                return np.where(is_long, f / self.factor, between)
            case "yarn":
                low, high = self._yarn_channel(self.beta_fast), self._yarn_channel(self.beta_slow)
                if self.truncate:
                    low, high = math.floor(low), math.ceil(high)
                low, high = max(low, 0), min(high, self.rotary_dim - 1)
                ramp = np.clip((np.arange(f.size) - low) / ((high - low) or 0.001), 0, 1)
                return f * (1 - ramp) + f / self.factor * ramp
            case _:
                return f

    def _yarn_channel(self, turns: float) -> float:
        """The channel whose wave turns this often within the original context."""
        ratio = self.original_max_position_embeddings / (turns * 2 * math.pi)
        return self.rotary_dim * math.log(ratio) / (2 * math.log(self.theta))


def cos_sin(rope: Rope, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position's angles.

    Args:
        positions: int `[b, t]`.
    Returns:
        Two float32 arrays `[b, t, rotary_dim / 2]`.
    """
    angles = positions[..., None].astype(jnp.float32) * rope.frequencies()[None, None]
    multiplier = jnp.float32(rope.multiplier())
    return jnp.cos(angles) * multiplier, jnp.sin(angles) * multiplier
