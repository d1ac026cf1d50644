"""`nxdt-nemo run` sets `__main__` up as python does: the same probe under both, the same answers."""

from __future__ import annotations

import json

import pytest

PROBE = '''
"""A probe."""
import json, multiprocessing, os, pickle, sys
import sibling

class Point:
    x = 1

def double(value):
    return 2 * value

def main():
    spawned = None
    if not (__spec__ and __spec__.name.endswith("__main__")):  # multiprocessing cannot spawn from a package
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            spawned = pool.map(double, [1, 2])
    main_module = sys.modules["__main__"]
    print("PROBE" + json.dumps({
        "argv": sys.argv,
        "path0": sys.path[0],
        "name": __name__,
        "file": __file__,
        "spec": __spec__ and __spec__.name,
        "package": __package__,
        "cached": __cached__,
        "loader": type(__loader__).__name__,
        "doc": __doc__,
        "globals": sorted(name for name in globals() if name.startswith("__")),
        "is the main module": vars(main_module) is globals(),
        "pickled": type(pickle.loads(pickle.dumps(Point()))) is Point,
        "spawned": spawned,
        "sibling": sibling.__file__,
        "code": main.__code__.co_filename,
        "cwd": os.getcwd(),
    }))

if __name__ == "__main__":
    main()
'''


@pytest.fixture
def scripts(tmp_path):
    """conf/probe.py with a sibling, a link to it from elsewhere, and the same as package `parcel`."""
    for folder in ("conf", "parcel"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "probe.py").write_text(PROBE)
    (tmp_path / "conf" / "sibling.py").touch()
    (tmp_path / "sibling.py").touch()
    (tmp_path / "parcel" / "__init__.py").touch()
    (tmp_path / "parcel" / "__main__.py").write_text(PROBE)
    (tmp_path / "link.py").symlink_to(tmp_path / "conf" / "probe.py")
    return tmp_path


def answers(done) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("PROBE")[2])


@pytest.mark.parametrize(
    "arguments",
    [
        ["conf/probe.py", "--config-path=conf", "-h", "--", "--help", "a b", ""],
        ["{}/conf/probe.py"],
        ["link.py", "-m", "--version"],
        ["-m", "parcel.probe", "--config-path=conf", "-h"],
        ["-m", "parcel", "--help"],
    ],
    ids=["relative", "absolute", "link", "module", "package"],
)
def test_as_python_does(start, ours, scripts, arguments) -> None:
    arguments = [argument.replace("{}", str(scripts)) for argument in arguments]
    assert answers(ours("run", *arguments)) == answers(start(*arguments))


def test_safe_path_is_respected(start, ours, scripts) -> None:
    (scripts / "show.py").write_text("import sys; print(sys.path[0])")
    assert ours("run", "show.py", PYTHONSAFEPATH="1").stdout == start("show.py", PYTHONSAFEPATH="1").stdout


def test_the_backend_is_active_here_and_in_children(ours, scripts) -> None:
    (scripts / "active.py").write_text(
        "import nxdt_nemo, os, subprocess, sys\n"
        "print(nxdt_nemo.is_active(), os.environ['NXDT_NEMO'], flush=True)\n"
        "if len(sys.argv) == 1:\n"
        "    subprocess.run([sys.executable, __file__, 'child'], check=True)\n"
    )
    assert ours("run", "active.py").stdout == "True 1\nTrue 1\n"


@pytest.mark.parametrize("environment", [{}, {"NXDT_NEMO": "1"}], ids=["by run", "by the variable"])
def test_the_script_sees_the_views_and_its_sibling_does_not(ours, scripts, environment) -> None:
    (scripts / "sibling.py").write_text("import torch\ncuda = torch.cuda\n")
    (scripts / "views.py").write_text(
        "import sys, torch, sibling\n"
        "print(torch.cuda is sys.modules['torch'].cuda, sibling.cuda is sys.modules['torch'].cuda)\n"
    )
    assert ours("run", "views.py", **environment).stdout == "False True\n"


@pytest.mark.ranks
def test_under_torchrun_each_rank_runs_the_script(start, scripts) -> None:
    (scripts / "rank.py").write_text(
        "import os, sys, nxdt_nemo\n"
        "line = ' '.join([os.environ['RANK'], str(nxdt_nemo.is_active()), *sys.argv])\n"
        "os.write(1, (line + '\\n').encode())\n"
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = start(*torchrun, "-m", "nxdt_nemo", "run", "rank.py", "--config-path=conf", "-h")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{rank} True rank.py --config-path=conf -h" for rank in (0, 1)]
