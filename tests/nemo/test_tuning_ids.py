"""Token ids that a migrated tuning run reads are those of NxD Training's calls, on tokenizers of both kinds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from nxdt_nemo.config.migrate import Options, migrate
from nxdt_nemo.config.migrate.engine import parse_overrides
from nxdt_nemo.nemo.alignment.dataset import together

SMALL = Path(__file__).parents[1] / "config" / "migrate" / "data" / "small_nxdt.yaml"
PAIRS = [
    {"input": "the sum of one and two", "output": "three"},
    {"input": "a function re", "output": "turns a value"},
    {"input": "Answer:\n", "output": "It is not\nso."},
]
METHODS = {"sft": "packing=False", "dpo": "kl_beta=0.1", "orpo": "beta=0.1"}


@pytest.fixture(scope="module", params=["sentencepiece", "bytes"])
def folder(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as transformers saves one: Llama 2's kind, and Llama 3's, to which a space is a part of a word."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = tmp_path_factory.mktemp(request.param)
    if request.param == "sentencepiece":
        transformers.LlamaTokenizer(str(corpus / "tokenizer.model")).save_pretrained(made)
        return made
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokens.train_from_iterator([between.join(pair.values()) for pair in PAIRS for between in ("", " ")], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(made)
    return made


def fast(folder: Path) -> bool:
    """False for sentencepiece, which the `tokenizers` of the lock cannot read."""
    return folder.name.startswith("bytes")


def migrated(method: str) -> Any:
    """model.data of a migrated file of a method."""
    words = [f"model_alignment_strategy.{method}.{METHODS[method]}"]
    words += [f"data.{name}_dir=/x/{name}.jsonl" for name in ("train", "val")]
    found = migrate(SMALL.read_text(), Options(overrides=parse_overrides(words)))
    return OmegaConf.create(found.text).model.data


@pytest.mark.parametrize("section", ["train_ds", "validation_ds"])
def test_sft(folder: Path, tmp_path: Path, section: str) -> None:
    import transformers
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_dataset import GPTSFTDataset

    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in PAIRS))
    said, tokenizer = migrated("sft")[section], AutoTokenizer(str(folder), use_fast=fast(folder))
    theirs = transformers.AutoTokenizer.from_pretrained(folder, use_fast=fast(folder))

    def read(template: str) -> list[tuple[list[int], int]]:
        data = GPTSFTDataset(
            str(tmp_path / "pairs.jsonl"),
            tokenizer,
            max_seq_length=64,
            add_bos=said.get("add_bos", False),
            add_eos=said.get("add_eos", True),
            add_sep=said.get("add_sep", False),
            label_key=said.label_key,
            truncation_field=said.truncation_field,
            prompt_template=template,
        )
        return [(item["input_ids"], item["answer_start_idx"]) for item in (data[at] for at in range(len(PAIRS)))]

    expected = []
    for pair in PAIRS:
        question, answer = (theirs(pair[name], add_special_tokens=False)["input_ids"] for name in ("input", "output"))
        expected.append(([theirs.bos_token_id, *question, *answer, theirs.eos_token_id], 1 + len(question)))
    assert read(said.prompt_template) == expected
    assert (read("{input} {output}") == expected) is not fast(folder)


@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_preferences_begin_as_trls(method: str) -> None:
    data = migrated(method)
    assert data.train_ds.add_bos is data.validation_ds.add_bos is True


def test_an_answer_is_read_behind_its_prompt(folder: Path) -> None:
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder, use_fast=fast(folder))

    def ids(text: str) -> Any:
        return theirs(text, add_special_tokens=False)["input_ids"]

    tokenizer = SimpleNamespace(text_to_ids=ids)
    apart = 0
    for pair in PAIRS:
        prompt, answer = together(pair["input"], pair["output"], tokenizer)
        whole, alone = ids(pair["input"] + pair["output"]), ids(pair["input"])
        assert answer == whole[len(alone) :]
        assert prompt == (alone if whole[: len(alone)] == alone else whole[: len(alone) - 1])
        apart += (prompt, answer) != (alone, ids(pair["output"]))
    assert apart
