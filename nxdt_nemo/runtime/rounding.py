"""Stochastic rounding of float32 to bfloat16, where a Trainium core would do it.

Room runtime/. Stands in for the hardware's rounding mode, which the Neuron runtime turns on with
NEURON_RT_STOCHASTIC_ROUNDING_EN=1 for every cast in a graph; the cpu lane has it at one place, where a step's weights
are put into the model. Noise is a hash of the seed, the step and the number itself, not a generator's state: copies of
a parameter on other ranks are rounded alike, in any layout, and a resumed run goes on to the bit.
Proof: tests/runtime/test_rounding.py, tests/megatron/test_rounding.py.
"""

from __future__ import annotations

import os

import torch

from nxdt_nemo.runtime.select import current

__all__ = ["SEED", "SWITCH", "asked", "copy_rounded_", "stochastic"]

SWITCH, SEED = "NEURON_RT_STOCHASTIC_ROUNDING_EN", "NEURON_RT_STOCHASTIC_ROUNDING_SEED"
_DROPPED = 0xFFFF  # the bits of a float32 that a bfloat16 has not


def asked() -> bool:
    """True where the run's environment asks for it."""
    return os.environ.get(SWITCH, "0") == "1"


def copy_rounded_(target: torch.Tensor, source: torch.Tensor, step: int) -> None:
    """target = source, in place; float32 to bfloat16 as the run's environment asks for.

    step  the optimizer's steps made so far, this one included
    """
    half = target.dtype == torch.bfloat16 and source.dtype == torch.float32
    if half and current().emulates_rounding:
        source = stochastic(source, int(os.environ.get(SEED, "0")), step)
    target.copy_(source)


def stochastic(x: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """x float32 as bfloat16: to the next number away from zero with probability (x - below) / (above - below).

    The mean over seeds or steps is x. inf and NaN stay. Equal numbers are rounded alike.
    """
    bits = x.detach().contiguous().view(torch.int32)
    rounded = (bits + (_hash(bits, seed, step) & _DROPPED)) & ~_DROPPED
    kept = torch.where(x.isfinite(), rounded, bits)
    return kept.view(torch.float32).to(torch.bfloat16)


def _hash(bits: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """MurmurHash3's finalizer (Appleby 2011) of each number, keyed by that of seed and step; its upper half is used."""
    key = _finalize(_finalize(seed & 0xFFFFFFFF) ^ (step & 0xFFFFFFFF))
    h = bits ^ _signed(key)
    h = (h ^ _shifted(h, 16)) * _signed(0x85EBCA6B)
    h = (h ^ _shifted(h, 13)) * _signed(0xC2B2AE35)
    return _shifted(h ^ _shifted(h, 16), 16)


def _shifted(h: torch.Tensor, by: int) -> torch.Tensor:
    """A logical shift to the right; torch's brings copies of the sign."""
    return (h >> by) & ((1 << (32 - by)) - 1)


def _finalize(h: int) -> int:
    h = ((h + 0x9E3779B9) ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ (h >> 16)


def _signed(number: int) -> int:
    """A 32-bit number as int32 reads it."""
    return number - (1 << 32) if number >= 1 << 31 else number
