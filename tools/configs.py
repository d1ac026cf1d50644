"""Every composition of configs/, checked, and trained three steps on two ranks, shrunk by overrides only.

    python tools/configs.py                       # all of it; writes docs/results/configs.md
    python tools/configs.py --check               # checks only, a minute
    python tools/configs.py --only model=bert     # some of it; prints only

Compositions that are the same when they are shrunk are trained once: what sets trn1 and trn2 apart is sizes. Exit
code 1 when one is not good. Runs that were done are kept in --folder and not done again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from configs_lib import corpus, runs, shrink
from omegaconf import OmegaConf

from nxdt_nemo.config.compositions import PREFERENCES, Composition, compositions
from nxdt_nemo.config.validate import read, validate_config
from nxdt_nemo.config.view import View
from nxdt_nemo.megatron import memory_of_config

RESULT = Path(__file__).parents[1] / "docs" / "results" / "configs.md"
TRAIN = Path("train")
KINDS = {"sft": "tuning", "lora": "tuning", **dict.fromkeys(PREFERENCES, "alignment")}


def checked(job: Composition) -> tuple[str, str]:
    """(what validate says, what it needs of a NeuronCore)."""
    cfg = read(TRAIN, job.overrides)
    found = validate_config(cfg, place=str(job), strict=True)
    view = View(cfg)
    found.judge(memory_of_config.errors(view, found.ranks))
    found.judge(memory_of_config.doubts(view, found.ranks))
    need = memory_of_config.need(view, found.ranks)
    verdict = "good" if found.good else str(found.errors[0])
    return verdict, f"{(need.fixed + need.activations) / 2**30:.1f} of {need.has / 2**30:.0f}" if need else ""


class Trainer:
    """Runs, and what is kept of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.done = folder, folder / "done.json"
        self.outcomes: dict[str, list[object]] = json.loads(self.done.read_text()) if self.done.is_file() else {}
        if not (folder / "corpus" / "tuning.jsonl").is_file():
            corpus.write(folder / "corpus")

    def run(self, job: Composition) -> str:
        """One composition: its three losses, the line that refuses it, or the end of a failure."""
        base = self.folder / f"{job.model}_{job.target}{'_lora' if _grouped(job) else ''}.nemo"
        arguments = shrink.overrides(
            job, View(read(TRAIN, job.overrides)), self.folder / "corpus", Path("RUN"), Path("BASE")
        )
        key = _same(arguments) + (job.workflow if job.workflow in PREFERENCES else "")
        if key not in self.outcomes:
            if job.workflow != "pretrain" and not base.exists():
                first = Composition(job.model, job.target, "pretrain")
                heads = ["model.num_query_groups=2"] if _grouped(job) else []
                self._train(first, "gpt", [*self._arguments(first, base), *heads], base)
            self.outcomes[key] = self._outcome(job, base)
            self.done.write_text(json.dumps(self.outcomes))
        return str(self.outcomes[key][0])

    def _outcome(self, job: Composition, base: Path) -> list[object]:
        kind = job.model if job.model in ("bert", "t5") else KINDS.get(job.workflow, "gpt")
        save = base if kind == "gpt" else None
        found = self._train(job, kind, self._arguments(job, base), save)
        if found.trained:
            return ["trained: " + ", ".join(f"{loss:.4f}" for loss in found.losses)]
        return [f"refused: {found.refused}" if found.refused else f"FAILED: {' '.join(found.failed.split())[-300:]}"]

    def _arguments(self, job: Composition, base: Path) -> list[str]:
        view = View(read(TRAIN, job.overrides))
        return shrink.overrides(job, view, self.folder / "corpus", self._place(job), base)

    def _place(self, job: Composition) -> Path:
        return self.folder / f"{job.model}_{job.target}_{job.workflow}"

    def _train(self, job: Composition, kind: str, arguments: list[str], save: Path | None) -> runs.Outcome:
        place = self._place(job)
        shutil.rmtree(place, ignore_errors=True)
        return runs.run(kind, arguments, place, save)


def _grouped(job: Composition) -> bool:
    """True for adapters that need a base model with a KV head for each rank: with copies they are refused."""
    return job.workflow == "lora" and View(read(TRAIN, job.overrides)).get("model.num_query_groups") is not None


def _same(arguments: list[str]) -> str:
    """Equal for compositions whose shrunk configurations are equal but for the instance."""
    cfg = read(TRAIN, arguments)
    OmegaConf.set_struct(cfg, False)
    cfg.pop("neuron", None)
    return hashlib.sha256(OmegaConf.to_yaml(cfg, sort_keys=True).encode()).hexdigest()


def markdown(rows: list[tuple[Composition, str, str, str]]) -> str:
    """The file in docs/results."""
    from importlib.metadata import version

    versions = ", ".join(f"{name} {version(name)}" for name in ("nemo_toolkit", "megatron-core", "lightning", "torch"))
    lines = "\n".join(f"| {job.model} | {job.target} | {job.workflow} | {a} | {b} | {c} |" for job, a, b, c in rows)
    return f"""# Configurations

`python tools/configs.py`, {time.strftime("%Y-%m-%d")}; {versions}.
Every composition of `configs/`: what `validate --strict` says of it as it is, what it needs of a NeuronCore (GiB,
coarsely), and the losses of three steps on two ranks of the cpu lane, shrunk by overrides only
(`tools/configs_lib/shrink.py`): two layers, hidden size 32, sequences of 64, a pipeline of two stages where the
composition has one, else two tensor-parallel ranks, else two data-parallel ones. Where trn1 and trn2 are the same
configuration when shrunk, they are one run. Tuning begins from what the pretraining run of the same model saved.

| model | target | workflow | validate | GiB a core | three steps |
|---|---|---|---|---|---|
{lines}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="do not train")
    parser.add_argument("--only", action="append", default=[], help="group=name")
    parser.add_argument("--folder", type=Path, help="where runs are kept; default: a new one")
    args = parser.parse_args()
    jobs = sorted(compositions(**dict(entry.split("=") for entry in args.only)), key=_order)
    rows = {job: (*checked(job), "") for job in jobs}
    for job, row in rows.items():
        if args.check or row[0] != "good":
            print(f"{job}: {row[0]}; {row[1]}", flush=True)
    if not args.check:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        runs.preload()
        trainer = Trainer(args.folder or Path(tempfile.mkdtemp(prefix="configs-")))
        for job in jobs:
            verdict, memory, _ = rows[job]
            rows[job] = (verdict, memory, trainer.run(job))
            print(f"{job}: {rows[job][2]}", flush=True)
            if not args.only:
                RESULT.write_text(markdown([(job, *rows[job]) for job in sorted(rows)]), encoding="utf-8")
    bad = [job for job, row in rows.items() if row[0] != "good" or not _as_it_must(job, row[2], args.check)]
    print(f"{len(jobs)} compositions, {len(bad)} not good")
    return 1 if bad else 0


def _order(job: Composition) -> tuple[int, int, str]:
    """Pretraining first, which tuning begins from."""
    return (
        ["pretrain", "sft", "lora", *PREFERENCES].index(job.workflow),
        ["trn1", "cpu", "trn2"].index(job.target),
        job.model,
    )


def _as_it_must(job: Composition, outcome: str, untrained: bool) -> bool:
    if untrained:
        return True
    return outcome.startswith("trained: ")


if __name__ == "__main__":
    sys.exit(main())
