"""NeMo's GPT, trained on pairs of answers by DPO or ORPO, in any layout that it pretrains in.

Room nemo/. Stands in for NxD Training's base_dpo.py and base_orpo.py. NeMo's own training step, schedules, optimizers
and checkpoints stay; what changes is the data, the loss of a micro-batch, and how many rows a micro-batch has: both
answers of a pair are rows. Log-probabilities come from the losses that megatron-core gives of each token, which its
vocabulary-parallel cross entropy has made whole on every rank. Proof: tests/nemo/test_preference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.modules.common.megatron.utils import average_losses_across_data_parallel_group
from nemo.collections.nlp.parts.mixins.nlp_adapter_mixins import NLPAdapterModelMixin
from omegaconf import DictConfig, open_dict
from torch import Tensor
from torch.func import functional_call

from nxdt_nemo import console
from nxdt_nemo.config.alignment import Alignment, Dpo, Orpo, prompt_length
from nxdt_nemo.errors import ConfigError
from nxdt_nemo.nemo.alignment.dataset import PreferenceDataset, Rows, read_pairs
from nxdt_nemo.nemo.alignment.losses import Answers, dpo, orpo

__all__ = ["MegatronGPTPreferenceModel"]

Batch = dict[str, Tensor]

# Micro-batches of one pass through the pipeline while the reference model is asked.
_AT_ONCE = 8


class MegatronGPTPreferenceModel(NLPAdapterModelMixin, MegatronGPTModel):
    """A GPT whose configuration has a section `alignment`, that of neuron.alignment.

    Samples, micro-batches and batches are counted in pairs. The reference model is the one that training begins from:
    what restore_from_path, and an adapter's restore_from_path, gave, also in a run that resumes.
    """

    def __init__(self, cfg: DictConfig, trainer: Any) -> None:
        super().__init__(cfg, trainer=trainer)
        said = Alignment.model_validate({key: dict(value) for key, value in cfg.alignment.items() if value is not None})
        method = said.dpo or said.orpo
        assert method is not None
        self._method: Dpo | Orpo = method
        self._logged: list[dict[str, Tensor]] = []
        self._kept: list[dict[str, Tensor]] = []
        self._before: dict[int, Batch] = {}  # of each chunk, what training changes, by name, as it was before

    # --- data ---------------------------------------------------------------------------------------------------------

    def build_train_valid_test_datasets(self) -> None:
        """The pairs of data.train_ds and, where it names files, data.validation_ds."""
        steps = int(self.trainer.max_steps)
        self._train_ds = self._dataset("train_ds", steps * int(self.cfg.global_batch_size))
        if (self.cfg.data.get("validation_ds") or {}).get("file_names"):
            self._validation_ds = self._dataset("validation_ds", 0)
        self._test_ds = None

    def _dataset(self, section: str, samples: int) -> PreferenceDataset:
        data, method = self.cfg.data[section], self._method
        files = [str(file) for file in data.file_names]
        pairs = read_pairs(files)
        if not pairs:
            raise ConfigError("has no pairs of answers", place=f"model.data.{section}.file_names={', '.join(files)}")
        rows = Rows(
            length=int(self.cfg.encoder_seq_length),
            prompt=prompt_length(method, int(self.cfg.encoder_seq_length)),
            keep=method.truncation_mode,
            bos=bool(data.get("add_bos", False)),
            eos=bool(data.get("add_eos", True)),
        )
        shuffle, seed = bool(data.get("shuffle", section == "train_ds")), int(self.cfg.get("seed", 1234))
        return PreferenceDataset(pairs, self.tokenizer, rows, samples=samples, shuffle=shuffle, seed=seed)

    def on_fit_start(self) -> None:
        """Take the reference: the base's weights are on the device, and no checkpoint is restored yet."""
        super().on_fit_start()
        if not isinstance(self._method, Dpo):
            return
        if self._method.precompute_ref_log_probs:
            for data in (self._train_ds, getattr(self, "_validation_ds", None)):
                if data is not None:
                    self._precompute(data)
        else:
            self._before = {
                number: {
                    name: parameter.detach().clone()
                    for name, parameter in _unwrapped(chunk)[0].named_parameters()
                    if parameter.requires_grad or not self.use_peft
                }
                for number, chunk in enumerate(self._chunks)
            }

    def _precompute(self, data: PreferenceDataset) -> None:
        """Fill data.reference for the pairs that are read: data-parallel ranks take turns, all learn the outcome."""
        size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        rows = int(self.cfg.micro_batch_size)
        read = data.read
        turns = -(-len(read) // (rows * size))
        mine = [read[(turn * size + rank) * rows + at :][:1] for turn in range(turns) for at in range(rows)]
        numbers = [found[0] if found else read[-1] for found in mine]  # the last turn is filled up: shapes stay
        console.notice(f"neuron.alignment.dpo: the reference model reads {len(read)} pairs")
        loads = (data.rows_of(number) for number in numbers)
        batches = (_stacked(islice(loads, rows)) for _ in range(turns))
        found: list[Tensor] = []
        while chunk := list(islice(batches, _AT_ONCE)):
            found += self._sums(chunk)
        table = torch.zeros(len(data.pairs), 2)
        for at, (number, real) in enumerate(zip(numbers, mine, strict=True)):
            if real:
                table[number] = found[at // rows][at % rows].cpu()
        if size > 1:
            table = table.to(self._on)
            torch.distributed.all_reduce(table, group=parallel_state.get_data_parallel_group())
        data.reference = table.cpu()

    # --- the model ----------------------------------------------------------------------------------------------------

    @property
    def _chunks(self) -> list[Any]:
        return self.model if isinstance(self.model, list) else [self.model]

    def _as_before(self, chunk: Any, given: dict[str, Any]) -> Tensor:
        """What a chunk says with the reference's weights. Parameters stay as they are: some are views of buffers."""
        inner, prefix = _unwrapped(chunk)
        (number,) = (number for number, mine in enumerate(self._chunks) if _unwrapped(mine)[0] is inner)
        weights = {f"{prefix}{name}": weight for name, weight in self._before[number].items()}
        said: Tensor = functional_call(chunk, weights, (), given)
        return said

    @property
    def _on(self) -> torch.device:
        return next(self._chunks[0].parameters()).device  # type: ignore[no-any-return]

    def fwd_bwd_step(self, dataloader_iter: Any, forward_only: bool, first_val_step: bool | None = None) -> Any:
        """Upstream's, with two rows for each pair, and with the reference model's word first where it is live."""
        batches = [_batch_of(next(dataloader_iter)) for _ in range(get_num_microbatches())]
        if self._before:
            for batch, sums in zip(batches, self._sums(batches, reference=True), strict=True):
                batch["reference"] = sums
        self._logged = []
        with self._rows():
            return super().fwd_bwd_step(iter(batches), forward_only, first_val_step)

    @contextmanager
    def _rows(self) -> Iterator[int]:
        """cfg.micro_batch_size as the pipeline has to know it."""
        pairs = int(self.cfg.micro_batch_size)
        with open_dict(self.cfg):
            self.cfg.micro_batch_size = 2 * pairs
        try:
            yield 2 * pairs
        finally:
            with open_dict(self.cfg):
                self.cfg.micro_batch_size = pairs

    def _sums(self, batches: list[Batch], *, reference: bool = False) -> list[Tensor]:
        """[P, 2] for each micro-batch, on every pipeline stage: answers' log-probabilities, nothing dropped out.

        reference  with the weights of before training, not today's
        """
        modes = [chunk.training for chunk in self._chunks]
        for chunk in self._chunks:
            chunk.eval()
        with torch.no_grad(), self._rows() as rows:
            said = get_forward_backward_func()(
                forward_step_func=self._forward(
                    lambda answers, batch: (answers.sums.sum(), {"sums": answers.sums}), reference=reference
                ),
                data_iterator=self._make_data_iterator_list(iter([dict(batch) for batch in batches])),
                model=self.model,
                num_microbatches=len(batches),
                forward_only=True,
                seq_length=self.cfg.encoder_seq_length,
                micro_batch_size=rows,
            )
        for chunk, mode in zip(self._chunks, modes, strict=True):
            chunk.train(mode)
        sums = torch.stack([found["sums"] for found in said]) if said else None
        if sums is None:
            sums = torch.zeros(len(batches), rows // 2, 2, device=self._on)
        return list(_from_last_stage(sums))

    def get_forward_output_and_loss_func(self, validation_step: bool = False, tuning: bool = False) -> Any:
        """The step that the schedules of megatron-core call for each micro-batch."""

        def of_pairs(answers: Answers, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            if isinstance(self._method, Dpo):
                loss, logged = dpo(answers, batch["reference"], self._method.kl_beta, self._method.loss_type)
            else:
                loss, logged = orpo(answers, self._method.beta)
            self._logged.append(logged)
            reduced = average_losses_across_data_parallel_group([loss])
            if validation_step and not self.validation_drop_last:
                return loss, {"loss_sum_and_ub_size": torch.stack([reduced[0] * len(answers.sums), _count(answers)])}
            return loss, {"avg": reduced}

        return self._forward(of_pairs)

    def _forward(
        self, finish: Callable[[Answers, Batch], tuple[Tensor, dict[str, Tensor]]], *, reference: bool = False
    ) -> Any:
        def step(batches: Any, model: Any, checkpoint_activations_all_layers: Any = None) -> Any:
            batch = {name: _flat(value).to(self._on) for name, value in _batch_of(next(batches)).items()}
            whole = {name: batch.pop(name) for name in ("reference",) if name in batch}
            masks = {"tokens": batch["loss_mask"].sum(1), "text": batch["text_mask"].sum(1)}
            part = self.get_batch_on_this_context_parallel_rank(batch)
            given = {
                "input_ids": part["tokens"],
                "position_ids": part["position_ids"],
                "attention_mask": None,
                "labels": part["labels"],
            }
            output = self._as_before(model, given) if reference else model(**given)

            def loss_of(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                log = -losses.float().view(part["loss_mask"].shape)
                answers = Answers(
                    sums=_over_context((log * part["loss_mask"]).sum(1)).view(-1, 2),
                    tokens=masks["tokens"].view(-1, 2),
                    text=_over_context((log * part["text_mask"]).sum(1)).view(-1, 2)[:, 0],
                    length=masks["text"].view(-1, 2)[:, 0],
                )
                return finish(answers, whole)

            return output, loss_of

        return step

    # --- what is logged -----------------------------------------------------------------------------------------------

    def training_step(self, dataloader_iter: Any) -> Any:
        """Upstream's, then the rewards of the step."""
        loss = super().training_step(dataloader_iter)
        self._log([self._mean(self._logged)], "")
        return loss

    def validation_step(self, dataloader_iter: Any, dataloader_idx: int = 0) -> Any:
        """Upstream's; the rewards are kept until the validation ends."""
        loss = super().validation_step(dataloader_iter, dataloader_idx)
        self._kept.append(self._mean(self._logged))
        return loss

    def on_validation_epoch_end(self) -> Any:
        """Upstream's val_loss, then the rewards as val_rewards/..."""
        loss = super().on_validation_epoch_end()
        self._log(self._kept, "val_")
        self._kept = []
        return loss

    @property
    def _names(self) -> list[str]:
        """What is logged, known on stages that compute no loss too."""
        pairs = Answers(*(torch.full(shape, -1.0) for shape in ((1, 2), (1, 2), (1,), (1,))))
        _, logged = dpo(pairs, pairs.sums, 1.0, "sigmoid") if isinstance(self._method, Dpo) else orpo(pairs, 1.0)
        return sorted(logged)

    def _mean(self, logged: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
        found = list(logged)
        return {name: torch.stack([each[name] for each in found]).mean() for name in self._names} if found else {}

    def _log(self, logged: list[dict[str, Tensor]], prefix: str) -> None:
        """Means over what is given, data-parallel ranks included; the last stage tells the others."""
        names = self._names
        means = self._mean(each for each in logged if each)
        values = torch.stack([means[name] for name in names]) if means else torch.zeros(len(names), device=self._on)
        if means and parallel_state.get_data_parallel_world_size() > 1:
            values = average_losses_across_data_parallel_group(list(values))
        values = _from_last_stage(values)
        for name, value in zip(names, values.unbind(), strict=True):
            self.log(f"{prefix}{name}", value, rank_zero_only=True, batch_size=1)


def _unwrapped(chunk: Any) -> tuple[Any, str]:
    """The GPTModel in what O2 and sharded optimizers put around it, and what its parameters' names begin with there."""
    prefix = ""
    while hasattr(chunk, "module"):
        chunk, prefix = chunk.module, f"{prefix}module."
    return chunk, prefix


def _batch_of(found: Any) -> Batch:
    """Lightning's fetcher gives (batch, its number, its loader's number)."""
    return dict(found[0] if isinstance(found, tuple) else found)


def _stacked(pairs: Iterable[Batch]) -> Batch:
    """A micro-batch of pairs, as a DataLoader makes it."""
    found = list(pairs)
    return {name: torch.stack([pair[name] for pair in found]) for name in found[0]}


def _flat(value: Tensor) -> Tensor:
    """[P, 2, S] as [2 P, S]; what is [P, 2] stays."""
    return value.flatten(0, 1) if value.dim() == 3 else value


def _count(answers: Answers) -> Tensor:
    return torch.full((), float(len(answers.sums)), device=answers.sums.device)


def _over_context(mine: Tensor) -> Tensor:
    """Add up over context-parallel ranks, each of which sees a part of a row; the gradient stays with its part."""
    if parallel_state.get_context_parallel_world_size() == 1:
        return mine
    total = mine.detach().clone()
    torch.distributed.all_reduce(total, group=parallel_state.get_context_parallel_group())
    return mine + (total - mine.detach())


def _from_last_stage(values: Tensor) -> Tensor:
    """What the last pipeline stage has, on all of them."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return values
    values = values.contiguous()
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(values, source, group=parallel_state.get_pipeline_model_parallel_group())
    return values
