"""What a script did, read from what it left and printed: each function says so in a few words, or raises Unexpected."""

from __future__ import annotations

import ast
import json
import math
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nxdt_nemo.testing.parity import relative
from nxdt_nemo.testing.script_run import Run, read_tensors
from scripts_lib.inputs import PROMPTS, settings_of

__all__ = ["Done", "Shows", "Unexpected"]

Tensors = dict[str, Any]


class Unexpected(Exception):
    """A run that ended otherwise than the table says."""


@dataclass(frozen=True)
class Done:
    """A run that ended, the row's folder, the folder of inputs, and the one in which each row has its own."""

    run: Run
    folder: Path
    data: Path
    rows: Path

    def curve(self, name: str, row: str = "") -> dict[int, float]:
        """Logged values by step, of this row or another."""
        return Run(0, "", self.rows / row if row else self.folder).curve(name)

    def saved(self, name: str) -> Tensors:
        """Every tensor of a .nemo, or of a folder like one, by its name: below this row, below the inputs, or the one
        that the row `name` trained."""
        places = (self.folder / name, self.data / name, *sorted((self.rows / name).glob("log/checkpoints/*.nemo")))
        file = next((place for place in places if place.exists() and (place.suffix or place.is_dir())), None)
        _check(file is not None, f"no {name}")
        return weights(file)  # type: ignore[arg-type]


Shows = Callable[[Done], str]


def refusal(part: str) -> Shows:
    """Ended by one line with `part` in it, exit code 2, no traceback."""

    def show(done: Done) -> str:
        lines = [line for line in done.run.output.splitlines() if line.startswith("nxdt-nemo: ")]
        _check(done.run.code == 2, f"exit code {done.run.code}")
        _check("Traceback" not in done.run.output, "a traceback")
        _check(len(lines) == 1 and part in lines[0], f"said {lines}")
        return "refused: " + re.sub(r"^nxdt-nemo: \S+\.(py|yaml): ", "", lines[0])

    return show


def losses(steps: int = 6, curve: str = "reduced_train_loss") -> Shows:
    """So many finite losses, the last below the first."""

    def show(done: Done) -> str:
        found = [loss for _, loss in sorted(done.curve(curve).items())]
        _check(len(found) == steps and all(map(math.isfinite, found)), f"{curve}: {found}")
        _check(found[-1] < found[0], f"{curve} does not fall: {found}")
        return f"{curve} {found[0]:.4f} → {found[-1]:.4f}"

    return show


def as_in(row: str, steps: range, within: float = 1e-5) -> Shows:
    """In these steps the losses of another row, and the norms of the gradient."""

    def show(done: Done) -> str:
        errors = []
        for name in ("reduced_train_loss", "grad_norm"):
            found, expected = done.curve(name), done.curve(name, row)
            _check(set(steps) <= found.keys() and len(set(expected.values())) > 1, f"{name} of {sorted(found)}")
            errors.append(relative([found[step] for step in steps], [expected[step] for step in steps]))
            _check(errors[-1] <= within, f"{name} {found} against {expected}")
        loss, norm = errors
        return f"steps {steps[0] + 1} to {steps[-1] + 1} as on one rank: losses within {loss:.0e}, norms {norm:.0e}"

    return show


def said(pattern: str, name: str) -> Shows:
    """A number that the script printed."""

    def show(done: Done) -> str:
        found = re.findall(pattern, done.run.output)
        _check(bool(found) and math.isfinite(float(found[-1])), f"no {name}")
        return f"{name} {float(found[-1]):.4f}"

    return show


def tokens(done: Done) -> str:
    """megatron_gpt_eval.py printed what transformers' generate makes of the same model, greedily."""
    import sentencepiece
    import torch
    from transformers import LlamaForCausalLM

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(done.data / "tokenizer.model"))
    model = LlamaForCausalLM.from_pretrained(done.data / "llama").eval()
    rows = re.findall(r"'token_ids': (\[\[[\d, \[\]]*\]\])", done.run.output)
    _check(len(rows) >= 2, "no token_ids")
    for row, prompt in zip(ast.literal_eval(rows[0]), PROMPTS, strict=True):
        given = pieces.encode(prompt)
        with torch.no_grad():
            row_of = {"input_ids": torch.tensor([given]), "attention_mask": torch.ones(1, len(given))}
            made = model.generate(**row_of, do_sample=False, min_new_tokens=8, max_new_tokens=8, pad_token_id=0)[0]
        _check(row[: len(given) + 8] == made.tolist(), f"{row} against {made.tolist()}")
    return "8 greedy tokens of 2 prompts: those of transformers"


def completion(done: Done) -> str:
    """megatron_t5_eval.py printed tokens with their log-probabilities."""
    found = re.findall(r"'tokens': \[\(\d+, '[^']*', (-[\d.]+)\)", done.run.output)
    _check(bool(found), "no completion")
    return f"a completion, log-probability of its first token {float(found[0]):.4f}"


def answers(name: str, count: int, right: bool = False) -> Shows:
    """A JSON line with a prediction for each of so many prompts, which is not empty; `right`: it is the label."""

    def show(done: Done) -> str:
        file = done.folder / name
        _check(file.is_file(), f"no {name}")
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        silent = sum(not line["pred"].strip() for line in lines)
        came = f"{len(lines)} answers"
        _check(len(lines) == count and not silent, f"{came}, of {count}; {silent} are empty")
        if right:
            wrong = [line for line in lines if line["pred"] != line["label"]]
            _check(not wrong, f"{len(wrong)} wrong, the first {wrong[:1]}")
        return f"{came}, each as trained" if right else came

    return show


def tensors(name: str, of: str, sizes: tuple[int, int] | None = None) -> Shows:
    """What was written is another model, tensor for tensor; `sizes`: the tensor and pipeline parallel ones it names."""

    def show(done: Done) -> str:
        import torch

        found, expected = done.saved(name), done.saved(of)
        _check(found.keys() == expected.keys(), f"{found.keys() ^ expected.keys()}")
        other = [key for key in found if not torch.equal(found[key], expected[key].to(found[key].dtype))]
        _check(not other, f"other {other}")
        if sizes is None:
            return f"{len(found)} tensors, each as given"
        settings = settings_of(done.folder / name)
        written = settings.tensor_model_parallel_size, settings.pipeline_model_parallel_size
        _check(written == sizes, f"for TP and PP {written}")
        return f"{len(found)} tensors, each as given, by `nxdt-nemo ckpt convert`"

    return show


def layers(name: str, count: int) -> Shows:
    """The first and the last of the Llama's layers are left."""

    def show(done: Done) -> str:
        import torch

        found, whole = done.saved(name), done.saved("llama.nemo")
        stacked = {key: value for key, value in found.items() if ".layers." in key}
        _check(bool(stacked) and found.keys() == whole.keys(), f"{found.keys() ^ whole.keys()}")
        for key, value in stacked.items():
            _check(value.shape[0] == count and torch.equal(value, whole[key][[0, -1]]), key)
        return f"{count} layers of 4, as they were"

    return show


def experts(name: str, of: str) -> Shows:
    """Each expert is the dense MLP of the model that it was made from."""

    def show(done: Done) -> str:
        found, dense = done.saved(name), done.saved(of)
        for layer in ("linear_fc1", "linear_fc2"):
            each = found[f"model.decoder.layers.mlp.experts.experts.{layer}.weight"].unbind(1)
            whole = dense[f"model.decoder.layers.mlp.{layer}.weight"]
            _check(len(each) > 1 and all(expert.equal(whole) for expert in each), layer)
        return f"{len(each)} experts a layer, each the dense MLP"

    return show


def merged(name: str) -> Shows:
    """W + B A, as `nxdt-nemo ckpt merge` makes it."""

    def show(done: Done) -> str:
        import torch

        (adapter,) = (done.rows / "megatron_gpt_finetuning").glob("log/checkpoints/*lora_tuning.nemo")
        with tempfile.TemporaryDirectory() as place:
            target = Path(place) / "ours.nemo"
            words = ["ckpt", "merge", str(done.data / "llama.nemo"), str(adapter), str(target), "--to", "nemo"]
            subprocess.run([sys.executable, "-m", "nxdt_nemo", *words], check=True, capture_output=True)
            expected = weights(target)
        found, base = done.saved(name), done.saved("llama.nemo")
        moved = [key for key in found if not torch.equal(found[key], base[key])]
        _check(bool(moved) and all("linear_qkv" in key for key in moved), f"changed: {moved}")
        error = torch.stack([(found[key] - expected[key]).abs().max().double() for key in found]).max().item()
        _check(error < 1e-6, f"{error} from ckpt merge")
        return f"W + B A, within {error:.0e} of `nxdt-nemo ckpt merge`"

    return show


def packs(name: str) -> Shows:
    """All pairs, in fewer rows."""

    def show(done: Done) -> str:
        import numpy as np

        rows = np.load(done.folder / name, allow_pickle=True)
        lines = len((done.data / "short.jsonl").read_text(encoding="utf-8").splitlines())
        count = sum(len(row["seq_start_id"]) for row in rows)
        _check(count == lines and len(rows) < lines, f"{count} pairs of {lines} in {len(rows)} rows")
        return f"{count} pairs in {len(rows)} rows"

    return show


def renamed(name: str) -> Shows:
    """What convert_weights_to_nemo1.0.py writes."""

    def show(done: Done) -> str:
        import torch

        found = torch.load(done.folder / name)["state_dict"]
        _check(sorted(found) == ["bert_model.encoder.weight", "mlm_classifier.mlp.weight"], f"{sorted(found)}")
        return "both files in one, renamed"

    return show


def weights(file: Path) -> Tensors:
    """Every tensor of a .nemo, or of a folder like one."""
    if file.is_dir():
        found = read_tensors(file / "model_weights")
    else:
        with tempfile.TemporaryDirectory() as place, tarfile.open(file) as packed:
            packed.extractall(place, filter="data")
            found = read_tensors(Path(place) / "model_weights")
    return {key: value for key, value in found.items() if not key.endswith("_extra_state")}


def _check(good: bool, reason: str) -> None:
    if not good:
        raise Unexpected(reason)
