"""What "FP8" means for a layer: how its weight is quantized and how its activations are.

A number is stored as an e4m3 code q and a float32 scale s, x ≈ q · s. The *granularity* says how
many numbers share a scale:

    weight      tensor   one scale a matrix                 scale [1]
                channel  one scale an output row            scale [n, 1]
                block    one scale a 128×128 block          scale [⌈n/128⌉, ⌈k/128⌉]
    activation  tensor   one scale for all rows             scale [1]
                token    one scale a row                    scale [m, 1]
                group    one scale per 128 inputs of a row  scale [m, ⌈k/128⌉]

A `Scheme` is one choice of each, with the name users write. e4m3fn ("finite, no infinity") ends at
448 and its smallest normal number is 2⁻⁶. Source of the recipes: vLLM's Online Quantization; fp8jax
quantizes the activations of `fp8_per_tensor` per token, so that a token's result does not depend on
who shares its batch.
"""

from dataclasses import dataclass

from fp8jax.pallas_kernels.formats import (
    WEIGHTS,
    ActivationGranularity,
    Granularity,
    WeightGranularity,
)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A weight recipe and an activation recipe, hashable, so that it can be static data of a
    pytree.

    Args:
        name: what users write, `"fp8_per_tensor"`.
        weight: granularity of the weight's scales.
        activation: granularity of the activations' scales, computed on the fly.
    """

    name: str
    weight: WeightGranularity
    activation: ActivationGranularity

    def __post_init__(self) -> None:
        if self.weight not in WEIGHTS:
            raise ValueError(
                f"Scheme {self.name!r}: weight granularity {self.weight!r} is unknown; choose one "
                f"of {', '.join(WEIGHTS)}"
            )
        if self.activation not in self.granularity.activations:
            raise ValueError(
                f"Scheme {self.name!r}: weights with scales per {self.weight} meet activations "
                f"with scales per {' or '.join(self.granularity.activations)}, got "
                f"activation={self.activation!r}"
            )

    @property
    def granularity(self) -> Granularity:
        """The weight's row in the table of granularities."""
        return WEIGHTS[self.weight]


FP8_PER_TENSOR = Scheme(name="fp8_per_tensor", weight="tensor", activation="token")
FP8_PER_TENSOR_WHOLE_BATCH = Scheme(name="fp8_per_tensor", weight="tensor", activation="tensor")
FP8_PER_CHANNEL = Scheme(name="fp8_per_channel", weight="channel", activation="token")
FP8_PER_BLOCK = Scheme(name="fp8_per_block", weight="block", activation="group")

SCHEMES = {scheme.name: scheme for scheme in (FP8_PER_TENSOR, FP8_PER_BLOCK)}
"""The schemes that `load_quantized` takes by name."""

# Names of the reference that users may bring along. Saying "not supported" helps more than
# "unknown".
UNSUPPORTED_SCHEMES = (
    "fp8_per_channel",
    "mxfp8",
    "int8_per_channel_weight_only",
    "mxfp4",
    "nvfp4_per_token",
)


def scheme_named(name: str) -> Scheme:
    """The scheme that a user names.

    Raises:
        ValueError: the name is unknown or belongs to a scheme of the reference that fp8jax does not
            have; lists the known names.
    """
    if isinstance(name, str) and name in SCHEMES:
        return SCHEMES[name]
    known = ", ".join(SCHEMES)
    if name in UNSUPPORTED_SCHEMES:
        raise ValueError(
            f"scheme {name!r} exists in vLLM but is not supported by fp8jax; choose one of: {known}"
        )
    raise ValueError(f"unknown scheme {name!r}; choose one of: {known}")
