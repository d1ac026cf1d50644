"""What tools/bench/startup.py makes of Python's import times. Nothing is timed here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "bench"))

from startup_lib.import_times import Import, Line, by_package, medians, read

LOG = """import time: self [us] | cumulative | imported package
import time:       100 |        100 | site
a line of somebody's
import time:       200 |        200 |     numpy.core
import time:       300 |        500 |   numpy
import time:        50 |         50 |     sklearn
import time:         0 |         70 |     sklearn
import time:        20 |         20 |       torch.nn
import time:      1000 |       1020 |     torch._dynamo
import time:      4000 |       5590 | torch
import time:        10 |         10 | torch.nn.later
"""


def test_modules_in_the_order_in_which_they_were_begun():
    assert read(LOG) == [
        Import("site", 100e-6, ""),
        Import("torch", 4000e-6, ""),
        Import("numpy", 300e-6, "torch"),
        Import("numpy.core", 200e-6, "numpy"),
        Import("sklearn", 50e-6, "torch"),
        Import("torch._dynamo", 1000e-6, "torch"),
        Import("torch.nn", 20e-6, "torch._dynamo"),
        Import("torch.nn.later", 10e-6, ""),
    ]


def test_a_real_log(tmp_path):
    """The format is the interpreter's."""
    (tmp_path / "outer.py").write_text("import inner\n")
    (tmp_path / "inner.py").write_text("")
    command = [sys.executable, "-X", "importtime", "-c", "import outer"]
    log = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    found = {one.name: one for one in read(log)}
    assert found["inner"].asked_by == "outer"
    assert found["outer"].asked_by == ""
    assert 0 < found["inner"].seconds < 60


def test_packages_largest_first_with_who_asked():
    packages = by_package(read(LOG))
    assert [line.package for line in packages] == ["torch", "torch._dynamo", "numpy", "site", "sklearn", "torch.nn"]
    assert packages[2] == Line("numpy", 300e-6 + 200e-6, 2, "torch")
    assert packages[-1] == Line("torch.nn", 20e-6 + 10e-6, 2, "torch._dynamo")


def test_medians_by_module():
    runs = [[Import("a", seconds, ""), Import("b", 1.0, "a")] for seconds in (9.0, 1.0, 2.0)]
    assert medians(runs) == [Import("a", 2.0, ""), Import("b", 1.0, "a")]
