"""A base model of another tool, restored as NeMo's tuning/megatron_gpt_generate.py restores one, and asked.

QUESTIONS names a JSON file: {"prompts": [[token, ...], ...], "tokens": N, "pairs": [[before, scored], ...], "texts":
[...], "penalty": P}. Prints `found: {...}` on rank 0: greedy tokens of all prompts in one batch, samples by top-k,
top-p and temperature, the first prompt's with a penalty on repetition, log-likelihoods. With "batches" in it, of
prompts in each, only greedy tokens and samples of each batch, and on the xla lane what they made XLA do. With
"tasks", what lm-eval makes of them.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.multiprocessing as mp
from lightning.pytorch import seed_everything
from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel
from nemo.collections.nlp.modules.common import text_generation_utils
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from nemo.core.config import hydra_runner
from omegaconf import DictConfig

from nxdt_nemo.nemo.lm_eval import Scorer, as_lm
from nxdt_nemo.runtime.select import current

mp.set_start_method("spawn", force=True)
PLAIN = {
    "use_greedy": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "add_BOS": False,
    "all_probs": False,
    "compute_logprob": False,
    "end_strings": ["<|endoftext|>"],
}
SAMPLED = {
    "top_k 1": {"top_k": 1},
    "top_p 0": {"top_p": 1e-6},
    "cold": {"temperature": 1e-4},
    "hot": {"temperature": 2.0},
}


def counted(generate, batch):
    """Greedy tokens, samples of the whole and of no others, and the counters of XLA at the end."""
    found = {"greedy": generate(batch), "top_p 0": generate(batch, use_greedy=False, top_k=5, top_p=1e-6)}
    if current().name == "xla":
        from nxdt_nemo.runtime.xla.metrics import counters

        found["counters"] = counters()
    return found


def penalized(model, prompt, count, penalty):
    """By the function below model.generate, which gives back a prompt alone where NeMo applies the penalty."""
    inputs = torch.tensor([prompt + [0] * count]), torch.tensor([len(prompt)])
    sampling = {"top_k": 1, "repetition_penalty": penalty, "compute_logprob": True, "min_tokens_to_generate": count}
    said = text_generation_utils.generate(model, inputs, count, **sampling)
    return [int(token) for token in said["token_ids"][0]] if said is not None else None


@hydra_runner(config_path="../../configs", config_name="demo_llama")
def main(cfg: DictConfig) -> None:
    asked = json.loads(Path(os.environ["QUESTIONS"]).read_text())
    trainer = MegatronTrainerBuilder(cfg).create_trainer()
    settings = MegatronGPTSFTModel.merge_cfg_with(cfg.model.restore_from_path, cfg)
    model = MegatronGPTSFTModel.restore_from(cfg.model.restore_from_path, settings, trainer=trainer)
    model.freeze()

    def generate(prompts, **sampling):
        longest = max(map(len, prompts))
        rows = [prompt + [0] * (longest + asked["tokens"] - len(prompt)) for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        length = {"min_length": asked["tokens"], "max_length": asked["tokens"]}
        said = model.generate((torch.tensor(rows), lengths), length, PLAIN | sampling)
        return [[int(token) for token in row] for row in said["token_ids"]] if said is not None else None

    if "batches" in asked:
        print("found: " + json.dumps([counted(generate, batch) for batch in asked["batches"]]), flush=True)
        return
    if "tasks" in asked:
        from lm_eval import simple_evaluate

        made = simple_evaluate(model=as_lm(model, add_bos_token=asked["bos"]), tasks=asked["tasks"], bootstrap_iters=0)
        if trainer.is_global_zero:
            answers = {name: [row["resps"] for row in rows] for name, rows in made["samples"].items()}
            print("found: " + json.dumps({"results": made["results"], "answers": answers}), flush=True)
        return
    found = {"greedy": generate(asked["prompts"])}
    for name, sampling in SAMPLED.items():
        seed_everything(7)  # every rank draws the same
        found[name] = generate(asked["prompts"], use_greedy=False, **sampling)
    found["penalized"] = penalized(model, asked["prompts"][0], asked["tokens"], asked["penalty"])
    scorer = Scorer(model, batch=2)
    found["scores"] = scorer.scores(asked["pairs"])
    requests = [SimpleNamespace(args=tuple(text)) for text in asked["texts"]]
    found["likely"] = scorer.loglikelihood(requests)
    found["rolling"] = scorer.loglikelihood_rolling([SimpleNamespace(args=("".join(text),)) for text in asked["texts"]])
    wanted = {"until": ["\n"], "max_gen_toks": asked["tokens"]}
    found["answers"] = scorer.generate_until([SimpleNamespace(args=(text[0], wanted)) for text in asked["texts"]])
    if trainer.is_global_zero:
        print("found: " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
