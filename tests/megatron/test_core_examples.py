"""docs/examples/core: a loop of one's own on megatron.core, with its GPT and with a model of no shipped family."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nxdt_nemo.audit.compile.short_run import read_counts
from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV, Part, assemble
from nxdt_nemo.testing.parity import Errors, errors

pytestmark = pytest.mark.ranks

CORE = Path(__file__).parents[2] / "docs" / "examples" / "core"
STEPS, TOLERANCE = 5, 1e-5
LAYOUTS = {  # name: arguments of the example's Layout
    "tp2": {"tensor": 2},
    "tp2sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "dp2": {},
    "dp2+zero": {"zero": True},
}


def trained(layout: dict[str, Any], fault: str) -> Part:
    """One rank's part of a run of the example's mixer."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from nxdt_nemo.testing.mistakes import Training, mistake
    from nxdt_nemo.testing.ours import forget_groups, gather_gradients
    from nxdt_nemo.testing.weights import Ranks, piece

    sys.path.insert(0, str(CORE))
    import training

    sys.path.remove(str(CORE))
    forget_groups()
    place = training.Layout(**layout)
    parallel_state.initialize_model_parallel(place.tensor, place.pipeline)
    model_parallel_cuda_manual_seed(training.SEED)
    config = training.config_of(place)
    model = training.build("mixer", config)
    replica, optimizer = training.wrap(model, config, place.zero)
    named, ranks = list(model.named_parameters()), Ranks.here()
    report = Part(ranks.tp[0])
    try:
        with mistake(fault, Training([model], [replica], optimizer, named)):
            for step in range(STEPS):
                losses = training.forward_backward(replica, optimizer, step)
                if losses:
                    report.losses.append(sum(losses) / len(losses))
                if not report.grads:
                    gather_gradients(optimizer)
                    report.grads = [(name, piece(name, p, p.main_grad, False, ranks)) for name, p in named]
                report.grad_norms.append(float(optimizer.step()[1]))
    finally:
        replica._modules.clear()
        forget_groups()
    return report


def of_layout(gloo, name: str, fault: str = "") -> Errors:
    """A layout against one rank: losses and grad norms of all steps, each parameter's gradient of the first."""
    world, layout = (2, LAYOUTS[name]) if name != "one" else (1, {})
    mine, copies = assemble(gloo(world, trained, layout, fault, init=ACTIVE, env=ACTIVE_ENV))
    one, _ = assemble(gloo(1, trained, {}, "", init=ACTIVE, env=ACTIVE_ENV))
    assert one.losses[0] == pytest.approx(math.log(256), rel=0.02)
    assert one.losses[0] - one.losses[-1] > 0.3, "nothing is learned: losses would say little"
    return errors(mine, one, copies)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_model_of_ones_own_is_the_same_in_every_layout(gloo, name: str) -> None:
    pytest.importorskip("megatron.core")
    found = of_layout(gloo, name)
    assert max(found.loss, found.norm, found.grad, found.copies) <= TOLERANCE, found


@pytest.mark.parametrize(
    "name, fault", [("tp2sp", "norm gradients not reduced"), ("dp2+zero", "replicas not averaged")]
)
def test_a_mistake_shows(gloo, name: str, fault: str) -> None:
    pytest.importorskip("megatron.core")
    found = of_layout(gloo, name, fault)
    assert max(found.loss, found.norm, found.grad) > 100 * TOLERANCE, found


def printed(*words: str, ranks: int = 1, **environ: str) -> list[float]:
    """The losses that the script prints."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    run = ["-m", "nxdt_nemo", "run"] if environ else []
    command = [sys.executable, *launcher, *run, str(CORE / "training.py"), *words]
    done = subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(loss) for loss in re.findall(r"step \d+ loss (\S+)", done.stdout)]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt", "mixer"])
def test_the_script_goes_on_from_one_ranks_checkpoint_in_every_layout(tmp_path: Path, model: str) -> None:
    def run(*words: str, ranks: int = 1) -> list[float]:
        return printed("--model", model, *words, ranks=ranks)

    begun = str(tmp_path / "begun")
    whole, _ = run(), run("--steps", "2", "--save", begun)
    for words in (
        ["--tensor", "2", "--sequence"],
        ["--pipeline", "2"],
        ["--zero"],
    ):
        assert run("--load", begun, *words, ranks=2) == pytest.approx(whole[2:], rel=1e-6), words


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("with_torch_xla")
def test_the_script_compiles_nothing_after_two_steps_where_steps_are_traced(tmp_path: Path) -> None:
    begun = str(tmp_path / "begun")
    printed("--steps", "1", "--save", begun)

    def graphs(steps: int) -> int:
        words, report = ["--load", begun, "--steps", str(1 + steps)], tmp_path / f"{steps}"
        report.mkdir()
        traced = {"NXDT_NEMO_RUNTIME": "xla", "NXDT_NEMO_COMPILE_REPORT": str(report)}
        assert printed(*words, **traced) == pytest.approx(printed(*words), rel=1e-6)
        return read_counts(report).graphs

    assert graphs(2) == graphs(7) > 1
