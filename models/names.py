"""What the tensors of a mixture of experts are called in checkpoints, and the fields that describe
one, as families share it.

Published files keep the names of the code they were trained with: one matrix an expert, or
GraniteMoE's two stacks. transformers 5 holds every family's experts as stacks and writes the old
names back, but files with the stacks' own names exist too. A family lists its own way first and
what else is accepted after it; a layer is read in the way that most of its tensors are written in.
"""

from typing import Any

from fp8jax.models.config import ExpertNames, MoEConfig
from fp8jax.models.config_fields import Neutral
from fp8jax.models.hf_config import HFConfig

PER_EXPERT = ExpertNames(
    router="mlp.gate.weight",
    gate_up=("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
    down="mlp.experts.{e}.down_proj.weight",
)
STACKED = ExpertNames(
    router="mlp.gate.weight", gate_up=("mlp.experts.gate_up_proj",), down="mlp.experts.down_proj"
)

_AUXILIARY = "belongs to the router's auxiliary loss, which is for training"
HARMLESS = {
    "output_router_logits": _AUXILIARY,
    "router_aux_loss_coef": _AUXILIARY,
    "router_jitter_noise": "is multiplied into the router's input in training only",
}
"""Fields of a config.json that mixtures of experts may carry and that change nothing."""
NEUTRAL = {
    "scoring_func": Neutral(("softmax",)),
    "topk_method": Neutral(("greedy",)),
    "routed_scaling_factor": Neutral((1,)),
}
"""Those that name another family's router."""


def read_moe(config: HFConfig, **differences: Any) -> MoEConfig:
    """The experts of a config.json: their number and the choices of a token, in either spelling.

    Args:
        config: the file.
        differences: the fields of `MoEConfig` that the family sets itself.
    Raises:
        ValueError: a number is wrong, or the two spellings disagree.
    """
    spellings = ("num_local_experts", "num_experts")
    counts = {key: config.size(key) for key in spellings if config.has(key)}
    found = set(counts.values()) or {config.size(key) for key in spellings} - {None}
    config.read.update(spellings)
    if len(found) != 1 or None in found:
        raise ValueError(
            f"{config.where}: num_experts or num_local_experts must give one number of experts, "
            f"got {counts}"
        )
    num_experts, top_k = found.pop(), config.size("num_experts_per_tok")
    if top_k > num_experts:
        raise ValueError(
            f"{config.where}: num_experts_per_tok is {top_k}, but there are only {num_experts} "
            "experts to choose from"
        )
    return MoEConfig(num_experts=num_experts, top_k=top_k, **differences)
