"""Notes of a result that count examples or batches: functions of the lines, so that shards can be joined."""

from __future__ import annotations

from collections.abc import Sequence

from hcache.records import Line


def counted(lines: Sequence[Line]) -> list[str]:
    """Of these lines taken together: those under another budget, cut prompts, halved batches."""
    adjusted = sum(line["adjusted_budget_tokens"] is not None for line in lines)
    cut = sum(line.get("cut", False) for line in lines)
    halved = len({line["batch"] for line in lines if line.get("halved")})
    found = {
        f"{adjusted} examples too short for the budget ran under the nearest feasible one": adjusted,
        f"{cut} of {len(lines)} prompts were too long and lost their middle": cut,
        f"{halved} batches had too little memory and ran in parts": halved,
    }
    return [note for note, count in found.items() if count]
