"""Where the tokens of packed sequences stand, on one rank and in context parallelism.

Room megatron/. Reads megatron-core's PackedSeqParams (qkv_format "thd"), whose lengths are tensors: everything here is
integer arithmetic on vectors of a fixed length, with no read back to the host.
Proof: tests/megatron/test_blocked_attention.py, tests/megatron/test_context_parallel.py.

Megatron's order in context parallelism of p ranks (megatron.core.utils.get_batch_on_this_cp_rank, for packed sequences
TransformerEngine's thd_get_partitioned_indices): a sequence, or each packed one, is cut into 2p equal chunks; rank r
has chunk r, its early one, and chunk 2p - 1 - r, its late one. c is the tokens of a chunk number of all sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PADDING", "Chunks", "Order", "chunks_of", "local_order", "segments_of"]

PADDING = -1
"""Segment of keys between a sequence's end and the place where the next one begins: no query is of it."""


@dataclass(frozen=True)
class Chunks:
    """Tokens in the order of chunks, sequences in turn within each chunk.

    positions           [2p, c], a token's place in its own sequence
    queries, keys       [2p, c], the sequence it belongs to; None: all tokens are of one
    """

    positions: Tensor
    queries: Tensor | None = None
    keys: Tensor | None = None


@dataclass(frozen=True)
class Order:
    """Gathers [2c] from a rank's thd order to "early chunks, late chunks", and back."""

    to_chunks: Tensor
    to_thd: Tensor


def segments_of(starts: Tensor, ends: Tensor | None, tokens: int) -> tuple[Tensor, Tensor]:
    """The sequences that tokens belong to, [tokens] as queries and as keys.

    starts  [sequences + 1], where sequences begin in memory (cu_seqlens_q_padded, or cu_seqlens_q)
    ends    [sequences + 1], their cumulative true lengths where these are smaller (cu_seqlens_q beside the former)
    Tokens after the last sequence are one more. Queries in the padding see their sequence's keys.
    """
    starts = _with_rest(starts, tokens)
    segments, places = _segments_and_places(starts, tokens)
    return segments, _padding_marked(segments, places, ends)


def chunks_of(starts: Tensor | None, ends: Tensor | None, size: int, parts: int, device: torch.device) -> Chunks:
    """Chunks of `size` tokens over `parts` ranks: of one sequence, or of packed ones (as for segments_of).

    Each packed sequence's length in memory is a multiple of 2 * parts.
    """
    number = torch.arange(2 * parts, device=device).unsqueeze(1)
    if starts is None:
        return Chunks(number * size + torch.arange(size, device=device))
    cut = _with_rest(starts, 2 * parts * size) // (2 * parts)
    segments, places = _segments_and_places(cut, size)
    positions = number * cut.diff()[segments] + places
    segments = segments.expand_as(positions)
    return Chunks(positions, segments, _padding_marked(segments, positions, ends))


def local_order(starts: Tensor, size: int, parts: int) -> Order:
    """How a rank's packed tokens (each sequence's early chunk, then its late one) are put in chunk order."""
    cut = _with_rest(starts, 2 * parts * size) // (2 * parts)
    lengths = cut.diff()
    segments, places = _segments_and_places(cut, size)
    early = 2 * cut[segments] + places
    to_chunks = torch.cat((early, early + lengths[segments]))
    segments, places = _segments_and_places(2 * cut, 2 * size)
    late = places >= lengths[segments]
    to_thd = torch.where(late, size - lengths[segments], 0) + cut[segments] + places
    return Order(to_chunks, to_thd)


def _with_rest(starts: Tensor, tokens: int) -> Tensor:
    return torch.cat((starts, starts.new_full((1,), tokens))).long()


def _segments_and_places(starts: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    places = torch.arange(tokens, device=starts.device)
    segments = (places.unsqueeze(1) >= starts[1:]).sum(1)
    return segments, places - starts[segments]


def _padding_marked(segments: Tensor, places: Tensor, ends: Tensor | None) -> Tensor:
    if ends is None:
        return segments
    lengths = ends.long().diff()
    rest = lengths.new_full((1,), torch.iinfo(lengths.dtype).max)  # what is after the last sequence has no padding
    return torch.where(places < torch.cat((lengths, rest))[segments], segments, PADDING)
