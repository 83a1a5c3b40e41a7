"""hcache.check_method: the README's method passes, broken ones fail, what can't be checked is said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hcache import check_method

ROOT = Path(__file__).resolve().parent.parent
SOME = ["--", "-k", "memory or kept_set or alone"]
"""Enough of the contract to see a fault; all of it takes a minute."""


def written(tmp_path: Path, source: str) -> str:
    path = tmp_path / "mine.py"
    path.write_text(source, encoding="utf-8")
    return str(path)


def readme_method() -> str:
    """The file that the README adds a method with."""
    (source,) = re.findall(r"```python\n(# mine\.py\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return source


def checked(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """In a fresh process and elsewhere, as a user would: the cases and the registry are global."""
    command = [sys.executable, "-m", "hcache.check_method", *arguments]
    threads = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=threads, capture_output=True, text=True, timeout=300)


def test_the_method_of_the_readme_is_short_and_passes(tmp_path: Path) -> None:
    source = readme_method()
    assert len(source.splitlines()) <= 20
    done = checked(written(tmp_path, source), "window=4", *SOME, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert re.search(r"[1-9]\d* passed", done.stdout)
    assert "failed" not in done.stdout


BROKEN = {
    "keeps more than the budget": """
    def layers(self, geometry, budget, prompt_tokens):
        from hcache import Budget
        return super().layers(geometry, Budget(kept_fraction=0.9), prompt_tokens)
""",
    "depends on what came before": """
    def score(self, q, k, v):
        return torch.rand(k.shape[:2])
""",
    "caches something nobody counts": """
    def score(self, q, k, v):
        kept.append(k)
        return super().score(q, k, v)
""",
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_faulty_method_fails(fault: str, tmp_path: Path) -> None:
    source = readme_method().replace("@register", "kept = []\n\n\n@register")
    broken = f"""

@register("broken")
@dataclass(frozen=True)
class Broken(Norms):
{BROKEN[fault]}"""
    only = source.replace('@register("norms")\n', "") + broken
    done = checked(written(tmp_path, only), "window=4", *SOME, "-x", cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert "1 failed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["snapvk"], "did you mean 'snapkv'?"),
        (["./nowhere.py"], "not a Python file"),
        (["snapkv", "windwo=4"], "did you mean 'window'?"),
        (["snapkv", "window"], "write name=value"),
        (["snapkv", "window=40"], "give settings that suit them"),
    ],
)
def test_what_cannot_be_checked_is_said(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_method.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_file_without_a_method_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_method.main([written(tmp_path, "x = 1\n")]) == 2
    assert "registers no method" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["quest", "omnikv", "shadowkv"])
def test_registered_methods_have_the_settings_of_their_own_case(method: str) -> None:
    case = check_method.case_of(method, {})
    assert case.hyper
    assert str(case) == method
