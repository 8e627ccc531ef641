"""The study of docs/composition.md: models trained apart on parts of a text and joined, against models of the
same training FLOPs.

    python studies/composition_study.py source --files proposals.train.jsonl.xz proposals.val.jsonl.xz
    python studies/composition_study.py cluster
    python studies/composition_study.py source --scale=cpu  # larger models that have learned more
    python studies/composition_study.py source --rates      # the learning rates, tried on another seed
    python studies/composition_study.py source --table --insert=docs/composition.md

For each seed: a seed model learns from all parts except one (together they are `seen`). From it an expert
branches for each part, and for the one that is held out. The experts of `seen` are joined together, or one by
one; the held-out part's expert is added later. Dense models get the training FLOPs of all that. The programs
make the runs, in out/experiments/composition-NAME (at cpu scale composition-NAME-cpu), as a person would make
them. Stop it at any time: the same command goes on. run.json gets 'measured': losses per part, FLOPs and
processor seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import compose
from compare import insert, paired, with_interval
from composition import Composed
from data.centres import FILE, Centres
from data.tokendata import eval_batch, eval_starts, open_data
from data.tokenizer import from_spec
from model import GPT, GPTConfig
from runs import checkpoint, metrics
from runs.files import write_text
from runs.knobs import Knobs, saved_knobs
from runs.models import load_model
from runs.ranks import Ranks
from runs.records import RUN, find_stored, read_jsonl
from runs.step import mean_loss
from runs.system import autocast_for, pick_dtype

ROOT = Path(__file__).resolve().parent.parent
DATASET = 'proposals_bpe4096'
KINDS = {  # the parts with experts, the part that is held out, and how data/cluster.py finds them
    'source': (
        ['kubernetes-enhancements', 'python-peps', 'rust-lang-rfcs', 'swiftlang-swift-evolution'],
        'ethereum-EIPs',
        ['--by=source', '--held_out=ethereum-EIPs,bitcoin-bips,golang-proposal'],
    ),
    'cluster': (['0', '1', '2', '3'], '4', ['--clusters=5', '--held_out=4']),
}


@dataclass(frozen=True)
class Scale:
    """The sizes of the models, the steps of their training, and the rates."""

    n_layer: int
    n_head: int
    width: int  # n_embd of the base, of every expert, and of the dense model
    wide: int  # n_embd of the dense model with the parameters of four experts, their base and their joints
    block: int  # tokens of a sequence
    steps: dict[str, int]  # of each kind of run; the dense models' follow from the training FLOPs
    rates: dict[str, float]  # of each kind; of `join` for all runs of compose.py
    tried: dict[str, tuple[float, ...]]  # by --rates

    @property
    def size(self) -> list[str]:
        return [f'--block_size={self.block}', f'--n_layer={self.n_layer}', f'--n_head={self.n_head}']

    def n_embd(self, kind: str) -> int:
        return self.wide if kind == 'wide' else self.width

    def flops(self, kind: str) -> float:
        """Training FLOPs per token of a model of a kind."""
        c = GPTConfig(
            block_size=self.block,
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd(kind),
            vocab_size=4096,
        )
        with torch.device('meta'):
            return GPT(c, seed=0).flops_per_token()


SCALES = {
    # some six processor minutes for a seed; its rates are those that --rates has found
    'small': Scale(
        n_layer=4,
        n_head=4,
        width=64,
        wide=184,
        block=128,
        steps={'seed': 100, 'expert': 100, 'together': 50, 'apart': 30, 'grown': 30},
        rates={'seed': 0.02, 'dense': 0.02, 'wide': 0.01, 'expert': 0.02, 'join': 0.08},
        tried={
            'seed': (0.01, 0.02, 0.04),
            'dense': (0.01, 0.02),
            'wide': (0.01, 0.02),
            'expert': (0.005, 0.01, 0.02),
            'join': (0.01, 0.02, 0.04, 0.08, 0.16),
        },
    ),
    # config/sizes/size_cpu.py, with most of the steps for the seed model: what has learned little has little
    # to join. By the time of single steps, 37 processor minutes for a seed. Its rates from scratch
    # go by results/controls-2M-lr: vanilla after 500 steps is as good at 0.01 as at 0.02, within 0.005.
    'cpu': Scale(
        n_layer=6,
        n_head=8,
        width=128,
        wide=320,
        block=256,
        steps={'seed': 400, 'expert': 100, 'together': 60, 'apart': 40, 'grown': 40},
        rates={'seed': 0.01, 'dense': 0.01, 'wide': 0.01, 'expert': 0.01, 'join': 0.08},
        tried={
            'seed': (0.01, 0.02),
            'dense': (),
            'wide': (0.005, 0.01),
            'expert': (0.005, 0.01, 0.02),
            'join': (0.02, 0.04, 0.08, 0.16),
        },
    ),
}
BATCH = 16  # sequences of a batch
LONG = 400  # steps of train.py from which it is compiled; on a CPU, shorter runs are over before that pays
SHARED = [
    *('--device=cpu', '--compile=false', '--threads=1', f'--batch_size={BATCH}', '--optimizer=muon'),
    *('--eval_iters=4', '--warmup_iters=10', '--log_interval=10'),
]
WINDOWS = 64  # of each part's validation text
CHUNK, TEMPERATURE = 32, 0.1  # of the ensemble: tokens after which its weights are made anew, as published


class Ensemble(nn.Module):
    """cBTM: the probabilities of experts, mixed by how near the text so far is to the centres of their parts
    (Gururangan et al., 2023). top_k: of the experts; 0: all."""

    def __init__(self, experts: dict[str, GPT], centres: Centres, tokenizer, top_k: int):
        super().__init__()
        self.experts, self.centres, self.tokenizer = nn.ModuleList(experts.values()), centres, tokenizer
        self.columns, self.top_k = [centres.names.index(name) for name in experts], top_k

    def weights(self, idx):
        """Token ids (B, T) -> (B, T, experts), from the chunks before a token's own; even in the first."""
        B, T = idx.shape
        texts = [self.tokenizer.decode(row[:end]) for row in idx.tolist() for end in range(CHUNK, T, CHUNK)]
        distances = torch.from_numpy(self.centres.distances(texts)[:, self.columns])
        scores = distances.view(B, -1, len(self.columns)) / -TEMPERATURE  # (B, chunks - 1, experts)
        if self.top_k:
            kth = scores.topk(self.top_k, dim=2).values[..., -1:]
            scores = scores.masked_fill(scores < kth, -math.inf)
        scores = torch.cat([torch.zeros_like(scores[:, :1]), scores], dim=1)
        return scores.softmax(2).repeat_interleave(CHUNK, dim=1)[:, :T]

    def forward(self, idx, targets):
        weights, mixed = self.weights(idx), torch.zeros(idx.shape)
        later = weights[:, CHUNK:].amax(1) > 0  # (B, experts): others are run on the first chunk alone
        for e, expert in enumerate(self.experts):
            for rows, end in ((later[:, e], idx.size(1)), (~later[:, e], CHUNK)):
                if rows.any():
                    log_p = expert.logits(expert.hidden(idx[rows, :end])).float().log_softmax(-1)
                    kept = targets[rows, :end].clamp(min=0)[..., None]
                    mixed[rows, :end] += weights[rows, :end, e] * log_p.gather(2, kept).squeeze(2).exp()
        return None, -mixed.log()[targets >= 0].mean()


# -----------------------------------------------------------------------------
# The runs


class Study:
    """The runs of one partition at a scale, by their folders, seen from the repository."""

    def __init__(self, name: str, scale: str = 'small'):
        self.scale = SCALES[scale]
        self.experts, self.unseen, self.cut = KINDS[name]
        self.data = f'proposals_{name}'  # in data/
        of_scale = '' if scale == 'small' else f'-{scale}'
        self.arms = Path('out/experiments') / f'composition-{name}{of_scale}'
        self.parts = self.arms.with_name(f'{self.arms.name}-parts')

    def folder(self, arm: str, seed: int) -> Path:
        """Of a run that is compared."""
        return self.arms / arm / f'seed{seed}'

    def expert(self, part: str, seed: int) -> Path:
        return self.parts / part / f'seed{seed}'

    def train(self, out: Path, kind: str, part: str, seed: int, steps: int, *arguments: str):
        """train.py on a part, unless it is done."""
        given = [f'--dataset={self.data}/{part}', f'--seed={seed}', f'--max_iters={steps}']
        given += [f'--eval_interval={steps}', f'--n_embd={self.scale.n_embd(kind)}', f'--out_dir={out}']
        given += [f'--learning_rate={self.scale.rates[kind]}', '--init_from=auto']
        given += [f'--compile={str(steps >= LONG).lower()}', *arguments]
        run(out, 'train.py', 'config/vanilla.py', *self.scale.size, *SHARED, *given)

    def branch(self, out: Path, part: str, seed: int, of: Path, *arguments: str):
        """An expert: a model, trained on its part."""
        start = f'--init_from={of}'
        if (out / checkpoint.LAST).exists():
            start = '--init_from=resume'
        self.train(out, 'expert', part, seed, self.scale.steps['expert'], start, *arguments)

    def compose(self, out: Path, experts: list, part: str, seed: int, steps: int, *arguments: str):
        """compose.py, unless it is done."""
        given = [f'--experts={",".join(map(str, experts))}', f'--dataset={self.data}/{part}']
        given += [f'--seed={seed}', f'--max_iters={steps}', f'--eval_interval={max(1, steps)}']
        given += [
            f'--learning_rate={self.scale.rates["join"]}',
            f'--out_dir={out}',
            '--init_from=auto',
            *arguments,
        ]
        run(out, 'compose.py', *SHARED, *given)

    def sweep(self):
        """Try learning rates on a seed of their own, each kind of run with the best of the one before."""
        seed, place, losses = 1000, self.arms.with_name(f'{self.arms.name}-lr'), {}
        steps, part = self.scale.steps, self.experts[0]

        def tried(kind: str, start) -> Path:
            for rate in self.scale.tried[kind]:
                out = place / f'{kind}-{rate}'
                start(out, f'--learning_rate={rate}')
                losses[kind, rate] = final_loss(out)
                say(f'{kind} {rate}: {losses[kind, rate]:.4f}')
            best = min(self.scale.tried[kind], key=lambda rate: losses[kind, rate], default=None)
            return place / f'{kind}-{best}'

        base = tried('seed', lambda out, rate: self.train(out, 'seed', 'seen', seed, steps['seed'], rate))
        # the steps of the dense models, about: those of the study follow from what the others cost
        same = steps['seed'] + len(self.experts) * steps['expert']
        wide = round(same * self.scale.flops('dense') / self.scale.flops('wide'))
        tried('dense', lambda out, rate: self.train(out, 'dense', 'seen', seed, same, rate))
        tried('wide', lambda out, rate: self.train(out, 'wide', 'seen', seed, wide, rate))
        branch = tried('expert', lambda out, rate: self.branch(out, part, seed, base, rate))
        one, of = [f'{part}={branch}'], f'--base={base}'
        tried('join', lambda out, rate: self.compose(out, one, 'seen', seed, steps['together'], of, rate))

    def run_seed(self, seed: int):
        """Everything of one seed, what others need first."""
        steps = self.scale.steps
        self.train(self.folder('seed', seed), 'seed', 'seen', seed, steps['seed'])
        for part in [*self.experts, self.unseen]:
            self.branch(self.expert(part, seed), part, seed, self.folder('seed', seed))
        base = f'--base={self.folder("seed", seed)}'
        named = [f'{part}={self.expert(part, seed)}' for part in self.experts]
        self.compose(self.folder('together', seed), named, 'seen', seed, steps['together'], base)
        silent = '--voice=false'
        self.compose(self.folder('reading', seed), named, 'seen', seed, steps['together'], base, silent)
        flops = self.training_flops('together', seed)
        equal = {
            arm: round(flops / (BATCH * self.scale.block * self.scale.flops(arm)))
            for arm in ('dense', 'wide')
        }
        self.train(self.folder('dense', seed), 'dense', 'seen', seed, equal['dense'])
        alone = {part: self.parts / f'joint-{part}' / f'seed{seed}' for part in self.experts}
        for part, expert in zip(self.experts, named, strict=True):
            self.compose(alone[part], [expert], part, seed, steps['apart'], base)
        self.compose(self.folder('apart', seed), list(alone.values()), 'seen', seed, 0)
        both = [self.folder('together', seed), f'{self.unseen}={self.expert(self.unseen, seed)}']
        self.compose(self.folder('grown', seed), both, self.unseen, seed, steps['grown'])
        less = f'--forget={self.experts[0]}'
        self.compose(self.folder('forgot', seed), [self.folder('grown', seed)], 'seen', seed, 0, less)
        for arm in ('seed', 'together', 'reading', 'dense', 'apart', 'grown', 'forgot'):
            self.measure(arm, seed)
        for arm in ('together', 'apart'):
            for k, route in ((1, 'text'), (2, 'text'), (1, 'token')):
                self.measure(f'{arm}-{route}{k}', seed, arm, top_k=k, route=route)
        self.average(seed)
        self.measure('average', seed)
        for part in [*self.experts, self.unseen]:
            self.measure_one(self.expert(part, seed), load_model(self.expert(part, seed))[0])
        for k in (2, 0):
            self.ensemble(seed, k)
        self.train(self.folder('wide', seed), 'wide', 'seen', seed, equal['wide'])
        self.measure('wide', seed)

    def training_flops(self, arm: str, seed: int) -> float:
        """FLOPs of all training that an arm needs: its own, and that of the seed model and the experts."""
        apart = [self.parts / f'joint-{part}' / f'seed{seed}' for part in self.experts]
        experts = [self.expert(part, seed) for part in self.experts]
        before = {
            'seed': [],
            'dense': [],
            'wide': [],
            'together': experts,
            'reading': experts,
            'apart': [*experts, *apart],
            'grown': [*experts, self.folder('together', seed), self.expert(self.unseen, seed)],
        }
        before['forgot'] = [*before['grown'], self.folder('grown', seed)]
        first = arm.split('-')[0]
        own = [] if first in ('average', 'ensemble') else [self.folder(first, seed)]
        runs = [*own, *before.get(first, experts)]
        runs += [] if first in ('seed', 'dense', 'wide') else [self.folder('seed', seed)]
        return sum(flops_of(read_run(folder)) for folder in runs)

    # -------------------------------------------------------------------------
    # Arms that need no training

    def average(self, seed: int):
        """The mean of the experts' weights, as the folder of a run."""
        out = self.folder('average', seed)
        if (out / checkpoint.LAST).exists():
            return
        states = [checkpoint.load_folder(self.expert(p, seed), checkpoint.BEST) for p in self.experts]
        mean = {
            name: torch.stack([state['model'][name] for state in states]).mean(0)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in states[0]['model'].items()
        }
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.save({**states[0], 'model': mean, 'iter': 0}, out)

    def ensemble(self, seed: int, top_k: int):
        """cBTM's ensemble has no weights of its own: its record alone is kept."""
        experts = {part: load_model(self.expert(part, seed))[0] for part in self.experts}
        data = open_data(ROOT / 'data' / self.data / 'seen')
        centres = Centres.load(ROOT / 'data' / self.data / FILE)
        model = Ensemble(experts, centres, from_spec(data.tokenizer_spec), top_k)
        self.measure(f'ensemble-{top_k or "all"}', seed, model=model)

    # -------------------------------------------------------------------------
    # Measurements

    def measure(self, arm: str, seed: int, of: str = '', model=None, **routing):
        """Put 'measured' into the run.json of an arm; of: the arm whose weights it has, with other routing;
        model: one without a folder."""
        out = self.folder(arm, seed)
        found = read_run(out)
        if 'measured' in found:
            return
        if model is None:
            model, _ = load_model(ROOT / (self.folder(of, seed) if of else out))
        if routing:
            weights = model.state_dict()
            model = Composed(replace(model.config, **routing), seed=0).eval()
            model.load_state_dict({**weights, '_extra_state': model.get_extra_state()})
        if not found:
            self.record(out, seed, model, of, **routing)
        measured = {'training_flops': self.training_flops(arm, seed), **self.measured(model)}
        write_text(ROOT / out / RUN, json.dumps({**read_run(out), 'measured': measured}, indent=1) + '\n')
        say(f'{out}: {measured["loss"]}')

    def measure_one(self, out: Path, model):
        found = read_run(out)
        if 'measured' not in found:
            found['measured'] = self.measured(model)
            write_text(ROOT / out / RUN, json.dumps(found, indent=1) + '\n')

    def record(self, out: Path, seed: int, model, of: str, **routing) -> dict:
        """A run.json and metrics.jsonl of a model that was not trained, of the form that compare.py reads."""
        config = read_run(self.folder(of or 'seed', seed))['config'] | routing
        kind = compose.Knobs if of else Knobs
        k = saved_knobs({**config, 'out_dir': str(out), 'max_iters': 0}, out, kind)
        data = open_data(ROOT / 'data' / self.data / 'seen')
        parts = model.experts if isinstance(model, Ensemble) else None
        run = metrics.describe_run(k, [], parts[0] if parts else model, data, 'cpu', DTYPE, 1)
        if parts:
            run['describe'] = f'{len(parts)} experts, top_k {model.top_k}, mixed by distance'
            for name in ('params', 'flops_per_token', 'cache_bytes_per_token'):
                run['model'][name] *= len(parts)
        starts = eval_starts(len(data.splits['val']), k.block_size, k.eval_iters * k.batch_size)
        loss = loss_on(model, data.splits['val'], starts, k.batch_size, k.block_size)
        (ROOT / out).mkdir(parents=True, exist_ok=True)
        write_text(ROOT / out / metrics.METRICS, json.dumps({'iter': 0, 'val/loss': loss}) + '\n')
        run |= {'status': 'finished', 'iter': 0, 'seconds': 0.0}
        write_text(ROOT / out / RUN, json.dumps(run, indent=1) + '\n')
        return run

    def measured(self, model) -> dict:
        """Loss on the validation text of each part, FLOPs per token of the forward pass as torch counts them,
        and processor seconds per million tokens."""
        T, losses, flops, seconds, tokens = self.scale.block, {}, 0, 0.0, 0
        for part in [*self.experts, self.unseen]:
            split = open_data(ROOT / 'data' / self.data / part).splits['val']
            starts = eval_starts(len(split), T, WINDOWS)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
            losses[part] = loss_on(model, split, starts, 8, T)
            seconds += resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
            tokens += T * len(starts[0])
            x, y = (torch.from_numpy(a) for a in eval_batch(split, *starts, 0, 8, T))
            # of attention, torch counts products that are not fused
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                model(x, y)
            flops += counter.get_total_flops() / x.numel() / (len(self.experts) + 1)
        return {'loss': losses, 'flops_per_token': flops, 'cpu_seconds_per_Mtoken': seconds / tokens * 1e6}


DTYPE = pick_dtype('auto', 'cpu')


@torch.no_grad()
def loss_on(model, tokens, starts, batch_size: int, T: int) -> float:
    def autocast():
        return autocast_for('cpu', DTYPE)

    return mean_loss(model.eval(), tokens, starts, batch_size, T, 'cpu', autocast, Ranks())


def read_run(folder: Path) -> dict:
    path = ROOT / folder / RUN
    return json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}


def final_loss(folder: Path) -> float:
    """The last validation loss of a run."""
    return [r['val/loss'] for r in read_jsonl(ROOT / folder / metrics.METRICS) if 'val/loss' in r][-1]


def flops_of(run: dict) -> float:
    """Of a run's own training."""
    return run['config']['max_iters'] * run['tokens_per_step'] * run['model']['flops_per_token']


def run(out: Path, program: str, *arguments: str):
    """Run a program, unless its run is finished; keep what it printed and its processor seconds."""
    if read_run(out).get('status') == 'finished':
        return
    say(f'{program} {out}')
    (ROOT / out).mkdir(parents=True, exist_ok=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with open(ROOT / out / 'log.txt', 'a', encoding='utf-8') as log:
        command = [sys.executable, program, *arguments]
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    found = read_run(out)
    if code or found.get('status') != 'finished':
        sys.exit(f'{program} ended with {code}: see {out}/log.txt')
    found['cpu_seconds'] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    write_text(ROOT / out / RUN, json.dumps(found, indent=1) + '\n')


def say(text: str):
    print(text, flush=True)


# -----------------------------------------------------------------------------
# The table


ARMS = {
    'dense': 'dense, the same training FLOPs',
    'wide': 'dense, the same training FLOPs and parameters',
    'seed': 'the base alone',
    'together': 'composed, joined together',
    'together-text2': '\N{EN DASH} 2 experts of a text',
    'together-text1': '\N{EN DASH} 1 expert of a text',
    'together-token1': '\N{EN DASH} 1 expert of a token',
    'reading': '\N{EN DASH} by reading alone, without voices',
    'apart': 'composed, each joined apart',
    'apart-text2': '\N{EN DASH} 2 experts of a text',
    'apart-text1': '\N{EN DASH} 1 expert of a text',
    'apart-token1': '\N{EN DASH} 1 expert of a token',
    'ensemble-all': 'ensemble of the experts (cBTM)',
    'ensemble-2': '\N{EN DASH} 2 of them',
    'average': "mean of the experts' weights",
    'grown': 'composed, and one added for the last part',
    'forgot': '\N{EN DASH} and the first one forgotten',
}


def measurements(name: str) -> dict[str, dict[int, dict]]:
    """Arm -> seed -> run.json of what is measured; of runs here, else of those that are kept in results/."""
    here = ROOT / 'out/experiments' / name
    found: dict[str, dict[int, dict]] = {}
    for stored in find_stored(here if here.exists() else ROOT / 'results' / name):
        if stored.error:  # as that of a run that has just begun
            print(f'warning: {stored.folder}: {stored.error}', file=sys.stderr)
        if 'measured' in stored.run:
            arm, seed = stored.folder.parts[-2:]
            found.setdefault(arm, {})[int(seed.removeprefix('seed'))] = stored.run
    return found


def table(study: Study) -> str:
    """Two tables: of every arm that was run the losses, the differences to dense and the costs; and the
    losses by part. Means over the seeds that are done, with 95 % intervals of paired differences."""
    arms, own = measurements(study.arms.name), measurements(study.parts.name)
    parts, labels = [*study.experts, study.unseen], {arm: text for arm, text in ARMS.items() if arm in arms}
    columns = [*(arms[arm] for arm in labels), *(own.get(part, {}) for part in parts)]
    seeds = sorted(set.intersection(*map(set, columns))) if 'dense' in labels else []
    if not seeds:
        sys.exit(f'{study.arms}: no seed is done yet; run this program without --table')
    arms, own = (
        {
            name: {seed: runs[seed] for seed in seeds}
            for name, runs in found.items()
            if name in [*labels, *parts]
        }
        for found in (arms, own)
    )

    def losses(runs: dict[int, dict], *parts: str) -> dict[int, float]:
        """seed -> mean loss over parts"""
        found = {seed: run['measured']['loss'] for seed, run in runs.items()}
        return {seed: statistics.fmean(loss[part] for part in parts) for seed, loss in found.items()}

    def cost(runs: dict[int, dict], name: str, scale: float, group: str = 'measured') -> float:
        return statistics.fmean(run[group][name] for run in runs.values()) / scale

    dense = cost(arms['dense'], 'training_flops', 1)
    head = [
        '',
        'parts seen',
        'less dense',
        'part not seen',
        'less dense',
        'training',
        'MFLOPs',
        'ms',
        'cache',
    ]
    lines = [row([*head, 'parameters']), row(['---'] * 10)]
    for arm, label in labels.items():
        runs, cells = arms[arm], [label]
        for which in (study.experts, [study.unseen]):
            one, base = losses(runs, *which), losses(arms['dense'], *which)
            difference = None if arm == 'dense' else paired(one, base)
            cells += [f'{statistics.fmean(one.values()):.3f}', with_interval(difference, '+.3f')]
        cells += [
            f'{cost(runs, "training_flops", dense):.2f}',
            f'{cost(runs, "flops_per_token", 1e6):.2f}',
            f'{cost(runs, "cpu_seconds_per_Mtoken", 1e3):.3f}',
            f'{cost(runs, "cache_bytes_per_token", 1, "model"):,.0f}',
            f'{cost(runs, "params", 1e6, "model"):.2f}M',
        ]
        lines.append(row(cells))
    lines += ['', row(['loss by part', *parts]), row(['---'] * (1 + len(parts)))]
    shown = {label: arms[arm] for arm, label in labels.items() if not label.startswith('\N{EN DASH}')}
    for label, runs in shown.items():
        lines.append(row([label, *(f'{statistics.fmean(losses(runs, p).values()):.3f}' for p in parts)]))
    alone = [f'{statistics.fmean(losses(own[p], p).values()):.3f}' for p in parts]
    lines.append(row(['each expert on its own part', *alone]))
    one = arms['dense'][seeds[0]]
    where = f'{one["device"]["name"]}, torch {one["versions"]["torch"]}'
    commits = sorted({run['commit'][:9] for arm in labels for run in arms[arm].values()})
    lines += ['', f'Seeds {", ".join(map(str, seeds))}; commit {", ".join(commits)}; {where}.']
    return '\n'.join(['', *lines, ''])


def row(cells: list[str]) -> str:
    return '| ' + ' | '.join(cells) + ' |'


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument('name', choices=KINDS)
    parser.add_argument('--files', nargs='+', default=[], help='source: the rows that the data was made from')
    parser.add_argument('--scale', choices=SCALES, default='small')
    parser.add_argument('--seeds', default='0,1,2', help='0,1,2')
    parser.add_argument('--rates', action='store_true', help='try learning rates, on seed 1000')
    parser.add_argument('--table', action='store_true', help='print the tables of what is done')
    parser.add_argument('--insert', type=Path, help='with --table: a Markdown file that gets them as well')
    args = parser.parse_args()
    study = Study(args.name, args.scale)
    if args.table:
        text = table(study)
        if args.insert:
            insert(text, study.arms.name, args.insert)
        print(text)
        return 0
    if not (ROOT / 'data' / study.data / FILE).exists():
        cut = ['--dataset=' + DATASET, f'--out_dir=data/{study.data}', *study.cut]
        cut += ['--files', *args.files] if args.files else []
        subprocess.run([sys.executable, 'data/cluster.py', *cut], cwd=ROOT, check=True)
    torch.set_num_threads(1)
    if args.rates:
        study.sweep()
        return 0
    for seed in map(int, args.seeds.split(',')):
        study.run_seed(seed)
    return 0


if __name__ == '__main__':
    sys.exit(main())
