"""The tokenizer of a checkpoint folder, and text that grows token by token without ever showing half a character."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fp8jax.file_reading import check_readable

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "tokenizer_config.json")
# Whatever a tokenizer may read; the largest real one, of 262 144 tokens, has 33 MB.
_SUFFIXES, _MAX_FILE_BYTES = (".json", ".model", ".txt", ".jinja"), 500_000_000


def load_tokenizer(folder: Path) -> Any | None:
    """The folder's Hugging Face tokenizer, or None where it has no tokenizer files.

    Raises:
        ValueError: tokenizer files that transformers cannot read; names the folder and the reason.
    """
    if not any(os.path.lexists(folder / name) for name in _FILES):
        return None
    check_readable(folder, _SUFFIXES, _MAX_FILE_BYTES)  # transformers would wait for ever for a pipe
    # transformers warns that PyTorch is missing, which it is meant to be.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # takes more than a second to import, and not everyone needs text

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever the tokenizer's own code raises
        raise ValueError(f"{folder}: the tokenizer files cannot be read ({type(error).__name__}: {error})") from error


class TextStream:
    """Token ids in, pieces of text out; a character that spans tokens comes out once it is whole.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Decoding starts at `_start`, a little before what has not been shown yet, because a tokenizer may treat the
        # first token of a text differently (SentencePiece drops its space).
        self._start = self._shown = 0

    def push(self, token_id: int) -> str:
        """The text that this token completes, possibly none."""
        self._ids.append(token_id)
        before, after = self._decode(self._start, self._shown), self._decode(self._start, len(self._ids))
        if after.endswith("\ufffd"):  # the replacement character: bytes of a character that is not complete yet
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    def finish(self) -> str:
        """What is left when no more tokens come, incomplete characters included."""
        before, after = self._decode(self._start, self._shown), self._decode(self._start, len(self._ids))
        self._shown = len(self._ids)
        return after[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        return decode(self._tokenizer, self._ids[start:end])


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Text of tokens, without special tokens and without the spaces before punctuation being touched."""
    return tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
