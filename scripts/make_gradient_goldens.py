"""Freeze torch's gradients through fake FP8 layers: `tests/goldens/gradients.npz`.

    python scripts/make_gradient_goldens.py --goldens tests/goldens    # seconds; needs torch

The loss is the mean cross entropy of the next token over `token_ids` of a golden checkpoint. The
gradient passes a fake-quantized layer straight through the rounding of its activations
(`golden_oracle.StraightThrough`) and meets the dequantized weight. Everything is float32 but the
products, which are float64. For each variant and scheme (None: not quantized), keys are

    <variant>.<scheme>.loss       float32 []
    <variant>.<scheme>.stream     float32 [layers + 1, b, t, h], gradient wrt what each layer and
                                  the final norm read
"""

# pyright: reportMissingImports=false
# (torch is not a dependency of fp8jax; these scripts have an environment of their own)

import numpy as np
import torch
from golden_oracle import SCHEMES, fake_quantized
from make_goldens import goldens_argument, load
from torch import Tensor, nn
from transformers import PreTrainedModel

VARIANTS = ("llama31", "qwen3_moe")


def gradients(model: PreTrainedModel, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient wrt the residual stream `[layers + 1, b, t, h]`."""
    streams: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple) -> None:
        inputs[0].retain_grad()
        streams.append(inputs[0])

    decoder = model.model
    hooks = [module.register_forward_pre_hook(keep) for module in (*decoder.layers, decoder.norm)]
    logits = model(inputs_embeds=decoder.embed_tokens(token_ids), use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten())
    loss.backward()
    for hook in hooks:
        hook.remove()
    return loss.detach(), torch.stack([stream.grad for stream in streams])


def main() -> None:
    folder = goldens_argument(__doc__)
    torch.set_num_threads(1)
    arrays: dict[str, np.ndarray] = {}
    for variant in VARIANTS:
        model = load(folder / variant)
        with np.load(folder / variant / "golden.npz") as golden:
            token_ids = torch.from_numpy(golden["token_ids"]).long()
        for scheme in (None, *SCHEMES):
            with torch.no_grad():
                quantized = (
                    model if scheme is None else fake_quantized(model, linear=scheme, moe=scheme)
                )
            loss, stream = gradients(quantized, token_ids)
            print(
                f"{variant} {scheme}: loss {float(loss):.5f}, gradient norms "
                f"{stream.flatten(1).norm(dim=1).tolist()}"
            )
            arrays |= {
                f"{variant}.{scheme}.loss": loss.numpy(),
                f"{variant}.{scheme}.stream": stream.numpy(),
            }
    np.savez_compressed(folder / "gradients.npz", **arrays)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
