"""A loaded model as data: pickled, copied, its leaves named, and through Orbax's own checkpointers,
bit for bit."""

import copy
import dataclasses
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_checkpoints import GOLDENS, load

import fp8jax
from fp8jax.models import CausalLM

ROOT = Path(__file__).resolve().parent.parent


def assert_same_bits(found, expected):
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


UNPICKLE = """
import pickle, sys
lm = pickle.load(open(sys.argv[1], "rb"))
print(lm.score([[3, 4, 5]])[0].logprobs)
print(sorted(map(str, {leaf.dtype for leaf in __import__("jax").tree.leaves(lm.model)})))
"""


def test_a_model_is_pickled_before_and_after_its_first_call(tmp_path):
    lm = fp8jax.load_quantized(GOLDENS / "smollm2", "fp8_per_block", dtype="float32")
    before = pickle.loads(pickle.dumps(lm))
    expected = lm.score([[3, 4, 5]])  # compiles
    after, copied = pickle.loads(pickle.dumps(lm)), copy.deepcopy(lm)
    for other in (before, after, copied):
        assert_same_bits(other.model, lm.model)
        assert jax.tree.structure(other.model) == jax.tree.structure(lm.model)
        assert (other.config, other.report, other.tokenizer) == (lm.config, lm.report, None)
    assert after.score([[3, 4, 5]]) == expected

    (tmp_path / "lm.pickle").write_bytes(pickle.dumps(lm))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", UNPICKLE, str(tmp_path / "lm.pickle")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.splitlines() == [
        str(expected[0].logprobs),
        "['float32', 'float8_e4m3fn']",
    ], done.stderr


def test_leaves_are_named_as_in_the_checkpoint():
    lm = load("smollm2", "fp8_per_block")
    names = {
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(lm.model)[0]
    }
    assert {
        ".model.embed_tokens.weight",
        ".model.layers[1].input_layernorm.weight",
        ".model.layers[0].self_attn.qkv_proj.weight.qvalue",
        ".model.layers[0].self_attn.qkv_proj.weight.scale",
    } <= names
    assert len(names) == len(jax.tree.leaves(lm.model))


def twelve_layers(_):
    """More than ten layers, whose leaves are all different: as words "10" would come before "2"."""
    model = CausalLM(dataclasses.replace(load("smollm2").model.config, num_layers=12))
    leaves, structure = jax.tree.flatten(model)
    return jax.tree.unflatten(
        structure, [jnp.full(leaf.shape, i, leaf.dtype) for i, leaf in enumerate(leaves)]
    )


TREES = {
    "model": lambda lm: lm.model,
    "nnx.state": lambda lm: nnx.state(lm.model),
    "a user's state": lambda lm: {"params": lm.model, "steps": np.arange(3)},
    "twelve layers": twelve_layers,
}


def test_a_state_goes_back_into_a_model():
    model = load("olmoe", "fp8_per_tensor").model
    graph, state = nnx.split(model)
    merged = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    assert_same_bits(merged, model)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("checkpointer", ["PyTreeCheckpointer", "StandardCheckpointer"])
@pytest.mark.parametrize(
    "variant, scheme", [("smollm2", "fp8_per_block"), ("olmoe", "fp8_per_tensor")]
)
def test_orbax_saves_and_restores_fp8_leaves_bit_for_bit(
    tmp_path, variant, scheme, checkpointer, tree
):
    import orbax.checkpoint as ocp

    expected = TREES[tree](load(variant, scheme))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), expected)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Orbax warns of sharding that is not given and of its own older names
        if checkpointer == "PyTreeCheckpointer":
            with ocp.PyTreeCheckpointer() as saver:
                saver.save(tmp_path / "saved", expected)
                assert_same_bits(saver.restore(tmp_path / "saved"), expected)  # as nested dicts
                restored = saver.restore(tmp_path / "saved", item=abstract)
        else:
            with ocp.StandardCheckpointer() as saver:
                saver.save(tmp_path / "saved", expected)
                saver.wait_until_finished()
                restored = saver.restore(tmp_path / "saved", abstract)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, expected)
    assert_same_bits(restored, expected)
