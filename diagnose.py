"""What a trained model knows, and where: accuracy, loss by class, probes, and what reads of other layers do.

    python diagnose.py --out_dir=out/reflex_422
    python diagnose.py --out_dir=out/depth --checkpoint=previous.pt --windows=512

Writes OUT_DIR/diagnose.json and prints its tables. Over windows of a split, evenly spaced:

- accuracy on the tokens that a diagnostic asks for (data/diagnostics), and the step of the training at which
  half of them were right;
- on other data the loss by class of token: how much of what ends with it occurred before in the window, how
  far back the token was seen last, and where in the window it stands;
- copying: the loss on random tokens, and on the same ones when they come again;
- a probe of token identity in every layer: which token stands at a place, by a linear function of the
  residual stream there, or of the values that the layer reads there; and the size of the stream, and in how
  many directions it varies;
- reads: what is lost if the heads that read keys and values of another layer read those of their own layer.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from configurator import ConfigError, configure, run_program
from data.tokendata import META, Examples, eval_windows, open_data, read_windows
from layers.heads import HeadPlanAttention, join
from layers.mixes import ValueResidualAttention
from model import GPT
from runs.checkpoint import BEST, LAST, PREVIOUS
from runs.datasets import data_folder, prepare_own
from runs.files import write_text
from runs.knobs import check_threads
from runs.models import load_model
from runs.records import METRICS, read_jsonl
from runs.system import autocast_for, pick_device, pick_dtype

REPORT = 'diagnose.json'  # in the folder of the run
LONGEST = 4  # n-grams are looked at up to this length
FITTED = 0.75  # of the windows are what a probe is fitted on; the others are held out
ROWS = 1024  # tokens whose logits are held at a time


@dataclass(frozen=True)
class Knobs:
    # model
    out_dir: str = 'out/quickstart'  # the folder of a run
    checkpoint: str = ''  # best.pt | last.pt | previous.pt; '' = best.pt if there is one, else last.pt
    # data
    dataset: str = ''  # a folder of data/, or any path; '' = what the run was trained on
    split: str = 'val'  # of the data set: train | val | test
    windows: int = 128  # of block_size tokens each, spaced evenly over the split; 0 = all
    batch_size: int = 16  # windows at a time
    # system
    device: str = 'auto'  # auto (cuda, mps or cpu) | cpu | cuda | cuda:1 | mps
    dtype: str = 'float32'  # auto | float32 | bfloat16 | float16
    threads: int = 0  # CPU threads; 0 = torch's choice


class Subject(NamedTuple):
    """A model, and the windows that it is looked at on."""

    model: GPT
    x: torch.Tensor  # (N, T) ids
    y: torch.Tensor  # (N, T) targets, -1 where they do not count
    batch_size: int
    autocast: Callable

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True)


# -----------------------------------------------------------------------------
# Losses and accuracy


@torch.no_grad()
def predict(s: Subject) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses in nats, whether the best guess is right) of all targets, (N, T) each; 0 and False where none
    counts. Padding ids have no probability."""
    used = s.model.config.vocab_used or s.model.config.vocab_size
    losses, right = [], []
    for x, y in s.batches():
        with s.autocast():
            hidden = s.model.hidden(x).flatten(0, 1)  # (B * T, C)
        for h, target in zip(hidden.split(ROWS), y.flatten().split(ROWS), strict=True):
            with s.autocast():
                logits = s.model.logits(h)[:, :used].float()
            losses.append(F.cross_entropy(logits, target, ignore_index=-1, reduction='none'))
            right.append(logits.argmax(1) == target)
    return torch.cat(losses).view(s.x.shape), torch.cat(right).view(s.x.shape)


def mean_loss(s: Subject) -> tuple[float, float]:
    """(mean loss, accuracy) over the targets that count."""
    losses, right = predict(s)
    n = (s.y != -1).sum().item()
    return losses.double().sum().item() / n, right.sum().item() / n


def accuracy_by_group(right: torch.Tensor, tokens: Examples) -> dict[str, float]:
    """right (N, T) -> the accuracy of every group that the data set names."""
    by_place = right.double().mean(0)
    return {
        name: by_place[[place - 1 for place in places]].mean().item() for name, places in tokens.asked.items()
    }


def onset(metrics: list[dict], half: float = 0.5) -> dict[str, float | None]:
    """By lines of metrics.jsonl: the step at which an accuracy reached `half`, on a straight line between the
    evaluations; None where it never did."""
    found = {}
    evals = [record for record in metrics if 'val/accuracy' in record]
    for name in dict.fromkeys(name for record in evals for name in record if name.startswith('val/accuracy')):
        curve = [(record['iter'], record[name]) for record in evals if record.get(name) is not None]
        before, step = None, None
        for it, value in curve:
            if value >= half:
                rise = 1.0 if before is None else (half - before[1]) / (value - before[1])
                step = it if before is None else before[0] + rise * (it - before[0])
                break
            before = it, value
        found[name.removeprefix('val/accuracy').removeprefix('/') or 'all'] = step
    return found


def seen_before(window: list[int]) -> tuple[list[int], list[int]]:
    """For every target of a window of tokens (the second one on): the length of the longest n-gram that ends
    with it and occurred in the window before, at most LONGEST; and how far back the token occurred last, 0
    where it did not."""
    lengths, distances = [], []
    ends = [{} for _ in range(LONGEST + 1)]  # of n: n-gram -> where it ended last
    for at in range(len(window)):
        longest = distance = 0
        for n in range(1, min(LONGEST, at + 1) + 1):
            gram = tuple(window[at + 1 - n : at + 1])
            if gram in ends[n]:
                longest = n
                distance = at - ends[n][gram] if n == 1 else distance
            ends[n][gram] = at
        lengths.append(longest)
        distances.append(distance)
    return lengths[1:], distances[1:]


def doubling(number: int) -> str:
    """The class of a whole number above 0: '1', '2-3', '4-7', …"""
    low = 1 << (number.bit_length() - 1)
    return str(low) if low == 1 else f'{low}-{2 * low - 1}'


def loss_by_class(s: Subject, losses: torch.Tensor) -> dict[str, dict[str, dict]]:
    """{how targets are told apart: {class: {'tokens': how many, 'loss': mean nats}}}"""
    found: dict[str, dict[str, list[float]]] = {'repeats': {}, 'last seen': {}, 'place': {}}
    for x, y, row in zip(s.x.tolist(), s.y.tolist(), losses.tolist(), strict=True):
        lengths, distances = seen_before([*x, y[-1]])
        for place, (n, back, loss) in enumerate(zip(lengths, distances, row, strict=True), 1):
            more = ' or more' if n == LONGEST else ''
            names = {
                'repeats': f'{n} token{"s" * (n > 1)}{more}' if n else 'new token',
                'last seen': f'{doubling(back)} back' if back else 'never',
                'place': doubling(place),
            }
            for kind, name in names.items():
                found[kind].setdefault(name, []).append(loss)

    def order(name: str):
        number = name.split('-')[0].split()[0]
        return (number.isdecimal(), int(number) if number.isdecimal() else 0)

    return {
        kind: {
            name: {'tokens': len(classes[name]), 'loss': float(np.mean(classes[name]))}
            for name in sorted(classes, key=order)
        }
        for kind, classes in found.items()
    }


def copying(s: Subject, rows: int = 32) -> dict[str, float]:
    """Mean loss on random tokens, and on the same ones when they come again: an induction head sees to the
    second (Olsson et al., 2022). All tokens of the vocabulary are as likely."""
    used = s.model.config.vocab_used or s.model.config.vocab_size
    half = s.model.config.block_size // 2
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(used, (rows, half), generator=generator).to(s.x.device)
    twice = torch.cat([tokens, tokens], dim=1)
    losses, _ = predict(s._replace(x=twice[:, :-1].contiguous(), y=twice[:, 1:].contiguous()))
    return {'first': losses[:, : half - 1].mean().item(), 'again': losses[:, half:].mean().item()}


# -----------------------------------------------------------------------------
# Probes


class Probe:
    """Linear discriminant analysis: which class a vector is of, by a linear function of it, in closed form.

    It is the best there is where all classes are normally distributed with one covariance."""

    def __init__(self, vectors: torch.Tensor, classes: torch.Tensor, ridge: float = 1e-2):
        """vectors (N, d), classes (N,) whole numbers. ridge: what is added to the covariance, as a share of
        its mean variance."""
        self.known, index, counts = classes.unique(return_inverse=True, return_counts=True)
        vectors = vectors.double()
        means = vectors.new_zeros(len(self.known), vectors.size(1)).index_add_(0, index, vectors)
        means /= counts[:, None]
        within = vectors - means[index]
        covariance = within.T @ within / len(vectors)
        spread = covariance.diagonal().mean() + 1e-12 * vectors.square().mean()
        covariance.diagonal().add_(ridge * spread)
        self.weight = torch.linalg.solve(covariance, means.T)  # (d, classes)
        self.bias = -0.5 * (means.T * self.weight).sum(0) + (counts / counts.sum()).log()

    def accuracy(self, vectors: torch.Tensor, classes: torch.Tensor) -> float:
        """The share of vectors (N, d) whose class it finds; classes that it has not seen count as missed."""
        right = 0
        for part, wanted in zip(vectors.double().split(ROWS), classes.split(ROWS), strict=True):
            guess = self.known[(part @ self.weight + self.bias).argmax(1)]
            right += (guess == wanted).sum().item()
        return right / len(classes)


def head_plan_layers(model: GPT) -> dict[int, tuple[int, HeadPlanAttention]]:
    """{layer: (its number among those of the head plan, its attention)}"""
    layers = [(l, b.attn) for l, b in enumerate(model.transformer.h) if isinstance(b.attn, HeadPlanAttention)]
    return {l: (i, attn) for i, (l, attn) in enumerate(layers)}


@contextlib.contextmanager
def reading(layers: dict[int, HeadPlanAttention], change):
    """Inside, attention layer l reads change(l, k, v, own k, own v): k, v (B, n_head, T, hs) are what its
    heads would read, the others what it has projected."""

    def read(k, v, memory, cache, l, usual):
        read_k, read_v = usual(k, v, memory, cache)
        read_k, read_v = change(l, join(read_k), join(read_v), k, v)
        return [read_k], [read_v]

    for l, attn in layers.items():
        attn.read = partial(read, l=l, usual=attn.read)
    try:
        yield
    finally:
        for attn in layers.values():
            del attn.read


@torch.no_grad()
def states(s: Subject, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model has at the chosen places (N, T) bool: the residual stream before every layer and after
    the last, and the values that each layer's heads read there; (number of places, size) each."""
    found: dict[str, list[torch.Tensor]] = {}
    batch: dict[str, torch.Tensor] = {}

    def keep(name, tensor):  # (B, T, size)
        batch[name] = tensor

    def keep_values(l, k, v, own_k, own_v):
        keep(f'values {l}', v.transpose(1, 2).flatten(2))  # (B, T, n_head * hs)
        return k, v

    blocks = s.model.transformer.h
    hooks = [
        block.register_forward_pre_hook(lambda _, args, l=l: keep(f'stream {l}', args[0]))
        for l, block in enumerate(blocks)
    ]
    final = s.model.transformer.ln_f
    hooks.append(final.register_forward_pre_hook(lambda _, args: keep(f'stream {len(blocks)}', args[0])))
    try:
        with reading({l: attn for l, (_, attn) in head_plan_layers(s.model).items()}, keep_values):
            for (x, _), places in zip(s.batches(), chosen.split(s.batch_size), strict=True):
                with s.autocast():
                    s.model.hidden(x)
                for name, tensor in batch.items():
                    found.setdefault(name, []).append(tensor[places].float())
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def asked_later(x: torch.Tensor, y: torch.Tensor, tokens: Examples) -> torch.Tensor:
    """The places (N, T) of an example from which an answer must be fetched: their tokens are asked for later,
    and are not asked for themselves."""
    counts = torch.from_numpy(tokens.counts).to(x.device)  # of targets: place + 1
    answers = y[:, counts]  # (N, asked)
    fetched = (x[:, :, None] == answers[:, None]).any(2)
    fetched[:, 1:] &= ~counts[:-1]
    return fetched


def directions(vectors: torch.Tensor) -> float:
    """In how many directions vectors (N, d) vary, from 1 to d: (Σ λ)² / Σ λ² of the eigenvalues λ of their
    covariance (the participation ratio)."""
    centred = (vectors - vectors.mean(0)).double()
    covariance = centred.T @ centred
    return (covariance.trace().square() / covariance.square().sum()).item()


def probe_layers(s: Subject, chosen: torch.Tensor) -> dict[str, dict[str, float]]:
    """Of every state at the chosen places: the accuracy of a probe of the token there, on windows that are
    held out; the root mean square; and `directions`."""
    fitted = int(FITTED * len(s.x))
    n = int(chosen[:fitted].sum())  # places come window by window
    ids, found = s.x[chosen], {}
    for name, vectors in states(s, chosen).items():
        found[name] = {
            'token': Probe(vectors[:n], ids[:n]).accuracy(vectors[n:], ids[n:]),
            'size': vectors.square().mean().sqrt().item(),
            'directions': directions(vectors),
        }
    return found


# -----------------------------------------------------------------------------
# Reads of other layers


class Swap(NamedTuple):
    """Reads of other layers that are taken away, and by what they are replaced."""

    what: str
    layers: list[int]
    keys: bool
    values: bool


def swaps(model: GPT) -> list[Swap]:
    """Those of each layer, of keys and values together and apart; and those of all layers."""
    plan, found, lagged = model.config.head_plan(), [], []
    for l, (i, attn) in head_plan_layers(model).items():
        keys, values = ([head[part][0] != i for head in plan.heads[i]] for part in (0, 1))
        mixed = isinstance(attn, ValueResidualAttention)
        if not any(keys) and not any(values) and not mixed:
            continue
        lagged.append(l)
        found.append(Swap(f'layer {l}', [l], True, True))
        if any(keys):
            found += [
                Swap(f'layer {l}, keys', [l], True, False),
                Swap(f'layer {l}, values', [l], False, True),
            ]
    return [*found, Swap('all layers', lagged, True, True)] if len(lagged) > 1 else found


@contextlib.contextmanager
def swapped(model: GPT, swap: Swap):
    """Inside, the heads of these layers read no other layer. A head has its layer's own key and value of its
    number, where the layer projects them (for later readers), and else zeros: equal scores, or nothing read.
    A value residual is left with the layer's own values. Yields the number of (own, zero) reads."""
    plan, layers = model.config.head_plan(), head_plan_layers(model)
    own_of: dict[
        int, list[dict[int, int | None]]
    ] = {}  # layer -> for keys, values: head -> place among its own
    for l in swap.layers:
        i, _ = layers[l]
        own_of[l] = []
        for part, produced, on in ((0, plan.keys[i], swap.keys), (1, plan.values[i], swap.values)):
            heads = [h for h, head in enumerate(plan.heads[i]) if head[part][0] != i and on]
            own_of[l].append({h: produced.index(h) if h in produced else None for h in heads})

    def change(l, k, v, own_k, own_v):
        results = []
        for tensor, own, heads in zip((k, v), (own_k, own_v), own_of[l], strict=True):
            tensor = tensor.clone()
            for h, at in heads.items():
                tensor[:, h] = 0 if at is None else own[:, at]
            results.append(tensor)
        return results

    chosen = {l: layers[l][1] for l in swap.layers}
    mixed = [attn for attn in chosen.values() if isinstance(attn, ValueResidualAttention)]
    shares = [attn.own_share.detach().clone() for attn in mixed]
    places = [at for heads in own_of.values() for part in heads for at in part.values()]
    own = sum(at is not None for at in places) + sum(attn.n_value for attn in mixed)
    try:
        with reading(chosen, change), torch.no_grad():
            for attn in mixed:
                attn.own_share.fill_(1.0)
            yield own, places.count(None)
    finally:
        with torch.no_grad():
            for attn, share in zip(mixed, shares, strict=True):
                attn.own_share.copy_(share)


def worth_of_reads(s: Subject) -> list[dict]:
    """What each swap does to loss and accuracy, over the same windows."""
    loss, accuracy = mean_loss(s)
    found = []
    for swap in swaps(s.model):
        with swapped(s.model, swap) as (own, zeros):
            worse, less = mean_loss(s)
        told = {'swapped': swap.what, 'by own': own, 'by zeros': zeros}
        found.append({**told, 'loss': worse - loss, 'accuracy': less - accuracy})
    return found


# -----------------------------------------------------------------------------


def open_subject(k: Knobs, checkpoint: str, device: str, autocast) -> tuple[Subject, object, int]:
    """(the model and its windows, the tokens of the split, the iteration of the checkpoint)"""
    model, state = load_model(k.out_dir, checkpoint, device)
    if not isinstance(model, GPT):
        raise ConfigError(
            f'{k.out_dir} holds a {type(model).__name__}: only a GPT has a state per token and layer'
        )
    folder = data_folder(k.dataset or state['config'].get('dataset', ''))
    prepare_own(folder)
    known, T = model.config.vocab_used or model.config.vocab_size, model.config.block_size
    data = open_data(folder, T, vocab_size=None if (folder / META).exists() else known)
    theirs, ours = (spec and spec['fingerprint'] for spec in (data.tokenizer_spec, state['tokenizer']))
    if data.vocab_size != known or theirs != ours:
        raise ConfigError(f'{folder} has other tokens than {k.out_dir} was trained on: give its --dataset')
    if k.split not in data.splits:
        raise ConfigError(f'split={k.split!r}: {folder} has {", ".join(data.splits)}')
    tokens = data.splits[k.split]
    starts, _ = eval_windows(tokens, T, k.windows)
    if len(starts) < 4:
        raise ConfigError(
            f'{k.split} of {folder} has {len(starts)} windows of {T} tokens: at least 4 are needed'
        )
    x, y = (torch.from_numpy(a).to(device) for a in read_windows(tokens, starts, T))
    return Subject(model, x, y, k.batch_size, autocast), tokens, state['iter']


def diagnose(k: Knobs, device: str, autocast) -> dict:
    """All that the program tells, as it is in diagnose.json."""
    s, tokens, iteration = open_subject(k, k.checkpoint, device, autocast)
    losses, right = predict(s)
    n = (s.y != -1).sum().item()
    report = {
        'run': k.out_dir,
        'attention': s.model.config.attention,
        'iter': iteration,
        'windows': len(s.x),
        'loss': losses.double().sum().item() / n,
        'accuracy': {'all': right.sum().item() / n},
    }
    if isinstance(tokens, Examples):
        report['accuracy'] |= accuracy_by_group(right, tokens)
        chosen = asked_later(s.x, s.y, tokens)
        path = Path(k.out_dir) / METRICS
        report['half right at step'] = onset(read_jsonl(path)) if path.exists() else {}
    else:
        chosen = torch.ones_like(s.x, dtype=torch.bool)
        report['loss by class'] = loss_by_class(s, losses)
        report['copying'] = {}
        for name in (PREVIOUS, BEST, LAST):
            if (Path(k.out_dir) / name).exists():
                other, _, at = open_subject(k, name, device, autocast)
                report['copying'][str(at)] = copying(other)
    report['probe'] = probe_layers(s, chosen)
    report['reads'] = worth_of_reads(s)
    return report


def table(title: str, header: list[str], rows: list[list]) -> str:
    """Lines of text: columns of equal width, numbers to the right."""

    def cell(value) -> str:
        return '-' if value is None else f'{value:.4f}' if isinstance(value, float) else f'{value}'

    text = [header, *([cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in text) for i in range(len(header))]
    lines = [
        '  '.join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in text
    ]
    return '\n'.join(['', title, *(f'  {line.rstrip()}' for line in lines)])


def tables(report: dict) -> str:
    """The report, to be read."""
    parts = [
        f'{report["run"]}: {report["attention"]}, iteration {report["iter"]}, {report["windows"]} windows, '
        f'loss {report["loss"]:.4f}'
    ]
    steps = report.get('half right at step', {})
    rows = [[name, share, steps.get(name)] for name, share in report['accuracy'].items()]
    parts.append(table('accuracy', ['asked for', 'accuracy', 'half right at step'], rows))
    for kind, classes in report.get('loss by class', {}).items():
        rows = [[name, entry['tokens'], entry['loss']] for name, entry in classes.items()]
        parts.append(table('loss by class of token', [kind, 'tokens', 'loss'], rows))
    rows = [[at, entry['first'], entry['again']] for at, entry in report.get('copying', {}).items()]
    if rows:
        parts.append(table('copying of random tokens', ['iteration', 'loss', 'when they come again'], rows))
    n_layer = sum(name.startswith('stream') for name in report['probe']) - 1
    rows = []
    for l in range(n_layer + 1):
        stream, values = report['probe'][f'stream {l}'], report['probe'].get(f'values {l}', {})
        rows.append([l if l < n_layer else 'end', stream['token'], values.get('token'), stream['size']])
        rows[-1].append(f'{stream["directions"]:.1f}')
    header = ['before layer', 'token from stream', 'token from values read', 'size of stream', 'directions']
    parts.append(table('what the stream holds', header, rows))
    if report['reads']:
        names = ('swapped', 'by own', 'by zeros', 'loss', 'accuracy')
        header = ['reads of other layers', 'by own', 'by zeros', 'loss', 'accuracy']
        rows = [[entry[name] for name in names] for entry in report['reads']]
        parts.append(table('what is lost if heads read their own layer', header, rows))
    return '\n'.join(parts)


def main(argv: list[str]) -> int:
    k = configure(Knobs, argv, __doc__).knobs
    for name, least in {'windows': 0, 'batch_size': 1}.items():
        if getattr(k, name) < least:
            raise ConfigError(f'{name}={getattr(k, name)}: must be at least {least}')
    check_threads(k)
    device = pick_device(k.device)
    dtype = pick_dtype(k.dtype, device)
    if k.threads:
        torch.set_num_threads(k.threads)
    report = diagnose(k, device, partial(autocast_for, device, dtype))
    write_text(Path(k.out_dir) / REPORT, json.dumps(report, indent=1) + '\n')
    print(tables(report))
    print(f'\n{Path(k.out_dir).as_posix()}/{REPORT}')
    return 0


if __name__ == '__main__':
    run_program(main)
