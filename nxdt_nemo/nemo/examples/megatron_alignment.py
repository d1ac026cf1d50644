"""Preference training from YAML: what `nxdt-nemo run --config FILE` starts for a file with `neuron.alignment.dpo` or
`orpo`.

Room nemo/. Stands in for NxD Training's examples/training.py with `model_alignment_strategy`, which needs its package
and trl; NeMo 2.4 has no script for it. The order of calls is megatron_gpt_finetuning.py's: all weights, or the adapters
that model.peft.peft_scheme names. Proof: tests/nemo/test_preference.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.multiprocessing as mp
from lightning.pytorch import Callback
from nemo.core.config import hydra_runner
from omegaconf import DictConfig, OmegaConf, open_dict

from nxdt_nemo.nemo.alignment.model import MegatronGPTPreferenceModel
from nxdt_nemo.nemo.examples.tuning import tune

# As upstream's scripts: data workers of a process with a device client are not forked.
mp.set_start_method("spawn", force=True)

# What MegatronGPTModel reads of model.data without a default.
DATA = {"dataloader_type": "single", "num_workers": 0}


@hydra_runner(config_path=".", config_name="--config-name")  # type: ignore[untyped-decorator]
def main(cfg: DictConfig) -> None:
    """Train the model of a configuration. Raises ConfigError where it names no base model."""
    train(cfg)


def train(cfg: DictConfig, callbacks: Sequence[Callback] = ()) -> MegatronGPTPreferenceModel:
    """The same for a configuration at hand, with Lightning's callbacks; returns the trained model."""
    found: MegatronGPTPreferenceModel = tune(settled(cfg), MegatronGPTPreferenceModel, "preference training", callbacks)
    return found


def settled(cfg: DictConfig) -> DictConfig:
    """The configuration with what NeMo reads and says nothing of, where it stands for preferences."""
    with open_dict(cfg):
        for name in ("micro_batch_size", "global_batch_size"):
            OmegaConf.update(cfg, f"model.data.train_ds.{name}", cfg.model[name], force_add=True)
        for name, value in DATA.items():
            if cfg.model.data.get(name) is None:
                cfg.model.data[name] = value
        cfg.model.alignment = OmegaConf.to_container(cfg.neuron.alignment, resolve=True)
    return cfg


if __name__ == "__main__":
    main()
