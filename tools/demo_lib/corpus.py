"""A real English corpus that every Python machine has: the interpreter's own documentation.

Tool of `make demo`; standard library only. Texts: `pydoc_data.topics` (the language reference as `help()`
shows it) and the docstrings of the standard library, read with `ast`, so that no module is imported.
Licence of the text: Python Software Foundation License version 2, which allows redistribution.
Proof: tests/tools/test_demo.py.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from importlib import import_module
from inspect import cleandoc
from pathlib import Path

__all__ = ["LICENCE", "documents", "prose", "write_corpus"]

LICENCE = "Python documentation and docstrings, PSF License version 2"

# Tests hold little prose; the others are packaged apart by some distributions, so leaving them out gives
# two machines with the same Python the same corpus.
_SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "tkinter", "turtle.py", "turtledemo"}
_SKIPPED |= {"distutils", "ensurepip", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
_SHORTEST = 200  # characters; below that a docstring is a signature or a stub
_MIN_LETTERS = 0.8  # of a paragraph's characters, spaces counted; code and tables fall below


def prose(text: str) -> str:
    """The English paragraphs of `text`, one a line, unwrapped; code, doctests, tables and headings left out."""
    kept = []
    for paragraph in cleandoc(text).split("\n\n"):
        line = " ".join(paragraph.split())
        letters = sum(c.isalpha() or c == " " for c in line)
        if line.count(" ") >= 5 and letters >= _MIN_LETTERS * len(line) and not line.startswith(">>>"):
            kept.append(line)
    return "\n".join(kept)


def _topics() -> Iterator[str]:
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    yield from topics.values()


def _docstrings(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED.intersection(path.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""


def documents() -> list[str]:
    """All documents, deduplicated, in the order of their SHA-256.

    That order is the same on every machine and mixes long and short texts, so that Megatron's split by
    position (first 90 % for training, the rest for validation) compares like with like.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts = (prose(text) for source in (_topics(), _docstrings(root)) for text in source)
    unique = {hashlib.sha256(text.encode()).hexdigest(): text for text in texts if len(text) >= _SHORTEST}
    return [unique[digest] for digest in sorted(unique)]


def write_corpus(path: Path) -> dict[str, int | str]:
    """Write `{"text": ...}` lines to `path`; returns documents, bytes (of text), sha256 (of the file)."""
    texts = documents()
    body = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    return {
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "sha256": hashlib.sha256(body).hexdigest(),
    }
