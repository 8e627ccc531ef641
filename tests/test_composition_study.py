"""studies/composition_study.py: the ensemble against one token at a time, and the table from records."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'studies'))
import composition_study as study

from conftest import random_gpt
from data.tokenizer import Bytes
from model import GPTConfig

SHAPE = GPTConfig(block_size=100, vocab_size=64, n_layer=1, n_head=2, n_embd=16)
T = 3 * study.CHUNK + 4  # the last chunk is not whole


def distance(text: str, vowel: str) -> float:
    return 0.01 * text.count(vowel) + 0.001 * ord(vowel)  # no two are the same


class Vowels:
    """Centres of parts whose distance is a number that any text has at once."""

    names = ('far', 'a', 'e', 'i')  # of which 'far' has no expert

    def distances(self, texts):
        return np.array([[9.0, *(distance(text, v) for v in 'aei')] for text in texts], np.float32)


class Letters(Bytes):
    """Ids 0 to 63 are characters, so that texts differ in their letters."""

    def decode(self, ids):
        return ''.join('aei.'[i % 4] for i in ids)


def ensemble(top_k: int):
    # in another order than the centres
    experts = {name: random_gpt(replace(SHAPE), seed=i) for i, name in enumerate(('i', 'a', 'e'))}
    return study.Ensemble(experts, Vowels(), Letters(), top_k), experts


def text():
    idx = torch.randint(64, (3, T + 1), generator=torch.Generator().manual_seed(0))
    idx[2] = idx[2] // 4 * 4  # 'a' alone: it is as far from one centre as can be
    return idx[:, :-1], idx[:, 1:].clone()


@pytest.mark.parametrize('top_k', [0, 1, 2])
@torch.no_grad()
def test_the_ensemble_mixes_probabilities_by_distance(top_k):
    model, experts = ensemble(top_k)
    idx, targets = text()
    targets[0, 40] = -1  # does not count
    found, spread = [], []
    for row, wanted in zip(idx, targets, strict=True):
        logits = {name: expert(row[None])[0][0] for name, expert in experts.items()}  # (T, vocab_size)
        for t, target in enumerate(wanted.tolist()):
            so_far = row[: t // study.CHUNK * study.CHUNK].tolist()  # the chunks before the token's own
            letters = Letters().decode(so_far)
            weight = {name: np.exp(-distance(letters, name) / study.TEMPERATURE) for name in experts}
            if not so_far:
                weight = dict.fromkeys(experts, 1.0)
            elif top_k:
                kept = sorted(experts, key=lambda name: -weight[name])[:top_k]
                weight = {name: weight[name] if name in kept else 0.0 for name in experts}
            total = sum(weight.values())
            p = sum(weight[n] / total * logits[n][t].double().softmax(0)[target].item() for n in experts)
            spread.append(max(weight.values()) / total)
            if target >= 0:
                found.append(-np.log(p))
    none, loss = model(idx, targets)
    assert none is None and loss.item() == pytest.approx(np.mean(found), rel=1e-5)
    assert min(spread) == pytest.approx(1 / 3) and max(spread) > 0.4  # even at first, then not


@torch.no_grad()
def test_weights_of_the_ensemble_are_those_of_top_k_experts_after_an_even_first_chunk():
    idx = text()[0]
    for top_k in (1, 2):
        weights = ensemble(top_k)[0].weights(idx)
        assert weights.shape == (3, T, 3)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, T))
        assert (weights[:, : study.CHUNK] == weights.new_tensor(1 / 3)).all()
        assert ((weights[:, study.CHUNK :] > 0).sum(-1) == top_k).all()


# ---- the table


def write_records(root: Path, seeds: dict[str, list[int]], scale: str = 'small'):
    """Records of every arm for its seeds (else 0 and 1), whose losses follow from its place."""
    s = study.Study('source', scale)
    parts = [*s.experts, s.unseen]
    folders = [(s.folder, arm) for arm in study.ARMS] + [(s.expert, part) for part in parts]
    for n, (folder, name) in enumerate(folders):
        for seed in seeds.get(name, [0, 1]):
            loss = {part: 4 + n / 10 + p / 100 + seed for p, part in enumerate(parts)}
            loss[s.unseen] += 1 + seed * n / 10
            measured = {'loss': loss, 'training_flops': 2e12 * (n + 1), 'flops_per_token': 1e6 * (n + 1)}
            run = {
                'measured': {**measured, 'cpu_seconds_per_Mtoken': 20.0},
                'model': {
                    'cache_bytes_per_token': 1024 * (n + 1),
                    'params': 500_000,
                    'flops_per_token': 1,
                },
                'status': 'finished',
                'tokens_per_step': 2048,
                'config': {
                    'seed': seed,
                    'max_iters': 0,
                    'eval_iters': 4,
                    'batch_size': 16,
                    'block_size': 128,
                    'learning_rate': 0.01,
                },
                'device': {'name': 'a machine'},
                'versions': {'torch': '2.13.0'},
                'commit': '0123456789abcdef',
            }
            out = root / folder(name, seed)
            out.mkdir(parents=True)
            (out / 'run.json').write_text(json.dumps(run), encoding='utf-8')
            (out / 'metrics.jsonl').write_text('{"iter": 0, "val/loss": 4.0}\n', encoding='utf-8')
    return s


def test_the_table_has_means_and_paired_differences(tmp_path, monkeypatch):
    monkeypatch.setattr(study, 'ROOT', tmp_path)
    s = write_records(tmp_path, {})
    lines = study.table(s).splitlines()
    assert lines[3] == (
        '| dense, the same training FLOPs | 4.515 | – | 5.540 | – | 1.00 | 1.00 | 0.020 | 1,024 | 0.50M |'
    )
    # two seeds: 0.1 and 0.2 more on the part not seen, whose interval is 12.7 standard errors wide
    assert lines[4] == (
        '| dense, the same training FLOPs and parameters | 4.615 | +0.100 [+0.100, +0.100] | 5.690 '
        '| +0.150 [−0.485, +0.785] | 2.00 | 2.00 | 0.020 | 2,048 | 0.50M |'
    )
    assert len([line for line in lines if line.startswith('| –')]) == 9
    by_part = lines.index(next(line for line in lines if line.startswith('| loss by part')))
    assert lines[by_part].endswith('rust-lang-rfcs | swiftlang-swift-evolution | ethereum-EIPs |')
    assert lines[by_part + 2] == '| dense, the same training FLOPs | 4.500 | 4.510 | 4.520 | 4.530 | 5.540 |'
    own = [4 + n / 10 + p / 100 + 0.5 for p, n in enumerate(range(17, 21))] + [
        4 + 2.1 + 0.04 + 0.5 + 1 + 1.05
    ]
    assert lines[-3] == f'| each expert on its own part | {" | ".join(f"{x:.3f}" for x in own)} |'
    assert lines[-1] == 'Seeds 0, 1; commit 012345678; a machine, torch 2.13.0.'


def test_the_table_takes_the_seeds_that_are_done(tmp_path, monkeypatch):
    monkeypatch.setattr(study, 'ROOT', tmp_path)
    s = write_records(tmp_path, {'forgot': [1], 'dense': [0, 1, 2]})
    assert 'Seeds 1; commit' in study.table(s)
    assert '| dense, the same training FLOPs | 5.015 |' in study.table(s)
    other = write_records(tmp_path, {'wide': []}, 'cpu')
    assert other.arms.name == 'composition-source-cpu' and other.parts.name == 'composition-source-cpu-parts'
    wide = '| dense, the same training FLOPs and parameters |'
    assert wide in study.table(s) and wide not in study.table(other)  # an arm that was not run
    shutil.rmtree(tmp_path / other.folder('dense', 0).parent)
    with pytest.raises(SystemExit, match='no seed is done yet'):
        study.table(other)


def test_the_table_that_is_kept_is_that_of_the_kept_runs():
    """docs/composition.md, made again from results/."""
    text = (study.ROOT / 'docs' / 'composition.md').read_text(encoding='utf-8')
    if not (study.ROOT / 'out/experiments/composition-source').exists():  # which would come first
        assert study.table(study.Study('source')) in text


@pytest.mark.parametrize('scale', study.SCALES)
def test_the_wide_dense_model_has_the_parameters_of_the_composed_one(scale):
    from composition import Composed, ComposedConfig, Expert
    from model import GPT

    s = study.SCALES[scale]
    shape = {'block_size': s.block, 'n_layer': s.n_layer, 'n_head': s.n_head, 'vocab_size': 4096}
    config = GPTConfig(**shape, n_embd=s.width)
    experts = tuple(Expert(name, '', config) for name in 'abcd')
    with torch.device('meta'):
        wide = GPT(replace(config, n_embd=s.wide), seed=0).num_params()
        composed = Composed(ComposedConfig(**shape, n_embd=s.width, experts=experts), seed=0).num_params()
    assert wide == pytest.approx(composed, rel=0.05)
    assert s.rates.keys() >= s.tried.keys() and {s.n_embd(kind) for kind in s.steps} == {s.width}
