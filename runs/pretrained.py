"""Start from weights that are there: what fits is copied, and a table says what did not.

They are a GPT-2-shaped Hugging Face checkpoint, a run of this project, or what hf.py has made of one.

    model, rows = from_pretrained('gpt2')  # computes what the original computes
    model, rows = from_pretrained('out/vanilla', block_size=512)  # the run's best checkpoint
    model, rows = from_pretrained('ai-forever/rugpt3large_based_on_gpt2', n_layer=6, n_head=8,
                                  attention='reflex_all', norm='rmsnorm', mlp='swiglu')  # what fits
    print(copy_table(rows))

Weights are read from .safetensors (needs the package safetensors) or, never unpickling code, from .bin.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import torch

from configurator import UserError, from_dict
from data.tokenizer import HF_FILES, TokenizerError, from_spec
from data.tokenizer import load as load_tokenizer
from model import GPT, GPTConfig, HeadLinear
from runs.checkpoint import BEST, LAST
from runs.knobs import check_paths
from runs.models import load_model

ACTIVATIONS = {  # of a config.json -> mlp
    'gelu_new': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'gelu_fast': 'gelu_tanh',
    'gelu': 'gelu',
}
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
WEIGHTS = ('model.safetensors', 'pytorch_model.bin')  # the first that is there is read, whole or in shards


class PretrainedError(UserError):
    """A checkpoint that cannot be used, in one line: what, why, and the fix."""


class Pretrained(NamedTuple):
    source: str  # as given
    folder: Path  # where its files are
    config: GPTConfig  # of the model that computes what the checkpoint computes
    weights: dict[str, torch.Tensor]  # by this project's names and orientation, as stored (maybe fp16)
    tokenizer: dict | None = None  # its spec, where the checkpoint of a run has it
    begin: int | None = None  # the token that a document begins after, likewise


@dataclass(frozen=True)
class Row:
    """What became of one tensor, or of a whole layer that is left out. shape: in the model, source: in the
    checkpoint; None where it has none of that name."""

    name: str
    shape: tuple | None
    source: tuple | None
    how: str
    copied: int = 0  # numbers copied


def from_pretrained(source: str | Path, seed: int | None = None, **overrides) -> tuple[GPT, list[Row]]:
    """A GPT of the checkpoint's config with `overrides` (fields of GPTConfig), and a Row per tensor.

    source: a repository on the Hugging Face hub (gpt2, owner/name, owner/name@revision) or a local folder.
    Raises PretrainedError; ValueError from GPTConfig where overrides do not fit together.
    """
    checkpoint = read(source)
    model = GPT(replace(checkpoint.config, **overrides), seed=seed)
    return model, copy_weights(model, checkpoint)


def read(source: str | Path) -> Pretrained:
    """Read a checkpoint: that of a run, by its folder or its file; or config.json and weights, from a folder
    or from the hub through its local cache."""
    check_paths(init_from=str(source))
    folder = Path(source).expanduser()
    if folder.suffix == '.pt' or any((folder / name).exists() for name in (BEST, LAST)):
        return _read_run(str(source), folder)
    folder = folder if folder.is_dir() else _download(str(source))
    found = _json_object(folder / 'config.json')
    if found.get('model_type') == 'reflex':
        config, weights = _read_exported(folder, found)
    else:
        config, weights = _read_gpt2(folder, found)
    with torch.device('meta'):
        wanted = GPT(config, seed=0).named_parameters()
    for name, parameter in wanted:
        found = weights.get(name)
        if found is None or found.shape != parameter.shape:
            what = 'is missing' if found is None else f'is {_size(found.shape)}, not {_size(parameter.shape)}'
            raise PretrainedError(f'{folder}: {name} {what}: the weights are not those of its config.json')
    return Pretrained(str(source), folder, config, weights)


def _read_run(source: str, path: Path) -> Pretrained:
    """Of a run of this project: the best checkpoint of its folder, or the file that path is."""
    model, state = load_model(path.parent, str(path)) if path.suffix == '.pt' else load_model(path)
    if not isinstance(model, GPT):
        raise PretrainedError(f'{path} holds a {type(model).__name__}: no GPT starts from its weights')
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Pretrained(source, path, model.config, weights, state['tokenizer'], state.get('begin'))


def _read_exported(folder: Path, found: dict) -> tuple[GPTConfig, dict]:
    """What hf.py exports: a GPTConfig by its names, weights by their names behind 'gpt.'."""
    names = {f.name for f in fields(GPTConfig)}
    path = folder / 'config.json'
    try:
        config = from_dict(GPTConfig, {name: found[name] for name in names & found.keys()}, path)
    except ValueError as error:
        raise PretrainedError(f'{path}: {error}') from None
    weights = {name.removeprefix('gpt.'): tensor for name, tensor in _tensors(folder).items()}
    weights.pop('_extra_state', None)  # what the layers compute, which the config says
    weights.pop('lm_head.weight', None)  # the table of tokens once more
    return config, weights


def _read_gpt2(folder: Path, found: dict) -> tuple[GPTConfig, dict]:
    config, weights = _gpt2_config(folder / 'config.json', found), {}
    for name, tensor in _tensors(folder).items():
        name = name if name.startswith(('transformer.', 'lm_head.')) else f'transformer.{name}'
        if not name.endswith(('.attn.bias', '.attn.masked_bias')):  # causal masks, once saved as buffers
            weights[name] = tensor.t() if name.endswith(TRANSPOSED) else tensor  # Conv1D keeps (in, out)
    head, table = weights.pop('lm_head.weight', None), weights.get('transformer.wte.weight')
    if head is not None and table is not None and not torch.equal(head, table):
        raise PretrainedError(f'{folder}: lm_head is not tied to wte; the models here tie them')
    return config, weights


def copy_weights(model: GPT, checkpoint: Pretrained, other_tokens: str = '') -> list[Row]:
    """Copy every tensor of the checkpoint that fits into the model, in place; the rest stay as they are.

    A tensor fits that has the same name and shape. Of queries, keys and values those heads are copied that
    both have, of the token and position tables those rows; layers past the model's last are left out.
    other_tokens: why the checkpoint's token ids mean other text than the model's ('' if they do not): the
    token table then stays as it is.
    Raises PretrainedError where not one matrix of the layers fits.
    """
    c, was = model.config, checkpoint.config
    modules = dict(model.named_modules())
    with torch.device('meta'):
        theirs = dict(GPT(was, seed=0).named_modules())
    left = dict(checkpoint.weights)
    rows = []
    for name, parameter in model.named_parameters():
        source = left.pop(name, None)
        shape = tuple(parameter.shape)
        if source is None:
            rows.append(Row(name, shape, None, 'initialised: not in the checkpoint'))
            continue
        if name == 'transformer.wte.weight' and other_tokens:
            rows.append(Row(name, shape, tuple(source.shape), f'initialised: {other_tokens}'))
            continue
        place, picked, how = _fitting(name, source, parameter, modules, theirs, c.head_size)
        if picked is None:
            rows.append(Row(name, shape, tuple(source.shape), how))
            continue
        changes = {
            '.attn.c_attn.': (f'{was.n_head} heads of {was.head_size}', f'{c.n_head} heads of {c.head_size}'),
            '.mlp.': (was.mlp, c.mlp),
            '.ln_1.': (was.norm, c.norm),
            '.ln_2.': (was.norm, c.norm),
            'transformer.ln_f.': (was.norm, c.norm),
        }
        how += ''.join(f', {a} as {b}' for part, (a, b) in changes.items() if part in name and a != b)
        with torch.no_grad():
            parameter[place] = picked.to(parameter.dtype)
        rows.append(Row(name, shape, tuple(source.shape), how, picked.numel()))
    if not any(row.copied for row in rows if '.h.' in row.name and len(row.shape) > 1):
        raise PretrainedError(
            f'no matrix of {checkpoint.source} (n_embd={was.n_embd}) fits into this model '
            f'(n_embd={c.n_embd}, mlp={c.mlp!r}): take n_embd={was.n_embd}'
        )
    past = {}
    for name, source in left.items():
        layer = re.match(r'transformer\.h\.(\d+)\.', name)
        if layer and int(layer[1]) >= c.n_layer:
            past[int(layer[1])] = past.get(int(layer[1]), 0) + 1
        else:
            rows.append(Row(name, None, tuple(source.shape), 'left out: the model has no such tensor'))
    for l, n in sorted(past.items()):
        why = f'left out with {n} tensors: the model has {c.n_layer} layers'
        rows.append(Row(f'transformer.h.{l}', None, None, why))
    return rows


def _fitting(name, source, parameter, modules, theirs, head_size):
    """(where in the parameter, what of the source belongs there, the table's words); None, None where nothing
    does. modules, theirs: of the model and of the checkpoint's model, by name."""
    if (
        name in ('transformer.wte.weight', 'transformer.wpe.weight')
        and source.shape[1:] == parameter.shape[1:]
    ):
        n = min(len(source), len(parameter))
        return slice(n), source[:n], _rows_copied(n, len(source), len(parameter))
    if '.attn.c_attn.' in name:
        module, their = (by_name[name.rpartition('.')[0]] for by_name in (modules, theirs))
        attention, their_attention = (type(m[name.rpartition('.c_attn.')[0]]) for m in (modules, theirs))
        planned = isinstance(module, HeadLinear) and isinstance(their, HeadLinear)
        if not planned and attention is not their_attention:
            return None, None, 'initialised: this attention projects to something else'
        if planned and module.rows_full == their.rows_full and source.shape[1:] == parameter.shape[1:]:
            return _heads(source, module.rows, their.rows, head_size)
    if source.shape == parameter.shape:
        return ..., source, 'copied'
    return None, None, 'initialised: another shape'


def _heads(source, rows: list[int], their_rows: list[int], head_size: int):
    """As _fitting, for projections to some of all heads. rows, their_rows: which of all rows they have."""
    at = {row: i for i, row in enumerate(their_rows)}
    place = [i for i, row in enumerate(rows) if row in at]
    if not place:
        return None, None, 'initialised: the checkpoint has none of these heads'
    dead, fresh = ((len(r) - len(place)) // head_size for r in (their_rows, rows))
    how = 'copied' + (f' except {dead} dead heads' if dead else '')
    how += f', {fresh} heads initialised that the checkpoint does not have' if fresh else ''
    return place, source[[at[rows[i]] for i in place]], how


def begin_with(model: GPT, source: Pretrained, data) -> str:
    """Copy what fits into the model and free the source's copy -> a table of what became of each tensor."""
    rows = copy_weights(model, source, other_tokens(data, source))
    source.weights.clear()
    return f'from {source.folder}:\n{copy_table(rows)}'


def other_tokens(data, source: Pretrained) -> str:
    """'' if the data's token ids mean what they mean to the checkpoint; else the reason to think not."""
    if data.tokenizer_spec is None:  # plain .bin: the number of ids is all that is known
        sizes = data.vocab_size, source.config.vocab_used or source.config.vocab_size
        return '' if sizes[0] == sizes[1] else 'the data has {} token ids, the checkpoint {}'.format(*sizes)
    return token_difference(from_spec(data.tokenizer_spec), source)


def tokenizer_of(source: Pretrained):
    """The checkpoint's tokenizer, from itself or from the files beside it. Raises TokenizerError."""
    return from_spec(source.tokenizer) if source.tokenizer else load_tokenizer(str(source.folder))


def token_difference(tokenizer, source: Pretrained) -> str:
    """'' if every id of `tokenizer` means the same text to the checkpoint's tokenizer; else the reason."""
    try:
        theirs = tokenizer_of(source)
    except TokenizerError as error:
        return f'the tokenizer of the checkpoint is not known ({error})'
    return difference(tokenizer, theirs)


def difference(data, checkpoint) -> str:
    """'' if every id of the data's tokenizer means the same text to the checkpoint's; else the first that
    does not."""
    if data.vocab_size > checkpoint.vocab_size:
        return f'the data has {data.vocab_size} token ids, the checkpoint {checkpoint.vocab_size}'
    for i in range(data.vocab_size):
        ours, other = data.decode([i]), checkpoint.decode([i])
        if ours != other:
            return f'token {i} is {ours!r} in the data and {other!r} in the checkpoint'
    return ''


def copy_table(rows: list[Row]) -> str:
    """The rows as text: layers that fared alike share a line (h.0-5), then totals."""
    groups = {}
    for row in rows:
        layer = re.match(r'transformer\.h\.(\d+)(.*)', row.name)
        name = f'h.*{layer[2]}' if layer else row.name.removeprefix('transformer.')
        groups.setdefault((name, row.shape, row.source, row.how), []).append(int(layer[1]) if layer else None)
    lines = [('tensor', 'model', 'checkpoint', '')]
    for (name, shape, source, how), layers in groups.items():
        where = name if layers == [None] else name.replace('*', _ranges(layers))
        lines.append((where, _size(shape), _size(source), how))
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    text = [
        '  '.join([f'{cell:<{w}}' for cell, w in zip(line, widths, strict=False)] + [line[3]])
        for line in lines
    ]
    total = sum(torch.Size(row.shape).numel() for row in rows if row.shape is not None)
    copied = sum(row.copied for row in rows)
    text.append(
        f'{copied:,} of {total:,} parameters copied ({100 * copied / total:.1f} %), the rest initialised'
    )
    return '\n'.join(line.rstrip() for line in text)


def _ranges(layers: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2,5'"""
    runs = []
    for l in sorted(layers):
        if runs and runs[-1][1] == l - 1:
            runs[-1][1] = l
        else:
            runs.append([l, l])
    return ','.join(f'{a}' if a == b else f'{a}-{b}' for a, b in runs)


def _size(shape) -> str:
    return '-' if shape is None else ' x '.join(map(str, shape)) or '1'


def _rows_copied(n: int, of: int, into: int) -> str:
    if n == of == into:
        return 'copied'
    rest = f'the other {into - n} initialised' if into > n else f'the other {of - n} left out'
    return f'the first {n} rows copied, {rest}'


def _json_object(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise PretrainedError(f'{path} cannot be read ({error}): give a folder with a checkpoint') from None
    if not isinstance(found, dict):
        raise PretrainedError(f'{path} holds no object but a {type(found).__name__}')
    return found


def _gpt2_config(path: Path, found: dict) -> GPTConfig:
    """The GPTConfig that computes what a config.json describes; refuses what no GPT here does."""
    if found.get('model_type') != 'gpt2':
        raise PretrainedError(
            f"{path} is of model_type {found.get('model_type')!r}: only 'gpt2' and 'reflex' checkpoints have "
            'these tensors'
        )
    sizes = {key: found.get(key, default) for key, default in _GPT2_DEFAULTS.items()}
    for key in ('n_positions', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
        if type(sizes[key]) is not int:
            raise PretrainedError(f'{path} has {key}={sizes[key]!r}: that is no size')
    known = {
        'activation_function': tuple(ACTIVATIONS),
        'layer_norm_epsilon': (1e-5,),
        'scale_attn_weights': (True,),
        'scale_attn_by_inverse_layer_idx': (False,),
        'add_cross_attention': (False,),
        'tie_word_embeddings': (True,),
        'n_inner': (None, 4 * sizes['n_embd']),
    }
    for key, values in known.items():
        if sizes[key] not in values:
            raise PretrainedError(
                f'{path} has {key}={sizes[key]!r}: only {", ".join(map(repr, values))} is known'
            )
    try:
        return GPTConfig(
            block_size=sizes['n_positions'],
            vocab_size=sizes['vocab_size'],
            n_layer=sizes['n_layer'],
            n_head=sizes['n_head'],
            n_embd=sizes['n_embd'],
            bias=True,
            mlp=ACTIVATIONS[sizes['activation_function']],
        )
    except ValueError as error:
        raise PretrainedError(f'{path}: {error}') from None


_GPT2_DEFAULTS = {  # what a config.json that leaves a key out means
    'n_positions': 1024,
    'vocab_size': 50257,
    'n_layer': 12,
    'n_head': 12,
    'n_embd': 768,
    'n_inner': None,
    'activation_function': 'gelu_new',
    'layer_norm_epsilon': 1e-5,
    'scale_attn_weights': True,
    'scale_attn_by_inverse_layer_idx': False,
    'add_cross_attention': False,
    'tie_word_embeddings': True,
}


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the folder's weights, by its stored name."""
    for file in WEIGHTS:
        index = folder / f'{file}.index.json'
        try:
            if (folder / file).is_file():
                return _read_weights(folder / file)
            if index.is_file():
                shards = sorted(set(json.loads(index.read_text(encoding='utf-8'))['weight_map'].values()))
                for shard in shards:
                    if PureWindowsPath(shard).name != shard or shard == '..':  # with separators, a drive
                        raise PretrainedError(f'{index} names {shard!r}, which is not a file beside it')
                return {k: v for shard in shards for k, v in _read_weights(folder / shard).items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PretrainedError(f'{index} or a file it names cannot be read: {error}') from None
    raise PretrainedError(f'{folder} holds neither {" nor ".join(WEIGHTS)}, whole or in shards')


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == '.safetensors':
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError:
            raise PretrainedError(f'{path} needs the package safetensors: pip install safetensors') from None
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise PretrainedError(f'{path} is damaged: {error}') from None
    try:
        weights = torch.load(path, map_location='cpu', weights_only=True)
        if not isinstance(weights, dict):
            raise ValueError(f'it holds a {type(weights).__name__}')
        return weights
    except Exception as error:  # a broken zip or pickle raises whatever it meets
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise PretrainedError(f'{path} cannot be read as weights alone: {reason}') from None


def _download(source: str) -> Path:
    """A hub repository's files, in the local cache -> folder; the .bin only where there is no safetensors."""
    from huggingface_hub import snapshot_download

    repo, _, revision = source.partition('@')
    try:
        for weights in ('model*.safetensors*', 'pytorch_model*.bin*'):
            patterns = [*HF_FILES, weights]
            folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
            if any(folder.glob(weights)):
                break
        return folder
    except Exception as error:  # the hub's client and its network raise many kinds
        raise PretrainedError(
            f'{source} is no folder, and cannot be had from https://huggingface.co ({type(error).__name__}): '
            'where there is no network, copy its config.json, tokenizer and weights to a folder and give that'
        ) from None
