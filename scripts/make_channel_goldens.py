"""Freeze torch's logits of golden checkpoints under fp8_per_channel: `tests/goldens/channel.npz`.

    python scripts/make_channel_goldens.py --goldens tests/goldens    # seconds; needs torch

Keys are `<variant>`, float32 [b, t, vocab]: logits of the checkpoint's `token_ids` with every layer
and expert fake-quantized (`golden_oracle`), one weight scale an output channel and one activation
scale a token.
"""

# pyright: reportMissingImports=false
# (torch is not a dependency of fp8jax; these scripts have an environment of their own)

import numpy as np
import torch
from golden_oracle import fake_quantized
from make_goldens import goldens_argument, load

VARIANTS = ("llama31", "mixtral", "granitemoe")
SCHEME = "fp8_per_channel"


def main() -> None:
    folder = goldens_argument(__doc__)
    torch.set_num_threads(1)
    arrays: dict[str, np.ndarray] = {}
    for variant in VARIANTS:
        model = load(folder / variant)
        with np.load(folder / variant / "golden.npz") as golden, torch.no_grad():
            token_ids = torch.from_numpy(golden["token_ids"]).long()
            quantized = fake_quantized(model, linear=SCHEME, moe=SCHEME)
            arrays[variant] = quantized(token_ids, use_cache=False).logits.float().numpy()
            error = np.linalg.norm(arrays[variant] - golden["logits"])
            print(f"{variant}: error {error / np.linalg.norm(golden['logits']):.4f}")
    np.savez_compressed(folder / "channel.npz", **arrays)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
