"""records.load: what is a record, and the message for each way not to be one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nxdt_nemo.errors import PatchError
from nxdt_nemo.patching.records import LANES, Record, check_versions, load

DIGEST = "sha256:" + "0" * 64
GOOD = {
    "target": "up.module.name",
    "kind": "replace",
    "replacement": "ours.module:name",
    "versions": "up>=1,<2",
    "fingerprint": DIGEST,
    "why": "Because.",
    "remove_when": "Never.",
}


def toml(name: str = "one", **changes: Any) -> str:
    """A record's TOML: GOOD with changes; None leaves a key out."""
    lines = [f"[{name}]"]
    for key, value in (GOOD | changes).items():
        if value is not None:
            text = f'"{value}"' if isinstance(value, str) else str(value).lower()
            lines.append(f"{key} = {text}")
    return "\n".join(lines) + "\n"


def read(folder: Path, text: str, file: str = "up.toml") -> list[Record]:
    (folder / file).write_text(text)
    return load(folder)


def test_a_record_says_what_the_file_says(tmp_path: Path) -> None:
    (record,) = read(tmp_path, toml(versions=["up>=1,<2", "other>=3"], lanes=["cpu"], order=10))
    assert record == Record(
        id="one",
        file="up.toml",
        target="up.module.name",
        kind="replace",
        replacement="ours.module:name",
        versions=("up>=1,<2", "other>=3"),
        fingerprint=DIGEST,
        why="Because.",
        remove_when="Never.",
        lanes=("cpu",),
        order=10,
    )
    assert record.place == "up.toml [one]"


def test_defaults_and_versions_joined_by_and(tmp_path: Path) -> None:
    (record,) = read(tmp_path, toml(versions="up>=1,<2 and other>=3"))
    assert (record.versions, record.lanes, record.order) == (("up>=1,<2", "other>=3"), LANES, None)


def test_files_come_in_the_order_of_their_names_and_views_are_not_records(tmp_path: Path) -> None:
    (tmp_path / "b.toml").write_text(toml("later", target="up.b.x"))
    (tmp_path / "views.toml").write_text("[scope]\nmain = []\n")
    (tmp_path / "notes.md").write_text("no record")
    assert [record.id for record in read(tmp_path, toml("first", target="up.a.x"), "a.toml")] == ["first", "later"]


MISTAKES = [
    ({"fingerprnt": DIGEST}, "up.toml [one]: unknown key fingerprnt; did you mean fingerprint?"),
    ({"zzz": "x"}, "up.toml [one]: unknown key zzz"),
    ({"why": None}, "up.toml [one]: why is missing"),
    ({"remove_when": None}, "up.toml [one]: remove_when is missing"),
    ({"why": " "}, "up.toml [one]: why = ' ' must be a text that says something"),
    ({"target": 3}, "up.toml [one]: target = 3 must be a text that says something"),
    ({"target": "name"}, "up.toml [one]: target = 'name' must be module.path.name"),
    ({"target": "up.module:name"}, "up.toml [one]: target = 'up.module:name' must be module.path.name"),
    ({"kind": "swap"}, "up.toml [one]: kind = 'swap' is not one of replace, wrap, stub, define"),
    ({"replacement": "ours:module:name"}, "up.toml [one]: replacement = 'ours:module:name' must be module.path:name"),
    ({"replacement": None}, "up.toml [one]: replacement = '' must be module.path:name"),
    ({"kind": "stub"}, "up.toml [one]: a stub takes no replacement"),
    ({"fingerprint": None}, "up.toml [one]: fingerprint is missing; nxdt-nemo patches fingerprint up.module.name"),
    ({"fingerprint": "sha256:12"}, "up.toml [one]: fingerprint = 'sha256:12' must be sha256: and 64 hex digits"),
    (
        {"kind": "define"},
        "up.toml [one]: define takes no fingerprint: its target must not exist upstream",
    ),
    (
        {"versions": "up"},
        "up.toml [one]: versions: 'up' must be one distribution with a range, such as 'torch>=2.9'",
    ),
    ({"versions": []}, "up.toml [one]: versions = [] must be a text or a list of texts"),
    ({"lanes": ["gpu"]}, "up.toml [one]: lanes = ['gpu'] must be a list of cpu, xla, neuron"),
    ({"lanes": []}, "up.toml [one]: lanes = [] must be a list of cpu, xla, neuron"),
    ({"order": True}, "up.toml [one]: order = True must be a whole number"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[message[14:50] for _, message in MISTAKES])
def test_a_mistake_names_file_record_and_key(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(PatchError) as raised:
        read(tmp_path, toml(**change))
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        ("[one\n", "up.toml: not valid TOML: "),
        ('why = "x"\n', "up.toml: why stands outside a record"),
        (toml(versions="up >> 1"), "up.toml [one]: versions: 'up >> 1' is not a distribution with a range: "),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: str, beginning: str) -> None:
    with pytest.raises(PatchError) as raised:
        read(tmp_path, text)
    assert str(raised.value).startswith(beginning)


def test_an_id_belongs_to_one_record_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(toml(target="up.a.x"))
    with pytest.raises(PatchError) as raised:
        read(tmp_path, toml(target="up.b.x"), "b.toml")
    assert str(raised.value) == "b.toml [one]: the id is taken by a.toml [one]"


@pytest.mark.parametrize(("first", "second"), [(None, None), (1, None), (None, 1), (1, 1)])
def test_two_records_on_one_target_need_different_orders(tmp_path: Path, first: int | None, second: int | None) -> None:
    with pytest.raises(PatchError) as raised:
        read(tmp_path, toml("one", order=first) + toml("two", order=second))
    assert str(raised.value) == (
        "up.toml [two]: up.module.name is the target of up.toml [one] too; give both a different order"
    )


def test_two_records_on_one_target_are_fine_in_order_or_on_different_lanes(tmp_path: Path) -> None:
    assert len(read(tmp_path, toml("one", order=1) + toml("two", order=2))) == 2
    assert len(read(tmp_path, toml("one", lanes=["cpu"]) + toml("two", lanes=["xla", "neuron"]))) == 2


@pytest.mark.parametrize("names", [("up.module.Outer", "up.module.Outer.run"), ("up.m.Outer.run", "up.m.Outer")])
def test_a_target_inside_another_target_is_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    with pytest.raises(PatchError, match=r"up\.toml \[two\]: .* lie in one another"):
        read(tmp_path, toml("one", target=names[0], order=1) + toml("two", target=names[1], order=2))
    read(tmp_path, toml("one", target=names[0]) + toml("two", target=names[0] + "2"))  # a common beginning is no inside


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ("1.5", None),
        ("1.5.0+cu128", None),
        ("2.0rc1", "up.toml [one]: up 2.0rc1 is installed; the record holds for up>=1,<2.0a0 only"),
        ("0.9", "up.toml [one]: up 0.9 is installed; the record holds for up>=1,<2.0a0 only"),
        (None, "up.toml [one]: up is not installed; the record holds for up>=1,<2.0a0"),
    ],
)
def test_versions_fail_closed(tmp_path: Path, installed: str | None, message: str | None) -> None:
    (record,) = read(tmp_path, toml(versions="up>=1,<2.0a0"))
    if message is None:
        check_versions(record, lambda name: {"up": installed}[name])
        return
    with pytest.raises(PatchError) as raised:
        check_versions(record, lambda name: {"up": installed}[name])
    assert str(raised.value) == message
