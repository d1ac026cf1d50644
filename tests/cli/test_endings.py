"""How a run ends: as under python, but a UserError is one line and exit code 2."""

from __future__ import annotations

import signal

import pytest

ENDINGS = {
    "falls off the end": "print('done')",
    "exit code": "import sys; sys.exit(3)",
    "exit with a text": "import sys; sys.exit('no more')",
    "exception": "def f():\n    1 / 0\n\nf()",
    "chained": "try:\n    {}['a']\nexcept KeyError as error:\n    raise ValueError('b') from error",
    "syntax": "print('never')\nx = = 1",
    "its own encoding": "# -*- coding: latin-1 -*-\nprint(len('\u00e9'))",
    "import": "import a_module_that_is_not_there",
    "import below": "import broken",
    "atexit": "import atexit; atexit.register(print, 'bye'); raise RuntimeError('late')",
    "own hook": "import sys; sys.excepthook = lambda *e: print('hooked', e[0].__name__); 1 / 0",
    "thread": "import threading; t = threading.Thread(target=lambda: 1 / 0, name='t'); t.start(); t.join()",
    "interrupt": "raise KeyboardInterrupt",
    "interrupt from outside": """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's job in the background does not have
os.kill(os.getpid(), signal.SIGINT)
while True: pass
""",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_as_under_python(start, ours, tmp_path, ending) -> None:
    (tmp_path / "script.py").write_text(ENDINGS[ending])
    (tmp_path / "broken.py").write_text(
        "try:\n    import not_there\nexcept ImportError as e:\n    raise OSError() from e"
    )
    plain, run = start("script.py"), ours("run", "script.py")
    assert (run.returncode, run.stdout, run.stderr) == (plain.returncode, plain.stdout, plain.stderr)


def test_an_interrupt_kills_with_its_signal(ours, tmp_path) -> None:
    (tmp_path / "script.py").write_text(ENDINGS["interrupt"])
    assert ours("run", "script.py").returncode == -signal.SIGINT


USER_ERROR = """
import atexit
from nxdt_nemo.errors import ConfigError
atexit.register(print, "bye")
def inner():
    raise ConfigError("model.x=3\\nis odd", place="a.yaml", fix="use 2")
inner()
"""
LINE = "nxdt-nemo: a.yaml: model.x=3 is odd; use 2\n"


def test_a_user_error_is_one_line(ours, tmp_path) -> None:
    (tmp_path / "script.py").write_text(USER_ERROR)
    done = ours("run", "script.py")
    assert (done.returncode, done.stdout, done.stderr) == (2, "bye\n", LINE)


def test_other_ranks_leave_in_silence(ours, tmp_path) -> None:
    (tmp_path / "script.py").write_text(USER_ERROR)
    done = ours("run", "script.py", RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stderr) == (2, "")


@pytest.mark.ranks
def test_under_torchrun_the_line_appears_once(start, tmp_path) -> None:
    (tmp_path / "script.py").write_text(USER_ERROR)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = start(*torchrun, "-m", "nxdt_nemo", "run", "script.py")
    assert done.returncode != 0
    assert done.stderr.count(LINE) == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian.py"], "trian.py: no such script; did you mean train.py?"),
        (["train"], "train: no such script; did you mean train.py?"),
        (["conf/train_gtp.py"], "conf/train_gtp.py: no such script; did you mean conf/train_gpt.py?"),
        (["other.py"], "other.py: no such script"),
        (["nowhere/train.py"], "nowhere/train.py: no such script; there is no folder nowhere"),
        (["conf"], "conf: is a folder, not a script"),
        (["-m", "no_such_module.at_all"], "-m no_such_module.at_all: no such module"),
        (["-m", "json.no_such"], "-m json.no_such: no such module"),
        (["-m", "math"], "-m math: has no Python code to run"),
    ],
)
def test_nothing_to_run_is_one_line(ours, tmp_path, arguments, line) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "train.py").touch()
    (tmp_path / "conf" / "train_gpt.py").touch()
    done = ours("run", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"nxdt-nemo: {line}\n")


def test_an_unknown_lane_is_one_line_before_the_script_starts(ours, tmp_path) -> None:
    (tmp_path / "script.py").write_text("print('started')")
    done = ours("run", "script.py", NXDT_NEMO_RUNTIME="gpu")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("nxdt-nemo: NXDT_NEMO_RUNTIME")
    assert "'gpu' is not a lane" in done.stderr
