"""What `python run.py --help` says, read from the files in conf/. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from runners.config import CONF
from runners.overrides import choices, default_choice, groups

_HEAD = """\
python run.py [-m] [group=choice ...] [key=value ...]

Evaluates a KV-cache compression method on a benchmark and leaves a record in outputs/.
The same command resumes.

  python run.py                                                    heterocache on the embedded model
  python run.py method=snapkv budget.kept_fraction=0.1             one tenth of the KV bytes is KEPT
  python run.py -m 'method=glob(*)' budget.kept_fraction=0.1,0.25  a sweep, with one table at the end
  python run.py model=hf model.path=/models/mine                   any transformers decoder
  python run.py runner=profile model=qwen25_7b                     head roles for heterocache, once a model
  python run.py runner=fetch benchmark=longbench                   data and prompts ahead, for use offline
  python run.py runner=budget 'method=glob(*)' budget=f10,f25      what each would keep, planned; runs nothing
  python run.py -m launch=ray method=snapkv,quest                  a sweep side by side, a GPU each
  python -m runners.wandb_sweep experiment=methods                 a sweep file for W&B agents
  python run.py --cfg job                                          the composed configuration

Groups and their choices (* is the default; the files in conf/ explain every option):
"""
_TAIL = """
Exit code: 0; 1 if a cell failed (infeasible is not a failure); 2 for a command that can't be run;
143 after SIGTERM.
"""
_NO_DEFAULT = ("experiment", "debug")
_BY_THEMSELVES = ("local", "sizes")
"""Groups that config.yaml fills without being asked."""


_ALIKE = ("budget",)
"""Groups whose choices say all in their names."""
_COMMAND = re.compile(r"# python run\.py .*?\s{2,}(.+)")
_OPTION = re.compile(r"( *)(\w+):(?: ([^#]*\S))?(?: +# (.+))?$")


def usage() -> str:
    """The help text."""
    shown = [group for group in groups() if group not in _BY_THEMSELVES]
    return _HEAD + "".join(map(_described, shown)) + "".join(_launch_options()) + _TAIL


def _described(group: str) -> str:
    default = None if group in _NO_DEFAULT else default_choice(group)
    names = {name: f"*{name}" if name == default else name for name in choices(group)}
    if group in _ALIKE:
        return f"  {group}\n    {'  '.join(names.values())}\n"
    lines = [f"    {shown:<29} {_meaning(group, name)}".rstrip() for name, shown in names.items()]
    return "\n".join([f"  {group}", *lines, ""])


def _meaning(group: str, name: str) -> str:
    """What a choice's file says behind its command; nothing for a plug-in, which has no file."""
    path = CONF / group / f"{name}.yaml"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = _COMMAND.search(text)
    return found[1] if found else ""


def _launch_options() -> Iterator[str]:
    """The options in the files of `launch` with their comments: Hydra's help doesn't know what they mean."""
    yield "\nOptions of launch=ray and launch=slurm (others of Hydra's launchers are there too):\n"
    for name in choices("launch"):
        path: list[str] = []
        for line in (CONF / "launch" / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
            if found := _OPTION.match(line):
                path[len(found[1]) // 2 :] = [found[2]]
                if found[4]:
                    yield f"  {'.'.join(path) + '=' + found[3]:<45} {found[4]}\n"
