"""The parts of a composed model (composition.py): a file for its base and one for each expert.

    OUT_DIR/parts/base.pt, OUT_DIR/parts/NAME.pt, …

Each is a checkpoint without what only a training needs. A composed model names its parts by the fingerprints
of their weights, and refuses a file that holds others.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from composition import Composed
from model import GPT
from runs import files
from runs.checkpoint import TO_READ, CheckpointError, load

PARTS, BASE = 'parts', 'base'


def part_file(folder: Path, name: str) -> Path:
    """The file of a part of the composed model in a folder; name: of an expert, or BASE."""
    return folder / PARTS / f'{name}.pt'


def fingerprint(weights: dict) -> str:
    """SHA-256 of weights by name: names, types, shapes and numbers, and what the layers compute."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        if isinstance(value, torch.Tensor):
            digest.update(f'{name} {value.dtype} {list(value.shape)}\n'.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        else:
            digest.update(f'{name} {value}\n'.encode())
    return digest.hexdigest()


def write_part(state: dict, folder: Path, name: str):
    """Write the checkpoint of a run, as a part of the composed model in a folder."""
    path = part_file(folder, name)
    files.make_folder(path.parent)
    kept = {key: state[key] for key in (*TO_READ, 'begin') if key in state}
    try:
        with files.replacing(path, 'wb') as file:
            torch.save(kept, file)
    except (OSError, RuntimeError) as e:
        raise CheckpointError(f'{files.write_failed(path, e)}; make room, and compose again') from e


def load_parts(model: Composed, folder: Path):
    """Give a composed model the weights of its parts, from the files in its folder. CheckpointError where a
    file is not the part that the model names."""
    experts = {expert.name: expert.fingerprint for expert in model.config.experts}
    for name, wanted in {BASE: model.config.base, **experts}.items():
        path = part_file(folder, name)
        weights = load(path)['model']
        found = fingerprint(weights)
        if found != wanted:
            raise CheckpointError(
                f'{path} has changed: its weights have the fingerprint {found[:12]}, but the model was '
                f'composed with {wanted[:12]}; put that file back, or compose again'
            )
        try:
            if name == BASE:
                model.load_state_dict(base_weights(model, weights), strict=False)
            else:
                model.experts[name].load_state_dict(weights)
        except (RuntimeError, ValueError) as e:  # the configuration was edited
            reason = str(e).splitlines()[0]
            raise CheckpointError(f'{path} does not fit the composed model: {reason}') from None


def base_weights(model: Composed, weights: dict) -> dict:
    """The weights of the base by their names in the composed model. ValueError where its layers compute
    something else."""
    if weights.get('_extra_state') != GPT.describe(model):
        raise ValueError('these weights belong to another attention plan or kind of block')
    return {name: value for name, value in weights.items() if name != '_extra_state'}
