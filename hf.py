"""Hand a trained model to the Hugging Face world: a folder for `transformers`, with its tokenizer.

    python hf.py --out_dir=out/reflex_422 --to=exported               # any model
    python hf.py --out_dir=out/vanilla --to=exported --as_gpt2=true   # vanilla as a plain GPT-2

Then AutoModelForCausalLM.from_pretrained('exported') and AutoTokenizer.from_pretrained('exported') load it.
After `import hf` the Auto classes know these models, and no code is loaded from the folder. Elsewhere the
first kind of folder needs remote code switched on; the second is a GPT-2 like any other.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from composition import Composed
from configurator import ConfigError, UserError, configure, run_program
from data.tokenizer import from_spec
from hierarchy import Hierarchy
from layers.tokens import TokenTable
from model import GPT, LanguageModel
from runs.files import make_folder, temporary, write_failed
from runs.models import load_model
from runs.pretrained import ACTIVATIONS, TRANSPOSED

try:
    import safetensors
    import tokenizers
    import transformers
    from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

    from modeling_reflex import (
        OTHER_NAMES,
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

PAD = '<|pad|>'  # a token of no text
EXPORT = 'export.json'  # in an exported folder: the files that were written, and when
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
    overwrite: bool = False  # replace the folder even where it holds what hf.py has not written


def export(
    model: LanguageModel, tokenizer, folder: str | Path, as_gpt2: bool = False, overwrite: bool = False
):
    """Write model and tokenizer (of tokenizer.py, or None) to folder, which is made or replaced as a whole.

    Padding rows of the embedding are left out: logits are those of the real ids, and with a tokenizer one
    more, of a pad token (`trimmed`). Raises ExportError where as_gpt2 asks for what a GPT-2 does not compute,
    the tokenizer has no equal in transformers, the folder cannot be written, or it holds what was not
    exported to it (unless overwrite).
    """
    if as_gpt2 and type(model) is not GPT:
        raise ExportError(f'a {type(model).__name__} is not GPT-2: export without as_gpt2')
    converted, special = None, {}
    if tokenizer is not None:
        converted = convert_tokenizer(tokenizer, model.config.block_size)
        begin = tokenizer.eot if tokenizer.bos is None else tokenizer.bos
        special = {'bos_token_id': begin, 'eos_token_id': tokenizer.eot}
        special |= {'pad_token_id': converted.pad_token_id}
    config, state = trimmed(model, special.get('pad_token_id'))
    exported = gpt2(config, state, special) if as_gpt2 else reflex(type(model), config, state, special)
    with replacing_folder(Path(folder), overwrite) as new:
        exported.save_pretrained(new)
        if converted is not None:
            converted.save_pretrained(new)


@contextlib.contextmanager
def replacing_folder(folder: Path, overwrite: bool):
    """A new folder to fill, which takes the place of `folder` when the block ends: nobody sees a part of it.

    Raises ExportError where `folder` holds what this function has not made (unless overwrite), and where the
    disk is full or cannot be written; then `folder` stays as it was."""
    folder = folder.resolve()
    if not overwrite:
        refuse_others(folder)
    make_folder(folder.parent)
    new, old = temporary(folder), folder.with_name(f'{folder.name}.old-{os.getpid()}')
    try:
        new.mkdir()
        yield new
        written = {file.name: file.stat().st_mtime_ns for file in new.iterdir()}
        (new / EXPORT).write_text(json.dumps({'files': written}), encoding='utf-8')
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except (OSError, RuntimeError, safetensors.SafetensorError) as e:
        raise ExportError(write_failed(folder, e)) from e
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def refuse_others(folder: Path):
    """Raise ExportError where folder holds anything but the unchanged files of an export."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ExportError(f'to={str(folder)!r} is a file: name a folder')
    try:
        known = json.loads((folder / EXPORT).read_text(encoding='utf-8'))['files']
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    for file in sorted(folder.iterdir()):
        if file.name != EXPORT and known.get(file.name) != file.stat().st_mtime_ns:
            raise ExportError(
                f'{file} is not as hf.py has written it: name another folder, or replace all of it with '
                '--overwrite=true'
            )


def trimmed(model: LanguageModel, pad: int | None):
    """The model's config and weights (by name, on the CPU) without the padding rows of the vocabulary.

    pad: the id of a pad token. Behind all others it gets a row, the mean of all: then its logit is the mean
    logit, and the other probabilities fall by a part in vocab_size at most."""
    used = model.config.vocab_used or model.config.vocab_size
    more = int(pad == used)
    heads = [m.lm_head for m in model.modules() if isinstance(m, LanguageModel)]  # of experts, too
    tables = [m for m in model.modules() if isinstance(m, TokenTable)]
    by_token = {id(m.weight) for m in heads + tables}  # tensors with a row for every id
    state = {name: p.detach().cpu() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if id(p) in by_token:
            rows = state[name][:used]
            state[name] = torch.cat([rows, rows.mean(0, keepdim=True).expand(more, -1)])
    fewer = {'vocab_size': used + more, 'vocab_used': 0}
    if isinstance(model, Composed):
        experts = (replace(e, config=replace(e.config, **fewer)) for e in model.config.experts)
        fewer['experts'] = tuple(experts)
    return replace(model.config, **fewer), state


def reflex(kind: type[LanguageModel], config, state, special) -> ReflexForCausalLM:
    given = {OTHER_NAMES.get(k, k): v for k, v in asdict(config).items() if k != 'vocab_used'}
    config_class, model_class = CLASSES[kind]
    model = model_class(config_class(**given, **special))
    heads, described = {}, {}
    for name, part in model.gpt.named_modules():
        if isinstance(part, LanguageModel):  # experts are some, too
            prefix = f'{name}.' if name else ''
            heads[f'{prefix}lm_head.weight'] = state[f'{prefix}transformer.wte.weight']
            described[f'{prefix}_extra_state'] = part.get_extra_state()
    # a head is the token table, unless the state has one of its own
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
    """A tokenizer of tokenizer.py as one of transformers that gives the same ids, or ExportError.

    It has one token more, PAD, behind all others; none where the ids have gaps. As everywhere here, a text
    holds no special tokens: '<|endoftext|>' in one is text, unless split_special_tokens=False is given where
    the tokenizer is loaded or called."""
    fast = CONVERTERS[tokenizer.kind](tokenizer)
    if fast.get_vocab_size() == tokenizer.vocab_size:  # else the next id would be one in use
        fast.add_special_tokens([PAD])
    end = None if tokenizer.eot is None else fast.id_to_token(tokenizer.eot)
    begin = end if tokenizer.bos is None else fast.id_to_token(tokenizer.bos)
    converted = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=begin,
        eos_token=end,
        unk_token=end,  # as GPT-2 has it; nothing is unknown, but some programs want one
        pad_token=None if fast.token_to_id(PAD) is None else PAD,
        model_max_length=block_size,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )
    known = getattr(tokenizer, 'characters', None)
    samples = ['Hello,  world!\n\tdef f(x): return x1 + 22  # ok', 'Ёжик в тумане', ' naïve 日本 🙂 ', "it's"]
    samples += [f'a{end} b']
    for text in samples if known is None else [''.join(known)]:
        theirs = converted(text, add_special_tokens=False)['input_ids']
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
    export(model, tokenizer, k.to, k.as_gpt2, k.overwrite)
    kind = 'a GPT-2' if k.as_gpt2 else model.config.attention
    print(f'{k.to}: {kind}, {model.num_params() / 1e6:.2f}M parameters')
    return 0


if __name__ == '__main__':
    run_program(main)
