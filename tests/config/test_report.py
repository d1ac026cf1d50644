"""The report as the person at the terminal reads it."""

from __future__ import annotations

import pytest

from nxdt_nemo.config import Change, Ignored, Report
from nxdt_nemo.config.report import Unknown, or_list

REPORT = Report(
    warnings=["unknown key model.x; nothing reads it"],
    changes=[Change("model.sharp", True, False, "an NCCL feature"), Change("model.path", "a", None, "no NCCL")],
    ignored=[Ignored("model.hysteresis", 3, "no loss scaling")],
)


def test_table():
    assert REPORT.render().splitlines() == [
        "key               value  here     because",
        "model.sharp       True   False    an NCCL feature",
        "model.path        a      null     no NCCL",
        "model.hysteresis  3      ignored  no loss scaling",
    ]


def test_nothing_to_say_is_empty():
    assert Report(warnings=["a"]).render() == ""


def test_long_values_are_cut_and_markup_is_text():
    report = Report(changes=[Change("model.a", "x" * 100, "[red]y", "z [bold]")])
    row = report.render().splitlines()[1]
    assert "x" * 21 + "..." in row
    assert "x" * 22 not in row
    assert "[red]y" in row
    assert "z [bold]" in row


def test_a_narrow_terminal_folds_the_reason_only():
    report = Report(changes=[Change("model.grad_div_ar_fusion", True, False, "word " * 40)])
    lines = report.render(width=100).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[1].startswith("model.grad_div_ar_fusion  True   False  word")


@pytest.mark.parametrize(("rank", "printed"), [("0", True), ("1", False)])
def test_show_prints_on_rank_zero(monkeypatch, capsys, rank, printed):
    monkeypatch.setenv("RANK", rank)
    REPORT.show()
    out, err = capsys.readouterr()
    assert out == ""
    assert ("warning: unknown key model.x" in err) is printed
    assert ("model.sharp" in err) is printed


@pytest.mark.parametrize(
    ("unknown", "line"),
    [
        (Unknown("model.a"), "unknown key model.a; nothing reads it"),
        (Unknown("model.a", "b"), "unknown key model.a; did you mean b?"),
        (Unknown("model.a", "model.b", "NNM"), "unknown key model.a; it is a key of NNM, here model.b"),
        (
            Unknown("a", "neuron.a", "NNM"),
            "unknown key a; it is a key of NNM, here neuron.a, where nxdt-nemo migrate moves it",
        ),
        (Unknown("model.a", "", "NNM"), "unknown key model.a; it is a key of NNM, nothing reads it here"),
    ],
)
def test_an_unknown_key_is_a_line(unknown, line):
    assert str(unknown) == line


def test_or_list():
    assert [or_list([1]), or_list([1, 2]), or_list([1, 2, 4])] == ["1", "1 or 2", "1, 2 or 4"]
