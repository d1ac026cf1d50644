"""The command's own words, and that saying them loads nothing heavy."""

from __future__ import annotations

import json

import pytest

import nxdt_nemo

HEAVY = {"torch", "numpy", "omegaconf", "hydra", "pydantic", "lightning", "nemo", "megatron", "transformers"}
PROBE = """
import json, sys
from nxdt_nemo.cli.main import main
try:
    main({arguments})
except SystemExit as finished:
    code = finished.code
print("PROBE" + json.dumps([code, sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["--version"], ["patches", "--help"], ["ckpt", "--help"]]
)
def test_help_loads_nothing_heavy(start, arguments) -> None:
    done = start("-c", PROBE.format(arguments=arguments))
    code, packages = json.loads(done.stdout.rpartition("PROBE")[2])
    assert code in (0, None)
    # typer itself takes pydantic to convert the arguments of a sub-command.
    assert set(packages) & HEAVY <= ({"pydantic"} if "--help" in arguments[1:] else set())


def test_the_probe_sees_what_is_loaded(start) -> None:
    done = start("-c", "import pydantic\n" + PROBE.format(arguments=["--help"]))
    assert "pydantic" in json.loads(done.stdout.rpartition("PROBE")[2])[1]


def test_help_names_the_commands(ours) -> None:
    done = ours("--help")
    assert done.returncode == 0
    for word in ("run", "patches", "ckpt", "--version"):
        assert word in done.stdout


def test_version(ours) -> None:
    assert ours("--version").stdout == f"nxdt-nemo {nxdt_nemo.__version__}\n"


def test_an_unknown_command_is_exit_code_2_without_a_traceback(ours) -> None:
    done = ours("rnu")
    assert done.returncode == 2
    assert "rnu" in done.stderr
    assert "Traceback" not in done.stderr
