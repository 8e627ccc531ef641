"""What runs leave behind, read and checked: run.json and metrics.jsonl in a folder, gathered into arms.

A run is a folder with both files, or a line of NAME.jsonl: a study that is kept is one text file, which
stands for a folder NAME beside it with a folder per run. Everything that reads runs comes here, so what a
file may hold is declared and checked in one place. Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import statistics
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from configurator import UserError
from declared import Either, Null, Number, Object, Shape, Text, Whole
from layers.spec import canonical
from runs.files import make_folder, write_text
from runs.knobs import BEFORE, Knobs

METRICS, RUN, README = 'metrics.jsonl', 'run.json', 'README.md'
PACK = '.jsonl'  # NAME.jsonl holds the runs of the folder NAME
# Knobs that do not change what a run learns: they may differ within an arm
SESSION = set(
    'out_dir overwrite init_from seed eval_only log_interval sample_tokens sample_start checkpoint_interval '
    'checkpoint_minutes wandb_log wandb_project wandb_run_name wandb_group device compile threads backend '
    'dist_timeout shard activation_checkpointing'.split()
)


class RecordError(UserError):
    """Records of runs that cannot be used: which, why, and the fix, in one line."""


# -----------------------------------------------------------------------------
# What the files may hold


def maybe(shape: Shape) -> Shape:
    return Either(Null(), shape)


COUNT, NUMBER, TEXT = Whole(0, 10**18), Number(-1e30, 1e30), Text()
RUN_SHAPE = Object(  # run.json, as far as it is read here
    {
        'status': TEXT,
        'tokens_per_step': Whole(1, 10**18),
        'config': Object(
            {
                'seed': COUNT,
                'max_iters': COUNT,
                'eval_iters': COUNT,
                'batch_size': Whole(1, 10**18),
                'block_size': Whole(1, 10**18),
                'learning_rate': NUMBER,
            },
            dict.fromkeys('attention head_split windows optimizer init_from dataset'.split(), maybe(TEXT)),
        ),
        'model': Object(
            {'params': COUNT, 'flops_per_token': NUMBER, 'cache_bytes_per_token': NUMBER},
            {'state_bytes': maybe(NUMBER)},
        ),
    },
    {
        'error': maybe(TEXT),
        'commit': maybe(TEXT),
        'threads': maybe(COUNT),
        'peak_memory_bytes': maybe(COUNT),
        'data': Object(
            {},
            {
                'fingerprint': maybe(TEXT),
                'tokens': maybe(Object({}, {'val': COUNT})),
                'bytes_per_token': maybe(Object({}, {'val': NUMBER})),
            },
        ),
        'device': Object({}, {'name': maybe(TEXT), 'dtype': maybe(TEXT), 'ranks': maybe(COUNT)}),
        'versions': Object({}, {'torch': maybe(TEXT)}),
    },
)
RECORD_SHAPE = Object(  # a line of metrics.jsonl: a logged step, an evaluation, or an event
    {'iter': COUNT},
    {
        'event': maybe(TEXT),
        **dict.fromkeys(
            ['loss', 'tokens_per_s', 'mfu', 'train/loss', 'val/loss', 'val/accuracy'], maybe(NUMBER)
        ),
    },
)


def _json(text: str):
    """A JSON value; NaN and Infinity, which JSON has not, become None. ValueError for anything else."""
    try:
        return json.loads(text, parse_constant=lambda name: None)
    except RecursionError:
        raise ValueError('its brackets are nested too deep') from None


def read_jsonl(path: str | Path) -> list[dict]:
    """The lines of a metrics file, without a last one that a kill cut short. ValueError for a bad one."""
    lines = Path(path).read_text(encoding='utf-8', errors='replace').split('\n')
    records = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = _json(line)
        except ValueError as e:
            if number < len(lines):
                reason = getattr(e, 'msg', e)
                raise ValueError(f'{path}, line {number} is not JSON ({reason}): delete the line') from None
            continue
        if fault := RECORD_SHAPE.fault(record, ''):
            raise ValueError(f'{path}, line {number} is no record of a run ({fault}): delete the line')
        records.append(record)
    return records


# -----------------------------------------------------------------------------
# A run


class Stored(NamedTuple):
    """What a run left. error: why it cannot be read; '' if it can."""

    folder: Path  # where the files are, or were before they were packed
    run: dict  # run.json
    metrics: list[dict]  # lines of metrics.jsonl
    error: str = ''


@dataclass(frozen=True)
class Run:
    folder: Path
    arm: str
    seed: int
    run: dict  # run.json
    evals: list  # lines of metrics.jsonl with a validation loss
    tokens_per_s: float | None  # median over its logged steps
    mfu: float | None
    state: str  # 'finished', or in words why it does not count
    evaluated_from: int | None = None  # the iteration at which its evaluation settings changed, if they did

    @property
    def finished(self) -> bool:
        return self.state == 'finished'

    @property
    def config(self) -> dict:
        return self.run['config']

    @property
    def val_loss(self) -> float:
        """At the last step; no stopping where it happens to be lowest."""
        return self.evals[-1]['val/loss']

    @property
    def train_loss(self) -> float | None:
        return self.evals[-1].get('train/loss')

    @property
    def accuracy(self) -> float | None:
        """The share of asked tokens of val that are predicted right, where the data say which those are."""
        return self.evals[-1].get('val/accuracy')

    @property
    def accuracies(self) -> dict[str, float]:
        """The same by the data set's groups of asked tokens, where it has several."""
        last = self.evals[-1].items()
        return {name.removeprefix('val/accuracy/'): v for name, v in last if name.startswith('val/accuracy/')}

    @property
    def peak_memory(self) -> int | None:
        return self.run.get('peak_memory_bytes')

    @property
    def fingerprint(self) -> str | None:
        """Of the tokens that it was trained on."""
        return (self.run.get('data') or {}).get('fingerprint')


def read_folder(folder: Path) -> Stored:
    """The run in a folder; what is missing or broken there becomes its error, not an exception."""
    try:
        run = _json((folder / RUN).read_text(encoding='utf-8'))
        if fault := RUN_SHAPE.fault(run, ''):
            raise ValueError(f'{RUN}: {fault}')
        return Stored(folder, run, read_jsonl(folder / METRICS))
    except (OSError, ValueError) as e:
        return Stored(folder, {}, [], f'its files cannot be read ({e})')


def read_run(folder: Path, arm: str) -> Run:
    return judged(read_folder(folder), arm)


def judged(stored: Stored, arm: str) -> Run:
    """A stored run as one of an arm: its evaluations, its speed, and whether it counts."""
    folder, run, metrics, error = stored
    if error:
        number = re.fullmatch(r'seed(\d+)', folder.name)
        return Run(folder, arm, int(number[1]) if number else -1, {}, [], None, None, error)
    config, per_step, total = run['config'], run['tokens_per_step'], run['config']['max_iters']
    last = max((r['iter'] for r in metrics), default=0)
    # what came before was evaluated on other windows than those that run.json names
    changes = [i for i, r in enumerate(metrics) if r.get('event') == 'eval_changed']
    evaluated_from = metrics[changes[-1]]['iter'] if changes else None
    evals = [r for r in metrics[changes[-1] if changes else 0 :] if 'val/loss' in r]
    steps = [r for r in metrics if 'tokens_per_s' in r]
    # the first line of a process holds the compilation; a median does not see it
    speeds, mfus = (
        [r[name] for r in steps if r['iter'] > 1 and (r.get(name) or 0) > 0]
        or [r[name] for r in steps if (r.get(name) or 0) > 0]
        for name in ('tokens_per_s', 'mfu')
    )
    state = 'finished'
    if run['status'] != 'finished':
        reason = (run.get('error') or '').split(';')[0]
        state = f'{run["status"]} at step {last} of {total}' + (f' ({reason})' if reason else '')
    elif (twice := _twice(metrics)) is not None:
        state = f'{METRICS} has two different records of iteration {twice}: more than one run wrote it'
    elif not evals or evals[-1]['iter'] < total:
        state = f'ended without an evaluation at its last step, {total}'
        state += f'; its evaluation settings changed at step {evaluated_from}' if changes else ''
    elif evals[-1]['val/loss'] is None:
        state = f'the validation loss is not a number at step {total}'
    evals = {r['iter']: {**r, 'tokens': r['iter'] * per_step} for r in evals if r['val/loss'] is not None}
    return Run(
        folder,
        arm,
        config['seed'],
        run,
        list(evals.values()),
        statistics.median(speeds) if speeds else None,
        statistics.median(mfus) if mfus else None,
        state,
        evaluated_from,
    )


def _twice(metrics: list[dict]) -> int | None:
    """The first iteration that has two evaluations, or two logged steps, with different losses."""
    seen = {}
    for record in metrics:
        if record.get('event') == 'eval_changed':
            seen = {key: loss for key, loss in seen.items() if key[1] == 'loss'}
        for name in ('loss', 'val/loss', 'train/loss'):
            if name in record and seen.setdefault((record['iter'], name), record[name]) != record[name]:
                return record['iter']
    return None


def what_is_learned(config: dict) -> dict:
    """The knobs that decide what a run learns, of where it started only whether from other weights.

    Knobs that a record is too old to name are as they were then; the attention is in its one spelling.
    """
    learned = {f.name: f.default for f in fields(Knobs)} | BEFORE | config
    attention, head_split, windows = (learned.pop(n) for n in ('attention', 'head_split', 'windows'))
    learned = {name: value for name, value in learned.items() if name not in SESSION}
    with contextlib.suppress(ValueError):  # what cannot be read is compared as it is
        attention = canonical(attention, head_split, windows)
    learned['attention'] = attention
    if config.get('optimizer') != 'muon':
        del learned['muon_qkv']
    if config.get('init_from') not in (None, 'scratch', 'resume', 'auto'):
        learned['init_from'] = config['init_from']
    return learned


def unlike(a: dict, b: dict) -> list[tuple]:
    """(knob, value in a, value in b) for every knob of learning in which two configs differ."""
    a, b = what_is_learned(a), what_is_learned(b)
    return [(k, a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


def validation_set(run: Run):
    """What the validation loss is a mean over. The whole split is the same tokens whatever the block size."""
    config, data = run.config, run.run.get('data') or {}
    windows, size = config['eval_iters'] * config['batch_size'], config['block_size']
    targets = ((data.get('tokens') or {}).get('val') or math.inf) - 1
    whole = windows == 0 or windows * size >= targets
    return data.get('fingerprint'), 'every token' if whole else f'{windows} windows of {size} tokens'


# -----------------------------------------------------------------------------
# An arm


class Arm:
    """The runs of one arm and what they come to."""

    def __init__(self, name: str, runs: list[Run]):
        self.name = name
        self.runs = sorted(runs, key=lambda r: r.seed)
        self.finished = [r for r in self.runs if r.finished]
        # a run that stands for the arm in what its runs agree in; None if no file of any can be read
        self.one = next((r for r in [*self.finished, *self.runs] if r.run), None)
        self.speed = self.mean('tokens_per_s')

    def by_seed(self, name: str) -> dict[int, float]:
        """seed -> an attribute of the finished run, where it is known."""
        return {r.seed: getattr(r, name) for r in self.finished if getattr(r, name) is not None}

    def mean(self, name: str) -> float | None:
        values = list(self.by_seed(name).values())
        return statistics.fmean(values) if values else None


def sweep_of(arm: Arm) -> dict[float, float]:
    """{learning rate: mean validation loss, inf if one failed} of the sweep beside an arm's study, if any."""
    folder = arm.one.folder.absolute()
    tree, losses = folder.parents[1], {}
    if not re.fullmatch(r'seed\d+', folder.name) or not tree.name:
        return {}
    try:
        swept = find_stored(tree.with_name(f'{tree.name}-lr'))
    except RecordError:
        return {}
    for stored in swept:
        if re.fullmatch(re.escape(folder.parent.name) + r'-lr[-+.e\d]+', stored.folder.parent.name):
            run = judged(stored, arm.name)
            other = {knob for knob, _, _ in unlike(run.config, arm.one.config)} if run.run else {'all'}
            if other <= {'learning_rate', 'max_iters'}:
                loss = run.val_loss if run.finished else math.inf
                losses.setdefault(run.config['learning_rate'], []).append(loss)
    return {rate: statistics.fmean(values) for rate, values in sorted(losses.items())}


def root_of(argument: str) -> tuple[str, Path]:
    """What `NAME=PATH` or `PATH` says: (NAME, or '' if none is given; the path)."""
    name, equals, path = argument.partition('=')
    if not equals or Path(argument).exists():  # a folder such as lr=0.1
        return '', Path(argument)
    if not name:
        raise RecordError(f'{argument}: give a name before the "=", or the path alone')
    return name, Path(path)


def find_runs(arguments: list[str]) -> list[Run]:
    """The runs under `PATH` or `NAME=PATH` arguments, each with the name of its arm.

    An arm is named by NAME, else by the folder that holds seed<k> folders, else by the run's own folder; of
    those last ones, runs whose configs differ only in the seed are one arm.
    """
    found, loose, roots, named = [], [], {}, False
    for argument in arguments:
        name, root = root_of(argument)
        named = named or bool(name)
        for stored in find_stored(root):
            full = stored.folder.resolve()
            roots[stored.folder] = root.resolve()
            if name:
                found.append(judged(stored, name))
            elif re.fullmatch(r'seed\d+', full.name):
                found.append(judged(stored, full.parent.name))
            else:
                loose.append(judged(stored, full.name))
    alike = {}
    for run in loose:
        key = json.dumps(what_is_learned(run.config), sort_keys=True) if run.run else run.folder
        alike.setdefault(key, []).append(run)
    names = [_in_common(runs) for runs in alike.values()]
    for name, runs in zip(names, alike.values(), strict=True):
        found += [replace(r, arm=name if names.count(name) == 1 else runs[0].arm) for r in runs]
    # the same arm in two experiments: the experiment's name tells them apart
    if not named and len({(r.arm, r.seed) for r in found}) < len(found) and len(set(roots.values())) > 1:
        found = [replace(r, arm=f'{roots[r.folder].name}/{r.arm}') for r in found]
    seen = {}
    for run in (r for r in found if r.run):
        if (run.arm, run.seed) in seen:
            raise RecordError(
                f'{seen[run.arm, run.seed]} and {run.folder} are both seed {run.seed} of {run.arm!r}: leave '
                'one out, or name them apart: NAME=PATH'
            )
        seen[run.arm, run.seed] = run.folder
    return found


def _in_common(runs: list[Run]) -> str:
    """What folders of runs that differ only in the seed are called without it: a-s1 and a-s2 are a."""
    names = {re.sub(rf'([-_.]+(seed|s)?|seed){r.seed}$', '', r.arm) if len(runs) > 1 else r.arm for r in runs}
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return re.sub(r'[-_.]+(seed|s)?$', '', ''.join(letters[0] for letters in same)) or runs[0].arm


def _natural(path: Path):
    """Sort key that puts seed10 after seed9."""
    return [
        (part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r'(\d+)', str(path))
    ]


# -----------------------------------------------------------------------------
# Studies: trees of runs, loose or packed into one file


def find_stored(root: Path) -> list[Stored]:
    """The runs in a folder and below, be they loose or packed; RecordError where there is none.

    root: a folder, the file NAME.jsonl or the folder NAME that it stands for, or one below that.
    """
    if root.name in (RUN, METRICS):
        root = root.parent
    elif root.is_file() and is_pack(root):
        root = unpacked(root)
    folders = {path.parent for what in (RUN, METRICS) for path in root.rglob(what)}
    loose = {folder: read_folder(folder) for folder in folders}
    packs = [packed(place) for place in (root, *root.parents) if place.name]
    packs += [path for path in root.rglob(f'*{PACK}') if path.name != METRICS]
    kept = {}
    for path in packs:
        if path.is_file() and is_pack(path):
            kept |= {s.folder: s for s in read_pack(path) if s.folder.is_relative_to(root)}
    for folder in loose.keys() & kept.keys():
        if loose[folder] != kept[folder]:
            raise RecordError(
                f'{folder} holds another run than the packed one of the same place: move one of them away'
            )
    found = sorted((kept | loose).values(), key=lambda s: _natural(s.folder))
    if not found:
        raise RecordError(
            f'{root}: no {RUN} or {METRICS} is there or below, and no {root.name}{PACK} beside it; '
            'give the folder of a run or of many, or the file of a kept study'
        )
    return found


def packed(folder: Path) -> Path:
    """The file that stands for a folder of runs."""
    return folder.with_name(folder.name + PACK)


def unpacked(path: Path) -> Path:
    """The folder that a packed study stands for."""
    return Path(str(path).removesuffix(PACK))


def is_pack(path: Path) -> bool:
    """Whether a file is a packed study, by how it begins; other files may well be called *.jsonl."""
    try:
        with open(path, 'rb') as file:
            return file.read(9) == b'{"folder"'
    except OSError:
        return False


def read_pack(path: Path) -> list[Stored]:
    """The runs of a packed study; a line that cannot be read becomes the error of its run."""
    found = []
    for number, line in enumerate(path.read_text(encoding='utf-8', errors='replace').splitlines(), 1):
        where = unpacked(path) / f'line{number}'
        try:
            row = _json(line)
            where = unpacked(path) / row['folder']
            run = row['run']
            metrics = [
                dict(zip(group['keys'], values, strict=True))
                for group in row['metrics']
                for values in group['rows']
            ]
            for value, shape in [(run, RUN_SHAPE), *((record, RECORD_SHAPE) for record in metrics)]:
                if fault := shape.fault(value, ''):
                    raise ValueError(fault)
            found.append(Stored(where, run, metrics))
        except (ValueError, KeyError, TypeError) as e:
            found.append(Stored(where, {}, [], f'line {number} of {path} cannot be read ({e!r})'))
    return found


def readme_of(folder: Path) -> Path:
    """Where a study's words are: in its folder, or beside the file that it is packed into."""
    loose, beside = folder / README, folder.parent / f'{folder.name}.md'
    return beside if not loose.exists() and beside.exists() else loose


def trees_of(folder: Path) -> list[Path]:
    """The folder of a study and those that belong to it: of its sweep of learning rates, of a search."""
    beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
    stems = {unpacked(path).name if path.is_file() else path.name for path in beside}
    mine = (stem for stem in stems if re.fullmatch(re.escape(folder.name) + r'-(lr|rung\d+)', stem))
    return [folder, *(folder.with_name(stem) for stem in sorted(mine))]


def pack(folders: list[Path], study: Path) -> list[Path]:
    """Keep the runs of studies, and what belongs to them, as STUDY.jsonl, STUDY-lr.jsonl, …: these files.

    A line is a run, {"folder": …, "run": run.json, "metrics": [{"keys": …, "rows": …}, …]}, with all of its
    numbers as they were, and its metrics as tables of neighbouring records with the same keys. README.md
    becomes STUDY.md. What the files hold already stays in them. Where folders of these very names are packed,
    their files are removed once what was written has been read back and is the same.
    """
    study = unpacked(study)
    if not study.name:
        raise RecordError(f'{study}: give the study a name, such as results/NAME')
    folders = [study] * (packed(study).exists() and study not in folders) + folders
    trees: dict[Path, dict[str, Stored]] = {}  # tree of the study -> folder of a run in it -> the run
    for folder in folders:
        for tree in trees_of(folder):
            runs = trees.setdefault(_beside(study, tree, folder), {})
            for stored in find_stored(tree):
                place = stored.folder.relative_to(tree).as_posix()
                if place == '.' and len(folders) > 1:
                    place = folder.name
                if stored.error:
                    raise RecordError(f'{stored.folder} cannot be kept: {stored.error}')
                if place in runs and runs[place][1:] != stored[1:]:
                    raise RecordError(
                        f'{runs[place].folder} and {stored.folder} are different runs, and both would be '
                        f'{place} of {study}: rename one of the folders'
                    )
                runs[place] = stored
    make_folder(study.parent)
    for tree, runs in trees.items():
        rows = [
            {'folder': place, 'run': stored.run, 'metrics': _tables(stored.metrics)}
            for place, stored in sorted(runs.items(), key=lambda item: _natural(Path(item[0])))
        ]
        lines = [json.dumps(row, separators=(',', ':')) + '\n' for row in rows]
        write_text(packed(tree), ''.join(lines))
        back = {s.folder.relative_to(tree).as_posix(): s[1:] for s in read_pack(packed(tree))}
        if back != {place: stored[1:] for place, stored in runs.items()}:
            raise RecordError(f'{packed(tree)} does not read back as it was written; nothing was removed')
        for place in runs:
            _remove(tree / place, tree, RUN, METRICS)
    written = [packed(tree) for tree in trees]
    words = [readme_of(folder) for folder in folders if readme_of(folder).exists()]
    if words:
        text = words[-1].read_text(encoding='utf-8')
        for folder in folders:
            text = text.replace(f'compare.py {folder.as_posix()}', f'compare.py {study.as_posix()}')
        written.append(study.with_name(f'{study.name}.md'))
        write_text(written[-1], text)
        if words[-1] == study / README:
            _remove(study, study, README)
    return written


def _beside(folder: Path, tree: Path, of: Path) -> Path:
    """What `tree`, one of the trees of the study `of`, is to the study `folder`."""
    return folder.with_name(folder.name + tree.name.removeprefix(of.name))


def _tables(metrics: list[dict]) -> list[dict]:
    """Records as tables: neighbours with the same keys share one."""
    tables = []
    for record in metrics:
        if not tables or tables[-1]['keys'] != list(record):
            tables.append({'keys': list(record), 'rows': []})
        tables[-1]['rows'].append(list(record.values()))
    return tables


def _remove(folder: Path, tree: Path, *names: str):
    """Delete these files of a folder in a tree, and every folder up to the tree's own that is then empty."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for place in (folder, *folder.parents):
        if place.is_dir() and place.is_relative_to(tree) and not any(place.iterdir()):
            place.rmdir()


def unpack(study: Path, folder: Path):
    """Make the folders that a kept study stands for, as `folder` and beside it; what is there stays."""
    study = unpacked(study)
    for tree in trees_of(study):
        for stored in find_stored(tree):
            place = _beside(folder, tree, study) / stored.folder.relative_to(tree)
            if stored.error:
                raise RecordError(f'{stored.folder}: {stored.error}')
            if not (place / RUN).exists():
                make_folder(place)
                write_text(place / METRICS, ''.join(json.dumps(record) + '\n' for record in stored.metrics))
                write_text(place / RUN, json.dumps(stored.run, indent=1) + '\n')
    if readme_of(study).exists() and not (folder / README).exists():
        write_text(folder / README, readme_of(study).read_text(encoding='utf-8'))
