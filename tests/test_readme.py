"""README's examples run as they stand, in order, with a tiny checkpoint in place of those it
names."""

import re
from pathlib import Path

import jax
import pytest
from test_tokenizer import TEMPLATE, checkpoint

import fp8jax

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_examples_run_and_show_what_is_public(tmp_path, monkeypatch, capsys):
    folder = checkpoint(tmp_path / "tiny", chat_template=TEMPLATE)
    load, loaded = fp8jax.load_quantized, []

    def load_tiny(repo, scheme="fp8_per_tensor", *, quantization_config=None):
        loaded.append((repo, scheme))
        config = quantization_config and {
            k: v for k, v in quantization_config.items() if k != "ignore"
        }  # names other layers
        return load(folder, scheme, quantization_config=config)

    monkeypatch.setattr(fp8jax, "load_quantized", load_tiny)
    namespace: dict = {}
    with jax.numpy_dtype_promotion("standard"):  # as a user has it
        for block in BLOCKS:
            exec(compile(block, "README.md", "exec"), namespace)
    assert [scheme for _, scheme in loaded] == ["fp8_per_block", None, "fp8_per_block"]
    assert namespace["logits"].shape == (2, 64) and namespace["tokens"].shape == (2,)
    assert jax.tree.map(lambda x: x.shape, namespace["gradient"]) == {"a": (64, 8), "b": (8, 64)}
    assert "perplexity=" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        *"generate stream chat score logits weight explain prefill decode_step Sampling".split(),
        *"evaluation quantize spawn".split(),
    ],
)
def test_readme_names(name):
    assert re.search(rf"\b{name}\b", README)
