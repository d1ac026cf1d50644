"""apex.amp, which torch.autocast replaced.

Room apex/. NeMo's text-to-image models import the module and call nothing in it. Proof: tests/apex/test_absent.py.
"""

from __future__ import annotations

from ._absent import unavailable

__all__ = ["initialize", "master_params", "scale_loss"]

_INSTEAD = "use trainer.precision=bf16-mixed"

initialize = unavailable("apex.amp.initialize", _INSTEAD)
master_params = unavailable("apex.amp.master_params", _INSTEAD)
scale_loss = unavailable("apex.amp.scale_loss", _INSTEAD)
