"""OLMoE: RMSNorm over the whole q and k projection, then clipping of q, k and v; experts in every
layer.

The router takes the softmax over all experts; the chosen probabilities stay as they are unless
`norm_topk_prob` is set.
"""

from fp8jax.models.config import DecoderConfig
from fp8jax.models.hf_config import Family, HFConfig
from fp8jax.models.names import HARMLESS, NEUTRAL, PER_EXPERT, STACKED, read_moe
from fp8jax.models.shape import read_shape

FAMILY = Family(
    architecture="OlmoeForCausalLM",
    model_type="olmoe",
    defaults={
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "num_experts_per_tok": 8,
        "num_experts": 64,
        "norm_topk_prob": False,
    },
    harmless=HARMLESS,
    neutral=NEUTRAL,
)


def decoder_config(config: HFConfig, *, dtype: str) -> DecoderConfig:
    """The decoder that an OLMoE config.json describes.

    Raises:
        ValueError: a field has a wrong type or value, or asks for something that is not
            implemented.
    Source: transformers 5, models/olmoe.
    """
    moe = read_moe(
        config,
        intermediate_size=config.size("intermediate_size"),
        softmax_over="all",
        renormalise=config.flag("norm_topk_prob"),
        weight_dtype="activation",
        names=(PER_EXPERT, STACKED),
    )
    bias, clip = config.flag("attention_bias"), config.number("clip_qkv")
    if clip is not None and clip < 0:
        raise config.fault(
            "clip_qkv", "expected the largest absolute value that q, k and v may have, or null"
        )
    return read_shape(
        config,
        dtype=dtype,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="whole",
        clip_qkv=clip,
        moe=moe,
    )
