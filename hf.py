"""Hand a trained model to the Hugging Face world: a folder for `transformers`, with its tokenizer.

    python hf.py --out_dir=out/reflex_422 --to=exported               # any model
    python hf.py --out_dir=out/vanilla --to=exported --as_gpt2=true   # vanilla as a plain GPT-2

Then AutoModelForCausalLM.from_pretrained('exported') and AutoTokenizer.from_pretrained('exported') load it.
After `import hf` the Auto classes know these models, and no code is loaded from the folder. Elsewhere the
first kind of folder needs remote code switched on; the second is a GPT-2 like any other.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from composition import Composed, ComposedConfig
from configurator import ConfigError, UserError, configure, run_program
from data.tokenizer import from_spec
from hierarchy import Hierarchy
from layers.tokens import TokenTable
from model import GPT, LanguageModel
from runs.models import load_model
from runs.pretrained import ACTIVATIONS, TRANSPOSED

try:
    import tokenizers
    import transformers
    from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

    from modeling_reflex import (
        ComposedReflexConfig,
        ComposedReflexForCausalLM,
        HierarchicalConfig,
        HierarchicalForCausalLM,
        LeapConfig,  # noqa: F401
        LeapForCausalLM,  # noqa: F401
        ReflexConfig,
        ReflexForCausalLM,
    )
except ImportError as error:
    sys.exit(f'hf.py needs {error.name}: pip install -r requirements-extras.txt')

CLASSES = {
    GPT: (ReflexConfig, ReflexForCausalLM),
    Hierarchy: (HierarchicalConfig, HierarchicalForCausalLM),
    Composed: (ComposedReflexConfig, ComposedReflexForCausalLM),
}
for their_config, their_model in CLASSES.values():
    transformers.AutoConfig.register(their_config.model_type, their_config, exist_ok=True)
    transformers.AutoModelForCausalLM.register(their_config, their_model, exist_ok=True)


class ExportError(UserError):
    """A model or tokenizer that cannot be exported as asked, in one line."""


@dataclass(frozen=True)
class Knobs:
    out_dir: str = 'out/quickstart'  # the folder of a run
    checkpoint: str = ''  # best.pt | last.pt | previous.pt; '' = best.pt if there is one, else last.pt
    to: str = ''  # the folder to write
    as_gpt2: bool = False  # as a plain GPT-2, which loads without code of ours; for vanilla models


def export(model: LanguageModel, tokenizer, folder: str | Path, as_gpt2: bool = False):
    """Write model and tokenizer (of tokenizer.py, or None) to folder.

    Padding rows of the embedding are left out: logits are those of the real ids. Raises ExportError where
    as_gpt2 asks for what a GPT-2 does not compute, or the tokenizer has no equal in transformers.
    """
    config, state = trimmed(model)
    special = {f'{which}_token_id': getattr(tokenizer, which, None) for which in ('bos', 'eos')}
    if tokenizer is not None:
        special = {'bos_token_id': tokenizer.eot if tokenizer.bos is None else tokenizer.bos}
        special |= {'eos_token_id': tokenizer.eot, 'pad_token_id': tokenizer.eot}
        convert_tokenizer(tokenizer, config.block_size).save_pretrained(folder)
    if as_gpt2 and type(model) is not GPT:
        raise ExportError(f'a {type(model).__name__} is not GPT-2: export without as_gpt2')
    exported = gpt2(config, state, special) if as_gpt2 else reflex(type(model), config, state, special)
    exported.save_pretrained(folder)


def trimmed(model: LanguageModel):
    """The model's config and weights (by name, on the CPU) without the padding rows of the vocabulary."""
    used = model.config.vocab_used or model.config.vocab_size
    heads = [m.lm_head for m in model.modules() if isinstance(m, LanguageModel)]
    tables = [m for m in model.modules() if isinstance(m, TokenTable)]
    by_token = {id(m.weight) for m in heads + tables}  # tensors with a row for every id
    state = {name: p.detach().cpu() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if id(p) in by_token:
            state[name] = state[name][:used].clone()
    config, fewer = model.config, {'vocab_size': used, 'vocab_used': 0}
    if isinstance(config, ComposedConfig):
        experts = tuple(replace(e, config=replace(e.config, **fewer)) for e in config.experts)
        return replace(config, **fewer, experts=experts), state
    return replace(config, **fewer), state


def reflex(kind: type[LanguageModel], config, state, special) -> ReflexForCausalLM:
    given = {k: v for k, v in asdict(config).items() if k != 'vocab_used'}
    if 'top_k' in given:
        given['experts_top_k'] = given.pop('top_k')
    config_class, model_class = CLASSES[kind]
    model = model_class(config_class(**given, **special))
    heads, described = {}, {}
    for prefix, part in model.gpt.named_modules():
        if isinstance(part, LanguageModel):  # of a composed model, its experts are some too
            prefix = f'{prefix}.' if prefix else ''
            heads[f'{prefix}lm_head.weight'] = state[f'{prefix}transformer.wte.weight']  # where it is tied
            described[f'{prefix}_extra_state'] = part.get_extra_state()
    model.gpt.load_state_dict({**heads, **state, **described})
    return model.eval()


def gpt2(config, state, special) -> transformers.GPT2LMHeadModel:
    """The same function as a GPT-2 of transformers; biases that the model has not are zeros."""
    activations = {mlp: activation for activation, mlp in reversed(ACTIVATIONS.items())}
    plain = {
        'attention': ('vanilla',),
        'norm': ('layernorm',),
        'mlp': tuple(activations),
        'position': ('learned',),
        'qk_norm': (False,),
        'x0_skip': (False,),
        'softcap': (0.0,),
        'tied': (True,),
    }
    for name, known in plain.items():
        if getattr(config, name) not in known:
            raise ExportError(
                f'{name}={getattr(config, name)!r} is not GPT-2 (it has {" or ".join(map(repr, known))}): '
                'export without as_gpt2'
            )
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_inner=config.mlp_hidden or None,
            activation_function=activations[config.mlp],
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            **special,
        )
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name not in state and not name.endswith('.bias'):
                raise ExportError(f'{name} is not in the model')
            own = state.pop(name, torch.zeros(()))
            p.copy_(own.t() if name.endswith(TRANSPOSED) else own)
    if state:
        raise ExportError(f'a GPT-2 has no {", ".join(state)}')
    return model.eval()


def convert_tokenizer(tokenizer, block_size: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of tokenizer.py as one of transformers that gives the same ids, or ExportError."""
    fast = CONVERTERS[tokenizer.kind](tokenizer)
    end = None if tokenizer.eot is None else fast.id_to_token(tokenizer.eot)
    begin = end if tokenizer.bos is None else fast.id_to_token(tokenizer.bos)
    converted = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=begin,
        eos_token=end,
        pad_token=end,
        model_max_length=block_size,
        clean_up_tokenization_spaces=False,
    )
    known = getattr(tokenizer, 'characters', None)
    samples = ['Hello,  world!\n\tdef f(x): return x1 + 22  # ok', 'Ёжик в тумане', ' naïve 日本 🙂 ', "it's"]
    for text in samples if known is None else [''.join(known)]:
        theirs = fast.encode(text, add_special_tokens=False).ids
        if theirs != tokenizer.encode(text) or converted.decode(theirs) != tokenizer.decode(theirs):
            raise ExportError(
                f'the {tokenizer.kind} tokenizer has no equal in transformers: {text!r} differs'
            )
    return converted


def _convert_bytes(tokenizer) -> tokenizers.Tokenizer:
    """Every byte of the UTF-8 text is a token, written as byte-level BPE writes bytes."""
    names = bytes_to_unicode()
    fast = tokenizers.Tokenizer(tokenizers.models.BPE({names[i]: i for i in range(256)}, []))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens(['<|endoftext|>'])  # gets the next id, 256
    return fast


def _convert_chars(tokenizer) -> tokenizers.Tokenizer:
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(tokenizer.ids, unk_token=''))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'), 'isolated')
    fast.decoder = tokenizers.decoders.Fuse()
    return fast


def _convert_tiktoken(tokenizer) -> tokenizers.Tokenizer:
    """transformers reads tiktoken's own file format: token in base 64, rank."""
    import base64

    encoding = tokenizer.encoding
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'ranks.tiktoken'
        lines = (
            f'{base64.b64encode(token).decode()} {rank}\n'
            for token, rank in encoding._mergeable_ranks.items()
        )
        path.write_text(''.join(lines), encoding='ascii')
        converter = TikTokenConverter(
            vocab_file=str(path), pattern=encoding._pat_str, extra_special_tokens=encoding._special_tokens
        )
        fast = converter.converted()
    for text, number in encoding._special_tokens.items():
        if fast.token_to_id(text) != number:  # ids that follow the ranks with a gap, or lie in one
            raise ExportError(f'{text!r} is token {number}: transformers would give it another id')
    return fast


CONVERTERS = {  # by Tokenizer.kind
    'tokenizers': lambda tokenizer: tokenizers.Tokenizer.from_str(tokenizer.text),
    'tiktoken': _convert_tiktoken,
    'bytes': _convert_bytes,
    'chars': _convert_chars,
}


def main(argv: list[str]) -> int:
    k = configure(Knobs, argv, __doc__).knobs
    if not k.to:
        raise ConfigError("to='': give the folder to write, such as --to=exported")
    model, state = load_model(k.out_dir, k.checkpoint)
    tokenizer = from_spec(state['tokenizer']) if state['tokenizer'] else None
    export(model, tokenizer, k.to, k.as_gpt2)
    kind = 'a GPT-2' if k.as_gpt2 else model.config.attention
    print(f'{k.to}: {kind}, {model.num_params() / 1e6:.2f}M parameters')
    return 0


if __name__ == '__main__':
    run_program(main)
