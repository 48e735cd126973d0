"""Loading holds the finished layers and two pieces, never the BF16 model nor a layer of it: watched
from outside, on 0.9 GB."""

import json
import sys

import ml_dtypes
import numpy as np
import pytest
from memory_probe import watch_loading
from safetensors.numpy import save_file
from selection import mostly_slow

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="private memory is read from /proc"),
]

MB = 1_000_000
HIDDEN, INTERMEDIATE, VOCAB = 2048, 32768, 8192
LAYERS = {"bfloat16": 2, "float32": 1}
LARGEST_LAYER = 2 * INTERMEDIATE * HIDDEN  # gate_up, in elements


@pytest.fixture(scope="module", params=LAYERS)
def big_checkpoint(tmp_path_factory, request):
    """0.9 GB of weights in few large layers, whose data begins at an odd byte as in many real
    files."""
    dtype, layers = request.param, LAYERS[request.param]
    folder = tmp_path_factory.mktemp("big")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    noise = np.random.default_rng(0).standard_normal(INTERMEDIATE * HIDDEN // 16, np.float32)
    noise = np.tile(noise.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32), 16)

    def weight(*shape):
        return noise[: np.prod(shape)].reshape(shape)

    weight_map = {}

    def save(name, tensors):
        save_file(tensors, folder / name)
        misalign(folder / name)
        weight_map.update(dict.fromkeys(tensors, name))

    save(
        "rest.safetensors",
        {"model.embed_tokens.weight": weight(VOCAB, HIDDEN), "model.norm.weight": weight(HIDDEN)},
    )
    for i in range(layers):
        layer = f"model.layers.{i}."
        tensors = {f"{layer}self_attn.{x}_proj.weight": weight(HIDDEN, HIDDEN) for x in "qkvo"}
        tensors |= {
            f"{layer}mlp.{x}_proj.weight": weight(INTERMEDIATE, HIDDEN) for x in ("gate", "up")
        }
        tensors |= {f"{layer}mlp.down_proj.weight": weight(HIDDEN, INTERMEDIATE)}
        tensors |= {
            f"{layer}{x}_layernorm.weight": weight(HIDDEN) for x in ("input", "post_attention")
        }
        save(f"layer{i}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert 0.85e9 < sum(file.stat().st_size for file in folder.iterdir()) < 1e9
    return folder


def misalign(file):
    """Pad the header of a safetensors file with spaces until its data begins at an odd byte."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    pad = 1 if length % 2 == 0 else 2
    file.write_bytes(
        (length + pad).to_bytes(8, "little")
        + content[8 : 8 + length]
        + b" " * pad
        + content[8 + length :]
    )


def bound(held):
    """The quantized model and 240 MB: 124 to 206 are seen, most of it compiled code and what is
    allocated with it.

    A layer read at once does not fit: gate_up has 268 MB in BF16 and 537 MB in FP32.
    """
    assert LARGEST_LAYER * 2 > 1.1 * 240 * MB
    return held["bytes_after"] + 240 * MB


@pytest.mark.parametrize(
    "scheme", mostly_slow(["fp8_per_tensor", "fp8_per_block"], quick=["fp8_per_tensor"])
)
def test_peak_private_memory_is_the_result_and_two_pieces(big_checkpoint, scheme):
    probe = watch_loading(big_checkpoint, scheme)
    print(
        f"{scheme}: peak {probe.above_idle / MB:.0f} MB above idle, bound "
        f"{bound(probe.held) / MB:.0f}, {probe.held}"
    )
    assert probe.above_idle <= bound(probe.held)


@pytest.mark.parametrize("mode", mostly_slow(["whole", "keep"], quick=["whole"]))
def test_a_layer_at_once_or_a_copy_of_the_model_would_be_seen(big_checkpoint, mode):
    """The negative controls: the same bound does not hold where layers are not cut, or where BF16
    copies are kept."""
    probe = watch_loading(big_checkpoint, "fp8_per_tensor", mode=mode)
    print(
        f"{mode}: peak {probe.above_idle / MB:.0f} MB above idle, bound "
        f"{bound(probe.held) / MB:.0f}, {probe.held}"
    )
    assert probe.above_idle > bound(probe.held)
