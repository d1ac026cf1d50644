"""How a script's data workers start: forked on the cpu lane, though scripts ask for spawn, which imports all again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# As NeMo's scripts begin. A forked worker has what the parent did after its imports; any other imports the script.
SCRIPT = """
import os
os.write(1, b"IMPORTED ")
import torch
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, Dataset, get_worker_info

mp.set_start_method("spawn", force=True)
after_imports = []

class Data(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return index, os.getpid(), len(after_imports), torch.get_num_threads(), get_worker_info().num_workers

if __name__ == "__main__":
    after_imports.append("something that is made once")
    seen = torch.ones(200, 200) @ torch.ones(200, 200)  # torch's threads are up before the fork
    got = [row for batch in DataLoader(Data(), batch_size=2, num_workers=2) for row in zip(*batch)]
    assert sorted(int(row[0]) for row in got) == list(range(8))
    workers = {int(row[1]) for row in got}
    assert len(workers) == 2 and os.getpid() not in workers, workers
    print("METHOD", mp.get_start_method(), "HAS", {int(row[2]) for row in got}, "THREADS", {int(row[3]) for row in got})
"""


def run(folder: Path, *command: str) -> str:
    """What the script says."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, *command, str(script)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "NXDT_NEMO": "", "NXDT_NEMO_RUNTIME": "cpu", "OMP_NUM_THREADS": "2"},
        capture_output=True, text=True, timeout=300, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_workers_are_forked_and_import_nothing(tmp_path: Path) -> None:
    assert run(tmp_path, "-m", "nxdt_nemo", "run") == "IMPORTED METHOD fork HAS {1} THREADS {1}"


@pytest.mark.slow
def test_plain_python_imports_the_script_in_each(tmp_path: Path) -> None:
    """The control of the test above: what spawning looks like."""
    assert run(tmp_path) == 3 * "IMPORTED " + "METHOD spawn HAS {0} THREADS {1}"
