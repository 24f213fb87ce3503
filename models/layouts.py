"""How public code numbers stages and blocks: what the key layouts of several families share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

__all__ = ["STAGES_0_TO_4", "block_places", "look_up", "stage_from_one"]


def stage_from_one(match: re.Match[str]) -> str:
    """Return our stage for match[1], the number of one where they are counted from 1."""
    return f"stages.{int(match[1]) - 1}."


#: Rules of the networks after RepVGG's official code: stage0 is the stem.
STAGES_0_TO_4 = ((r"^stage0\.", r"stem."), (r"^stage([1-4])\.", stage_from_one))


def block_places(depths: Sequence[int], *, first: int) -> dict[str, str]:
    """Return where blocks are that are numbered through all stages from `first`.

    >>> block_places((2, 1), first=1)
    {'1': 'stages.0.0.', '2': 'stages.0.1.', '3': 'stages.1.0.'}
    """
    places = [f"stages.{stage}.{block}." for stage, n in enumerate(depths) for block in range(n)]
    return {str(number): place for number, place in enumerate(places, start=first)}


def look_up(places: Mapping[str, str], *, then: str = "") -> Callable[[re.Match[str]], str]:
    """Return what replaces a number match[1] by its place and `then`; an unknown number stays."""

    def place(match: re.Match[str]) -> str:
        return f"{places[match[1]]}{then}" if match[1] in places else match[0]

    return place
