"""The chunks of an interleaved pipeline for NeMo's YAML models, and a BERT's stages as megatron-core makes them.

Room nemo/. Wraps nemo.collections.nlp.modules.common.megatron.build_model.build_model, which NeMo 2.4 lets refuse a
virtual pipeline size, though the rest of it takes a list of chunks. Proof: tests/nemo/test_layouts.py,
tests/nemo/test_scripts.py.
"""

from __future__ import annotations

from typing import Any

from nxdt_nemo.megatron.models.gpt.gpt_model import virtual_stage

__all__ = ["build_model"]


def build_model(
    upstream: Any,
    model_provider_func: Any,
    wrap_with_ddp: bool = True,
    virtual_pipeline_model_parallel_size: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Upstream's list of one model, or of this pipeline rank's chunks in their order."""
    from megatron.core import parallel_state as state

    chunks = virtual_pipeline_model_parallel_size

    def stage(*inner: Any, **named: Any) -> Any:
        return _settled(model_provider_func(*inner, **named))

    if chunks is None or state.get_pipeline_model_parallel_world_size() == 1:
        return upstream(stage, wrap_with_ddp, None, *args, **kwargs)

    def all_chunks(*inner: Any, pre_process: bool, post_process: bool, **named: Any) -> list[Any]:
        made = []
        for index in range(chunks):
            place = {"ignore_virtual": False, "vp_stage": index}
            first, last = state.is_pipeline_first_stage(**place), state.is_pipeline_last_stage(**place)
            token = virtual_stage.set(index)
            try:
                made.append(stage(*inner, pre_process=first, post_process=last, **named))
            finally:
                virtual_stage.reset(token)
        return made

    return upstream(all_chunks, wrap_with_ddp, None, *args, **kwargs)


def _settled(model: Any) -> Any:
    """A stage of NeMo's BERT as megatron-core makes one. NeMo gives each stage a pooler, which nobody asks before the
    last and a checkpoint takes once only; and the last one an output layer of its own, after megatron-core has tied its
    weight to the first one's embeddings: they began apart, and the gradient's norm counted both."""
    if not hasattr(model, "add_pooler") or (model.pre_process and model.post_process):
        return model
    if not model.post_process and model.add_pooler:
        model.add_pooler = False
        del model.pooler
    if model.pre_process or model.post_process:
        model.setup_embeddings_and_output_layer()
    return model
