"""Arming a process: who sees the backend and who does not, every way in, and taking it out again.

Scripts run in processes of their own. Each prints `name=value` lines with `say`, which the tests compare.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import nxdt_nemo

SAY = "import sys\ndef say(**found):\n    [print(f'{k}={v}', flush=True) for k, v in found.items()]\n"
DEVICE = "import torch\nsay(main=torch.cuda.current_device(), available=torch.cuda.is_available())\n"
Start = Callable[..., "Found"]


class Found(dict[str, str]):
    """What a script said, how it ended, and its stderr."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        super().__init__(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
        self.code, self.err = done.returncode, done.stderr


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """start("script.py", ..., NXDT_NEMO="1"): python with these arguments in tmp_path."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("NXDT_", "PYTHONPATH"))}

    def run(*arguments: str, **environment: str) -> Found:
        return Found(
            subprocess.run(
                [sys.executable, *arguments],
                env=inherited | {"NXDT_NEMO_RUNTIME": "cpu", "PYTHONPATH": str(tmp_path)} | environment,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=300,
            )
        )

    return run


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    def to(name: str, code: str) -> str:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text((SAY if file.name.startswith("script") else "") + textwrap.dedent(code))
        return name

    return to


# --- nobody else is touched ----------------------------------------------------------------------------

HELPER = """
    import torch, torchvision
    import transformers.models.t5.modeling_t5 as t5

    @torch.jit.script
    def scripted(n: int):
        return torch.zeros(n) + torch.arange(n) + torch.full([n], 2.0) + torch.ones(n, device=torch.device("cpu"))

    def train():
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        x = torch.randn(8, 3)
        losses = []
        for _ in range(5):
            loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def look():
        image = torchvision.transforms.Compose([
            torchvision.transforms.Resize(32), torchvision.transforms.Normalize([0.5] * 3, [0.5] * 3)
        ])(torch.rand(3, 48, 48))
        return tuple(torchvision.models.resnet18().eval()(image[None]).shape)

    def apex():
        try:
            import apex
        except ModuleNotFoundError as error:
            return str(error)

    def to_cuda():
        try:
            torch.zeros(1).cuda()
        except (RuntimeError, AssertionError) as error:
            return type(error).__name__
"""

BESIDE = """
    import helper
    import torch
    import apex

    losses = helper.train()
    say(
        scripted=helper.scripted(3).tolist(), graph="aten::zeros" in str(helper.scripted.graph),
        image=helper.look(), falls=losses[-1] < losses[0],
        norm=helper.t5.T5LayerNorm.__module__, apex=helper.apex(), main_apex=apex.__name__,
        available=helper.torch.cuda.is_available(), main_available=torch.cuda.is_available(),
        real=type(helper.torch).__name__, main=type(torch).__name__, registered="torch" in sys.modules,
        plain=type(sys.modules["torch"]).__name__, cuda=helper.to_cuda(), main_cuda=torch.zeros(1).cuda().device,
        xla="torch_xla" in sys.modules,
    )
"""


def test_a_users_own_torch_is_untouched(start, write):
    write("helper.py", HELPER)
    found = start(write("script.py", BESIDE), NXDT_NEMO="1")
    assert found.code == 0, found.err
    assert found["scripted"] == "[3.0, 4.0, 5.0]"
    assert (found["graph"], found["image"], found["falls"]) == ("True", "(1, 1000)", "True")
    assert found["norm"] == "transformers.models.t5.modeling_t5"
    assert (found["apex"], found["main_apex"]) == ("No module named 'apex'", "nxdt_nemo.apex")
    import torch

    assert found["available"] == str(torch.cuda.is_available())
    assert found["main_available"] == "True"
    assert (found["real"], found["plain"], found["main"]) == ("module", "module", "ModuleView")
    assert found["main_cuda"] == "cpu"
    # torch's own error, and where torch has CUDA and the machine has none our line, which is a RuntimeError too.
    assert found["cuda"] in ("None" if torch.cuda.is_available() else "AssertionError", "RuntimeError", "CudaError")
    assert found["xla"] == "None" or found["xla"] == "True"  # only a None that keeps it out


# --- ways in -------------------------------------------------------------------------------------------


def test_the_variable_arms_script_command_and_module(start, write):
    write("script.py", DEVICE)
    write("package/__init__.py", "")
    write("package/script_mod.py", DEVICE)
    for arguments in (("script.py",), ("-c", SAY + DEVICE), ("-m", "package.script_mod")):
        found = start(*arguments, NXDT_NEMO="1")
        assert (found.code, found.get("main"), found.get("available")) == (0, "cpu", "True"), (arguments, found.err)


@pytest.mark.parametrize("value", ["", "0"])
def test_without_the_variable_nothing_is_loaded(start, value):
    found = start("-c", SAY + "say(loaded=sorted(m for m in sys.modules if 'nxdt' in m))", NXDT_NEMO=value)
    assert found["loaded"] in ("[]", "['nxdt_nemo', 'nxdt_nemo._autoload', 'nxdt_nemo.console', 'nxdt_nemo.errors']")


IN_SCRIPT = """
    import builtins
    before = builtins.__import__
    import nxdt_nemo
    nxdt_nemo.activate()
    import multiprocessing, subprocess

    import torch
    say(main=torch.cuda.current_device(), view=type(torch).__name__)

    def in_function():
        import torch as again
        return again is torch

    def work(queue):
        queue.put((__name__, str(torch.cuda.current_device()), str(torch.ones(1, device="cuda").device)))

    if __name__ == "__main__":
        say(function=in_function())
        for method in ("spawn", "forkserver"):
            context = multiprocessing.get_context(method)
            queue = context.Queue()
            child = context.Process(target=work, args=(queue,))
            child.start()
            child.join(100)
            say(**{method: (queue.get(timeout=1) if child.exitcode == 0 else child.exitcode)})
        child = "import torch; print('child', torch.cuda.current_device(), sep='=')"
        print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout)
        nxdt_nemo.deactivate()
        import torch
        say(restored=builtins.__import__ is before, after=type(torch).__name__)
"""


def test_activate_in_the_script(start, write):
    found = start(write("script.py", IN_SCRIPT))
    assert found.code == 0, found.err
    assert (found["main"], found["view"], found["function"]) == ("cpu", "ModuleView", "True")
    assert found["spawn"] == "('__mp_main__', 'cpu', 'cpu')"
    assert found["forkserver"] == "('__mp_main__', 'cpu', 'cpu')"
    assert found["child"] == "cpu"
    assert (found["restored"], found["after"]) == ("True", "module")


# --- what goes wrong -----------------------------------------------------------------------------------


def test_too_late(start, write):
    write("nemo/__init__.py", "")
    found = start(
        write(
            "script.py",
            """
            import nemo, nxdt_nemo
            try:
                nxdt_nemo.activate()
            except nxdt_nemo.errors.UserError as error:
                say(error=error, active=nxdt_nemo.is_active())
            """,
        )
    )
    assert found.code == 0, found.err
    assert found["error"].startswith("nxdt_nemo.activate(): nemo was imported before the backend was activated; call")
    assert found["active"] == "False"


def test_an_error_at_start_is_one_line_on_rank_0(start):
    found = start("-c", "print('ran=yes')", NXDT_NEMO="1", NXDT_NEMO_RUNTIME="tpu")
    assert (found.code, dict(found)) == (2, {})
    assert found.err == "nxdt-nemo: NXDT_NEMO_RUNTIME=tpu: 'tpu' is not a lane; use auto, cpu, xla or neuron\n"
    other = start("-c", "print('ran=yes')", NXDT_NEMO="1", NXDT_NEMO_RUNTIME="tpu", RANK="1")
    assert (other.code, other.err) == (2, "")


def test_a_lane_that_cannot_start_leaves_nothing_behind(start):
    found = start(
        "-c",
        SAY
        + textwrap.dedent(
            """
            import builtins, os, types
            sys.modules["torch_xla"] = types.ModuleType("torch_xla")
            import nxdt_nemo
            from nxdt_nemo.errors import LaneError
            before = builtins.__import__, list(sys.meta_path), dict(os.environ), dict(vars(sys.modules["__main__"]))
            try:
                nxdt_nemo.activate("cpu")
            except LaneError as error:
                caught = error
            after = builtins.__import__, list(sys.meta_path), dict(os.environ), vars(sys.modules["__main__"])
            say(error=caught, active=nxdt_nemo.is_active(), same=before[:3] == after[:3],
                main=before[3]["__builtins__"] is after[3]["__builtins__"])
            """
        ),
    )
    assert found.code == 0, found.err
    assert "torch_xla is already loaded" in found["error"]
    assert (found["active"], found["same"], found["main"]) == ("False", "True", "True")


def test_an_installed_apex_and_transformer_engine_are_shadowed_once(start, write):
    for name in ("apex/__init__.py", "amp_C.py", "transformer_engine/__init__.py", "transformer_engine_torch.py"):
        write(name, "THEIRS = True\n")
    write("helper.py", "import apex, transformer_engine\nFOUND = apex.THEIRS and transformer_engine.THEIRS\n")
    write(
        "megatron/mine.py",  # megatron is a namespace package: this is a module of its scope
        """
        import apex, amp_C, importlib
        missing = []
        for name in ("transformer_engine", "transformer_engine_torch"):
            try:
                __import__(name)
            except ImportError:
                pass
            try:
                importlib.import_module(name)
            except ImportError as error:
                missing.append(error.name)
        """,
    )
    code = "import megatron.mine as mine, helper, apex\nsay(apex=mine.apex.__name__, c=mine.amp_C.__name__, \
missing=mine.missing, main=apex.__name__, helper=helper.FOUND)\n"
    found = start(write("script.py", code), NXDT_NEMO="1")
    assert found.code == 0, found.err
    assert (found["apex"], found["c"]) == ("nxdt_nemo.apex", "nxdt_nemo.apex.amp_C")
    assert found["missing"] == "['transformer_engine', 'transformer_engine_torch']"
    assert (found["main"], found["helper"]) == ("nxdt_nemo.apex", "True")
    lines = [line for line in found.err.splitlines() if "is not used" in line]
    assert len(lines) == 2, found.err
    assert sum("installed apex" in line for line in lines) == 1
    assert sum("installed transformer_engine" in line for line in lines) == 1


def test_a_traceback_through_upstream_shows_no_frame_of_ours(start, write):
    write("nemo/__init__.py", "from nemo.inner import x\n")
    write("nemo/inner.py", "import nemo.innermost\n")
    write("nemo/innermost.py", "y = 1\nraise RuntimeError('in upstream')\n")
    found = start(write("script.py", "import nemo\n"), NXDT_NEMO="1")
    assert found.code == 1
    assert found.err.rstrip().endswith("RuntimeError: in upstream")
    shown = [line.strip() for line in found.err.splitlines() if line.strip().startswith("File")]
    assert [Path(line.split('"')[1]).name for line in shown] == ["script.py", "__init__.py", "inner.py", "innermost.py"]


# --- and out again, with the real upstream -------------------------------------------------------------

OUT = """
    import builtins, os
    from nxdt_nemo.runtime.keep_out import keep_out
    keep_out("torch_xla")  # accelerate would load it
    import torch, lightning.pytorch, lightning.pytorch.accelerators as accelerators
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

    def ours_on_path():
        return [type(finder).__name__ for finder in sys.meta_path if "nxdt" in type(finder).__module__]

    def marks():
        return {
            "import": builtins.__import__, "path": ours_on_path(), "environment": dict(os.environ),
            "builtins": globals()["__builtins__"], "tensor": torch.Tensor.cuda, "module": torch.nn.Module.cuda,
            "lightning": lightning.pytorch.LightningModule.cuda,
            "own": "cuda" in vars(torch.Tensor), "connector": vars(_AcceleratorConnector)["__init__"],
            "registry": sorted(accelerators.AcceleratorRegistry.available_accelerators()),
            "hook": sys.excepthook, "kept": {n for n in sys.modules if sys.modules[n] is None},
        }

    def changed(before):
        after = marks()
        return sorted(name for name in before if before[name] != after[name])

    import nxdt_nemo
    before = marks()
    nxdt_nemo.activate("cpu")
    nxdt_nemo.activate("cpu")
    armed = changed(before)
    from nemo.collections.nlp.models.language_modeling import megatron_gpt_model as model
    from nemo.collections.nlp.parts import megatron_trainer_builder as builder, nlp_overrides
    from megatron.core import utils as core
    import megatron.core.tensor_parallel.random as random

    def upstream():
        return {
            "strategy": nlp_overrides.NLPDDPStrategy.__module__, "by_value": builder.NLPDDPStrategy.__module__,
            "specs": model.get_specs.__module__,
            "fork": random.CudaRNGStatesTracker.fork.__module__, "cuda": torch_of(core).cuda.is_available(),
        }

    def torch_of(module):
        return vars(module)["torch"]

    say(armed=armed, on=upstream())
    nxdt_nemo.deactivate()
    say(left=changed(before), off=upstream(), active=nxdt_nemo.is_active())
    nxdt_nemo.deactivate()
    say(left_again=changed(before))
    nxdt_nemo.activate("cpu")
    say(armed_again=changed(before) == armed, on_again=upstream())
    nxdt_nemo.deactivate()
    say(left_at_last=changed(before), off_again=upstream())

    # Upstream that came in between has seen the real torch.
    for name in [name for name in sys.modules if name == "nemo"]:
        del sys.modules[name]
    import nemo
    try:
        nxdt_nemo.activate("cpu")
    except nxdt_nemo.errors.UserError as error:
        say(late=error, left_then=changed(before))
"""


def test_deactivate_gives_everything_back(start, write):
    found = start(write("script.py", OUT))
    assert found.code == 0, found.err
    wanted = {"builtins", "connector", "environment", "import", "kept", "lightning", "module", "own", "path"}
    wanted |= {"registry", "tensor"}
    assert set(eval(found["armed"])) == wanted
    on, off = eval(found["on"]), eval(found["off"])
    assert all(name == "cuda" or place.startswith("nxdt_nemo.") for name, place in on.items()), on
    assert on["cuda"] is True
    assert all(name == "cuda" or place.startswith(("nemo.", "megatron.")) for name, place in off.items()), off
    import torch

    assert off["cuda"] is torch.cuda.is_available()
    assert found["left"] == found["left_again"] == found["left_at_last"] == found["left_then"] == "[]"
    assert found["active"] == "False"
    assert found["armed_again"] == "True"
    assert eval(found["on_again"]) == on
    assert eval(found["off_again"]) == off
    assert "nemo was imported before the backend was activated" in found["late"]


def test_views_needs_an_active_backend():
    from nxdt_nemo import _activation

    assert not nxdt_nemo.is_active()
    with pytest.raises(RuntimeError, match="not active"):
        _activation.views()
