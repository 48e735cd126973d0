"""The tokenizer of a checkpoint folder, and text that grows token by token without ever showing
half a character.

The tokenizer is transformers' own, read at the first text and not before: whoever works with token
ids never pays for it, nor for its faults. A checkpoint's Python code never runs:
`trust_remote_code` is always False, so that transformers does not ask on stdin either, and a
tokenizer that cannot be had without such code is refused by name.

Text that grows is the whole text's own: the pieces of a `TextStream` joined are `decode` of all
tokens. Decoding token by token is not, because what a token gives depends on its neighbours:

    first token    SentencePiece drops its space, so a little of the text before has to be decoded
                   with every piece
    special token  is left out, and must not count as that first token
    bytes          a character may need several tokens. A run of byte tokens ("<0xF0>", "<0x9F>", …)
                   is one unit: a single invalid byte turns all of it into replacement characters,
                   so nothing of a run is shown before its end
"""

import json
import os
import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fp8jax.checkpoints.errors import CheckpointError, shown
from fp8jax.checkpoints.file_reading import check_readable

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "tokenizer_config.json")
# Whatever a tokenizer may read; the largest real one, of 262 144 tokens, has 33 MB.
_SUFFIXES, _MAX_FILE_BYTES = (".json", ".model", ".txt", ".jinja"), 500_000_000
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
# Tokens. Decoding starts one to two windows back, where one visible token of context would do.
_WINDOW = 4

# transformers imports its modules when they are first named, which two threads must not do at once.
_transformers = threading.RLock()


def load_tokenizer(folder: Path) -> Any | None:
    """The folder's Hugging Face tokenizer, or None where it has no tokenizer files.

    Raises:
        CheckpointError: tokenizer files that transformers cannot read, or that need Python code
            from the checkpoint; names the folder and the reason.
    """
    if not any(os.path.lexists(folder / name) for name in _FILES):
        return None
    check_readable(
        folder, _SUFFIXES, _MAX_FILE_BYTES
    )  # transformers would wait for ever for a pipe
    with _transformers:
        # transformers warns that PyTorch is missing, which it is meant to be.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        import transformers  # takes more than a second to import, and not everyone needs text

        _refuse_own_code(folder, transformers)
        try:
            return transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # whatever the tokenizer's own code raises
            raise CheckpointError(
                f"{folder}: the tokenizer files cannot be read ({type(error).__name__}: {error}); "
                "fetch them again, or pass token ids"
            ) from error


def _refuse_own_code(folder: Path, transformers: Any) -> None:
    """Raise where tokenizer_config.json names a class of the checkpoint's own and none that
    transformers has.

    Left to itself, transformers asks whether to run the class, or quietly takes a generic one in
    its place.
    """
    try:
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return  # absent, or transformers will say what is wrong with it
    auto_map = config.get("auto_map") if isinstance(config, dict) else None
    named = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    if not named:
        return
    known = config.get("tokenizer_class")
    if isinstance(known, str) and any(
        hasattr(transformers, name) for name in (known, known.removesuffix("Fast"))
    ):
        return
    own = ", ".join(str(name) for name in (named if isinstance(named, list) else [named]) if name)
    raise CheckpointError(
        f"{folder}: the tokenizer needs Python code from the checkpoint (auto_map in "
        f"tokenizer_config.json names {shown(own)}), which fp8jax never runs; pass token ids, set "
        "lm.tokenizer to one that you read yourself, or convert it to a tokenizer.json that "
        "transformers reads by itself and remove auto_map"
    )


class FolderTokenizer:
    """The tokenizer of a checkpoint folder, read once, when it is first asked for, whichever thread
    asks.

    Args:
        folder: the checkpoint's; None for no tokenizer.
        given: a tokenizer to use instead of the folder's.
    """

    def __init__(self, folder: Path | None, *, given: Any | None = None):
        self._folder, self._given = folder, given
        self._lock = threading.Lock()
        self._loaded: list[Any] = (
            [] if given is None else [given]
        )  # the tokenizer, or None, once read
        self._broken = False

    def get(self) -> Any | None:
        """The tokenizer, None where the folder has none.

        Raises:
            CheckpointError: as in `load_tokenizer`.
        """
        with self._lock:
            if not self._loaded:
                self._loaded.append(load_tokenizer(self._folder) if self._folder else None)
            return self._loaded[0]

    def get_if_readable(self) -> Any | None:
        """The same, but for a tokenizer that cannot be read None and, once, a warning: for calls
        that took token ids."""
        if self._broken:
            return None
        try:
            return self.get()
        except CheckpointError as error:
            self._broken = True
            warnings.warn(f"continuations of token ids stay without text: {error}", stacklevel=3)
            return None

    def text(self, token_ids: Sequence[int]) -> str:
        """Text of new tokens, "" where there is no tokenizer or it cannot be read."""
        tokenizer = self.get_if_readable()
        return "" if tokenizer is None else decode(tokenizer, token_ids)

    def __getstate__(self) -> dict[str, Any]:
        """The folder alone: the tokenizer is read again where it is needed."""
        return {"folder": self._folder, "given": self._given}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


class TextStream:
    """Token ids in, pieces of text out; a character that spans tokens comes out once it is whole.

    The pieces joined, `finish` included, are `decode` of all ids. A token costs the decoding of a
    window of some 8 tokens, however long the text is.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._special = _special_ids(tokenizer)
        self._ids: list[int] = []  # the window: context first, then what has not been shown
        self._shown = 0  # tokens of the window whose text is out …
        self._text = ""  # … and that text
        self._mark = (
            0  # where the window can begin from now on: a place at which all before was shown
        )
        self._next = 0  # the window's length at which decoding is worth the next try

    def push(self, token_id: int) -> str:
        """The text that this token completes, possibly none."""
        name = self._name_of(token_id)
        if (token_id in self._special or name is None) and not decode(self._tokenizer, [token_id]):
            return ""  # decoding leaves it out, also between the bytes of a character
        self._ids.append(token_id)
        if len(self._ids) < self._next or (name is not None and _BYTE_TOKEN.fullmatch(name)):
            return ""
        text = decode(self._tokenizer, self._ids)
        piece = text[len(self._text) :]
        if not piece or text.endswith(
            "\ufffd"
        ):  # the replacement character: bytes of a character still incomplete
            # Whatever goes on like this (a thousand bytes of garbage) is tried ever more rarely, in
            # all a few times a token.
            self._next = len(self._ids) + 1 + (len(self._ids) - self._shown) // 8
            return ""
        self._text, self._shown = text, len(self._ids)
        self._forget()
        return piece

    def finish(self) -> str:
        """What is left when no more tokens come, incomplete characters included."""
        piece = decode(self._tokenizer, self._ids)[len(self._text) :]
        self._text, self._shown = self._text + piece, len(self._ids)
        return piece

    def _forget(self) -> None:
        """Let the window begin at the mark, once enough lies behind it that shows: what shows took
        the first token's role."""
        if len(self._ids) - self._mark < _WINDOW:
            return
        if kept := decode(self._tokenizer, self._ids[self._mark :]):
            self._ids, self._text = self._ids[self._mark :], kept
            self._shown = self._mark = len(self._ids)
        self._next = 0

    def _name_of(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, None where it has none: models have more ids than
        their tokenizers."""
        name_of = getattr(self._tokenizer, "convert_ids_to_tokens", None)
        name = name_of(token_id) if name_of else None
        return name if isinstance(name, str) else None


def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = [token_id for token_id, token in added.items() if token.special]
    return frozenset([*getattr(tokenizer, "all_special_ids", ()), *special])


def render_chat(tokenizer: Any | None, messages: Any, options: Mapping[str, Any]) -> list[int]:
    """Token ids of a conversation under the tokenizer's chat template, ending where the answer
    begins.

    Args:
        tokenizer: a Hugging Face tokenizer, or None.
        messages: [{"role": "user", "content": "…"}, …].
        options: what else the template reads.
    Raises:
        ValueError: no template, messages of another form, or a template that fails on them.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "chat needs a tokenizer with a chat template; the checkpoint folder has none. Write "
            "the prompt out and pass it to generate"
        )
    if (
        isinstance(messages, str | bytes | Mapping)
        or not isinstance(messages, Sequence)
        or not messages
    ):
        raise ValueError(
            "chat takes a list of messages, [{'role': 'user', 'content': '…'}], got "
            f"{_described(messages)}"
        )
    for i, message in enumerate(messages):
        # "content" may be missing or None beside tool calls, and a list of parts: the template
        # decides.
        if (
            not isinstance(message, Mapping)
            or not isinstance(message.get("role"), str)
            or len(message) < 2
        ):
            raise ValueError(
                f"messages[{i}]: expected a dict with a role and a content, "
                f"{{'role': 'user', 'content': '…'}}, got {_described(message)}"
            )
    options = {"add_generation_prompt": True, **options, "tokenize": False}
    try:
        text = tokenizer.apply_chat_template([dict(message) for message in messages], **options)
    except (
        Exception
    ) as error:  # syntax errors, raise_exception of the template, whatever its expressions do
        raise ValueError(
            f"the checkpoint's chat template fails on these messages ({type(error).__name__}: "
            f"{error}); change them, or write the prompt out and pass it to generate"
        ) from error
    # The template writes the special tokens itself.
    return list(tokenizer.encode(text, add_special_tokens=False))


def _described(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:80] + '…'}"


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Text of tokens, without special tokens and without the spaces before punctuation being
    touched."""
    return tokenizer.decode(
        list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
