"""NeMo's compiled index builders, compiled where this user may write.

Room nemo/. Stands in for nemo.collections.nlp.data.language_modeling.megatron.helpers, which the wheel brings as
C++ source: upstream runs `make` in the installed package with whatever `python3` is first on PATH, and ends the process
if that lacks pybind11. Here upstream's source is compiled once into the user's cache, against the pybind11 in torch's
headers, by the first rank that asks. Proof: tests/nemo/test_helpers.py.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from nxdt_nemo.errors import UserError

__all__ = ["Helpers", "compile_helper", "compiled", "helpers"]

_PACKAGE = "nemo.collections.nlp.data.language_modeling.megatron"


def compiled(root: Path | None = None) -> Path:
    """The compiled module's file, made if it is not there; another for another NeMo, Python or torch.

    root  by default the user's cache
    Raises UserError when there is no C++ compiler, or it fails.
    """
    import torch

    package = importlib.util.find_spec(_PACKAGE)
    assert package is not None and package.origin is not None
    source = Path(package.origin).with_name("helpers.cpp")
    headers = Path(torch.__file__).parent / "include"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    key = hashlib.sha256(source.read_bytes() + f"{sys.version} {torch.__version__} {suffix}".encode()).hexdigest()[:12]
    root = root or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nxdt_nemo"
    made = root / f"nemo-helpers-{key}" / f"helpers{suffix}"
    if made.exists():
        return made
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise UserError("no C++ compiler found for NeMo's index builders", place="helpers.cpp", fix="install g++")
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        result = Path(folder) / made.name
        flags = ["-O2", "-shared", "-std=c++17", "-fPIC", f"-I{headers}", f"-I{sysconfig.get_path('include')}"]
        command = [*compiler.split(), *flags, str(source), "-o", str(result)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"NeMo's index builders do not compile: {_first_error(done.stderr)}", place=str(source))
        result.replace(made)  # whoever was faster made the same
    return made


class Helpers:
    """What `from ... import helpers` gives: the compiled module, made when a function of it is first asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_loaded(), name)


helpers = Helpers()


def compile_helper() -> None:
    """dataset_utils.compile_helper: called by some of the ranks, so that the others find it made."""
    compiled()


@cache
def _loaded() -> ModuleType:
    loader = ExtensionFileLoader("helpers", str(compiled()))
    spec = importlib.util.spec_from_file_location("helpers", loader.path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _first_error(text: str) -> str:
    return next((line for line in text.splitlines() if "error" in line), text.strip()[-300:])
