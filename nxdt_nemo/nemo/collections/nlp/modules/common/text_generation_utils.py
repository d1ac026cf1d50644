"""NeMo's generation on a traced lane: one graph reads the prompts, one makes a token, whatever the lengths.

Room nemo/. Wraps nemo.collections.nlp.modules.common.text_generation_utils.sample_sequence_batch, which cuts tokens,
keys and values at Python numbers: there each length is a graph of its own. Proof: tests/nemo/test_xla_generation.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nxdt_nemo.megatron.inference.static_cache import StaticCache
from nxdt_nemo.megatron.transformer.attention import SelfAttention
from nxdt_nemo.runtime.select import current

__all__ = ["sample_sequence_batch"]

Parts = Iterator[tuple[Any, ...]]
# Arguments of upstream's function that the loop below leaves alone, as they are by default.
PLAIN = {"compute_logprob": False, "type_ids": None, "image_list": None}


def sample_sequence_batch(
    original: Callable[..., Parts],
    /,
    model: Any,
    inference_strategy: Any,
    context_tokens: Tensor,
    context_lengths: Tensor,
    tokens_to_generate: int,
    all_probs: bool = False,
    **named: Any,
) -> Parts:
    """Upstream's on an eager lane, and for what one shape does not do: probabilities, a pipeline, attention in a window
    or by distance, latent attention, positions that begin anew, a strategy of the model's own.

    context_tokens   int64 [B, longest prompt + tokens_to_generate or more]
    context_lengths  int64 [B]
    yields           upstream's after each token: (tokens, lengths, None, None)
    """
    plain = not all_probs and all(named.get(name, value) == value for name, value in PLAIN.items())
    if not (current().traced and plain and _of_one_shape(model, inference_strategy)):
        yield from original(
            model, inference_strategy, context_tokens, context_lengths, tokens_to_generate, all_probs, **named
        )
        return
    loop = _Loop(model, inference_strategy, named.get("temperature") or 1.0, named.get("extra", {}))
    yield from loop.run(context_tokens, context_lengths, tokens_to_generate, named.get("end_strings", []))


def _of_one_shape(model: Any, strategy: Any) -> bool:
    """A GPT with attention of this backend, whole on a rank, that sees all before a token."""
    from megatron.core import parallel_state
    from megatron.core.transformer.attention import Attention
    from nemo.collections.nlp.modules.common.text_generation_strategy import GPTModelTextGenerationStrategy

    if type(strategy) is not GPTModelTextGenerationStrategy or model.cfg.get("reset_position_ids", False):
        return False
    if parallel_state.get_pipeline_model_parallel_world_size() > 1 or isinstance(model.model, list):
        return False
    found = [module for module in model.model.modules() if isinstance(module, Attention)]
    config = found[0].config if found else None
    return (
        config is not None
        and all(isinstance(module, SelfAttention) for module in found)
        and config.window_size is None
        and getattr(config, "position_embedding_type", None) != "alibi"
    )


@dataclass
class _Loop:
    """Upstream's loop with a place on the device in place of a length."""

    model: Any
    strategy: Any
    temperature: float
    extra: dict[str, Any]
    cache: StaticCache = field(init=False)

    @torch.no_grad()
    def run(self, prompts: Tensor, lengths: Tensor, count: int, end_strings: list[str]) -> Parts:
        host, given = prompts.cpu(), lengths.cpu()
        first, longest = int(given.min()), int(given.max())
        last = self.strategy.clip_max_len(longest + count)
        tokens = self._read(host, self._size(last))
        device, eod = tokens.device, self.model.tokenizer.eos_id
        # Sent, not filled: a number in the graph would be another graph for another number.
        place, on_device = torch.tensor([first - 1]).to(device), given.to(device)
        done = torch.zeros(len(host), dtype=torch.bool)
        ends = torch.full((len(host),), last)
        self.cache.decode(place)
        for at in range(first, last):
            made = self._step(tokens, place, on_device, done.to(device), eod)
            current().cut()
            host[:, at] = made.cpu()
            ended = self.strategy.end_of_generation_condition(host[:, : at + 1], host[:, at], eod, end_strings)
            ended = ended.bool() & (given <= at) & ~done
            ends[ended] = at
            done |= ended
            yield host, ends, None, None
            if done.all():
                break

    def _size(self, last: int) -> int:
        """Of the cache: the sequence length of the model, or as many of them as are needed."""
        length = int(self.model.cfg.encoder_seq_length)
        return -(-(last - 1) // length) * length

    def _read(self, host: Tensor, size: int) -> Tensor:
        """The model reads the prompts; returns all tokens, [B, size + 1]."""
        rows = host.new_full((len(host), size + 1), self.model.tokenizer.eos_id)
        rows[:, : host.shape[1]] = host[:, : size + 1]
        device = current().device()
        tokens = rows.to(device)
        positions = torch.arange(size, device=device).expand(len(host), size)
        self.cache = StaticCache(len(host), size)
        self.model.model(tokens[:, :size], positions, None, inference_context=self.cache)
        current().cut()
        return tokens

    def _step(self, tokens: Tensor, place: Tensor, lengths: Tensor, done: Tensor, eod: int) -> Tensor:
        """The token after `place` of each row, which is written there; `place` is one further then."""
        rows = tokens.shape[0]
        logits = self._logits(tokens.index_select(1, place), place.expand(rows, 1))
        place += 1
        least = self.extra.get("min_tokens_to_generate", 0)
        if least > 0:
            ends = torch.arange(logits.shape[1], device=logits.device) == eod
            logits = logits.masked_fill(((place - lengths < least)[:, None]) & ends, -torch.inf)
        found = self._choose(logits)
        made = torch.where(lengths <= place, found, tokens.index_select(1, place).squeeze(1))
        made = torch.where(done, eod, made)
        tokens.index_copy_(1, place, made[:, None])
        return made

    def _logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Of one token a row, [B, vocabulary], what lies beyond the tokenizer's left out."""
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        logits = self.model.model(ids, positions, self.cache.hidden(), inference_context=self.cache)[:, -1]
        whole: Tensor = gather_from_tensor_model_parallel_region(logits.contiguous())
        return whole[:, : self.model.tokenizer.vocab_size]

    def _choose(self, logits: Tensor) -> Tensor:
        """Greedily, or as upstream draws, int64 [B]."""
        if self.extra.get("greedy", False):
            return logits.argmax(-1)
        kept = _kept(logits.float() / self.temperature, self.extra.get("top_k", 0), self.extra.get("top_p", 0.9))
        return torch.multinomial(kept.softmax(-1), 1).view(-1)


def _kept(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """The logits [B, vocabulary], -inf but for the top_k largest (0: all) and the fewest of probability top_p."""
    if top_k > 0:
        logits = logits.masked_fill(logits < logits.topk(top_k)[0][:, -1:], -torch.inf)
    if 0.0 < top_p < 1.0:
        ordered, places = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.masked_fill((before > top_p).gather(1, places.argsort()), -torch.inf)
    return logits
