"""A dense model rewritten as a mixture of experts is the same model: same logits, same text,
through router and experts."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_checkpoints import GOLDENS, golden, load, relative_error
from selection import mostly_slow

import fp8jax

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def script(name: str) -> Any:
    """A script as a module; scripts are not a package."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_moe(*args, **options) -> None:
    script("make_moe_from_dense").make_moe(*args, **options)


CASES = [  # dense golden, layout, mode
    ("smollm2", "mixtral", "split"),
    ("smollm2", "mixtral", "copies"),
    ("smollm2", "granitemoe", "split"),
    ("qwen3", "qwen3_moe", "copies"),
]


@pytest.mark.parametrize("variant, layout, mode", mostly_slow(CASES, quick=[CASES[3]]))
def test_the_mixture_gives_the_logits_and_the_text_of_the_dense_model(
    variant, layout, mode, tmp_path
):
    make_moe(GOLDENS / variant, tmp_path, experts=4, top_k=3, mode=mode, layout=layout)
    moe = fp8jax.load_quantized(tmp_path, None, dtype="float32")
    assert moe.weight("model.layers.0.mlp.experts.gate_up_proj").shape[0] == 4
    ids = golden(variant)["token_ids"]
    # The same products in float32, but summed in parts and weighted: the same order of error as
    # against torch.
    assert relative_error(moe.logits(ids), load(variant).logits(ids)) < 1e-5
    new = golden(variant)["greedy"].shape[1]
    prompts = [
        ids[0, :8].tolist(),
        ids[1, :5].tolist(),
    ]  # of different lengths, so that there is padding
    options = {"max_new_tokens": new, "temperature": 0, "eos_token_ids": []}
    texts = [[g.token_ids for g in lm.generate(prompts, **options)] for lm in (moe, load(variant))]
    assert texts[0] == texts[1]
    assert texts[0][0] == golden(variant)["greedy"][0].tolist()


def test_the_router_of_copies_really_routes(tmp_path):
    """Else the test above would show nothing about groups: with other experts per token, the text
    is the same by design."""
    make_moe(GOLDENS / "smollm2", tmp_path, experts=4, top_k=2, mode="copies", layout="mixtral")
    moe = fp8jax.load_quantized(tmp_path, None, dtype="float32")
    table, router = moe.weight("model.embed_tokens"), moe.weight("model.layers.0.mlp.gate")
    choices = np.argsort(-np.asarray(table) @ np.asarray(router).T, axis=1)[:, :2]
    assert (
        len({tuple(sorted(choice)) for choice in choices.tolist()}) == 6
    )  # every pair of four is somebody's choice


def test_the_script_says_what_it_wrote_and_the_folder_loads_quantized(tmp_path):
    command = [
        sys.executable,
        str(SCRIPTS / "make_moe_from_dense.py"),
        str(GOLDENS / "smollm2"),
        str(tmp_path / "out"),
    ]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, cwd=SCRIPTS.parent
    )
    assert run.returncode == 0, run.stderr
    assert "4 experts a layer (split), layout mixtral" in run.stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["intermediate_size"], config["num_experts_per_tok"]) == (28, 4)
    lm = fp8jax.load_quantized(tmp_path / "out", "fp8_per_block")
    assert isinstance(lm.weight("model.layers.1.mlp.experts.down_proj"), fp8jax.QArray)


REFUSED = [
    (
        "smollm2",
        {"experts": 3},
        "does not split into 3 experts: their number must be a power of two",
    ),
    ("smollm2", {"experts": 32}, "the MLP of width 112 does not split into 32 experts"),
    ("smollm2", {"mode": "copies", "top_k": 5}, "top_k is 5, expected 1 to 4"),
    ("llama_bias_headdim", {}, "has biases, which layout 'mixtral' has no place for"),
    (
        "qwen3",
        {},
        r"layout 'mixtral' stands for LlamaForCausalLM, config.json says \['Qwen3ForCausalLM'\]",
    ),
]


@pytest.mark.parametrize("variant, changes, message", REFUSED)
def test_what_cannot_be_exact_is_refused(variant, changes, message, tmp_path):
    options = {"experts": 4, "top_k": 2, "mode": "split", "layout": "mixtral"} | changes
    with pytest.raises(ValueError, match=message):
        make_moe(GOLDENS / variant, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["split", "copies"])
def test_smollm2_as_a_mixture_says_what_the_dense_model_says(mode, tmp_path):
    """A real language model, layer after layer of it; skipped where `scripts/get_smollm2.py` has
    not put it into the cache."""
    get_smollm2 = script("get_smollm2")
    folder = get_smollm2.cache_folder() / get_smollm2.MODEL_NAME
    if not (folder / get_smollm2.MANIFEST).is_file():
        pytest.skip(f"{folder} is not there; `python scripts/get_smollm2.py` puts it there")
    make_moe(folder, tmp_path, experts=4, top_k=2, mode=mode, layout="mixtral")
    dense, moe = (fp8jax.load_quantized(path, None, dtype="float32") for path in (folder, tmp_path))
    prompts = ["The capital of France is", "Photosynthesis is the process by which"]
    texts = [
        [g.text for g in lm.generate(prompts, max_new_tokens=24, temperature=0)]
        for lm in (dense, moe)
    ]
    assert texts[0] == texts[1]
    ids = np.arange(1000, 1024)[None]
    assert (
        relative_error(moe.logits(ids), dense.logits(ids)) < 1e-5
    )  # as for the tiny models above, over 30 layers
