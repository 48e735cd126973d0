"""Reading config.json strictly: every field is computed with, known to change nothing, or an error.

A field that nobody reads is how a model comes out as gibberish. A family takes what it computes
with, each field once, with the default of its transformers class where the file is silent;
`reject_unread` then judges what is left:

    null                         nothing was said, but for fields of `Neutral` whose null speaks
    a field of `harmless`        passes, whatever its value; the table says why
    a field of `neutral`         passes at the values listed, and is refused by name at all others
    anything else                an error, words, zeros and false switches included

The errors of the last two kinds come out together, with the names that are spelled alike. A value
of a wrong type, one beyond float32, or a size that no model has is a ValueError that names the
field; nothing is built in proportion to a number of the file.

Source of what each field does: the config and modeling code of transformers 5.23, family by family.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fp8jax.models.config_fields import HARMLESS, NEUTRAL, Neutral

LARGEST_SIZE = 2**31
MOST_LAYERS = 10_000
_LARGEST_NUMBER = float(np.finfo(np.float32).max)
_MOST_FAULTS = 50
_ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class Family:
    """What is peculiar to the config.json of one family.

    Args:
        architecture: as `architectures` names it.
        model_type: the same in the other field.
        defaults: what each field is where the file is silent, as in the family's transformers
            class.
        harmless: fields that this family may carry and that change nothing, with the reason.
        neutral: fields that change nothing at the values given, and are refused at others.
    """

    architecture: str
    model_type: str
    defaults: Mapping[str, Any]
    harmless: Mapping[str, str] = field(default_factory=dict)
    neutral: Mapping[str, Neutral] = field(default_factory=dict)


class Fields:
    """A JSON object that remembers which of its fields were read.

    Args:
        raw: the object.
        where: how to call it in an error, "config.json of …".
        defaults: what is taken for absent fields.
        prefix: what stands before the name of a field in an error, for an object inside another.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        where: str,
        *,
        defaults: Mapping[str, Any] | None = None,
        prefix: str = "",
    ):
        self.raw = dict(raw)
        self.where = where
        self.read: set[str] = set()
        self._defaults = defaults or {}
        self._prefix = prefix

    def take(self, key: str, *, kind: type | tuple[type, ...], null: Any = _ABSENT) -> Any:
        """The value of a field; its default where it is absent.

        Args:
            key: the field; without a default, absent is None.
            kind: the type or types it may have; a switch is no number.
            null: what null means; not given, null is an error unless the default is None.
        Raises:
            ValueError: it is not of the kind.
        """
        self.read.add(key)
        default = self._defaults.get(key)
        if key not in self.raw:
            return default
        value = self.raw[key]
        if value is None:
            if null is not _ABSENT or default is None:
                return None if null is _ABSENT else null
            advice = f"; leave it out for the default of this architecture, {default!r}"
        else:
            advice = ""
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(_JSON_NAMES[k] for k in kinds)
            raise self.fault(key, f"expected {wanted}{advice}")
        return value

    def size(self, key: str, *, null: Any = _ABSENT, most: int = LARGEST_SIZE) -> Any:
        """A field that is a positive integer."""
        value = self.take(key, kind=int, null=null)
        if value is not None and not 1 <= value <= most:
            raise self.fault(key, f"expected a positive integer of at most {most}")
        return value

    def number(self, key: str, *, null: Any = _ABSENT) -> Any:
        """A field that is a number which float32 can hold, as float."""
        value = self.take(key, kind=(int, float), null=null)
        if value is None:
            return None
        # Compared before it is converted: an integer may be too large for any float. NaN fails the
        # comparison.
        if not -_LARGEST_NUMBER <= value <= _LARGEST_NUMBER:
            raise self.fault(key, "expected a finite number within float32")
        return float(value)

    def flag(self, key: str) -> bool:
        """A field that is true or false; false where neither the file nor the family says
        anything."""
        return bool(self.take(key, kind=bool))

    def check_token_ids(self, *keys: str) -> None:
        """Raise ValueError for fields that are neither null nor a token id nor a list of those."""
        for key in keys:
            value = self.take(key, kind=(int, list))
            if isinstance(value, list) and not all(type(one) is int for one in value):
                raise self.fault(key, "expected a token id, or a list of them")

    def has(self, key: str) -> bool:
        """Whether the field is there at all, null included."""
        return key in self.raw

    def fault(self, key: str, expected: str) -> ValueError:
        """The error about a field's value."""
        return ValueError(
            f"{self.where}: {self.name(key)} {shown(self.raw.get(key))} is wrong: {expected}"
        )

    def name(self, key: str) -> str:
        """The field as an error calls it."""
        return f"{self._prefix}{key}"


class HFConfig(Fields):
    """A config.json.

    Args:
        raw: the JSON object.
        family: whose it is.
        where: how to call it in an error, "config.json of …".
    """

    def __init__(self, raw: Mapping[str, Any], family: Family, where: str = "config.json"):
        super().__init__(raw, where, defaults=family.defaults)
        self.family = family
        self.harmless = HARMLESS | dict(family.harmless)
        self.neutral = NEUTRAL | dict(family.neutral)
        self.told: list[str] = []

    def tell(self, sentence: str) -> None:
        """Note what the user should know about a file that is read all the same."""
        self.told.append(f"{self.where}: {sentence}")

    def reject_unread(self) -> None:
        """Judge the fields that no one has taken.

        Raises:
            ValueError: all of those that change the result, or may.
        """
        known = sorted(self.read | self.harmless.keys() | self.neutral.keys())
        refused: list[str] = []
        unknown: list[str] = []
        for key, value in self.raw.items():
            if key in self.read or key in self.harmless:
                continue
            rule = self.neutral.get(key)
            if rule is not None:
                if not rule.allows(value):
                    refused.append(f"{key}: {shown(value)} {rule.otherwise}")
            elif value is not None:
                unknown.append(key)
        faults = refused + [self._unknown(key, known) for key in unknown[:_MOST_FAULTS]]
        if not faults:
            return
        if len(unknown) > _MOST_FAULTS:
            faults.append(f"and {len(unknown) - _MOST_FAULTS} more that are not known")
        advice = (
            ". If the model's result does not depend on what is unknown, remove it from config.json"
        )
        raise ValueError(f"{self.where}: " + "; ".join(faults) + (advice if unknown else ""))

    def _unknown(self, key: str, known: list[str]) -> str:
        close = difflib.get_close_matches(key[:100], known, n=3)
        hint = f" (known and alike: {', '.join(close)})" if close else ""
        return f"{key[:100]}: {shown(self.raw[key])} is not a field that fp8jax knows{hint}"


def shown(value: Any) -> str:
    """A value of the file for an error, shortened."""
    try:
        text = repr(value)
    except (
        ValueError,
        RecursionError,
    ):  # an integer of more digits than Python prints, lists nested without end
        return "(too long to print)"
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"


_JSON_NAMES: dict[type, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a word",
    list: "a list",
    dict: "an object",
}
