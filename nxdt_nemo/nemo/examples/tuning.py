"""What the scripts that begin from a model have in common: upstream's calls in upstream's order.

Room nemo/. As NeMo's megatron_gpt_finetuning.py: all weights are trained, or the adapters that model.peft.peft_scheme
names. Proof: tests/nemo/test_run_config.py, tests/nemo/test_preference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronLMPPTrainerBuilder
from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig

from nxdt_nemo.errors import ConfigError

__all__ = ["tune"]


def tune(cfg: DictConfig, kind: Any, what: str, callbacks: Sequence[Callback] = ()) -> Any:
    """Train a model of class `kind` from model.restore_from_path, with Lightning's callbacks; returns it.

    what  the workflow's name. Raises ConfigError where the configuration names no base model.
    """
    base = cfg.model.get("restore_from_path")
    if base is None:
        raise ConfigError(
            f"model.restore_from_path is not set, and {what} begins from a model",
            fix="name a .nemo, or a folder of Hugging Face's or Megatron's",
        )
    trainer = MegatronLMPPTrainerBuilder(cfg).create_trainer(list(callbacks))
    exp_manager(trainer, cfg.get("exp_manager"))
    settings = kind.merge_cfg_with(base, cfg)
    model = kind.restore_from(base, settings, trainer=trainer)
    peft = cfg.model.get("peft") or {}
    scheme, trained = PEFT_CONFIG_MAP[peft.get("peft_scheme")], peft.get("restore_from_path")
    if scheme is not None and trained is not None:
        model.load_adapters(trained, scheme(settings))
    elif scheme is not None:
        model.add_adapter(scheme(settings))
    trainer.fit(model)
    return model
