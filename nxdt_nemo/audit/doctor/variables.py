"""Environment variables that mean something to a run, CUDA's leftovers among them.

Room audit/. A value is shown only for a name in SHOWN: reports are pasted in public places.
Proof: tests/cli/test_doctor.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nxdt_nemo.audit.doctor.row import Row

__all__ = ["rows"]

SECTION = "environment"
# Numbers and switches; never a path, a host, a token or free text.
SHOWN = frozenset(
    "NXDT_NEMO NXDT_NEMO_RUNTIME NXDT_NEMO_PLACEMENT OMP_NUM_THREADS HF_HUB_OFFLINE PYTHONDONTWRITEBYTECODE "
    "PJRT_DEVICE XLA_USE_BF16 XLA_DOWNCAST_BF16 CUDA_DEVICE_MAX_CONNECTIONS CUDA_VISIBLE_DEVICES NEURON_RT_NUM_CORES "
    "NEURON_LOGICAL_NC_CONFIG NEURON_RT_VISIBLE_CORES NEURONCORE_GROUP_SIZES RANK LOCAL_RANK WORLD_SIZE "
    "LOCAL_WORLD_SIZE NODE_RANK".split()
)
CUDA = ("CUDA_", "NCCL_", "NVTE_", "TORCH_CUDA", "TORCH_NCCL", "PYTORCH_CUDA", "PYTORCH_NVML", "CUBLAS_", "CUDNN_")
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
# name: why it is a note, and what to do
TOLD = {
    "XLA_USE_BF16": ("the Neuron SDK dropped it; older torch-xla computes fp32 in bf16", "unset it"),
    "XLA_DOWNCAST_BF16": ("the Neuron SDK dropped it; older torch-xla computes fp32 in bf16", "unset it"),
    "NEURONCORE_GROUP_SIZES": ("has no effect since Neuron 1.20", "use NEURON_RT_NUM_CORES"),
    "PYTHONDONTWRITEBYTECODE": ("a module without bytecode is compiled at every start", "unset it"),
}
# name: what happens while it is not set
UNSET = {
    "OMP_NUM_THREADS": "each rank of a script started by hand takes a thread a core",
    "HF_HUB_OFFLINE": "tokenizers are looked up on the network, for minutes where there is none; 1 turns that off",
}


def rows(environ: Mapping[str, str]) -> Iterator[Row]:
    """The rows of this section."""
    ours = [name for name in environ if name.startswith("NXDT_")]
    yield Row(SECTION, "NXDT_*", _listed(environ, ours))
    yield from _pythonpath(environ)
    cuda = [name for name in environ if name.startswith(CUDA)]
    if cuda:
        yield Row(SECTION, "CUDA's leftovers", _listed(environ, cuda), "note", "no effect here; unset them")
    else:
        yield Row(SECTION, "CUDA's leftovers", "none")
    if environ.get("PJRT_DEVICE", "CPU").upper() not in ("CPU", "NEURON"):
        yield Row(SECTION, "PJRT_DEVICE", _value(environ, "PJRT_DEVICE"), "note", "unset it: the lane chooses")
    for name, (why, fix) in TOLD.items():
        if environ.get(name):
            yield Row(SECTION, name, f"{_value(environ, name)}: {why}", "note", fix)
    neuron = [name for name in environ if name.startswith("NEURON_")]
    if neuron:
        yield Row(SECTION, "NEURON_*", _listed(environ, neuron))
    launcher = [name for name in LAUNCHER if name in environ]
    if launcher:
        fix = "unset them in a shell: a script started by hand takes itself for that rank"
        yield Row(SECTION, "a launcher's", _listed(environ, launcher), "note", fix)
    for name, means in UNSET.items():
        yield Row(SECTION, name, environ.get(name) or f"not set: {means}")


def _pythonpath(environ: Mapping[str, str]) -> Iterator[Row]:
    entries = [entry for entry in environ.get("PYTHONPATH", "").split(":") if entry]
    if entries:
        fix = "its modules are found before installed ones: look for megatron, nemo or lightning in it"
        yield Row(SECTION, "PYTHONPATH", f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}", "note", fix)


def _value(environ: Mapping[str, str], name: str) -> str:
    return environ[name] if name in SHOWN else "set"


def _listed(environ: Mapping[str, str], names: list[str]) -> str:
    return ", ".join(f"{n}={environ[n]}" if n in SHOWN else n for n in sorted(names)) or "none"
