"""Mixtral: Mistral with experts in every layer, called w1 (gate), w3 (up) and w2 (down) on disk.

The router takes the softmax over all experts and always divides the chosen probabilities by their sum.
"""

from fp8jax.models.decoder import DecoderConfig
from fp8jax.models.expert_names import STACKED, read_moe
from fp8jax.models.hf_config import HFConfig
from fp8jax.models.shape import read_shape, read_windows
from fp8jax.moe import ExpertNames

NAMES = (
    ExpertNames(
        router="block_sparse_moe.gate.weight",
        gate_up=("block_sparse_moe.experts.{e}.w1.weight", "block_sparse_moe.experts.{e}.w3.weight"),
        down="block_sparse_moe.experts.{e}.w2.weight",
    ),
    STACKED,
)


def decoder_config(config: HFConfig, *, dtype: str) -> DecoderConfig:
    """The decoder that a Mixtral config.json describes.

    Raises:
        ValueError: a field is missing, has a wrong type, or asks for something that is not implemented.
    Source: transformers 5, models/mixtral.
    """
    moe = read_moe(
        config,
        intermediate_size=config.size("intermediate_size"),
        softmax_over="all",
        renormalise="yes",
        weight_dtype="float32",
        names=NAMES,
    )
    windows = read_windows(config, window=config.size("sliding_window", None))
    return read_shape(config, dtype=dtype, num_kv_heads=8, rms_norm_eps=1e-5, rope_theta=1e6, windows=windows, moe=moe)
