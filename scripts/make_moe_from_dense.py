"""Rewrite a dense checkpoint as a mixture of experts that computes exactly the same: a real MoE
with a known answer.

    python scripts/make_moe_from_dense.py smollm2/ smollm2-moe/
    python scripts/make_moe_from_dense.py smollm2/ out/ --mode copies --top-k 2

    split     expert e takes rows e·I/E … (e+1)·I/E of gate and up and the same columns of down.
              The router is zero and top_k = E, so every weight is 1/E; down is multiplied by E.
              Exact in BF16 if E is a power of two. The default, with E = 4.
    copies    every expert is the whole MLP, the router is random, and the chosen weights add up to
              one: whatever the routing, the outcome is that of the dense model. Groups of any sizes
              get to be tested.

Layouts: "mixtral" and "granitemoe" for Llama, "qwen3_moe" for Qwen3 (whose attention it shares).
Every layer becomes a file of its own, so that no more than one layer is held in memory. Tokenizer
files are copied.
"""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from safetensors.numpy import save_file

from fp8jax.checkpoints.folder import Checkpoint, CheckpointError
from fp8jax.models import read_decoder_config
from fp8jax.models.config import ExpertNames
from fp8jax.models.granitemoe import NAMES as GRANITE_NAMES
from fp8jax.models.mixtral import NAMES as MIXTRAL_NAMES
from fp8jax.models.names import PER_EXPERT

Mode = Literal["split", "copies"]
Layout = Literal["mixtral", "granitemoe", "qwen3_moe"]
Tensors = dict[str, np.ndarray]
Matrices = tuple[np.ndarray, np.ndarray, np.ndarray]  # gate, up, down

# Architecture, the dense one it stands for, and what the tensors are called.
LAYOUTS: dict[Layout, tuple[str, str, ExpertNames]] = {
    "mixtral": ("MixtralForCausalLM", "LlamaForCausalLM", MIXTRAL_NAMES[0]),
    "granitemoe": ("GraniteMoeForCausalLM", "LlamaForCausalLM", GRANITE_NAMES[0]),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3ForCausalLM", PER_EXPERT),
}
NOT_COPIED = ("config.json", "model.safetensors.index.json")


def make_moe(
    dense: Path, out: Path, *, experts: int, top_k: int, mode: Mode, layout: Layout, seed: int = 0
) -> None:
    """Write the mixture of experts.

    Args:
        dense: a checkpoint folder.
        out: where to write; made if it is not there.
        experts: E.
        top_k: experts a token goes to; "split" takes all.
        mode, layout: see the module's text.
        seed: of the router of "copies".
    Raises:
        ValueError: a dense checkpoint that the layout cannot stand for, or numbers that do not work
            out.
    """
    top_k = experts if mode == "split" else top_k
    with Checkpoint.open(dense) as checkpoint:
        config = moe_config(
            checkpoint.config, str(dense), experts=experts, top_k=top_k, mode=mode, layout=layout
        )
        names = LAYOUTS[layout][2]
        rng = np.random.default_rng(seed)
        out.mkdir(parents=True, exist_ok=True)
        weight_map = {}

        def write(file: str, tensors: Tensors) -> None:
            save_file(tensors, out / file)
            weight_map.update(dict.fromkeys(tensors, file))

        layers = [f"model.layers.{i}." for i in range(config["num_hidden_layers"])]
        rest = [name for name in checkpoint.tensors if not name.startswith(tuple(layers))]
        write("model-rest.safetensors", {name: np.array(checkpoint.read(name)) for name in rest})
        for i, layer in enumerate(layers):
            kept = [
                name
                for name in checkpoint.tensors
                if name.startswith(layer) and ".mlp." not in name
            ]
            tensors = {name: np.array(checkpoint.read(name)) for name in kept}
            gate, up, down = (
                checkpoint.read(f"{layer}mlp.{part}_proj.weight") for part in ("gate", "up", "down")
            )
            stacks = (
                split(gate, up, down, experts)
                if mode == "split"
                else copies(gate, up, down, experts)
            )
            router = rng.standard_normal((experts, config["hidden_size"])) * (mode == "copies")
            tensors[f"{layer}{names.router}"] = router.astype(gate.dtype)
            write(f"model-layer-{i:05d}.safetensors", tensors | named(layer, names, stacks))
        (out / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in dense.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name not in NOT_COPIED:
            shutil.copy(file, out / file.name)


def moe_config(
    raw: dict[str, Any], where: str, *, experts: int, top_k: int, mode: Mode, layout: Layout
) -> dict[str, Any]:
    """The config.json of the mixture; what has another default in the other family is written
    out."""
    architecture, source, _ = LAYOUTS[layout]
    if raw.get("architectures") != [source]:
        raise ValueError(
            f"{where}: layout {layout!r} stands for {source}, config.json says "
            f"{raw.get('architectures')}"
        )
    dense = read_decoder_config(raw, dtype="float32", where=where)
    if dense.mlp_bias or (layout == "mixtral" and dense.qkv_bias):
        raise ValueError(f"{where}: has biases, which layout {layout!r} has no place for")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k}, expected 1 to {experts}, the number of experts")
    width = dense.intermediate_size
    if mode == "split" and (experts & (experts - 1) or width % experts):
        raise ValueError(
            f"the MLP of width {width} does not split into {experts} experts: their number must be "
            "a power of two (else a weight of 1/E is not exact in BF16) and divide the width"
        )
    config = {
        k: v
        for k, v in raw.items()
        if k not in ("mlp_bias", "is_llama_config", "rope_interleaved", "pretraining_tp")
    }
    if layout == "mixtral":
        config.pop("attention_bias", None)
    config |= {
        "architectures": [architecture],
        "model_type": layout,
        "head_dim": dense.head_dim,
        "num_key_value_heads": dense.num_kv_heads,
        "rms_norm_eps": dense.rms_norm_eps,
        "rope_theta": dense.rope.theta,
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
    }
    expert_width = width // experts if mode == "split" else width
    match layout:
        case "mixtral":
            return config | {"intermediate_size": expert_width, "sliding_window": None}
        case "granitemoe":
            return config | {
                "intermediate_size": expert_width,
                "attention_multiplier": dense.attention_scale,
            }
        case "qwen3_moe":
            return config | {
                "moe_intermediate_size": expert_width,
                "norm_topk_prob": True,
                "mlp_only_layers": [],
            }


def split(gate: np.ndarray, up: np.ndarray, down: np.ndarray, experts: int) -> Matrices:
    """Stacks of gate and up `[e, i/e, h]` and of down `[e, h, i/e]`, down times e."""
    gate, up = (np.stack(np.split(matrix, experts)) for matrix in (gate, up))
    down = np.stack(np.split(down, experts, axis=1))
    larger = (down.astype(np.float32) * experts).astype(down.dtype)
    if not np.array_equal(larger.astype(np.float32), down.astype(np.float32) * experts):
        raise ValueError(
            f"{experts} times a weight of down_proj is beyond the range of {down.dtype}"
        )
    return gate, up, larger


def copies(gate: np.ndarray, up: np.ndarray, down: np.ndarray, experts: int) -> Matrices:
    """The same matrices e times."""
    gate, up, down = (np.stack([matrix] * experts) for matrix in (gate, up, down))
    return gate, up, down


def named(layer: str, names: ExpertNames, stacks: Matrices) -> Tensors:
    """The stacks under the names of a layout, one by one or stacked."""
    gate, up, down = stacks
    if "{e}" not in names.down:
        return {
            layer + names.gate_up[0]: np.concatenate([gate, up], axis=1),
            layer + names.down: down,
        }
    written = {}
    for name, stack in zip((*names.gate_up, names.down), stacks, strict=True):
        written |= {
            layer + name.replace("{e}", str(e)): np.ascontiguousarray(part)
            for e, part in enumerate(stack)
        }
    return written


def main(
    dense: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="Folder of a dense checkpoint.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    experts: Annotated[int, typer.Option(help="How many experts.")] = 4,
    top_k: Annotated[
        int, typer.Option(help="Experts a token goes to; --mode split takes all.")
    ] = 2,
    mode: Annotated[
        Mode, typer.Option(help="Divide the MLP among the experts, or give it to each.")
    ] = "split",
    layout: Annotated[
        Layout | None, typer.Option(help="By default what suits the dense model.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random router of --mode copies.")] = 0,
) -> None:
    """Rewrite a dense checkpoint as a mixture of experts that computes the same."""
    try:
        if layout is None:
            with Checkpoint.open(dense) as checkpoint:
                layout = (
                    "qwen3_moe" if checkpoint.config.get("model_type") == "qwen3" else "mixtral"
                )
        make_moe(dense, out, experts=experts, top_k=top_k, mode=mode, layout=layout, seed=seed)
    except (CheckpointError, ValueError) as error:
        raise SystemExit(f"make_moe_from_dense: {error}") from None
    print(f"Wrote {out}: {experts} experts a layer ({mode}), layout {layout}.")


if __name__ == "__main__":
    typer.run(main)
