"""The stand-in's `torch.neuron`: the device module that torch.accelerator and torch.manual_seed look into."""

from types import SimpleNamespace
from typing import Any

import torch
from torch_neuronx import _C

default_generators = (_C.default_generator(),)


def is_available() -> bool:
    """A host without a device has the package all the same."""
    return device_count() > 0


def device_count() -> int:
    """One, or what NXDT_STANDIN_DEVICES says."""
    return int(_C.device_count())


def is_initialized() -> bool:
    """Has anything been put on the device?"""
    return bool(_C.allocations())


def current_device() -> int:
    """There is one."""
    return 0


def set_device(device: Any) -> None:
    """There is one."""


class device:  # noqa: N801 - torch's name
    """A context that changes nothing."""

    def __init__(self, _: Any = None) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


def synchronize(device: Any = None) -> None:
    """Work is done when it returns."""


def manual_seed(seed: int) -> None:
    """Seed the device's generator."""
    _C.default_generator().manual_seed(seed)


manual_seed_all = manual_seed


def initial_seed() -> int:
    """What it was seeded with."""
    return int(_C.default_generator().initial_seed())


def get_rng_state(device: Any = "neuron") -> torch.Tensor:
    """A host tensor of bytes."""
    state: torch.Tensor = _C.default_generator().get_state()
    return state


def set_rng_state(state: torch.Tensor, device: Any = "neuron") -> None:
    """A state that get_rng_state gave."""
    _C.default_generator().set_state(state)


def get_device_properties(device: Any) -> SimpleNamespace:
    """A name and the bytes of memory."""
    return SimpleNamespace(name="stand-in", total_memory=2**34)


def get_amp_supported_dtype() -> list[torch.dtype]:
    """What torch.autocast("neuron") takes."""
    return [torch.bfloat16]


def _is_in_bad_fork() -> bool:
    return False
