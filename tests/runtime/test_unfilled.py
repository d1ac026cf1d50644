"""The neuron lane of this release: the whole interface, and each call says that it is not there."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from nxdt_nemo.errors import LaneError
from nxdt_nemo.runtime.lane import Lane
from nxdt_nemo.runtime.neuron import NeuronLane
from nxdt_nemo.runtime.unfilled import UnfilledLane

METHODS = sorted(Lane.__abstractmethods__ - {"probe"})


@pytest.mark.parametrize("lane", [NeuronLane])
@pytest.mark.parametrize("method", METHODS)
def test_says_that_it_is_not_there(lane: type[UnfilledLane], method: str) -> None:
    member = inspect.getattr_static(lane, method)
    call: Any = member.fget if isinstance(member, property) else member
    parameters = list(inspect.signature(call).parameters.values())[1:]
    needed = [one for one in parameters if one.default is one.empty and one.kind is not one.VAR_POSITIONAL]
    with pytest.raises(LaneError) as error:
        call(lane(), *[None] * len(needed))
    assert f"{lane.name} lane: not in this release yet" in error.value.reason
    assert method in error.value.reason
    assert error.value.fix
