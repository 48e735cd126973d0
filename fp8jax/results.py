"""What `LanguageModel` gives back: a continuation, or the score of a text that was given."""

from dataclasses import dataclass
from typing import Any, Literal, cast


class _WhenRead:
    """A dataclass field that may be given as a function without arguments, called when the field is
    first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            # A dataclass takes what the class gives as the default, and there is none.
            raise AttributeError(self._name)
        value = vars(instance)[self._name]
        if callable(value):
            value = vars(instance)[self._name] = value()
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance)[self._name] = value


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One continuation.

    Args:
        text: the new tokens as text, special tokens left out; "" without a tokenizer. It is made
            when it is first read, so that work with token ids never touches the tokenizer.
        token_ids: the new tokens only, the end token included if it was generated.
        finish_reason: "stop" where an end token came, "length" where max_new_tokens was reached.
        logprobs: of each new token under the model itself (temperature 1, unfiltered), natural
            logarithm.
    """

    text: str = cast(str, _WhenRead())
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    logprobs: list[float]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"text": self.text}  # a pickle holds the text, not the tokenizer


@dataclass(frozen=True, kw_only=True)
class Score:
    """Log-probabilities of a given text: `logprobs[i]` is that of `token_ids[i + 1]` after those
    before it."""

    token_ids: list[int]
    logprobs: list[float]
