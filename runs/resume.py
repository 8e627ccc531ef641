"""What a checkpoint holds, when it is made, and how a run goes on from it."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path

from configurator import ConfigError
from data.tokendata import DataError, eval_windows
from model import GPTConfig
from runs.checkpoint import LAST, CheckpointError, Saver
from runs.console import say
from runs.diagnostics import SpikeWatch, finite
from runs.knobs import Knobs, TrainingKnobs, saved_knobs
from runs.metrics import RUN
from runs.models import MODELS, kind_of, load_weights, own_state
from runs.optimizer import load_state
from runs.ranks import TrainingError
from runs.schedule import learning_rate_at
from runs.step import TrainingStep


def snapshot(step: TrainingStep, data, it, evaluated, best_val_loss, seconds, watches) -> dict:
    """The state of a training after `it` steps, complete: what is saved."""
    return {
        'model': own_state(step.model),
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


def make_saver(k: Knobs, before) -> Saver:
    """What writes the checkpoints of a run. before: see Saver."""
    if not k.shard:
        return Saver(k.out_dir, before)
    from runs.shards import ShardSaver

    return ShardSaver(k.out_dir, k.dist_timeout, before)


class Keeper:
    """Saves a training when a save is due, and only if it is sound: the weights are finite, and the token
    files are still those that the run began with."""

    def __init__(self, step: TrainingStep, data, saver: Saver, last: int | None):
        """last: the iteration of the checkpoint that the run goes on from, or None."""
        self.step, self.data, self.saver, self.last = step, data, saver, last
        self.time = time.monotonic()

    def due(self, it: int, fresh: bool, end: bool) -> bool:
        """Whether to save after `it` steps. fresh: they were evaluated just now; end: the run ends here, or a
        part of it does."""
        k = self.step.k
        if k.eval_only:
            return False  # an evaluation leaves the run as it is
        if fresh and (it > 0 or end):
            return True
        interval = it and k.checkpoint_interval and it % k.checkpoint_interval == 0
        minutes = k.checkpoint_minutes and time.monotonic() - self.time > 60 * k.checkpoint_minutes
        return bool(interval or minutes or end) and it != self.last

    def save(self, it: int, evaluated: bool, best_val_loss: float, seconds: float, watches: dict, best: bool):
        """best: the validation loss is the lowest so far."""
        self.refuse_other_tokens()
        if not finite(self.step.model):
            raise self._failure(it, 'the last update made weights inf or nan; they were not saved')
        if self.step.group.main or self.step.sharded:
            self.saver.save(
                snapshot(self.step, self.data, it, evaluated, best_val_loss, seconds, watches), best
            )
        self.last, self.time = it, time.monotonic()

    def refuse_other_tokens(self):
        if what := self.data.changed():
            raise DataError(
                f'{what}: the steps since the last save may be of other tokens. {self._where()}; put the '
                'file back and go on with --init_from=resume, or start another run'
            )

    def refuse_losses(self, it: int, losses: dict[str, float]):
        """TrainingError where an evaluation after `it` steps is inf or nan."""
        if not all(map(math.isfinite, losses.values())):
            raise self._failure(it, f'the evaluation gives {losses}')

    def refuse_gradients(self, it: int, loss: float, grad_norm: float):
        """TrainingError where step `it` has computed what no update may be made with."""
        if not self.step.finite(loss, grad_norm):
            what = f'loss {loss}, gradient norm {grad_norm}; first not finite: {self.step.blame(it)}'
            raise self._failure(it, f'{what}. The update was not made')

    def _failure(self, it: int, what: str) -> TrainingError:
        fix = 'a lower learning_rate or a longer warm-up is the usual fix'
        return TrainingError(f'iteration {it}: {what}. {self._where()}; {fix}')

    def _where(self) -> str:
        path = Path(self.step.k.out_dir) / LAST
        return 'Nothing was saved yet' if self.last is None else f'{path} is of iteration {self.last}'


def restore(state: dict, step: TrainingStep, data, watches: dict) -> tuple[int, bool, float, float, list]:
    """Put a checkpoint's state in place -> it, evaluated, best_val_loss, seconds, and events to record.

    Empties state, which main still holds: its copy of the weights is not needed any more. CheckpointError
    where it does not fit the model.
    """
    k, path = step.k, Path(step.k.out_dir) / LAST
    found = state
    if step.sharded:
        from runs.fsdp import own_parts

        found = own_parts(step, state, path)
    load_weights(step.model, found['model'], path)
    try:
        load_state(step.optimizer, found['optimizer'])
        if state['scaler']:  # the run may have come from a device that needs none
            step.scaler.load_state_dict(state['scaler'])
        for name in watches:
            watches[name] = SpikeWatch(**state['watches'][name])
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        reason = f'{type(e).__name__}: {e}'.splitlines()[0]
        raise CheckpointError(f'{path} is whole, but a training cannot go on from it: {reason}') from None
    it, best_val_loss, seconds = state['iter'], state['best_val_loss'], state['seconds']
    evaluated = state['evaluated'] and not k.eval_only
    then, events = saved_knobs(state['config'], path, type(k)), []
    before, planned, now = (learning_rate_at(*a) for a in ((it - 1, then), (it, then), (it, k)))
    if it > 0 and now != planned:
        say(f'resume: the learning rate is {now:.3g} from here on; the last step had {before:.3g}')
    windows, windows_before = (n_windows(data, knobs) for knobs in (k, then))
    if windows != windows_before and not k.eval_only and (it < k.max_iters or not evaluated):
        best_val_loss = math.inf
        events = [{'iter': it, 'event': 'eval_changed', 'windows': windows, 'windows_before': windows_before}]
        say(
            f'resume: the loss is now measured on {windows:,} windows of val, before on {windows_before:,}: '
            'the two do not compare, so best.pt and the best loss start anew'
        )
    state.clear()
    found.clear()
    return it, evaluated, best_val_loss, seconds, events


def n_windows(data, k) -> int:
    """Windows of val in an evaluation; as many are always the same ones."""
    return len(eval_windows(data.splits['val'], k.block_size, k.eval_iters * k.batch_size)[0])


def resume_knobs(k: TrainingKnobs, given: dict) -> TrainingKnobs:
    """The knobs of the interrupted run, from its run.json, with those given now on top.

    They are not taken from the checkpoint: its contents never choose a path that is read.
    """
    path = Path(k.out_dir) / RUN
    try:
        config = json.loads(path.read_text(encoding='utf-8'))['config']
        saved = saved_knobs(config, path, type(k))
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
    """A checkpoint goes on with the tokens, the tokenizer, the architecture and the optimizer that it had."""
    if state['iter'] > k.max_iters:
        raise ConfigError(
            f'max_iters={k.max_iters}, but the checkpoint in {k.out_dir} is of iteration {state["iter"]}: '
            'give at least as many, or start another run in another --out_dir'
        )
    tokenizer = data.tokenizer_spec and data.tokenizer_spec['fingerprint']
    found = {'data set': data.fingerprint, 'tokenizer': tokenizer}
    wanted = state['data_fingerprint'], state['tokenizer'] and state['tokenizer'].get('fingerprint')
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
                'take that, or start another run in another --out_dir, maybe from these weights '
                f'(--init_from={k.out_dir})'
            )
