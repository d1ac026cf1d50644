"""NeMo's own restore_from, save_to and loading of checkpoints, on what a test laid out: `restore_nemo.py WORK`.

WORK has dist.nemo, legacy.nemo, ptl/*.ckpt and train/ (a training checkpoint). Writes NAME.pt, the state of each model
that was restored, and saved.nemo and legacy_saved.nemo, what NeMo saved of it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nxdt_nemo

nxdt_nemo.activate()

import torch  # noqa: E402
from lightning.pytorch import Trainer  # noqa: E402
from megatron.core.model_parallel_config import ModelParallelConfig  # noqa: E402
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel  # noqa: E402
from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy, NLPSaveRestoreConnector  # noqa: E402

work = Path(sys.argv[1])
# NeMo 2.4.1 takes this dataclass for a DictConfig in its own GPT, which it therefore cannot build.
ModelParallelConfig.get = lambda self, key, default=None: getattr(self, key, default)
trainer = Trainer(
    accelerator="neuron", devices=1, strategy=NLPDDPStrategy(), precision=32, logger=False, enable_checkpointing=False
)


def keep(model: Any, name: str) -> None:
    state = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    torch.save(state, work / f"{name}.pt")


def restored(name: str) -> Any:
    connector = NLPSaveRestoreConnector()
    model = MegatronGPTModel.restore_from(str(work / name), trainer=trainer, save_restore_connector=connector)
    keep(model, name.removesuffix(".nemo"))
    return model


core = restored("dist.nemo")
core.save_to(str(work / "saved.nemo"))
with torch.no_grad():
    for parameter in core.parameters():
        parameter.zero_()
trainer.strategy._lightning_module = core
core.on_load_checkpoint(trainer.strategy.load_checkpoint(str(work / "train"), load_optimizer_states=False))
keep(core, "train")

legacy = restored("legacy.nemo")
legacy.save_to(str(work / "legacy_saved.nemo"))
(path,) = (work / "ptl").glob("*.ckpt")
keep(MegatronGPTModel.load_from_checkpoint(str(path), trainer=trainer), "ptl")
