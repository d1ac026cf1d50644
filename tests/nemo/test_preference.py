"""DPO and ORPO: the papers' formulas and trl's numbers, and training in three layouts against a plain loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.functional import log_softmax, logsigmoid

from nxdt_nemo._resources import folder as resource
from nxdt_nemo.errors import ConfigError
from nxdt_nemo.nemo.alignment.dataset import Pair, PreferenceDataset, Rows, cut, read_pairs
from nxdt_nemo.nemo.alignment.losses import Answers, dpo, orpo
from nxdt_nemo.testing.script_run import Run, run

from .conftest import hugging_face_llama

TRL: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "trl_0_10_1.json").read_text())
BETA = 0.3
PROMPTS = (2, 3, 2, 3)  # tokens of the prompt in rows chosen 0, chosen 1, rejected 0, rejected 1
LENGTHS = (6, 5, 4, 6)


def logits_of(phase: float) -> torch.Tensor:
    at = torch.arange(4 * 6 * 9, dtype=torch.float64)
    return (2.0 * torch.sin(0.7 * at + phase)).reshape(4, 6, 9).float()


def rows() -> torch.Tensor:
    ids = (torch.arange(24).reshape(4, 6) * 5 + 3) % 9
    ids[2, :2], ids[3, :3] = ids[0, :2], ids[1, :3]
    return ids


def numbers(phase: float) -> Answers:
    """Four rows of logits as pairs: what the model of this package makes of per-token losses."""
    log = log_softmax(logits_of(phase), -1)[:, :-1].gather(2, rows()[:, 1:, None]).squeeze(2)
    at = torch.arange(1, 6)
    text = torch.stack([(at < length).float() for length in LENGTHS])
    answer = torch.stack([(at >= prompt).float() * mask for prompt, mask in zip(PROMPTS, text, strict=True)])
    pairs = torch.tensor([[0, 2], [1, 3]])
    return Answers(
        sums=(log * answer).sum(1)[pairs],
        tokens=answer.sum(1)[pairs],
        text=(log * text).sum(1)[:2],
        length=text.sum(1)[:2],
    )


def close(mine: Any, other: Any) -> None:
    torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(other), rtol=1e-6, atol=1e-6)


def test_log_probabilities_are_trls():
    found = numbers(0.0)
    close(found.sums.T.flatten(), TRL["sums"])
    close(found.tokens.T.flatten(), torch.tensor(TRL["sizes"]).float())
    close(numbers(0.9).sums.T.flatten(), TRL["reference"])


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_dpo_is_trls_and_the_papers(kind):
    policy, reference = numbers(0.0), numbers(0.9).sums
    loss, logged = dpo(policy, reference, BETA, kind)
    theirs = TRL[kind]
    close(loss, sum(theirs["losses"]) / 2)
    close(logged["rewards/chosen"], sum(theirs["chosen"]) / 2)
    close(logged["rewards/rejected"], sum(theirs["rejected"]) / 2)
    close(logged["rewards/margins"], sum(theirs["chosen"]) / 2 - sum(theirs["rejected"]) / 2)
    close(logged["rewards/accuracies"], 1.0)
    ratios = torch.exp(policy.sums - reference)  # equation 7: of probabilities, not of their logarithms
    papers = {
        "sigmoid": -torch.log(1 / (1 + (ratios[:, 1] / ratios[:, 0]) ** BETA)),
        "hinge": (1 - BETA * torch.log(ratios[:, 0] / ratios[:, 1])).clamp(min=0),
        "ipo": (torch.log(ratios ** (1 / policy.tokens)).diff(dim=1)[:, 0] + 1 / (2 * BETA)) ** 2,
    }
    close(loss, papers[kind].mean())
    other, _ = dpo(policy, reference.flip(1), BETA, kind)
    assert abs(other - loss) > 1e-2


def test_orpo_is_trls_and_the_papers():
    policy = numbers(0.0)
    loss, logged = orpo(policy, BETA)
    theirs = TRL["orpo"]
    close(loss, theirs["loss"])
    for name, value in logged.items():
        close(value, theirs[name])
    likely = torch.exp(policy.sums / policy.tokens)
    odds = likely / (1 - likely)
    ratio = torch.log(1 / (1 + odds[:, 1] / odds[:, 0]))
    close(loss, -policy.text.sum() / policy.length.sum() - BETA * ratio.mean())


@pytest.mark.parametrize("prompt, chosen, rejected, keep, left, first, second", TRL["cuts"])
def test_long_pairs_are_cut_as_trl_cuts_them(prompt, chosen, rejected, keep, left, first, second):
    asked = list(range(100, 100 + prompt))
    sides = [(asked, list(range(200, 200 + chosen))), (asked, list(range(300, 300 + rejected)))]
    assert cut(sides, Rows(length=10, prompt=4, keep=keep)) == [(left, first), (left, second)]


class Letters:
    """A tokenizer of one token a letter."""

    bos_id, eos_id = 1, 2

    def text_to_ids(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


class Pieces:
    """The longest piece that fits, from the left."""

    bos_id, eos_id = 1, 2

    def text_to_ids(self, text: str) -> list[int]:
        found: list[int] = []
        while text:
            piece = max((piece for piece in TRL["pieces"] if text.startswith(piece)), key=len)
            found, text = [*found, TRL["pieces"][piece]], text[len(piece) :]
        return found


@pytest.mark.parametrize("prompt, chosen, rejected, keep, good, asked, bad, asked_too", TRL["rows"])
def test_tokens_are_trls(prompt, chosen, rejected, keep, good, asked, bad, asked_too):
    """Merged across the border, begun and ended already, cut: what trl makes of the text."""
    rows = Rows(length=6, prompt=3, keep=keep, bos=True)
    item = PreferenceDataset([Pair(prompt, chosen, rejected, "")], Pieces(), rows).rows_of(0)
    for side, (ids, part) in enumerate(((good, asked), (bad, asked_too))):
        assert item["tokens"][side].tolist()[: len(ids) - 1] == ids[:-1]
        assert item["labels"][side].tolist()[: len(ids) - 1] == ids[1:]
        assert item["loss_mask"][side].tolist() == [part - 1 <= at < len(ids) - 1 for at in range(6)]


def pair_lines(count: int) -> str:
    pairs = [{"prompt": f"{n} and {n} is", "chosen": f" {2 * n}", "rejected": f" not {n}"} for n in range(count)]
    return "".join(json.dumps(pair) + "\n" for pair in pairs)


def test_rows_and_masks(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "ab", "chosen": "cde", "rejected": "f"}\n')
    pairs = read_pairs([str(tmp_path / "pairs.jsonl")])
    item = PreferenceDataset(pairs, Letters(), Rows(length=8, prompt=4, bos=True))[0]
    chosen, rejected = item["tokens"].tolist()
    assert chosen == [1, 97, 98, 99, 100, 101, 2, 2]
    assert item["labels"].tolist()[0] == [97, 98, 99, 100, 101, 2, 2, 2]
    assert item["loss_mask"].tolist() == [[0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]]
    assert item["text_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert rejected[:4] == [1, 97, 98, 102]


def test_each_epoch_has_an_order_of_its_own_and_all_pairs(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(pair_lines(20))
    pairs = read_pairs([str(tmp_path / "pairs.jsonl")])
    data = PreferenceDataset(pairs, Letters(), Rows(64, 32), samples=40, seed=5)
    first, second = ([data.pair_at(epoch * 20 + at) for at in range(20)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert first == [data.pair_at(at) for at in range(20)]
    assert PreferenceDataset(pairs, Letters(), Rows(64, 32), samples=5, seed=5).read == sorted(first[:5])


BAD = [
    ("{", "is not JSON"),
    ("[1]", "is not a JSON object"),
    ('{"prompt": "a", "chosen": "b"}', "has no 'rejected'"),
    ('{"prompt": "a", "chosen": ["b"], "rejected": "c"}', "'chosen' is of type list, not text"),
    ('{"prompt": "a", "chosen": "", "rejected": "c"}', "'chosen' is empty"),
]


@pytest.mark.parametrize("line, reason", BAD)
def test_a_bad_line_is_named(tmp_path, line, reason):
    file = tmp_path / "pairs.jsonl"
    file.write_text(f"{pair_lines(2)}\n{line}\n")
    with pytest.raises(ConfigError) as found:
        read_pairs([str(file)])
    assert str(found.value).startswith(f"{file}:4: {reason}")
    assert '{"prompt": "..."' in found.value.fix or "leave the line out" in found.value.fix


# --- whole runs -------------------------------------------------------------------------------------------------------

STEPS, PAIRS, SEQ = 4, 12, 32
ALIGNMENTS = {"dpo": {"kl_beta": 0.5, "max_prompt_length": 16}, "orpo": {"beta": 0.5, "max_prompt_length": 16}}
LAYOUTS = {
    "one": [],
    "tp2": ["trainer.devices=2", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
    "pp2": ["trainer.devices=2", "model.pipeline_model_parallel_size=2"],
    "dp2": ["trainer.devices=2"],
    "cp2": ["trainer.devices=2", "++model.context_parallel_size=2"],
}
Started = Callable[..., Run]


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded Llama as transformers writes it, and pairs.jsonl beside it."""
    folder = tmp_path_factory.mktemp("base")
    hugging_face_llama(folder / "hf", seed=11, length=SEQ, initializer_range=0.1)
    (folder / "pairs.jsonl").write_text(pair_lines(PAIRS))
    return folder


@pytest.fixture
def started(corpus: Path, base: Path, tmp_path: Path) -> Started:
    """`started("dpo", ...)`: nxdt-nemo run --config, with overrides, in the folder `name`."""

    def job(
        method: str, *overrides: str, name: str = "run", script: Path | None = None, environment: Any = None
    ) -> Run:
        cfg = OmegaConf.load(resource("configs") / "demo_llama.yaml")
        sizes = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}
        sizes |= {"num_query_groups": 2, "encoder_seq_length": SEQ, "micro_batch_size": 1, "global_batch_size": 4}
        cfg.model.update(sizes | {"make_vocab_size_divisible_by": 64, "tensor_model_parallel_size": 1})
        cfg.model.data = {"train_ds": {"file_names": [str(base / "pairs.jsonl")]}}
        cfg.model.restore_from_path = str(base / "hf")
        cfg.model.optim.update({"lr": 5e-3, "weight_decay": 0.0})
        cfg.model.optim.sched.update({"warmup_steps": 1, "min_lr": 1e-3})
        cfg.trainer.update({"devices": 1, "max_steps": STEPS, "val_check_interval": STEPS})
        cfg.exp_manager.create_checkpoint_callback = False
        cfg.neuron = {"alignment": {method: ALIGNMENTS[method]}}
        OmegaConf.save(cfg, tmp_path / "pairs.yaml")
        files = [
            f"exp_manager.explicit_log_dir={tmp_path / name}",
            f"model.tokenizer.model={corpus / 'tokenizer.model'}",
        ]
        words = [str(tmp_path / "pairs.yaml"), *files, *overrides]
        if script is not None:
            words = [f"--config-path={tmp_path}", "--config-name=pairs", *words[1:]]
        environment = {"NXDT_NEMO_RUNTIME": "cpu"} | (environment or {})
        done = run(script or Path("--config"), words, tmp_path / name, cwd=tmp_path, environment=environment)
        assert done.code == 0, done.output[-4000:]
        return done

    return job


def plain_loop(method: str, base: Path, corpus: Path, rates: list[float]) -> list[dict[str, float]]:
    """The same training with transformers' model, torch's Adam and the papers' formulas."""
    import sentencepiece
    import transformers

    class Pieces:
        def __init__(self) -> None:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(corpus / "tokenizer.model"))
            self.bos_id, self.eos_id = self.pieces.bos_id(), self.pieces.eos_id()

        def text_to_ids(self, text: str) -> list[int]:
            return list(self.pieces.encode(text))

    model = transformers.LlamaForCausalLM.from_pretrained(base / "hf")
    data = PreferenceDataset(
        read_pairs([str(base / "pairs.jsonl")]), Pieces(), Rows(SEQ, 16), samples=STEPS * 4, seed=1234
    )

    def said(item: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        log = log_softmax(model(item["tokens"]).logits, -1).gather(2, item["labels"][..., None]).squeeze(2)
        return (log * item["loss_mask"]).sum(1), (log * item["text_mask"])[0].sum()

    with torch.no_grad():
        before = [said(data[at])[0] for at in range(STEPS * 4)]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    found = []
    for step, rate in enumerate(rates):
        optimizer.zero_grad()
        losses, margins = [], []
        for at in range(step * 4, step * 4 + 4):
            sums, text = said(data[at])
            if method == "dpo":
                ratios = sums - before[at]
                loss = -logsigmoid(0.5 * (ratios[0] - ratios[1]))
                margins.append(0.5 * (ratios[0] - ratios[1]).item())
            else:
                means = sums / data[at]["loss_mask"].sum(1)
                odds = means - torch.log(1 - torch.exp(means))
                loss = -text / data[at]["text_mask"][0].sum() - 0.5 * logsigmoid(odds[0] - odds[1])
                margins.append(0.5 * (means[0] - means[1]).item())
            (loss / 4).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        found.append({"reduced_train_loss": sum(losses) / 4, "rewards/margins": sum(margins) / 4})
    return found


def curves(done: Run, *names: str) -> list[list[float]]:
    return [[value for _, value in sorted(done.curve(name).items())] for name in names]


def same(found: Run, expected: list[dict[str, float]], tolerance: float = 2e-4) -> None:
    for name in ("reduced_train_loss", "rewards/margins"):
        (curve,) = curves(found, name)
        assert curve == pytest.approx([row[name] for row in expected], rel=tolerance, abs=tolerance / 10), name


CASES = [
    ("dpo", "one", []),
    ("dpo", "one", ["neuron.alignment.dpo.precompute_ref_log_probs=false"]),
    ("dpo", "tp2", ["neuron.alignment.dpo.precompute_ref_log_probs=false"]),
    ("dpo", "pp2", []),
    ("dpo", "pp2", ["neuron.alignment.dpo.precompute_ref_log_probs=false"]),
    ("dpo", "dp2", []),
    ("dpo", "cp2", []),
    ("orpo", "one", ["model.micro_batch_size=1"]),
    ("orpo", "tp2", []),
    ("orpo", "pp2", []),
]


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("method, at, more", CASES, ids=lambda value: "live" if value and "=f" in str(value) else None)
def test_it_trains_as_a_plain_loop_does(started, base, corpus, method, at, more):
    found = started(method, *LAYOUTS[at], *[word if word.startswith("model") else f"++{word}" for word in more])
    losses, margins, rates = curves(found, "reduced_train_loss", "rewards/margins", "lr")
    assert len(losses) == STEPS
    same(found, plain_loop(method, base, corpus, rates))
    if method == "dpo":
        assert losses[0] == pytest.approx(0.693147, abs=1e-5)  # policy and reference are one
    assert margins[-1] > margins[0] + 0.01  # it learns what it is to prefer
    assert found.curve("rewards/accuracies").keys() == found.curve("logps/chosen").keys()


@pytest.mark.slow
def test_a_resumed_run_compares_with_where_training_began(started):
    saves = ["exp_manager.create_checkpoint_callback=true", "exp_manager.checkpoint_callback_params.save_top_k=-1"]
    keys = ("monitor=step", "mode=max", "every_n_train_steps=2", "every_n_epochs=null")
    saves += [f"exp_manager.checkpoint_callback_params.{key}" for key in keys]
    whole = started("dpo", *saves, name="whole")
    (half,) = whole.folder.rglob("*step=2-*")
    again = started("dpo", f"++exp_manager.resume_from_checkpoint='{half}'", name="again")
    assert again.resumed_from == half.name
    assert curves(again, "rewards/margins")[0] == pytest.approx(curves(whole, "rewards/margins")[0][2:], rel=1e-5)


@pytest.mark.slow
def test_adapters_and_validation(started, base):
    lora = {"adapter_dim": 4, "alpha": 8, "adapter_dropout": 0.0, "target_modules": "[all]", "variant": "canonical"}
    words = [f"++model.peft.lora_tuning.{key}={value}" for key, value in (lora | {"weight_tying": False}).items()]
    held = f"++model.data.validation_ds.file_names=[{base / 'pairs.jsonl'}]"
    found = [
        started("dpo", "++model.peft.peft_scheme=lora", *words, held, f"++neuron.alignment.dpo.{live}", name=name)
        for name, live in (("table", "precompute_ref_log_probs=true"), ("live", "precompute_ref_log_probs=false"))
    ]
    one, other = (curves(each, "reduced_train_loss", "val_loss", "val_rewards/margins") for each in found)
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1] == pytest.approx(other[1], rel=1e-5)
    assert one[0][-1] < one[0][0]
    assert one[2][-1] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("with_torch_xla")
@pytest.mark.parametrize("method, more", [("dpo", "=true"), ("dpo", "=false"), ("orpo", "")])
def test_on_the_xla_lane_two_graphs_serve_all_steps(started, tmp_path, method, more):
    """Nothing is compiled after two steps, nothing falls off XLA, and the losses are the cpu lane's."""
    steps = ["trainer.max_steps=6", *([f"++neuron.alignment.dpo.precompute_ref_log_probs{more}"] if more else [])]
    script = Path(__file__).with_name("megatron_alignment.py")
    counts = tmp_path / "counts.json"
    cpu = started(method, *steps, name="cpu")
    xla = started(
        method, *steps, name="xla", script=script, environment={"NXDT_NEMO_RUNTIME": "xla", "COUNTS": str(counts)}
    )
    assert "nxdt_nemo: lane xla" in xla.output
    for name in ("reduced_train_loss", "rewards/margins"):
        assert curves(xla, name)[0] == pytest.approx(curves(cpu, name)[0], rel=1e-4, abs=1e-5), name
    parts = json.loads(counts.read_text())
    assert len(parts) == 6
    assert [part.get("compiled", 0) for part in parts[2:]] == [0, 0, 0, 0]
    assert not any(number for part in parts[2:] for name, number in part.items() if name.startswith("aten::"))


NXDT = Path(__file__).parents[1] / "config" / "migrate" / "data" / "small_nxdt.yaml"


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("keys", [["dpo.kl_beta=0.5", "dpo.precompute_ref_log_probs=False"], ["orpo.beta=0.5"]])
def test_a_file_of_nxd_training_trains(base, corpus, tmp_path, keys):
    """Its keys, migrated in memory: two ranks, tensor and sequence parallel, bf16 with a sharded optimizer."""
    words = [
        str(NXDT),
        f"model.tokenizer.model={corpus / 'tokenizer.model'}",
        "model.tokenizer.sentencepiece_legacy=False",
        f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
        f"data.train_dir={base / 'pairs.jsonl'}",
        "data.val_dir=null",
        f"model.restore_from_path={base / 'hf'}",
        *(f"model_alignment_strategy.{key}" for key in keys),
    ]
    done = run(Path("--config"), words, tmp_path / "run", cwd=tmp_path, environment={"NXDT_NEMO_RUNTIME": "cpu"})
    assert done.code == 0, done.output[-4000:]
    losses, margins = curves(done, "reduced_train_loss", "rewards/margins")
    assert len(losses) == 3
    assert margins[-1] != margins[0]
