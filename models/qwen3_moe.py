"""Qwen3-MoE: Qwen3 with experts in most layers; the others have an ordinary MLP of `intermediate_size`.

Layer i has experts unless it is among `mlp_only_layers` or i + 1 is no multiple of `decoder_sparse_step`. The router takes
the softmax over all experts and divides the chosen probabilities by their sum if `norm_topk_prob` says so.
"""

from fp8jax.models.decoder import DecoderConfig
from fp8jax.models.expert_names import PER_EXPERT, STACKED, read_moe
from fp8jax.models.hf_config import HFConfig
from fp8jax.models.shape import read_shape, read_windows


def decoder_config(config: HFConfig, *, dtype: str) -> DecoderConfig:
    """The decoder that a Qwen3-MoE config.json describes.

    Raises:
        ValueError: a field is missing, has a wrong type, or asks for something that is not implemented.
    Source: transformers 5, models/qwen3_moe.
    """
    step, layers = config.size("decoder_sparse_step", 1), config.size("num_hidden_layers")
    dense = {i for i in range(layers) if (i + 1) % step} | set(config.take("mlp_only_layers", [], kind=list))
    if not dense <= set(range(layers)):
        raise ValueError(
            f"{config.where}: mlp_only_layers names a layer outside the {layers} there are: {sorted(dense)}"
        )
    moe = read_moe(
        config,
        intermediate_size=config.size("moe_intermediate_size"),
        softmax_over="all",
        renormalise=config.yes_or_no("norm_topk_prob"),
        weight_dtype="activation",
        names=(PER_EXPERT, STACKED),
        dense_layers=tuple(sorted(dense)),
    )
    bias = config.yes_or_no("attention_bias")
    config.take(
        "max_window_layers", None
    )  # published files carry it from the dense family; here a window is one of all layers
    window = config.size("sliding_window", None if config.has("sliding_window") else 4096)
    slides = config.flag("use_sliding_window", False)
    return read_shape(
        config,
        dtype=dtype,
        num_kv_heads=4,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        windows=read_windows(config, window=window if slides else None),
        moe=moe,
    )
