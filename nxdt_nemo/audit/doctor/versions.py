"""What is installed, beside what this package was tested with.

Room audit/. The tested versions are the requirements of our own extras, as the installed metadata has them; nothing
is imported. Proof: tests/cli/test_doctor.py.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from nxdt_nemo.audit.doctor.row import Row, count
from nxdt_nemo.runtime.machine import neuron_devices

__all__ = ["rows"]

SECTION = "versions"
# In every report; the rest of the extra only when it is missing or another version.
ALWAYS = (
    "torch torchvision nemo_toolkit megatron-core lightning pytorch-lightning transformers huggingface_hub hydra-core "
    "omegaconf pydantic numpy protobuf tensorstore zarr"
).split()
DEVICE = ("torch-xla", "torch-neuronx", "libneuronxla", "neuronx-cc", "aws-neuronx-runtime-discovery")
# The versions that the patch records and the views are written against; of the others a release more may do.
STRICT = {canonicalize_name(name) for name in ("nemo_toolkit", "megatron-core", "lightning", "torch")}
# The neuron lane's stack (requirements-neuron.lock): other releases of these, everything else alike.
NEURON = {"torch": "~=2.14.0", "torchvision": "~=0.29.0"}
LOGGERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "clearml": "clearml"}


def rows() -> Iterator[Row]:
    """The rows of this section."""
    tested = _tested()
    if tested and _installed("nemo_toolkit") is None:
        yield Row(SECTION, "nemo_toolkit", "not installed", "problem", "pip install 'nxdt-nemo[nemo]'")
        tested.pop("nemo-toolkit")
    for name in ALWAYS:
        requirement = tested.pop(canonicalize_name(name), None)
        if requirement is not None or _installed(name) is not None:
            yield _row(requirement or Requirement(name))
    rest = [_row(requirement) for requirement in tested.values()]
    good = [row for row in rest if row.state == "ok"]
    yield from (row for row in rest if row.state != "ok")
    if good:
        yield Row(SECTION, "others of nxdt-nemo[nemo]", f"{count(len(good), 'package')}, as tested")
    yield from _device_packages()
    present = {name: _installed(name) for name in LOGGERS.values()}
    shown = [f"{name} {version or 'no'}" for name, version in present.items()]
    yield Row(SECTION, "loggers", ", ".join(shown))


def _tested() -> dict[str, Requirement]:
    """Requirements of a run, by canonical name: the base and the extra `nemo`."""
    try:
        lines = importlib.metadata.requires("nxdt-nemo") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    parsed = [Requirement(line) for line in lines]
    wanted = [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": "nemo"})]
    return {canonicalize_name(one.name): one for one in wanted}


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _row(requirement: Requirement) -> Row:
    name, version = requirement.name, _installed(requirement.name)
    install = f"pip install '{name}{requirement.specifier}'"
    if version is None:
        return Row(SECTION, name, "not installed", "problem", install)
    # 2.9.0+cpu is as good as 2.9.0.
    if requirement.specifier.contains(Version(version).public, prereleases=True):
        return Row(SECTION, name, version)
    if name in NEURON and SpecifierSet(NEURON[name]).contains(Version(version).public):
        return Row(SECTION, name, f"{version}, the neuron lane's (requirements-neuron.lock)")
    state = "problem" if canonicalize_name(name) in STRICT else "note"
    return Row(SECTION, name, f"{version}, tested with {requirement.specifier}", state, install)  # type: ignore[arg-type]


def _device_packages() -> Iterator[Row]:
    """What the lanes of a device need; nothing is missing where there is no device."""
    for name in DEVICE:
        version = _installed(name)
        if version is None:
            if name in ("torch-neuronx", "neuronx-cc") and neuron_devices():
                yield Row(SECTION, name, "not installed", "note", "it comes with the AWS Neuron SDK")
            continue
        torch = _installed("torch")
        if name == "torch-xla" and torch and Version(torch).release[:2] != Version(version).release[:2]:
            yield Row(SECTION, name, version, "problem", f"torch is {torch}; they must be of the same release")
        else:
            yield Row(SECTION, name, version)
    if not any(_installed(name) for name in ("torch-neuronx", "neuronx-cc")) and not neuron_devices():
        yield Row(SECTION, "torch-neuronx, neuronx-cc", "not installed; the cpu lane needs neither")
