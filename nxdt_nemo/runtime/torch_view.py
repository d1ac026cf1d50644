"""torch as megatron.*, nemo.* and the user's script see it: CUDA's names mean the runtime's device.

Room runtime/. Stands in for torch.cuda and for `device="cuda"` in torch's factories, in those modules only
(patches/views.toml); everyone else's torch is untouched. A CUDA function with no counterpart raises
NotOnNeuron with its name when it is called. Proof: tests/runtime/test_torch_view.py.
"""

from __future__ import annotations

import functools
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import BuiltinFunctionType, FrameType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing

from nxdt_nemo.errors import CudaError, NotOnNeuron
from nxdt_nemo.patching.view import ModuleView, Views
from nxdt_nemo.runtime.distributed_view import distributed_view
from nxdt_nemo.runtime.select import current

__all__ = ["hook_cuda", "hook_methods", "hook_to", "to_lane", "view"]

# torch functions with a device argument that upstream or a script may call with "cuda".
FACTORIES = (
    "arange as_tensor asarray bartlett_window blackman_window empty empty_like empty_permuted empty_strided eye full "
    "full_like hamming_window hann_window kaiser_window linspace logspace normal ones ones_like rand rand_like "
    "randint randint_like randn randn_like randperm scalar_tensor tensor tril_indices triu_indices zeros zeros_like"
).split()
TENSOR_TYPES = (
    "BFloat16Tensor BoolTensor ByteTensor CharTensor DoubleTensor FloatTensor HalfTensor IntTensor LongTensor "
    "ShortTensor"
).split()
NVTX = ("range_push", "range_pop", "range_start", "range_end", "mark")


def to_lane(device: Any) -> Any:
    """The runtime's device for anything that names CUDA (a string, a torch.device, an index); else `device`."""
    if isinstance(device, str):
        return current().device() if device.startswith("cuda") else device
    if isinstance(device, int) and not isinstance(device, bool):
        return current().device()
    if isinstance(device, torch.device) and device.type == "cuda":
        return current().device()
    return device


def _factory(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> Any:
        kwargs = _on_lane(kwargs)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # CUDA's page-locked memory; a lane copies from what the host has
        return function(*args, **kwargs)

    return make


class _StandIn(type(torch.Generator)):  # type: ignore[misc]  # torch 2.14 gives classes of C++ a metaclass of its own
    """Stands in for torch's class `real`, which isinstance and issubclass answer for; as ever in a subclass."""

    def __instancecheck__(cls, instance: object) -> bool:
        real = vars(cls).get("real")
        return isinstance(instance, real) if real else super().__instancecheck__(instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        real = vars(cls).get("real")
        return issubclass(subclass, real) if real else super().__subclasscheck__(subclass)


class _Device(metaclass=_StandIn):
    """torch.device, with CUDA's names meaning the runtime's device."""

    real = torch.device

    def __new__(cls, type: Any = None, index: Any = None, **named: Any) -> torch.device:  # type: ignore[misc]  # noqa: A002
        type = named.get("device", type)  # noqa: A001 - upstream's keyword
        moved = to_lane(type)
        if moved is not type or isinstance(moved, torch.device):
            return moved  # type: ignore[no-any-return]
        return torch.device(moved) if index is None else torch.device(moved, index)


class _OwnGenerator(torch.Generator, metaclass=_StandIn):
    """torch.Generator, with CUDA's names meaning the runtime's device."""

    real = torch.Generator

    def __new__(cls, device: Any = "cpu") -> torch.Generator:  # type: ignore[misc]
        kind = torch.Generator if cls is _OwnGenerator else cls
        return torch.Generator.__new__(kind, to_lane(device))  # type: ignore[call-arg]


class _Autocast(torch.autocast, metaclass=_StandIn):
    """torch.autocast with device_type "cuda" meaning the runtime's; subclassed and instantiated upstream."""

    real = torch.autocast

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(_type_name(device_type), *args, **kwargs)


class _CudaAutocast(_Autocast):
    """torch.cuda.amp.autocast: no device argument."""

    def __init__(self, enabled: bool = True, dtype: Any = torch.bfloat16, cache_enabled: bool = True) -> None:
        super().__init__("cuda", enabled=enabled, dtype=dtype, cache_enabled=cache_enabled)


def _type_name(device_type: str) -> str:
    return current().device().type if device_type == "cuda" else device_type


def _custom(name: str) -> Callable[..., Any]:
    real = getattr(torch.amp, name)

    @functools.wraps(real)
    def decorate(function: Any = None, *, device_type: str = "cuda", **named: Any) -> Any:
        bound = functools.partial(real, device_type=_type_name(device_type), **named)
        return bound if function is None else bound(function)

    return decorate


def _autocast_query(name: str) -> Callable[..., Any]:
    real = getattr(torch, name)

    @functools.wraps(real)
    def query(device_type: str = "cuda") -> Any:
        return real(_type_name(device_type))

    return query


class _TensorType(type):
    """torch.cuda.FloatTensor and the like: a dtype on the runtime's device, in isinstance and in a call."""

    def __instancecheck__(cls, instance: object) -> bool:
        here = isinstance(instance, torch.Tensor) and instance.device.type == current().device().type
        return here and instance.dtype == cls.real.dtype  # type: ignore[attr-defined]

    def __call__(cls, *args: Any, **kwargs: Any) -> torch.Tensor:
        made: torch.Tensor = cls.real(*args, **kwargs)  # type: ignore[attr-defined]
        return made.to(current().device())


def _tensor_type(name: str) -> Any:
    return _TensorType(f"torch.{name}", (), {"real": getattr(torch, name)})  # Tensor.type goes by the class's name


class _Stream:
    """One stream: work on this backend is ordered by the device itself."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def synchronize(self) -> None:
        current().synchronize()

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        event = event or _Event()
        event.record()
        return event

    def query(self) -> bool:
        return True


class _Event:
    """Host times, taken after the device is done: what Megatron's timers read."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._time = 0.0

    def record(self, _: Any = None) -> None:
        import time

        current().synchronize()
        self._time = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds from this event to `end`."""
        return (end._time - self._time) * 1e3

    def synchronize(self) -> None:
        current().synchronize()

    def wait(self, _: Any = None) -> None: ...

    def query(self) -> bool:
        return True


class _Generator:
    """The generator of a device that has none of torch's: its state is the lane's."""

    def get_state(self) -> torch.Tensor:
        return current().rng_state()

    def set_state(self, state: torch.Tensor) -> None:
        current().set_rng_state(state)

    def manual_seed(self, seed: int) -> _Generator:
        current().manual_seed(int(seed))
        return self

    graphsafe_get_state, graphsafe_set_state = get_state, set_state


class _Generators:
    """torch.cuda.default_generators: one, whatever the index."""

    def __getitem__(self, _: Any) -> Any:
        return torch.default_generator if current().device().type == "cpu" else _Generator()

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        yield self[0]


class _DeviceContext:
    """torch.cuda.device(index) as a context: a process has one device."""

    def __init__(self, device: Any = None) -> None:
        self.idx = 0

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


@contextmanager
def _range(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _nothing(*_: Any, **__: Any) -> None:
    """A CUDA call with no effect here."""


def _call(function: Callable[[], Any], **_: Any) -> None:
    function()


def _properties(_: Any = None) -> SimpleNamespace:
    lane = current()
    return SimpleNamespace(
        name=lane.name_of_device(),
        major=0,
        minor=0,
        total_memory=lane.total_memory(),
        multi_processor_count=1,
        warp_size=1,
    )


def _memory_stats(_: Any = None) -> dict[str, int]:
    figures = current().memory()
    return {
        "allocated_bytes.all.current": figures.allocated,
        "allocated_bytes.all.peak": figures.peak,
        "reserved_bytes.all.current": figures.reserved,
        "reserved_bytes.all.peak": figures.reserved,
        "num_alloc_retries": 0,
    }


def _random() -> dict[str, Callable[..., Any]]:
    def get_rng_state(device: Any = "cuda") -> torch.Tensor:
        return current().rng_state()

    def set_rng_state(state: torch.Tensor, device: Any = "cuda") -> None:
        current().set_rng_state(state)

    def manual_seed(seed: int) -> None:
        current().manual_seed(int(seed))

    def initial_seed() -> int:
        return torch.initial_seed()

    return {
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "get_rng_state_all": lambda: [current().rng_state()],
        "set_rng_state_all": lambda states: current().set_rng_state(next(iter(states))),
        "manual_seed": manual_seed,
        "manual_seed_all": manual_seed,
        "initial_seed": initial_seed,
    }


def _cuda_table() -> dict[str, Any]:
    random = _random()
    amp = ModuleView(
        torch.cuda.amp,
        {"autocast": _CudaAutocast, "custom_fwd": _custom("custom_fwd"), "custom_bwd": _custom("custom_bwd")},
    )
    table: dict[str, Any] = {
        "amp": amp,
        "random": ModuleView(torch.cuda.random, random),
        "nvtx": SimpleNamespace(
            range=_range,
            range_push=_nothing,
            range_pop=_nothing,
            range_start=_nothing,
            range_end=_nothing,
            mark=_nothing,
        ),
        "default_generators": _Generators(),
        "device": _DeviceContext,
        "Stream": _Stream,
        "ExternalStream": _Stream,
        "Event": _Event,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "current_device": lambda: current().device(),
        "device_count": lambda: current().device_count(),
        "current_stream": lambda *_: _Stream(),
        "default_stream": lambda *_: _Stream(),
        "stream": lambda stream=None: nullcontext(stream),
        "synchronize": lambda *_, **__: current().synchronize(),
        "get_device_name": lambda *_: current().name_of_device(),
        "get_device_capability": lambda *_: (0, 0),
        "get_device_properties": _properties,
        "memory_stats": _memory_stats,
        "memory_allocated": lambda *_: current().memory().allocated,
        "max_memory_allocated": lambda *_: current().memory().peak,
        "memory_reserved": lambda *_: current().memory().reserved,
        "max_memory_reserved": lambda *_: current().memory().reserved,
        "mem_get_info": lambda *_: (
            current().total_memory() - current().memory().allocated,
            current().total_memory(),
        ),
        "_lazy_call": _call,
    }
    for name in (
        "_lazy_init",
        "init",
        "set_device",
        "set_stream",
        "empty_cache",
        "ipc_collect",
        "reset_peak_memory_stats",
        "reset_max_memory_allocated",
        "set_per_process_memory_fraction",
    ):
        table[name] = _nothing
    for name in TENSOR_TYPES:
        table[name] = _tensor_type(name)
    return table | random


class _CudaView(ModuleView):
    """torch.cuda: the table, then the real module's classes; other functions say that they are not here."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_real"], name)
        if not isinstance(value, FunctionType | BuiltinFunctionType) or not self.__dict__.get("_on", True):
            return value

        @functools.wraps(value)
        def missing(*_: Any, **__: Any) -> Any:
            raise NotOnNeuron(f"torch.cuda.{name} has no counterpart on the {current().name} lane")

        return missing

    def disable(self) -> None:
        super().disable()
        self.__dict__["_on"] = False

    def enable(self) -> None:
        super().enable()
        self.__dict__["_on"] = True


def _eager(*args: Any, **_: Any) -> Any:
    """torch.compile / torch.jit.script for upstream's fusions: the function as it stands."""
    function = args[0] if args else None
    return function if function is not None else _eager


@functools.wraps(torch.multiprocessing.set_start_method)
def _set_start_method(method: str | None, force: bool = False) -> None:
    torch.multiprocessing.set_start_method(method and current().start_method(method), force)


@functools.wraps(torch.matmul)
def _matmul(input: torch.Tensor, other: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:  # noqa: A002
    return current().matmul(input, other) if out is None else torch.matmul(input, other, out=out)


@functools.wraps(torch.set_default_device)
def _set_default_device(device: Any) -> None:
    torch.set_default_device(to_lane(device))


@contextmanager
def _fork_rng(devices: Any = None, enabled: bool = True, *, device_type: str = "cuda") -> Iterator[None]:
    """torch.random.fork_rng: the host's random states and, unless `devices` is empty, the runtime's."""
    if device_type != "cuda" or not enabled or (devices is not None and not list(devices)):
        with torch.random.fork_rng(devices, enabled, device_type=device_type):
            yield
        return
    lane = current()
    with torch.random.fork_rng([]):
        before = lane.rng_state()
        try:
            yield
        finally:
            lane.set_rng_state(before)


def _torch_table(scope: str) -> dict[str, Any]:
    real_load = torch.load

    @functools.wraps(real_load)
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        return real_load(f, to_lane(map_location), *args, **kwargs)

    amp = {"autocast": _Autocast, "custom_fwd": _custom("custom_fwd"), "custom_bwd": _custom("custom_bwd")}
    table: dict[str, Any] = {
        "cuda": _CudaView(torch.cuda, _cuda_table()),
        "device": _Device,
        "autocast": _Autocast,
        "amp": ModuleView(torch.amp, amp),
        "load": load,
        "distributed": distributed_view(),
        "multiprocessing": ModuleView(torch.multiprocessing, {"set_start_method": _set_start_method}),
        "Generator": _OwnGenerator,
        "random": ModuleView(torch.random, {"fork_rng": _fork_rng}),
        "set_default_device": _set_default_device,
        "is_autocast_enabled": _autocast_query("is_autocast_enabled"),
        "get_autocast_gpu_dtype": lambda: torch.get_autocast_dtype(_type_name("cuda")),
        "set_autocast_gpu_dtype": lambda dtype: torch.set_autocast_dtype(_type_name("cuda"), dtype),
    }
    for name in FACTORIES:
        table[name] = _factory(getattr(torch, name))
    if scope == "upstream":
        # Upstream's fusions are bound to CUDA's compilers; XLA traces the plain functions into one graph.
        table["compile"] = _eager
        table["jit"] = ModuleView(torch.jit, {"script": _eager})
        table["matmul"] = _matmul
    return table


def view(real: ModuleType, scope: str) -> ModuleView:
    """torch for the modules of a scope: "upstream" (megatron.*, nemo.*) or "main" (the user's script)."""
    return ModuleView(real, _torch_table(scope))


def hook_methods(module: ModuleType, views: Views) -> Callable[[], None]:
    """CUDA's names in methods mean the runtime's device when a module in scope says them; returns what takes it back.

    `x.cuda()`, `module.to("cuda")` and `torch.nn.Linear(..., device="cuda")`. Tensor.to and Tensor.type stay
    torch's own: they are on everyone's hot path, and other libraries register handlers for Tensor.to itself. A string
    in one of them fails, and says what to write.
    """
    undo = ExitStack()
    undo.callback(_hook_lazy_init(module.cuda, views))
    for owner in (module.Tensor, module.nn.Module):
        undo.callback(hook_cuda(owner, views))
    undo.callback(hook_to(module.nn.Module, views))
    for owner in _with_device(module.nn):
        undo.callback(_hook(owner, "__init__", views, _made))
    return undo.close


def _with_device(nn: ModuleType) -> list[type]:
    """The classes of torch.nn whose own __init__ takes a device, by name or (LSTM and its kin) among its keywords."""
    found = []
    for owner in dict.fromkeys(each for each in vars(nn).values() if isinstance(each, type)):
        code = getattr(vars(owner).get("__init__"), "__code__", None)
        if code is None or not issubclass(owner, nn.Module):
            continue
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if "device" in names or (issubclass(owner, nn.RNNBase) and "kwargs" in code.co_varnames):
            found.append(owner)
    return found


Method = Callable[..., Any]


def _hook(owner: type, name: str, views: Views, inside: Callable[..., Any]) -> Callable[[], None]:
    """Let `inside(method, self, ...)` answer callers in scope of owner's method; returns what takes it back."""
    own = name in vars(owner)
    original: Method = getattr(owner, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _said_in_scope(name, views):
            return inside(original, self, *args, **kwargs)
        return original(self, *args, **kwargs)

    setattr(owner, name, method)
    return lambda: setattr(owner, name, original) if own else delattr(owner, name)


def _said_in_scope(name: str, views: Views) -> bool:
    """Whether a module in scope calls a hooked method, itself or by an override of it (`super().to(...)`)."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if views.scope_of(_module_of(frame)) is not None:
            return True
        if frame.f_code.co_name != name or name == "__init__":
            return False
        frame = frame.f_back
    return False


def _module_of(frame: FrameType | None) -> str:
    return str(frame.f_globals.get("__name__", "")) if frame is not None else ""


def _hook_lazy_init(cuda: ModuleType, views: Views) -> Callable[[], None]:
    """Let a CUDA device that the user's code asks torch itself for be one line; returns what takes it back.

    torch calls this function, by its name, before it uses CUDA for the first time: `x.to("cuda")` costs nothing until
    then. What another package asks for stays torch's error.
    """
    original: Method = cuda._lazy_init

    @functools.wraps(original)
    def _lazy_init() -> None:
        try:
            original()
        except (RuntimeError, AssertionError) as error:
            asker: FrameType | None = sys._getframe(1)
            while _module_of(asker).partition(".")[0] in ("torch", "nxdt_nemo"):
                asker = asker.f_back if asker else None
            if asker is None or not _is_users(asker, views):
                raise
            raise CudaError(
                "asks torch for a CUDA device, and there is none",
                place=f"{asker.f_code.co_filename}:{asker.f_lineno}",
                fix='the script may write x.cuda() or x.to(torch.device("cuda")), any module x.to(other.device)',
            ) from error

    cuda._lazy_init = _lazy_init  # type: ignore[attr-defined]
    return lambda: setattr(cuda, "_lazy_init", original)


def _is_users(frame: FrameType, views: Views) -> bool:
    """Whether this runs the script, or a module that is neither upstream's nor installed."""
    scope = views.scope_of(_module_of(frame))
    others = ("<", *(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")))
    return scope == "main" or (scope is None and not frame.f_code.co_filename.startswith(others))


def hook_cuda(owner: type, views: Views) -> Callable[[], None]:
    """Let `owner.cuda` mean the runtime's device; returns what takes it back."""
    return _hook(owner, "cuda", views, _moved)


def hook_to(owner: type, views: Views) -> Callable[[], None]:
    """Let a module's `to` take CUDA's names; returns what takes it back."""
    return _hook(owner, "to", views, _sent)


def _moved(_: Method, self: Any, *args: Any, **kwargs: Any) -> Any:
    lane = current()
    if isinstance(self, torch.nn.Module):
        return lane.place(self)
    moved = self.to(lane.device())
    # On the way to a GPU an expanded tensor gets memory of its own, and scripts write into it then.
    return moved.contiguous() if moved is self and _expanded(moved) and moved.device.type == "cpu" else moved


def _expanded(x: torch.Tensor) -> bool:
    return x.layout == torch.strided and 0 in x.stride()


def _sent(to: Method, self: Any, *args: Any, **kwargs: Any) -> Any:
    args = (*map(to_lane, args[:1]), *args[1:])
    kwargs = _on_lane(kwargs)
    if current().device() in (*args, *kwargs.values()):
        current().place(self)
    return to(self, *args, **kwargs)


def _made(init: Method, self: Any, *args: Any, **kwargs: Any) -> Any:
    return init(self, *args, **_on_lane(kwargs))


def _on_lane(kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs | {"device": to_lane(kwargs["device"])} if "device" in kwargs else kwargs
