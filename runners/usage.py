"""What `python run.py --help` says, read from the files in conf/. Imports no torch."""

from __future__ import annotations

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


def usage() -> str:
    """The help text."""
    shown = [group for group in groups() if group not in _BY_THEMSELVES]
    return _HEAD + "".join(f"  {group:<11}{_listed(group)}\n" for group in shown) + _TAIL


def _listed(group: str) -> str:
    default = None if group in _NO_DEFAULT else default_choice(group)
    return "  ".join(f"*{name}" if name == default else name for name in choices(group))
