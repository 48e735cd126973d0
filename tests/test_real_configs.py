"""config.json of popular checkpoints, as published, against torch transformers; or refused by the
name of a field.

The files stand in tests/data/configs with a README; scripts/real_configs.py shrinks them and says
what the weights are, scripts/make_config_goldens.py computed the logits.
"""

import functools
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from selection import mostly_slow

import fp8jax

HERE = Path(__file__).parent
NAMES = {
    name: entry.get("refused")
    for path in sorted((HERE / "data" / "configs").glob("*.json"))
    for name, entry in json.loads(path.read_text()).items()
}
REFUSED = {name: field for name, field in NAMES.items() if field}
ACCEPTED = [name for name in NAMES if name not in REFUSED]
# One of each family.
QUICK = [
    name
    for path in sorted((HERE / "data" / "configs").glob("*.json"))
    for name in [name for name in json.loads(path.read_text()) if name in ACCEPTED][:1]
]


@functools.cache
def goldens() -> dict[str, np.ndarray]:
    with np.load(HERE / "goldens" / "real_configs.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", mostly_slow(ACCEPTED, quick=QUICK))
def test_a_published_config_gives_the_logits_of_torch(name, tmp_path, script):
    rules = script("real_configs")
    config = rules.shrunk(rules.real_configs()[name].published)
    tensors = rules.read_names(goldens()[f"tensors.{goldens()[f'{name}.tensors']}"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(
        {key: rules.tensor(key, shape) for key, shape in tensors.items()},
        tmp_path / "model.safetensors",
    )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        lm = fp8jax.load_quantized(tmp_path, None, dtype="float32")
    # Not compiled: the models share their shapes, so their operations are compiled once, not 76
    # times.
    logits = lm.model(rules.token_ids(config))[0, -rules.KEPT :]
    assert rules.relative_difference(logits, goldens()[f"{name}.logits"]) < 1e-5


@pytest.mark.parametrize("name, field", REFUSED.items())
def test_a_published_config_that_asks_for_something_else_is_refused_by_name(
    name, field, tmp_path, script
):
    rules = script("real_configs")
    config = rules.shrunk(rules.real_configs()[name].published)
    (tmp_path / "config.json").write_text(json.dumps(config))
    norms = [
        f"model.layers.{layer}.input_layernorm.weight"
        for layer in range(config["num_hidden_layers"])
    ]
    save_file({norm: rules.tensor(norm, (64,)) for norm in norms}, tmp_path / "model.safetensors")
    with pytest.raises((ValueError, NotImplementedError), match=field):
        fp8jax.load_quantized(tmp_path, None, dtype="float32")
