"""Decoders of any size with random weights, where what a checkpoint holds does not matter: memory,
shapes, faults."""

from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

import fp8jax
from fp8jax.models import CausalLM, read_decoder_config

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def random_model(*, dtype: str = "float32", seed: int = 0, **numbers: Any) -> fp8jax.LanguageModel:
    """A Llama without checkpoint; `numbers` are fields of config.json."""
    raw = SMALL | numbers
    model = CausalLM(read_decoder_config(raw, dtype=dtype))
    leaves, structure = jax.tree.flatten(model)
    random = np.random.default_rng(seed)
    filled = [
        jnp.asarray(random.standard_normal(leaf.shape, np.float32) / 8, leaf.dtype)
        for leaf in leaves
    ]
    model = jax.tree.unflatten(structure, filled)
    report = cast(fp8jax.LoadReport, None)  # nothing was loaded
    return fp8jax.LanguageModel(model, config=raw, generation_config={}, folder=None, report=report)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bigram:
    """Hidden state: the token. Logits: its row of a table."""

    table: jax.Array

    def hidden_states(self, token_ids):
        return token_ids, None

    def logits(self, hidden):
        return self.table[hidden]
