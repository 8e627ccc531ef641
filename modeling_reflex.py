"""Every model of this project as a `transformers` model: config, model, cache. Needs transformers 5.

    model = ReflexForCausalLM(ReflexConfig(attention='reflex', head_split='4-2-2'))  # transformers.Trainer
    model.save_pretrained(folder)                   # weights, config, and this file with all that it needs
    AutoModelForCausalLM.from_pretrained(folder)    # here, after `import hf`; elsewhere with remote code on

In an exported folder this file is itself, model.py and what that imports, joined (`one_file`).
"""

from __future__ import annotations

import ast
import math
from dataclasses import fields
from pathlib import Path
from typing import ClassVar, get_type_hints

import torch
import torch.nn as nn
from huggingface_hub.dataclasses import strict
from transformers import Cache as TransformersCache
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from composition import Composed, ComposedConfig
from hierarchy import Hierarchy, HierarchyConfig
from layers.spec import canonical
from model import GPT, GPTConfig
from shape import HierarchyShape

# what transformers calls the cache that goes into forward and comes out of it: renamed in 5.24
CACHE_NAME = 'cache' if 'cache' in {f.name for f in fields(CausalLMOutputWithPast)} else 'past_key_values'


def fields_of(config_class) -> dict:
    """The annotations of a config's fields, for a class body of transformers' kind; a number may be whole."""
    kinds = get_type_hints(config_class)
    names = [f.name for f in fields(config_class) if f.name != 'vocab_used']
    return {name: float | int if kinds[name] is float else kinds[name] for name in names}


@strict
class ReflexConfig(PreTrainedConfig):
    """The fields of GPTConfig (model.py), with the same meaning and defaults; all vocab_size ids are real."""

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
    }
    __annotations__ |= fields_of(GPTConfig)
    vars().update({f.name: f.default for f in fields(GPTConfig) if f.name != 'vocab_used'})

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True

    def __post_init__(self, **kwargs):
        if all(isinstance(text, str) for text in (self.attention, self.head_split, self.windows)):
            self.attention = canonical(self.attention, self.head_split, self.windows)
            self.head_split = self.windows = ''  # older spellings, of older exports
        self.tied = self.tie_word_embeddings = bool(self.tied and self.tie_word_embeddings)
        super().__post_init__(**kwargs)

    def gpt_config(self) -> GPTConfig:
        names = {f.name for f in fields(self.of)} - {'vocab_used'}
        return self.of(**{name: getattr(self, name) for name in names})

    def validate_gpt(self):
        """transformers calls every validate_… when a config is made: what does not fit is refused there."""
        self.gpt_config()


@strict
class LeapConfig(ReflexConfig):
    """A ReflexConfig by the names of the published LEAP package; saved, it is a ReflexConfig.

    use_local_att: windows at all; window_sizes: of every layer, 0 or None for a global one, None for the
    default ones; hidden_dropout_prob: dropout. initializer_range can only be the 0.02 of GPT's own weights.
    """

    attribute_map = {**ReflexConfig.attribute_map, 'hidden_dropout_prob': 'dropout'}  # noqa: RUF012
    attention: str = 'leap'

    def __post_init__(self, use_local_att=True, window_sizes=None, initializer_range=0.02, **kwargs):
        if initializer_range != 0.02:
            raise ValueError(f'initializer_range={initializer_range}: these models start with 0.02')
        if window_sizes is not None:
            self.attention = f'leap({"-".join(str(window or 0) for window in window_sizes)})'
        if not use_local_att:
            self.attention = 'leap(global)'
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
    """The fields of ComposedConfig (composition.py), likewise; experts are dicts, as in JSON. Its top_k has
    another name: of a config that says top_k, transformers takes it as an option of sampling."""

    model_type = 'reflex_composed'
    of: ClassVar = ComposedConfig
    has_no_defaults_at_init = True  # without experts it is none

    base: str = ''
    experts: list | tuple = ()
    reads: str = ''
    experts_top_k: int = 0
    threshold: float | int = 0.0
    route: str = 'token'

    def gpt_config(self) -> ComposedConfig:
        names = {f.name for f in fields(self.of)} - {'vocab_used', 'top_k'}
        return self.of(**{name: getattr(self, name) for name in names}, top_k=self.experts_top_k)


class ReflexCache(TransformersCache):
    """What `generate` carries from token to token: the Cache of model.py, by the names of transformers."""

    is_croppable = False
    is_linear = property(lambda self: [False])  # else generate would read a longer prompt from its start

    def __init__(self, model: ReflexForCausalLM, batch_size: int):
        super().__init__(layers=[])  # transformers keeps nothing itself
        self.state, self.rows = model.gpt.new_cache(batch_size), batch_size
        limit = model.gpt.context_limit
        self.max_length = -1 if limit == math.inf else limit

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.state.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.max_length

    def reorder_cache(self, beam_idx):
        self.state.select(beam_idx)
        self.rows = len(beam_idx)

    def batch_select_indices(self, indices):
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int):
        self.reorder_cache(torch.arange(self.rows).repeat_interleave(repeats))

    def _no(self, *args, **kwargs):
        raise NotImplementedError(
            'this cache only grows: decoding that takes tokens back needs use_cache=False'
        )

    update = crop = reset = activate_past_recording = _no


class _ExtraStateAsTensor:
    """What the layers compute is saved as a tensor: safetensors hold nothing else."""

    def get_extra_state(self):
        return torch.tensor(list(self.describe().encode('utf-8')), dtype=torch.uint8, device='cpu')

    def set_extra_state(self, state):
        super().set_extra_state(bytes(state.tolist()).decode('utf-8'))


class _Core(_ExtraStateAsTensor, GPT):
    pass


class _HierarchyCore(_ExtraStateAsTensor, Hierarchy):
    pass


class _ComposedCore(_ExtraStateAsTensor, Composed):
    part_class = _Core


class ReflexForCausalLM(PreTrainedModel, GenerationMixin):
    """A GPT of this project for `generate`, `Trainer`, `from_pretrained`, `save_pretrained`."""

    config_class = ReflexConfig
    base_model_prefix = 'gpt'
    _tied_weights_keys = {'gpt.lm_head.weight': 'gpt.transformer.wte.weight'}  # noqa: RUF012
    _core = _Core
    # layers read each other's keys and values: they stay on one device
    _no_split_modules = ('_Core', '_HierarchyCore', '_ComposedCore')
    _supports_sdpa = True

    def __init__(self, config: ReflexConfig):
        super().__init__(config)
        self.gpt = self._core(config.gpt_config())
        for module in self.gpt.modules():
            module._is_hf_initialized = not self.gpt.lm_head.weight.is_meta  # GPT has drawn its weights
        self.post_init()

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

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes a ReflexCache when generate asks for one

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: ReflexCache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: ReflexCache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """input_ids (B, T), after the S - T tokens that the cache holds -> logits (B, T, vocab_size).

        The cache goes by either name that transformers has for it, cache or past_key_values.

        attention_mask (B, S): 0 for padding, which may stand where the model's attentions allow it (`padding`
        in layers/contract.py); position_ids (B, T): by default the number of real tokens before. labels (B,
        T) as input_ids, -100 where none counts. use_cache: None means no cache, as a plain forward pass needs
        none.
        """
        for asked in ('output_attentions', 'output_hidden_states', 'inputs_embeds'):
            value = kwargs.pop(asked, None)
            if value is not None and value is not False:
                raise ValueError(f'{asked} is not offered by {type(self).__name__}')
        if cache is not None and past_key_values is not None:
            raise ValueError('cache and past_key_values are two names of one thing: give one of them')
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, ReflexCache):
            raise ValueError(f'the cache is a {type(cache).__name__}: give a ReflexCache or None')
        B, T = input_ids.shape
        if use_cache and cache is None:
            cache = ReflexCache(self, B)
        real = None
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ValueError(
                    f'attention_mask has {attention_mask.dim()} dimensions: give (B, S), 0 for padding'
                )
            real = attention_mask.bool()
            starts = real[:, 1:] > real[:, :-1]  # (B, S - 1): padding, then a token
            padded_before = starts.any()
            if padded_before and self.gpt.padding == 'right':
                raise ValueError(
                    f'padding stands before tokens, and attention={self.config.attention!r} in a '
                    f'{type(self).__name__} does not keep it out: padding goes to the right alone'
                )
            if self.gpt.padding == 'left' and (starts.sum(dim=1) + real[:, 0] > 1).any():
                raise ValueError(
                    f'padding stands between tokens, and attention={self.config.attention!r} would count it '
                    'as a token; pad on the left'
                )
            # on the right nobody looks, but a cache would keep it for the tokens to come
            if not padded_before and (cache is None or self.gpt.padding == 'right'):
                real = None
            elif position_ids is None:
                position_ids = (real.cumsum(dim=1) - 1).clamp(min=0)[:, -T:]
        if position_ids is not None:
            position_ids = position_ids.expand(-1, T)
        state = cache.state if cache is not None else None
        hidden = self.gpt.hidden(input_ids, state, position_ids, real)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.gpt.logits(hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_NAME: cache})

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


class HierarchicalForCausalLM(ReflexForCausalLM):
    """The same of a hierarchy. Padding may stand on the right alone: groups begin at the first token.

    The loss is that of the tokens: latent_loss belongs to train.py, and what predicts latents is frozen.
    """

    config_class = HierarchicalConfig
    _core = _HierarchyCore

    def __init__(self, config):
        super().__init__(config)
        if 'predict' in self.gpt.transformer:
            self.gpt.transformer.predict.requires_grad_(False)


class ComposedReflexForCausalLM(ReflexForCausalLM):
    """The same of a composed model, its parts included. Only what joins them trains, as in compose.py."""

    config_class = ComposedReflexConfig
    _core = _ComposedCore

    def post_init(self):
        """Experts have heads of their own, which are their token tables where they are tied."""
        tied = [name for name, expert in self.gpt.experts.items() if expert.config.tied]
        tied = {f'gpt.experts.{n}.lm_head.weight': f'gpt.experts.{n}.transformer.wte.weight' for n in tied}
        self._tied_weights_keys = {**self._tied_weights_keys, **tied}
        super().post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, which has all that it loads train: the parts do not."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, p in model.gpt.named_parameters():
            p.requires_grad_(name.startswith('joints.'))
        return loaded


LeapForCausalLM = ReflexForCausalLM  # the name of the published package


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
