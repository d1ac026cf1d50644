"""Files of {"prompt": ..., "chosen": ..., "rejected": ...}, a JSON object a line, as rows of one length.

Room nemo/. Stands in for NxD Training's model_alignment_data_module.py, which hands tokens and truncation to trl
0.10.1: the same tokens, and the same cuts of pairs that are longer than a row. A row is padded at its end, so that one
graph serves all.
Proof: tests/nemo/test_preference.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from nxdt_nemo.config.tuning_data import PAIR, missing_text, object_of
from nxdt_nemo.errors import ConfigError

__all__ = ["Pair", "PreferenceDataset", "Rows", "cut", "read_pairs", "together"]


Sides = tuple[list[int], list[int]]  # ids of a prompt, and of an answer to it


@dataclass(frozen=True)
class Pair:
    """One line: a prompt, the answer that is preferred, the other one; and where it stands."""

    prompt: str
    chosen: str
    rejected: str
    place: str


@dataclass(frozen=True)
class Rows:
    """How pairs become rows of `length` tokens.

    prompt   tokens that a prompt keeps where prompt and longer answer do not fit
    keep     which end of it
    bos, eos  a token before the prompt, and one behind each answer, unless it stands there already
    """

    length: int
    prompt: int
    keep: Literal["keep_start", "keep_end"] = "keep_start"
    bos: bool = False
    eos: bool = True


def read_pairs(files: Sequence[str]) -> list[Pair]:
    """All lines of all files. Raises ConfigError naming file and line."""
    return [pair for file in files for pair in _of_file(file)]


def _of_file(file: str) -> Iterator[Pair]:
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (
            "is not text in UTF-8" if isinstance(error, UnicodeDecodeError) else f"cannot be read: {error.strerror}"
        )
        raise ConfigError(reason, place=file) from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _of_line(line, f"{file}:{number}")


def _of_line(line: str, place: str) -> Pair:
    example = 'write {"prompt": "...", "chosen": "...", "rejected": "..."}'
    try:
        found = object_of(line)
    except ValueError as error:
        raise ConfigError(str(error), place=place, fix=example) from None
    if wrong := missing_text(found, PAIR):
        raise ConfigError(wrong, place=place, fix=example)
    if empty := [name for name in PAIR[1:] if not found[name]]:
        raise ConfigError(f"{empty[0]!r} is empty", place=place, fix="leave the line out")
    return Pair(found["prompt"], found["chosen"], found["rejected"], place)


def together(prompt: str, answer: str, tokenizer: Any) -> Sides:
    """Ids of a prompt, and of what the answer adds to them: read in one text, since tokens may join across the border.

    As trl does it, a token that the border runs through is in neither.
    """
    alone, both = (list(tokenizer.text_to_ids(text)) for text in (prompt, prompt + answer))
    border = len(alone)
    return both[: border if both[:border] == alone else border - 1], both[border:]


def cut(sides: Sequence[Sides], rows: Rows) -> list[Sides]:
    """Both sides' prompt and answer as they fit: first prompts are cut, then answers from their end; as trl does."""
    longest, found = max(len(answer) for _, answer in sides), []
    for prompt, answer in sides:
        if len(prompt) + longest > rows.length:
            prompt = prompt[: rows.prompt] if rows.keep == "keep_start" else prompt[-rows.prompt :]
        if len(prompt) + longest > rows.length:
            answer = answer[: rows.length - rows.prompt]
        found.append((prompt, answer))
    return found


class PreferenceDataset(Dataset[dict[str, torch.Tensor]]):
    """Pairs as often as training reads them, in one order for each epoch that only `seed` and the epoch decide.

    An item is a pair as two rows, the chosen answer's first; S is `rows.length`:
      tokens, labels, position_ids  [2, S]  int64
      loss_mask                     [2, S]  float32, 1 where the label is an answer's
      text_mask                     [2, S]  float32, 1 where it is the prompt's or an answer's
      reference                     [2]     float32: what the reference model says of the answers, 0 until it is known
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        tokenizer: Any,
        rows: Rows,
        *,
        samples: int = 0,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.pairs, self._tokenizer, self._rows = pairs, tokenizer, rows
        self._samples, self._shuffle, self._seed = samples or len(pairs), shuffle, seed
        self._orders: dict[int, np.ndarray[Any, np.dtype[np.int64]]] = {}
        self.reference = torch.zeros(len(pairs), 2)

    def __len__(self) -> int:
        return self._samples

    @property
    def read(self) -> list[int]:
        """The pairs that are read at all, each once."""
        return sorted({self.pair_at(at) for at in range(min(self._samples, len(self.pairs)))})

    def pair_at(self, at: int) -> int:
        """Which pair stands at a place of the order."""
        epoch, within = divmod(at, len(self.pairs))
        if not self._shuffle:
            return within
        if epoch not in self._orders:
            self._orders = {epoch: np.random.RandomState([self._seed, epoch]).permutation(len(self.pairs))}
        return int(self._orders[epoch][within])

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        number = self.pair_at(int(at))
        return self.rows_of(number) | {"reference": self.reference[number]}

    def rows_of(self, number: int) -> dict[str, torch.Tensor]:
        """A pair's two rows."""
        pair, tokenizer, length = self.pairs[number], self._tokenizer, self._rows.length
        sides = [self._ended(*together(pair.prompt, text, tokenizer)) for text in (pair.chosen, pair.rejected)]
        made = {
            "tokens": torch.full((2, length), int(tokenizer.eos_id)),
            "labels": torch.full((2, length), int(tokenizer.eos_id)),
            "loss_mask": torch.zeros(2, length),
            "text_mask": torch.zeros(2, length),
            "position_ids": torch.arange(length).expand(2, length).contiguous(),
        }
        for side, (prompt, answer) in enumerate(cut(sides, self._rows)):
            ids = torch.tensor(prompt + answer)
            if len(ids) < 2 or not answer:
                raise ConfigError("there is nothing to learn from an answer without tokens", place=pair.place)
            made["tokens"][side, : len(ids) - 1] = ids[:-1]
            made["labels"][side, : len(ids) - 1] = ids[1:]
            made["text_mask"][side, : len(ids) - 1] = 1
            made["loss_mask"][side, max(len(prompt) - 1, 0) : len(ids) - 1] = 1
        return made

    def _ended(self, prompt: list[int], answer: list[int]) -> Sides:
        """With the tokens of `rows.bos` and `rows.eos`; some tokenizers have no first one."""
        bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
        if self._rows.bos and bos is not None and bos >= 0 and prompt[:1] != [bos]:
            prompt = [bos, *prompt]
        if self._rows.eos and answer[-1:] != [eos]:
            answer = [*answer, eos]
        return prompt, answer
