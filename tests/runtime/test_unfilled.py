"""The xla and neuron lanes of this release: the whole interface, and each call says that it is not there."""

from __future__ import annotations

import inspect

import pytest

from nxdt_nemo.errors import LaneError
from nxdt_nemo.runtime.lane import Lane
from nxdt_nemo.runtime.neuron import NeuronLane
from nxdt_nemo.runtime.xla import XlaLane

METHODS = sorted(Lane.__abstractmethods__ - {"probe"})


@pytest.mark.parametrize("lane", [XlaLane, NeuronLane])
@pytest.mark.parametrize("method", METHODS)
def test_says_that_it_is_not_there(lane, method):
    with pytest.raises(LaneError) as error:
        bound = getattr(lane(), method)  # a property raises here
        wanted = [
            name
            for name, parameter in inspect.signature(bound).parameters.items()
            if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
        ]
        bound(*[None] * len(wanted))
    assert f"{lane.name} lane: not in this release yet" in error.value.reason
    assert method in error.value.reason
    assert error.value.fix
