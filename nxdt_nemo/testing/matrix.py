"""The layouts that every family is proven in, and the mistakes that must show.

Room testing/. Plain data. Used by tests/megatron/test_layouts.py and tools/layouts.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nxdt_nemo.testing.mistakes import Fault
from nxdt_nemo.testing.recipe import Family, Layout, Recipe, layout

__all__ = ["FAST", "LAYOUTS", "MISTAKES", "NEMO", "NEURON", "NEURON_TOLERANCE", "TOLERANCE", "NemoRow", "recipe_of"]

TOLERANCE = 1e-5

LAYOUTS: dict[Family, str] = {
    "gpt": (
        "tp2 tp2sp tp4sp pp2 pp4 pp2first1 pp3first1last1 pp3account pp2cut0-4"
        " pp2cut1-0-2-1vpp2 pp2vpp2 pp4vpp2 tp2pp2 tp2sppp2vpp2 dp2 dp2+zero tp2spdp2+zero"
        " pp2dp2+zero pp2vpp2dp2+zero tp2sppp2vpp2dp2+zero cp2 cp2dp2+zero cp2pp2vpp2 tp2spcp2pp2"
    ),
    "llama": (
        "tp2 tp2sp tp4sp pp2 pp4 pp2first1 pp2vpp2 pp4vpp2 tp2pp2 tp2sppp2vpp2 dp2 dp2+zero dp4+zero tp2spdp2+zero"
        " pp2dp2+zero pp2vpp2dp2+zero tp2sppp2vpp2dp2+zero cp2 cp4 cp2dp2+zero tp2cp2 cp2pp2vpp2 tp2spcp2dp2+zero tp8"
    ),
    "mixtral": (
        "tp2sp tp4sp pp2 pp4 pp2cut1-3 pp2vpp2 tp2sppp2 dp2 dp2+zero tp2spdp2+zero pp2dp2+zero cp2"
        " ep2dp2 ep4dp4 ep2dp2+zero ep2dp4+zero ep4dp4+zero tp2spep2dp2 tp2spep2etp1 tp2spep2etp1dp2+zero"
        " ep2pp2dp2 ep2pp2vpp2dp2+zero cp2ep2 tp2spcp2ep2 one+grouped one+static tp2sp+grouped"
        " tp2spep2etp1+grouped ep2dp2+zero+grouped ep2dp2+grouped+static tp2spep2dp2+grouped+static"
    ),
    "bert": "tp2 tp2sp pp2 pp2vpp2 dp2+zero",
    "t5": "tp2 tp2sp pp2 pp4 dp2+zero",
}

FAST: dict[Family, str] = {
    "gpt": "pp2cut1-0-2-1vpp2 pp2first1",
    "llama": "cp2",
    "mixtral": "ep2dp2+zero tp2spep2etp1",
    "bert": "tp2sp",
    "t5": "pp2",
}

MISTAKES: tuple[tuple[Family, str, Fault], ...] = (
    ("gpt", "tp2sp", "norm gradients not reduced"),
    ("gpt", "tp2", "input gradients not summed"),
    ("gpt", "pp2", "tied embeddings not summed"),
    ("gpt", "pp2", "norm of one rank"),
    ("gpt", "dp2", "replicas not averaged"),
    ("gpt", "dp2+zero", "replicas not averaged"),
    ("mixtral", "ep2dp4", "experts not averaged"),
    ("mixtral", "ep2dp2+grouped+static", "an expert's gradient left out"),
    ("mixtral", "ep2dp2+grouped+static", "rows dropped"),
    ("llama", "cp2", "replicas not averaged"),
    ("llama", "tp8", "KV copies not summed"),
    ("llama", "tp2", "one gradient x 1.01"),
)

NEURON: tuple[tuple[Family, str, Fault], ...] = (
    ("gpt", "one", ""),
    ("gpt", "tp2", ""),
    ("llama", "tp2sp", ""),
    ("gpt", "dp2", ""),
    ("gpt", "dp2+zero", ""),
    ("gpt", "pp2", ""),
    ("mixtral", "ep2dp2", ""),
    ("gpt", "tp2sp", "norm gradients not reduced"),
)
"""What the neuron lane's stand-in is compared with the cpu lane in, and a mistake that has to show."""
NEURON_TOLERANCE = 1e-6


@dataclass(frozen=True)
class NemoRow:
    """A layout of NeMo's YAML model: in float32 against one rank, or in bf16 with megatron_amp_O2.

    half       NeMo takes interleaved pipelines and experts with megatron_amp_O2 only; held to the dtype's own error
    kv_groups  KV heads, where that is not the family's number
    """

    family: Family
    name: str
    half: bool = False
    optimizer: str = "fused_adam"
    kv_groups: int = 0

    def recipe(self) -> tuple[Recipe, Layout]:
        """Its recipe and layout."""
        recipe, place = recipe_of(self.family, self.name)
        if self.kv_groups:
            recipe = replace(recipe, kv_groups=self.kv_groups)
        return replace(recipe, dtype="bfloat16") if self.half else recipe, place


NEMO = (
    NemoRow("gpt", "pp2vpp2", half=True),
    NemoRow("mixtral", "ep2dp2", half=True),
    NemoRow("gpt", "cp2"),
    NemoRow("llama", "pp2vpp2", half=True),
    NemoRow("gpt", "tp2sppp2vpp2", half=True),
    NemoRow("gpt", "pp2first1"),
    NemoRow("gpt", "pp2cut1-0-2-1vpp2", half=True),
    NemoRow("llama", "tp2cp2"),
    NemoRow("llama", "tp4", kv_groups=2),
    NemoRow("mixtral", "tp2sp"),
    NemoRow("mixtral", "ep2dp2", half=True, optimizer="mcore_distributed_optim"),
    NemoRow("mixtral", "tp2spep2dp2", half=True, optimizer="mcore_distributed_optim"),
)
"""The first is the fast one."""


def recipe_of(family: Family, name: str, steps: int = 20) -> tuple[Recipe, Layout]:
    """A row's recipe and layout: with layers enough for its stages, and micro-batches for its schedule."""
    place = layout(name)
    recipe = Recipe.of(family, steps=steps)
    layers = max(recipe.layers, place.pp * place.chunks)
    if place.cut:
        layers = sum(int(count) for count in place.cut.split("-"))
    elif place.account:  # embedding and loss count as a layer each
        layers = 2 * place.pp - 2
    batches = max(recipe.micro_batches, place.dp * place.pp) if place.vpp else recipe.micro_batches
    return Recipe.of(family, steps=steps, layers=layers, micro_batches=batches), place
