"""What is run: scripts whose layouts are compared with one rank, and jobs that have to end well."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FAMILIES", "JOBS", "Family", "Job", "Layout"]


@dataclass(frozen=True)
class Layout:
    """How a script goes on from one rank's checkpoint. `mistake`: it has to differ from one rank."""

    name: str
    ranks: int
    words: str
    mistake: bool = False


@dataclass(frozen=True)
class Family:
    """A script with all its arguments but the layout's.

    first, then  what makes its first steps and saves, and what goes on to the last one
    tolerance    relative, of each step's loss
    ends         what it says after training where a layout ends with exit code 1, and may
    """

    key: str
    script: str
    words: str
    first: str
    then: str
    tolerance: float
    layouts: tuple[Layout, ...]
    ends: str = ""


@dataclass(frozen=True)
class Job:
    """One run.

    fixed  what of its size is written in the script
    ends   what it says after training where it ends with exit code 1, and may
    """

    key: str
    script: str
    words: str
    ranks: int = 1
    fixed: str = ""
    ends: str = ""


def _layouts(devices: str, **words: str) -> tuple[Layout, ...]:
    return tuple(Layout(name.replace("_", "+"), 2, f"{devices} {text}") for name, text in words.items())


OURS = _layouts(
    "devices=2",
    tp2="tensor_model_parallel_size=2",
    tp2_sp="tensor_model_parallel_size=2 sequence_parallel=True",
    pp2="pipeline_model_parallel_size=2",
    pp2_vpp="pipeline_model_parallel_size=2 virtual_pipeline_model_parallel_size=2",
    cp2="context_parallel_size=2",
    dp2_zero="zero=True",
)
# NeMo looks for adapters among a model's names, where an interleaved one has its chunks: it saves and loads none.
ADAPTERS = tuple(layout for layout in OURS if "vpp" not in layout.name)
WRONG = Layout("gradients clipped at a tenth", 1, "clip=0.1", mistake=True)  # the rate is the checkpoint's
RECIPE = _layouts(
    "--devices 2",
    tp2_sp="--tp 2 --sp 1 --cp 1",
    pp2_vpp="--tp 1 --pp 2 --vp 2 --cp 1",
    cp2="--tp 1 --cp 2",
)
SCRIPTS = _layouts("--devices 2", tp2="--tp_size 2", pp2="--pp_size 2", dp2="")
ONE = Layout("resumed", 1, "")
BFLOAT = 5e-3
TUNED = "source={inputs}/imported data={inputs}/nemo/datasets/dolly folder={folder}"
FINETUNING = "--restore_path {inputs}/imported_fixed --experiment_dir {folder} --mbs 2"
CORPUS = (
    "--data-path {inputs}/corpus/text_document --tokenizer-path {inputs}/corpus/tokenizer.model "
    "--index-mapping-dir {folder}/index --seq-length 16 --experiment-dir {folder} --max-steps 4"
)
FOUR, EIGHT = "steps=4", "steps=8"

FAMILIES = (
    Family("pretrain-gpt", "pretraining.py", "family=gpt folder={folder}", FOUR, EIGHT, 1e-6, (*OURS, WRONG)),
    Family("pretrain-llama", "pretraining.py", "family=llama folder={folder}", FOUR, EIGHT, 1e-6, OURS),
    Family("tune-sft", "tuning.py", f"{TUNED} peft=none", FOUR, EIGHT, 1e-6, (*OURS, WRONG)),
    Family("tune-lora", "tuning.py", f"{TUNED} peft=lora", FOUR, EIGHT, 1e-6, (*ADAPTERS, WRONG)),
    Family(
        "recipe",
        "llama3_pretraining.py",
        CORPUS,
        "--early-stop 2 --devices 1 --cp 1",
        "--devices 1 --cp 1",
        BFLOAT,
        RECIPE,
        ends="Wrong number of .distcp files, Expected: 4 Found: 2",
    ),
    Family("sft", "gpt_finetuning.py", f"{FINETUNING} --peft none", "--max_steps 3", "--max_steps 6", BFLOAT, SCRIPTS),
    Family("lora", "gpt_finetuning.py", f"{FINETUNING} --peft lora", "--max_steps 3", "--max_steps 6", BFLOAT, SCRIPTS),
)

MEGATRON = "{inputs}/torch/megatron/megatron-gpt-345m"
WORDS = f"--data-path {{inputs}}/numbers --vocab-path {MEGATRON}_vocab --merges-path {MEGATRON}_merges"
BERT = "--max_steps 1 --experiment_dir {folder}"
SMALLER = "smaller.py"
SCRIPT = "{checkout}/tests/collections/llm"
COMMAND = (
    "llm pretrain --factory llama3_8b(dir='{folder}',num_gpus_per_node=1) model.config.num_layers=2 "
    "model.config.hidden_size=64 model.config.ffn_hidden_size=176 model.config.num_attention_heads=4 "
    "model.config.num_query_groups=2 model.config.seq_length=64 data.seq_length=64 data.global_batch_size=4 "
    "data.num_workers=0 trainer.max_steps=3 trainer.val_check_interval=3 trainer.limit_val_batches=1 "
    "trainer.log_every_n_steps=1 trainer.strategy.context_parallel_size=1 -y"
)
BERT_SIZE = "110 million parameters, 8 samples of 512"

JOBS = (
    Job("recipe-direct", "recipe.py", "direct {folder}"),
    Job("recipe-performance", "recipe.py", "fast {folder}"),
    Job("recipe-local", "recipe.py", "local {folder}", 2),
    Job("recipe-finetune", "recipe.py", "finetune {folder} {inputs}/imported"),
    Job("command", "nemo", COMMAND),
    Job("bert", "bert_pretraining.py", f"{BERT} --type huggingface", 1, BERT_SIZE),
    Job("bert-tp2", "bert_pretraining.py", f"{BERT} --type megatron --tp_size 2 --devices 2", 2, BERT_SIZE),
    Job(
        "mixtral",
        "megatron_mixtral_pretraining.py",
        f"{WORDS} --devices 1 --experiment-dir {{folder}}/made",
        ends="Expected optimizer.state.fp32_param.module.output_layer.weight shapes to match torch.Size([50304, 128])",
    ),
    Job(
        "mistral",
        "lora_mistralai.py",
        "--model mistral --max-steps 1 --mbs 1 --gbs 1",
        1,
        "Mistral 7B, two layers of it",
    ),
    Job(
        "gpt",
        SMALLER,
        f"{SCRIPT}/megatron_gpt_pretraining.py {WORDS} --devices 1 --max-steps 3 --experiment-dir {{folder}}",
    ),
    Job(
        "t5",
        SMALLER,
        f"{SCRIPT}/megatron_t5_pretraining.py --data-path mock --devices 1 --max-steps 3 --experiment-dir {{folder}}",
    ),
)
