"""The configurations that we ship: which models, targets and workflows there are, and which of them go together.

Room config/ (leaf). Reads the folder configs/: a file is an option, its first comment says what it is. Stands in for
nothing upstream. May import the standard library and nxdt_nemo._resources. Proof: tests/config/test_compositions.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from nxdt_nemo._resources import folder

__all__ = ["GROUPS", "PREFERENCES", "PRIMARY", "SCRIPTS", "Composition", "about", "compositions", "options"]

PRIMARY = "train"
GROUPS = ("model", "target", "workflow")
# NeMo's script for a workflow; BERT and T5 have one of their own, for pretraining.
SCRIPTS = {
    "pretrain": "megatron_gpt_pretraining.py",
    "sft": "tuning/megatron_gpt_finetuning.py",
    "lora": "tuning/megatron_gpt_finetuning.py",
    "dpo": "",
    "orpo": "",
}
OWN_SCRIPT = {"bert": "megatron_bert_pretraining.py", "t5": "megatron_t5_pretraining.py"}
PREFERENCES = ("dpo", "orpo")  # trained by a script of ours: NeMo 2.4 has none


@dataclass(frozen=True, order=True)
class Composition:
    """One choice of each group."""

    model: str
    target: str
    workflow: str

    def __str__(self) -> str:
        return f"model={self.model} target={self.target} workflow={self.workflow}"

    @property
    def overrides(self) -> list[str]:
        """As hydra takes them."""
        return str(self).split()

    @property
    def script(self) -> str:
        """NeMo's script under examples/nlp/language_modeling; "" where NeMo 2.4 has none."""
        return OWN_SCRIPT.get(self.model) or SCRIPTS[self.workflow]

    @property
    def fits(self) -> bool:
        """False for an encoder with a workflow of decoders."""
        return self.workflow == "pretrain" or self.model not in OWN_SCRIPT


def options(group: str) -> list[str]:
    """The names of a group's files, workflows and targets in the order of their use."""
    order = [*SCRIPTS, "trn1", "trn2", "cpu"]
    names = [file.stem for file in (folder("configs") / group).glob("*.yaml")]
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def about(group: str, name: str) -> str:
    """The first sentence of a file's comment."""
    lines = (folder("configs") / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    text = " ".join(line.removeprefix("#").strip() for line in itertools.takewhile(_is_comment, lines[1:]))
    return text.split(". ")[0].split(": ")[0].rstrip(".")


def _is_comment(line: str) -> bool:
    return line.startswith("#")


def compositions(**chosen: str) -> Iterator[Composition]:
    """All that fit together, or those with the named options: compositions(target="trn2")."""
    for names in itertools.product(*(options(group) for group in GROUPS)):
        found = Composition(*names)
        if found.fits and all(getattr(found, group) == name for group, name in chosen.items()):
            yield found
