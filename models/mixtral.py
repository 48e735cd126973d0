"""Mixtral: Mistral with experts in every layer, called w1 (gate), w3 (up) and w2 (down) on disk.

The router takes the softmax over all experts and always divides the chosen probabilities by their
sum.
"""

from fp8jax.models.config import DecoderConfig, ExpertNames
from fp8jax.models.hf_config import Family, HFConfig
from fp8jax.models.names import HARMLESS, NEUTRAL, STACKED, read_moe
from fp8jax.models.shape import read_shape, read_window, windows_of_all

FAMILY = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    harmless=HARMLESS,
    neutral=NEUTRAL,
)

NAMES = (
    ExpertNames(
        router="block_sparse_moe.gate.weight",
        gate_up=(
            "block_sparse_moe.experts.{e}.w1.weight",
            "block_sparse_moe.experts.{e}.w3.weight",
        ),
        down="block_sparse_moe.experts.{e}.w2.weight",
    ),
    STACKED,
)


def decoder_config(config: HFConfig, *, dtype: str) -> DecoderConfig:
    """The decoder that a Mixtral config.json describes.

    Raises:
        ValueError: a field has a wrong type or value, or asks for something that is not
            implemented.
    Source: transformers 5, models/mixtral.
    """
    moe = read_moe(
        config,
        intermediate_size=config.size("intermediate_size"),
        softmax_over="all",
        renormalise=True,
        weight_dtype="float32",
        names=NAMES,
    )
    return read_shape(
        config, dtype=dtype, windows=windows_of_all(config, read_window(config)), moe=moe
    )
