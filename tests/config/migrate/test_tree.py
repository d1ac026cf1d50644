"""A YAML file as keys that keep their text."""

from __future__ import annotations

import pytest

from nxdt_nemo.config.migrate.tree import Document, text_of
from nxdt_nemo.errors import ConfigError

TRICKY = """# head
name : &name run  # a
other: *name   # b

trainer:   # c
  devices: 1
  list:    # d
    - 1   # one
    # between
    - {a: 1}

    # at the end of trainer
aliased:
  - - b: &b 1
    - *b
  - c: *b
flow: [1,
  2]   # e
braces: {a: 1, b: {c: [1, 2], "d": *name},  # of b
  # about e
  e: "x, y", f}   # g
    # deeper
below:  # h
  {a: &a {b: 1}}
text: |
  line

  another
empty:
quoted: 'a: b # c'
tilde: ~
bool: yes
deep:
    four:
        eight: 1e-5
# tail

"""


@pytest.mark.parametrize("text", [TRICKY, "a: 1", "", "\n\n", "# only\n", "a:\n  b:\n", "a:\n- 1\n- 2\nb: 3\n"])
def test_what_is_read_is_written(text):
    assert Document(text).render() == text


def test_values_and_paths():
    document = Document(TRICKY)
    leaves = {node.path: node.data for node in document.nodes() if not node.is_section}
    assert leaves["deep.four.eight"] == 1e-5  # as hydra reads it, unlike YAML 1.1
    assert leaves["trainer.list"] == [1, {"a": 1}]
    assert leaves["other"] == leaves["braces.b.d"] == "run"
    assert (leaves["braces.b.c"], leaves["braces.e"], leaves["braces.f"]) == ([1, 2], "x, y", None)
    assert leaves["below.a.b"] == 1
    assert leaves["empty"] is None
    assert leaves["bool"] == "yes" or leaves["bool"] is True


def test_a_value_changes_and_its_comment_stays():
    document = Document("a:\n  b: [1,\n     2]\n  c: 3  # why\n  d:  # what\n    - 1\n    - 2\ne: 5\n")
    for path, value in (("a.b", 7), ("a.c", None), ("a.d", [3, "x"]), ("e", True)):
        document.set(path, value)
    assert document.render() == "a:\n  b: 7\n  c: null  # why\n  d: [3, x]  # what\ne: True\n"


def test_a_key_moves_with_its_comments_and_indentation():
    document = Document("a:\n    # about b\n    b: |\n      text\n    c: 1\nd:\n  e: 2\n  f:\n    g: 3\n")
    document.move(document.find("a.b"), "d.renamed")
    document.prune()
    assert document.render() == "a:\n    c: 1\nd:\n  e: 2\n  # about b\n  renamed: |\n    text\n  f:\n    g: 3\n"


def test_braces_are_opened_where_something_changes():
    document = Document(TRICKY)
    for path, value in (("braces.e", 5), ("below.a.c", 2), ("braces.b.x.y", 0)):
        document.set(path, value)
    document.move(document.find("braces.f"), "empty.f")
    text = document.render()
    b = '  b:  # of b\n    c: [1, 2]\n    "d": *name\n    x:\n      y: 0\n'
    assert f"braces:   # g\n  a: 1\n{b}  # about e\n  e: 5\n    # deeper\n" in text
    assert "below:\n  # h\n  a: &a\n    b: 1\n    c: 2\n" in text
    assert "empty:\n  f:\n" in text
    assert Document(text).get("braces.b.x.y") == 0
    assert Document(text).get("other") == "run"


def test_a_value_is_not_lost_to_a_section():
    document = Document("a: 1\nb: &b {c: 1}\nd: *b\n", "x.yaml")
    with pytest.raises(ConfigError, match=r"x.yaml: line 3: d=\*b is no section of keys and values, and d.e has to be"):
        document.set("d.e.f", 1)


def test_a_section_moves_as_a_whole_and_an_emptied_one_goes():
    document = Document("a:\n  b:  # section\n    c: 1\n    # last\nd: 2\n")
    document.move(document.find("a.b"), "x.y.z")
    document.prune()
    assert document.render() == "d: 2\n\nx:\n  y:\n    z:  # section\n      c: 1\n      # last\n"


def test_a_heading_stays_and_a_comment_of_its_own_goes():
    document = Document("# Group\na: 1\nb: 2\n# of c\nc: 3\n# of d\nd: 4\n")
    document.remove(document.find("a"))
    document.remove(document.find("c"))
    assert document.render() == "# Group\nb: 2\n# of d\nd: 4\n"


@pytest.mark.parametrize(
    "text, reason",
    [
        ("- 1\n- 2\n", "its top is not keys and values"),
        ("just text\n", "its top is not keys and values"),
        ("{a: 1}\n", "written in braces"),
        ("a: [1\n", "not readable as YAML"),
        ("a: ${\n", "not readable as YAML"),
        ("a: 1\na: 2\n", "not readable as YAML"),
        ("? [x]\n: 1\n", "YAML"),
        ("a: 1\n? key\n: 2\n", "line 2: the colon is not behind its key"),
    ],
)
def test_what_is_no_configuration_is_one_line(text, reason):
    with pytest.raises(ConfigError) as caught:
        Document(text, "x.yaml")
    assert str(caught.value).startswith("x.yaml: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "null"),
        (True, "True"),
        (1e-5, "1e-05"),
        ("a b", "a b"),
        ("1", "'1'"),
        ("", "''"),
        ([1, None, "x"], "[1, null, x]"),
        (["a, b", {"c": None}], "['a, b', {c: null}]"),
    ],
)
def test_values_as_nemo_writes_them(value, text):
    assert text_of(value) == text
