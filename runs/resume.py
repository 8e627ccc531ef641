"""What a checkpoint holds, and how a run goes on from it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from configurator import ConfigError
from model import GPTConfig
from runs.console import say
from runs.diagnostics import SpikeWatch
from runs.knobs import Knobs, saved_knobs
from runs.metrics import RUN
from runs.models import MODELS, kind_of
from runs.step import TrainingStep


def snapshot(step: TrainingStep, data, it, evaluated, best_val_loss, seconds, watches) -> dict:
    """The state of a training after `it` steps, complete: what is saved."""
    return {
        'model': step.model.state_dict(),
        'model_args': asdict(step.model.config),
        'optimizer': step.optimizer.state_dict(),
        'scaler': step.scaler.state_dict(),
        'iter': it,
        'evaluated': evaluated,  # whether the weights of this iteration are
        'best_val_loss': best_val_loss,
        'watches': {name: asdict(watch) for name, watch in watches.items()},
        'seconds': seconds,  # of training
        'config': asdict(step.k),
        'tokenizer': data.tokenizer_spec,
        'begin': data.meta.get('begin'),
        'data_fingerprint': data.fingerprint,
    }


def restore(state: dict, step: TrainingStep, watches: dict) -> tuple[int, bool, float, float]:
    """Put a checkpoint's state in place -> it, evaluated, best_val_loss, seconds. Empties state, which main
    still holds: its copy of the weights is not needed any more."""
    step.model.load_state_dict(state['model'])
    groups = step.optimizer.state_dict()['param_groups']  # of the knobs as they are now
    step.optimizer.load_state_dict({**state['optimizer'], 'param_groups': groups})
    if state['scaler']:  # the run may have come from a device that needs none
        step.scaler.load_state_dict(state['scaler'])
    for name in watches:
        watches[name] = SpikeWatch(**state['watches'][name])
    evaluated = state['evaluated'] and not step.k.eval_only
    found = state['iter'], evaluated, state['best_val_loss'], state['seconds']
    state.clear()
    return found


def resume_knobs(k: Knobs, given: dict) -> Knobs:
    """The knobs of the interrupted run, from its run.json, with those given now on top.

    Not from the checkpoint: what is in there never chooses a path that is read.
    """
    path = Path(k.out_dir) / RUN
    try:
        saved = saved_knobs(json.loads(path.read_text(encoding='utf-8'))['config'], path)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(
            f'{path}, with the knobs of the run, cannot be read ({type(e).__name__}: {e}): put it back, or '
            'start another run in another --out_dir'
        ) from None
    begun = {'init_from': saved.init_from, 'overwrite': saved.overwrite}  # these say how the run began
    merged = replace(saved, **{**given, **begun, 'out_dir': k.out_dir})
    for name, new in asdict(merged).items():
        old = getattr(saved, name)
        if old != new and name != 'out_dir':
            say(f'resume: {name} is now {new!r}, was {old!r}')
    return merged


def refuse_other_run(state: dict, data, k: Knobs, config: GPTConfig):
    """A checkpoint goes on only with the tokens, the tokenizer, the architecture and the optimizer it had."""
    tokenizer = data.tokenizer_spec and data.tokenizer_spec['fingerprint']
    found = {'data set': data.fingerprint, 'tokenizer': tokenizer}
    wanted = state['data_fingerprint'], state['tokenizer'] and state['tokenizer']['fingerprint']
    for (what, now), then in zip(found.items(), wanted, strict=True):
        if now != then:
            raise ConfigError(
                f'the {what} is {str(now)[:12]}, but the checkpoint in {k.out_dir} was trained with '
                f'{str(then)[:12]}: give its --dataset, or start another run in another --out_dir'
            )
    then = MODELS[kind_of(state)].config_class(**state['model_args'])  # in today's spelling
    trained = {**asdict(then), 'model': kind_of(state)}
    trained['optimizer'] = state['config'].get('optimizer', 'adamw')  # which runs did not say before Muon
    for name, now in {'model': k.model, 'optimizer': k.optimizer, **asdict(config)}.items():
        then = trained.get(name, now)
        if now != then and name != 'dropout':
            raise ConfigError(
                f'{name}={now!r}, but the checkpoint in {k.out_dir} was trained with {name}={then!r}: '
                'take that, or start another run in another --out_dir'
            )
