"""Checkpoints that a configuration names and NeMo cannot read, imported before the script's main function sees them.

Room nemo/. No patch of its own: hydra_runner.py hands over the composed configuration, and three of its keys are given
the path of the import instead. A folder is enough: NeMo's restore_from reads one in place, without unpacking.

    model.restore_from_path             weights: a `.nemo` folder
    model.restore_from_ckpt             weights and optimizer, of a new run: a training checkpoint of NeMo's
    exp_manager.resume_from_checkpoint  the same, and training goes on: its step and samples too

What NeMo reads by itself stays as it is. Proof: tests/nemo/test_restore.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import gcd
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from nxdt_nemo import console
from nxdt_nemo.checkpoint import formats
from nxdt_nemo.checkpoint.dialects import megatron_args, nemo_config
from nxdt_nemo.checkpoint.dtypes import BFLOAT16, FLOAT32
from nxdt_nemo.checkpoint.formats import nemo
from nxdt_nemo.checkpoint.formats.base import Options, Source, Target
from nxdt_nemo.checkpoint.imported import Imported, imported
from nxdt_nemo.checkpoint.layout import Layout
from nxdt_nemo.checkpoint.model import Model
from nxdt_nemo.checkpoint.tensors import KINDS
from nxdt_nemo.config.view import View
from nxdt_nemo.errors import ConfigError, UserError

__all__ = ["KEYS", "import_checkpoints"]

PATH, CKPT, RESUME = "model.restore_from_path", "model.restore_from_ckpt", "exp_manager.resume_from_checkpoint"
KEYS = (PATH, CKPT, RESUME)

# What of a model has to be as in the checkpoint, and the key that says it.
_SAID = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "groups": "num_query_groups",
    "head_size": "kv_channels",
    "ffn": "ffn_hidden_size",
    "expert_ffn": "moe_ffn_hidden_size",
    "experts": "num_moe_experts",
    "norm": "normalization",
    "activation": "activation",
    "bias": "bias",
    "tied": "share_embeddings_and_output_weights",
    "learned_positions": "position_embedding_type",
    "qk_norm": "qk_layernorm",
    "rope_base": "rotary_base",
    "rope_fraction": "rotary_percentage",
}


def import_checkpoints(cfg: DictConfig) -> None:
    """Give the keys of KEYS the path of what NeMo can read. Raises ConfigError naming the key for what cannot be."""
    for key in KEYS:
        said = OmegaConf.select(cfg, key, throw_on_missing=False)
        if not isinstance(said, str) or not said or "://" in said:
            continue
        path = Path(said).expanduser().absolute()
        try:
            if not _foreign(key, path, cfg):
                continue
            found = _imported(key, path, cfg)
        except UserError as error:
            place = f"{key}={said}" if error.place in ("", str(path)) else f"{key}: {error.place}"
            raise ConfigError(error.reason, place=place, fix=error.fix) from error
        if found.report is not None:
            report = found.report
            what = f"{report.source.format}, {report.source.family.name}, {report.bytes / 1e9:.2f} GB"
            console.notice(f"{key}: imported {said} ({what}) as {found.path} in {report.seconds:.1f} s")
            for note in report.notes:
                console.notice(f"{key}: {note}")
        else:
            console.notice(f"{key}: {said} was imported before, as {found.path}")
        with open_dict(cfg):
            OmegaConf.update(cfg, key, str(found.path), merge=False)


def _foreign(key: str, path: Path, cfg: DictConfig) -> bool:
    """True if NeMo cannot read it by itself."""
    if key != PATH and not (OmegaConf.select(cfg, "model.mcore_gpt") and path.exists()):
        return False  # a model that is none of ours; or a rank's folder that NeMo puts into the name
    if not path.exists():
        raise UserError("is not there", place=str(path), fix="name a checkpoint")
    name = formats.find(path)
    if key != PATH:
        return name != "nemo_dist"
    if name != "nemo":
        return True
    try:
        return nemo.is_gpt_by_rank(path)
    except UserError:  # compressed, or of another kind: NeMo may know it
        return False


def _imported(key: str, path: Path, cfg: DictConfig) -> Imported:
    whole = key != PATH
    kinds = KINDS if whole else KINDS[:1]
    dtype = None
    if whole:  # a run has main parameters, or its parameters are these
        dtype = BFLOAT16 if OmegaConf.select(cfg, "model.megatron_amp_O2") else FLOAT32

    def target(source: Source) -> Target:
        divisible_by = OmegaConf.select(cfg, "model.make_vocab_size_divisible_by") or 128
        groups = _groups(source.model, cfg) if whole else 0
        extra = {"groups": groups} if groups else {}
        return Target(_layout(source.model, cfg), dtype, kinds, int(divisible_by), extra)

    def check(source: Source) -> None:
        if whole and not {"exp_avg", "exp_avg_sq"} <= source.catalog.kinds():
            fix = f"take the weights alone: {PATH}"
            raise UserError(f"has no optimizer state, which {key} restores too", place=str(path), fix=fix)
        _compare(source, cfg)

    return imported(
        path,
        "nemo_dist" if whole else "nemo",
        [path.parent, *_of_run(cfg)],
        Options(optimizer=whole),
        target,
        key=(dtype, OmegaConf.select(cfg, "model.optim.name")) if whole else None,
        check=check,
        say=console.notice,
        workers=min(8, os.cpu_count() or 1),
    )


def _of_run(cfg: DictConfig) -> Iterator[Path]:
    """Where the run writes, for sources that lie where nobody may write."""
    for key in ("exp_manager.explicit_log_dir", "exp_manager.exp_dir"):
        if folder := OmegaConf.select(cfg, key, throw_on_missing=False):
            yield Path(str(folder)).absolute() / "imported"
            return


def _layout(model: Model, cfg: DictConfig) -> Layout:
    """Chunks as the run's ranks read them, where the model can be cut so; other layouts read them as well."""
    tp = gcd(_size(cfg, "tensor_model_parallel_size"), model.groups, model.ffn, model.expert_ffn or model.ffn)
    ep = gcd(_size(cfg, "expert_model_parallel_size"), model.experts) if model.experts else 1
    pp = gcd(_size(cfg, "pipeline_model_parallel_size"), model.layers)
    return Layout(tp, pp, 1, ep)


def _groups(model: Model, cfg: DictConfig) -> int:
    """Parameter groups of NeMo's optimizers: weights, experts where they are spread, biases; 0 for Megatron's own."""
    if OmegaConf.select(cfg, "model.optim.name") == "mcore_distributed_optim":
        return 0
    experts = bool(model.experts) and _size(cfg, "expert_model_parallel_size") > 1
    biases = model.bias or model.qkv_bias or model.norm == "LayerNorm"
    biases = biases and not OmegaConf.select(cfg, "model.do_layer_norm_weight_decay")
    return 1 + experts + biases


def _size(cfg: DictConfig, name: str) -> int:
    return int(OmegaConf.select(cfg, f"model.{name}") or 1)


def _compare(source: Source, cfg: DictConfig) -> None:
    """Raises UserError with all keys in which the configuration describes another model than the checkpoint's.

    NeMo lets the configuration win, and megatron-core then reports a shape, or nothing at all for a switch.
    """
    view = View(cfg)
    said: dict[str, Any] = {str(key): view.get(f"model.{key}") for key in cfg.model}
    if not isinstance(said.get("num_layers"), int):
        return  # a configuration for fine-tuning leaves the model to the checkpoint
    model = source.model
    args = {"padded_vocab_size": model.vocab, **nemo_config.args_of(said)}
    wanted = megatron_args.from_args(args, "model")
    theirs = nemo_config.config_of(model, Layout(), {}, source.dtype)
    differ = [
        f"model.{key}={said.get(key)} ({theirs.get(key)} in the checkpoint)"
        for name, key in _SAID.items()
        if key in said and _differ(name, wanted, model)
    ]
    if differ:
        reason = f"is of another model than {', '.join(differ)}"
        raise UserError(reason, place=str(source.path), fix="use the checkpoint's values")


def _differ(name: str, wanted: Model, model: Model) -> bool:
    if name == "ffn" and model.experts:
        return (wanted.expert_ffn or wanted.ffn) != (model.expert_ffn or model.ffn)
    if name.startswith("rope_") and model.learned_positions:
        return False
    return bool(getattr(wanted, name) != getattr(model, name))
