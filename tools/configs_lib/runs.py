"""Runs of NeMo by forks of one process that has imported it: two ranks each, as torchrun would start them.

Importing NeMo costs more than the three steps. The functions at the end are NeMo's own scripts, call for call.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nxdt_nemo._resources import folder as resource
from nxdt_nemo.config.compositions import PRIMARY

SECONDS = 900
REFUSED = "nxdt-nemo: "


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its losses, or the line that refused it, or the last lines of a failure."""

    losses: tuple[float, ...] = ()
    refused: str = ""
    failed: str = ""

    @property
    def trained(self) -> bool:
        """Three steps, each with a finite loss."""
        return len(self.losses) == 3 and all(math.isfinite(loss) for loss in self.losses)


def run(kind: str, arguments: list[str], folder: Path, save_to: Path | None = None) -> Outcome:
    """One job on two ranks. kind: one of SCRIPTS; save_to: where its model goes as a .nemo."""
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    ranks = {_start(rank, port, kind, arguments, folder, save_to): rank for rank in range(2)}
    failed = _wait(ranks, time.monotonic() + SECONDS)
    said = (folder / "rank0.log").read_text(errors="replace").splitlines()
    refused = [line for line in said if line.startswith(REFUSED)]
    if refused:
        return Outcome(refused=refused[-1].removeprefix(REFUSED))
    if failed:
        logs = "\n".join((folder / f"rank{rank}.log").read_text(errors="replace") for rank in failed)
        return Outcome(failed="\n".join(logs.splitlines()[-12:]))
    return Outcome(losses=tuple(_losses(folder)))


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(rank: int, port: int, kind: str, arguments: list[str], folder: Path, save_to: Path | None) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with (folder / f"rank{rank}.log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.environ["HYDRA_FULL_ERROR"] = "1"
        _as_torchrun(rank, port)
        os.chdir(folder)
        _train(kind, arguments, save_to)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _as_torchrun(rank: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "configs",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _wait(ranks: dict[int, int], until: float) -> list[int]:
    """Until all have ended; the ranks that did not end well. One failure ends the others."""
    left, failed = dict(ranks), []
    while left:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in left:
            rank = left.pop(child)
            if status:
                failed.append(rank)
                until = min(until, time.monotonic() + 10)
        elif time.monotonic() > until:
            for pid in left:
                os.kill(pid, 9)
            failed += [rank for rank in left.values() if not failed]
            until = math.inf
        else:
            time.sleep(0.05)
    return sorted(failed)


def _losses(folder: Path) -> list[float]:
    from nxdt_nemo.testing.script_run import Run

    curve = Run(0, "", folder).curve()
    return [curve[step] for step in sorted(curve)]


# --- NeMo's scripts -----------------------------------------------------------------------------------------------


def preload() -> None:
    """Arm the backend and import what all of the scripts do."""
    import nxdt_nemo

    os.environ["NXDT_NEMO_RUNTIME"] = "cpu"
    nxdt_nemo.activate("cpu")
    import nemo.collections.nlp.models.language_modeling.megatron_bert_model
    import nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model
    import nemo.collections.nlp.models.language_modeling.megatron_t5_model
    import nemo.collections.nlp.parts.megatron_trainer_builder
    import nemo.collections.nlp.parts.peft_config
    import nemo.utils.exp_manager  # noqa: F401


def _train(kind: str, arguments: list[str], save_to: Path | None) -> None:
    from nemo.core.config import hydra_runner

    def main(cfg: Any) -> None:
        model = SCRIPTS[kind](cfg)
        if save_to is not None:
            model.save_to(str(save_to))

    sys.argv[:] = ["train", *arguments]
    try:
        hydra_runner(config_path=str(resource("configs")), config_name=PRIMARY)(main)()
    except SystemExit as left:
        if left.code:
            raise


def _gpt(cfg: Any) -> Any:
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder

    return _fit(cfg, MegatronTrainerBuilder, MegatronGPTModel)


def _bert(cfg: Any) -> Any:
    from nemo.collections.nlp.models.language_modeling.megatron_bert_model import MegatronBertModel
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronBertTrainerBuilder

    return _fit(cfg, MegatronBertTrainerBuilder, MegatronBertModel)


def _t5(cfg: Any) -> Any:
    from nemo.collections.nlp.models.language_modeling.megatron_t5_model import MegatronT5Model
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronT5TrainerBuilder

    return _fit(cfg, MegatronT5TrainerBuilder, MegatronT5Model)


def _fit(cfg: Any, builder: Any, model: Any) -> Any:
    from nemo.utils.exp_manager import exp_manager

    trainer = builder(cfg).create_trainer()
    exp_manager(trainer, cfg.exp_manager)
    made = model(cfg.model, trainer)
    trainer.fit(made)
    return made


def _tuning(cfg: Any) -> Any:
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import MegatronGPTSFTModel
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronLMPPTrainerBuilder
    from nemo.collections.nlp.parts.peft_config import PEFT_CONFIG_MAP
    from nemo.utils.exp_manager import exp_manager

    trainer = MegatronLMPPTrainerBuilder(cfg).create_trainer()
    exp_manager(trainer, cfg.exp_manager)
    model_cfg = MegatronGPTSFTModel.merge_cfg_with(cfg.model.restore_from_path, cfg)
    model = MegatronGPTSFTModel.restore_from(cfg.model.restore_from_path, model_cfg, trainer=trainer)
    adapters = PEFT_CONFIG_MAP[cfg.model.peft.peft_scheme]
    if adapters is not None:
        model.add_adapter(adapters(model_cfg))
    trainer.fit(model)
    return model


def _alignment(cfg: Any) -> Any:
    from nxdt_nemo.nemo.examples.megatron_alignment import train

    return train(cfg)


SCRIPTS = {"gpt": _gpt, "bert": _bert, "t5": _t5, "tuning": _tuning, "alignment": _alignment}
