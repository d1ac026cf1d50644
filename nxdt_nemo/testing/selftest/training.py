"""NeMo runs of the self-test: a tiny Llama through configs/demo_llama.yaml, on the lane and on the cpu lane beside it.

Room testing/. Proof: tests/testing/test_selftest.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nxdt_nemo.testing.script_run import Run, run, tiny, write_corpus

__all__ = ["Runs"]

# Upstream's calls in upstream's order, as a NeMo user writes them; a file of its own, since a module would be imported.
SCRIPT = '''\
import os

from lightning.pytorch import Callback
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig


class Stops(Callback):
    """Ends the run after step SELFTEST_STOP, with the schedule and the data of all its steps."""

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if trainer.global_step == int(os.environ.get("SELFTEST_STOP", "-1")):
            trainer.should_stop = True


@hydra_runner(config_path=".", config_name="none")
def main(cfg: DictConfig) -> None:
    trainer = MegatronTrainerBuilder(cfg).create_trainer([Stops()])
    exp_manager(trainer, cfg.exp_manager)
    trainer.fit(MegatronGPTModel(cfg.model, trainer))


if __name__ == "__main__":
    main()
'''
STEPS, SAVED = 6, 3


class Runs:
    """Runs in a folder of their own; the corpus is written when the first one needs it.

    left  the seconds that a run may take, asked when it starts
    """

    def __init__(self, folder: Path, lane: str, environment: dict[str, str], left: Callable[[], float]) -> None:
        self.folder, self.lane, self.environment, self.left = folder, lane, environment, left
        self._corpus: Path | None = None

    @property
    def corpus(self) -> Path:
        """The folder with the tokenizer and the tokens."""
        if self._corpus is None:
            self._corpus = write_corpus(self.folder / "corpus")
        return self._corpus

    def train(self, name: str, *overrides: str, lane: str = "", stop: int = -1) -> Run:
        """A run on this lane (or another) that logs to the folder `name` and ends after step `stop`, if given."""
        folder = self.folder / name
        words = [*tiny(self.corpus, folder), f"trainer.max_steps={STEPS}", *overrides]
        environment = self.environment | {"NXDT_NEMO_RUNTIME": lane or self.lane, "HF_HUB_OFFLINE": "1"}
        environment |= {"SELFTEST_STOP": str(stop)}
        script = self.folder / "pretraining.py"
        script.write_text(SCRIPT, encoding="utf-8")
        return run(script, words, folder, seconds=self.left(), environment=environment, cwd=self.folder)
