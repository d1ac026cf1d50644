"""Rows of token ids as samples: their order, where a run stands in it, labels as transformers means them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nxdt_nemo.errors import UserError

datasets = pytest.importorskip("datasets", reason="needs the extra: pip install nxdt-nemo[nemo]")
arrow = pytest.importorskip("nxdt_nemo.data.arrow")

SEQ, VOCAB = 6, 50
IDS = [[n, n + 1, n + 2, n + 3, n + 4, n + 5][: 6 - n % 3] for n in range(7)]
Saved = Callable[..., Path]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """saved(input_ids=...): a folder as Dataset.save_to_disk writes it."""

    def to(name: str = "tokens", **columns: list[object]) -> Path:
        datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / name))
        return tmp_path / name

    return to


def test_each_epoch_has_every_row_once_in_an_order_of_its_own(saved: Saved) -> None:
    rows = arrow.TokenRows(saved(input_ids=IDS), SEQ, VOCAB, samples=21, seed=3)
    epochs = [[rows.row_of(sample) for sample in range(start, start + 7)] for start in (0, 7, 14)]
    assert len(rows) == 21
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = pickle.loads(pickle.dumps(arrow.TokenRows(rows.folder, SEQ, VOCAB, samples=21, seed=3)))
    assert [again.row_of(sample) for sample in reversed(range(21))] == [row for epoch in epochs for row in epoch][::-1]
    other = arrow.TokenRows(rows.folder, SEQ, VOCAB, samples=21, seed=4)
    assert [other.row_of(sample) for sample in range(7)] != epochs[0]
    plain = arrow.TokenRows(rows.folder, SEQ, VOCAB, samples=9)
    assert [plain.row_of(sample) for sample in range(9)] == [*range(7), 0, 1]
    assert len(arrow.TokenRows(rows.folder, SEQ, VOCAB)) == 7


def test_a_label_is_the_token_after(saved: Saved) -> None:
    sample = arrow.TokenRows(saved(input_ids=IDS), SEQ, VOCAB)[1]  # five tokens
    assert sample["tokens"].tolist() == [1, 2, 3, 4, 5, 0]
    assert sample["labels"].tolist() == [2, 3, 4, 5, 0, 0]
    assert sample["loss_mask"].tolist() == [1, 1, 1, 1, 0, 0]
    assert sample["position_ids"].tolist() == [0, 1, 2, 3, 4, 5]


def test_labels_and_masks_of_the_folder(saved: Saved) -> None:
    """Labels decide where there are some, as in transformers; else the mask does."""
    ids, hidden = [[1, 2, 3, 4]], [[1, 1, 1, 0]]
    by_mask = arrow.TokenRows(saved(input_ids=ids, attention_mask=hidden), SEQ, VOCAB)[0]
    assert by_mask["loss_mask"].tolist() == [1, 1, 0, 0, 0, 0]
    labels = [[-100, -100, 3, 9]]
    by_labels = arrow.TokenRows(saved("both", input_ids=ids, attention_mask=hidden, labels=labels), SEQ, VOCAB)[0]
    assert by_labels["loss_mask"].tolist() == [0, 1, 1, 0, 0, 0]
    assert by_labels["labels"].tolist() == [0, 3, 9, 0, 0, 0]


BAD = [  # columns, the row and what is said of it
    ({"input_ids": [[1], list(range(9))]}, "row 1 has 9 tokens, more than 6"),
    ({"input_ids": [[1, VOCAB]]}, "row 0 has token 50, the model has 50"),
    ({"input_ids": [[1, -1]]}, "row 0 has token -1"),
    ({"input_ids": [[1, 2]], "attention_mask": [[0, 1]]}, "row 0: attention_mask hides tokens before others"),
    ({"input_ids": [[1, 2]], "labels": [[1, VOCAB]]}, "row 0 has token 50"),
    ({"input_ids": [[1, 2]], "labels": [[1, -1]]}, "row 0 has token -1"),
    ({"input_ids": [[1, 2]], "labels": [[1, 2, 3]]}, "row 0 has 2 input_ids and 3 labels"),
    ({"input_ids": [1, 2]}, "input_ids of a row is no list"),
    ({"text": ["a"]}, "has no column input_ids, but text"),
]


@pytest.mark.parametrize("columns, said", BAD, ids=[said[:24] for _, said in BAD])
def test_a_bad_row_is_named(saved: Saved, columns: dict[str, list[object]], said: str) -> None:
    folder = saved(**columns)
    with pytest.raises(UserError, match=said) as found:
        np.asarray(arrow.TokenRows(folder, SEQ, VOCAB)[0]["tokens"])
    assert found.value.place == str(folder)
    assert found.value.fix


def test_a_folder_of_another_kind_is_refused(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        arrow.TokenRows(tmp_path / "none", SEQ, VOCAB)
    with pytest.raises(UserError, match="is not what Dataset"):
        arrow.TokenRows(tmp_path, SEQ, VOCAB)
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"input_ids": IDS})})
    splits.save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(UserError, match="holds several splits") as found:
        arrow.TokenRows(tmp_path / "splits", SEQ, VOCAB)
    assert str(tmp_path / "splits" / "train") in found.value.fix
