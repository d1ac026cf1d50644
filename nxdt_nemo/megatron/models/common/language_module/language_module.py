"""What an encoder-decoder's second set of embeddings lacks.

Room megatron/. Wraps megatron.core.models.common.language_module.language_module.LanguageModule's
setup_embeddings_and_output_layer. With pipeline parallelism the first stage of a T5's decoder has embeddings of its
own, copies of the encoder's. Upstream leaves them unmarked, so that they count twice in the gradient norm; and where
that stage is the last one too, the fused weight gradient drops what the embedding adds to the output layer's.
Proof: tests/megatron/test_layouts.py (t5, pp2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nxdt_nemo.runtime.select import current

__all__ = ["setup_embeddings_and_output_layer"]


def setup_embeddings_and_output_layer(upstream: Callable[[Any], None], self: Any) -> None:
    """Upstream's, then `shared` on copies of embeddings, and `zero_out_wgrad` on a weight used at both ends. The word
    embeddings are told whether gradients are added where they add up, as linear layers are."""
    from megatron.core import parallel_state

    if parallel_state.get_pipeline_model_parallel_world_size() > 1 and self.share_embeddings_and_output_weights:
        current().place(self)  # upstream moves the data of the two ends' weights, which not every lane can
    upstream(self)
    if not self.pre_process:
        return
    self.embedding.word_embeddings.gradient_accumulation_fusion = self.config.gradient_accumulation_fusion
    if self.post_process and self.share_embeddings_and_output_weights:
        self.shared_embedding_or_output_weight().zero_out_wgrad = True
    if not parallel_state.is_pipeline_first_stage(ignore_virtual=True):
        for weight in self.embedding.parameters():
            weight.shared = True
