"""Published config.json files as tiny checkpoints: what two libraries need to compare how they read
the same file.

`tests/data/configs/<family>.json` holds config.json of popular checkpoints as they are published
(README.md there). A tiny checkpoint with the same meaning has other sizes and nothing else changed;
`shrunk` is the rule:

    num_key_value_heads, heads      2 and 2 · (heads / kv heads), or 1 and heads / kv heads if that
                                    would be more than 8 heads
    hidden_size                     96, or 16 · heads where 96 does not divide into heads
    head_dim                        hidden_size / heads where it is so in the file, 16 else;
                                    stated only where the file states it
    layers, max_window_layers       2; 1, 2 or 3 as the file has fewer, as many or more than there
                                    are layers
    intermediate_size               48, of experts 24 (moe_intermediate_size, or where all layers
                                    have experts)
    experts, of them chosen         4 and 2
    vocab_size, token ids           128, and ids modulo 128
    sliding_window                  8, so that 16 tokens pass it
    attention_multiplier            times published over shrunk head_dim: Granite states it as
                                    1 / head_dim

Contexts and everything of rope stay; to see what a scaling for long contexts does, such a model
gets 512 tokens.

Weights follow from a tensor's name and shape (`tensor`), so they need not be stored or handed over.
This file needs NumPy alone: it is imported by the scripts that run torch and by the tests that run
JAX.
"""

import functools
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CONFIGS = Path(__file__).resolve().parent.parent / "tests" / "data" / "configs"
HIDDEN, HEAD_DIM, VOCABULARY, WINDOW = 96, 16, 128, 8
SHORT, LONG = 16, 512  # tokens
KEPT = 8  # the last tokens, whose logits are compared; all of them are past the window

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, kw_only=True)
class RealConfig:
    """One published file.

    Args:
        name: the repository, and what was done to its file if anything was.
        family: the file it is kept in.
        published: config.json.
        refused: the field whose name an error has to contain; None where the model loads.
    """

    name: str
    family: str
    published: dict[str, Any]
    refused: str | None = None


@functools.cache
def real_configs() -> dict[str, RealConfig]:
    """All of them by name."""
    return {
        name: RealConfig(
            name=name, family=path.stem, published=entry["config"], refused=entry.get("refused")
        )
        for path in sorted(CONFIGS.glob("*.json"))
        for name, entry in json.loads(path.read_text()).items()
    }


def shrunk(published: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with small sizes and every other field as it is; the rule stands above."""
    small = dict(published)
    heads, kv_heads = published["num_attention_heads"], published.get("num_key_value_heads")
    ratio = heads // (kv_heads or heads)
    small_kv_heads = 2 if 2 * ratio <= 8 else 1
    small_heads = small_kv_heads * ratio
    head_dim = published.get("head_dim") or published["hidden_size"] // heads
    small_hidden = HIDDEN if HIDDEN % small_heads == 0 else HEAD_DIM * small_heads
    small_head_dim = (
        small_hidden // small_heads if published["hidden_size"] == head_dim * heads else HEAD_DIM
    )
    sizes = {
        "head_dim": small_head_dim,
        "hidden_size": small_hidden,
        "num_attention_heads": small_heads,
        "num_key_value_heads": small_kv_heads,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "vocab_size": VOCABULARY,
        "sliding_window": WINDOW,
    }
    if "num_experts_per_tok" in published and "moe_intermediate_size" not in published:
        sizes["intermediate_size"] = 24
    small |= {key: size for key, size in sizes.items() if published.get(key) is not None}
    if "max_window_layers" in published:
        layers, first = published["num_hidden_layers"], published["max_window_layers"]
        small["max_window_layers"] = 2 + (first > layers) - (first < layers)
    if "attention_multiplier" in published:
        small["attention_multiplier"] = (
            published["attention_multiplier"] * head_dim / small_head_dim
        )
    for key in _TOKEN_IDS:
        ids = published.get(key)
        if isinstance(ids, list):
            small[key] = [i % VOCABULARY for i in ids]
        elif ids is not None:
            small[key] = ids % VOCABULARY
    return small


def token_ids(config: Mapping[str, Any]) -> np.ndarray:
    """The tokens that a shrunk model is asked about: int32 `[1, 16]`, or `[1, 512]` where rope is
    scaled."""
    scaled = config.get("rope_scaling") or config.get("rope_parameters")
    return np.random.default_rng(0).integers(
        8, VOCABULARY, (1, LONG if scaled else SHORT), np.int32
    )


def tensor(name: str, shape: Iterable[int]) -> np.ndarray:
    """A weight that depends on its name and shape only; float32.

    Attention is sharp, routers are decided, norms and biases matter.
    """
    shape = tuple(shape)
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    if "norm" in name:
        return 1 + np.float32(0.2) * noise
    if name.endswith("bias"):
        return np.float32(0.2) * noise
    gain = 1.0
    if any(
        part in name for part in ("q_proj", "k_proj", "mlp.gate.", "moe.gate.", "router", "lm_head")
    ):
        gain = 2.0
    scale = 1.0 if "embed" in name else gain * max(shape[-1], 1) ** -0.5 if shape else gain
    return np.float32(scale) * noise


def write_names(shapes: Mapping[str, Iterable[int]]) -> list[str]:
    """Names and shapes as a sorted list of "model.norm.weight 64": what is handed over in place of
    weights."""
    return [f"{name} {'x'.join(map(str, shape))}" for name, shape in sorted(shapes.items())]


def read_names(written: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The other direction of `write_names`."""
    pairs = (line.rsplit(" ", 1) for line in written)
    return {name: tuple(int(n) for n in shape.split("x") if n) for name, shape in pairs}


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """‖found − expected‖ / ‖expected‖ in float64."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
