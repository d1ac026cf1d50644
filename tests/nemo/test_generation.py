"""Greedy tokens, samples and log-likelihoods of an imported checkpoint against transformers, in three layouts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax

from nxdt_nemo.errors import UserError
from nxdt_nemo.nemo.lm_eval import Scorer, as_lm

from .conftest import Run, hugging_face_llama

SCRIPT = Path(__file__).with_name("generates.py")
LAYOUTS = {
    "one": [],
    "tp2": ["trainer.devices=2", "model.tensor_model_parallel_size=2"],
    "pp2": ["trainer.devices=2", "model.pipeline_model_parallel_size=2"],
}
TEXTS = [["The value of ", "the expression is"], ["An object", " of a class"], ["", "Return"]]
PROMPTS = [[5, 9, 300, 17, 44, 61, 8], [12, 700, 3], [40, 41, 42, 43, 44]]
NEW = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hugging_face_llama(tmp_path_factory.mktemp("base"), seed=4, initializer_range=0.2)


def log_likelihood(model: Any, before: list[int], scored: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        log = log_softmax(model(torch.tensor([before + scored])).logits[0], -1)[len(before) - 1 : -1]
    right = torch.tensor(scored)
    return log.gather(1, right[:, None]).sum().item(), bool((log.argmax(1) == right).all())


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("at", LAYOUTS)
def test_as_transformers(train: Callable[..., Run], base: Path, corpus: Path, tmp_path: Path, at: str) -> None:
    import sentencepiece
    import transformers

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(corpus / "tokenizer.model"))
    model = transformers.LlamaForCausalLM.from_pretrained(base).eval()
    greedy = []
    for prompt in PROMPTS:
        with torch.no_grad():
            made = model.generate(torch.tensor([prompt]), do_sample=False, min_new_tokens=NEW, max_new_tokens=NEW)
        greedy.append(made[0].tolist())
    pairs = [[row[:-4], row[-4:]] for row in greedy] + [[PROMPTS[0][:2], PROMPTS[0][2:]]]
    asked = {"prompts": PROMPTS, "tokens": NEW, "pairs": pairs, "texts": TEXTS}
    (tmp_path / "questions.json").write_text(json.dumps(asked))
    words = [f"++model.restore_from_path={base}", *LAYOUTS[at]]
    run = train(*words, script=SCRIPT, environment={"QUESTIONS": str(tmp_path / "questions.json")})
    assert run.code == 0, run.output[-4000:]
    line = next(line for line in run.output.splitlines() if line.startswith("found: "))
    found = json.loads(line.removeprefix("found: "))
    for name in ("greedy", "top_k 1", "top_p 0", "cold"):
        mine = [row[: len(prompt) + NEW] for row, prompt in zip(found[name], PROMPTS, strict=True)]
        assert mine == greedy, name
    assert found["hot"] != found["greedy"]
    for (before, scored), (score, is_greedy) in zip(pairs, found["scores"], strict=True):
        assert (pytest.approx(score, abs=1e-4), is_greedy) == log_likelihood(model, before, scored)
    assert [is_greedy for _, is_greedy in found["scores"]] == [True, True, True, False]
    eos = pieces.eos_id()
    for (context, rest), (score, _), rolling in zip(TEXTS, found["likely"], found["rolling"], strict=True):
        whole = pieces.encode(context + rest)
        count = len(whole) - len(pieces.encode(context.rstrip()))
        before = whole[: len(whole) - count] or [eos]
        assert score == pytest.approx(log_likelihood(model, before, whole[len(whole) - count :])[0], abs=1e-4)
        assert rolling == pytest.approx(log_likelihood(model, [eos], whole)[0], abs=1e-4)
    with torch.no_grad():
        prompt = pieces.encode(TEXTS[1][0])
        made = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW, eos_token_id=eos)[0]
    assert found["answers"][1] == pieces.decode(made[len(prompt) :].tolist()).split("\n")[0]


class Counting:
    """A model that says of each next token what its number is; and how it was asked."""

    cfg = SimpleNamespace(encoder_seq_length=6)

    class tokenizer:
        eos_id = 0

        @staticmethod
        def text_to_ids(text: str) -> list[int]:
            return [ord(letter) - 96 for letter in text]

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])

    def generate(self, inputs: Any, length: Any, sampling: Any) -> Any:
        rows, lengths = inputs
        assert rows.shape[1] == lengths[0] + 1
        self.asked.append((len(rows), int(lengths[0])))
        full = -torch.arange(30.0).expand(len(rows), int(lengths[0]), 30) / 100
        return {"full_logprob": list(full)}


def test_windows_and_groups() -> None:
    model = Counting()
    scorer = Scorer(model, batch=2)
    requests = [SimpleNamespace(args=args) for args in [("ab", "c"), ("", "ccc"), ("b", "cd"), ("aa", "b")]]
    found = scorer.loglikelihood(requests)
    assert [round(-score * 100) for score, _ in found] == [3, 9, 7, 2]
    assert model.asked == [(2, 3), (1, 3), (1, 4)]
    (rolling,) = scorer.loglikelihood_rolling([SimpleNamespace(args=("abcdefghijklmn",))])
    assert round(-rolling * 100) == sum(range(1, 15))
    with pytest.raises(UserError, match="7 tokens are to be scored, the model takes 6"):
        scorer.scores([([1], [2] * 7)])


def test_it_is_an_lm_where_there_is_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model")
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="lm-eval is not installed"):
        as_lm(Counting())
    modules = {name: ModuleType(name) for name in names}

    class LM:
        def __init__(self) -> None:
            self.theirs = True

    modules["lm_eval.api.model"].LM = LM  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    found = as_lm(Counting(), 3)
    assert isinstance(found, LM) and isinstance(found, Scorer)
    assert found.theirs and found.batch == 3
