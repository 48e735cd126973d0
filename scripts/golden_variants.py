"""The golden checkpoints that `make_goldens.py` writes: one row a model family or detail of a
family.

All are as small as still shows the detail: two layers, a few heads, widths that are not multiples
of 128 (except in llama31), so that partial blocks and groups are the rule. A row holds Hugging Face
config fields and says how the checkpoint is stored and which fake-quantized runs it gets.
"""

# pyright: reportMissingImports=false
# (torch is not a dependency of fp8jax; these scripts have an environment of their own)

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

import torch
from golden_oracle import LAYER_KINDS, SCHEMES


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One golden checkpoint: config fields, how it is stored, and which fake-quantized runs it
    gets."""

    model_type: str
    config: dict
    dtype: torch.dtype = torch.bfloat16
    runs: str = (
        "kinds"  # "kinds": each kind of layer and all; "all": only all; "moe": pairs of schemes
    )
    activation_tensor: bool = False
    shards: int = 1
    old_spelling: bool = False  # rewrite config.json as transformers 4 spelled it
    generation: dict = field(default_factory=dict)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MULTIPLIERS = {
    "embedding_multiplier": 2.5,
    "attention_multiplier": 0.4,  # head_dim**-0.5 would be 0.25 and 0.29
    "residual_multiplier": 0.7,
    "logits_scaling": 0.6,
}


def rope(theta: float, rope_type: str = "default", **parameters: float) -> dict:
    return {"rope_parameters": {"rope_theta": theta, "rope_type": rope_type, **parameters}}


def small(model_type: str, **changes) -> Variant:
    own = {
        name: changes.pop(name) for name in tuple(changes) if name in Variant.__dataclass_fields__
    }
    return Variant(model_type=model_type, config={**SMALL, **changes}, **own)


LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    # 704 gate and up rows and 352 columns of down: 5.5 and 2.75 blocks
    "llama2": small(
        "llama", num_key_value_heads=4, intermediate_size=352, activation_tensor=True, **rope(1e4)
    ),
    # head_dim 16 and original length 64 put frequencies 0, 1 and 2.. into the three regimes of the
    # llama3 formula
    "llama31": small(
        "llama",
        hidden_size=128,
        intermediate_size=128,
        num_attention_heads=8,
        max_position_embeddings=512,
        old_spelling=True,
        generation={"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 5]},
        **rope(5e5, "llama3", **LLAMA3_ROPE),
    ),
    "smollm2": small(
        "llama",
        hidden_size=144,
        intermediate_size=112,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        **rope(1e5),
    ),
    "llama_bias_headdim": small(
        "llama",
        vocab_size=81,
        hidden_size=96,
        intermediate_size=160,
        head_dim=32,
        attention_bias=True,
        mlp_bias=True,
        rms_norm_eps=1e-5,
        eos_token_id=[2, 5, 7],
        **rope(1e4),
    ),
    "llama_fp16": small(
        "llama",
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=3,
        dtype=torch.float16,
        **rope(1e4),
    ),
    "llama_fp32_sharded": small(
        "llama", intermediate_size=144, dtype=torch.float32, shards=3, **rope(1e4)
    ),
    "llama_linear_rope": small("llama", **rope(1e4, "linear", factor=4.0)),
    "llama_yarn": small(
        "llama",
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        **rope(1e3, "yarn", factor=4.0, original_max_position_embeddings=16),
    ),
    "granitemoe": small(
        "granitemoe",
        hidden_size=72,
        num_attention_heads=6,
        num_key_value_heads=3,
        intermediate_size=96,
        num_local_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
        runs="moe",
        **MULTIPLIERS,
        **rope(1e4),
    ),
    "mixtral": small(
        "mixtral",
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        intermediate_size=144,
        num_local_experts=4,
        num_experts_per_tok=2,
        runs="moe",
        **rope(1e6),
    ),
    "qwen3_moe": small(
        "qwen3_moe",
        hidden_size=144,
        intermediate_size=96,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        moe_intermediate_size=80,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=2,  # layer 0 is dense, layer 1 has experts
        runs="moe",
        **rope(1e6),
    ),
    "olmoe": small(
        "olmoe",
        num_key_value_heads=4,
        intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        clip_qkv=2.0,
        pad_token_id=None,
        runs="moe",
        **rope(1e4),
    ),
    "qwen3": small("qwen3", head_dim=32, runs="all", **rope(1e6)),
    "qwen2": small("qwen2", tie_word_embeddings=True, runs="all", **rope(1e6)),
    "mistral": small("mistral", sliding_window=8, head_dim=32, runs="all", **rope(1e4)),
    "granite": small("granite", tie_word_embeddings=True, runs="all", **MULTIPLIERS, **rope(1e4)),
}


def quantized_runs(variant: Variant) -> Iterator[tuple[str, dict]]:
    """The key and the arguments of `fake_quantized` of every quantized run of a variant."""
    if variant.runs == "moe":
        for linear, moe in product((None, *SCHEMES), repeat=2):
            if linear or moe:
                yield f"logits.linear={linear}.moe={moe}", {"linear": linear, "moe": moe}
        return
    for scheme in SCHEMES:
        for kind in LAYER_KINDS if variant.runs == "kinds" else ():
            yield f"logits.{scheme}.{kind}", {"linear": scheme, "kinds": (kind,)}
        yield f"logits.{scheme}.all", {"linear": scheme}
    if variant.activation_tensor:
        yield (
            "logits.fp8_per_tensor.all.activation_tensor",
            {"linear": "fp8_per_tensor", "granularity": "tensor"},
        )
