"""What this backend does not have can be imported, and says its name when it is used."""

from __future__ import annotations

import pytest
import torch

from nxdt_nemo.apex import amp
from nxdt_nemo.apex._absent import unavailable
from nxdt_nemo.apex.contrib.group_norm import GroupNorm
from nxdt_nemo.apex.contrib.optimizers import distributed_fused_adam as distributed
from nxdt_nemo.apex.optimizers import FusedAdam
from nxdt_nemo.apex.transformer.functional.fused_rope import fused_apply_rotary_pos_emb_2d
from nxdt_nemo.errors import NotOnNeuron, UserError

CASES = [  # object, name in the message
    (GroupNorm, "apex.contrib.group_norm.GroupNorm"),
    (amp.initialize, "apex.amp.initialize"),
    (amp.scale_loss, "apex.amp.scale_loss"),
    (fused_apply_rotary_pos_emb_2d, "apex.transformer.functional.fused_rope.fused_apply_rotary_pos_emb_2d"),
    (distributed.DistributedFusedAdam.ParameterFragment, "DistributedFusedAdam.ParameterFragment"),
]


@pytest.mark.parametrize(("thing", "name"), CASES)
def test_a_call_names_the_feature(thing: type, name: str) -> None:
    with pytest.raises(NotOnNeuron, match=name.replace(".", r"\.")):
        thing(1, key=2)


def test_absent_classes_serve_isinstance_and_subclassing() -> None:
    norm = unavailable("apex.somewhere.Norm", "use another")

    class Child(norm):  # type: ignore[valid-type,misc]
        pass

    assert not isinstance(torch.nn.LayerNorm(2), norm)
    with pytest.raises(NotOnNeuron, match=r"apex\.somewhere\.Norm does not exist on the neuron backend; use another"):
        Child()


def test_distributed_fused_adam_names_itself_and_the_alternative() -> None:
    class AsNeMoDerivesIt(distributed.DistributedFusedAdam):
        def copy(self, fragments: list[distributed.DistributedFusedAdam.ParameterFragment]) -> None:  # type: ignore[valid-type]
            """As upstream."""

        def check(self, buckets: dict[int, distributed.DistributedFusedAdam.ParameterBucket]) -> None:  # type: ignore[valid-type]
            """As upstream."""

    with pytest.raises(NotOnNeuron) as caught:
        AsNeMoDerivesIt([torch.nn.Parameter(torch.ones(1))], lr=1e-3)
    text = str(caught.value)
    assert text.startswith("apex.contrib.optimizers.distributed_fused_adam.DistributedFusedAdam ")
    assert "optim.name: distributed_fused_adam" in text.partition(";")[2]
    assert isinstance(caught.value, NotImplementedError)
    assert not isinstance(caught.value, UserError)
    assert not isinstance(FusedAdam([torch.nn.Parameter(torch.ones(1))]), distributed.DistributedFusedAdam)


def test_the_pre_forward_hook_is_off_inside_and_on_after() -> None:
    hooked, plain = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    hooked._pre_forward_hook_is_enabled = True  # type: ignore[attr-defined]
    inside = []

    def body() -> None:
        with distributed._disable_pre_forward_hook(hooked):
            inside.append(hooked._pre_forward_hook_is_enabled)  # type: ignore[attr-defined]
            raise KeyError

    with pytest.raises(KeyError):
        body()
    assert inside == [False]
    assert hooked._pre_forward_hook_is_enabled is True  # type: ignore[attr-defined]
    with distributed._disable_pre_forward_hook(plain):
        pass
    assert not hasattr(plain, "_pre_forward_hook_is_enabled")


def test_multi_tensor_copy_converts_dtypes() -> None:
    sources = [torch.randn(3), torch.randn(2, 2)]
    copies = [torch.zeros(3, dtype=torch.bfloat16), torch.zeros(2, 2)]
    distributed._multi_tensor_copy(sources, copies, torch.zeros(1, dtype=torch.int))
    assert torch.equal(copies[0], sources[0].bfloat16())
    assert torch.equal(copies[1], sources[1])
    distributed._multi_tensor_copy([], [])
