"""A device `neuron` without the hardware: a stand-in for TorchNeuron's `torch_neuronx`, on the host's memory.

Room testing/. What is tested on it is the neuron lane's own code and upstream's on a device that is not the CPU; it
says nothing of TorchNeuron's operations or speed. Needs g++ and ninja, 20 seconds, once for each torch.
Proof: tests/runtime/test_neuron.py, tests/megatron/test_neuron.py.

    folder = installed()                    # as `pip install --target` leaves it
    env = environment(folder)               # PYTHONPATH and the lane, for a process of its own
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from nxdt_nemo.errors import UserError
from nxdt_nemo.runtime.neuron.package import AUTOLOAD

__all__ = ["build", "environment", "installed", "missing_tools"]

_PACKAGE = Path(__file__).with_name("torch_neuronx")


def installed(root: Path | None = None) -> Path:
    """The folder that holds the compiled package, made if it is not there; another for other sources or another torch.

    root  by default a cache of the user's
    Raises UserError when there is no compiler, or it fails.
    """
    root = root or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nxdt_nemo"
    parts = [path.read_bytes() for path in sorted(_PACKAGE.iterdir()) if path.is_file()]
    key = hashlib.sha256(b"\0".join([*parts, Path(__file__).read_bytes(), version("torch").encode()])).hexdigest()[:12]
    folder = root / f"neuron_standin-{key}"
    if folder.exists():
        return folder
    if lacking := missing_tools():
        raise UserError(f"{lacking} not found", place="neuron_standin", fix="install a C++ compiler and ninja")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as made:
        # In a process of its own: what is built is loaded too, and a process has one device of this kind.
        package = Path(made) / "package"
        command = [sys.executable, "-m", "nxdt_nemo.testing.neuron_standin", str(package)]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), AUTOLOAD: "0"}
        done = subprocess.run(command, env=env | {"NXDT_NEMO": "0"}, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the stand-in does not compile:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        try:
            package.rename(folder)
        except OSError:  # somebody was faster
            if not folder.exists():
                raise
    return folder


def missing_tools() -> str:
    """What it takes to compile and is not on this machine, in words; "" if all is."""
    return " and ".join(name for name in ("g++", "ninja") if shutil.which(name) is None)


def build(folder: Path) -> None:
    """The package, its compiled half and its metadata, into `folder`. Loads the device into this process."""
    from torch.utils.cpp_extension import load

    package = folder / "torch_neuronx"
    shutil.copytree(_PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    with tempfile.TemporaryDirectory() as objects:
        load("_C", [str(package / "device.cpp")], build_directory=objects, extra_cflags=["-O0"], is_python_module=False)
        shutil.copy(Path(objects) / "_C.so", package)
    family = ".".join(version("torch").split(".")[:2])
    metadata = folder / f"torch_neuronx-{family}.0+standin.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch-neuronx\nVersion: {family}.0+standin\n")
    (metadata / "entry_points.txt").write_text(
        "[torch.backends]\ntorch_neuronx = torch_neuronx:_autoload\n"
        "[torch_dynamo_backends]\nneuron = torch_neuronx.compiler:compiled\n"
    )


def environment(folder: Path) -> dict[str, str]:
    """For a process that is to run the neuron lane on the stand-in."""
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "NXDT_NEMO_RUNTIME": "neuron"}
