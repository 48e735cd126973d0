"""Tokenizers: read once, late, and without the checkpoint's own code; streamed text is the whole
text's own."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_checkpoints import GOLDENS

import fp8jax
from fp8jax.tokenizer import FolderTokenizer, TextStream, decode, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CHARACTERS = "abcdefghijklmnopqrstuvwxyzIA .,"
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}. {% endfor %}"


def save(core, folder: Path, **options) -> Path:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=core, **options).save_pretrained(folder)
    return folder


def checkpoint(folder: Path, **options) -> Path:
    """The first layer of a golden checkpoint (64 tokens) with a tokenizer of one token a
    character."""
    from safetensors.numpy import load_file, save_file
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    shutil.copytree(GOLDENS / "llama2", folder)
    tensors, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    save_file(
        {name: x for name, x in tensors.items() if ".layers.1." not in name},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    core = Tokenizer(
        models.WordLevel(
            {"<unk>": 0} | {c: i for i, c in enumerate(CHARACTERS, 3)}, unk_token="<unk>"
        )
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    return save(core, folder, unk_token="<unk>", **options)


def run(code: str, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-W", "error::UserWarning:fp8jax", "-c", code, *map(str, arguments)]
    return subprocess.run(
        command,
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# --- the checkpoint's own code

OWN_CODE = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(params=["llama", "unknown"])
def with_own_code(request, tmp_path) -> tuple[Path, Path]:
    """A checkpoint whose tokenizer is a class of its own, which leaves a mark when it is imported.

    Told not to run it, transformers quietly takes a generic tokenizer for a model type that it
    knows, and fails for another.
    """
    folder, mark = checkpoint(tmp_path / "own"), tmp_path / "the code ran"
    (folder / "own.py").write_text(OWN_CODE.format(mark=str(mark)))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if request.param == "unknown":
        model = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(model | {"model_type": "own"}))
    return folder, mark


def test_a_checkpoints_own_code_never_runs_whatever_stdin_says(with_own_code):
    folder, mark = with_own_code
    code = """
import sys
from pathlib import Path
from fp8jax.tokenizer import load_tokenizer
try:
    print(load_tokenizer(Path(sys.argv[1])))
except ValueError as error:
    print("refused:", error)
"""
    done = run(code, folder, stdin="y\n" * 10)
    assert done.stdout.startswith(f"refused: {folder}: the tokenizer needs Python code"), (
        done.stdout + done.stderr
    )
    assert "own.OwnTokenizer" in done.stdout and "tokenizer.json" in done.stdout
    assert "[y/N]" not in done.stdout + done.stderr
    assert not mark.exists()


def test_own_code_beside_a_class_that_transformers_has_is_left_alone(tmp_path):
    folder = checkpoint(tmp_path / "both")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None and tokenizer.encode("ab") == [3, 4]


def test_transformers_is_told_everywhere_not_to_run_code():
    """Every `from_pretrained` of the repository says so itself."""
    calls = [
        (path.name, call)
        for folder in ("fp8jax", "models", "scripts", "tests")
        for path in (ROOT / folder).glob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "from_pretrained"
    ]
    silent = [
        name
        for name, call in calls
        if "trust_remote_code=False" not in map(ast.unparse, call.keywords)
    ]
    assert len(calls) >= 3 and not silent


# --- when it is read


def test_token_ids_never_touch_the_tokenizer_until_a_text_is_read(tmp_path, monkeypatch):
    lm = fp8jax.load_quantized(checkpoint(tmp_path / "c"), None, dtype="float32")
    with monkeypatch.context() as patch:
        patch.setattr(
            "fp8jax.tokenizer.load_tokenizer", lambda folder: pytest.fail("the tokenizer was read")
        )
        (one,) = lm.generate([[3, 4, 5]], max_new_tokens=4, temperature=0)
        lm.score([[3, 4, 5]])
    assert one.text == decode(lm.tokenizer, one.token_ids)
    assert pickle.loads(pickle.dumps(one)) == one


def test_a_broken_tokenizer_is_reported_before_work_for_text_and_leaves_token_ids_alone(
    tmp_path, monkeypatch
):
    folder = checkpoint(tmp_path / "broken", chat_template=TEMPLATE)
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    lm = fp8jax.load_quantized(folder, None, dtype="float32")
    options: dict[str, Any] = {"max_new_tokens": 3, "temperature": 0}
    generations = lm.generate([[3, 4, 5]] * 2, **options)
    with pytest.warns(UserWarning, match="broken: the tokenizer files cannot be read") as caught:
        texts = [g.text for g in generations] + [g.text for g in generations]
    assert texts == [""] * 4 and len(caught) == 1
    assert list(lm.stream([3, 4, 5], **options)) == generations[0].token_ids
    monkeypatch.setattr(lm, "_functions", lambda: pytest.fail("work was done"))
    for call in (
        lambda: lm.generate(["abc"], **options),
        lambda: lm.stream("abc", **options),
        lambda: lm.score(["abc"]),
        lambda: lm.chat([{"role": "user", "content": "abc"}], **options),
    ):
        with pytest.raises(
            fp8jax.CheckpointError, match="broken: the tokenizer files cannot be read"
        ):
            call()


EIGHT_THREADS = """
import sys, threading
import fp8jax
lm = fp8jax.load_quantized(sys.argv[1], None, dtype="float32")
assert "transformers" not in sys.modules
barrier, results, errors = threading.Barrier(8), [], []
def work():
    barrier.wait()
    try:
        results.append(lm.generate(["abc"], max_new_tokens=2, temperature=0)[0].text)
    except BaseException as error:
        errors.append(repr(error))
threads = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
print(len(results), len(set(results)), *errors)
"""


def test_eight_threads_can_generate_text_at_once_on_a_fresh_model(tmp_path):
    done = run(EIGHT_THREADS, checkpoint(tmp_path / "c"))
    assert done.stdout.split() == ["8", "1"], done.stdout + done.stderr


def test_a_pickled_tokenizer_is_read_again_where_it_is_needed(tmp_path):
    tokenizer = FolderTokenizer(checkpoint(tmp_path / "c"))
    assert tokenizer.text([3, 4]) == pickle.loads(pickle.dumps(tokenizer)).text([3, 4]) != ""


def test_a_tokenizer_of_ones_own_takes_the_place_of_the_folders(tmp_path):
    lm = fp8jax.load_quantized(checkpoint(tmp_path / "c"), None, dtype="float32")
    own = load_tokenizer(checkpoint(tmp_path / "other"))
    (tmp_path / "c" / "tokenizer.json").write_text("{")
    lm.tokenizer = own
    assert lm.tokenizer is own
    assert pickle.loads(pickle.dumps(lm)).score(["abc"]) == lm.score([[3, 4, 5]])


# --- growing text

WORDS = "▁the ▁a ▁ ▁▁ s ing ▁é 中 ▁🙂 . , a b \ufffd".split(" ")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(decoder):
    """A vocabulary as Llama 2 has it: three control tokens, 256 bytes, pieces."""
    from tokenizers import AddedToken, Tokenizer, models

    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *BYTES, *WORDS])}
    core = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.decoder = decoder
    core.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>", "<unk>")])
    return core


def llama2():
    from tokenizers import decoders

    parts = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    return sentencepiece(decoders.Sequence(parts))


def metaspace():
    from tokenizers import decoders

    return sentencepiece(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))


def bytelevel():
    """As GPT-2, Llama 3 and Qwen: every byte is a character of the vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    more = ["Ġthe", "ĠðŁ", "ĻĤ", "ä¸", "Ń", "ing"]  # " the", and halves of 🙂 and 中
    core = Tokenizer(models.BPE({token: i for i, token in enumerate([*letters, *more])}, []))
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    return core


def wordpiece():
    from tokenizers import AddedToken, Tokenizer, decoders, models

    vocab = {
        token: i
        for i, token in enumerate(["[UNK]", "[SEP]", "the", "##ing", "##é", "🙂", ".", "a"])
    }
    core = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    core.decoder = decoders.WordPiece(cleanup=False)
    core.add_special_tokens([AddedToken("[SEP]", special=True)])
    return core


def sequences(tokenizer, core):
    """300 texts in tokens: words, characters in pieces, bytes that are no text, special tokens
    anywhere, ids without a token."""
    rng, size = np.random.default_rng(0), core.get_vocab_size()
    special = (
        tokenizer.all_special_ids or [t for t in range(size) if not decode(tokenizer, [t])][-2:]
    )
    spelled = [core.token_to_id(token) for token in sorted(core.get_vocab()) if token not in BYTES]
    for _ in range(300):
        ids, length = [], int(rng.integers(1, 60))
        while len(ids) < length:
            kind = rng.integers(0, 10)
            if kind < 5:
                ids.append(int(rng.choice(spelled)))
            elif kind < 7:
                ids.append(int(rng.choice(special)))
            elif kind == 7 and core.token_to_id("<0x0A>") is not None:
                ids += [
                    core.token_to_id(f"<0x{byte:02X}>")
                    for byte in "é🙂"[rng.integers(0, 2)].encode()
                ]
            else:
                ids.append(int(rng.integers(0, size + 2)))
        yield ids


KINDS = [llama2, metaspace, bytelevel, wordpiece]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_a_stream_joined_are_the_whole_text(kind):
    from transformers import PreTrainedTokenizerFast

    core = kind()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    several = 0
    for ids in sequences(tokenizer, core):
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in ids]
        several += sum(map(bool, pieces)) > 1
        assert "".join([*pieces, stream.finish()]) == decode(tokenizer, ids), ids
    assert several > 150  # in pieces, not as one lump at the end


class Counted:
    """A tokenizer that counts how many tokens it was asked to decode."""

    def __init__(self, tokenizer):
        self._tokenizer, self.tokens = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def decode(self, ids, **options):
        self.tokens += len(ids)
        return self._tokenizer.decode(ids, **options)


@pytest.mark.parametrize(
    "kind, token, most",
    [
        (llama2, "▁the", 8),  # a window of 4 to 8 tokens, and every fourth time one more of 4
        (llama2, "▁", 8),  # spaces, of which the first shows nothing
        (llama2, "<0xFF>", 2),  # a run without end: decoded once, at its end
        (llama2, "</s>", 2),
        (bytelevel, "Ġthe", 8),
        (
            bytelevel,
            "ÿ",
            10,
        ),  # never a whole character: tried ever more rarely, 1 + 1/8 as late each time
        (bytelevel, "</s>", 2),
    ],
)
def test_cost_of_a_token_does_not_grow_with_the_text(kind, token, most):
    from transformers import PreTrainedTokenizerFast

    core = kind()
    tokenizer = Counted(PreTrainedTokenizerFast(tokenizer_object=core))
    stream, ids = TextStream(tokenizer), [core.token_to_id(token)] * 2000
    text = "".join([*map(stream.push, ids), stream.finish()])
    assert tokenizer.tokens <= most * len(ids)
    assert text == decode(tokenizer, ids)


def test_warnings_of_one_model_are_not_repeated(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    tokenizer = FolderTokenizer(tmp_path)
    with pytest.warns(UserWarning, match="stay without text"):
        assert tokenizer.text([1]) == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer.text([1]) == ""
