"""NeMo runs of the self-test: a tiny Llama through configs/demo_llama.yaml, on the lane and on the cpu lane beside it.

Room testing/. Proof: tests/testing/test_selftest.py.
"""

from __future__ import annotations

from pathlib import Path

from nxdt_nemo.testing.script_run import Run, run, tiny, write_corpus

__all__ = ["Runs"]

SCRIPT = Path(__file__).with_name("script.py")
STEPS, SAVED = 6, 3


class Runs:
    """Runs in a folder of their own; the corpus is written when the first one needs it."""

    def __init__(self, folder: Path, lane: str, environment: dict[str, str]) -> None:
        self.folder, self.lane, self.environment = folder, lane, environment
        self._corpus: Path | None = None

    @property
    def corpus(self) -> Path:
        """The folder with the tokenizer and the tokens."""
        if self._corpus is None:
            self._corpus = write_corpus(self.folder / "corpus")
        return self._corpus

    def train(self, name: str, *overrides: str, lane: str = "", stop: int = -1, seconds: int = 300) -> Run:
        """A run on this lane (or another) that logs to the folder `name` and ends before step `stop`, if given."""
        folder = self.folder / name
        words = [*tiny(self.corpus, folder), f"trainer.max_steps={STEPS}", *overrides]
        environment = self.environment | {"NXDT_NEMO_RUNTIME": lane or self.lane, "HF_HUB_OFFLINE": "1"}
        environment |= {"SELFTEST_STOP": str(stop)}
        return run(SCRIPT, words, folder, seconds=seconds, environment=environment, cwd=self.folder)
