"""GraniteMoE: Granite's multipliers, experts in every layer, stacked on disk.

The router takes the softmax over the chosen logits only, so the weights add up to one by
themselves.
"""

from fp8jax.models.config import DecoderConfig, ExpertNames
from fp8jax.models.granite import DEFAULTS, granite_fields
from fp8jax.models.hf_config import Family, HFConfig
from fp8jax.models.names import HARMLESS, NEUTRAL, read_moe
from fp8jax.models.shape import read_shape

FAMILY = Family(
    architecture="GraniteMoeForCausalLM",
    model_type="granitemoe",
    defaults=DEFAULTS | {"num_local_experts": 8, "num_experts_per_tok": 2},
    harmless=HARMLESS,
    neutral=NEUTRAL,
)

NAMES = (
    ExpertNames(
        router="block_sparse_moe.router.layer.weight",
        gate_up=("block_sparse_moe.input_linear.weight",),
        down="block_sparse_moe.output_linear.weight",
    ),
    ExpertNames(
        router="block_sparse_moe.router.weight",
        gate_up=("block_sparse_moe.experts.gate_up_proj",),
        down="block_sparse_moe.experts.down_proj",
    ),
    ExpertNames(
        router="block_sparse_moe.router.layer.weight",
        gate_up=(
            "block_sparse_moe.experts.{e}.gate_proj.weight",
            "block_sparse_moe.experts.{e}.up_proj.weight",
        ),
        down="block_sparse_moe.experts.{e}.down_proj.weight",
    ),
)


def decoder_config(config: HFConfig, *, dtype: str) -> DecoderConfig:
    """The decoder that a GraniteMoE config.json describes.

    Raises:
        ValueError: a field has a wrong type or value, or asks for something that is not
            implemented.
    Source: transformers 5, models/granitemoe.
    """
    moe = read_moe(
        config,
        intermediate_size=config.size("intermediate_size"),
        softmax_over="chosen",
        renormalise=False,
        weight_dtype="activation",
        names=NAMES,
    )
    return read_shape(config, dtype=dtype, moe=moe, **granite_fields(config))
