"""What "FP8" means for a layer: how its weight is quantized and how its activations are.

A `Scheme` is one granularity of a weight's scales, one of the activations' scales, and the name
that users write. The granularities stand in the tables of `pallas_kernels/formats.py`.

    name               weight       activation
    fp8_per_tensor     tensor       token; tensor on request
    fp8_per_channel    channel      token
    fp8_per_block      block        group

Source of the recipes: vLLM's Online Quantization. fp8jax quantizes the activations of
`fp8_per_tensor` per token, so that a token's result does not depend on who shares its batch.
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
    """A weight recipe and an activation recipe.

    Hashable, so that it can be static data of a pytree.

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

SCHEMES = {s.name: s for s in (FP8_PER_TENSOR, FP8_PER_CHANNEL, FP8_PER_BLOCK)}
"""The schemes that `load_quantized` takes by name."""

# Names of the reference that users may bring along. Saying "not supported" helps more than
# "unknown".
UNSUPPORTED_SCHEMES = (
    "mxfp8",
    "int8_per_channel_weight_only",
    "mxfp4",
    "nvfp4_per_token",
)


def scheme_named(scheme: str | Scheme) -> Scheme:
    """The scheme that a user gives by name, or as itself.

    Raises:
        ValueError: the name is unknown or belongs to a scheme of the reference that fp8jax does not
            have; lists the known names.
    """
    if isinstance(scheme, Scheme):
        return scheme
    if isinstance(scheme, str) and scheme in SCHEMES:
        return SCHEMES[scheme]
    known = ", ".join(SCHEMES)
    if scheme in UNSUPPORTED_SCHEMES:
        raise ValueError(
            f"scheme {scheme!r} exists in vLLM but is not supported by fp8jax; choose one of: "
            f"{known}"
        )
    raise ValueError(f"unknown scheme {scheme!r}; choose one of: {known}")
