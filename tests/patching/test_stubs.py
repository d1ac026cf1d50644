"""Stubs: an import succeeds, a question is answered, a use raises NotOnNeuron with its name."""

from __future__ import annotations

import copy
import inspect
import sys
from abc import ABC
from typing import TYPE_CHECKING, Any, Optional

import pytest

from nxdt_nemo.errors import NotOnNeuron, PatchError
from nxdt_nemo.patching.stubs import StubModule, stub_symbol

if TYPE_CHECKING:
    from conftest import MakePatcher, Upstream

SAID = "fakeup.fast.Kernel is not available on Neuron: needs CUDA"


@pytest.fixture
def kernel() -> Any:
    return stub_symbol("fakeup.fast.Kernel", "needs CUDA")


def test_a_call_raises_with_the_name(kernel: Any) -> None:
    with pytest.raises(NotOnNeuron) as raised:
        kernel(1, b=2)
    assert str(raised.value) == SAID


def test_an_attribute_raises_with_the_name(kernel: Any) -> None:
    with pytest.raises(NotOnNeuron) as raised:
        _ = kernel.apply
    assert str(raised.value) == "fakeup.fast.Kernel.apply is not available on Neuron: needs CUDA"


def test_it_can_be_asked_about(kernel: Any) -> None:
    assert not isinstance(3, kernel)
    assert not hasattr(kernel, "_probe")
    assert Optional[kernel] == kernel | None  # noqa: UP045 - both forms stand in annotations upstream
    assert inspect.isclass(kernel)
    assert copy.copy(kernel) is kernel
    assert (kernel.__module__, kernel.__name__) == ("fakeup.fast", "Kernel")


def test_a_class_may_derive_from_it_and_raises_when_it_is_made(kernel: Any) -> None:
    class Derived(kernel, ABC):  # type: ignore[misc]
        size = 3

    assert Derived.size == 3
    with pytest.raises(NotOnNeuron) as raised:
        Derived()
    assert str(raised.value) == SAID


def test_a_module_hands_out_the_same_stub_each_time() -> None:
    module = StubModule("fakeup.fast", "needs CUDA")
    assert module.Kernel is module.Kernel
    assert not hasattr(module, "__version__")
    with pytest.raises(NotOnNeuron, match=SAID):
        module.Kernel()
    with pytest.raises(NotOnNeuron, match=r"fakeup\.fast is not available on Neuron: needs CUDA"):
        module()


def test_the_patcher_answers_for_a_stubbed_module_and_what_is_below(upstream: Upstream, patcher: MakePatcher) -> None:
    one = patcher(upstream.record("fakeup.fast", kind="stub"))
    assert "fakeup.fast" in one.modules()
    fast = one.stub_for("fakeup.fast")
    assert isinstance(fast, StubModule)
    assert one.stub_for("fakeup.fast") is fast
    below = one.stub_for("fakeup.fast.kernels")
    assert below is not None
    assert below.__name__ == "fakeup.fast.kernels"
    for other in ("fakeup", "fakeup.faster", "fakeup.module"):
        assert one.stub_for(other) is None


def test_a_stub_heeds_lane_and_versions(upstream: Upstream, patcher: MakePatcher) -> None:
    record = upstream.record("fakeup.fast", kind="stub", lanes=("xla",), versions="fakeup-dist>=2")
    assert patcher(record, lane="cpu").stub_for("fakeup.fast") is None
    with pytest.raises(PatchError, match=r"fakeup-dist 1\.2\.0 is installed"):
        patcher(record, lane="xla").stub_for("fakeup.fast")


def test_a_stubbed_module_is_no_patch_target_of_its_package(upstream: Upstream, patcher: MakePatcher) -> None:
    upstream.write("fakeup.", "")
    one = patcher(upstream.record("fakeup.fast", kind="stub"))
    one.apply_to(upstream.load("fakeup"))
    assert one.applied() == []
    assert not hasattr(upstream.load("fakeup"), "fast")


def test_undo_forgets_stubbed_modules(upstream: Upstream, patcher: MakePatcher) -> None:
    upstream.write("fakeup.", "")
    one, package = patcher(upstream.record("fakeup.fast", kind="stub")), upstream.load("fakeup")
    stub = one.stub_for("fakeup.fast")
    assert stub is not None
    sys.modules["fakeup.fast"] = vars(package)["fast"] = stub  # as the import system does
    one.undo()
    assert "fakeup.fast" not in sys.modules
    assert not hasattr(package, "fast")
