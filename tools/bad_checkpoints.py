"""Every bad input of tests/checkpoint through `nxdt-nemo ckpt convert`, a process each: exit code, lines, what is left.

    python tools/bad_checkpoints.py               # 130 processes, 1 minute; writes docs/results/bad_checkpoints.md
    python tools/bad_checkpoints.py --print-only

Damage and what the line has to say are the tests' own (test_bad_input.py, test_bad_ranks.py). For each process: that it
ended with exit code 2, that it printed one line and no traceback, that nothing is at the target, and whether a file was
made that a call hidden in a checkpoint would have made. Exit code 1 when a row is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nxdt_nemo.checkpoint.convert import convert
from nxdt_nemo.checkpoint.formats.base import Target
from tests.checkpoint import test_bad_input, test_bad_ranks
from tests.checkpoint.conftest import kill_half_way, slow_writes, unpack_into

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "results" / "bad_checkpoints.md"
NAMES = {
    "ll_torch_tp2pp2_do": "torch",
    "ll_td_tp2pp2": "torch_dist",
    "zarr_tp1": "zarr",
    "hf_llama_tiny": "hf",
    "archive": "nemo, archive",
    "folder": "nemo, folder",
    "dist": "nemo_dist",
    "xser": "nxdt, xser",
    "copies": "nxdt, copies of heads",
    "nnm": "nnm, xser",
}
FULL = """
import errno, os, sys
def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")
os.pwrite = full
from nxdt_nemo.cli.main import main
main(["ckpt", "convert", sys.argv[1], sys.argv[2], "--to", "torch"])
"""
SLOW = f"""{slow_writes(0.1)}
import sys
from nxdt_nemo.cli.main import main
main(["ckpt", "convert", *sys.argv[1:]])
"""


@dataclass
class Row:
    """One bad input and what came of it."""

    what: str
    format: str
    code: int
    line: str
    wrong: str  # "" if all is as it must be


@dataclass
class Case:
    """A checkpoint to make bad, and how it is converted."""

    what: str
    kind: str
    good: Path
    damage: Callable[[Path], object]
    says: str
    arguments: list[str]


class Work:
    """A temporary folder with the good checkpoints, and what was executed."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.executed = 0
        self._good: dict[str, Path] = {}

    def good(self, name: str) -> Path:
        """A checkpoint that is as it should be."""
        if name in self._good:
            return self._good[name]
        if name in test_bad_ranks.MADE:
            to, layout, extra = test_bad_ranks.MADE[name]
            path = self.place / (f"{name}.nemo" if name == "archive" else name)
            convert(self.good("hf_llama_tiny"), path, to, wanted=Target(layout, extra=extra))
        else:
            path = unpack_into(self.place, name)
        self._good[name] = path
        return path

    def cases(self) -> Iterator[Case]:
        """All of both tests."""
        config = self.place / "config.json"
        said = json.loads((self.good("hf_llama_tiny") / "config.json").read_text())
        config.write_text(json.dumps(said | {"vocab_size": 1024}))
        for what, fixture, damage, says in test_bad_input.CASES:
            arguments = ["--to", "torch_dist"]
            arguments += ["--with-optimizer"] if NAMES[fixture] in ("torch", "torch_dist") else []
            arguments += ["--model-config", str(config)] if NAMES[fixture] == "zarr" else []
            yield Case(what, NAMES[fixture], self.good(fixture), damage, says, arguments)
        for what, kind, damage, says in test_bad_ranks.CASES:
            yield Case(what, NAMES.get(kind, kind), self.good(kind), damage, says, ["--to", "hf"])

    def run(self, case: Case, number: int) -> Row:
        """Damage a copy and convert it, in a folder of its own."""
        here = self.place / f"case{number}"
        here.mkdir()
        bad = here / ("source" + case.good.suffix)
        if case.good.is_dir():
            shutil.copytree(case.good, bad)
        else:
            shutil.copy(case.good, bad)
        case.damage(bad)
        row = self.converted(case, here, [str(bad), str(here / "out"), *case.arguments])
        shutil.rmtree(here)
        return row

    def converted(self, case: Case, here: Path, arguments: list[str], program: str = "") -> Row:
        """The process, and what it left."""
        start = ["-c", program] if program else ["-m", "nxdt_nemo", "ckpt", "convert"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, *start, *arguments], env=environment, capture_output=True, text=True, cwd=here, check=False
        )
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line]
        ran = [*here.rglob("executed"), *here.rglob("evil")]
        if case.what == "malicious chunk":  # the test's own file, out of which it makes the chunk
            ran = [at for at in ran if at.name == "executed"]
        self.executed += len(ran)
        faults = {
            "exit code": done.returncode != 2,
            "lines": len(lines) != 1,
            "traceback": "Traceback" in done.stderr,
            "the line": not any(case.says in line for line in lines),
            "something at the target": (here / "out").exists(),
            "code was executed": bool(ran),
        }
        line = lines[0] if lines else ""
        for place in sorted({str(here), str(here.resolve())}, key=len, reverse=True):
            line = line.replace(f"{place}/", "")
        return Row(case.what, case.kind, done.returncode, line, ", ".join(name for name, bad in faults.items() if bad))

    def full_disk(self) -> Row:
        """Every write says that there is no space."""
        here = self.place / "full"
        here.mkdir()
        case = Case("the disk is full", "hf to torch", here, lambda _: None, "the disk is full", [])
        return self.converted(case, here, [str(self.good("hf_llama_tiny")), str(here / "out")], FULL)

    def killed(self) -> Row:
        """SIGKILL between two files; then what is there is no checkpoint, and the same command goes on."""
        here = self.place / "killed"
        here.mkdir()
        source, out = self.good("ll_td_tp2pp2"), here / "out"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        wanted = ["--to", "torch_dist", "--tp", "4", "--pp", "2", "--with-optimizer"]
        process = subprocess.Popen([sys.executable, "-c", SLOW, str(source), str(out), *wanted], env=environment)
        code = kill_half_way(process, here / "out.partial")
        case = Case("killed half-way, and what is left is read", "torch_dist", here, lambda _: None, "", [])
        row = self.converted(case, here, [str(here / "out.partial"), str(here / "x"), "--to", "hf"])
        command = [sys.executable, "-m", "nxdt_nemo", "ckpt", "convert", str(source), str(out), *wanted]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if code != -signal.SIGKILL or done.returncode or "files from an earlier run" not in done.stdout:
            row.wrong = f"{row.wrong} it does not go on: {done.stdout}{done.stderr}"
        return row


def control(place: Path) -> bool:
    """True if python's own unpickler does run what the malicious files hold."""
    mark = place / "control"
    pickle.loads(pickle.dumps(test_bad_input.Call(os.system, f"touch {mark}")))
    return mark.exists()


def page(rows: list[Row], executed: int, seconds: float) -> str:
    """The page of results."""
    good = sum(not row.wrong for row in rows)
    malicious = sum("could run code" in row.line for row in rows)
    lines = [
        "# Bad checkpoints",
        "",
        f"`python tools/bad_checkpoints.py`, {date.today()}, Python {platform.python_version()}, {seconds:.0f} s.",
        "",
        f"{len(rows)} bad inputs, each converted by `nxdt-nemo ckpt convert` in a process of its own: {good} end with",
        "exit code 2, one line that names the file, no traceback, and nothing at the target.",
        f"{malicious} hold a call that python's own unpickler runs (the control); of these **{executed} ran**.",
        "",
        "| | What | Format | Exit code | The line |",
        "|---|---|---|---|---|",
    ]
    for number, row in enumerate(rows, 1):
        said = row.line.replace("|", "\\|") + (f" **WRONG: {row.wrong}**" if row.wrong else "")
        lines.append(f"| {number} | {row.what} | {row.format} | {row.code} | {said} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--print-only", action="store_true")
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        work = Work(Path(place))
        if not control(Path(place)):
            raise SystemExit("the control was not executed")
        rows = [work.run(case, number) for number, case in enumerate(work.cases())]
        rows += [work.full_disk(), work.killed()]
    text = page(rows, work.executed, time.monotonic() - started)
    if given.print_only:
        print(text)
    else:
        RESULT.write_text(text)
    wrong = [row for row in rows if row.wrong]
    print(f"{len(rows)} bad inputs, {len(wrong)} not as they must be, {work.executed} executed")
    for row in wrong:
        print(f"{row.format}: {row.what}: {row.wrong}: {row.line}")
    if wrong or work.executed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
