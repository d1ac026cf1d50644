"""Pretraining from YAML: what `nxdt-nemo run --config FILE` starts, as a script of its own.

Room nemo/. Stands in for examples/nlp/language_modeling/megatron_{gpt,bert,t5}_pretraining.py, which are not in NeMo's
wheel, and for the training scripts of NNM and NxD Training, which need their packages. Upstream's calls in upstream's
order; which model is what the configuration says, and whether its weights are those of model.restore_from_path. Alone
in its folder: Python puts a script's folder first on sys.path.
Proof: tests/nemo/test_run_config.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.multiprocessing as mp
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig

from nxdt_nemo.errors import ConfigError

# As upstream's scripts: data workers of a process with a device client are not forked.
mp.set_start_method("spawn", force=True)


@hydra_runner(config_path=".", config_name="--config-name")  # type: ignore[untyped-decorator]
def main(cfg: DictConfig) -> None:
    """Train the model of a configuration. Raises ConfigError for a workflow that is not pretraining."""
    _refuse(cfg)
    if cfg.model.get("mcore_t5", False):
        from nemo.collections.nlp.models.language_modeling.megatron_t5_model import MegatronT5Model as Model
        from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronT5TrainerBuilder as Builder
    elif cfg.model.get("mcore_bert", False):
        from nemo.collections.nlp.models.language_modeling.megatron_bert_model import MegatronBertModel as Model
        from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronBertTrainerBuilder as Builder
    else:
        Model = _gpt(cfg)
        from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder as Builder
    trainer = Builder(cfg).create_trainer()
    exp_manager(trainer, cfg.get("exp_manager"))
    if cfg.model.get("restore_from_ckpt") is not None:
        trainer.ckpt_path = Path(cfg.model.restore_from_ckpt)
    weights = cfg.model.get("restore_from_path")
    begun = Model(cfg.model, trainer) if weights is None else Model.restore_from(weights, cfg.model, trainer=trainer)
    trainer.fit(begun)


def _gpt(cfg: DictConfig) -> Any:
    """NeMo's GPT, or the same on rows of token ids."""
    if cfg.model.data.get("data_impl") == "arrow":
        from nxdt_nemo.nemo.token_rows import MegatronGPTRowsModel

        return MegatronGPTRowsModel
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel

    return MegatronGPTModel


def _refuse(cfg: DictConfig) -> None:
    """Alignment and adapters are no pretraining; and a run begins from one place."""
    section = cfg.get("neuron") or {}
    asked = [f"neuron.alignment.{name}" for name in section.get("alignment") or {}]
    if (cfg.model.get("peft") or {}).get("peft_scheme") not in (None, "none"):
        asked.append("model.peft")
    if asked:
        raise ConfigError(
            f"{' and '.join(asked)}: there is no model.data.train_ds to tune with",
            fix="leave the section out to pretrain",
        )
    if cfg.model.get("restore_from_path") is not None and cfg.model.get("restore_from_ckpt") is not None:
        text = "model.restore_from_path and model.restore_from_ckpt are both set, and a run begins from one of them"
        raise ConfigError(text, fix="leave model.restore_from_path out to restore the optimizer too")


if __name__ == "__main__":
    main()
