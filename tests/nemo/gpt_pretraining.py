"""GPT pretraining as a NeMo user writes it: upstream's calls in upstream's order, and no word about Trainium.

The backend must run it without an edit here. Tests start it with small models and `make demo` trains with it:

    nxdt-nemo run tests/nemo/gpt_pretraining.py --config-path=CONFIGS --config-name=demo_llama model...=...
"""

import torch.multiprocessing as mp
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig

mp.set_start_method("spawn", force=True)  # as the stock scripts do


@hydra_runner(config_path="../../configs", config_name="demo_llama")
def main(cfg: DictConfig) -> None:
    trainer = MegatronTrainerBuilder(cfg).create_trainer()
    exp_manager(trainer, cfg.exp_manager)
    trainer.fit(MegatronGPTModel(cfg.model, trainer))


if __name__ == "__main__":
    main()
