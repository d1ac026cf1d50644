"""The wheel and the editable install, each in an environment without torch, NeMo and Megatron."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import pytest

import nxdt_nemo

ROOT = Path(__file__).parents[2]
ACTIVE = "import sys; m = sys.modules.get('nxdt_nemo'); print(bool(m and m.is_active()))"
FOLDER = "from nxdt_nemo._resources import folder; print(folder('{}'))"


@pytest.fixture(params=["installed", "editable"])
def python(request):
    return request.getfixturevalue(request.param)


def below(folder: str) -> set[str]:
    """Files of a folder of the repository, caches left out."""
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {name for name in files if "__pycache__" not in name}


def test_the_wheel_holds_what_it_should_and_nothing_else(wheel) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    code = below("nxdt_nemo")
    data = {re.sub("^(patches|configs)/", r"nxdt_nemo/_\1/", name) for name in below("patches") | below("configs")}
    info = f"nxdt_nemo-{nxdt_nemo.__version__}.dist-info/"
    assert "nxdt_nemo/py.typed" in code
    assert "nxdt_nemo/_patches/views.toml" in data
    own = {f"{info}{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert names == code | data | own | {"nxdt_nemo_activate.pth"}


def test_the_wheel_has_this_version(installed) -> None:
    assert installed("--version", program="nxdt-nemo").stdout == f"nxdt-nemo {nxdt_nemo.__version__}\n"


def test_the_environment_is_empty_of_the_stack(python) -> None:
    for name in ("torch", "nemo", "megatron", "lightning", "hydra"):
        assert f"No module named '{name}'" in python("-c", f"import {name}").stderr


def test_help(python) -> None:
    done = python("--help", program="nxdt-nemo")
    assert done.returncode == 0, done.stderr
    assert "patches" in done.stdout


def test_patches_are_listed(python) -> None:
    done = python("patches", "list", "--json", program="nxdt-nemo")
    assert done.returncode == 0, done.stderr
    records = [path.read_text() for path in (ROOT / "patches").glob("*.toml")]
    assert len(json.loads(done.stdout)) == sum(len(re.findall("(?m)^target *=", text)) for text in records) > 0


@pytest.mark.parametrize("name", ["patches", "configs"])
def test_the_wheel_reads_its_own_folders(installed, name) -> None:
    found = Path(installed("-c", FOLDER.format(name)).stdout.strip())
    assert found.parts[-3:] == ("site-packages", "nxdt_nemo", f"_{name}")
    assert {path.name for path in found.iterdir()} == {path.name for path in (ROOT / name).iterdir()}


@pytest.mark.parametrize("name", ["patches", "configs"])
def test_the_editable_install_reads_the_repositorys_and_keeps_no_copy(editable, name) -> None:
    assert editable("-c", FOLDER.format(name)).stdout.strip() == str(ROOT / name)
    site = Path(editable("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    assert not (site / "nxdt_nemo").exists()
    assert (site / "nxdt_nemo_activate.pth").read_text() == (ROOT / "nxdt_nemo_activate.pth").read_text()


@pytest.mark.parametrize(("value", "active"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_variable_alone_activates(python, value, active) -> None:
    done = python("-c", ACTIVE, **({} if value is None else {"NXDT_NEMO": value}))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{active}\n", "")


def test_without_the_variable_nothing_of_ours_is_loaded(python) -> None:
    done = python("-c", "import sys; print([name for name in sys.modules if name.startswith('nxdt')])")
    assert done.stdout == "[]\n"


def test_a_mistake_at_interpreter_start_is_one_line(python) -> None:
    done = python("-c", "print('started')", NXDT_NEMO="1", NXDT_NEMO_RUNTIME="gpu")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "'gpu' is not a lane" in done.stderr


def test_run_starts_a_script(python, tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import nxdt_nemo, sys; print(nxdt_nemo.is_active(), sys.argv[1:])")
    done = python("run", str(script), "-h", "--x=1", program="nxdt-nemo")
    assert (done.returncode, done.stdout) == (0, "True ['-h', '--x=1']\n"), done.stderr
