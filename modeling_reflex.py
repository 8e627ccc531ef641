"""Every model of this project as a `transformers` model: config, model, cache. Needs transformers 5.

    model = ReflexForCausalLM(ReflexConfig(attention='reflex', head_split='4-2-2'))  # transformers.Trainer
    model.save_pretrained(folder)                   # weights, config, and this file with all that it needs
    AutoModelForCausalLM.from_pretrained(folder)    # here, after `import hf`; elsewhere with remote code on

In an exported folder this file is itself, model.py and what that imports, joined (`one_file`).
"""

from __future__ import annotations

import ast
import difflib
import math
from dataclasses import fields
from pathlib import Path
from typing import ClassVar, get_type_hints

import torch
import torch.nn as nn
from huggingface_hub.dataclasses import strict
from transformers import Cache as TransformersCache
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple, logging

from composition import Composed, ComposedConfig
from hierarchy import Hierarchy, HierarchyConfig
from layers.contract import Memory, captured
from layers.registry import kinds_of
from layers.spec import canonical
from model import GPT, GPTConfig
from shape import HierarchyShape

logger = logging.get_logger(__name__)
# what transformers calls the cache that goes into forward and comes out of it: renamed in 5.24
CACHE_NAME = 'cache' if 'cache' in {f.name for f in fields(CausalLMOutputWithPast)} else 'past_key_values'
# names in a config of transformers, beside its fields, that do not change what a model computes
OF_TRANSFORMERS = {'attn_implementation', 'auto_map', 'experts_implementation', 'model_type', 'name_or_path'}
OF_TRANSFORMERS |= {'num_labels', 'output_attentions', 'quantization_config', 'torch_dtype'}
# names in configs of other models that have a single value here
FIXED = {'initializer_range': 0.02, 'layer_norm_epsilon': 1e-5, 'rope_theta': 10000.0}
# arguments of forward that are for the loss
OF_LOSS = ('num_items_in_batch', 'shift_labels', 'ignore_index')
# fields by another name than here: top_k of a config is an option of sampling to transformers
OTHER_NAMES = {'top_k': 'experts_top_k'}


def names_of(config_class) -> dict[str, str]:
    """The names of a config's fields -> their names in transformers."""
    names = [f.name for f in fields(config_class) if f.name != 'vocab_used']
    return {name: OTHER_NAMES.get(name, name) for name in names}


def fields_of(config_class) -> dict:
    """The annotations of a config's fields, for a class body of transformers' kind; a number may be whole."""
    kinds = get_type_hints(config_class)
    return {
        theirs: float | int if kinds[name] is float else kinds[name]
        for name, theirs in names_of(config_class).items()
    }


def defaults_of(config_class) -> dict:
    """The defaults of a config's fields, likewise."""
    names = names_of(config_class)
    return {names[f.name]: f.default for f in fields(config_class) if f.name in names}


@strict
class ReflexConfig(PreTrainedConfig):
    """The fields of GPTConfig (model.py), with the same meaning and defaults; all vocab_size ids are real.

    Any other name is refused (ValueError): transformers would keep it, and it would change nothing.
    """

    model_type = 'reflex'
    of: ClassVar = GPTConfig
    keys_to_ignore_at_inference = [CACHE_NAME]  # noqa: RUF012 (transformers adds lists to it)
    attribute_map = {  # noqa: RUF012 (transformers assigns to it)
        'hidden_size': 'n_embd',
        'num_hidden_layers': 'n_layer',
        'num_attention_heads': 'n_head',
        'n_heads': 'n_head',
        'max_position_embeddings': 'block_size',
        'n_positions': 'block_size',
        'final_logit_softcapping': 'softcap',  # trl computes the loss from it
    }
    __annotations__ |= fields_of(GPTConfig)
    vars().update(defaults_of(GPTConfig))

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True

    def __post_init__(self, **kwargs):
        for name in [name for name in kwargs if not name.startswith('_')]:
            if name in OF_TRANSFORMERS or name in self.attribute_map:
                continue
            value = kwargs.pop(name)
            if FIXED.get(name) != value:
                raise ValueError(self._without_effect(name, value))
        if all(isinstance(text, str) for text in (self.attention, self.head_split, self.windows)):
            self.attention = canonical(self.attention, self.head_split, self.windows)
            self.head_split = self.windows = ''  # older spellings, of older exports
        self.tied = self.tie_word_embeddings = bool(self.tied and self.tie_word_embeddings)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers. A name without effect in a saved config, where a program may have left it, is
        kept; a warning names it."""
        known = {f.name for f in fields(cls)} | cls.attribute_map.keys() | OF_TRANSFORMERS
        others = [name for name in config_dict if name not in known and not name.startswith('_')]
        others = {name: config_dict[name] for name in others if FIXED.get(name) != config_dict[name]}
        own = {name: value for name, value in config_dict.items() if name not in others}
        made = super().from_dict(own, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        for name, value in others.items():
            logger.warning(f'config.json has {name}={value!r}: it changes nothing in a {cls.__name__}')
            setattr(config, name, value)
        return made

    def _without_effect(self, name: str, value) -> str:
        """The message about a name that is honoured by no model here, or not with this value."""
        told = f'{type(self).__name__}({name}={value!r})'
        if name in FIXED:
            return f'{told}: it is {FIXED[name]:g} in all these models; leave it out'
        known = [*(f.name for f in fields(self)), *self.attribute_map]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        fix = f'did you mean {close[0]}?' if close else 'leave it out; GPTConfig says what there is'
        return f'{told} would change nothing: these models have no {name}; {fix}'

    def gpt_config(self) -> GPTConfig:
        values = {name: getattr(self, theirs) for name, theirs in names_of(self.of).items()}
        return self.of(**{**values, 'tied': self.tied and self.tie_word_embeddings})

    def validate_gpt(self):
        """transformers calls every validate_… when a config is made: what does not fit is refused there."""
        self.gpt_config()


@strict
class LeapConfig(ReflexConfig):
    """A ReflexConfig by the names of the package leap-transformer; saved, it is a ReflexConfig.

    use_local_att: windows at all; window_sizes: of every layer, 0 or None for a global one, None for the
    default ones; hidden_dropout_prob: dropout. The package's version 1.0.1 is meant where rescale is given
    (10 is its default; None leaves queries, keys and values as they are): then the default windows are those
    of that version, else of 0.1.0. initializer_range: None or 0.02, with which all models here start.
    """

    attribute_map = {**ReflexConfig.attribute_map, 'hidden_dropout_prob': 'dropout'}  # noqa: RUF012
    attention: str = 'leap'

    def __post_init__(self, use_local_att=True, window_sizes=None, initializer_range=None, **kwargs):
        if initializer_range is not None:
            kwargs['initializer_range'] = initializer_range
        options = []
        if not use_local_att:
            options.append('global')
        elif window_sizes is not None:
            options.append('-'.join(str(window or 0) for window in window_sizes))
        elif 'rescale' in kwargs:
            options.append('-'.join(str((0, 4, 8, 16)[l % 4]) for l in range(self.n_layer)))
        rescale = kwargs.pop('rescale', None)
        if rescale is not None:
            options.append(f'rescale={rescale}')
        if options:
            self.attention = f'leap({", ".join(options)})'
        super().__post_init__(**kwargs)


@strict
class HierarchicalConfig(ReflexConfig):
    """The fields of HierarchyConfig (hierarchy.py), likewise."""

    model_type = 'reflex_hierarchy'
    of: ClassVar = HierarchyConfig
    __annotations__ |= fields_of(HierarchyShape)
    vars().update({f.name: f.default for f in fields(HierarchyShape)})


@strict
class ComposedReflexConfig(ReflexConfig):
    """The fields of ComposedConfig (composition.py), likewise, but for top_k, which is experts_top_k here.
    Experts are dicts of the fields of Expert, as JSON has them."""

    model_type = 'reflex_composed'
    of: ClassVar = ComposedConfig
    __annotations__ |= {**fields_of(ComposedConfig), 'experts': list | tuple}
    vars().update(defaults_of(ComposedConfig))


class ReflexCache(TransformersCache):
    """What `generate` carries from token to token: the Cache of model.py, by the names of transformers."""

    is_linear = property(lambda self: [False])  # else generate would read a longer prompt from its start

    def __init__(self, model: ReflexForCausalLM | Core, batch_size: int):
        super().__init__(layers=[])  # transformers keeps nothing itself
        core = model if isinstance(model, Core) else model.gpt
        self.state, self.rows = core.new_cache(batch_size), batch_size
        self.max_length = -1 if core.context_limit == math.inf else core.context_limit

    @property
    def is_croppable(self) -> bool:
        """Whether it can forget its last tokens: where no layer is a recurrence."""
        return self.state.rewinds

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.state.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_length

    def crop(self, tokens: int):
        """Forget the last -tokens tokens; where tokens > 0, all but the first `tokens` (transformers before
        5.24)."""
        length = tokens if tokens > 0 else self.state.length + tokens
        if length >= self.state.length:
            return
        if not self.is_croppable:
            raise NotImplementedError(
                'this cache only grows: decoding that takes tokens back needs use_cache=False'
            )
        self.state.rewind(length)

    def reset(self):
        self.crop(-self.state.length)

    def activate_past_recording(self):
        """There is nothing to do: what it needs to forget tokens, it holds anyway."""

    def reorder_cache(self, beam_idx):
        self.state.select(beam_idx)
        self.rows = len(beam_idx)

    def batch_select_indices(self, indices):
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int):
        self.reorder_cache(torch.arange(self.rows).repeat_interleave(repeats))

    def update(self, *args, **kwargs):
        raise NotImplementedError('the model that made this cache fills it, not a layer of transformers')


class StateAsTensor:
    """What the layers compute is saved as a tensor: safetensors hold nothing else."""

    def get_extra_state(self):
        return torch.tensor(list(self.describe().encode('utf-8')), dtype=torch.uint8, device='cpu')

    def set_extra_state(self, state):
        super().set_extra_state(bytes(state.tolist()).decode('utf-8'))


class Core(StateAsTensor):
    """A model of this project, called as transformers and what builds on it call the model below a head."""

    settings: ReflexConfig  # what holds where forward is not told otherwise
    gradient_checkpointing = False  # set by transformers, like _gradient_checkpointing_func

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: ReflexCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        cache: ReflexCache | None = None,
        return_dict: bool = True,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """As ReflexForCausalLM.forward, but for the head: last_hidden_state (B, T, C)."""
        for name, value in kwargs.items():
            if value is not None and value is not False:
                raise ValueError(f'{name} would change nothing: leave it out, these models do not take it')
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError('give either input_ids or inputs_embeds')
        if inputs_embeds is not None and any(kind.layer.reads_tokens for kind in self._kinds()):
            raise ValueError(
                f'inputs_embeds: attention={self.settings.attention!r} reads token ids; give input_ids'
            )
        if cache is not None and past_key_values is not None:
            raise ValueError('cache and past_key_values are two names of one thing: give one of them')
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, ReflexCache):
            raise ValueError(f'the cache is a {type(cache).__name__}: give a ReflexCache or None')
        B, T = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        if use_cache and cache is None:
            cache = ReflexCache(self, B)
        if cache is not None and self._recomputes():
            raise ValueError('gradient checkpointing would fill the cache twice: give use_cache=False')
        position_ids, real = self._places(attention_mask, position_ids, T, cache)
        attentions = self.settings.output_attentions if output_attentions is None else output_attentions
        states = self.settings.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = None if states is False else states
        state = cache.state if cache is not None else None
        hidden, streams, weights = self.look(
            input_ids, state, position_ids, real, inputs_embeds, bool(attentions), states is not None
        )
        output = BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE_NAME: cache})
        if states is not None:
            output.hidden_states = chosen([*streams, hidden], states)
        if attentions:
            output.attentions = tuple(weights)
        return output if return_dict else output.to_tuple()

    def _kinds(self):
        stack = self.config if isinstance(self, GPT) else self.stack
        return kinds_of(stack).values()

    def _places(self, attention_mask, position_ids, T: int, cache: ReflexCache | None):
        """What hidden() is to know of positions and of padding: (pos (B, T) or None, real (B, S) or None)."""
        real = None
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ValueError(
                    f'attention_mask has {attention_mask.dim()} dimensions: give (B, S), 0 for padding'
                )
            real = self._padding(attention_mask.bool(), cache)
            if real is not None and position_ids is None:
                position_ids = (real.cumsum(dim=1) - 1).clamp(min=0)[:, -T:]
        elif position_ids is not None and cache is None and not captured():
            if (position_ids[:, 1:] <= position_ids[:, :-1]).any():
                raise ValueError(
                    'position_ids begin anew within a row: sequences in one row would read each other; give '
                    'each a row of its own'
                )
        return position_ids if position_ids is None else position_ids.expand(-1, T), real

    def _padding(self, real, cache: ReflexCache | None):
        """real (B, S), or None where nobody would look at the padding. ValueError where it stands in a place
        that this model cannot keep out."""
        if captured():
            if self.padding == 'right':
                raise ValueError(
                    'attention_mask: leave it out of this graph, nobody looks at padding on the right'
                )
            return real
        starts = real[:, 1:] > real[:, :-1]  # (B, S - 1): padding, then a token
        padded_before = starts.any()
        if padded_before and self.padding == 'right':
            raise ValueError(
                f'padding stands before tokens, and attention={self.settings.attention!r} in a '
                f'{type(self).__bases__[1].__name__} does not keep it out: padding goes to the right alone'
            )
        if self.padding == 'left' and (starts.sum(dim=1) + real[:, 0] > 1).any():
            raise ValueError(
                f'padding stands between tokens, and attention={self.settings.attention!r} would count it '
                'as a token; pad on the left'
            )
        # on the right nobody looks, but a cache would keep it for the tokens to come
        return real if padded_before or not (cache is None or self.padding == 'right') else None

    def _list_for_weights(self, attentions: bool) -> list | None:
        """Where the weights of attention go, if they are wanted or have to be computed anyway. ValueError
        where there are none."""
        if attentions and not all(kind.layer.has_scores for kind in self._kinds()):
            raise ValueError(
                f'output_attentions: attention={self.config.attention!r} has layers in which no token is '
                'weighed by another'
            )
        return [] if attentions or self.settings._attn_implementation == 'eager' else None

    def _recomputes(self) -> bool:
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def step(self, part: nn.Module, *args):
        """part(*args), computed once more in the backward pass where gradient checkpointing is on."""
        if not self._recomputes():
            return part(*args)
        memory = next((arg for arg in args if isinstance(arg, Memory)), Memory())
        before = memory.copy()  # later parts add to it before this one is computed again

        def compute(*args):
            own = before.copy()
            return part(*(own if arg is memory else arg for arg in args)), own

        y, after = self._gradient_checkpointing_func(compute, *args)
        vars(memory).update(vars(after))
        return y


def chosen(states: list, which) -> tuple:
    """The hidden states that output_hidden_states asks for: True, or the indices of some; None for others."""
    if which is True:
        return tuple(states)
    indices = {i % len(states) for i in ([which] if isinstance(which, int) else which)}
    return tuple(state if i in indices else None for i, state in enumerate(states))


class GPTCore(Core, GPT):
    def look(self, idx, cache, pos, real, embedded, attentions: bool, states: bool):
        """Arguments as of GPT.embed -> what the head reads (B, T, n_embd); the stream that each block reads,
        likewise, if states; who looks at whom in each layer, (B, n_head, T, S), if attentions."""
        weights, streams = self._list_for_weights(attentions), []
        x, memory = self.embed(idx, cache, pos, real, embedded)
        memory.weights = weights
        for i in range(len(self.transformer.h)):
            streams += [x] if states else []
            x = self.block(i, x, memory, cache)
        if cache is not None:
            cache.length += x.size(1)
        return self.transformer.ln_f(x), streams, memory.weights


class HierarchyCore(Core, Hierarchy):
    def look(self, idx, cache, pos, real, embedded, attentions: bool, states: bool):
        """As of GPTCore, with the first alone. With a cache it has no gradient: the tokens of one call are
        read in pieces, from each of which the next gets its state through the cache."""
        for name, wanted in {'attentions': attentions, 'hidden_states': states}.items():
            if wanted:
                raise ValueError(f'output_{name}: the levels of a hierarchy differ in length and width')
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            return self.hidden(idx, cache, pos, real, embedded), (), ()


class Part(StateAsTensor, GPT):
    """An expert of a composed model."""


class ComposedCore(Core, Composed):
    part_class = Part

    def look(self, idx, cache, pos, real, embedded, attentions: bool, states: bool):
        """As of GPTCore; streams and weights are those of the base."""
        if embedded is not None:
            raise ValueError('inputs_embeds: experts have token tables of their own; give input_ids')
        weights, streams = self._list_for_weights(attentions), [] if states else None
        return self.hidden(idx, cache, pos, real, streams, weights), streams or [], weights


class ReflexForCausalLM(PreTrainedModel, GenerationMixin):
    """A GPT of this project for `generate`, `Trainer`, `from_pretrained`, `save_pretrained`."""

    config_class = ReflexConfig
    base_model_prefix = 'gpt'
    _tied_weights_keys = {'gpt.lm_head.weight': 'gpt.transformer.wte.weight'}  # noqa: RUF012
    _core = GPTCore
    # layers read each other's keys and values: they stay on one device
    _no_split_modules = ('GPTCore', 'HierarchyCore', 'ComposedCore')
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: ReflexConfig):
        config.tied = config.tie_word_embeddings = config.tied and config.tie_word_embeddings
        super().__init__(config)
        self.gpt = self._core(config.gpt_config())
        self.gpt.settings = self.config
        if not self.gpt.lm_head.weight.is_meta:  # GPT has drawn its weights
            self._mark_initialized()
        self.post_init()

    def init_weights(self):
        """Initial values as those of GPT, for what has none yet, such as a model made on the meta device and
        moved by to_empty."""
        unfilled = [p for p in self.parameters() if not p.is_meta]
        if unfilled and not any(
            getattr(module, '_is_hf_initialized', False) for module in self.gpt.modules()
        ):
            self.gpt.load_state_dict(self._core(self.config.gpt_config()).state_dict())
            self._mark_initialized()
        super().init_weights()

    def _mark_initialized(self):
        for module in self.gpt.modules():
            module._is_hf_initialized = True

    def _init_weights(self, module: nn.Module):
        """Called for modules whose weights were not loaded, and for those that transformers adds."""
        lost = next((name for name, own in self.gpt.named_modules() if own is module), None)
        if lost is not None and list(module.parameters(recurse=False)):
            raise ValueError(
                f'{lost} is not in the weights, or has another shape there: they belong to another config. '
                'Make a new model with ReflexForCausalLM(config) instead'
            )
        super()._init_weights(module)

    def get_input_embeddings(self):
        return self.gpt.transformer.wte

    def set_input_embeddings(self, value):
        self.gpt.transformer.wte = value

    def get_output_embeddings(self):
        return self.gpt.lm_head

    def set_output_embeddings(self, value):
        self.gpt.lm_head = value

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func=torch.utils.checkpoint.checkpoint, **others
    ):
        """Layers read what earlier ones have published: that needs checkpoints of torch's newer kind."""
        if enable and getattr(gradient_checkpointing_func, 'keywords', {}).get('use_reentrant'):
            raise ValueError(
                'gradient checkpointing with use_reentrant=True would lose gradients between layers: give '
                "{'use_reentrant': False}"
            )
        if enable and others.get('every_n_layers', 1) != 1:
            raise ValueError(
                f'every_n_layers={others["every_n_layers"]}: all layers are computed twice, or none'
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the cache is a ReflexCache

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """Called by generate before the first token: what cannot end well is refused here."""
        if max_cache_length > self.gpt.context_limit:
            raise ValueError(
                f'{max_cache_length} tokens would have to be read, but the longest context of this model is '
                f'block_size={self.config.block_size}: shorten the prompt or lower max_new_tokens'
            )
        kind = generation_config.cache_implementation
        if kind not in (None, 'dynamic'):
            raise ValueError(
                f'cache_implementation={kind!r} is not offered: leave it out, there is one kind alone'
            )
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache is not False:
            rows = batch_size * max(
                generation_config.num_beams or 1, generation_config.num_return_sequences or 1
            )
            model_kwargs[CACHE_NAME] = ReflexCache(self, rows)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: ReflexCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: ReflexCache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """input_ids (B, T), after the S - T tokens that the cache holds -> logits (B, T, vocab_size).

        The cache goes by either name that transformers has for it, cache or past_key_values; gradients end at
        what it holds. inputs_embeds (B, T, n_embd) may stand in place of input_ids.

        attention_mask (B, S): 0 for padding, which may stand where the model's attentions allow it (`padding`
        in layers/contract.py); position_ids (B, T): by default the number of real tokens before. labels (B,
        T) as input_ids, -100 where none counts. use_cache: None means no cache, as a plain forward pass needs
        none. hidden_states of the result: the input of each block, and what the head reads; attentions: of
        each layer, who looks at whom, (B, n_head, T, S).
        """
        of_loss = {name: kwargs.pop(name) for name in OF_LOSS if name in kwargs}
        output = self.gpt(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            cache=cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.gpt.logits(output.last_hidden_state[:, keep])
        loss = None
        if labels is not None or of_loss.get('shift_labels') is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **of_loss)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            **{CACHE_NAME: output[CACHE_NAME] if CACHE_NAME in output else None},
        )

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers; the folder also gets the code, so that it loads where this project is not. To
        upload it: push_to_hub."""
        if kwargs.get('push_to_hub'):  # it would upload before the code is there
            raise ValueError('push_to_hub=True: save without it, then call model.push_to_hub(repository)')
        own = Path(__file__)
        self.config.auto_map = {
            'AutoConfig': f'{own.stem}.{self.config_class.__name__}',
            'AutoModelForCausalLM': f'{own.stem}.{type(self).__name__}',
        }
        super().save_pretrained(save_directory, **kwargs)
        (Path(save_directory) / own.name).write_text(one_file(own), encoding='utf-8')


class HierarchicalForCausalLM(ReflexForCausalLM, GenerationMixin):
    """The same of a hierarchy. Padding may stand on the right alone: groups begin at the first token.

    The loss is that of the tokens: latent_loss belongs to train.py, and what predicts latents is frozen.
    """

    config_class = HierarchicalConfig
    _core = HierarchyCore

    def __init__(self, config):
        super().__init__(config)
        if 'predict' in self.gpt.transformer:
            self.gpt.transformer.predict.requires_grad_(False)


class ComposedReflexForCausalLM(ReflexForCausalLM, GenerationMixin):
    """The same of a composed model, its parts included. As in compose.py, only what joins them is trained."""

    config_class = ComposedReflexConfig
    _core = ComposedCore

    def post_init(self):
        """Heads of experts are their token tables, where they are tied."""
        tied = [f'gpt.experts.{name}' for name, expert in self.gpt.experts.items() if expert.config.tied]
        own = {f'{expert}.lm_head.weight': f'{expert}.transformer.wte.weight' for expert in tied}
        self._tied_weights_keys = {**self._tied_weights_keys, **own}
        super().post_init()

    def get_expanded_tied_weights_keys(self, *args, **kwargs) -> dict[str, str]:
        """As in transformers, which looks at the config of the base alone."""
        tied = super().get_expanded_tied_weights_keys(*args, **kwargs)
        return tied | {k: v for k, v in self._tied_weights_keys.items() if k.startswith('gpt.experts.')}

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, which lets all that it loads train: the parts do not."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, p in model.gpt.named_parameters():
            p.requires_grad_(name.startswith('joints.'))
        return loaded

    def resize_token_embeddings(self, *args, **kwargs):
        raise ValueError(
            'every part has a token table of its own: give the parts more tokens and compose again'
        )


LeapForCausalLM = ReflexForCausalLM  # the name of the published package

for model_class in (ReflexForCausalLM, HierarchicalForCausalLM, ComposedReflexForCausalLM):
    # Trainer(label_smoothing_factor=…) shifts the labels of classes that are listed here alone
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_class.config_class.model_type] = model_class.__name__


def one_file(path: Path) -> str:
    """The module at path and the modules of its project that it imports (beside it, or in folders beside it),
    the imported first, as one source text.

    Raises ValueError where two of them give the same name to different things.
    """
    parts, owner = [], {}

    def source_of(module: str | None) -> Path | None:
        """The file of a module of the project; None for any other."""
        file = path.parent.joinpath(*module.split('.')).with_suffix('.py') if module else None
        return file if file and file.exists() else None

    def add(file: Path):
        text = file.read_text(encoding='utf-8')
        lines = text.splitlines()
        for node in ast.parse(text).body:
            module = node.module if isinstance(node, ast.ImportFrom) else None
            imported = source_of(module)
            if imported or module == '__future__':
                if imported and imported not in owner.values():
                    add(imported)
                lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
            names = [getattr(node, 'name', None)]
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [t.id for t in targets if isinstance(t, ast.Name)]
            for name in filter(None, names):
                if owner.setdefault(name, file) != file:
                    raise ValueError(f'{name} is defined in {owner[name].name} and in {file.name}')
        parts.append('\n'.join(line for line in lines if line is not None).strip())

    add(path)
    return 'from __future__ import annotations\n\n' + '\n\n\n'.join(parts) + '\n'
