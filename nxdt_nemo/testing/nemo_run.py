"""The same tiny models through all of NeMo: MegatronGPTModel, MegatronTrainerBuilder, trainer.fit, data from .bin/.idx.

Room testing/. Upstream's calls only, in ranks whose pool was started with init="nxdt_nemo:activate" and group=False
(NeMo and the backend bring the ranks up). One run a process: NeMo keeps its sizes in module variables. Proof:
tests/testing/test_nemo_run.py.

    with RankPool(2, init=ACTIVE, env=ACTIVE_ENV, group=False) as pool:
        parts = pool.run("nxdt_nemo.testing.nemo_run:train", recipe, weights, layout, folder, {})
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nxdt_nemo.testing.ours import Part, gather_gradients, state_bytes
from nxdt_nemo.testing.recipe import Batch, Layout, Recipe, micro_batches
from nxdt_nemo.testing.weights import Ranks, global_names, load, piece

if TYPE_CHECKING:
    import torch

__all__ = ["NemoPart", "settings", "train", "write_text"]


@dataclass
class NemoPart(Part):
    """A Part, and on a first stage what NeMo read: batches[step][micro-batch], and the learning rate it used."""

    batches: list[list[Batch]] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)


def write_text(recipe: Recipe, folder: Path) -> str:
    """text.bin and text.idx: one document a micro-batch row, twice the tokens a run needs. Returns their prefix."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(folder / "text")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for step in range(2 * recipe.steps + 2):
        for batch in micro_batches(recipe, step):
            for row in batch.tokens:
                builder.add_document(torch.from_numpy(row), [len(row)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def train(
    recipe: Recipe,
    weights: dict[str, torch.Tensor],
    layout: Layout,
    folder: Path,
    changes: dict[str, Any],
    split_sums: bool = False,
) -> NemoPart:
    """One rank's part of a run of NeMo.

    changes     dotted keys over settings()
    split_sums  add matrix products up in another order, see _split_sums
    """
    from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
    from omegaconf import OmegaConf

    class Model(MegatronGPTModel):
        def _build_tokenizer(self) -> None:
            self.tokenizer = NullTokenizer(recipe.vocab - 1)

    cfg = OmegaConf.create(settings(recipe, layout, folder))
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value)
    trainer = MegatronTrainerBuilder(cfg).create_trainer(callbacks=[])
    model = Model(cfg.model, trainer)
    load(_chunks(model), weights, recipe.gated, Ranks.here())
    report = NemoPart(Ranks.here().tp[0])
    trainer.callbacks.append(_recorder(report, recipe, weights))
    with _split_sums() if split_sums else nullcontext():
        trainer.fit(model)
    return report


def _split_sums() -> AbstractContextManager[Any]:
    """Each product with a weight as two half sums, each rounded, then added: as two tensor-parallel ranks do.

    As valid an order as the usual one, so what it changes is the error that bf16 has anyway.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class SplitSums(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (torch.matmul, torch.Tensor.matmul) and args[1].dim() == 2 and args[1].shape[0] % 2 == 0:
                left, right = args[0].chunk(2, -1), args[1].chunk(2, 0)
                return torch.add(function(left[0], right[0]), function(left[1], right[1]))
            return function(*args, **(kwargs or {}))

    return SplitSums()


def _recorder(report: NemoPart, recipe: Recipe, weights: dict[str, torch.Tensor]) -> Any:
    """A callback that keeps what NeMo logs (on rank 0, where it does), the gradients of step 1, and the data."""
    from lightning.pytorch import Callback

    class Recorder(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            _chunks(module)[0].register_forward_pre_hook(self.read, with_kwargs=True)

        def on_train_batch_start(self, *_: Any) -> None:
            report.batches.append([])

        def read(self, gpt: Any, args: Any, named: dict[str, Any]) -> None:
            if gpt.training and named.get("input_ids") is not None and named.get("labels") is not None:
                report.batches[-1].append(Batch(named["input_ids"].numpy().copy(), named["labels"].numpy().copy()))

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            if hasattr(optimizer, "mcore_optimizer"):  # NeMo does not log this one's norm
                optimizer.mcore_optimizer.prepare_grads()
                report.grad_norms.append(float(optimizer.mcore_optimizer.get_grad_norm()))
            report.lrs.append(optimizer.param_groups[0]["lr"])  # exact: what NeMo logs is rounded to float32
            if not report.grads:
                _reduce(module._optimizer)
                ranks = Ranks.here()
                named = global_names(_chunks(module), weights, ranks)
                report.grads = [(n, piece(n, p, _gradient(p), recipe.gated, ranks)) for n, p in named]

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.is_global_zero:
                logged = trainer.callback_metrics
                report.losses.append(float(logged["reduced_train_loss"]))
                if "grad_norm" in logged:
                    report.grad_norms.append(float(logged["grad_norm"]))

        def on_train_end(self, trainer: Any, module: Any) -> None:
            optimizer = module._optimizer
            report.state_bytes = state_bytes(getattr(optimizer, "mcore_optimizer", optimizer), _chunks(module))

    return Recorder()


def _reduce(optimizer: Any) -> None:
    """Wait for a reduction that is under way, and make sharded gradients whole."""
    for wait in ("get_parameters_with_grad", "grad_sync"):
        if hasattr(optimizer, wait):
            getattr(optimizer, wait)()
    gather_gradients(getattr(optimizer, "mcore_optimizer", optimizer))


def _gradient(parameter: Any) -> torch.Tensor:
    """float32: the master gradient where NeMo keeps one (megatron_amp_O2)."""
    main = getattr(parameter, "main_grad", None)
    return (main if main is not None else parameter.grad).float()  # type: ignore[no-any-return]


def _chunks(model: Any) -> list[Any]:
    """The GPTModels inside NeMo's and megatron-core's wrappers: one, or a pipeline rank's chunks."""
    found = []
    for inner in model.model if isinstance(model.model, list) else [model.model]:
        while hasattr(inner, "module"):
            inner = inner.module
        found.append(inner)
    return found


def settings(recipe: Recipe, layout: Layout, folder: Path) -> dict[str, Any]:
    """NeMo's configuration of a recipe in a layout: what megatron_gpt_config.yaml would say."""
    return {
        "trainer": {
            "accelerator": "neuron",
            "devices": layout.world,
            "num_nodes": 1,
            "precision": "bf16" if recipe.dtype == "bfloat16" else 32,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "max_epochs": -1,
            "max_steps": recipe.steps,
            "log_every_n_steps": 1,
            "val_check_interval": recipe.steps,
            "limit_val_batches": 1,
            "limit_test_batches": 1,
            "num_sanity_val_steps": 0,
            "accumulate_grad_batches": 1,
            "gradient_clip_val": recipe.clip,
            "benchmark": False,
        },
        "exp_manager": None,
        "model": _model(recipe, layout) | {"data": _data(recipe, folder), "optim": _optim(recipe)},
    }


def _model(recipe: Recipe, layout: Layout) -> dict[str, Any]:
    llama = recipe.gated
    experts = {
        "num_moe_experts": recipe.experts,
        "moe_router_topk": 2,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.02,
        "moe_z_loss_coeff": 1e-3,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": False,
    }
    return (experts if recipe.experts else {}) | {
        "mcore_gpt": True,
        "micro_batch_size": recipe.micro_batch,
        "global_batch_size": recipe.micro_batch * recipe.micro_batches,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp or None,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "num_layers_in_first_pipeline_stage": layout.first or None,
        "sequence_parallel": layout.sp,
        "encoder_seq_length": recipe.seq,
        "max_position_embeddings": recipe.seq,
        "num_layers": recipe.layers,
        "hidden_size": recipe.hidden,
        "ffn_hidden_size": recipe.ffn,
        "num_attention_heads": recipe.heads,
        "num_query_groups": recipe.kv_groups,
        "normalization": "rmsnorm" if llama else "layernorm",
        "activation": "fast-swiglu" if llama else "gelu",
        "bias": not llama,
        "layernorm_epsilon": 1e-5,
        "position_embedding_type": "rope" if llama else "learned_absolute",
        "rotary_percentage": 1.0,
        "share_embeddings_and_output_weights": not llama,
        "make_vocab_size_divisible_by": recipe.vocab // layout.tp,
        "init_method_std": recipe.init_std,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "transformer_block_type": "pre_ln",
        "apply_query_key_layer_scaling": False,
        "pre_process": True,
        "post_process": True,
        "tokenizer": {"library": "null", "model": None, "vocab_file": None, "merge_file": None},
        "megatron_amp_O2": recipe.dtype == "bfloat16",
        "bias_activation_fusion": True,
        "bias_dropout_add_fusion": True,
        "masked_softmax_fusion": True,
        "get_attention_mask_from_fusion": True,
        "transformer_engine": False,
        "gradient_accumulation_fusion": False,
        "grad_div_ar_fusion": False,
        "gradient_as_bucket_view": True,
        "use_cpu_initialization": True,
        "seed": recipe.seed,
        "resume_from_checkpoint": None,
    }


def _data(recipe: Recipe, folder: Path) -> dict[str, Any]:
    return {
        "data_prefix": [1.0, str(folder / "text")],
        "index_mapping_dir": str(folder),
        "data_impl": "mmap",
        "splits_string": "80,10,10",
        "seq_length": recipe.seq,
        "skip_warmup": True,
        "num_workers": 0,
        "dataloader_type": "single",
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
    }


def _optim(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": "fused_adam",
        "lr": recipe.lr,
        "weight_decay": recipe.weight_decay,
        "betas": list(recipe.betas),
        "sched": {
            "name": "CosineAnnealing",
            "warmup_steps": recipe.warmup,
            "constant_steps": 0,
            "min_lr": recipe.min_lr,
        },
    }
