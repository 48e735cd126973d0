"""Config.json files as nobody should write them: random changes to the values of published ones.

A mutation is a published file, shrunk (`real_configs.py`), with one to three changes: a field
dropped, null, of another type, zero, negative or huge; a switch turned; another word; a rope table
in either spelling, or two; a field of another family; layer types, windows, biases, heads; an
architecture that contradicts the model type. The draw depends on its seed alone.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from real_configs import RealConfig, real_configs, shrunk

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "granite": "GraniteForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "gemma": "GemmaForCausalLM",
    "nonsense": "NonsenseForCausalLM",
}
ACTIVATIONS = (
    "silu",
    "swish",
    "gelu",
    "gelu_pytorch_tanh",
    "relu",
    "relu2",
    "tanh",
    "linear",
    "SiLU",
    "nonsense",
    "",
)
LAYERS = (
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "linear_attention",
    "nonsense",
)
ROPE_TYPES = (
    "default",
    "linear",
    "dynamic",
    "yarn",
    "llama3",
    "longrope",
    "proportional",
    "mrope",
    "su",
    "nonsense",
)
WRONG = ("yes", "1", "", [], [1], {}, {"a": 1}, 1.5, True, -1, 0, float("nan"), float("inf"))
NUMBERS = (0, 1, 2, 3, -1, 0.5, 1.0, 7, 10**9, 10**18, 1e-300, 1e300, -0.5)

# Fields of other families, of older and of newer files, with values that would mean something
# there.
FOREIGN: dict[str, tuple[Any, ...]] = {
    "embedding_multiplier": (1, 1.0, 2.0, 0),
    "logits_scaling": (1.0, 2.0, 0.5, 0),
    "residual_multiplier": (1.0, 0.5, 0),
    "attention_multiplier": (0.25, 0.1, 1.0),
    "clip_qkv": (None, 0.5, 8.0, 0, -1.0),
    "sliding_window": (None, 4, 8, 0, -1, 4096, 2.5),
    "use_sliding_window": (True, False),
    "max_window_layers": (0, 1, 2, 28, -1),
    "sliding_window_pattern": (2, 6),
    "layer_types": (
        ["full_attention"] * 2,
        ["sliding_attention"] * 2,
        ["sliding_attention", "full_attention"],
    ),
    "attention_bias": (True, False),
    "mlp_bias": (True, False),
    "qkv_bias": (True, False),
    "o_bias": (True, False),
    "bias": (True, False),
    "use_qk_norm": (True, False),
    "qk_norm": (True, False),
    "qk_layernorm": (True, False),
    "norm_topk_prob": (True, False),
    "num_experts": (4, 8, 1, 0),
    "num_local_experts": (4, 8, 1, 0),
    "n_routed_experts": (4, 0),
    "n_shared_experts": (1, 0),
    "num_experts_per_tok": (1, 2, 3, 4, 5, 0),
    "shared_expert_intermediate_size": (0, 24),
    "moe_intermediate_size": (24, 32, 0),
    "decoder_sparse_step": (1, 2, 3, 0),
    "mlp_only_layers": ([], [0], [1], [0, 1], [5], [-1]),
    "first_k_dense_replace": (0, 1),
    "routed_scaling_factor": (1.0, 2.5),
    "scoring_func": ("softmax", "sigmoid"),
    "topk_method": ("greedy", "noaux_tc"),
    "router_type": ("softmax", "sigmoid"),
    "n_group": (1, 2),
    "topk_group": (1, 2),
    "router_jitter_noise": (0.0, 0.1),
    "router_aux_loss_coef": (0.0, 0.5),
    "output_router_logits": (True, False),
    "attn_logit_softcapping": (None, 30.0),
    "final_logit_softcapping": (None, 30.0),
    "logit_scale": (1.0, 0.5),
    "query_pre_attn_scalar": (16, 256),
    "hidden_activation": ("silu", "gelu_pytorch_tanh"),
    "activation": ("swiglu", "geglu"),
    "position_embedding_type": ("rope", "alibi", "absolute"),
    "alibi": (True, False),
    "parallel_attn": (True, False),
    "norm_type": ("rmsnorm", "layernorm"),
    "use_mrope": (True, False),
    "is_causal": (True, False),
    "is_decoder": (True, False),
    "rope_interleaved": (True, False),
    "rotary_pct": (1.0, 0.5),
    "rotary_dim": (16, 8),
    "rotary_emb_base": (10000, 5e5),
    "partial_rotary_factor": (1, 1.0, 0.5, 0.25, 0, 1.5, -0.5, None, "half"),
    "original_max_position_embeddings": (8, 64, 4096, 0, -1),
    "attention_chunk_size": (8, None),
    "no_rope_layers": ([], [0, 1]),
    "attn_temperature_tuning": (True, False),
    "dual_chunk_attention_config": (
        {"chunk_size": 8, "local_size": 4, "original_max_position_embeddings": 8},
    ),
    "pretraining_tp": (1, 2, 0),
    "seq_length": (16, 8192),
    "max_sequence_length": (16, 8192),
    "kv_lora_rank": (8, None),
    "layer_norm_eps": (1e-5,),
    "norm_eps": (1e-5,),
    "attention_dropout": (0.0, 0.5),
    "hidden_dropout": (0.0, 0.5),
    "attn_implementation": ("eager", "sdpa", "flash_attention_2"),
    "transformers_weights": ("other.safetensors",),
    "scale_attn_weights": (True, False),
    "num_zebras": (0, 3, "many"),
    "finetuned": (True, False),
    "tie_encoder_decoder": (True, False),
    "num_nextn_predict_layers": (0, 1),
    "torch_dtype": ("float32", "float16", "bfloat16", "nonsense"),
    "dtype": ("float32", "float16", "nonsense"),
}


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """A published file and what is done to it.

    Args:
        base: the name of the published file.
        changes: fields that get another value.
        dropped: fields that are taken out.
    """

    base: str
    changes: dict[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    def config(self) -> dict[str, Any]:
        """The config.json that results."""
        config = shrunk(real_configs()[self.base].published) | self.changes
        return {key: value for key, value in config.items() if key not in self.dropped}


def mutations(count: int, seed: int) -> Iterator[Mutation]:
    """That many different draws; families are equally likely."""
    draw = random.Random(seed)
    families: dict[str, list[RealConfig]] = {}
    for real in real_configs().values():
        families.setdefault(real.family, []).append(real)
    seen: set[str] = set()
    while len(seen) < count:
        real = draw.choice(families[draw.choice(sorted(families))])
        config = shrunk(real.published)
        for _ in range(draw.choices((1, 2, 3), (65, 25, 10))[0]):
            _KINDS[draw.choices(range(len(_KINDS)), _WEIGHTS)[0]](draw, config)
        original = shrunk(real.published)
        changes = {
            key: value
            for key, value in config.items()
            if repr(original.get(key, ...)) != repr(value)
        }
        mutation = Mutation(
            base=real.name, changes=changes, dropped=tuple(sorted(set(original) - set(config)))
        )
        if (changes or mutation.dropped) and repr(mutation) not in seen:
            seen.add(repr(mutation))
            yield mutation


# --- kinds of changes, each in place


def _drop(draw: random.Random, config: dict[str, Any]) -> None:
    if config:
        del config[draw.choice(sorted(config))]


def _null(draw: random.Random, config: dict[str, Any]) -> None:
    config[draw.choice(sorted(config))] = None


def _wrong_type(draw: random.Random, config: dict[str, Any]) -> None:
    config[draw.choice(sorted(config))] = draw.choice(WRONG)


def _number(draw: random.Random, config: dict[str, Any]) -> None:
    keys = [key for key, value in sorted(config.items()) if type(value) in (int, float)]
    if keys:
        key = draw.choice(keys)
        config[key] = draw.choice(
            (*NUMBERS, config[key] * 2, config[key] + 1, -config[key], float(config[key]))
        )


def _turned(draw: random.Random, config: dict[str, Any]) -> None:
    keys = [key for key, value in sorted(config.items()) if isinstance(value, bool)]
    if keys:
        key = draw.choice(keys)
        config[key] = not config[key]


def _foreign(draw: random.Random, config: dict[str, Any]) -> None:
    key = draw.choice(sorted(FOREIGN))
    config[key] = draw.choice(FOREIGN[key])


def _word(draw: random.Random, config: dict[str, Any]) -> None:
    config["hidden_act"] = draw.choice(ACTIVATIONS)


def _identity(draw: random.Random, config: dict[str, Any]) -> None:
    key = draw.choice(("model_type", "architectures"))
    other = draw.choice(sorted(ARCHITECTURES))
    value: Any = other if key == "model_type" else [ARCHITECTURES[other]]
    config[key] = draw.choice(
        (value, value, value, [], None, "", ["Qwen3ForCausalLM", "LlamaForCausalLM"])
    )


def _rope(draw: random.Random, config: dict[str, Any]) -> None:
    for key in draw.choice(
        (
            ("rope_scaling",),
            ("rope_scaling",),
            ("rope_parameters",),
            ("rope_scaling", "rope_parameters"),
        )
    ):
        config[key] = _rope_table(draw)
    if draw.random() < 0.3:
        config.pop("rope_theta", None)


def _rope_table(draw: random.Random) -> Any:
    if draw.random() < 0.05:
        return draw.choice(
            ({}, "linear", [], 4.0, {"full_attention": {"rope_type": "default", "rope_theta": 1e4}})
        )
    rope_type = draw.choice((*ROPE_TYPES, "linear", "yarn", "yarn", "llama3", "default"))
    table: dict[str, Any] = {draw.choice(("type", "rope_type", "rope_type")): rope_type}
    if draw.random() < 0.08:
        table |= {"type": rope_type, "rope_type": draw.choice(ROPE_TYPES)}
    usual = {
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": draw.choice((32, 64, 4096))},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "longrope": {"factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    }
    table |= usual.get(rope_type, {})
    extra: dict[str, tuple[Any, ...]] = {
        "rope_theta": (10000.0, 500000.0, 1, 0, -1.0, "x", None),
        "factor": (1.0, 2, 8.0, 0, -2.0, 0.5, "4", None, 1e30, True),
        "original_max_position_embeddings": (16, 64.0, 8192, 0, -1, None, "64", 10**12),
        "low_freq_factor": (1.0, 4.0, 0, 8.0, "x"),
        "high_freq_factor": (4.0, 1.0, 0, 0.5, "x"),
        "beta_fast": (32, 16.0, 0, -1, 1, None, "x"),
        "beta_slow": (1, 4.0, 0, -1, 64, None),
        "attention_factor": (1.0, 1.3, 0, -1.0, None, "x", 1e300),
        "attn_factor": (0.88, 2.0),
        "mscale": (1.0, 0.7, 0, None),
        "mscale_all_dim": (1.0, 0.5, 0, None, -10.0),
        "truncate": (True, False, None, "no"),
        "finetuned": (True, False),
        "partial_rotary_factor": (1.0, 0.5, 0.25, 0, 2.0, None),
        "num_zebras": (3,),
        "mrope_section": ([2, 3, 3],),
    }
    for key in draw.sample(sorted(extra), draw.choices((0, 1, 2, 3), (35, 35, 20, 10))[0]):
        table[key] = draw.choice(extra[key])
    if draw.random() < 0.12:
        del table[draw.choice(sorted(table))]
    return table


def _layers(draw: random.Random, config: dict[str, Any]) -> None:
    count = draw.choice((2, 2, 2, 2, 1, 3, 0))
    words = LAYERS[:2] if draw.random() < 0.7 else LAYERS
    config["layer_types"] = [draw.choice(words) for _ in range(count)]
    if draw.random() < 0.7:
        config["sliding_window"] = draw.choice((4, 8, 8, 1, 0, None, -1))
    if draw.random() < 0.5:
        config["use_sliding_window"] = draw.choice((True, True, False, None))


def _window(draw: random.Random, config: dict[str, Any]) -> None:
    config["sliding_window"] = draw.choice((4, 8, 1, 0, None, -1, 4096))
    if draw.random() < 0.6:
        config["use_sliding_window"] = draw.choice((True, True, False))
        config["max_window_layers"] = draw.choice((0, 1, 2, 28, -1))


def _heads(draw: random.Random, config: dict[str, Any]) -> None:
    key = draw.choice(("num_key_value_heads", "num_attention_heads", "head_dim", "hidden_size"))
    config[key] = {
        "num_key_value_heads": draw.choice((1, 2, 3, 4, 5, 8, 0, None)),
        "num_attention_heads": draw.choice((1, 2, 3, 4, 6, 8)),
        "head_dim": draw.choice((1, 2, 7, 8, 15, 16, 32, 0, None)),
        "hidden_size": draw.choice((16, 48, 64, 80, 63)),
    }[key]


def _experts(draw: random.Random, config: dict[str, Any]) -> None:
    key = draw.choice(
        (
            "num_experts",
            "num_local_experts",
            "num_experts_per_tok",
            "norm_topk_prob",
            "mlp_only_layers",
        )
    )
    config[key] = draw.choice(FOREIGN[key])


def _tied_or_biased(draw: random.Random, config: dict[str, Any]) -> None:
    key = draw.choice(("tie_word_embeddings", "attention_bias", "mlp_bias", "qkv_bias"))
    config[key] = draw.choice((True, True, False, None))


def _partial(draw: random.Random, config: dict[str, Any]) -> None:
    if draw.random() < 0.5:
        config["partial_rotary_factor"] = draw.choice(FOREIGN["partial_rotary_factor"])
    else:
        config["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        }


def _token_ids(draw: random.Random, config: dict[str, Any]) -> None:
    key = draw.choice(("pad_token_id", "eos_token_id", "bos_token_id"))
    config[key] = draw.choice((0, 1, -1, 127, 128, 10**6, None, [1, 2], [], "2", 1.0))


def _norm(draw: random.Random, config: dict[str, Any]) -> None:
    config["rms_norm_eps"] = draw.choice((1e-6, 1e-2, 1, 0, 0.0, -1e-6, "1e-6", None, 1e-300, 1e30))


def _multipliers(draw: random.Random, config: dict[str, Any]) -> None:
    key = draw.choice(
        ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")
    )
    config[key] = draw.choice((1, 1.0, 0.5, 3, 0, -1.0, None, "2", 1e-30))


_KINDS: tuple[Callable[[random.Random, dict[str, Any]], None], ...] = (
    _drop, _null, _wrong_type, _number, _turned, _foreign, _word, _identity, _rope, _layers,
    _window, _heads, _experts,
    _tied_or_biased, _partial, _token_ids, _norm, _multipliers,
)  # fmt: skip
_WEIGHTS = (10, 6, 12, 12, 4, 16, 3, 4, 24, 5, 5, 6, 4, 4, 3, 3, 3, 3)
