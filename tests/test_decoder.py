"""The decoder's own wiring, beyond what goldens of whole families see."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fp8jax.models import CausalLM, DecoderConfig
from fp8jax.models.config import NormNames
from fp8jax.models.rotary_embedding import Rope
from fp8jax.ops.values import PartialSums, Stream

rng = np.random.default_rng(3)


def config(**changes) -> DecoderConfig:
    return DecoderConfig(
        **{
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_layers": 2,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "rope": Rope(rotary_dim=8, theta=1e4),
            "rms_norm_eps": 1e-5,
            "attention_scale": 8**-0.5,
            "dtype": "float32",
            **changes,
        }
    )


def filled(model: CausalLM) -> CausalLM:
    """A model whose weights are random numbers."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), model
    )


POST_NORMS = NormNames(
    before_attention="input_layernorm",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)


def test_a_family_with_norms_behind_its_blocks_adds_what_they_give():
    """x += norm(attention(norm(x))), x += norm(mlp(norm(x))), in float64 but for the blocks."""
    model = filled(CausalLM(config(norms=POST_NORMS)))
    token_ids = jnp.asarray(rng.integers(0, 32, (2, 5)), jnp.int32)
    seen = []

    def norm(x, module):
        x = np.asarray(x, np.float64)
        weight = np.asarray(module.weight, np.float64)
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * weight

    class Seen(nnx.Module):
        """A block that keeps what it was given and what it gave."""

        def __init__(self, block):
            self.block, self.reads = block, block.reads

        def __call__(self, x, step, *cache):
            out = self.block(x, step, *cache)
            seen.append((x, out[0] if cache else out))
            return out

    layers: Any = model.model.layers
    for layer in layers:
        layer.self_attn, layer.mlp = Seen(layer.self_attn), Seen(layer.mlp)
    hidden, _ = model._hidden_states(token_ids, None, None, None)

    x = np.asarray(model.model.embed_tokens.weight, np.float64)[np.asarray(token_ids)]
    blocks = iter(seen)
    for layer in layers:
        for before, after in (
            (layer.input_layernorm, layer.post_attention_layernorm),
            (layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm),
        ):
            given, gave = next(blocks)
            np.testing.assert_allclose(given, norm(x, before), rtol=1e-4, atol=1e-5)
            x = x + norm(gave, after)
    np.testing.assert_allclose(hidden, norm(x, model.model.norm), rtol=1e-4, atol=1e-5)


def test_a_stream_owes_one_sum_at_a_time():
    value, first, second = (jnp.asarray(rng.standard_normal((2, 3)), jnp.float32) for _ in range(3))
    pieces = PartialSums(jnp.stack([first, 2 * first]), "float32")
    stream = Stream(value).add(pieces, multiplier=0.5).add(second)
    assert stream.owed is second
    np.testing.assert_allclose(stream.settled(), value + 1.5 * first + second, rtol=1e-6)


@pytest.mark.parametrize("names, missing", [(POST_NORMS, set()), (NormNames(), {"after"})])
def test_layers_have_the_norms_that_their_family_names(names, missing):
    layer = CausalLM(config(norms=names)).model.layers[0]
    wanted = {name for name in vars(names).values() if name is not None}
    assert {name for name in vars(layer) if name.endswith("layernorm")} == wanted


def test_modules_know_what_the_one_around_them_calls_them():
    model = CausalLM(config())
    assert model.model.layers[1].name == "layers.1"
    assert model.model.layers[1].self_attn.qkv_proj.name == "qkv_proj"
    assert model.lm_head is not None and model.lm_head.name == "lm_head"
