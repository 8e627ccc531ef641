"""Which models there are: made from knobs, or read from a checkpoint."""

from __future__ import annotations

from pathlib import Path

from hierarchy import Hierarchy
from model import GPT, GPTConfig, LanguageModel
from runs.checkpoint import BEST, LAST, CheckpointError, load_folder
from runs.knobs import Knobs

MODELS = {'gpt': GPT, 'hierarchy': Hierarchy}  # by the knob `model`


def build(k: Knobs, config: GPTConfig) -> LanguageModel:
    """The model of the knobs with its initial weights, on the CPU."""
    return MODELS[k.model](config, seed=k.seed)


def kind_of(state: dict) -> str:
    """The name in MODELS of a checkpoint's model."""
    return state['config'].get('model', 'gpt')  # runs did not say it while there was only one


def load_model(out_dir: str | Path, which: str = '', device: str = 'cpu') -> tuple[LanguageModel, dict]:
    """The model of a run and its checkpoint; which: a file's name, or '' for best.pt, else last.pt."""
    which = which or (BEST if (Path(out_dir) / BEST).exists() else LAST)
    state = load_folder(out_dir, which)
    try:
        kind = MODELS[kind_of(state)]
        model = kind(kind.config_class(**state['model_args']), seed=0)
        model.load_state_dict(state['model'])
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        reason = str(e).strip().splitlines()[0]
        raise CheckpointError(
            f'{Path(out_dir) / which} does not fit this version of model.py: {reason}'
        ) from None
    return model.to(device).eval(), state
