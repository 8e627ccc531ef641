"""Join models that were trained apart: a base reads the layers of experts, and what joins them is trained.

    python compose.py --base=out/seed --experts=out/parts/0,out/parts/1 --dataset=data/parts/all
    python compose.py --base=out/seed --experts=law=out/parts/0 --dataset=data/parts/0 --out_dir=out/law
    python compose.py --experts=out/law,out/code --max_iters=0 --dataset=…       # joined apart, put together
    python compose.py --experts=out/composed,new=out/parts/8 --dataset=data/parts/8 --out_dir=out/grown
    python compose.py --experts=out/composed --forget=law --max_iters=0 --dataset=… --out_dir=out/less
    python compose.py --experts=out/composed --top_k=2 --max_iters=0 --dataset=… --out_dir=out/two
    python compose.py --out_dir=out/composed --init_from=resume                  # go on after an interruption

An expert is the folder of a run. A composed run stands for all its experts, with what joins them, which
stays as it is unless --train says otherwise. Results: what train.py leaves, and in OUT_DIR/parts the models
that were joined, so that the folder needs no other. sample.py, eval.py, explain.py and compare.py take it
like any run. docs/composition.md has a whole example.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

from configurator import ConfigError, check_command_line, run_program
from runs.knobs import TrainingKnobs, check_training


@dataclass(frozen=True)
class Knobs(TrainingKnobs):
    # output
    out_dir: str = 'out/composed'  # the folder of the run
    # system
    compile: bool = False  # torch.compile
    # parts
    base: str = ''  # the folder of a run; '' = the base of the composed run among the experts
    experts: str = ''  # folders of runs, separated by commas; NAME=FOLDER gives an expert another name
    forget: str = ''  # experts to leave out, by name, separated by commas
    train: str = 'new'  # whose joints: new (of experts that nothing has joined yet) | all | names
    # model
    model: str = 'composed'  # always
    block_size: int = 0  # tokens of a sequence in training; 0 = the base's
    reads: str = ''  # layers of the base that read, as '3 5(heads=4, depth=6)'; '' = two of the upper half
    top_k: int = 0  # experts that a token may have; 0 = all
    threshold: float = 0.0  # a gate below this asks for nothing
    route: str = 'token'  # who chooses: token (each for itself) | text (the mean score so far)
    voice: bool = True  # whether what the experts predict counts too

    dropout: ClassVar[float] = 0.0  # nothing that is trained here has any


if __name__ == '__main__':
    check_command_line(Knobs, __doc__)  # before torch is imported, which takes seconds

from composition import Composed, ComposedConfig, Expert
from data.tokendata import open_data
from model import GPT, GPTConfig
from runs import checkpoint, metrics
from runs.console import Progress, say
from runs.datasets import data_folder, prepare_own
from runs.files import FileError
from runs.models import load_model
from runs.optimizer import make_optimizer
from runs.parts import BASE, PARTS, fingerprint, load_parts, part_file, write_part
from runs.ranks import Ranks, StopRequest
from runs.resume import Keeper, refuse_other_run, restore
from runs.schedule import doubts, learning_rate_at
from runs.start import claimed, read_knobs
from runs.step import TrainingStep, evaluate
from runs.system import set_up


def check(k: Knobs):
    """Refuse what cannot work, before anything is read or built. Raises ConfigError."""
    check_training(replace(k, block_size=k.block_size or 1))
    if k.init_from not in ('scratch', 'resume', 'auto'):
        raise ConfigError(
            f'init_from={k.init_from!r}: scratch, resume or auto; give parts as --base, --experts'
        )
    if k.model != 'composed':
        raise ConfigError(f'model={k.model!r}: what compose.py makes is composed; train.py has the others')
    if not k.experts:
        raise ConfigError("experts='': give the folders of runs, separated by commas")


class Part(NamedTuple):
    """A model that takes part: the base or an expert."""

    state: dict  # its checkpoint
    joint: dict | None = None  # the weights of what joins it to the base already; None: nothing does

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(**self.state['model_args'])

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.state['model'])


def read_parts(k: Knobs) -> tuple[Part, dict[str, Part], ComposedConfig | None]:
    """The base, the experts by name, and the config of a composed run among those that were given, or None.
    ConfigError where they do not go together."""
    bases, experts, composed = {}, {}, None
    if k.base:
        model, state = load_model(k.base)
        if type(model) is not GPT:
            raise ConfigError(f'base={k.base!r} holds a {type(model).__name__}: a base is a GPT')
        bases[k.base] = Part(state)
    for word in k.experts.split(','):
        name, _, folder = ('', '', word) if Path(word).exists() else word.rpartition('=')
        model, state = load_model(folder)
        if isinstance(model, Composed):
            if name:
                raise ConfigError(f'experts={word!r}: a composed run, whose experts have names already')
            composed = refuse_other_joints(model.config, composed, k)
            bases[folder] = Part(checkpoint.load(part_file(Path(folder), BASE)))
            found = {
                e: Part(checkpoint.load(part_file(Path(folder), e)), joint.state_dict())
                for e, joint in model.joints.items()
            }
        elif type(model) is GPT:
            found = {name or Path(folder).resolve().name: Part(state)}
        else:
            raise ConfigError(f'expert {folder!r} holds a {type(model).__name__}: an expert is a GPT')
        for name, part in found.items():
            if name in experts:
                raise ConfigError(f'two experts are called {name!r}: name them apart, as NAME=FOLDER')
            experts[name] = part
    if not bases:
        raise ConfigError("base='': give the folder of a run, which reads the experts")
    if len({base.fingerprint for base in bases.values()}) > 1:
        raise ConfigError(f'{" and ".join(bases)} have different bases: what joins an expert fits one alone')
    for name in filter(None, k.forget.split(',')):
        if name not in experts:
            raise ConfigError(f'forget={name!r}: there is no such expert; there are {", ".join(experts)}')
        del experts[name]
    base = next(iter(bases.values()))
    for name, part in experts.items():
        if why := other_tokens(part.state['tokenizer'], base.state['tokenizer']):
            raise ConfigError(f'expert {name!r} has {why} the base: all parts must have the same tokens')
    return base, experts, composed


def refuse_other_joints(found: ComposedConfig, before: ComposedConfig | None, k: Knobs) -> ComposedConfig:
    """The config of a composed run, if its experts are joined as those of the others are."""
    if found.voice != k.voice:
        raise ConfigError(
            f'voice={k.voice}, but a composed run among the experts has voice={found.voice}: what joins '
            f'experts fits that alone; give --voice={str(found.voice).lower()}'
        )
    for reads in {k.reads, before.reads if before else ''} - {''}:
        if replace(found, reads=reads).reads != found.reads:
            raise ConfigError(
                f'reads={reads!r}, but a composed run among the experts has reads={found.reads!r}: what '
                'joins experts fits those layers alone'
            )
    return found


def other_tokens(one: dict | None, other: dict | None) -> str:
    """'' where two tokenizers are the same; else in words how the first stands to the second."""
    if (one is None) != (other is None):
        return 'a tokenizer that is not known to be that of'
    return 'another tokenizer than' if one and one['fingerprint'] != other['fingerprint'] else ''


def composed_config(k: Knobs, base: Part, experts: dict[str, Part], among: ComposedConfig | None):
    """ConfigError where knobs and parts do not fit together."""
    given = {f.name: getattr(base.config, f.name) for f in fields(GPTConfig)}
    members = tuple(Expert(name, part.fingerprint, part.config) for name, part in experts.items())
    reads = k.reads or (among.reads if among else '')
    try:
        return ComposedConfig(
            **given,
            base=base.fingerprint,
            experts=members,
            reads=reads,
            top_k=k.top_k,
            threshold=k.threshold,
            route=k.route,
            voice=k.voice,
        )
    except ValueError as e:
        raise ConfigError(str(e)) from None


def names_to_train(k: Knobs, experts: dict[str, Part]) -> list[str]:
    """The experts whose joints are trained. ConfigError where there is none, or no such one."""
    words = {'new': [n for n, part in experts.items() if part.joint is None], 'all': list(experts)}
    names = words.get(k.train, k.train.split(','))
    for name in names:
        if name not in experts:
            raise ConfigError(
                f'train={k.train!r}: there is no such expert {name!r}; there are {", ".join(experts)}'
            )
    if k.max_iters and not names:
        raise ConfigError('all experts are joined already: give --train=all, or --max_iters=0')
    if k.max_iters and k.threshold >= 0.5 and any(experts[name].joint is None for name in names):
        raise ConfigError(
            f'threshold={k.threshold:g}: gates are 0.5 before training, so that nothing would be read and '
            'nothing learned: train without, and set it afterwards with --max_iters=0'
        )
    return names


def put_together(k: Knobs, base: Part, experts: dict[str, Part], config: ComposedConfig) -> Composed:
    """Write the parts into the folder of the run, and make the model of them."""
    folder = Path(k.out_dir)
    for path in (folder / PARTS).glob('*.pt'):
        path.unlink()
    for name, part in {BASE: base, **experts}.items():
        write_part(part.state, folder, name)
    model = Composed(config, seed=k.seed)
    load_parts(model, folder)
    for name, part in experts.items():
        if part.joint is not None:
            model.joints[name].load_state_dict(part.joint)
    return model


def main(argv: list[str]) -> int:
    k, _, resume, there = read_knobs(argv, __doc__, Knobs, check)
    device, dtype = set_up(k, 0)
    for doubt in doubts(k):
        say(f'warning: {doubt}')
    with claimed(Path(k.out_dir), there, Ranks()):
        state = checkpoint.load_folder(k.out_dir, resume=True) if resume else None
        if state is not None:
            model, _ = load_model(k.out_dir, checkpoint.LAST)
            k = replace(k, voice=model.config.voice)  # runs are older than this knob
            tokenizer = state['tokenizer']
        else:
            base, experts, among = read_parts(k)
            config = composed_config(k, base, experts, among)
            names = names_to_train(k, experts)
            size = k.block_size or config.block_size
            if size > config.block_size:
                raise ConfigError(f'block_size={size}: the base has a context of {config.block_size}')
            k = replace(k, block_size=size, train=','.join(names) or 'all')
            tokenizer = base.state['tokenizer']
        folder = data_folder(k.dataset)
        prepare_own(folder)
        data = open_data(folder, k.block_size, k.vocab_size or None)
        if why := other_tokens(data.tokenizer_spec, tokenizer):
            raise ConfigError(f'{folder} has {why} the parts: prepare it with theirs')
        if state is not None:
            refuse_other_run(state, data, k, model.config)
        else:
            model = put_together(k, base, experts, config)
        for name, joint in model.joints.items():
            joint.requires_grad_(name in k.train.split(',') or k.train == 'all')
        return train(k, argv, model.to(device).train(), data, state, device, dtype)


def train(k: Knobs, argv, model: Composed, data, state: dict | None, device: str, dtype: str) -> int:
    """Train the joints; as train.py does, on one device. state: of the checkpoint to go on from, or None."""
    stop = StopRequest(0, give_up_seconds=k.dist_timeout)
    optimizer = make_optimizer(model, k, device.split(':')[0])
    step = TrainingStep(k, Ranks(), model, optimizer, data.splits['train'], device, dtype)
    it, evaluated, best_val_loss, seconds, events = 0, False, math.inf, 0.0, []
    resumed = state is not None
    if resumed:
        it, evaluated, best_val_loss, seconds, events = restore(state, step, data, {})
    run = metrics.describe_run(k, argv, model, data, device, dtype, world=1)
    record = metrics.Record(not k.eval_only, k, run, it if resumed else None, events)
    speed = metrics.Speed(run, device, it, seconds)
    saver = checkpoint.Saver(k.out_dir, before=record.sync)
    keeper = Keeper(step, data, saver, last=it if resumed else None)
    say(metrics.headline(run, model, it if resumed else None, done=evaluated and it >= k.max_iters))
    if it < k.max_iters and not k.eval_only:
        step.begin(it)
    progress, status = Progress(k.max_iters, it, on=True), 'failed'
    stop.catch_signals()
    try:
        while True:
            done, fresh, best = it >= k.max_iters or k.eval_only, False, False
            if (it % k.eval_interval == 0 or done) and not evaluated:
                losses = evaluate(step, data.splits, stop)
                if losses is None:
                    stop.agreed = True  # the resumed run evaluates here
                else:
                    say(f'iter {it:>6}: train {losses["train"]:.4f}, val {losses["val"]:.4f}')
                    keeper.refuse_losses(it, losses)
                    fresh, evaluated, best = True, True, losses['val'] < best_val_loss
                    best_val_loss = min(best_val_loss, losses['val'])
                    values = {'iter': it, 'train/loss': losses['train'], 'val/loss': losses['val']}
                    record.log(values, seconds)
            if keeper.due(it, fresh, end=done or stop.agreed):
                keeper.save(it, evaluated, best_val_loss, seconds, {}, best)
            if done or stop.agreed:
                break
            started, lr = time.perf_counter(), learning_rate_at(it, k)
            stopping = bool(stop.reason) or saver.error is not None
            loss, grad_norm, stop.agreed = step.gradients(it, stopping)
            keeper.refuse_gradients(it, loss, grad_norm)
            step.update(lr)
            it, evaluated = it + 1, False
            seconds += time.perf_counter() - started
            progress.step()
            if it == 1 or it % k.log_interval == 0:
                values = {'iter': it, 'loss': loss, 'lr': lr, 'grad_norm': grad_norm}
                values |= speed.read(it, seconds)
                record.log(values, seconds)
                progress.show(values, seconds)
        saver.wait()
        status = 'finished' if done and evaluated else 'stopped'
    except Exception:
        keeper.refuse_other_tokens()  # then that is the reason, whatever it led to
        raise
    finally:
        progress.close()
        quietly = contextlib.suppress(*[FileError] * (status == 'failed'))
        with quietly:
            saver.wait(k.dist_timeout)
        with quietly:
            record.end(status, it, seconds, best_val_loss, device)
        stop.release_signals()
    if status == 'stopped':
        say(f'stopped by {stop.reason} at iteration {it}; go on with --init_from=resume')
    return 0


if __name__ == '__main__':
    run_program(main)
