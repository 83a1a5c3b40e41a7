"""Prompt templates of a benchmark's authors: fetched at a pinned commit, checked, cached; never vendored.

`prompt_dir` names a local checkout, or a directory laid out like one, to be read instead. Python files of
literals are parsed, never run.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcache.benchmarks.source import DataError

CACHE = Path(os.environ.get("HCACHE_CACHE", "~/.cache/hcache")).expanduser()
RAW = "https://raw.githubusercontent.com"
_SECONDS = 30


@dataclass(frozen=True)
class PromptFile:
    """One file of a repository.

    Args:
        repository: owner/name on GitHub.
        commit: pinned.
        path: within the repository.
        sha256: of the file, in hex; of a file from `prompt_dir` it isn't asked. None: not known, the commit
            alone says which file it is.
    """

    repository: str
    commit: str
    path: str
    sha256: str | None = None

    def text(self, prompt_dir: str | None = None) -> str:
        """The file's text: from `prompt_dir`, else from the cache, else fetched into it.

        Raises:
            DataError: it isn't there, can't be fetched, or has another hash.
        """
        if prompt_dir is not None:
            local = self.place(prompt_dir)
            if not local.is_file():
                raise DataError(
                    f"benchmark.prompt_dir={prompt_dir} has no {self.path} (of github.com/{self.repository})"
                )
            return local.read_text(encoding="utf-8")
        return self._cached().decode()

    def place(self, prompt_dir: str | None = None) -> Path:
        """Where the file lies, or will lie once it is fetched."""
        cached = CACHE / "prompts" / self.repository / self.commit
        return (cached if prompt_dir is None else Path(prompt_dir).expanduser()) / self.path

    def matches(self, prompt_dir: str) -> bool:
        """Whether the file in `prompt_dir` is known to be the very one that is pinned."""
        return hashlib.sha256(self.text(prompt_dir).encode()).hexdigest() == self.sha256

    def _cached(self) -> bytes:
        place = self.place()
        if place.is_file():
            content = place.read_bytes()
            if self.sha256 in (None, hashlib.sha256(content).hexdigest()):
                return content
        content = self._fetched()
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f"{place.name}.{os.getpid()}")
        temporary.write_bytes(content)
        os.replace(temporary, place)
        return content

    def _fetched(self) -> bytes:
        from urllib.request import urlopen  # takes a while to import

        url = f"{RAW}/{self.repository}/{self.commit}/{self.path}"
        try:
            with urlopen(url, timeout=_SECONDS) as answer:
                content: bytes = answer.read()
        except OSError as error:  # urllib's errors are of this kind
            raise DataError(
                f"the prompts at {url} can't be fetched ({error}); run runner=fetch where there is a "
                f"network, or set benchmark.prompt_dir to a checkout of github.com/{self.repository}"
            ) from error
        found = hashlib.sha256(content).hexdigest()
        if self.sha256 not in (None, found):
            raise DataError(f"{url} has sha256 {found}, pinned is {self.sha256}: it is not the file it was")
        return content

    def json(self, prompt_dir: str | None = None) -> Any:
        """The file as JSON. Raises DataError as `text`, and where it is none."""
        try:
            return json.loads(self.text(prompt_dir))
        except json.JSONDecodeError as error:
            raise DataError(f"{self.path} of {self.repository} is no JSON: {error}") from error

    def literals(self, prompt_dir: str | None = None) -> dict[str, Any]:
        """Module-level names of a Python file that are assigned literals; sums of strings count as literals.

        Raises:
            DataError: as `text`, and where it is no Python.
        """
        try:
            tree = ast.parse(self.text(prompt_dir))
        except SyntaxError as error:
            raise DataError(f"{self.path} of {self.repository} is no Python: {error}") from error
        found: dict[str, Any] = {}
        for node in tree.body:
            if (
                isinstance(node, ast.Assign)
                and len(node.targets) == 1
                and isinstance(node.targets[0], ast.Name)
            ):
                try:
                    found[node.targets[0].id] = _literal(node.value)
                except ValueError:  # something that is computed
                    continue
        return found


def _literal(node: ast.expr) -> Any:
    """Raises ValueError for what is no literal."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _literal(node.left), _literal(node.right)
        if isinstance(left, str) and isinstance(right, str):
            return left + right
        raise ValueError("a sum of other things than strings")
    if isinstance(node, ast.Dict) and all(key is not None for key in node.keys):
        pairs = zip(node.keys, node.values, strict=True)
        return {_literal(key): _literal(value) for key, value in pairs if key is not None}
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(part) for part in node.elts]
    return ast.literal_eval(node)
