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
    # a vocabulary of 1,024 padded to 1,280
    "tp2": ["trainer.devices=2", "model.tensor_model_parallel_size=2", "++model.make_vocab_size_divisible_by=320"],
    "pp2": ["trainer.devices=2", "model.pipeline_model_parallel_size=2"],
}
TEXTS = [["The value of ", "the expression is"], ["An object", " of a class"], ["", "Return"]]
PROMPTS = [[5, 9, 300, 17, 44, 61, 8], [12, 700, 3], [40, 41, 42, 43, 44]]
NEW, PENALTY = 12, 3.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hugging_face_llama(tmp_path_factory.mktemp("base"), seed=4, initializer_range=0.2)


def log_likelihood(model: Any, before: list[int], scored: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        log = log_softmax(model(torch.tensor([before + scored])).logits[0], -1)[len(before) - 1 : -1]
    right = torch.tensor(scored)
    return log.gather(1, right[:, None]).sum().item(), bool((log.argmax(1) == right).all())


def penalized(model: Any, prompt: list[int]) -> list[int]:
    """The likeliest tokens, where those that are there already count less: as NeMo has it, from the second new one on,
    and not for the prompt's first token."""
    row = list(prompt)
    for made in range(NEW):
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0, -1]
        seen = torch.tensor(row[1:]) if made else torch.tensor([], dtype=torch.long)
        logits[seen] /= PENALTY
        row.append(int(logits.argmax()))
    return row


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
    asked = {"prompts": PROMPTS, "tokens": NEW, "pairs": pairs, "texts": TEXTS, "penalty": PENALTY}
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
    assert found["penalized"][: len(PROMPTS[0]) + NEW] == penalized(model, PROMPTS[0]) != greedy[0]
    for (before, scored), (score, is_greedy) in zip(pairs, found["scores"], strict=True):
        assert (pytest.approx(score, abs=1e-4), is_greedy) == log_likelihood(model, before, scored)
    assert [is_greedy for _, is_greedy in found["scores"]] == [True, True, True, False]
    bos, eos = pieces.bos_id(), pieces.eos_id()
    for (context, rest), (score, _), rolling in zip(TEXTS, found["likely"], found["rolling"], strict=True):
        whole = pieces.encode(context + rest)
        count = len(whole) - len(pieces.encode(context.rstrip()))
        before = whole[: len(whole) - count] or [bos]
        assert score == pytest.approx(log_likelihood(model, before, whole[len(whole) - count :])[0], abs=1e-4)
        assert rolling == pytest.approx(log_likelihood(model, [bos], whole)[0], abs=1e-4)
    with torch.no_grad():
        prompt = pieces.encode(TEXTS[1][0])
        made = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW, eos_token_id=eos)[0]
    assert found["answers"][1] == pieces.decode(made[len(prompt) :].tolist()).split("\n")[0]


def tasks(folder: Path, answers: list[str]) -> list[dict[str, Any]]:
    """One of each kind of question: choices, whole texts that are longer than the model, answers up to an end."""
    from pydoc_data.topics import topics

    texts = [" ".join(text.split()[:120]) for text in list(topics.values())[:12]]
    rows = [
        {"text": text, "question": text[:20], "choices": [text[20:40], other[20:34], other[40:50]], "answer": answer}
        for text, other, answer in zip(texts, texts[1:] + texts[:1], answers or [""] * len(texts), strict=True)
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    choices = {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "0"}
    whole = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    ends = {"until": ["\n", "."], "max_gen_toks": NEW, "do_sample": False}
    free = {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    kinds = (
        ("choices", choices | {"doc_to_choice": "{{choices}}"}, ("acc", "acc_norm")),
        ("texts", whole, ("word_perplexity", "bits_per_byte")),
        ("answers", free | {"generation_kwargs": ends}, ("exact_match",)),
    )
    return [
        data | {"task": name, "metric_list": [{"metric": metric} for metric in metrics]} | kind
        for name, kind, metrics in kinds
    ]


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("at, bos", [("one", False), ("one", True), ("tp2", False)])
def test_lm_eval_says_what_it_says_of_transformers_model(
    train: Callable[..., Run], base: Path, corpus: Path, tmp_path: Path, at: str, bos: bool
) -> None:
    """Every answer, and the scores that lm-eval makes of them."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is optional")
    import transformers
    from lm_eval.models.huggingface import HFLM

    model = transformers.LlamaForCausalLM.from_pretrained(base).eval()
    tokenizer = transformers.LlamaTokenizer(str(corpus / "tokenizer.model"), legacy=True)
    peer = HFLM(model, tokenizer=tokenizer, device="cpu", add_bos_token=bos, max_length=32)

    def answered(given: list[dict[str, Any]]) -> Any:
        return lm_eval.simple_evaluate(model=peer, tasks=given, bootstrap_iters=0)

    said = [row["resps"][0][0] for row in answered(tasks(tmp_path, []))["samples"]["answers"]]
    given = tasks(tmp_path, [answer if number % 3 else "" for number, answer in enumerate(said)])
    expected = answered(given)
    (tmp_path / "questions.json").write_text(json.dumps({"tasks": given, "bos": bos}))
    words = [f"++model.restore_from_path={base}", *LAYOUTS[at]]
    run = train(*words, script=SCRIPT, environment={"QUESTIONS": str(tmp_path / "questions.json")})
    assert run.code == 0, run.output[-4000:]
    line = next(line for line in run.output.splitlines() if line.startswith("found: "))
    found = json.loads(line.removeprefix("found: "))
    for name, rows in found["answers"].items():
        for mine, theirs in zip(rows, expected["samples"][name], strict=True):
            pairs = zip(mine, theirs["resps"], strict=True)
            assert all(flat(one) == pytest.approx(flat(other), abs=1e-4) for one, other in pairs), name
    scores = metrics(found["results"])
    assert len(scores) == 5 and scores == pytest.approx(metrics(expected["results"]), rel=1e-4)
    assert 0 < scores["answers exact_match,none"] < 1


def metrics(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """lm-eval's, by "task metric,filter", without sample sizes and standard errors."""
    return {
        f"{name} {key}": value
        for name, row in results.items()
        for key, value in row.items()
        if "," in key and "stderr" not in key
    }


def flat(answer: Any) -> list[Any]:
    return [part for one in answer for part in (one if isinstance(one, list | tuple) else [one])]


class Counting:
    """A model that says of each next token what its number is; and how it was asked."""

    cfg = SimpleNamespace(encoder_seq_length=6)

    class tokenizer:
        eos_id = 0
        vocab_size = 30

        @staticmethod
        def text_to_ids(text: str) -> list[int]:
            return [ord(letter) - 96 for letter in text]

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])

    def generate(self, inputs: Any, length: Any, sampling: Any) -> Any:
        rows, lengths = inputs
        assert rows.shape[1] == lengths[0] + 1 <= 7
        self.asked.append((len(rows), int(lengths[0])))
        full = -torch.arange(30.0).expand(len(rows), int(lengths[0]), 30) / 100
        return {"full_logprob": list(full)}


def test_windows_and_groups() -> None:
    model = Counting()
    scorer = Scorer(model, batch=2)
    requests = [SimpleNamespace(args=args) for args in [("ab", "c"), ("", "ccc"), ("b", "cd"), ("aa", "b")]]
    found = scorer.loglikelihood(requests)
    assert [round(-score * 100) for score, _ in found] == [3, 9, 7, 2]
    assert model.asked == [(2, 2), (1, 2), (1, 3)]
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
            self._rank, self._world_size, self._device, self.theirs = 0, 1, None, True  # as lm-eval's does

    modules["lm_eval.api.model"].LM = LM  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    found = as_lm(Counting(), 3)
    assert isinstance(found, LM) and isinstance(found, Scorer)
    assert found.theirs and found.batch == 3
