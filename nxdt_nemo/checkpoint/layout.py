"""Which layers, experts and slices a file of a checkpoint has: tensor, pipeline and expert parallel sizes.

Room checkpoint/ (leaf). Stages as megatron.core's get_transformer_layer_offset (core_v0.13.1) makes them.
May import the standard library and nxdt_nemo.errors. Proof: tests/checkpoint/test_families.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nxdt_nemo.errors import LayoutError

__all__ = ["Layout", "Shard", "padded"]


@dataclass(frozen=True)
class Shard:
    """What one rank holds: slice `tp` of `ranks`, these layers and experts (global numbers, in its own order).

    first, last  it has what comes before the layers, or after them; of a T5's stages each side has both
    """

    tp: int
    ranks: int
    layers: Sequence[int]
    experts: Sequence[int] = ()
    expert_tp: int = 0
    expert_ranks: int = 1
    first: bool = True
    last: bool = True
    pp: int = 0
    chunk: int = 0
    ep: int = 0


@dataclass(frozen=True)
class Layout:
    """Sizes, and the stages if they are not equal.

    stages   layers of each of the pp * vpp stages in the order in which a sample visits them; () for equal ones
    etp      tensor parallel size of experts; 0 for tp
    encoder  of the pp stages, those of a T5's encoder, which come before its decoder's; 0 if it has no stages apart
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 0
    stages: tuple[int, ...] = ()
    encoder: int = 0

    def __str__(self) -> str:
        names = {"tp": self.tp, "pp": self.pp, "vpp": self.vpp, "ep": self.ep}
        said = [f"{name.upper()} {size}" for name, size in names.items() if size > 1 or name in ("tp", "pp")]
        said += [f"{self.encoder} of them the encoder's"] if self.encoder else []
        return ", ".join(said)

    def check(self, layers: int, experts: int, decoder: int = 0) -> Layout:
        """Itself. Raises LayoutError if the model cannot be cut so. decoder: layers of a T5's decoder."""
        for name in ("tp", "pp", "vpp", "ep"):
            if getattr(self, name) < 1:
                raise LayoutError(f"{name}={getattr(self, name)} is not a size", fix="use 1 or more")
        parts = self.pp * self.vpp
        if self.vpp > 1 and self.pp == 1:
            raise LayoutError(f"vpp={self.vpp} with pp=1: virtual stages need a pipeline", fix="use pp >= 2")
        if self.encoder:
            self._check_sides(layers, decoder)
        elif self.stages:
            if len(self.stages) != parts or sum(self.stages) != layers:
                reason = f"stages {list(self.stages)} are {len(self.stages)} with {sum(self.stages)} layers"
                raise LayoutError(reason, fix=f"give pp * vpp = {parts} numbers that add up to {layers}")
        elif layers % parts:
            reason = f"pp * vpp = {parts} does not divide {layers} layers"
            raise LayoutError(reason, fix="name the layers of each stage: --stages 5,6,6,5")
        if experts and experts % self.ep:
            raise LayoutError(f"ep={self.ep} does not divide {experts} experts", fix="use a divisor")
        if self.ep > 1 and not experts:
            raise LayoutError(f"ep={self.ep}, but the model has no experts", fix="use ep=1")
        return self

    def _check_sides(self, layers: int, decoder: int) -> None:
        sides = self.encoder, self.pp - self.encoder
        said = f"pp={self.pp} with {sides[0]} stages of an encoder"
        if min(sides) < 1 or not decoder:
            raise LayoutError(f"{said} leaves none for a decoder", fix="correct encoder_pp")
        if self.vpp > 1 or self.stages:
            raise LayoutError(f"{said}: Megatron cuts both sides into equal stages", fix="leave out --vpp and --stages")
        if layers % sides[0] or decoder % sides[1]:
            reason = f"{said} and {sides[1]} of a decoder does not divide {layers} and {decoder} layers"
            raise LayoutError(reason, fix="use divisors for both")

    def layers_of(self, layers: int, pp: int, chunk: int = 0) -> range:
        """Global numbers of the layers of a stage: virtual stage chunk * PP + pp of those that a sample visits.

        Of a T5 those of its encoder.
        """
        if self.encoder:
            return _share(layers, pp, self.encoder)
        counts = self.stages or (layers // (self.pp * self.vpp),) * (self.pp * self.vpp)
        place = chunk * self.pp + pp
        begin = sum(counts[:place])
        return range(begin, begin + counts[place])

    def decoder_of(self, layers: int, pp: int) -> range:
        """The same of a T5's decoder, which has so many."""
        return _share(layers, pp - self.encoder, self.pp - self.encoder) if self.encoder else range(layers)

    def shards(self, layers: int, experts: int = 0) -> Iterator[Shard]:
        """One for each (pp, chunk) and rank of `grid`."""
        each = experts // self.ep
        for pp in range(self.pp):
            for tp, ep, etp in self.grid():
                for chunk in range(self.vpp):
                    yield self.shard(layers, tp, pp, chunk, ep, range(ep * each, (ep + 1) * each), etp)

    def grid(self) -> list[tuple[int, int, int]]:
        """(tp, ep, expert tp) of the ranks of a stage, as many as differ.

        Dense layers count ranks tp first, expert layers etp, then ep: with etp < tp not all pairs (tp, ep) occur.
        """
        etp = self.etp or self.tp
        found: dict[tuple[int, int], int] = {}
        for rank in range(math.lcm(self.tp, etp * self.ep)):
            found.setdefault((rank % self.tp, rank // etp % self.ep), rank % etp)
        return [
            (tp, ep, expert_tp) for (tp, ep), expert_tp in sorted(found.items(), key=lambda at: (at[0][1], at[0][0]))
        ]

    def shard(
        self, layers: int, tp: int, pp: int, chunk: int, ep: int, experts: Sequence[int], expert_tp: int = 0
    ) -> Shard:
        """The one at these coordinates."""
        return Shard(
            tp=tp,
            ranks=self.tp,
            layers=self.layers_of(layers, pp, chunk),
            experts=experts,
            expert_tp=expert_tp,
            expert_ranks=self.etp or self.tp,
            first=pp in (0, self.encoder) and chunk == 0,
            last=pp in (self.pp - 1, self.encoder - 1) and chunk == self.vpp - 1,
            pp=pp,
            chunk=chunk,
            ep=ep,
        )


def _share(count: int, part: int, parts: int) -> range:
    """Which of `count` are in one of equal parts; none in parts that there are not."""
    each = count // parts
    return range(part * each, (part + 1) * each) if 0 <= part < parts else range(0)


def padded(vocab: int, divisible_by: int, tp: int) -> int:
    """Megatron's padded vocabulary: the next multiple of divisible_by * tp."""
    multiple = divisible_by * tp
    return -(-vocab // multiple) * multiple
