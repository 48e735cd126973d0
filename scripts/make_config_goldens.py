"""Make `tests/goldens/real_configs.npz`: what torch computes from published config.json files.

    python scripts/make_config_goldens.py --out tests/goldens    # about 10 seconds on one core

It runs where `make_goldens.py` runs, with torch and transformers 5 and without JAX or fp8jax
(tests/goldens/README.md has the versions used). `real_configs.py` says how the files are shrunk and
where weights come from, `torch_oracle.py` how they are run. Keys of the file, with name = a key of
tests/data/configs/*.json:

    name.logits     float32 [8, 128]      of the last 8 tokens
    name.tensors    int32 []              which of the lists below
    tensors.<i>     strings               "model.norm.weight 64": every tensor and its shape

A file is left out that torch runs and fp8jax refuses. Where rope is scaled the script runs the
model without the scaling, too: a scaling that moves the last logits by less than a thousandth would
not be tested.
"""

# pyright: reportMissingImports=false
# (torch is not a dependency of fp8jax; these scripts have an environment of their own)

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from real_configs import KEPT, real_configs, relative_difference, shrunk, token_ids, write_names
from torch_oracle import torch_logits
from transformers.utils import logging as transformers_logging

LEAST_EFFECT = 1e-3


def kept_logits(config: dict, ids: np.ndarray) -> tuple[list[str], np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        shapes, logits = torch_logits(Path(folder), config, ids)
    return write_names(shapes), logits[0, -KEPT:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make tests/goldens/real_configs.npz with torch and transformers."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("tests/goldens"), help="folder to write into"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(
        1
    )  # the order of summation, so the bits, depends on the number of threads
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    arrays: dict[str, np.ndarray] = {}
    lists: list[list[str]] = []
    print(f"{'config.json of':60} {'tokens':>6} {'std':>6} {'what the rope scaling changes':>30}")
    for name, real in real_configs().items():
        if real.refused:
            continue
        config = shrunk(real.published)
        ids = token_ids(config)
        names, logits = kept_logits(config, ids)
        scaling = config.get("rope_scaling")
        effect = ""
        if scaling:
            changed = relative_difference(
                kept_logits(config | {"rope_scaling": None}, ids)[1], logits
            )
            # dynamic scaling begins past max_position_embeddings
            assert changed > LEAST_EFFECT or scaling.get("type") == "dynamic", (
                f"{name}: the scaling changes {changed:.1e}"
            )
            effect = f"{changed:.1e}"
        if names not in lists:
            lists.append(names)
        arrays |= {
            f"{name}.logits": logits,
            f"{name}.tensors": np.array(lists.index(names), np.int32),
        }
        print(f"{name:60} {ids.shape[1]:6} {logits.std():6.2f} {effect:>30}")
    arrays |= {f"tensors.{i}": np.array(names) for i, names in enumerate(lists)}
    path = arguments.out / "real_configs.npz"
    np.savez_compressed(path, allow_pickle=False, **arrays)
    print(f"{len(real_configs())} files, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
