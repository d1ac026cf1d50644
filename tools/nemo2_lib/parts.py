"""What the scripts pretraining.py and tuning.py have in common: written for GPUs, as a user of NeMo 2.0 would."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.lightning.pytorch.optim.megatron import MegatronOptimizerModule


class Losses(Callback):
    """losses.json: what each step logged, in full digits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.found.append(float(trainer.callback_metrics["reduced_train_loss"]))
        if trainer.is_global_zero:
            self.path.write_text(json.dumps(self.found))


@dataclass
class Asked:
    """A script's arguments, each key=value: some of these fields, and keywords of nl.MegatronStrategy."""

    folder: str = ""
    steps: int = 0
    devices: int = 1
    family: str = "gpt"
    layers: int = 4
    precision: str = "32"
    zero: bool = False
    clip: float = 1.0
    source: str = ""
    data: str = ""
    peft: str = "none"
    strategy: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def here(cls) -> "Asked":
        """Those of this process."""
        asked = cls()
        for key, text in (word.split("=", 1) for word in sys.argv[1:]):
            if key in cls.__dataclass_fields__:
                kind = type(getattr(asked, key))
                setattr(asked, key, text == "True" if kind is bool else kind(text))
            else:
                asked.strategy[key] = int(text) if text.isdigit() else text == "True"
        return asked

    def arguments(self) -> dict[str, Any]:
        """Of llm.pretrain and llm.finetune: all but model, data and what is peculiar to one of them."""
        half, folder = self.precision == "bf16", Path(self.folder)
        trainer = nl.Trainer(
            devices=self.devices,
            max_steps=self.steps,
            accelerator="gpu",
            strategy=nl.MegatronStrategy(pipeline_dtype=torch.bfloat16 if half else torch.float32, **self.strategy),
            plugins=nl.MegatronMixedPrecision(precision="bf16-mixed") if half else None,
            callbacks=[Losses(folder / "losses.json")],
            log_every_n_steps=1,
            limit_val_batches=1,
            val_check_interval=2,
            num_sanity_val_steps=0,
        )
        checkpoint = nl.ModelCheckpoint(save_last=True, every_n_train_steps=self.steps, save_optim_on_train_end=True)
        named = {"clip_grad": self.clip, "use_distributed_optimizer": self.zero, "bf16": half}
        return {
            "trainer": trainer,
            "log": nl.NeMoLogger(log_dir=str(folder), ckpt=checkpoint, use_datetime_version=False),
            "optim": MegatronOptimizerModule(config=OptimizerConfig(optimizer="adam", lr=2e-3, **named)),
        }
