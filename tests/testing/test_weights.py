"""Cutting and merging are inverse, and do what Megatron's layers expect."""

from __future__ import annotations

import pytest

from nxdt_nemo.testing.weights import Piece, Ranks, global_names, load, merge, share

torch = pytest.importorskip("torch")


def pieces(whole, dim, gated, size):
    return [[("w", Piece(share(whole, dim, gated, size, rank), dim, gated, rank, size))] for rank in range(size)]


@pytest.mark.parametrize(("dim", "gated"), [(0, False), (1, False), (None, False), (0, True)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_merge_undoes_share(dim, gated, size):
    whole = torch.arange(64.0).reshape(8, 8)
    merged, spread = merge(pieces(whole, dim, gated, size))
    assert torch.equal(merged["w"], whole)
    assert spread == 0.0


def test_a_gated_share_takes_from_both_halves():
    rows = torch.arange(8.0).reshape(8, 1)
    assert share(rows, 0, True, 2, 1).flatten().tolist() == [2, 3, 6, 7]
    assert share(rows, 0, False, 2, 1).flatten().tolist() == [4, 5, 6, 7]


def test_a_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="do not divide dimension 0"):
        share(torch.zeros(6, 2), 0, True, 2, 0)


def held(rank, run, value=0.0):
    """What a rank has of w, rows run[0] .. run[1] of 0, 1, 2, ..."""
    return [("w", Piece(torch.arange(*map(float, run)) + value, 0, False, rank, 4, run))]


def test_runs_of_rows_are_put_together_once():
    whole, spread = merge([held(0, (0, 3)), held(1, (3, 5)), held(2, (0, 3)), held(3, (5, 9))])
    assert whole["w"].tolist() == list(range(9))
    assert spread == 0.0
    assert merge([held(0, (0, 3)), held(1, (0, 3), 0.2), held(2, (3, 4))])[1] == pytest.approx(0.1)


@pytest.mark.parametrize("second", [(4, 6), (2, 6)])
def test_runs_that_leave_a_gap_or_overlap_are_refused(second):
    with pytest.raises(ValueError, match="do not follow each other"):
        merge([held(0, (0, 3)), held(1, second)])


def test_copies_that_drift_apart_are_measured():
    ranks = [[("n", Piece(torch.tensor([1.0, 2.0 + 0.2 * rank]), None, False, rank, 2))] for rank in range(2)]
    merged, spread = merge(ranks)
    assert spread == pytest.approx(0.1)
    assert merged["n"].tolist() == [1.0, 2.0]


class Stage(torch.nn.Module):
    """A pipeline's last stage: layers 3 and 4 of 4, and a tied output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2, bias=False) for _ in range(2))
        for number, layer in enumerate(self.decoder.layers):
            layer.layer_number = 3 + number
        self.output_layer = torch.nn.Linear(2, 4, bias=False)


WHOLE = {f"decoder.layers.{i}.weight": torch.full((2, 2), float(i)) for i in range(4)}
TIED = {**WHOLE, "embedding.word_embeddings.weight": torch.full((4, 2), 9.0)}


def test_a_later_stage_gets_its_own_layers_and_the_tied_embedding():
    stage = Stage()
    load(stage, TIED, False, Ranks())
    assert [name for name, _ in global_names(stage, TIED)] == [
        "decoder.layers.2.weight",
        "decoder.layers.3.weight",
        "embedding.word_embeddings.weight",
    ]
    assert [layer.weight[0, 0].item() for layer in stage.decoder.layers] == [2.0, 3.0]
    assert stage.output_layer.weight[0, 0].item() == 9.0


def test_an_untied_output_layer_keeps_its_name():
    untied = {**TIED, "output_layer.weight": torch.full((4, 2), 7.0)}
    stage = Stage()
    load(stage, untied, False, Ranks())
    assert stage.output_layer.weight[0, 0].item() == 7.0


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(KeyError, match=r"decoder\.layers\.2\.weight"):
        list(global_names(Stage(), {}))
