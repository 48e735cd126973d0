"""OLMoE: RMSNorm over the whole q and k projection, then clipping of q, k and v; experts in every layer.

The router takes the softmax over all experts; the chosen probabilities stay as they are unless `norm_topk_prob` is set.
"""

from fp8jax.models.decoder import DecoderConfig
from fp8jax.models.expert_names import PER_EXPERT, STACKED, read_moe
from fp8jax.models.hf_config import HFConfig
from fp8jax.models.shape import read_shape


def decoder_config(config: HFConfig, *, dtype: str) -> DecoderConfig:
    """The decoder that an OLMoE config.json describes.

    Raises:
        ValueError: a field is missing, has a wrong type, or asks for something that is not implemented.
    Source: transformers 5, models/olmoe.
    """
    moe = read_moe(
        config,
        intermediate_size=config.size("intermediate_size"),
        softmax_over="all",
        renormalise=config.yes_or_no("norm_topk_prob"),
        weight_dtype="activation",
        names=(PER_EXPERT, STACKED),
    )
    bias = config.yes_or_no("attention_bias")
    return read_shape(
        config,
        dtype=dtype,
        rms_norm_eps=1e-5,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="whole",
        clip_qkv=config.number("clip_qkv", None),
        moe=moe,
    )
