"""The extension module grouped_gemm: one matrix product for each expert, over the rows that it got.

Room megatron/. What megatron.core.transformer.moe.grouped_gemm_util imports; the package is a CUTLASS kernel. Enters by
patches/views.toml. GroupedMLP's products on this backend are experts.py's; this serves a spec that names upstream's own
class. May import torch. Proof: tests/megatron/test_moe.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

__all__ = ["gmm", "ops"]


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool = False, trans_b: bool = False) -> Tensor:
    """[N, O]: batch_sizes[e] rows of a [N, I] after another, times b[e] [I, O] ([O, I] with trans_b).

    batch_sizes [E], integers on the host, of sum N. Raises NotImplementedError for trans_a, the kernel's own backward.
    """
    if trans_a:
        raise NotImplementedError("grouped_gemm's trans_a computes a weight's gradient; autograd does that here")
    experts = b.transpose(1, 2) if trans_b else b
    return torch.cat([rows @ expert for rows, expert in zip(a.split(batch_sizes.tolist()), experts, strict=True)])


ops = SimpleNamespace(gmm=gmm)
