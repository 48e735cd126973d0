"""What transformers makes of a config.json: the tensors it asks a checkpoint for, and the logits it
computes from them.

The weights are those of `real_configs.tensor`. They are written to a folder under the names of
published checkpoints, and the model is loaded from there by AutoModelForCausalLM, in float32, with
eager attention and without the checkpoint's code.
"""

# pyright: reportMissingImports=false
# (torch is not a dependency of fp8jax; these scripts have an environment of their own)

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_configs import tensor
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

MOST_WEIGHTS = 4_000_000


class TooLargeError(Exception):
    """The model that a config asks for does not fit this kind of test."""


def published_tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a checkpoint with this folder's config.json, experts one
    by one.

    Raises:
        TooLargeError: together they are more than `MOST_WEIGHTS`.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=False, attn_implementation="eager"
        )
    state = dict(model.state_dict())
    if sum(weight.numel() for weight in state.values()) > MOST_WEIGHTS:
        raise TooLargeError(f"more than {MOST_WEIGHTS} weights")
    for name in model.all_tied_weights_keys:
        state.pop(name, None)
    return {
        name: tuple(weight.shape) for name, weight in revert_weight_conversion(model, state).items()
    }


@torch.no_grad()
def torch_logits(
    folder: Path, config: Mapping[str, Any], token_ids: np.ndarray
) -> tuple[dict[str, tuple[int, ...]], np.ndarray]:
    """Write a checkpoint into an empty folder and run it.

    Args:
        folder: where to.
        config: config.json.
        token_ids: int `[b, t]`.
    Returns:
        Names and shapes of the tensors, and the logits, float32 `[b, t, vocab]`.
    """
    (folder / "config.json").write_text(json.dumps(config))
    shapes = published_tensors(folder)
    weights = {name: tensor(name, shape) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    exact = {"attn_implementation": "eager", "dtype": torch.float32}
    model, told = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, output_loading_info=True, **exact
    )
    faults = {kind: names for kind, names in told.items() if names}
    if faults:
        raise RuntimeError(f"the names of the tensors are not those that are read: {faults}")
    if hasattr(model, "set_experts_implementation") and hasattr(
        model.config, "num_experts_per_tok"
    ):
        model.set_experts_implementation("eager")
    logits = model.eval()(torch.from_numpy(token_ids).long(), use_cache=False).logits
    return shapes, logits.numpy()
