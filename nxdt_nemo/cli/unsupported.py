"""NeMo's scripts that cannot run on this backend, refused by what stands in them, before anything is imported.

Room cli/. Imports no torch. docs/results/scripts.md has all of examples/nlp/language_modeling. Proof:
tests/cli/test_unsupported.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nxdt_nemo.errors import UserError

__all__ = ["PRETENDED_RANKS", "Refusal", "refuse", "refused"]


@dataclass(frozen=True)
class Refusal:
    """Why a script with `sign` in its text cannot run, and what to do instead.

    sign  a regular expression over the script's bytes
    """

    sign: bytes
    reason: str
    fix: str


CONVERT = "nxdt-nemo ckpt convert MODEL TARGET"
OTHER_MODEL = "use a model of megatron-core's GPT, BERT or T5 kind"
PRETENDED_RANKS = Refusal(
    rb"NEMO_MEGATRON_MODEL_PARALLEL_APPSTATE_OVERRIDE",
    "stands for one rank after another in a single process, which this backend's process groups cannot",
    f"cut the model another way: {CONVERT}.nemo --to nemo --tp N --pp M",
)
REFUSALS = (
    Refusal(rb"megatron_mamba_(sft_)?model", "Mamba needs the CUDA kernels of mamba-ssm", OTHER_MODEL),
    PRETENDED_RANKS,
    Refusal(rb"megatron_griffin_sft_model", "Griffin needs the Triton kernel of accelerated-scan", OTHER_MODEL),
    Refusal(
        rb"megatron_retro_model",
        "NeMo builds Retro of TransformerEngine's layers only",
        OTHER_MODEL,
    ),
    Refusal(
        rb"= MegatronRetrievalModel\(|= MegatronRe\w+Model\.restore_from\(",
        "this Retro has no megatron-core kind, and NeMo's own layers do not run on this backend",
        OTHER_MODEL,
    ),
    Refusal(
        rb"import BERTLMModel",
        "its data set, lm_bert_dataset, is not in NeMo any more",
        "use megatron_bert_pretraining.py",
    ),
    Refusal(
        rb"\bNLPPrecisionPlugin\b",
        "imports NLPPrecisionPlugin, which NeMo no longer has",
        "use megatron_gpt_validate.py",
    ),
    Refusal(
        rb"megatron\.core\.inference\.inference_model_wrappers",
        "imports megatron.core.inference.inference_model_wrappers, which megatron-core no longer has",
        "use megatron_gpt_eval.py or tuning/megatron_gpt_generate.py",
    ),
    Refusal(
        rb"modelopt\.torch\.(distill|prune)",
        "takes Model Optimizer's layers, which are not among this backend's",
        "drop layers with megatron_gpt_drop_layers.py, train with megatron_gpt_pretraining.py",
    ),
    Refusal(
        rb"nemo\.export\.quantize",
        "quantizes for TensorRT-LLM, whose engines are for NVIDIA's GPUs",
        f"{CONVERT} --to hf, and quantize that for the device that serves it",
    ),
    Refusal(
        rb"cfg\.export_options\.onnx_opset",
        "exports ONNX for TensorRT, which is for NVIDIA's GPUs",
        f"{CONVERT} --to hf",
    ),
)


def refused(text: bytes) -> Refusal | None:
    """What speaks against a script with this text; None for most."""
    return next((refusal for refusal in REFUSALS if re.search(refusal.sign, text)), None)


def refuse(script: Path, text: bytes) -> None:
    """Raise UserError for a script that cannot run."""
    found = refused(text)
    if found is not None:
        raise UserError(found.reason, place=str(script), fix=found.fix)
