"""What "FP8" means for a layer: how its weight is quantized and how its activations are.

A number is stored as an e4m3 code q and a float32 scale s, x ≈ q · s. The *granularity* says how many numbers share a
scale:

    weight      tensor   one scale a matrix                 scale [1]
                channel  one scale an output row            scale [n, 1]
                block    one scale a 128×128 block          scale [⌈n/128⌉, ⌈k/128⌉]
    activation  tensor   one scale for all rows             scale [1]
                token    one scale a row                    scale [m, 1]
                group    one scale per 128 inputs of a row  scale [m, ⌈k/128⌉]

A `Scheme` is one choice of each, with the name users write. e4m3fn ("finite, no infinity") ends at 448 and its smallest
normal number is 2⁻⁶. Source of the recipes: vLLM's Online Quantization; fp8jax quantizes the activations of
`fp8_per_tensor` per token, so that a token's result does not depend on who shares its batch.
"""

from dataclasses import dataclass
from typing import Literal

E4M3_MAX = 448.0
BLOCK = 128

WeightGranularity = Literal["tensor", "channel", "block"]
ActivationGranularity = Literal["tensor", "token", "group"]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A weight recipe and an activation recipe, hashable, so that it can be static data of a pytree.

    Args:
        name: what users write, `"fp8_per_tensor"`.
        weight: granularity of the weight's scales.
        activation: granularity of the activations' scales, computed on the fly.
    """

    name: str
    weight: WeightGranularity
    activation: ActivationGranularity

    def __post_init__(self) -> None:
        for field, known in (("weight", ("tensor", "channel", "block")), ("activation", ("tensor", "token", "group"))):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"Scheme {self.name!r}: {field} granularity {getattr(self, field)!r} is unknown; choose one of {', '.join(known)}"
                )
        if (self.weight == "block") != (self.activation == "group"):
            raise ValueError(
                f"Scheme {self.name!r}: 128×128 weight blocks go with 1×128 activation groups and with nothing else, "
                f"got weight={self.weight!r}, activation={self.activation!r}"
            )


FP8_PER_TENSOR = Scheme(name="fp8_per_tensor", weight="tensor", activation="token")
FP8_PER_TENSOR_WHOLE_BATCH = Scheme(name="fp8_per_tensor", weight="tensor", activation="tensor")
FP8_PER_CHANNEL = Scheme(name="fp8_per_channel", weight="channel", activation="token")
FP8_PER_BLOCK = Scheme(name="fp8_per_block", weight="block", activation="group")

SCHEMES = {scheme.name: scheme for scheme in (FP8_PER_TENSOR, FP8_PER_BLOCK)}
"""The schemes that `load_quantized` takes by name."""

# Names of the reference that users may bring along. Saying "not supported" helps more than "unknown".
UNSUPPORTED_SCHEMES = ("fp8_per_channel", "mxfp8", "int8_per_channel_weight_only", "mxfp4", "nvfp4_per_token")


def scheme_named(name: str) -> Scheme:
    """The scheme that a user names.

    Raises:
        ValueError: the name is unknown or belongs to a scheme of the reference that fp8jax does not have; lists the
            known names.
    """
    if isinstance(name, str) and name in SCHEMES:
        return SCHEMES[name]
    known = ", ".join(SCHEMES)
    if name in UNSUPPORTED_SCHEMES:
        raise ValueError(f"scheme {name!r} exists in vLLM but is not supported by fp8jax; choose one of: {known}")
    raise ValueError(f"unknown scheme {name!r}; choose one of: {known}")
