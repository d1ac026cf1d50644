"""A language model of no shipped family, built by hand from parallel layers as NxD Core's users build theirs.

Tokens see those before them through a gated causal convolution of each channel, where a transformer has attention. All
of it is megatron-core's and this backend's public names (docs/core.md): column- and row-parallel layers, an embedding
and a loss divided over the vocabulary, one parameter divided by hand, and pipeline stages cut by hand.

S sequence, B micro-batch, H hidden, V vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import Tensor, nn

from nxdt_nemo.megatron.fusions.fused_layer_norm import Norm

__all__ = ["Mixer", "stage_of"]


def column(config: TransformerConfig, inside: int, outside: int) -> ColumnParallelLinear:
    return ColumnParallelLinear(inside, outside, config=config, init_method=config.init_method, bias=False)


def row(config: TransformerConfig, inside: int, outside: int) -> RowParallelLinear:
    return RowParallelLinear(
        inside,
        outside,
        config=config,
        init_method=config.output_layer_init_method,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
    )


class Convolution(MegatronModule):
    """[S, B, H/t] -> the same: each channel's weighted sum over a token and the `taps - 1` before it.

    kernel  [H/t, taps]; rank r of t keeps channels r*H/t .. (r+1)*H/t, as NxD Core's OutputChannelParallelConv2d
    """

    def __init__(self, config: TransformerConfig, channels: int, taps: int) -> None:
        super().__init__(config)
        whole = torch.empty(channels, taps, dtype=config.params_dtype)
        config.init_method(whole)
        rank, size = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        self.kernel = nn.Parameter(whole.chunk(size)[rank].clone())
        tensor_parallel.set_tensor_model_parallel_attributes(self.kernel, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        channels, taps = self.kernel.shape
        lines = F.pad(x.permute(1, 2, 0), (taps - 1, 0))
        return F.conv1d(lines, self.kernel[:, None], groups=channels).permute(2, 0, 1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        return make_sharded_tensors_for_checkpoint(
            {"kernel": self.kernel}, prefix, {"kernel": 0}, sharded_offsets=sharded_offsets
        )


class Block(MegatronModule):
    """x + mixed(x), then x + mlp(x); x is [S, B, H], with sequence parallelism [S/t, B, H]."""

    def __init__(self, config: TransformerConfig, taps: int) -> None:
        super().__init__(config)
        hidden, ffn = config.hidden_size, config.ffn_hidden_size
        self.mixer_norm = Norm(config, hidden, config.layernorm_epsilon)
        self.value, self.gate = column(config, hidden, hidden), column(config, hidden, hidden)
        self.convolution = Convolution(config, hidden, taps)
        self.out = row(config, hidden, hidden)
        self.mlp_norm = Norm(config, hidden, config.layernorm_epsilon)
        self.up, self.down = column(config, hidden, ffn), row(config, ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.mixer_norm(x)
        mixed = self.convolution(self.value(normed)[0]) * F.silu(self.gate(normed)[0])
        x = x + self.out(mixed)[0]
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))[0]))[0]


def stage_of(layers: int) -> range:
    """The layers of this pipeline rank, as many as of every other."""
    rank, size = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    return range(rank * layers // size, (rank + 1) * layers // size)


class Mixer(MegatronModule):
    """One pipeline stage, or the whole: embedding, blocks, norm and output layer.

    Beside its config, megatron-core asks a model for model_type, pre_process, post_process, set_input_tensor,
    share_embeddings_and_output_weights and, for checkpoints, sharded_state_dict.

    blocks  numbers of this stage's in the whole model, which their parameters and checkpoints are named by
    seed    each part draws its initial weights from a seed of its own, so that layouts begin with the same model
    """

    share_embeddings_and_output_weights = False
    model_type = ModelType.encoder_or_decoder

    def __init__(
        self,
        config: TransformerConfig,
        vocab: int,
        taps: int,
        blocks: Sequence[int],
        seed: int,
        pre_process: bool,
        post_process: bool,
    ) -> None:
        super().__init__(config)
        self.pre_process, self.post_process = pre_process, post_process
        self.received: Tensor | None = None
        torch.manual_seed(seed)
        self.embedding = (
            VocabParallelEmbedding(
                vocab,
                config.hidden_size,
                init_method=config.init_method,
                reduce_scatter_embeddings=config.sequence_parallel,
                config=config,
            )
            if pre_process
            else None
        )
        self.blocks = nn.ModuleDict()
        for number in blocks:
            torch.manual_seed(seed + 1 + number)
            self.blocks[str(number)] = Block(config, taps)
        torch.manual_seed(seed + 1 + config.num_layers)
        self.norm = Norm(config, config.hidden_size, config.layernorm_epsilon) if post_process else None
        self.head = column(config, config.hidden_size, vocab) if post_process else None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """What the stage before this one sent: the schedules call it before each forward pass."""
        (self.received,) = tensors

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens, labels [B, S] -> each token's loss [B, S] on the last stage, else [S, B, H] for the next."""
        x = self.received if self.embedding is None else self._embedded(tokens)
        for block in self.blocks.values():
            x = block(x)
        if self.norm is None or self.head is None:
            return x
        logits, _ = self.head(self.norm(x))  # [S, B, V/t]
        return tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels.t().contiguous()).t()

    def _embedded(self, tokens: Tensor) -> Tensor:
        if self.config.sequence_parallel:
            return self.embedding(tokens)  # reduced and scattered along the sequence, which it has put first
        return self.embedding(tokens).transpose(0, 1).contiguous()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """megatron-core's map of a checkpoint: names and places of this rank's parts in the whole model."""
        parts = {name: part for name, part in self.named_children() if name != "blocks"}
        parts |= {f"blocks.{number}": block for number, block in self.blocks.items()}
        state: dict[str, Any] = {}
        for name, part in parts.items():
            state |= sharded_state_dict_default(part, f"{prefix}{name}.", sharded_offsets, metadata)
        return state
