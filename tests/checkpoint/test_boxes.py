"""Boxes: runs of a flattened tensor become boxes that cover it once."""

from __future__ import annotations

import pytest
import torch

from nxdt_nemo.checkpoint.boxes import Box, flat_boxes, whole


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (4, 1, 6)])
def test_any_run_of_elements_is_a_few_contiguous_boxes(shape: tuple[int, ...]) -> None:
    flat = torch.arange(int(torch.tensor(shape).prod()))
    tensor = flat.view(shape)
    for begin in range(len(flat)):
        for end in range(begin + 1, len(flat) + 1):
            parts = list(flat_boxes(shape, begin, end))
            pieces = [tensor[box.inside((0,) * len(shape))].reshape(-1) for box, _ in parts]
            assert torch.equal(torch.cat(pieces), flat[begin:end])
            assert [offset for _, offset in parts] == [int(piece[0]) - begin for piece in pieces]
            assert len(parts) <= 2 * len(shape) - 1


def test_boxes_meet_and_move() -> None:
    box = Box((2, 0), (4, 3))
    assert box.meet(Box((5, 1), (4, 9))) == Box((5, 1), (1, 2))
    assert box.meet(Box((6, 0), (1, 3))) is None
    assert box.moved((2, 0), (0, 1)) == Box((0, 1), (4, 3))
    assert box.turned() == Box((0, 2), (3, 4))
    assert whole((4, 3)).volume == 12
