"""The vocabulary of logical tensors: one name, shape and tensor-parallel axis for each, whatever the format.

Room checkpoint/ (leaf). Nothing is fused, stacked, padded or transposed here: weights are [out, in] as in
torch.nn.Linear. Sizes are the letters of `Model.sizes`. A family (families/) lists those it has; dialects and formats
say how they are stored. May import the standard library and checkpoint/model.py.
Proof: tests/checkpoint/test_families.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nxdt_nemo.checkpoint.model import Model

__all__ = ["KINDS", "VOCABULARY", "Kind", "Logical", "logical_of"]

# The state that a parameter has; all kinds of one parameter have its shape.
KINDS = ("model", "fp32_param", "exp_avg", "exp_avg_sq")
Kind = str


@dataclass(frozen=True)
class Logical:
    """A row of the vocabulary.

    shape  letters, one an axis
    tp     the axis that tensor parallelism splits; None: each rank has all of it
    """

    name: str
    shape: str
    tp: int | None

    def size(self, model: Model) -> tuple[int, ...]:
        """The shape in numbers."""
        sizes = model.sizes()
        return tuple(sizes[letter] for letter in self.shape.split())


def _rows(text: str) -> Iterator[Logical]:
    for line in text.strip().splitlines():
        name, shape, tp = (part.strip() for part in line.split("|"))
        yield Logical(name, shape, None if tp == "-" else int(tp))


# {l} a layer, {e} an expert; x.{weight,bias} are two rows.
_DECODER = """
    embedding.word.weight                  | V H | 0
    embedding.position.weight              | P H | -
    embedding.token_type.weight            | T H | -
    embedding.norm.weight                  | H   | -
    embedding.norm.bias                    | H   | -
    layers.{l}.attention.norm.weight       | H   | -
    layers.{l}.attention.norm.bias         | H   | -
    layers.{l}.attention.q.weight          | Q H | 0
    layers.{l}.attention.k.weight          | K H | 0
    layers.{l}.attention.v.weight          | K H | 0
    layers.{l}.attention.q.bias            | Q   | 0
    layers.{l}.attention.k.bias            | K   | 0
    layers.{l}.attention.v.bias            | K   | 0
    layers.{l}.attention.q_norm.weight     | D   | -
    layers.{l}.attention.k_norm.weight     | D   | -
    layers.{l}.attention.out.weight        | H Q | 1
    layers.{l}.attention.out.bias          | H   | -
    layers.{l}.mlp.norm.weight             | H   | -
    layers.{l}.mlp.norm.bias               | H   | -
    layers.{l}.mlp.gate.weight             | F H | 0
    layers.{l}.mlp.up.weight               | F H | 0
    layers.{l}.mlp.up.bias                 | F   | 0
    layers.{l}.mlp.down.weight             | H F | 1
    layers.{l}.mlp.down.bias               | H   | -
    layers.{l}.router.weight               | E H | -
    layers.{l}.experts.{e}.gate.weight     | M H | 0
    layers.{l}.experts.{e}.up.weight       | M H | 0
    layers.{l}.experts.{e}.down.weight     | H M | 1
    final_norm.weight                      | H   | -
    final_norm.bias                        | H   | -
    head.weight                            | V H | 0
    head.bias                              | V   | 0
    head.dense.weight                      | H H | -
    head.dense.bias                        | H   | -
    head.norm.weight                       | H   | -
    head.norm.bias                         | H   | -
    pooler.weight                          | H H | -
    pooler.bias                            | H   | -
    binary_head.weight                     | 2 H | -
    binary_head.bias                       | 2   | -
    relative_bias.weight                   | R N | -
"""
# T5's decoder: {l} counts its own layers.
_SECOND = """
    decoder.{l}.attention.norm.weight      | H   | -
    decoder.{l}.attention.norm.bias        | H   | -
    decoder.{l}.attention.q.weight         | Q H | 0
    decoder.{l}.attention.k.weight         | K H | 0
    decoder.{l}.attention.v.weight         | K H | 0
    decoder.{l}.attention.q.bias           | Q   | 0
    decoder.{l}.attention.k.bias           | K   | 0
    decoder.{l}.attention.v.bias           | K   | 0
    decoder.{l}.attention.out.weight       | H Q | 1
    decoder.{l}.attention.out.bias         | H   | -
    decoder.{l}.cross.norm.weight          | H   | -
    decoder.{l}.cross.norm.bias            | H   | -
    decoder.{l}.cross.q.weight             | Q H | 0
    decoder.{l}.cross.q.bias               | Q   | 0
    decoder.{l}.cross.k.weight             | K H | 0
    decoder.{l}.cross.k.bias               | K   | 0
    decoder.{l}.cross.v.weight             | K H | 0
    decoder.{l}.cross.v.bias               | K   | 0
    decoder.{l}.cross.out.weight           | H Q | 1
    decoder.{l}.cross.out.bias             | H   | -
    decoder.{l}.mlp.norm.weight            | H   | -
    decoder.{l}.mlp.norm.bias              | H   | -
    decoder.{l}.mlp.gate.weight            | F H | 0
    decoder.{l}.mlp.up.weight              | F H | 0
    decoder.{l}.mlp.up.bias                | F   | 0
    decoder.{l}.mlp.down.weight            | H F | 1
    decoder.{l}.mlp.down.bias              | H   | -
    decoder_norm.weight                    | H   | -
    decoder_norm.bias                      | H   | -
    decoder_relative_bias.weight           | R N | -
"""
VOCABULARY: Mapping[str, Logical] = {row.name: row for row in (*_rows(_DECODER), *_rows(_SECOND))}

_NUMBERS = re.compile(r"(?<=\.)(\d+)(?=\.)")


def logical_of(name: str) -> Logical:
    """The row of a tensor's name: layers.3.attention.q.weight has layers.{l}.attention.q.weight."""
    holes = iter(("{l}", "{e}"))
    return VOCABULARY[_NUMBERS.sub(lambda _: next(holes), name)]
