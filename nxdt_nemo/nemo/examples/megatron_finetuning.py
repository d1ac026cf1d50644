"""Supervised fine-tuning from YAML: what `nxdt-nemo run --config FILE` starts for a file with `model.data.train_ds`.

Room nemo/. Stands in for examples/nlp/language_modeling/tuning/megatron_gpt_finetuning.py, which is not in NeMo's
wheel, and for NxD Training's SFT, which needs its package. Upstream's calls in upstream's order: all weights, or the
adapters that model.peft.peft_scheme names. Proof: tests/nemo/test_run_config.py.
"""

from __future__ import annotations

import torch.multiprocessing as mp
from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel
from nemo.core.config import hydra_runner
from omegaconf import DictConfig

from nxdt_nemo.nemo.examples.tuning import tune

# As upstream's scripts: data workers of a process with a device client are not forked.
mp.set_start_method("spawn", force=True)


@hydra_runner(config_path=".", config_name="--config-name")  # type: ignore[untyped-decorator]
def main(cfg: DictConfig) -> None:
    """Tune the model of a configuration. Raises ConfigError where it names no base model."""
    tune(cfg, MegatronGPTSFTModel, "tuning")


if __name__ == "__main__":
    main()
