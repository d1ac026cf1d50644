"""Packages that stand in each other's way.

Room audit/. Looks at files and metadata; imports nothing of what it looks at. Proof: tests/cli/test_doctor.py.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from nxdt_nemo.audit.doctor.row import Row, count
from nxdt_nemo.patching.fingerprint import locate
from nxdt_nemo.runtime.machine import installed

__all__ = ["rows"]

SECTION = "traps"
# A module that a checkout on the path may stand in front of, and the distribution that it should come from.
WHEELS = {"nemo": "nemo_toolkit", "megatron.core": "megatron-core", "lightning": "lightning"}


def rows() -> Iterator[Row]:
    """The rows of this section."""
    yield from _two_lightnings()
    yield from _apex()
    for module in ("transformer_engine", "flash_attn"):
        version = installed(module, module.replace("_", "-"))
        if version is not None:
            found = f"{version}: CUDA kernels, hidden from NeMo and Megatron, seen by other libraries"
            yield Row(SECTION, module, found, "note", f"pip uninstall {module.replace('_', '-')}")
    for module, name in WHEELS.items():
        yield from _shadow(module, name)
    yield _nvidia_packages()


def _two_lightnings() -> Iterator[Row]:
    one, other = installed("lightning"), installed("pytorch_lightning", "pytorch-lightning")
    what = "lightning beside pytorch_lightning"
    if one is None or other is None:
        if other is not None:
            fix = "pip install 'nxdt-nemo[nemo]': NeMo imports lightning.pytorch"
            yield Row(SECTION, "pytorch_lightning", f"{other}, and no lightning", "problem", fix)
        return
    if one != other:
        yield Row(SECTION, what, f"{one} and {other}", "problem", f"pip install pytorch-lightning=={one}")
        return
    found = f"both {one}; their classes are not the same, so isinstance checks between them fail"
    fix = "import Trainer, callbacks and loggers from lightning.pytorch, as NeMo does"
    yield Row(SECTION, what, found, "note", fix)


def _apex() -> Iterator[Row]:
    spec = PathFinder.find_spec("apex")
    if spec is None:
        return
    version = installed("apex")
    places = [Path(place) for place in spec.submodule_search_locations or []]
    if any((place / "multi_tensor_apply").is_dir() for place in places):
        found = f"{version}: NVIDIA's, not used: NeMo and Megatron see this backend's in its place"
        yield Row(SECTION, "apex", found, "note", "nothing to do; other libraries still see it")
    else:
        found = f"{version}: not NVIDIA's Apex but an unrelated package of that name"
        yield Row(SECTION, "apex", found, "note", "pip uninstall apex; this backend brings what NeMo needs")


def _shadow(module: str, name: str) -> Iterator[Row]:
    """A copy of the module that is found before the installed one."""
    found = locate(module)
    if found is None or found.file is None or found.module != module:
        return
    try:
        wheel = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        yield Row(SECTION, module, f"taken from {found.file.parent}, {name} is not installed", "note", "see versions")
        return
    expected = Path(str(wheel.locate_file(module.replace(".", "/") + "/__init__.py")))
    if not expected.is_file() or expected.resolve() == found.file.resolve():  # an editable install has no files there
        return
    theirs = _written_version(found.file.parent)
    state = "note" if theirs == wheel.version else "problem"
    text = f"{found.file.parent} ({theirs or 'version unknown'}) stands before the installed {name} {wheel.version}"
    yield Row(SECTION, module, text, state, f"take {_entry(found.file)} off PYTHONPATH")  # type: ignore[arg-type]


def _written_version(folder: Path) -> str | None:
    """The version in a package_info.py of NVIDIA's form, read without running it."""
    info = folder / "package_info.py"
    if not info.is_file():
        return None
    parts = dict(re.findall(r"^(MAJOR|MINOR|PATCH)\s*=\s*(\d+)", info.read_text(), re.MULTILINE))
    return ".".join(parts[key] for key in ("MAJOR", "MINOR", "PATCH")) if len(parts) == 3 else None


def _entry(file: Path) -> Path:
    """The entry of sys.path that a module was found under."""
    entries = [Path(place) for place in sys.path if place and file.is_relative_to(place)]
    return max(entries, key=lambda entry: len(entry.parts), default=file.parent)


def _nvidia_packages() -> Row:
    names = {(found.metadata["Name"] or "").lower() for found in importlib.metadata.distributions()}
    cuda = [name for name in names if re.fullmatch(r"nvidia-.*-cu\d+", name)]
    found = f"{count(len(cuda), 'package')}: torch's CUDA build, unused here" if cuda else "none"
    return Row(SECTION, "nvidia-*-cu*", found)
