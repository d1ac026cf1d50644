"""Folders of token ids that Hugging Face's `datasets` saved, as samples of a causal language model.

Room data/ (leaf). Stands in for NxD Training's hf_data_module.py, which reads rows in the folder's order and begins
again at its first one when a run is resumed. May import torch, numpy, datasets and pyarrow.
Proof: tests/data/test_arrow.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from nxdt_nemo.errors import UserError, one_line

__all__ = ["IGNORED", "TokenRows"]

IGNORED = -100  # transformers' label of a token that has no loss
IDS, LABELS, MASK = "input_ids", "labels", "attention_mask"


class TokenRows(Dataset[dict[str, torch.Tensor]]):
    """Sample i is a row of epoch i // rows: a run's place is the number of samples it has taken, in any layout.

    folder   of Dataset.save_to_disk, with a column input_ids and, where it has them, labels and attention_mask
    length   S: a shorter row is padded at its end, a longer one is an error
    vocab    tokens that the model knows
    samples  how many; None: each row once
    seed     of the rows' order, another one in each epoch; None: the folder's

    A sample, as NeMo's GPT takes it: tokens, labels [S] int64, each label the token after; loss_mask [S] float32;
    position_ids [S] int64. Without labels every token after the first is one, but for those that attention_mask hides.
    Labels of -100, and the last token, which has none after it, count for no loss: the mean over the others is what a
    transformers model says of the row. Raises UserError, with the folder and the row.
    """

    def __init__(
        self, folder: Path | str, length: int, vocab: int, *, samples: int | None = None, seed: int | None = None
    ) -> None:
        self.folder, self.length, self.vocab, self.seed = Path(folder), length, vocab, seed
        self._rows = _opened(self.folder)
        self._check_lengths()
        self._samples = len(self._rows) if samples is None else samples
        self._drawn: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        row = self.row_of(sample)
        found = self._rows[row]
        self._check_columns(row, found)
        ids = self._padded(found[IDS], 0)
        real = self._real(row, found)
        said = self._padded(found[LABELS], IGNORED) if LABELS in found else np.where(real, ids, IGNORED)
        self._check_tokens(row, ids)
        self._check_tokens(row, said[said != IGNORED])
        labels = np.append(said[1:], IGNORED)
        return {
            "tokens": torch.from_numpy(ids),
            "labels": torch.from_numpy(np.where(labels == IGNORED, 0, labels)),
            "loss_mask": torch.from_numpy((labels != IGNORED).astype(np.float32)),
            "position_ids": torch.arange(self.length),
        }

    def row_of(self, sample: int) -> int:
        """The folder's row that a sample is."""
        epoch, place = divmod(sample, len(self._rows))
        return place if self.seed is None else int(self._order(epoch)[place])

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The epoch's rows, kept until another one's are asked for."""
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, np.random.default_rng((self.seed or 0, epoch)).permutation(len(self._rows))
        return self._drawn[1]

    def _padded(self, row: Any, by: int) -> NDArray[np.int64]:
        found = np.full(self.length, by, dtype=np.int64)
        found[: len(row)] = row
        return found

    def _check_columns(self, row: int, found: dict[str, Any]) -> None:
        for name in found:
            if len(found[name]) != len(found[IDS]):
                reason = f"row {row} has {len(found[IDS])} {IDS} and {len(found[name])} {name}"
                raise UserError(reason, place=str(self.folder), fix="give each token one")

    def _check_tokens(self, row: int, said: NDArray[np.int64]) -> None:
        wrong = said[(said < 0) | (said >= self.vocab)]
        if len(wrong):
            reason, fix = f"row {row} has token {wrong[0]}, the model has {self.vocab}", "use the model's own tokenizer"
            raise UserError(reason, place=str(self.folder), fix=fix)

    def _real(self, row: int, found: dict[str, Any]) -> NDArray[np.bool_]:
        """Which positions hold a token: all of the row, or those that its attention_mask shows."""
        shown = np.asarray(found[MASK]) if MASK in found else np.ones(len(found[IDS]), dtype=np.int64)
        count = int(shown.sum())
        if not shown[:count].all():
            fix = "pad rows at their end"
            raise UserError(f"row {row}: {MASK} hides tokens before others", place=str(self.folder), fix=fix)
        return np.arange(self.length) < count

    def _check_lengths(self) -> None:
        import pyarrow.compute as compute

        if len(self._rows) == 0:
            raise UserError("has no rows", place=str(self.folder), fix="save a data set with some")
        lengths = compute.list_value_length(self._rows.data.column(IDS))
        longest = compute.max(lengths).as_py()
        if longest > self.length:
            row = compute.index(lengths, longest).as_py()
            fix = f"cut rows to {self.length}, or raise model.encoder_seq_length"
            raise UserError(f"row {row} has {longest} tokens, more than {self.length}", place=str(self.folder), fix=fix)


def _opened(folder: Path) -> Any:
    """The folder's data set. Raises UserError for anything else."""
    if not folder.is_dir():
        raise UserError("is no folder", place=str(folder), fix="name one that Dataset.save_to_disk wrote")
    if (folder / "dataset_dict.json").is_file():
        raise UserError("holds several splits", place=str(folder), fix=f"name one of them, as {folder / 'train'}")
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except (FileNotFoundError, ValueError, KeyError, OSError) as error:
        reason = f"is not what Dataset.save_to_disk writes: {one_line(error)}"
        raise UserError(reason, place=str(folder), fix="save the data set again") from None
    if IDS not in found.column_names:
        has = ", ".join(found.column_names)
        raise UserError(f"has no column {IDS}, but {has}", place=str(folder), fix="tokenize the text first")
    if not isinstance(found.features[IDS], (datasets.Sequence, datasets.LargeList)):
        raise UserError(f"{IDS} of a row is no list", place=str(folder), fix="save a list of token ids in each row")
    return found.select_columns([name for name in (IDS, LABELS, MASK) if name in found.column_names])
