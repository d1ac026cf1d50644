"""A NeMo GPT as a language model of EleutherAI's lm-eval: log-likelihoods and greedy answers, in any layout.

Room nemo/. `lm-eval` is optional and imported by as_lm() alone; Scorer needs nothing of it, and its requests are
anything with `args`. All calls go through NeMo's own model.generate, so every rank of the model has to make them in the
same order. What is asked is cut, and begun, as lm-eval's own HFLM does. Proof: tests/nemo/test_generation.py.

    lm_eval.simple_evaluate(model=as_lm(model), tasks=[...])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from nxdt_nemo.errors import UserError

__all__ = ["Request", "Scorer", "as_lm"]

_SAMPLING = {
    "use_greedy": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "add_BOS": False,
    "all_probs": False,
    "compute_logprob": False,
    "end_strings": ["<|endoftext|>"],
}


class Request(Protocol):
    """lm_eval.api.instance.Instance, as far as it is read here."""

    @property
    def args(self) -> tuple[Any, ...]: ...


class Scorer:
    """The three questions of lm-eval's LM, by lm-eval's names.

    model   a MegatronGPTModel, or one of its kind, in evaluation mode
    batch   texts of one length that are scored at a time
    length  tokens of a window; None takes model.cfg.encoder_seq_length
    add_bos_token   a text's first token is the tokenizer's BOS, as HFLM does for tokenizers that add it themselves
    Ranks that have no part in the first or last pipeline stage get zeros and empty texts.
    """

    def __init__(self, model: Any, batch: int = 8, length: int | None = None, add_bos_token: bool = False) -> None:
        self.model, self.batch, self.add_bos_token = model, batch, add_bos_token
        self.length = int(length or model.cfg.encoder_seq_length)

    @property
    def _on(self) -> torch.device:
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    def tokens_of(self, text: str) -> list[int]:
        """A text's tokens, nothing put behind them, and before them a BOS or nothing."""
        start = [int(self.model.tokenizer.bos_id)] if self.add_bos_token else []
        return start + list(self.model.tokenizer.text_to_ids(text))

    @property
    def prefix(self) -> list[int]:
        """What stands before a text that has nothing before it: BOS, or EOS of a tokenizer that has none."""
        bos = getattr(self.model.tokenizer, "bos_id", None)
        return [int(self.model.tokenizer.eos_id if bos is None or bos < 0 else bos)]

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is what greedy decoding gives), of (context, continuation).

        The two are tokenized together, and cut apart where the context alone ends.
        """
        return self.scores([self._pair(*request.args[:2]) for request in requests])

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not context:
            return self.prefix, self.tokens_of(continuation)
        space = len(context) - len(context.rstrip())
        if space:  # belongs to the word that follows it
            context, continuation = context[:-space], context[-space:] + continuation
        before, both = self.tokens_of(context), self.tokens_of(context + continuation)
        return before or self.prefix, both[len(before) :]

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """Log-probability of whole texts, each token once, with at most `length` tokens before it."""
        texts = [list(self._windows(self.tokens_of(request.args[0]))) for request in requests]
        found = iter(self.scores([window for windows in texts for window in windows]))
        return [sum(next(found)[0] for _ in windows) for windows in texts]

    def _windows(self, tokens: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """(tokens before, tokens to score): the prefix before the first window, before others what has room."""
        for start in range(0, len(tokens), self.length):
            end = min(start + self.length, len(tokens))
            yield (tokens[end - self.length - 1 : start] if start else self.prefix), tokens[start:end]

    def scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """The same of tokens, (before, to score). Raises UserError for more to score than a window has."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        rows = []
        for number, (before, scored) in enumerate(pairs):
            if len(scored) > self.length:
                reason = f"{len(scored)} tokens are to be scored, the model takes {self.length}"
                raise UserError(reason, place="loglikelihood", fix="raise model.encoder_seq_length")
            if scored:
                rows.append((number, [*before, *scored][-self.length - 1 :], len(scored)))
        rows.sort(key=lambda row: (len(row[1]), row[0]))
        for group in self._groups(rows):
            for (number, _, _), score in zip(group, self._score(group), strict=True):
                found[number] = score
        return found

    def _groups(self, rows: list[tuple[int, list[int], int]]) -> Iterator[list[tuple[int, list[int], int]]]:
        """Rows of one length, at most `batch` together: NeMo would go on token by token where lengths differ."""
        group: list[tuple[int, list[int], int]] = []
        for row in rows:
            if group and (len(group) == self.batch or len(group[0][1]) != len(row[1])):
                yield group
                group = []
            group.append(row)
        if group:
            yield group

    def _score(self, group: list[tuple[int, list[int], int]]) -> list[tuple[float, bool]]:
        """The last token of a row needs no forward pass: a full window has one token more than the model has positions.

        Tokens that pad the vocabulary have no part in the probabilities, which upstream counts with them.
        """
        length, vocabulary = len(group[0][1]), int(self.model.tokenizer.vocab_size)
        tokens = torch.tensor([row for _, row, _ in group])
        room = tokens.clone().to(self._on)  # the token that is made takes the last one's place
        lengths = torch.full((len(group),), length - 1, device=self._on)
        sampling = _SAMPLING | {"compute_logprob": True, "all_probs": True}
        said = self.model.generate((room, lengths), {"min_length": 0, "max_length": 1}, sampling)
        if said is None:
            return [(0.0, False)] * len(group)
        made = []
        for row, (_, _, count) in enumerate(group):
            full: Tensor = said["full_logprob"][row].float().cpu()[length - 1 - count : length - 1]
            if full.shape[1] > vocabulary:
                full = full[:, :vocabulary].log_softmax(1)
            right = tokens[row, -count:]
            made.append((full.gather(1, right[:, None]).sum().item(), bool((full.argmax(1) == right).all())))
        return made

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """Greedy answers to (context, {"until": [...], "max_gen_toks": N}), cut before the first end."""
        found = []
        for request in requests:
            context, wanted = request.args[:2]
            most = int(wanted.get("max_gen_toks", 256))
            until = wanted.get("until") or []
            ends = [until] if isinstance(until, str) else list(until)
            tokens = (self.tokens_of(context) or self.prefix)[-max(1, self.length - most) :]
            room = torch.tensor([tokens + self.prefix * most], device=self._on)
            lengths = torch.tensor([len(tokens)], device=self._on)
            sampling = _SAMPLING | {"end_strings": ends or _SAMPLING["end_strings"]}
            said = self.model.generate((room, lengths), {"min_length": 0, "max_length": most}, sampling)
            found.append(self._answer(said, len(tokens), ends) if said is not None else "")
        return found

    def _answer(self, said: Any, start: int, ends: list[str]) -> str:
        tokenizer = self.model.tokenizer
        made = [int(token) for token in said["token_ids"][0][start:]]
        if tokenizer.eos_id in made:
            made = made[: made.index(tokenizer.eos_id)]
        text = str(tokenizer.ids_to_text(made))
        for end in ends:
            text = text.split(end)[0]
        return text


def as_lm(model: Any, batch: int = 8, add_bos_token: bool = False) -> Any:
    """The model as an object of lm-eval's class LM. Raises UserError where lm-eval is not installed."""
    try:
        LM = import_module("lm_eval.api.model").LM
    except ImportError:
        raise UserError("lm-eval is not installed", place="nxdt_nemo.nemo.lm_eval", fix="pip install lm-eval") from None
    return type("NemoLM", (Scorer, LM), {"__init__": _init})(model, batch, add_bos_token=add_bos_token)


def _init(self: Any, *args: Any, **named: Any) -> None:
    super(Scorer, self).__init__()  # LM's
    Scorer.__init__(self, *args, **named)
