"""Generation over pipeline stages: upstream's hand-over of a tensor between two ranks, and its refusal of others."""

from __future__ import annotations

import pytest
import torch

from nxdt_nemo.testing.ours import ACTIVE, ACTIVE_ENV, _model_parallel, forget_groups
from nxdt_nemo.testing.pytest_plugin import Gloo
from nxdt_nemo.testing.recipe import Layout, Recipe

pytestmark = pytest.mark.ranks


def handed_over() -> tuple[torch.Tensor, torch.Tensor]:
    """What the first stage received from the last, and the last from the first."""
    from megatron.core import parallel_state
    from megatron.core.inference import communication_utils as upstream

    _model_parallel(Recipe.of("gpt"), Layout(pp=2))
    try:
        mine = torch.arange(6.0).reshape(2, 3) + 10 * parallel_state.get_pipeline_model_parallel_rank()
        last = parallel_state.is_pipeline_last_stage()
        of_last = upstream.broadcast_from_last_pipeline_stage([2, 3], torch.float32, mine if last else None)
        received = torch.empty(2, 3)
        if last:
            upstream.recv_from_prev_pipeline_rank_(received)
        else:
            upstream.send_to_next_pipeline_rank(mine)
        return of_last, received if last else mine
    finally:
        forget_groups()


def test_between_two_stages(gloo: Gloo) -> None:
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    for of_last, of_first in gloo(2, handed_over, init=ACTIVE, env=ACTIVE_ENV):
        assert of_first.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert of_last.tolist() == [[10, 11, 12], [13, 14, 15]]


def refused() -> int:
    from megatron.core.inference.communication_utils import _is_cuda

    found = 0
    for wrong in (None, torch.empty(2, device="meta")):
        try:
            _is_cuda(wrong)
        except AssertionError:
            found += 1
    return found


def test_a_tensor_elsewhere_is_refused(gloo: Gloo) -> None:
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    assert gloo(1, refused, init=ACTIVE, env=ACTIVE_ENV) == [2]
