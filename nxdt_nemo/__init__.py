"""nxdt_nemo runs NVIDIA NeMo and Megatron training scripts on AWS Trainium, unedited.

>>> import nxdt_nemo
>>> nxdt_nemo.activate()      # before nemo or megatron is imported

Importing this package loads no torch.
"""

__version__ = "0.1.0"
__all__ = ["__version__", "activate", "deactivate", "is_active"]


def activate(runtime: str | None = None) -> None:
    """Arm the backend in this process and in the processes that it starts.

    runtime  auto, cpu, xla or neuron; default: NXDT_NEMO_RUNTIME, else auto
    Idempotent. Raises UserError if NeMo or Megatron is imported already, LaneError for a lane that this
    machine cannot run, PatchError if a record in patches/ is not well formed.
    """
    from nxdt_nemo._activation import activate

    activate(runtime)


def deactivate() -> None:
    """Take the backend out again: upstream's own objects are back under their names."""
    from nxdt_nemo._activation import deactivate

    deactivate()


def is_active() -> bool:
    """True while the backend is armed in this process."""
    from nxdt_nemo._activation import is_active

    return is_active()
