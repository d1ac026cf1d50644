"""What a compilation cache holds: a tree as AWS's documentation shows it, a torch-xla folder, addresses."""

from __future__ import annotations

import os
import uuid

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from omegaconf import OmegaConf

from nxdt_nemo.audit.compile.cache import STALE, contents, counted
from nxdt_nemo.audit.compile.short_run import Counts, overrides, ranks, read_counts
from nxdt_nemo.config.view import View
from nxdt_nemo.errors import UserError

NOW = 1_000_000.0
COMPILER = "neuronxcc-2.24.8799.0+6f62ff7c"
FILES = [  # module, file, bytes, seconds ago
    ("MODULE_1+aa", "model.hlo_module.pb", 100, 50),
    ("MODULE_1+aa", "model.neff", 5000, 40),
    ("MODULE_1+aa", "model.done", 0, 40),
    ("MODULE_2+aa", "model.hlo_module.pb", 200, 50),
    ("MODULE_3+aa", "model.hlo_module.pb", 300, 50),
    ("MODULE_3+aa", "model.log", 10, 40),
    ("MODULE_4+aa", "model.hlo_module.pb", 400, 50),
    ("MODULE_4+aa", "model.hlo_module.pb.lock", 0, STALE - 1),
    ("MODULE_5+aa", "model.hlo_module.pb", 500, STALE + 1),
    ("MODULE_5+aa", "model.hlo_module.pb.lock", 0, STALE + 1),
    ("MODULE_6+aa", "model.neff", 600, STALE + 1),
    ("MODULE_6+aa", "model.done", 0, STALE + 1),
    ("MODULE_6+aa", "model.hlo_module.pb.lock", 0, STALE + 1),
    ("MODULE_7+aa", "model.neff", 700, 50),  # half of it, maybe
    ("MODULE_7+aa", "model.hlo_module.pb.lock", 0, 50),
]
STATES = {
    "MODULE_1+aa": ("compiled", 5100),
    "MODULE_2+aa": ("waiting", 200),
    "MODULE_3+aa": ("failed", 310),
    "MODULE_4+aa": ("locked", 400),
    "MODULE_5+aa": ("stale lock", 500),
    "MODULE_6+aa": ("compiled", 600),
    "MODULE_7+aa": ("locked", 700),
}
LOCKS = {4: "locked", 5: "stale lock", 6: "stale lock", 7: "locked"}


@pytest.fixture
def cache(tmp_path):
    for module, name, size, ago in FILES:
        file = tmp_path / COMPILER / module / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * size)
        os.utime(file, (NOW - ago, NOW - ago))
    return tmp_path


def test_graphs_of_neurons_cache(cache):
    graphs = contents(str(cache), now=NOW)
    assert {graph.name: (graph.state, graph.size) for graph in graphs} == STATES
    assert {graph.compiler for graph in graphs} == {COMPILER}
    assert [graph.size for graph in graphs] == sorted((graph.size for graph in graphs), reverse=True)
    assert {int(graph.name[7]): graph.lock for graph in graphs if graph.lock} == LOCKS
    assert counted(graphs) == {"compiled": 2, "stale lock": 1, "locked": 2, "failed": 1, "waiting": 1}
    assert next(graph.age for graph in graphs if graph.name == "MODULE_1+aa") == pytest.approx(40)


def test_graphs_of_torch_xlas_cache(tmp_path):
    (tmp_path / "22692164912866772831153804918225738918").write_bytes(b"x" * 7)
    (tmp_path / "README").touch()
    (graph,) = contents(str(tmp_path))
    assert (graph.compiler, graph.state, graph.size) == ("torch-xla", "compiled", 7)


def test_an_address_of_fsspecs():
    root = f"memory://cache-{uuid.uuid4()}"
    with fsspec.open(f"{root}/{COMPILER}/MODULE_9+aa/model.neff", "wb") as file:
        file.write(b"abc")
    (graph,) = contents(root)
    assert (graph.name, graph.state, graph.size) == ("MODULE_9+aa", "compiled", 3)


@pytest.mark.parametrize(
    "url, line",
    [
        ("/no/such/cache", "/no/such/cache: there is no cache; name one, or compile first"),
        ("nothing://x", "nothing://x: Protocol not known: nothing"),
    ],
)
def test_what_is_not_there(url, line):
    with pytest.raises(UserError) as caught:
        contents(url)
    assert str(caught.value) == line


@pytest.mark.parametrize("unreadable", ["", COMPILER, f"{COMPILER}/MODULE_2+aa"])
def test_a_folder_that_cannot_be_read(monkeypatch, cache, unreadable):
    """Its graphs are not passed over. Patched: a test that root runs may read everything."""
    listed = LocalFileSystem.ls

    def ls(self, path, **more):
        if str(path) == str(cache / unreadable):
            raise PermissionError(13, "Permission denied", path)
        return listed(self, path, **more)

    monkeypatch.setattr(LocalFileSystem, "ls", ls)
    with pytest.raises(UserError) as caught:
        contents(str(cache))
    assert str(caught.value) == f"{cache / unreadable}: cannot be read: Permission denied"


def test_a_graph_that_goes_while_the_list_is_made(monkeypatch, cache):
    listed = LocalFileSystem.ls

    def ls(self, path, **more):
        if str(path).endswith("MODULE_2+aa"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return listed(self, path, **more)

    monkeypatch.setattr(LocalFileSystem, "ls", ls)
    assert {graph.name for graph in contents(str(cache))} == STATES.keys() - {"MODULE_2+aa"}


class Locked(fsspec.AbstractFileSystem):
    """A store that wants credentials, as botocore says it: no OSError."""

    protocol = "locked"

    def isdir(self, path):
        raise RuntimeError("Unable to locate credentials")


def test_a_store_without_credentials():
    fsspec.register_implementation("locked", Locked)
    with pytest.raises(UserError, match=r"locked://bucket/cache: Unable to locate credentials"):
        contents("locked://bucket/cache")


@pytest.mark.parametrize("limit, batches", [(1.0, 2), (50, 2), (1, 1), (0, 0), (0.0, 0)])
def test_the_short_run_leaves_nothing_behind(tmp_path, limit, batches):
    view = View(OmegaConf.create({"trainer": {"limit_val_batches": limit}}))
    words = dict(word.removeprefix("++").split("=") for word in overrides(view, tmp_path))
    assert words["trainer.limit_val_batches"] == str(batches)
    assert words["exp_manager.create_checkpoint_callback"] == "false"
    assert words["exp_manager.explicit_log_dir"] == str(tmp_path)
    assert {words[name] for name in words if name.endswith("_logger")} == {"false"}
    assert int(words["trainer.val_check_interval"]) < int(words["trainer.max_steps"]) <= 10


@pytest.mark.parametrize("asked, logs", [(None, 3), (10, 3), (2, 2), (1, 1)])
def test_the_short_run_has_logged_steps_and_others(tmp_path, asked, logs):
    """The first two, those after a validation, and more; a job whose every step is logged has no others."""
    said = overrides(View(OmegaConf.create({"trainer": {"log_every_n_steps": asked}})), tmp_path)
    found = dict(word.removeprefix("++trainer.").split("=") for word in said if word.startswith("++trainer."))
    steps, every, interval = (int(found[key]) for key in ("max_steps", "log_every_n_steps", "val_check_interval"))
    validated = [step + 1 for step in range(interval, steps, interval)]
    plain = [step for step in range(3, steps + 1) if step not in validated]
    assert every == logs and (logs > 2) == (2 % every != 0)
    assert {step % every == 0 for step in validated} == {step % every == 0 for step in plain} == {True, logs == 1}


def test_a_list_of_devices_is_as_many_ranks():
    assert ranks(View(OmegaConf.create({"trainer": {"devices": [0, 1]}}))) == 2


def test_counts_of_all_ranks(tmp_path):
    (tmp_path / "rank-0.json").write_text('{"graphs": 3, "missed": 1, "unreadable": 2}')
    (tmp_path / "rank-1.json").write_text('{"graphs": 3, "missed": 0, "unreadable": 3}')
    assert read_counts(tmp_path) == Counts(6, 1, 5)
