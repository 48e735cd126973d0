"""Qwen3-MoE: Qwen3 with experts in most layers; the others have an ordinary MLP of
`intermediate_size`.

Layer i has experts unless it is among `mlp_only_layers` or i + 1 is no multiple of
`decoder_sparse_step`. The router takes the softmax over all experts and divides the chosen
probabilities by their sum if `norm_topk_prob` says so.
"""

from fp8jax.models.config import DecoderConfig
from fp8jax.models.hf_config import Family, HFConfig, shown
from fp8jax.models.names import HARMLESS, NEUTRAL, PER_EXPERT, STACKED, read_moe
from fp8jax.models.qwen3 import NEUTRAL as NEUTRAL_IN_QWEN3
from fp8jax.models.shape import num_layers, read_shape, read_window, windows_of_all

FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    defaults={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "norm_topk_prob": False,
    },
    harmless=HARMLESS
    | {"max_window_layers": "is left over from the dense family; a window is one of all layers"},
    neutral=NEUTRAL | NEUTRAL_IN_QWEN3,
)


def decoder_config(config: HFConfig, *, dtype: str) -> DecoderConfig:
    """The decoder that a Qwen3-MoE config.json describes.

    Raises:
        ValueError: a field has a wrong type or value, or asks for something that is not
            implemented.
    Source: transformers 5, models/qwen3_moe.
    """
    moe = read_moe(
        config,
        intermediate_size=config.size("moe_intermediate_size"),
        softmax_over="all",
        renormalise=config.flag("norm_topk_prob"),
        weight_dtype="activation",
        names=(PER_EXPERT, STACKED),
        dense_layers=_dense_layers(config),
    )
    bias = config.flag("attention_bias")
    return read_shape(
        config,
        dtype=dtype,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        windows=windows_of_all(config, read_window(config, switch="use_sliding_window")),
        moe=moe,
    )


def _dense_layers(config: HFConfig) -> tuple[int, ...]:
    """The layers with an ordinary MLP, in order."""
    step, layers = config.size("decoder_sparse_step"), num_layers(config)
    only = config.take("mlp_only_layers", kind=list) or []
    if not all(
        isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < layers
        for layer in only
    ):
        raise ValueError(
            f"{config.where}: mlp_only_layers names a layer outside the {layers} there are: "
            f"{shown(only)}"
        )
    return tuple(layer for layer in range(layers) if (layer + 1) % step or layer in set(only))
