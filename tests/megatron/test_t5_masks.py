"""The pair of padding masks that NeMo hands to a T5, as the one mask of its cross attention."""

from __future__ import annotations

import torch

from nxdt_nemo.megatron.models.T5.t5_model import forward


def given(mask):
    """The mask that upstream's forward gets."""
    return forward(lambda *args: args[5], None, None, None, None, None, mask)


def test_a_token_sees_what_is_padding_on_neither_side():
    decoder = torch.tensor([[False, True]]).view(1, 1, 1, 2)
    encoder = torch.tensor([[False, False, True]]).view(1, 1, 1, 3)
    assert given((decoder, encoder)).tolist() == [[[[False, False, True], [True, True, True]]]]


def test_one_mask_stays_as_it_is():
    mask = torch.zeros(1, 1, 2, 3, dtype=torch.bool)
    assert given(mask) is mask
    assert given(None) is None
