"""Supervised fine-tuning from YAML: what `nxdt-nemo run --config FILE` starts for a file with `model.data.train_ds`.

Room nemo/. Stands in for examples/nlp/language_modeling/tuning/megatron_gpt_finetuning.py, which is not in NeMo's
wheel, and for NxD Training's SFT, which needs its package. Upstream's calls in upstream's order: all weights, or the
adapters that model.peft.peft_scheme names. Proof: tests/nemo/test_run_config.py.
"""

from __future__ import annotations

import torch.multiprocessing as mp
from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronLMPPTrainerBuilder
from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig

from nxdt_nemo.errors import ConfigError

# As upstream's scripts: data workers of a process with a device client are not forked.
mp.set_start_method("spawn", force=True)


@hydra_runner(config_path=".", config_name="--config-name")  # type: ignore[untyped-decorator]
def main(cfg: DictConfig) -> None:
    """Tune the model of a configuration. Raises ConfigError where it names no base model."""
    base = cfg.model.get("restore_from_path")
    if base is None:
        raise ConfigError(
            "model.restore_from_path is not set, and tuning begins from a model",
            fix="name a .nemo, or a folder of Hugging Face's or Megatron's",
        )
    trainer = MegatronLMPPTrainerBuilder(cfg).create_trainer()
    exp_manager(trainer, cfg.get("exp_manager"))
    settings = MegatronGPTSFTModel.merge_cfg_with(base, cfg)
    model = MegatronGPTSFTModel.restore_from(base, settings, trainer=trainer)
    peft = cfg.model.get("peft") or {}
    scheme, trained = PEFT_CONFIG_MAP[peft.get("peft_scheme")], peft.get("restore_from_path")
    if scheme is not None and trained is not None:
        model.load_adapters(trained, scheme(settings))
    elif scheme is not None:
        model.add_adapter(scheme(settings))
    trainer.fit(model)


if __name__ == "__main__":
    main()
