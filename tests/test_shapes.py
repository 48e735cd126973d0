"""Named shapes: what is computed from a model's numbers is what the model's layers hold."""

import pytest
from flax import nnx

from fp8jax.devtools import shapes
from fp8jax.devtools.offline_models import abstract_model
from fp8jax.models.layers import Linear
from fp8jax.models.moe import SparseMoE


@pytest.mark.parametrize("name", shapes.MODELS)
def test_linear_and_expert_shapes_are_those_of_the_model(name):
    layer = abstract_model(name, None, layers=1).model.layers[0]
    found = {
        str(path[-1]).removesuffix("_proj"): tuple(module.weight.shape)
        for path, module in nnx.iter_modules(layer)
        if isinstance(module, Linear) and path[-1] != "gate"
    }
    assert shapes.LINEAR_SHAPES[name] == found
    experts = shapes.EXPERT_SHAPES.get(name)
    assert (experts is not None) == isinstance(layer.mlp, SparseMoE)
    if experts is not None and isinstance(layer.mlp, SparseMoE):
        for of_experts, stack in (
            (experts.gate_up, layer.mlp.experts.gate_up_proj),
            (experts.down, layer.mlp.experts.down_proj),
        ):
            assert (experts.num_experts, *of_experts[1:]) == tuple(stack.shape)


def test_the_sizes_that_published_figures_name():
    assert shapes.LINEAR_SHAPES["llama-3.1-8b"] == {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    }
    experts = shapes.EXPERT_SHAPES["qwen3-30b-a3b"]
    assert (experts.num_experts, experts.top_k) == (128, 8)
    assert (experts.gate_up, experts.down) == ((2, 1536, 2048), (1, 2048, 768))
