"""Pickles are data: what is not on the list is refused by name, and nothing of it happens."""

from __future__ import annotations

import argparse
import collections
import enum
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nxdt_nemo.checkpoint.io import unpickle
from nxdt_nemo.checkpoint.io.pickling import dumps
from nxdt_nemo.checkpoint.io.unpickle import load, plain
from nxdt_nemo.errors import UserError


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


CALLS = {
    "os.system": lambda mark: Call(os.system, f"touch {mark}"),
    "subprocess.run": lambda mark: Call(subprocess.run, ["touch", mark]),
    "builtins.eval": lambda mark: Call(eval, f"open({mark!r}, 'w')"),
    "builtins.exec": lambda mark: Call(exec, f"open({mark!r}, 'w')"),
    "io.open": lambda mark: Call(open, mark, "w"),
    "builtins.__import__": lambda mark: Call(__import__, "this"),
    "in a dict": lambda mark: {"model": {"weight": Call(os.system, f"touch {mark}")}},
    "as a state": lambda mark: Call(collections.OrderedDict, [("a", Call(os.system, f"touch {mark}"))]),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_calls_are_refused_and_nothing_runs(name: str, protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    with pytest.raises(UserError) as caught:
        load(pickle.dumps(CALLS[name](str(mark)), protocol), "evil.pt")
    assert not mark.exists()
    assert caught.value.place == "evil.pt" and "\n" not in str(caught.value)
    # the control: python's own unpickler does run it
    if name in ("os.system", "in a dict"):
        pickle.loads(pickle.dumps(CALLS[name](str(mark)), protocol))
        assert mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cnxdt_nemo.cli.main\nmain\n(tR.",
        b"ctorch.hub\nload\n(S'x'\ntR.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"ctorch.distributed.checkpoint\nload\n(tR.",
        b"cbuiltins\ngetattr\n(I1\nS'real'\ntR.",
    ],
)
def test_names_outside_of_the_list(text: bytes) -> None:
    with pytest.raises(UserError, match=r"which could run code|getattr of what is no enum"):
        load(text, "x.pt")


def test_nothing_is_imported_on_a_files_word(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    before = set(sys.modules)
    found = load(b"cmegatron.core.rerun_state_machine\nRerunMode\n(S'disabled'\ntR.", "x.pt")
    assert repr(found) == "RerunMode('disabled')"
    assert not [name for name in set(sys.modules) - before if name.startswith("megatron")]


class Kind(enum.Enum):
    A = 1


def test_what_megatron_writes_is_read() -> None:
    value = {
        "args": argparse.Namespace(a=1, b=[2.0], c=None),
        "state": collections.OrderedDict(x=(1, 2)),
        "array": np.arange(6, dtype=np.uint32).reshape(2, 3),
        "number": np.float64(2.5),
        "set": {1, 2},
        "bytes": b"\x00\xff",
        "path": Path("/a/b"),
    }
    found = load(pickle.dumps(value, 2), "x.pt")
    assert vars(found["args"]) == {"a": 1, "b": [2.0], "c": None}
    assert found["state"] == value["state"] and found["set"] == {1, 2} and found["bytes"] == b"\x00\xff"
    assert plain(found["array"]) == [[0, 1, 2], [3, 4, 5]]
    assert found["number"] == 2.5 and found["path"] == "/a/b"


def test_an_inert_object_is_written_back_as_what_it_was() -> None:
    text = b"cmegatron.core.enums\nModelType\n(I1\ntR."
    written, tensors = dumps({"type": load(text, "x.pt")})
    assert tensors == []
    assert b"megatron.core.enums\nModelType" in written
    assert repr(load(written, "x.pt")["type"]) == "ModelType(1)"


@pytest.mark.parametrize("text", [b"", b"\x80\x02", b"garbage", b"(" * 100, b"(lp0\n" + b"(lp0\n" * 5000])
def test_damage_is_one_line(text: bytes) -> None:
    with pytest.raises(UserError) as caught:
        load(text, "x.pt")
    assert "\n" not in str(caught.value)


def test_a_storage_cannot_be_left(tmp_path: Path) -> None:
    from nxdt_nemo.checkpoint.dtypes import FLOAT32
    from nxdt_nemo.checkpoint.io.files import Extent, Mapped

    (tmp_path / "data").write_bytes(bytes(64))
    base = unpickle.StorageRef(Extent(Mapped(tmp_path / "data"), "0", FLOAT32, (16,), 0))
    rebuild = unpickle._KNOWN["torch._utils._rebuild_tensor_v2"]
    assert rebuild(base, 0, (4, 4), (4, 1)).shape == (4, 4)
    for offset, size, stride in [
        (1, (4, 4), (4, 1)),
        (0, (17,), (1,)),
        (-1, (4,), (1,)),
        (0, (4,), (-1,)),
        (0, (2,), (16,)),
    ]:
        with pytest.raises(UserError):
            rebuild(base, offset, size, stride)
