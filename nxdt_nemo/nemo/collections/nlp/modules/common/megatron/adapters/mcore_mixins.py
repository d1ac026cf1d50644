"""Adapters (LoRA, IA3, canonical adapters, p-tuning) around megatron-core's modules as they are.

Room nemo/. Stands in for swap_mcore_mixin of nemo.collections.nlp.modules.common.megatron.adapters.mcore_mixins, whose
mixins hold copies of megatron-core's forward methods. Here a module keeps the forward of the class that it was built
as, ours with copied KV heads included, and its adapters sit on the inputs and outputs of its linear layers.
Proof: tests/nemo/test_peft.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemo.collections.nlp.modules.common.megatron.adapters.parallel_adapters import AdapterName
from torch import Tensor, nn

from nxdt_nemo.errors import ConfigError
from nxdt_nemo.megatron.extensions.transformer_engine import TELayerNormColumnParallelLinear

__all__ = ["swap_mcore_mixin"]


class _Adapted:
    """First base of a module with adapters; `own` is the class that it was built as.

    Upstream's mixin is the second base, so that NeMo knows the module by it; of that only the registration is used.
    """

    own: type[nn.Module]

    def forward(self, *args: Any, **named: Any) -> Any:
        return self.own.forward(self, *args, **named)

    def adapter(self, name: AdapterName) -> Callable[..., Any] | None:
        """The adapter of that name, if it is there and enabled."""
        module: Any = self
        found: Callable[..., Any] | None = module.get_adapter_module(name)
        return found if found is not None and module.adapter_cfg[name]["enabled"] else None

    def hook(self) -> None:
        """Put adapters where they belong; called once."""


class _SelfAttention(_Adapted):
    """LoRA on linear_qkv, fused or unfused, and on linear_proj; IA3 on keys and values."""

    linear_qkv: nn.Module
    linear_proj: nn.Module

    def hook(self) -> None:
        if getattr(self.linear_qkv, "kv_heads", None) is not None:
            raise ConfigError(
                "adapters of attention need at least one KV head for each tensor-parallel rank",
                place="model.tensor_model_parallel_size",
                fix="use at most model.num_query_groups",
            )
        _add(self, self.linear_qkv, AdapterName.LORA_KQV_ADAPTER)
        _add(self, self.linear_proj, AdapterName.LORA_DENSE_ATTENTION_ADAPTER)

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **named: Any) -> tuple[Tensor, ...]:
        own: Any = self.own
        query, key, value = own.get_query_key_value_tensors(self, hidden_states, *args, **named)
        if (lora := self.adapter(AdapterName.LORA_UNFUSED_KQV_ADAPTER)) is not None:
            q, k, v = lora(_into(self.linear_qkv, hidden_states))
            query, key, value = query + q, key + k, value + v
        if (scale := self.adapter(AdapterName.KEY_INFUSED)) is not None:
            key = scale(key.flatten(2)).view_as(key).to(query.dtype)
        if (scale := self.adapter(AdapterName.VALUE_INFUSED)) is not None:
            value = scale(value.flatten(2)).view_as(value).to(query.dtype)
        return query, key, value


class _MLP(_Adapted):
    """LoRA on linear_fc1 and linear_fc2, also of one expert of several; IA3 between them."""

    linear_fc1: nn.Module
    linear_fc2: nn.Module

    def hook(self) -> None:
        _add(self, self.linear_fc1, AdapterName.LORA_Hto4H_ADAPTER)
        _add(self, self.linear_fc1, AdapterName.LORA_UNFUSED_Hto4H_ADAPTER)
        self.linear_fc2.register_forward_pre_hook(self._infuse)
        _add(self, self.linear_fc2, AdapterName.LORA_4HtoH_ADAPTER)

    def _infuse(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        scale = self.adapter(AdapterName.MLP_INFUSED)
        return None if scale is None else (scale(args[0]), *args[1:])


class _SequentialMLP(_Adapted):
    """Its experts' adapters are of the experts of this whole list: NeMo gives each expert all of them."""

    local_experts: nn.ModuleList

    def hook(self) -> None:
        expert: Any
        for place, expert in enumerate(self.local_experts):
            _add(expert, expert.linear_fc1, AdapterName.LORA_MOE_Hto4H_ADAPTER, place=place)
            _add(expert, expert.linear_fc2, AdapterName.LORA_MOE_4HtoH_ADAPTER, place=place)


class _TransformerLayer(_Adapted):
    """An adapter with a residual connection behind attention, and one behind the MLP."""

    self_attention: nn.Module
    mlp: nn.Module

    def hook(self) -> None:
        _add(self, self.self_attention, AdapterName.PRE_ATTN_ADAPTER, behind=True)
        _add(self, self.mlp, AdapterName.POST_ATTN_ADAPTER, behind=True)


class _TransformerBlock(_Adapted):
    """A head behind the last layer."""

    def forward(self, *args: Any, **named: Any) -> Any:
        hidden = super().forward(*args, **named)
        head = self.adapter(AdapterName.MLP_HEAD_ADAPTER)
        return hidden if head is None else head(hidden)


_ADAPTED: dict[str, type[_Adapted]] = {
    "MCoreSelfAttentionMixin": _SelfAttention,
    "MCoreMLPMixin": _MLP,
    "MCoreSequentialMLPMixin": _SequentialMLP,
    "MCoreTransformerLayerMixin": _TransformerLayer,
    "MCoreTransformerBlockMixin": _TransformerBlock,
}


def swap_mcore_mixin(module: Any, mcore_mixin: type) -> None:
    """Make `module` accept the adapters of a mixin; a second adapter of the same module changes nothing more."""
    own, adapted = type(module), _ADAPTED.get(mcore_mixin.__name__)
    if isinstance(module, mcore_mixin):
        return
    if adapted is None:  # p-tuning's embedding calls its parent: nothing to mend
        module.__class__ = mcore_mixin
        module.mcore_register_adapters()
        return
    bases = (adapted, mcore_mixin) if issubclass(mcore_mixin, own) else (adapted, mcore_mixin, own)
    module.__class__ = type(own.__name__, bases, {"own": own, "__module__": own.__module__})
    module.mcore_register_adapters()
    module.hook()


def _into(linear: nn.Module, x: Tensor) -> Tensor:
    """What a linear layer multiplies: its own norm of x, if it has one."""
    return linear.norm(x) if isinstance(linear, TELayerNormColumnParallelLinear) else x


def _add(
    module: _Adapted,
    linear: nn.Module,
    name: AdapterName,
    *,
    place: int | None = None,
    behind: bool = False,
) -> None:
    """The output of `linear` plus that of an adapter of `module` on its input, or, `behind`, on its output.

    place  which of the adapter's experts
    """

    def hook(linear: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: tuple[Any, ...]) -> Any:
        adapter = _Adapted.adapter(module, name)
        if adapter is None:
            return output
        x = output[0] if behind else _into(linear, args[0] if args else named["hidden_states"])
        more = adapter(x) if place is None else adapter(x, place)
        return (output[0] + more, *output[1:])

    linear.register_forward_hook(hook, with_kwargs=True)
