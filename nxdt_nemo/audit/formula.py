"""FLOPs of a GPT's micro-batch on one rank, counted by hand: what the lowered graph is checked against.

Room audit/. Standard library only. Narayanan et al. 2021 (arXiv:2104.04473), section 5.1, for a rank, with grouped
queries, gated MLPs, and attention as it is computed here: see FORMULA.
Proof: tests/audit/test_formula.py, tests/audit/test_audit.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["FORMULA", "Count", "Decoder", "count"]

FORMULA = """\
T = S B tokens, a multiply-add is 2; q, g a rank's query and KV heads, D features a head, f its part of the MLP
layer      2 T H (q + 2 g) D + 2 T q D H + 2 T H f (3 with a gate, else 2)
scores     2 B q D pairs for each of the two products; pairs = S S, in causal blocks of b queries S (S + b) / 2, with a
           window only from the first key that a block's first query sees
head       2 T H v, v the rank's part of the vocabulary
backward   twice the forward's; attention in blocks makes its scores again: 5 products for the forward's 2
experts    an MLP as often as a token has experts, and 2 T H E to choose them; a rank has its share of both. Rows of no
           token, where each of E experts has room for C of T' tokens of a rank: an MLP E C / T' times a token in all
context    a rank has its share of the tokens, and of S (S + 1) / 2 pairs
recompute  full: a layer's forward once more; selective: its attention's; but for a last product that nothing reads:
           full, the MLP's second (not a shared expert's, whose sum is sent before the others' tokens are); selective,
           of whole scores, theirs with V
"""

Recompute = Literal["", "selective", "full"]


@dataclass(frozen=True)
class Decoder:
    """A rank's part of a decoder; sizes of one micro-batch.

    layers     of this rank
    experts    MLPs of a token's: 1, or the experts that it is sent to
    shared     MLPs of all tokens' beside them, with their part of ffn
    padded     MLPs of rows of no token, for each token; below 0 where tokens are dropped
    router     experts that are chosen from, over the ranks that divide the tokens that choose
    block      queries of a block of causal attention; 0 where scores are made whole
    window     keys before its own that a query sees in such a block; None: all
    context    ranks that a sequence is divided among: parts of tokens and, on average, of pairs
    head       does it have the output layer?
    """

    layers: int
    hidden: int
    seq: int
    batch: int
    queries: int
    groups: int
    features: int
    ffn: int
    gated: bool
    vocab: int
    head: bool = True
    block: int = 0
    window: int | None = None
    recompute: Recompute = ""
    recomputed_layers: int = 0
    experts: float = 1.0
    shared: float = 0.0
    padded: float = 0.0
    router: float = 0.0
    context: int = 1

    @property
    def pairs(self) -> int:
        """Of a query and a key that a score is made of, a head and sequence."""
        starts = range(0, self.seq, self.block) if self.block else ()
        seen = self.seq if self.window is None else self.window
        blocks = ((start, min(start + self.block, self.seq)) for start in starts)
        return sum((stop - start) * (stop - max(0, start - seen)) for start, stop in blocks) or self.seq * self.seq


@dataclass(frozen=True)
class Count:
    """FLOPs of a micro-batch on a rank: what the hardware does, and what the model needs without doing it twice."""

    hardware: float
    model: float


def count(part: Decoder) -> Count:
    """By FORMULA."""
    tokens = part.seq * part.batch / part.context
    projections = 2 * tokens * part.hidden * part.features * (2 * part.queries + 2 * part.groups)
    row = 2 * tokens * part.hidden * part.ffn
    each = row * (3 if part.gated else 2)
    mlp, padding = each * (part.experts + part.shared), each * part.padded
    router = 2 * tokens * part.hidden * part.router
    product = 2 * part.batch * part.queries * part.features * part.pairs / part.context
    head = 2 * tokens * part.hidden * part.vocab if part.head else 0
    linear, attention = projections + mlp + router, 2 * product
    model = part.layers * (3 * linear + 3 * attention) + 3 * head
    unread = row * (part.experts + part.padded)
    selective = attention if part.block else product
    again = {"": 0.0, "selective": selective, "full": linear + padding + attention - unread}[part.recompute]
    scores_again = product if part.block else 0
    hardware = model + part.layers * (3 * padding + scores_again) + part.recomputed_layers * again
    return Count(hardware, model)
