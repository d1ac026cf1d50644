"""torch.cuda and device="cuda" as modules in scope see them, on the cpu lane; the real torch stays as it is."""

from __future__ import annotations

import ast
import io
import multiprocessing
import pickle
import time
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdt_nemo.errors import CudaError, NotOnNeuron
from nxdt_nemo.patching.view import ModuleView, Views
from nxdt_nemo.runtime.select import forget
from nxdt_nemo.runtime.torch_view import FACTORIES, TENSOR_TYPES, hook_methods, to_lane, view

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cpu_lane(monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("NXDT_NEMO_RUNTIME", "cpu")
    forget()
    yield
    forget()


@pytest.fixture(scope="module")
def up() -> ModuleView:
    return view(torch, "upstream")


@pytest.fixture(scope="module")
def main() -> ModuleView:
    return view(torch, "main")


def snapshot() -> dict[str, int]:
    """Every attribute of the real modules by identity."""
    modules = {"": torch, "cuda.": torch.cuda, "amp.": torch.amp, "cuda.amp.": torch.cuda.amp, "jit.": torch.jit}
    modules |= {
        "Tensor.": torch.Tensor,
        "Module.": torch.nn.Module,
        "Linear.": torch.nn.Linear,
        "random.": torch.cuda.random,
    }
    return {f"{prefix}{name}": id(value) for prefix, m in modules.items() for name, value in list(vars(m).items())}


# --- devices -------------------------------------------------------------------------------------------

DEVICES = [  # what upstream writes, what it means here
    ("cuda", CPU),
    ("cuda:1", CPU),
    (torch.device("cuda", 1), CPU),
    (0, CPU),
    ("cpu", "cpu"),
    ("meta", "meta"),
    (torch.device("meta"), torch.device("meta")),
    (None, None),
    (True, True),
]


@pytest.mark.parametrize("given, expected", DEVICES, ids=lambda value: repr(value))
def test_to_lane(given, expected):
    found = to_lane(given)
    assert (found, type(found)) == (expected, type(expected))


def test_the_device_class(up):
    for made in (
        up.device("cuda"), up.device("cuda:1"), up.device("cuda", 1), up.device(type="cuda", index=0),
        up.device(torch.device("cuda", 1)), up.device(0), up.device("cpu"), up.device(device="cuda"),
    ):  # fmt: skip
        assert type(made) is torch.device
        assert made == CPU
        assert isinstance(made, up.device)
    assert up.device("meta") == torch.device("meta")
    assert up.device("cpu", 0) == torch.device("cpu", 0)
    assert not isinstance("cuda", up.device)
    assert isinstance(CPU, (str, up.device))
    assert isinstance(CPU, str | up.device)
    assert issubclass(torch.device, up.device)
    with up.device("meta"):
        assert torch.ones(1).is_meta
    assert pickle.loads(pickle.dumps(up.device)) is up.device


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "arange": (3,), "as_tensor": ([1.0],), "asarray": ([1.0],), "bartlett_window": (3,), "blackman_window": (3,),
    "empty_permuted": ((2, 3), (1, 0)), "hamming_window": (3,), "hann_window": (3,), "kaiser_window": (3,),
    "empty": (2,), "empty_like": (torch.ones(2),), "eye": (2,),
    "empty_strided": ((2,), (1,)), "full": ((2,), 3.0), "full_like": (torch.ones(2), 3.0), "linspace": (0, 1, 3),
    "logspace": (0, 1, 3), "normal": (0.0, 1.0, (2,)), "ones": (2,), "ones_like": (torch.ones(2),), "rand": (2,),
    "rand_like": (torch.ones(2),), "randint": (3, (2,)), "randint_like": (torch.ones(2), 3), "randn": (2,),
    "randn_like": (torch.ones(2),), "randperm": (3,), "scalar_tensor": (1.0,), "tensor": ([1.0],),
    "tril_indices": (2, 2), "triu_indices": (2, 2), "zeros": (2,), "zeros_like": (torch.ones(2),),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTORIES)
def test_factories(up, main, name):
    for seen in (up, main):
        factory = getattr(seen, name)
        assert factory(*ARGUMENTS[name], device="cuda").device == CPU
        assert factory(*ARGUMENTS[name], device=torch.device("cuda", 1)).device == CPU
        assert factory(*ARGUMENTS[name], device="meta").is_meta
        assert factory(*ARGUMENTS[name]).device == CPU
        assert factory.__name__ == name
    with pytest.raises((RuntimeError, AssertionError)):
        getattr(torch, name)(*ARGUMENTS[name], device="cuda:99")


def test_pinned_memory_is_plain_memory(up):
    """Context parallelism asks for it: megatron.core.utils.get_batch_on_this_cp_rank and rope_utils."""
    assert up.tensor([1, 2], device="cpu", pin_memory=True).tolist() == [1, 2]
    assert not up.empty(2, pin_memory=True).is_pinned()


def test_load_and_generator(up):
    file = io.BytesIO()
    torch.save({"a": torch.arange(3)}, file)
    for where in ("cuda", "cuda:1", torch.device("cuda", 1), None, "cpu"):
        file.seek(0)
        assert up.load(file, map_location=where)["a"].tolist() == [0, 1, 2]
    file.seek(0)
    assert up.load(file, "cuda", weights_only=True)["a"].device == CPU
    file.seek(0)
    assert up.load(file, lambda storage, where: storage)["a"].device == CPU
    assert up.Generator("cuda").device == up.Generator().device == up.Generator(device="cuda:0").device == CPU


def test_classes_stay_classes(up):
    """A script says `torch.Generator | None` and isinstance, and derives its own."""
    for name in ("device", "Generator", "autocast"):
        kind = getattr(up, name)
        assert issubclass(getattr(torch, name), kind) and not isinstance(1, kind | None)
    made = up.Generator("cuda")
    assert type(made) is torch.Generator and isinstance(made, up.Generator | None)
    assert isinstance(torch.autocast("cpu"), up.autocast) and not isinstance(
        torch.autocast("cpu"), up.cuda.amp.autocast
    )

    class Own(up.Generator):
        pass

    own = Own(device="cuda:0")
    assert type(own) is Own and isinstance(own, up.Generator) and isinstance(own, Own) and not isinstance(made, Own)
    assert torch.rand(1, generator=own.manual_seed(1)) == torch.rand(1, generator=made.manual_seed(1))


def same_kind(seen: ModuleView, real: Any) -> None:
    for name, value in vars(seen)["_overlay"].items():
        if isinstance(value, ModuleView):
            same_kind(value, getattr(real, name))
        else:
            assert isinstance(value, type) == isinstance(getattr(real, name, value), type), f"{seen.__name__}.{name}"


def test_no_class_is_a_function(up):
    same_kind(up, torch)


def test_default_device(main):
    try:
        main.set_default_device("cuda")
        assert torch.get_default_device() == CPU
    finally:
        torch.set_default_device(None)


def test_start_method(up, main):
    """The script's is the lane's; torch's own, and Python's, which other libraries call, does as it is told."""
    real, before = torch.multiprocessing, multiprocessing.get_start_method(allow_none=True)
    try:
        for seen in (up, main):
            real.set_start_method("forkserver", force=True)
            seen.multiprocessing.set_start_method("spawn", force=True)
            assert real.get_start_method() == seen.multiprocessing.get_start_method() == "fork"
            with pytest.raises(RuntimeError, match="context has already been set"):
                seen.multiprocessing.set_start_method("spawn")
            seen.multiprocessing.set_start_method("forkserver", True)
            assert real.get_start_method() == "forkserver"
            real.set_start_method("spawn", force=True)
            assert seen.multiprocessing.get_start_method() == "spawn"
            seen.multiprocessing.set_start_method(None, force=True)
            assert multiprocessing.get_start_method(allow_none=True) is None
            assert seen.multiprocessing.get_context is real.get_context
    finally:
        multiprocessing.set_start_method(before, force=True)


# --- autocast ------------------------------------------------------------------------------------------


def product() -> torch.dtype:
    return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def test_autocast(up):
    casts = (
        up.autocast("cuda", dtype=torch.bfloat16), up.autocast(device_type="cuda", dtype=torch.bfloat16),
        up.amp.autocast("cuda", dtype=torch.bfloat16), up.cuda.amp.autocast(dtype=torch.bfloat16),
        up.cuda.amp.autocast(),
        up.autocast("cpu", dtype=torch.bfloat16),
    )  # fmt: skip
    for cast in casts:
        assert isinstance(cast, up.autocast)
        assert isinstance(cast, torch.autocast)
        with cast:
            assert product() == torch.bfloat16
            assert up.is_autocast_enabled()
            assert up.is_autocast_enabled("cuda")
            assert up.get_autocast_gpu_dtype() == torch.bfloat16
        assert product() == torch.float32
        assert not up.is_autocast_enabled()
    for off in (up.autocast("cuda", enabled=False), up.cuda.amp.autocast(enabled=False)):
        with torch.autocast("cpu", dtype=torch.bfloat16), off:
            assert product() == torch.float32
    assert up.autocast("cuda", dtype=torch.bfloat16)(product)() == torch.bfloat16


def test_custom_functions_of_autocast(up):
    seen: list[torch.dtype] = []

    def made(of_forward: Any, of_backward: Any) -> Any:
        class Twice(torch.autograd.Function):
            @staticmethod
            @of_forward
            def forward(ctx, x):
                seen.append(x.dtype)
                return 2 * x

            @staticmethod
            @of_backward
            def backward(ctx, grad):
                seen.append(product())
                return 2 * grad

        return Twice

    pairs = [
        (up.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float32), up.amp.custom_bwd(device_type="cuda")),
        (up.cuda.amp.custom_fwd(cast_inputs=torch.float32), up.cuda.amp.custom_bwd),
    ]
    for forward, backward in pairs:
        seen.clear()
        x = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
        with up.autocast("cuda", dtype=torch.bfloat16):
            y = made(forward, backward).apply(x)
        y.float().sum().backward()
        # cast_inputs turns autocast off within forward, so backward runs without it too
        assert seen == [torch.float32, torch.float32]
        assert x.grad is not None
        assert x.grad.tolist() == [2.0, 2.0]
    seen.clear()
    x = torch.ones(2, requires_grad=True)
    with up.autocast("cuda", dtype=torch.bfloat16):
        y = made(up.cuda.amp.custom_fwd, up.cuda.amp.custom_bwd).apply(x)
    y.sum().backward()
    assert seen == [torch.float32, torch.bfloat16]


# --- torch.cuda ----------------------------------------------------------------------------------------


def test_there_is_a_device(up):
    cuda = up.cuda
    assert cuda.is_available()
    assert cuda.is_initialized()
    assert cuda.is_bf16_supported()
    assert cuda.current_device() == CPU
    assert cuda.device_count() >= 1
    assert torch.ones(1, device=cuda.current_device()).device == CPU
    cuda.set_device(1)
    cuda.empty_cache()
    cuda.synchronize()
    cuda.synchronize(cuda.current_device())
    cuda.reset_peak_memory_stats()
    with cuda.device(1), up.cuda.nvtx.range("step"):
        assert cuda.current_device() == CPU
    assert cuda.get_device_capability() == (0, 0)
    assert cuda.get_device_name()
    called: list[int] = []
    cuda._lazy_call(lambda: called.append(1))
    assert called == [1]


def test_tensor_types(up):
    for name in TENSOR_TYPES:
        made = getattr(up.cuda, name)([1])
        assert type(made) is torch.Tensor
        assert made.type() == f"torch.{name}"
        kind = getattr(up.cuda, name)
        assert torch.zeros(1).type(kind).dtype == made.dtype
        assert isinstance(made, kind) and not isinstance(made.to(torch.complex64), kind) and not isinstance(1, kind)


def test_streams_and_events(up):
    stream = up.cuda.Stream(device="cuda", priority=-1)
    with up.cuda.stream(stream), stream:
        up.cuda.current_stream().wait_stream(stream)
    event = stream.record_event()
    assert event.query()
    assert stream.query()
    up.cuda.default_stream().wait_event(event)
    start, end = up.cuda.Event(enable_timing=True), up.cuda.Event(enable_timing=True)
    start.record()
    time.sleep(0.02)
    end.record()
    end.synchronize()
    assert 20 <= start.elapsed_time(end) < 20_000  # milliseconds
    with up.cuda.stream(None):
        pass


def test_random_states(up):
    for cuda in (up.cuda, up.cuda.random):
        cuda.manual_seed(7)
        before = cuda.get_rng_state()
        first = torch.rand(3)
        cuda.set_rng_state(before)
        assert torch.equal(torch.rand(3), first)
        cuda.manual_seed_all(7)
        assert torch.equal(torch.rand(3), first)
        states = cuda.get_rng_state_all()
        second = torch.rand(3)
        cuda.set_rng_state_all(states)
        assert torch.equal(torch.rand(3), second)
        assert cuda.initial_seed() == 7
    assert up.cuda.default_generators[0] is torch.default_generator
    assert up.cuda.default_generators[torch.device("cpu")] is torch.default_generator
    assert [len(up.cuda.default_generators), *up.cuda.default_generators] == [1, torch.default_generator]


@pytest.mark.parametrize("named", [{}, {"devices": [0]}, {"devices": []}])
def test_random_states_are_forked(up, named):
    torch.manual_seed(7)
    with up.random.fork_rng(**named):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), first)
    with up.random.fork_rng(enabled=False):
        torch.manual_seed(7)
    assert torch.equal(torch.rand(3), first)


def test_memory(up):
    cuda = up.cuda
    before = cuda.memory_allocated()
    held = torch.ones(16 * 2**20)  # 64 MiB, all pages written
    assert 60 * 2**20 < cuda.memory_allocated() - before < 200 * 2**20
    stats = cuda.memory_stats()
    # Other threads of this process allocate too: a little room
    room = 32 * 2**20
    assert abs(stats["allocated_bytes.all.current"] - cuda.memory_allocated()) < room
    assert abs(stats["reserved_bytes.all.current"] - cuda.memory_reserved()) < room
    assert stats["num_alloc_retries"] == 0
    assert held.nbytes <= cuda.max_memory_allocated()
    assert cuda.max_memory_reserved() >= held.nbytes
    free, total = cuda.mem_get_info()
    assert 0 < free < total == cuda.get_device_properties(0).total_memory


def test_a_function_without_a_counterpart_says_so_when_called(up):
    function = up.cuda.ipc_collect  # in the table: nothing to do
    assert function() is None
    for name in ("current_blas_handle", "list_gpu_processes", "get_sync_debug_mode"):
        missing = getattr(up.cuda, name)
        with pytest.raises(NotOnNeuron, match=rf"torch\.cuda\.{name} has no counterpart on the cpu lane"):
            missing()
    assert issubclass(NotOnNeuron, NotImplementedError)
    with pytest.raises(AttributeError, match="no_such_thing"):
        up.cuda.no_such_thing  # noqa: B018
    assert not hasattr(up.cuda, "no_such_thing")


def test_compilers_are_left_out_for_upstream_only(up, main):
    def double(x):
        return 2 * x

    for eager in (up.compile, up.jit.script):
        assert eager(double) is double
        assert eager(mode="max-autotune")(double) is double
    assert main.compile is torch.compile
    assert main.jit is torch.jit
    assert up.jit.ScriptModule is torch.jit.ScriptModule


# --- methods -------------------------------------------------------------------------------------------

METHODS = """
def tensor(x): return x.cuda()
def module(m): return m.cuda(0)
def move(m): return m.to("cuda:0")
def move_by_name(m): return m.to(device="cuda")
def linear(torch): return torch.nn.Linear(2, 2, device="cuda")
def lstm(torch): return torch.nn.LSTM(2, 2, device="cuda")
def norm(torch):
    class Norm(torch.nn.LayerNorm):
        def __init__(self): super().__init__(2, device="cuda")
    return Norm()
def send(x): return x.to("cuda")
def send_by_name(x): return x.to(device="cuda:0", non_blocking=True)
def new(x): return x.new_zeros(2, device="cuda")
"""


def called_from(name: str, file: str = "<string>") -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": name}
    exec(compile(METHODS, file, "exec"), names)
    return names


def test_an_expanded_tensor_gets_memory_of_its_own():
    """As on its way to a GPU: what is written to one row is not in the others. Others stay what they are."""
    undo = hook_methods(torch, Views({"scope": {"main": ["__main__"]}, "redirect": []}))
    try:
        moved = called_from("__main__")["tensor"]
        rows = moved(torch.arange(3).expand(2, 3))
        rows[0, 0] = 7
        assert rows.tolist() == [[7, 1, 2], [0, 1, 2]]
        for plain in (torch.ones(2, 3).t(), torch.ones(1).expand(1, 1), torch.eye(2).to_sparse()):
            assert moved(plain) is plain
    finally:
        undo()


def test_cuda_methods_look_at_the_caller():
    before = snapshot()
    views = Views({"scope": {"upstream": ["megatron"], "main": ["__main__"]}, "redirect": []})
    undo = hook_methods(torch, views)
    try:
        tensor, layer = torch.ones(2), torch.nn.Linear(2, 2)
        for name in ("megatron.core.x", "__main__"):
            assert called_from(name)["tensor"](tensor).device == CPU
            assert called_from(name)["module"](layer) is layer
            assert called_from(name)["move"](layer) is called_from(name)["move_by_name"](layer) is layer
            for make in ("linear", "lstm", "norm"):
                assert {weight.device for weight in called_from(name)[make](torch).parameters()} == {CPU}
        if not torch.cuda.is_available():
            for name in ("helper", "megatronic"):
                with pytest.raises((RuntimeError, AssertionError)):
                    called_from(name)["tensor"](tensor)
                for method in ("module", "move", "move_by_name"):
                    with pytest.raises((RuntimeError, AssertionError)):
                        called_from(name)[method](layer)
                for make in ("linear", "lstm", "norm"):
                    with pytest.raises((RuntimeError, AssertionError)):
                        called_from(name)[make](torch)
    finally:
        undo()
    assert snapshot() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA's device is there")
@pytest.mark.parametrize("method", ["send", "send_by_name", "new"])
def test_a_string_in_a_tensors_method_is_one_line(method):
    """Where it stands and what to write instead; what an installed package asks for stays torch's error."""
    undo = hook_methods(torch, Views({"scope": {"upstream": ["megatron"], "main": ["__main__"]}, "redirect": []}))
    try:
        line = METHODS[: METHODS.index(f"def {method}(")].count("\n") + 1
        for name, file in (("__main__", "/job/train.py"), ("helper", "/job/helper.py")):
            with pytest.raises(
                CudaError, match=r"asks torch for a CUDA device, and there is none; .*x\.cuda\(\)"
            ) as error:
                called_from(name, file)[method](torch.ones(2))
            assert error.value.place == f"{file}:{line}" and isinstance(error.value, RuntimeError)
        for name, file in (("megatron.x", "/job/megatron/x.py"), ("transformers", torch.__file__)):
            with pytest.raises((RuntimeError, AssertionError), match=r"NVIDIA|CUDA") as error:
                called_from(name, file)[method](torch.ones(2))
            assert not isinstance(error.value, CudaError)
    finally:
        undo()


def test_a_class_of_another_packages_passes_its_callers_word_on():
    """As the models of transformers, whose `to` calls torch's."""
    names: dict[str, Any] = {"__name__": "transformers", "torch": torch}
    exec("class Model(torch.nn.Linear):\n    def to(self, *args): return super().to(*args)", names)
    undo = hook_methods(torch, Views({"scope": {"main": ["__main__"]}, "redirect": []}))
    try:
        model = names["Model"](2, 2)
        assert called_from("__main__")["move"](model) is model
    finally:
        undo()


def test_the_real_torch_is_not_changed():
    torch.cuda.nvtx, torch.cuda.random, torch.amp, torch.jit  # noqa: B018 - what the view looks up
    before = snapshot()
    for scope in ("upstream", "main"):
        seen = view(torch, scope)
        seen.zeros(1, device="cuda")
        with seen.autocast("cuda", dtype=torch.bfloat16):
            product()
        seen.cuda.manual_seed(1)
        for name in dir(seen.cuda):
            getattr(seen.cuda, name)
        seen.disable()
        assert seen.zeros is torch.zeros
        assert seen.cuda.current_device is torch.cuda.current_device
        assert seen.cuda.get_sync_debug_mode is torch.cuda.get_sync_debug_mode
        assert seen.cuda.is_available() == torch.cuda.is_available()
        seen.enable()
        assert seen.zeros(1, device="cuda").device == CPU
        with pytest.raises(NotOnNeuron):
            seen.cuda.get_sync_debug_mode()
    assert snapshot() == before


# --- what upstream really uses -------------------------------------------------------------------------

PLACES = [
    "megatron/core", "nemo/core", "nemo/utils", "nemo/lightning", "nemo/collections/nlp", "nemo/collections/llm",
    "nemo/collections/common",
]  # fmt: skip
# Named by upstream, without a counterpart: whoever calls one is told so.
RAISES = {f"torch.cuda.{name}" for name in ("clock_rate", "power_draw", "temperature", "utilization")}  # NVML's figures
RAISES |= {"torch.cuda.cudart", "torch.cuda.graph_pool_handle"}  # Nsight's profiler; CUDA graphs


def attribute_path(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    above = attribute_path(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{above}.{node.attr}" if above and isinstance(node, ast.Attribute) else ""


def used_by_upstream() -> set[str]:
    """Every `torch.cuda.x` and `torch.cuda.x.y` in upstream's source, and names imported from torch.cuda."""
    found: set[str] = set()
    for place in PLACES:
        package, _, below = place.partition("/")
        spec = PathFinder.find_spec(package)  # not sys.modules: pytest calls tests/nemo `nemo`
        assert spec is not None
        assert spec.submodule_search_locations
        for file in (Path(spec.submodule_search_locations[0]) / below).rglob("*.py"):
            text = file.read_text()
            if "torch.cuda" not in text:
                continue
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Attribute):
                    found.add(attribute_path(node))
                elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.cuda"):
                    found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {".".join(path.split(".")[:4]) for path in found if path.startswith("torch.cuda.")}


def test_all_that_upstream_uses_is_there(up):
    used = used_by_upstream()
    assert len(used) > 50
    gone, without = [], set()
    for path in sorted(used):
        value: Any = up
        try:
            for name in path.split(".")[1:]:
                value = getattr(value, name)
        except AttributeError:
            gone.append(path)
            continue
        if getattr(getattr(value, "__code__", None), "co_name", "") == "missing":
            without.add(path)
    assert gone == []
    assert without == RAISES
