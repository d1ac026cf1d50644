"""The training step of one rank of a world, lowered through NeMo itself and run by nobody.

Room audit/. NeMo's MegatronGPTModel, trainer and strategy are built as for a run, by the config; trainer.fit goes as
far as the end of the first steps, where the graphs are taken (runtime/xla/world.py). The data are blank, and a
tokenizer that is not there is replaced by its size. Proof: tests/audit/test_audit.py.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from nxdt_nemo.audit.hlo import Graph
from nxdt_nemo.errors import ConfigError, UserError
from nxdt_nemo.runtime import current

__all__ = ["STEPS", "Lowered", "lower"]

STEPS = 2  # the second has all state that the first makes: rotary angles, sums of Lightning's


@dataclass(frozen=True)
class Lowered:
    """What a rank would run.

    step        graphs of the last step, in order
    distinct    graphs that are compiled until then, those of the set-up left out
    stage       (pipeline rank, pipeline size)
    parameters  numbers in the model's parameters on this rank
    vocab       rows of the vocabulary that are this rank's
    fallbacks   operations of the last step that fall off XLA, by name
    reads       where the last step reads a tensor of the device that the host gave it: file:line, how often
    """

    rank: int
    world: int
    step: tuple[Graph, ...]
    distinct: int
    stage: tuple[int, int]
    parameters: int
    vocab: int
    fallbacks: Mapping[str, int]
    reads: Mapping[str, int]


class _Enough(Exception):
    """Not an error: the steps that were asked for are traced."""


def lower(config: Any, rank: int, world: int, steps: int = STEPS) -> Lowered:
    """Lower the step of one rank.

    config   a NeMo configuration, resolved (omegaconf)
    steps    that are traced; the last is read
    Needs the xla lane, torch_xla and NeMo, and a process without ranks. Raises UserError for what a run would refuse,
    and for a tensor that a step computes and reads on the host, by file and line. torch_xla ends the process by a
    signal where an operation falls off XLA that needs what a step computes: see apart.py.
    """
    from nxdt_nemo.runtime.xla.in_graph import Replicas
    from nxdt_nemo.runtime.xla.metrics import since
    from nxdt_nemo.runtime.xla.world import Recorder, pretend

    config = _shortened(config, steps)
    recorder, seen = Recorder(), _Seen()
    recorder.reading = False
    lane: Any = current()

    with (
        _as_rank(config, rank, world),
        pretend(lane, rank, world, Replicas(), recorder.cut),
        _unverified(),
        _reads() as reads,
    ):
        try:
            model, trainer = _build(config)
            trainer.callbacks.append(_counting(steps, recorder, seen, reads))
            with suppress(_Enough):
                trainer.fit(model)
            stage, count = _stage(), sum(one.numel() for one in model.parameters())
            vocab = int(model.padded_vocab_size) // int(config.model.get("tensor_model_parallel_size") or 1)
        finally:
            _forget()
    return Lowered(
        rank,
        world,
        tuple(Graph(text) for text in recorder.graphs[seen.first :]),
        len(set(recorder.keys)),
        stage,
        count,
        vocab,
        {name: number for name, number in since(seen.before).items() if name.startswith("aten::")},
        dict(reads.found),
    )


@dataclass
class _Seen:
    """Where the last step begins: the recorder's graph, torch_xla's counters."""

    first: int = 0
    before: Mapping[str, int] = field(default_factory=dict)


SHORT = {
    "max_epochs": -1,
    "limit_val_batches": 0,
    "limit_test_batches": 0,
    "num_sanity_val_steps": 0,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def _shortened(config: Any, steps: int) -> Any:
    """The config for some steps that leave nothing behind; weights are not read."""
    from omegaconf import OmegaConf, open_dict

    short = OmegaConf.create(_filled(OmegaConf.to_container(config, resolve=True)))
    with open_dict(short):
        short.trainer.update(SHORT | {"max_steps": steps + 1, "val_check_interval": steps + 1})
        short.trainer.accelerator = "neuron"
        short.exp_manager = None
        short.model.restore_from_path = short.model.resume_from_checkpoint = None
        short.model.use_cpu_initialization = False
        short.model.data.num_workers = 0
    return short


def _counting(steps: int, recorder: Any, seen: _Seen, reads: _Reads) -> Any:
    """A callback that leaves out what is before the first step, reads the last one, and ends there."""
    from lightning.pytorch import Callback

    from nxdt_nemo.runtime.xla.metrics import counters

    class Counting(Callback):
        done = 0

        def on_train_batch_start(self, *_: Any) -> None:
            if self.done == 0:
                recorder.forget()  # weights and moments: contents that nobody needs
                reads.in_step = True
            if self.done == steps - 1:
                recorder.reading, seen.first, seen.before = True, len(recorder.keys), counters()
                reads.found.clear()

        def on_train_batch_end(self, *_: Any) -> None:
            self.done += 1
            if self.done == steps:
                raise _Enough

    return Counting()


def _filled(value: Any) -> Any:
    """Values that are still to be given are paths and names, which nothing here reads."""
    if isinstance(value, dict):
        return {key: _filled(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_filled(one) for one in value]
    return "none given" if value == "???" else value


READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "equal", "nonzero")


@dataclass
class _Reads:
    """Where tensors of the device were read, and whether it is a step that reads."""

    found: Counter[str] = field(default_factory=Counter)
    in_step: bool = False

    def note(self, name: str, tensor: Any) -> None:
        """Raises UserError by file and line for what a step computes: a run would cut its graph there."""
        from nxdt_nemo.runtime.xla.world import is_given

        place = _caller()
        self.found[place] += 1
        if self.in_step and not is_given(tensor):
            reason = f"a step reads a tensor of the device there ({name}), which ends its graph"
            raise UserError(reason, place=place, fix="keep it on the device")


@contextmanager
def _reads() -> Iterator[_Reads]:
    """Note where tensors of the device are read."""
    import torch

    from nxdt_nemo.runtime.xla.reading import names_host

    reads = _Reads()

    def there(one: Any) -> bool:
        return isinstance(one, torch.Tensor) and one.device.type == "xla"

    def noting(name: str, method: Any) -> Any:
        def read(self: Any, *args: Any, **named: Any) -> Any:
            if there(self):
                reads.note(name, self)
            return method(self, *args, **named)

        return read

    def to(self: Any, *args: Any, **named: Any) -> Any:
        if there(self) and names_host(args, named):
            reads.note("to", self)
        return saved[torch.Tensor, "to"](self, *args, **named)

    def copy_(self: Any, src: Any, *args: Any, **named: Any) -> Any:
        if there(src) and not there(self):
            reads.note("copy_", src)
        return saved[torch.Tensor, "copy_"](self, src, *args, **named)

    places: list[tuple[Any, str]] = [*((torch.Tensor, name) for name in READS), (torch, "equal"), (torch, "nonzero")]
    moves: list[tuple[Any, str]] = [(torch.Tensor, "to"), (torch.Tensor, "copy_")]
    saved = {(where, name): getattr(where, name) for where, name in places + moves}
    for where, name in places:
        setattr(where, name, noting(name, saved[where, name]))
    for (where, name), method in zip(moves, (to, copy_), strict=True):
        setattr(where, name, method)
    try:
        yield reads
    finally:
        for (where, name), method in saved.items():
            setattr(where, name, method)


def _caller() -> str:
    """The line outside torch and this file that asked."""
    frames = reversed(traceback.extract_stack(limit=16))
    frame = next((one for one in frames if "/torch/" not in one.filename and one.filename != __file__), None)
    return f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno}" if frame else "?"


@contextmanager
def _as_rank(config: Any, rank: int, world: int) -> Iterator[None]:
    """The environment of a rank that torchrun started."""
    local = int(config.trainer.devices)
    told = {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": rank % local,
        "LOCAL_WORLD_SIZE": local,
        "GROUP_RANK": rank // local,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 1,
        "TORCHELASTIC_RUN_ID": "audit",
    }
    saved = {name: os.environ.get(name) for name in told}
    os.environ.update({name: str(value) for name, value in told.items()})
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _unverified() -> Iterator[None]:
    """torch's DistributedDataParallel, which NeMo puts around a model without main weights, asks all ranks for the
    shapes of their parameters, and reads the answer in C++: nobody is there to differ."""
    from torch.nn.parallel import distributed

    asks = distributed._verify_param_shape_across_processes  # type: ignore[attr-defined]
    distributed._verify_param_shape_across_processes = lambda *_, **__: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        distributed._verify_param_shape_across_processes = asks  # type: ignore[attr-defined]


def _build(config: Any) -> tuple[Any, Any]:
    vocabulary = (config.get("neuron") or {}).get("vocab_size")
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
    from nemo.utils import logging as nemo_logging

    nemo_logging.set_verbosity(nemo_logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # else GPU, TPU and HPU for each rank and size

    class Model(MegatronGPTModel):
        def _build_tokenizer(self) -> None:
            self.tokenizer = _tokenizer(self._cfg, vocabulary)

        def build_train_valid_test_datasets(self) -> Any:
            self._train_ds = self._validation_ds = self._test_ds = _Blank(self.cfg)
            return self._train_ds, self._validation_ds, self._test_ds

    trainer = MegatronTrainerBuilder(config).create_trainer(callbacks=[])
    trainer.strategy.broadcast = lambda obj, src=0: obj
    trainer._teardown = lambda: None  # it would bring logged values and the optimizer's tensors to the host
    return Model(config.model, trainer), trainer


def _tokenizer(model: Any, size: int | None) -> Any:
    """One of the size that the config says, else that its files have."""
    from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer

    size = size or model.get("override_vocab_size") or model.tokenizer.get("vocab_size")
    if size:
        return NullTokenizer(int(size) - 1)
    from nemo.collections.nlp.modules.common.tokenizer_utils import get_nmt_tokenizer

    try:
        return get_nmt_tokenizer(
            library=model.tokenizer.library,
            model_name=model.tokenizer.get("type"),
            tokenizer_model=model.tokenizer.get("model"),
            vocab_file=model.tokenizer.get("vocab_file"),
            merges_file=model.tokenizer.get("merge_file"),
        )
    except Exception as error:
        reason = f"the tokenizer cannot be made ({str(error).splitlines()[0]})"
        raise ConfigError(reason, place="model.tokenizer", fix="tell its size: +neuron.vocab_size=128256") from None


class _Blank:
    """A dataset of zeros, in the shape of megatron-core's GPT dataset."""

    def __init__(self, model: Any) -> None:
        self._seq = int(model.data.get("seq_length") or model.encoder_seq_length)
        self._masked = not model.get("get_attention_mask_from_fusion", True)

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, _: int) -> dict[str, Any]:
        import torch

        ids = torch.zeros(self._seq, dtype=torch.int64)
        item = {
            "tokens": ids,
            "labels": ids,
            "loss_mask": torch.ones(self._seq),
            "position_ids": torch.arange(self._seq),
        }
        if self._masked:
            item["attention_mask"] = torch.ones(1, self._seq, self._seq, dtype=torch.bool).triu(1)
        return item


def _forget() -> None:
    """Let the next rank begin anew: NeMo keeps sizes in a singleton, megatron-core in module variables, where the
    balancing losses of each layer add up too."""
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
    from nemo.utils import AppState
    from nemo.utils.metaclasses import Singleton

    parallel_state.destroy_model_parallel()
    unset_num_microbatches_calculator()
    get_moe_layer_wise_logging_tracker().clear()
    Singleton._Singleton__instances.pop(AppState, None)


def _stage() -> tuple[int, int]:
    from megatron.core import parallel_state

    return (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
