"""Which models there are: made from knobs, or read from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from composition import Composed
from configurator import ConfigError
from hierarchy import Hierarchy
from model import GPT, GPTConfig, LanguageModel
from runs.checkpoint import BEST, LAST, CheckpointError, load, load_folder
from runs.diagnostics import finite
from runs.knobs import Knobs, check_paths
from runs.parts import load_parts
from runs.system import total_memory

MODELS: dict[str, type[LanguageModel]] = {
    'gpt': GPT,
    'hierarchy': Hierarchy,
    'composed': Composed,
}  # by the knob `model`


def build(k: Knobs, config: GPTConfig) -> LanguageModel:
    """The model of the knobs with its initial weights, on the CPU."""
    return MODELS[k.model](config, seed=k.seed)


def refuse_too_large(k: Knobs, config: GPTConfig, device: str):
    """Refuse a model or a batch that the memory of the device cannot hold, whatever else it held.

    Counted is what cannot be less: the weights, in training their gradients and one moment of the optimizer
    too, in fp32; the token ids of a batch, its targets, and one number for each of its tokens.
    """
    memory, per_weight, per_token = total_memory(device), 4 if k.eval_only else 12, 20
    if memory is None:
        return
    params = (k.n_layer * k.n_embd + config.vocab_size) * k.n_embd  # of any model, without building it
    if params * per_weight <= memory:
        with torch.device('meta'):
            params = MODELS[k.model](config, seed=0).num_params(non_embedding=False)
    needs = {
        f'{params:.3g} parameters (n_layer={k.n_layer}, n_embd={k.n_embd})': params * per_weight,
        f'batch_size={k.batch_size} sequences of block_size={k.block_size} tokens': k.batch_size
        * k.block_size
        * per_token,
    }
    for what, n_bytes in needs.items():
        if n_bytes > memory:
            raise ConfigError(
                f'{what} take at least {n_bytes / 2**30:,.0f} GiB, but {device} has '
                f'{memory / 2**30:,.0f} GiB of memory: make them smaller'
            )


def kind_of(state: dict) -> str:
    """The name in MODELS of a checkpoint's model."""
    return state['config'].get('model', 'gpt')  # runs did not say it while there was only one


def own_state(model: LanguageModel) -> dict:
    """The weights that a checkpoint of the model holds: all but those that have files of their own."""
    return {name: value for name, value in model.state_dict().items() if not name.startswith(model.apart)}


def load_weights(model: LanguageModel, weights: dict, path: Path):
    """Give the model the weights of the checkpoint at path; CheckpointError names the first that does not
    fit."""
    own = own_state(model)
    for name in [*own, *weights]:
        if name not in weights or name not in own:
            what = 'is not in the checkpoint' if name in own else 'is not in the model'
            raise CheckpointError(f'{path} does not fit the model: {name} {what}')
        wanted, found = (shape_of(tensors[name]) for tensors in (own, weights))
        if found != wanted:
            raise CheckpointError(f'{path} does not fit the model: {name} is {found}, and {wanted} is needed')
    try:
        model.load_state_dict(weights, strict=not model.apart)  # whose names were compared
    except ValueError as e:  # the layers compute something else, see LanguageModel.set_extra_state
        raise CheckpointError(f'{path} does not fit the model: {str(e).splitlines()[0]}') from None
    if not finite(model):
        raise CheckpointError(f'{path} holds weights that are inf or nan: no text and no loss come of them')


def shape_of(value) -> str:
    """'3 x 4' of a tensor of floating-point numbers; the type of anything else."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return ' x '.join(map(str, value.shape)) or 'a number'
    return f'of type {getattr(value, "dtype", type(value).__name__)}'


def load_model(out_dir: str | Path, which: str = '', device: str = 'cpu') -> tuple[LanguageModel, dict]:
    """The model of a run and its checkpoint.

    which: '' for best.pt, else last.pt; or a file of out_dir by its name, or any checkpoint by its path.
    """
    check_paths(out_dir=str(out_dir), checkpoint=which)
    out_dir, which = Path(out_dir), which or (BEST if (Path(out_dir) / BEST).exists() else LAST)
    if Path(which).parent != Path():
        path = Path(which)
        state = load(path)
    else:
        path = out_dir / which
        state = load_folder(out_dir, which)
    try:
        kind = MODELS[kind_of(state)]
        model = kind(kind.config_class(**state['model_args']), seed=0)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise CheckpointError(f'{path} does not fit this version of the models: {reason}') from None
    load_weights(model, state['model'], path)
    if isinstance(model, Composed):
        load_parts(model, path.parent)
    return model.to(device).eval(), state
