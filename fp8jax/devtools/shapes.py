"""The shapes of named models: their numbers, and what follows from them for single layers.

Offline compilation, benchmarks and the tuner all take a shape by its name. The numbers are those of
the models' config.json; the sizes of linear layers and of stacks of experts are computed, in the
form in which layers here hold them: q, k and v are one matrix, and so are gate and up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LLAMA_31: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}
# The numbers of public models' config.json, without the weights that go with them.
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _LLAMA_31
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    },
    "llama-3.1-70b": _LLAMA_31
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
    },
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
    },
    "granite-3.0-1b-a400m": {
        "architectures": ["GraniteMoeForCausalLM"],
        "vocab_size": 49155,
        "hidden_size": 1024,
        "intermediate_size": 512,
        "num_local_experts": 32,
        "num_experts_per_tok": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_hidden_layers": 24,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
        "tie_word_embeddings": True,
    },
    "qwen3-30b-a3b": _QWEN3_MOE
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_hidden_layers": 48,
    },
    "qwen3-235b-a22b": _QWEN3_MOE
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_attention_heads": 64,
        "num_hidden_layers": 94,
    },
}

# For runs on a CPU, where the kernels are interpreted: no model has these shapes.
TINY_MODELS: dict[str, dict[str, Any]] = {
    "tiny": MODELS["llama-3.1-8b"]
    | {
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "head_dim": 32,
        "vocab_size": 512,
    },
    "tiny-moe": MODELS["granite-3.0-1b-a400m"]
    | {
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}


@dataclass(frozen=True, kw_only=True)
class Widths:
    """What a layer's kernels meet.

    Args:
        hidden: size of the residual stream.
        heads, kv_heads, head_dim: query heads, key-value heads, and the size of one.
        inner: inputs of down_proj, in a mixture those of one expert.
        num_experts, top_k: of a mixture; 0 and 1 without one.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    num_experts: int = 0
    top_k: int = 1


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a layer: how many, how many of them a token meets, and their two stacks as row
    groups, outputs n, inputs k."""

    num_experts: int
    top_k: int
    gate_up: tuple[int, int, int]
    down: tuple[int, int, int]

    def stack(self, layer: str) -> tuple[int, int, int]:
        """The stack "gate_up" or "down"."""
        return {"gate_up": self.gate_up, "down": self.down}[layer]


def widths_of(numbers: Mapping[str, Any]) -> Widths:
    """The widths of a layer by the numbers of a config.json."""
    heads = numbers["num_attention_heads"]
    return Widths(
        hidden=numbers["hidden_size"],
        heads=heads,
        kv_heads=numbers["num_key_value_heads"],
        head_dim=numbers.get("head_dim", numbers["hidden_size"] // heads),
        inner=numbers.get("moe_intermediate_size", numbers["intermediate_size"]),
        num_experts=numbers.get("num_experts", numbers.get("num_local_experts", 0)),
        top_k=numbers.get("num_experts_per_tok", 1),
    )


def _linears(w: Widths) -> dict[str, tuple[int, int]]:
    """Outputs n and inputs k of each linear layer that is quantized, by name."""
    of_heads = w.heads * w.head_dim
    found = {
        "qkv": (of_heads + 2 * w.kv_heads * w.head_dim, w.hidden),
        "o": (w.hidden, of_heads),
    }
    if not w.num_experts:
        found |= {"gate_up": (2 * w.inner, w.hidden), "down": (w.hidden, w.inner)}
    return found


def _experts(w: Widths) -> Experts:
    return Experts(
        num_experts=w.num_experts,
        top_k=w.top_k,
        gate_up=(2, 2 * w.inner, w.hidden),
        down=(1, w.hidden, w.inner),
    )


WIDTHS = {name: widths_of(numbers) for name, numbers in MODELS.items()}
LINEAR_SHAPES = {name: _linears(widths) for name, widths in WIDTHS.items()}
EXPERT_SHAPES = {name: _experts(widths) for name, widths in WIDTHS.items() if widths.num_experts}
# What the benchmarks of single products call "tiny".
TINY_LINEARS = {"square": (256, 256)}
TINY_EXPERTS = _experts(widths_of(TINY_MODELS["tiny-moe"]))
