"""Which parameters of a long test are always asked, and which by -m slow alone."""

from collections.abc import Sequence
from typing import Any

import pytest


def some(every: Sequence[Any], always: Sequence[Any]) -> list[Any]:
    """All of them, those that are not in `always` marked slow."""
    rest = [one if isinstance(one, tuple) else (one,) for one in every if one not in always]
    assert len(rest) + len(always) == len(every)
    return [*always, *(pytest.param(*one, marks=pytest.mark.slow) for one in rest)]
