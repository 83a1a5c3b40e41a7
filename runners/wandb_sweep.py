"""A sweep as W&B's agents take it: any number of them share its cells, on any machines.

    python -m runners.wandb_sweep experiment=longbench_tokens > sweep.yaml
    wandb sweep sweep.yaml          # prints the ID; each machine then runs: wandb agent ID

Takes what `python run.py -m` takes. Each point is one command without -m, so its records are the same and it
resumes as always; its W&B run belongs to the sweep, whose id and project the client puts above ours.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import yaml

from run import check_lines
from runners.config import ConfigError
from runners.plan import compose_all, hydra_here, swept


def sweep(lines: Sequence[str]) -> dict[str, Any]:
    """The sweep file for a command line's overrides.

    Raises:
        ValueError: the command can't be run, or there is nothing to sweep over.
    """
    check_lines(lines, multirun=True)
    first = compose_all(lines, multirun=True)[0]
    with hydra_here():
        last = {override.get_key_element(): override for override in swept(lines)}
    grid = {
        key: [*map(_value, o.sweep_string_iterator())] for key, o in last.items() if o.is_sweep_override()
    }
    if not grid:
        raise ConfigError(
            "nothing is swept over: name an experiment that sweeps, or several values (method=fullkv,snapkv)"
        )
    if "launch" in last:
        raise ConfigError("agents spread the cells themselves: leave launch out, and start one for each GPU")
    fixed = [f"{key}={o.get_value_element_as_str()}" for key, o in last.items() if key not in grid]
    place = {"project": first.tracker.project, "entity": first.tracker.entity}
    return {
        "name": first.tag,
        **{key: value for key, value in place.items() if value is not None},
        "program": "run.py",
        "method": "grid",
        "command": [
            "${env}",
            "${interpreter}",
            "${program}",
            *fixed,
            "tracker.mode=online",
            "${args_no_hyphens}",
        ],
        "parameters": {key: {"values": values} for key, values in grid.items()},
    }


def _value(text: str) -> float | int | str:
    """A number as one, which W&B can plot over; all else as Hydra writes it."""
    value = yaml.safe_load(text)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else text


def main(arguments: Sequence[str]) -> int:
    """Print the sweep file; returns the exit code."""
    try:
        print(yaml.safe_dump(sweep(arguments), sort_keys=False, width=120), end="")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
