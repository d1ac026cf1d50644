"""`nxdt-nemo doctor`: what it says of an installation, of traps, and what it does not say."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nxdt_nemo.audit.doctor import backend, host, versions
from nxdt_nemo.audit.doctor.probes import Probe, run
from nxdt_nemo.audit.doctor.row import Row
from nxdt_nemo.cli.doctor import report

Doctor = Callable[..., tuple[int, dict[str, dict[str, Any]]]]


@pytest.fixture
def doctor(ours: Callable[..., Any]) -> Doctor:
    """doctor(**environment) runs `nxdt-nemo doctor --no-probe --json`: (exit code, rows by `what`)."""

    def call(**environment: str) -> tuple[int, dict[str, dict[str, Any]]]:
        done = ours("doctor", "--no-probe", "--json", **environment)
        assert done.stderr == ""
        return done.returncode, {row["what"]: row for row in json.loads(done.stdout)["rows"]}

    return call


@pytest.fixture
def site(tmp_path: Path) -> Callable[..., str]:
    """site(package, version=..., **files): the PYTHONPATH entry of a package installed there."""

    def install(package: str, *, version: str, **files: str) -> str:
        root = tmp_path / "site"
        folder = root / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        for name, text in files.items():
            (folder / f"{name}.py").write_text(text)
        metadata = root / f"{package}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        return str(root)

    return install


def test_this_environment_has_no_problem(doctor: Doctor) -> None:
    code, rows = doctor()
    assert [row for row in rows.values() if row["state"] == "problem"] == []
    assert code == 0
    assert rows["megatron-core"]["found"] == "0.13.1"
    assert rows["cpu"]["found"].startswith("usable")
    assert rows["xla"]["found"].startswith("usable when asked for")
    assert rows["neuron"]["found"].startswith("not usable: ")
    assert rows["lightning beside pytorch_lightning"]["state"] == "note"
    assert re.fullmatch(r"(\d+) of \1 fit .*", rows["patch records"]["found"])


def test_it_is_markdown_and_its_numbers_are_right(ours: Callable[..., Any]) -> None:
    done = ours("doctor", "--no-probe", XLA_USE_BF16="1", NCCL_DEBUG="INFO")
    first, *lines = done.stdout.splitlines()
    table = [line for line in lines if line]
    assert all(re.fullmatch(r"\|( [^|]*|-+)\|( [^|]*|-+)\|( ([^|]|\\\|)*|-+)\|", line) for line in table)
    states = [line.split("|")[1].strip() for line in table]
    notes = states.count("note")
    assert notes >= 2
    assert first == f"nxdt-nemo doctor: 0 problems, {notes} notes"


def test_what_ends_a_cell_is_escaped() -> None:
    lines = list(report([Row("traps", "nvidia-*", "a | b\nc", "problem", "d")]))
    assert lines[0] == "nxdt-nemo doctor: 1 problem, 0 notes"
    assert lines[-1] == r"| problem | nvidia-\* | a \| b c; d |"


def test_values_of_variables_stay_private(ours: Callable[..., Any]) -> None:
    secret = {"NCCL_SOCKET_IFNAME": "s3cret", "NEURON_RT_ROOT_COMM_ID": "s3cret:1", "NXDT_TOKEN": "s3cret"}
    others = {"WANDB_API_KEY": "s3cret", "PYTHONPATH": "/s3cret", "MASTER_ADDR": "s3cret"}
    done = ours("doctor", "--no-probe", **secret, **others, CUDA_DEVICE_MAX_CONNECTIONS="1")
    assert "s3cret" not in done.stdout
    for shown in ("NCCL_SOCKET_IFNAME", "NEURON_RT_ROOT_COMM_ID", "CUDA_DEVICE_MAX_CONNECTIONS=1", "MASTER_ADDR"):
        assert shown in done.stdout


def test_the_home_folder_is_not_named(doctor: Doctor, site: Callable[..., str], tmp_path: Path) -> None:
    place = site("lightning", version="2.4.0")
    _, rows = doctor(PYTHONPATH=place, HOME=str(tmp_path))
    assert rows["lightning"]["state"] == "ok"  # the copy is a whole distribution: nothing stands before it
    checkout = tmp_path / "checkout" / "nemo"
    checkout.mkdir(parents=True)
    (checkout / "__init__.py").touch()
    _, rows = doctor(PYTHONPATH=str(checkout.parent), HOME=str(tmp_path))
    assert rows["nemo"]["found"].startswith("~/checkout/nemo (version unknown) stands before")


@pytest.mark.parametrize(("version", "state", "code"), [("2.4.0", "note", 0), ("2.5.1", "problem", 1)])
def test_two_lightnings(doctor: Doctor, site: Callable[..., str], version: str, state: str, code: int) -> None:
    found, rows = doctor(PYTHONPATH=site("pytorch_lightning", version=version))
    assert (found, rows["lightning beside pytorch_lightning"]["state"]) == (code, state)


def test_which_apex(doctor: Doctor, site: Callable[..., str]) -> None:
    place = site("apex", version="0.9.10")
    code, rows = doctor(PYTHONPATH=place)
    assert (code, rows["apex"]["fix"].partition(";")[0]) == (0, "pip uninstall apex")
    Path(place, "apex", "multi_tensor_apply").mkdir()
    assert "NVIDIA's, not used" in doctor(PYTHONPATH=place)[1]["apex"]["found"]


def test_transformer_engine_is_hidden(doctor: Doctor, site: Callable[..., str]) -> None:
    _, rows = doctor(PYTHONPATH=site("transformer_engine", version="2.1"))
    assert rows["transformer_engine"]["state"] == "note"


@pytest.mark.parametrize(("patch", "state"), [(1, "note"), (2, "problem")])
def test_a_megatron_checkout_on_the_path(doctor: Doctor, tmp_path: Path, patch: int, state: str) -> None:
    core = tmp_path / "Megatron-LM" / "megatron" / "core"
    core.mkdir(parents=True)
    (core.parent / "__init__.py").touch()
    (core / "__init__.py").touch()
    (core / "package_info.py").write_text(f"MAJOR = 0\nMINOR = 13\nPATCH = {patch}\nPRE_RELEASE = ''\n")
    code, rows = doctor(PYTHONPATH=str(tmp_path / "Megatron-LM"))
    row = rows["megatron.core"]
    assert row["state"] == state
    assert row["fix"] == f"take {tmp_path / 'Megatron-LM'} off PYTHONPATH"
    assert (code, rows["patch records"]["state"]) == (1, "problem")  # the checkout here is empty


def test_a_lane_that_cannot_be_used(doctor: Doctor) -> None:
    code, rows = doctor(NXDT_NEMO_RUNTIME="neuron")
    assert (code, rows["accelerator=neuron"]["state"]) == (1, "problem")
    assert "NXDT_NEMO_RUNTIME=neuron" in rows["accelerator=neuron"]["found"]


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("XLA_USE_BF16", "1", "XLA_USE_BF16"),
        ("NEURONCORE_GROUP_SIZES", "2", "NEURONCORE_GROUP_SIZES"),
        ("PJRT_DEVICE", "CUDA", "PJRT_DEVICE"),
        ("NVTE_FLASH_ATTN", "0", "CUDA's leftovers"),
        ("WORLD_SIZE", "8", "a launcher's"),
    ],
)
def test_leftover_variables(doctor: Doctor, name: str, value: str, what: str) -> None:
    code, rows = doctor(**{name: value})
    assert (code, rows[what]["state"]) == (0, "note")
    assert name in what + rows[what]["found"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions (None: not installed) to put in place of the real ones."""
    changed: dict[str, str | None] = {}
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = changed.get(name, real(name) if name not in changed else None)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    return changed


def _version_rows() -> dict[str, Row]:
    return {row.what: row for row in versions.rows()}


def test_without_nemo_there_is_one_line_to_install_it(installed: dict[str, str | None]) -> None:
    installed["nemo_toolkit"] = None
    row = _version_rows()["nemo_toolkit"]
    assert (row.state, row.fix) == ("problem", "pip install 'nxdt-nemo[nemo]'")


@pytest.mark.parametrize(
    ("name", "version", "state"),
    [
        ("megatron-core", "0.14.0", "problem"),
        ("transformers", "4.60.0", "note"),
        ("braceexpand", None, "problem"),
        ("torch", "2.9.0+cpu", "ok"),
        ("torch", "2.14.0+cu130", "ok"),  # the neuron lane's
        ("torch", "2.10.0", "problem"),
        ("torch-xla", "2.8.1", "problem"),
    ],
)
def test_other_versions(installed: dict[str, str | None], name: str, version: str | None, state: str) -> None:
    assert _version_rows().get(name) is None or _version_rows()[name].state == "ok"
    installed[name] = version
    assert _version_rows()[name].state == state


def test_a_missing_start_up_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {row.what: row.state for row in backend.rows("0")}[backend.PTH] == "ok"
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert {row.what: row.state for row in backend.rows("0")}[backend.PTH] == "problem"


def test_missing_bytecode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(host, "COMPILED", ("fresh",))
    row = {row.what: row for row in host.rows()}["bytecode"]
    assert (row.state, row.fix) == ("note", f"python -m compileall -q {tmp_path}")


def test_a_probe_says_why_it_failed() -> None:
    assert run(Probe("fine", "pass", "")).state == "ok"
    failed = run(Probe("torch", "import nothing_of_that_name", "install it"))
    expected = ("problem", "ModuleNotFoundError: No module named 'nothing_of_that_name'")
    assert (failed.state, failed.found) == expected
    assert run(Probe("slow", "import time; time.sleep(60)", ""), seconds=0.5).found == "not done after 0 s"


def test_nothing_heavy_is_imported(start: Callable[..., Any]) -> None:
    code = (
        "import sys\nfrom nxdt_nemo.cli.main import main\n"
        "try: main(['doctor', '--no-probe'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'nemo', 'megatron', 'lightning', 'torch_xla'} & set(sys.modules)))"
    )
    assert start("-c", code).stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_the_imports_work(ours: Callable[..., Any]) -> None:
    done = ours("doctor", "--json", timeout=300)
    rows = {row["what"]: row for row in json.loads(done.stdout)["rows"] if row["section"] == "imports"}
    assert {"NXDT_NEMO=1 python", "torch", "NeMo's GPT on the cpu lane"} <= rows.keys()
    assert {row["state"] for row in rows.values()} == {"ok"}
