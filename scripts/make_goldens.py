"""Make the golden checkpoints and arrays of `tests/goldens/` with torch and transformers.

    python scripts/make_goldens.py --out tests/goldens    # everything, 40 seconds on one core
    python scripts/make_goldens.py --out goldens --only llama2 matmul

It needs torch and transformers 5 (tests/goldens/README.md has the versions used) and imports
neither JAX nor fp8jax: what it writes is an opinion about the mathematics that shares no code with
the library.

A variant is one folder with a tiny random checkpoint as `save_pretrained` writes it, and
`golden.npz`. The arrays come from the model *reloaded* from that folder in float32 with eager
attention. (`model.to(bfloat16).float()` would not do: it rounds the rotary frequencies, which no
checkpoint holds.) Keys of golden.npz:

    token_ids   int32   [2, 24]          the input
    logits      float32 [2, 24, vocab]   unquantized
    greedy      int32   [2, 16]          the 16 argmax tokens that follow token_ids[:, :8];
                                         no end token is among them
    logits.<scheme>.<which>              fake-quantized, which = qkv | o | gate_up | down | all
    logits.fp8_per_tensor.all.activation_tensor
                                         the same with one activation scale for the whole batch
                                         (llama2 only)
    logits.linear=<a>.moe=<b>            mixtures of experts; a and b are None | fp8_per_tensor |
                                         fp8_per_block, and None, None is `logits` itself.
                                         `linear` is attention and dense MLP layers

`golden_oracle.py` says what fake-quantized means, `golden_variants.py` lists the variants.

`matmul.npz` freezes single products; with p = "<m>x<n>x<k>" and scheme as above its keys are

    p.x [m, k], p.weight [n, k], p.bias [n]     float32; x and weight hold BF16 values
    p.<scheme>.weight_codes [n, k], .activation_codes [m, k]    uint8, the bits of float8_e4m3fn
    p.<scheme>.weight_scale, .activation_scale    float32; [1] and [m, 1], or one a block and group
    p.<scheme>.out, .out_bias [m, n]    float32(float64 product), and that + bias

A draw is thrown away, and the next seed tried, if its logits are too flat or too large, if greedy
decoding meets a near tie, repeats itself or produces an end token, if a router in any of the runs
nearly ties at its top-k border, or if float32 noise flips enough codes at rounding borders to move
a quantized run by a good part of its quantization error. In all of these a correct implementation
could differ from torch, or a wrong one agree with it, by luck.
"""

# pyright: reportMissingImports=false
# (torch is not a dependency of fp8jax; these scripts have an environment of their own)

import argparse
import json
import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from golden_oracle import (
    BLOCK,
    SCHEMES,
    FakeQuantLinear,
    activation_granularity,
    decode,
    fake_quantized,
    quantize_activation,
    quantize_weight,
)
from golden_variants import VARIANTS, Variant, quantized_runs
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

BATCH, LENGTH, PROMPT, NEW_TOKENS = 2, 24, 8, 16
MIN_GREEDY_GAP = 1e-3  # float32 logits of two correct implementations differ by about 1e-5
MIN_ROUTER_GAP = 1e-3
MATMUL_SHAPES = ((17, 96, 160), (5, 200, 300), (128, 256, 256))
ATTEMPTS = 60
NOISE_RUNS = 4
MAX_FLIPS, MAX_FLIPS_ONE_KIND = (
    0.3,
    0.125,
)  # of the quantization error: half of what the tests of fp8jax allow


# --- checkpoints


def randomize(model: PreTrainedModel, seed: int) -> None:
    """Random weights with which nothing is trivial: sharp attention, uneven rows, norms and biases
    that matter."""
    generator = torch.Generator().manual_seed(seed)
    gains = {
        "q_proj": 1.2,
        "k_proj": 1.2,
        "o_proj": 2.5,
        "down_proj": 2.5,
        "router": 2.0,
        "mlp.gate.": 2.0,
    }
    gains |= {"block_sparse_moe.gate.": 2.0, "lm_head": 2.0, "embed_tokens": 2.0}
    gains["embed_tokens"] *= getattr(
        model.config, "logits_scaling", 1.0
    )  # tied: so that the logits keep their size
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            scale = (
                1.5 if "q_norm" in name or "k_norm" in name else 1.0
            )  # else attention is flat in these families
            value = scale * (1.0 + 0.3 * noise)
        elif name.endswith(".bias"):
            value = 0.3 * noise
        else:
            gain = next((gain for part, gain in gains.items() if part in name), 1.0)
            rows = torch.exp(0.3 * torch.randn((*parameter.shape[:-1], 1), generator=generator))
            value = noise * rows * (gain * parameter.shape[-1] ** -0.5)
        parameter.data.copy_(value)


def write_checkpoint(variant: Variant, folder: Path, seed: int) -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(variant.model_type, **variant.config)
    )
    randomize(model, seed)
    model = model.to(variant.dtype)
    if variant.generation:
        model.generation_config = GenerationConfig(bos_token_id=1, **variant.generation)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(
        folder, max_shard_size=size * 2 // (2 * variant.shards - 1) if variant.shards > 1 else "5GB"
    )
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == variant.shards, (
        f"{folder}: {len(files)} safetensors files, wanted {variant.shards}"
    )


def load(folder: Path) -> PreTrainedModel:
    exact = {"attn_implementation": "eager", "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, **exact
    ).eval()
    if hasattr(model, "set_experts_implementation") and hasattr(
        model.config, "num_experts_per_tok"
    ):
        model.set_experts_implementation("eager")
    return model


def spell_as_transformers_4(folder: Path) -> None:
    """rope_parameters -> rope_theta and rope_scaling, dtype -> torch_dtype."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config |= {
        "rope_theta": scaling.pop("rope_theta"),
        "rope_scaling": scaling,
        "torch_dtype": config.pop("dtype"),
    }
    config["transformers_version"] = "4.43.0"
    path.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")


# --- running


class Reseed(Exception):
    """This draw could make a correct implementation fail, or a wrong one pass, by luck."""


def require(fine: bool, reason: str) -> None:
    if not fine:
        raise Reseed(reason)


@torch.no_grad()
def run_logits(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """Logits [b, t, vocab]; checks that no router came near a tie at its top-k border."""
    gaps: list[float] = []

    def watch(module: nn.Module, _inputs: tuple, outputs: tuple) -> None:
        top = outputs[0].topk(module.top_k + 1, -1).values
        gaps.append(float((top[:, -2] - top[:, -1]).min()))

    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    hooks = [router.register_forward_hook(watch) for router in routers]
    logits = model(token_ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    require(not gaps or min(gaps) > MIN_ROUTER_GAP, f"router gap {min(gaps, default=0):.1e}")
    return logits


@torch.no_grad()
def run_greedy(model: PreTrainedModel, prompt: Tensor, end_tokens: set[int]) -> Tensor:
    tokens = prompt
    for _ in range(NEW_TOKENS):
        top = model(tokens, use_cache=False).logits[:, -1].topk(2)
        gap = float((top.values[:, 0] - top.values[:, 1]).min())
        require(gap > MIN_GREEDY_GAP, f"greedy gap {gap:.1e}")
        tokens = torch.cat([tokens, top.indices[:, :1]], 1)
    new = tokens[:, prompt.shape[1] :]
    require(not end_tokens & set(new.flatten().tolist()), "an end token in the greedy text")
    require(min(len(set(row.tolist())) for row in new) >= 5, "the greedy text repeats itself")
    return new


@torch.no_grad()
def check_not_trivial(model: PreTrainedModel, token_ids: Tensor, logits: Tensor) -> None:
    require(1.0 < float(logits.std()) < 5.0, f"logits std {float(logits.std()):.2f}")
    for attention in model(token_ids, use_cache=False, output_attentions=True).attentions:
        top = float(attention[:, :, -1].amax(-1).mean())
        require(
            0.15 < top < 0.9, f"largest attention weight of the last token {top:.2f}, uniform 0.04"
        )


def check_stable(
    model: PreTrainedModel, token_ids: Tensor, plain: Tensor, oracle: Tensor, limit: float
) -> None:
    """Move what gets quantized by 3e-7 of itself, as another order of summation does, and see what
    flipped codes do."""
    quantized_layers = [m for m in model.modules() if isinstance(m, FakeQuantLinear)]
    for seed in range(NOISE_RUNS):
        generator = torch.Generator().manual_seed(seed)

        def move(
            _module: nn.Module, inputs: tuple, generator: torch.Generator = generator
        ) -> tuple:
            return (inputs[0] * (1.0 + 3e-7 * torch.randn(inputs[0].shape, generator=generator)),)

        hooks = [layer.register_forward_pre_hook(move) for layer in quantized_layers]
        share = relative(run_logits(model, token_ids) - oracle, oracle - plain)
        for hook in hooks:
            hook.remove()
        require(share < limit, f"flipped codes move the oracle by {share:.2f} of its error")


def relative(error: Tensor, reference: Tensor) -> float:
    return float(error.norm() / reference.norm())


def make_variant(name: str, variant: Variant, folder: Path, seed: int) -> dict[str, float]:
    """Write one variant into an empty folder; returns the quantization error of each run."""
    write_checkpoint(variant, folder, seed)
    model = load(folder)
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(8, variant.config["vocab_size"], (BATCH, LENGTH), generator=generator)
    logits = run_logits(model, token_ids)
    check_not_trivial(model, token_ids, logits)
    ends = variant.generation.get("eos_token_id", variant.config["eos_token_id"])
    greedy = run_greedy(model, token_ids[:, :PROMPT], set(np.atleast_1d(ends).tolist()))

    arrays, errors = {"token_ids": token_ids.int(), "logits": logits, "greedy": greedy.int()}, {}
    for key, arguments in quantized_runs(variant):
        one_kind = len(arguments.get("kinds", ())) == 1 or not arguments.get("linear")
        limit = MAX_FLIPS_ONE_KIND if one_kind else MAX_FLIPS
        quantized = fake_quantized(model, **arguments)
        arrays[key] = run_logits(quantized, token_ids)
        errors[key] = relative(arrays[key] - logits, logits)
        check_stable(quantized, token_ids, logits, arrays[key], limit)
    if variant.old_spelling:
        spell_as_transformers_4(folder)
        assert torch.equal(run_logits(load(folder), token_ids), logits), (
            f"{name}: the old spelling changes the logits"
        )
    if variant.dtype == torch.float16:
        assert any(bool((p != p.bfloat16().float()).any()) for p in model.parameters()), (
            "BF16 would hold this one"
        )
    np.savez_compressed(
        folder / "golden.npz", **{key: array.numpy() for key, array in arrays.items()}
    )
    return errors


def with_fresh_seeds(name: str, out: Path) -> dict[str, float]:
    """Try seeds until a draw passes every check, then move the finished folder into place."""
    rejected: list[str] = []
    while len(rejected) < ATTEMPTS:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                errors = make_variant(
                    name, VARIANTS[name], Path(scratch), zlib.crc32(name.encode()) + len(rejected)
                )
            except Reseed as reason:
                rejected.append(str(reason))
                continue
            shutil.rmtree(out / name, ignore_errors=True)
            shutil.copytree(scratch, out / name)
        for path in (
            out / name,
            *(out / name).iterdir(),
        ):  # the scratch folder is private to its owner
            path.chmod(0o755 if path.is_dir() else 0o644)
        size = sum(file.stat().st_size for file in (out / name).iterdir())
        print(
            f"{name:20} {size / 1e3:.0f} kB, {len(rejected)} draws rejected",
            *sorted(set(rejected))[:3],
            sep="; ",
        )
        return errors
    raise RuntimeError(f"{name}: none of {ATTEMPTS} draws passed the checks: {'; '.join(rejected)}")


def make_matmul(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    arrays: dict[str, Tensor] = {}
    for m, n, k in MATMUL_SHAPES:
        x, weight, bias = (
            torch.randn(shape, generator=generator) for shape in ((m, k), (n, k), (n,))
        )
        x[1], x[2], x[3, k // 3] = (
            0.0,
            x[2] * 1e-7,
            300.0,
        )  # a zero row, one below the scale's floor, an outlier
        x = x.bfloat16().float()
        weight = (
            (weight * torch.exp(0.5 * torch.randn((n, 1), generator=generator)) * k**-0.5)
            .bfloat16()
            .float()
        )
        if n > BLOCK:
            weight[BLOCK:, k // BLOCK * BLOCK - BLOCK : k // BLOCK * BLOCK] = (
                0.0  # a block of zeros
            )
            weight[:BLOCK, :BLOCK] *= 2.0**-16  # a block below the floor of amax
        p = f"{m}x{n}x{k}"
        arrays |= {f"{p}.x": x, f"{p}.weight": weight, f"{p}.bias": bias}
        for scheme in SCHEMES:
            weight_codes, weight_scale, weight_wide = quantize_weight(weight, scheme)
            x_codes, x_scale, x_wide = quantize_activation(x, activation_granularity(scheme))
            out = (decode(x_codes, x_wide) @ decode(weight_codes, weight_wide).T).float()
            arrays |= {f"{p}.{scheme}.weight_codes": weight_codes.view(torch.uint8)}
            arrays |= {f"{p}.{scheme}.activation_codes": x_codes.view(torch.uint8)}
            arrays |= {
                f"{p}.{scheme}.weight_scale": weight_scale,
                f"{p}.{scheme}.activation_scale": x_scale,
            }
            arrays |= {f"{p}.{scheme}.out": out, f"{p}.{scheme}.out_bias": out + bias}
    np.savez_compressed(path, **{key: array.numpy() for key, array in arrays.items()})


def goldens_argument(description: str | None) -> Path:
    """The folder of the golden checkpoints, from the command line of a script that reads them."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--goldens", type=Path, required=True, help="the folder of the golden checkpoints"
    )
    return parser.parse_args().goldens


def main() -> None:
    parser = argparse.ArgumentParser(description="Make tests/goldens with torch and transformers.")
    parser.add_argument(
        "--out", type=Path, default=Path("tests/goldens"), help="folder to write into"
    )
    parser.add_argument(
        "--only", nargs="+", choices=(*VARIANTS, "matmul"), metavar="NAME", help="only these"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(
        1
    )  # the order of summation, so the bits, depends on the number of threads
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    arguments.out.mkdir(parents=True, exist_ok=True)
    wanted = arguments.only or [*VARIANTS, "matmul"]

    print(f"{'golden':20} {'run':46} {'error':>8}")
    for name in wanted:
        if name == "matmul":
            make_matmul(arguments.out / "matmul.npz")
            print(f"{name:20} {(arguments.out / 'matmul.npz').stat().st_size / 1e3:.0f} kB")
            continue
        for key, error in with_fresh_seeds(name, arguments.out).items():
            print(f"{'':20} {key.removeprefix('logits.'):46} {error:8.4f}")


if __name__ == "__main__":
    main()
