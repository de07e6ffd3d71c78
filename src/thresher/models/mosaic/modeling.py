"""Memory Mosaics as a transformers causal language model: a stack of associative memories.

    x = x + W [contextual memories](norm(x));   x = x + W [persistent memory](norm(x))      (v1 section 4, v2 section 3)

Whole sequences are computed in parallel; what has a cache, here `MosaicCache` or Thresher's engine, goes on from the
state of its sequences. Both give the same numbers.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from thresher.models.mosaic.configuration import MemoryMosaicConfig
from thresher.models.mosaic.memory import ContextualMemory, PersistentMemory, SwiGLU, initialize
from thresher.models.states import StateBatch

ENGINE = "thresher"  # the keyword argument by which the plan of the engine's batch travels (models/interface.py)


class MosaicCache(DynamicCache):
    """The pairs of every memory, and the recurrent state `[layers, batch, size]` of the sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.states: torch.Tensor | None = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.states is not None:
            self.states = self.states.repeat_interleave(repeats, dim=1)

    def _select(self, indices: torch.Tensor) -> None:
        if self.states is not None:
            self.states = self.states.index_select(1, indices.to(self.states.device))

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError(
            "a Memory Mosaic cannot go back: its averages forget; Thresher's engine keeps snapshots"
        )

    def attend(self, memory: ContextualMemory, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v `[batch, heads, new tokens, head_dim]`, late streams -> `[batch, new tokens, heads * head_dim]`."""
        past = self.get_seq_length(memory.layer_idx)
        keys, values = self.update(k, v, memory.layer_idx)
        query = past + torch.arange(q.shape[2], device=q.device)[:, None]
        key = torch.arange(keys.shape[2], device=q.device)[None, :]
        seen = (key <= query) & (key >= memory.delay)
        if memory.window:
            seen &= key > query - memory.window
        answers = F.scaled_dot_product_attention(q, keys, values, seen, scale=1.0)
        # Of no pairs there is no average: the answer is 0.
        return (answers * seen.any(-1)[:, None]).transpose(1, 2).flatten(2)


class MosaicBlock(GradientCheckpointingLayer):
    """One layer: its contextual memories, whose answers go through one output projection, and its persistent memory."""

    def __init__(self, config: MemoryMosaicConfig, layer: int) -> None:
        super().__init__()
        d, count = config.hidden_size, len(config.memories)
        self.layer = layer
        self.context_norm = nn.LayerNorm(d, eps=config.layer_norm_eps, bias=False)
        self.memories: Any = nn.ModuleList(
            ContextualMemory(config, layer * count + i, delay, window)
            for i, (delay, window) in enumerate(config.memories)
        )
        self.context_out = nn.Linear(count * d, d, bias=False)
        self.persistent_norm = nn.LayerNorm(d, eps=config.layer_norm_eps, bias=False)
        self.persistent: Any
        self.remembers = config.persistent == "memory"
        if self.remembers:
            self.persistent = PersistentMemory(config)
            self.persistent_out = nn.Linear(d, d, bias=False)
        else:
            self.persistent = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    @property
    def state_sizes(self) -> list[int]:
        """Numbers of the state that each memory carries."""
        sizes = [sum(memory.state_sizes) for memory in self.memories]
        return [*sizes, sum(self.persistent.state_sizes)] if self.remembers else sizes

    def forward(self, x: torch.Tensor, long_delay: int | None = None) -> torch.Tensor:
        """Whole sequences `[batch, tokens, d]`. long_delay: of the long-term memory in this step."""
        y = self.context_norm(x)
        answers = [m.parallel(y, long_delay if i else None) for i, m in enumerate(self.memories)]
        x = x + self.dropout(self.context_out(torch.cat(answers, dim=-1)))
        y = self.persistent_norm(x)
        if self.remembers:
            return x + self.dropout(self.persistent_out(self.persistent.parallel(y)))
        return x + self.dropout(self.persistent(y))

    def recurrent(self, x: torch.Tensor, positions: torch.Tensor, batch: StateBatch, attend: Any) -> torch.Tensor:
        """Flattened new tokens `[tokens, d]` of the sequences of a batch; attend(memory, streams) gives a memory's
        answers `[tokens, d]`."""
        before = batch.before[self.layer].split(self.state_sizes, dim=-1)
        after = []
        y = self.context_norm(x)
        answers = []
        for memory, state in zip(self.memories, before, strict=False):
            streams, new = memory.recurrent(y, positions, batch, state)
            answers.append(attend(memory, streams))
            after.append(new)
        x = x + self.context_out(torch.cat(answers, dim=-1))
        y = self.persistent_norm(x)
        if self.remembers:
            answer, new = self.persistent.recurrent(y, batch, before[-1])
            after.append(new)
            x = x + self.persistent_out(answer)
        else:
            x = x + self.persistent(y)
        batch.after[self.layer] = torch.cat(after, dim=-1)
        return x


class MemoryMosaicPreTrainedModel(PreTrainedModel):
    config: MemoryMosaicConfig
    config_class = MemoryMosaicConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MosaicBlock",)
    _supports_sdpa = True
    _supports_attention_backend = True
    # Exponents of exponentials: rounding them to bfloat16 would change scales and decays by a per cent.
    _keep_in_fp32_modules_strict = ("decay", "present", "key_scale", "value_scale", "theta")

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `MosaicCache`, which has states

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The published starts: of the Library, of nanoMosaics, and of v2, a normal distribution cut at three sigma and
        narrower with depth."""
        config = self.config
        layers = config.num_hidden_layers
        for layer, block in enumerate(b for b in self.modules() if isinstance(b, MosaicBlock)):
            if module not in block.modules():
                continue
            initialize(module, config)
            if isinstance(module, nn.Linear):
                fan_in = module.in_features
                if config.initializer == "v2":
                    _cut_normal(module.weight, 1 / math.sqrt(2 * fan_in * (layer + 1)))
                else:
                    out = module in (block.context_out, getattr(block, "persistent_out", None))
                    if config.initializer == "nano":
                        module.weight.normal_(0, 0.02 / math.sqrt(2 * layers) if out else 0.02)
                    else:
                        module.weight.normal_(0, 1 / math.sqrt(fan_in * (layers if out else 1)))
            elif isinstance(module, nn.LayerNorm):
                module.weight.fill_(1)
            return
        if isinstance(module, nn.Embedding | nn.Linear):
            if config.initializer == "v2":
                _cut_normal(module.weight, 1 / math.sqrt(2 * config.hidden_size))
            else:
                module.weight.normal_(0, 0.02 if config.initializer == "nano" else 1)
        elif isinstance(module, nn.LayerNorm):
            module.weight.fill_(1)


def _cut_normal(weight: torch.Tensor, sigma: float) -> None:
    nn.init.trunc_normal_(weight, 0, sigma, -3 * sigma, 3 * sigma)


class MemoryMosaicModel(MemoryMosaicPreTrainedModel):
    """The stack without the output embedding."""

    def __init__(self, config: MemoryMosaicConfig) -> None:
        super().__init__(config)
        self.embed_tokens: Any = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks: Any = nn.ModuleList(MosaicBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def state_shape(self) -> tuple[int, int]:
        """(layers, numbers of a layer) of the recurrent state of a sequence."""
        return len(self.blocks), sum(self.blocks[0].state_sizes)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: MosaicCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids `[batch, tokens]` or inputs_embeds `[batch, tokens, d]`. attention_mask may only end a sequence
        early (zeros on the right). position_ids count only in the engine, where sequences lie behind each other.

        Raises ValueError for padding on the left: it would be remembered.
        """
        if attention_mask is not None and not torch.compiler.is_compiling() and not bool(attention_mask[..., 0].all()):
            raise ValueError("a Memory Mosaic takes no padding on the left: pad on the right, or generate one by one")
        x: torch.Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        plan = kwargs.get(ENGINE)
        if plan is not None:
            x = self._by_plan(x, position_ids, plan)
        elif past_key_values is not None or (use_cache and not self.training):
            past_key_values = past_key_values if past_key_values is not None else MosaicCache()
            x = self._by_cache(x, past_key_values)
        else:
            x = self.dropout(x)
            delay = self._drawn_delay()
            for block in self.blocks:
                x = block(x, delay)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)

    def _drawn_delay(self) -> int | None:
        """Of long-term memories in this step of training (v2 section 3.3); None: the one of inference."""
        drawn = self.config.long_delay_train
        if not (self.training and drawn and self.config.short_window):
            return None
        low, high = drawn
        return int(torch.randint(low, high + 1, ()))

    def _by_cache(self, x: torch.Tensor, cache: MosaicCache) -> torch.Tensor:
        rows, tokens = x.shape[:2]
        if not isinstance(cache, MosaicCache):
            raise ValueError("a Memory Mosaic needs a MosaicCache, which has room for its states")
        batch = StateBatch.fresh(self.state_shape, [tokens] * rows)
        if cache.states is not None:
            batch.before = cache.states
        past = cache.get_seq_length()
        positions = (past + torch.arange(tokens)).repeat(rows)
        moved = StateBatch(batch.starts, batch.kept.to(x.device), batch.before.to(x.device), batch.after.to(x.device))

        def attend(memory: ContextualMemory, streams: Any) -> torch.Tensor:
            q, k, v = (
                t.unflatten(0, (rows, tokens)).transpose(1, 2) for t in (streams.queries, streams.keys, streams.values)
            )
            return cache.attend(memory, q, k, v).flatten(0, 1)

        flat = x.flatten(0, 1)
        for block in self.blocks:
            flat = block.recurrent(flat, positions.to(x.device), moved, attend)
        cache.states = moved.after
        return flat.view(x.shape)

    def _by_plan(self, x: torch.Tensor, positions: torch.Tensor | None, plan: Any) -> torch.Tensor:
        """A pass of Thresher's engine: one flattened batch of new tokens, whose caches and states the plan knows."""
        assert positions is not None
        attention = ALL_ATTENTION_FUNCTIONS[ENGINE]

        def attend(memory: ContextualMemory, streams: Any) -> torch.Tensor:
            q, k, v = (t.transpose(0, 1)[None] for t in (streams.queries, streams.keys, streams.values))
            answers = attention(
                memory,
                q,
                k,
                v,
                None,
                scaling=1.0,
                sliding_window=memory.window or None,
                blank=memory.delay,
                **{ENGINE: plan},
            )[0]
            return answers[0].flatten(1)

        flat = x[0]
        for block in self.blocks:
            flat = block.recurrent(flat, positions[0], plan.states, attend)
        return flat[None]


class MemoryMosaicForCausalLM(MemoryMosaicPreTrainedModel, GenerationMixin):
    """A Memory Mosaic that predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MemoryMosaicConfig) -> None:
        super().__init__(config)
        self.model = MemoryMosaicModel(config)
        self.lm_head: Any = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def state_shape(self) -> tuple[int, int]:
        return self.model.state_shape

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: MosaicCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """labels `[batch, tokens]`, shifted inside, -100 ignored. logits_to_keep: of how many last tokens, or which."""
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            self.config.use_cache if use_cache is None and labels is None else use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        wanted = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        hidden = hidden[:, logits_to_keep] if isinstance(logits_to_keep, torch.Tensor) else hidden[:, wanted]
        if self.config.initializer == "library":
            hidden = hidden / math.sqrt(self.config.hidden_size)  # embeddings are drawn from N(0, 1)
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: weights decay only where they are matrices (or stored pairs), never decays, scales,
    shares, bandwidths and norms, whose zero means nothing. Right for any transformer, too."""
    free = ("decay", "present", "key_scale", "value_scale", "theta")
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.dim() < 2 or name.endswith(free)].append(parameter)
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]


AutoConfig.register(MemoryMosaicConfig.model_type, MemoryMosaicConfig, exist_ok=True)
AutoModel.register(MemoryMosaicConfig, MemoryMosaicModel, exist_ok=True)
AutoModelForCausalLM.register(MemoryMosaicConfig, MemoryMosaicForCausalLM, exist_ok=True)
