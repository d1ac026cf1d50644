"""What an EC2 instance with Trainium has: the one table of figures behind memory checks, rooflines and launchers.

Room config/ (leaf). Imports the standard library and nxdt_nemo.errors. Figures are those that AWS publishes in the
Neuron documentation; each row names its pages, and nothing here was measured. Proof: tests/config/test_instances.py.

Units: bytes, bytes a second, floating-point operations a second (FLOP/s, a multiply-add is two). AWS's GB and TB are
decimal, its GiB binary; where two pages differ the smaller figure stands. Bandwidths of links are given as AWS gives
them, a chip, without saying whether both directions are counted.

Trn3, which TorchNeuron lists as hardware, has no row: no figures of it are known here, and none are guessed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from nxdt_nemo.config.report import or_list
from nxdt_nemo.errors import ConfigError

__all__ = ["CHIPS", "INSTANCES", "Chip", "Core", "Dtype", "Instance", "instance"]

Dtype = Literal["float8", "bfloat16", "float16", "tf32", "float32"]

GIB = 2**30
GB, TB, TFLOP = 10**9, 10**12, 10**12
GBIT = 10**9 / 8

GUIDE = "https://awsdocs-neuron.readthedocs-hosted.com/en/v2.29.1"
DOCS = f"{GUIDE}/about-neuron/arch"
HARDWARE = f"{DOCS}/neuron-hardware"


def _tensor(eight: float, sixteen: float, thirty_two: float) -> Mapping[Dtype, float]:
    """FLOP/s of a chip's tensor engines, from TFLOPS in 8, 16 (and TF32) and 32 bits."""
    figures: dict[Dtype, float] = {
        "float8": eight * TFLOP,
        "bfloat16": sixteen * TFLOP,
        "float16": sixteen * TFLOP,
        "tf32": sixteen * TFLOP,
        "float32": thirty_two * TFLOP,
    }
    return MappingProxyType(figures)


@dataclass(frozen=True)
class Chip:
    """One Trainium chip, which Neuron's tools call a device.

    target         name of the architecture for neuronx-cc --target
    cores          physical NeuronCores
    lnc            values that NEURON_LOGICAL_NC_CONFIG can take, the default first
    lanes          this package's lanes that run on it
    hbm            bytes of device memory
    hbm_banks      banks that it is made of; the cores of one bank share it
    hbm_bandwidth  bytes a second between them and the cores
    flops          peak FLOP/s by dtype, dense
    """

    name: str
    target: str
    cores: int
    lnc: tuple[int, ...]
    lanes: tuple[str, ...]
    hbm: int
    hbm_banks: int
    hbm_bandwidth: float
    flops: Mapping[Dtype, float]
    source: str


@dataclass(frozen=True)
class Core:
    """What one logical NeuronCore, that is one rank, has of its chip and its instance: equal shares.

    hbm            bytes
    hbm_bandwidth  bytes a second
    flops          peak FLOP/s by dtype
    neuronlink     bytes a second to the other chips of the instance; 0 where there is one chip only
    network        bytes a second to other instances
    """

    hbm: int
    hbm_bandwidth: float
    flops: Mapping[Dtype, float]
    neuronlink: float
    network: float


@dataclass(frozen=True)
class Instance:
    """An instance type.

    chips        Trainium chips
    vcpus        of the host
    host_memory  bytes of the host's
    neuronlink   bytes a second of one chip's links to the others of the instance, all together
    network      bytes a second of the instance's network: EFA, where it has any
    efa_devices  network cards for EFA, which a pod asks for by number; 0 where there is no EFA, and one node is all
    linked       instances that NeuronLink joins to an UltraServer
    """

    name: str
    chip: Chip
    chips: int
    vcpus: int
    host_memory: int
    neuronlink: float
    network: float
    efa_devices: int
    source: str
    linked: int = 1

    @property
    def default_lnc(self) -> int:
        """Physical cores in a logical one where nothing says otherwise."""
        return self.chip.lnc[0]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Logical cores by LNC, the default's first: what trainer.devices can be."""
        return tuple(self.cores(lnc) for lnc in self.chip.lnc)

    def cores(self, lnc: int | None = None) -> int:
        """Logical NeuronCores of the instance."""
        return self.chips * self.chip.cores // self.checked(lnc)

    def core(self, lnc: int | None = None) -> Core:
        """One rank's share. At LNC 1 on trn2 two ranks have one bank between them: half of it is the share."""
        part = self.checked(lnc) / self.chip.cores
        return Core(
            hbm=int(self.chip.hbm * part),
            hbm_bandwidth=self.chip.hbm_bandwidth * part,
            flops=MappingProxyType({dtype: peak * part for dtype, peak in self.chip.flops.items()}),
            neuronlink=self.neuronlink * part,
            network=self.network / self.cores(lnc),
        )

    def checked(self, lnc: int | None) -> int:
        """The LNC, the default for None. Raises ConfigError for one that the chip does not have."""
        if lnc is None:
            return self.default_lnc
        if lnc not in self.chip.lnc:
            has = " or ".join(str(value) for value in sorted(self.chip.lnc))
            raise ConfigError(f"neuron.lnc={lnc} on {self.name}", fix=f"{self.chip.name} has LNC {has}")
        return lnc

    def lnc_of(self, ranks: int) -> int | None:
        """The LNC at which the instance has as many logical cores as that; None if there is no such."""
        return next((lnc for lnc in self.chip.lnc if self.cores(lnc) == ranks), None)


TRAINIUM = Chip(
    name="Trainium",
    target="trn1",
    cores=2,
    lnc=(1,),
    lanes=("xla",),
    hbm=32 * GIB,
    hbm_banks=2,
    hbm_bandwidth=820 * GB,
    flops=_tensor(190, 190, 47.5),
    source=f"{HARDWARE}/trainium.html, {GUIDE}/nki/guides/architecture/trainium_inferentia2_arch.html",
)
TRAINIUM2 = Chip(
    name="Trainium2",
    target="trn2",
    cores=8,
    lnc=(2, 1),
    lanes=("xla", "neuron"),
    hbm=96 * GIB,
    hbm_banks=4,
    hbm_bandwidth=2.9 * TB,
    flops=_tensor(1299, 667, 181),
    source=f"{HARDWARE}/trainium2.html, {DOCS}/neuron-features/logical-neuroncore-config.html",
)
CHIPS: Mapping[str, Chip] = MappingProxyType({chip.name: chip for chip in (TRAINIUM, TRAINIUM2)})

_TRN1 = f"{HARDWARE}/trn1-arch.html"
_TRN2 = f"{HARDWARE}/trn2-arch.html"
_EFA1 = f"{GUIDE}/frameworks/torch/torch-neuronx/setup-trn1-multi-node-execution.html"
_EFA2 = f"{GUIDE}/containers/neuron-dra.html"
_ALL = (
    Instance("trn1.2xlarge", TRAINIUM, 1, 8, 32 * GIB, 0.0, 12.5 * GBIT, 0, f"{_TRN1}, {_EFA1}"),
    Instance("trn1.32xlarge", TRAINIUM, 16, 128, 512 * GIB, 384 * GB, 800 * GBIT, 8, f"{_TRN1}, {_EFA1}"),
    Instance("trn1n.32xlarge", TRAINIUM, 16, 128, 512 * GIB, 768 * GB, 1600 * GBIT, 16, f"{_TRN1}, {_EFA1}"),
    Instance("trn2.3xlarge", TRAINIUM2, 1, 12, 128 * GIB, 0.0, 200 * GBIT, 0, _TRN2),
    Instance("trn2.48xlarge", TRAINIUM2, 16, 192, 2048 * GIB, 1024 * GB, 3200 * GBIT, 16, f"{_TRN2}, {_EFA2}"),
    Instance("trn2u.48xlarge", TRAINIUM2, 16, 192, 2048 * GIB, 1024 * GB, 3200 * GBIT, 16, f"{_TRN2}, {_EFA2}", 4),
)
INSTANCES: Mapping[str, Instance] = MappingProxyType({one.name: one for one in _ALL})


def instance(name: str, *, key: str = "", place: str = "") -> Instance:
    """The instance type of that name.

    Raises ConfigError naming `place` (a file or an option), the `key` that gave it and the nearest name.
    """
    found = INSTANCES.get(name)
    if found is None:
        near = difflib.get_close_matches(name, INSTANCES, n=1)
        fix = f"did you mean {near[0]}?" if near else f"use {or_list(INSTANCES)}"
        raise ConfigError(f"{key}={name} is not a known instance".removeprefix("="), place=place, fix=fix)
    return found
