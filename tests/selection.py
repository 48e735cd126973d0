"""Which cases of a table `make test` tries; `make test-all` tries them all."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], *, quick: Collection[Any]) -> list[Any]:
    """The cases of a `parametrize`, all but the quick ones marked slow.

    What a table says with its other cases is the same thing once more, of another checkpoint say.
    Quick ones are chosen so that each kind of value is among them.
    """
    cases = list(cases)
    assert set(quick) <= set(cases), "every quick case is one of the cases"
    marked = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marked.append(pytest.param(*values, marks=() if case in quick else pytest.mark.slow))
    return marked
