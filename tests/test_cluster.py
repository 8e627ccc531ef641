"""data/cluster.py: parts are whole documents with one tokenizer, balanced, and their centres find them."""

import json
import random
from collections import Counter

import numpy as np
import pytest

from data.files import CorpusError
from test_data_scripts import run

pytest.importorskip('sklearn')

from data.centres import FILE, Centres, balanced_k_means, give_away
from data.cluster import documents
from data.tokendata import open_data

TOPICS = {
    'law': 'court judge appeal statute verdict contract clause liable plaintiff counsel',
    'sea': 'ship harbour sail anchor tide captain reef wave mast compass',
    'cook': 'flour butter oven simmer onion garlic recipe whisk dough pepper',
}


def text_of(topic: str, seed: int) -> str:
    words = random.Random(f'{topic} {seed}')
    return ' '.join(words.choices(TOPICS[topic].split(), k=30 + seed % 7)) + f' ({seed})'


@pytest.fixture(scope='module')
def dataset(root, tmp_path_factory):
    """A folder with rows.jsonl, 20 documents of each topic, and with data, made of them."""
    folder = tmp_path_factory.mktemp('cluster')
    for name, seeds in {'rows': range(20), 'val': (90, 91)}.items():
        rows = [{'text': text_of(t, seed), 'source': f'the {t}'} for seed in seeds for t in TOPICS]
        (folder / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    given = ['--files', folder / 'rows.jsonl', '--val_files', folder / 'val.jsonl', '--tokenizer', 'bytes']
    run(root, 'prepare.py', *given, '--out_dir', folder / 'data')
    return folder


def texts(folder, split) -> list[str]:
    docs = documents(open_data(folder), split)
    return [docs.text(i) for i in range(len(docs.ends))]


def topic_of(text: str) -> str:
    return next(topic for topic, words in TOPICS.items() if text.split()[0] in words.split())


def test_clusters_are_the_topics_and_hold_every_document(root, dataset, tmp_path):
    out = tmp_path / 'parts'
    told, _ = run(root, 'cluster.py', '--dataset', dataset / 'data', '--clusters', 3, '--out_dir', out)
    data, part = open_data(dataset / 'data'), open_data(out / '1')
    for split in ('train', 'val'):
        found = [texts(out / name, split) for name in '012']
        assert sorted(text for part in found for text in part) == sorted(texts(dataset / 'data', split))
        topics = [Counter(map(topic_of, part)).most_common(1)[0] for part in found]
        assert {topic for topic, _ in topics} == TOPICS.keys()
        of_own = sum(count for _, count in topics) / sum(map(len, found))
        assert of_own == 1 if split == 'val' else of_own > 0.9  # a part that is full gives some away
    assert part.tokenizer_spec == data.tokenizer_spec
    assert part.meta['source']['fingerprint'] == data.fingerprint and part.meta['source']['parts'] == ['1']
    report = (out / 'report.md').read_text(encoding='utf-8')
    assert report in told and any(word in report for word in TOPICS['sea'].split())
    centres = Centres.load(out / FILE)
    new = [text_of(topic, 500) for topic in TOPICS]
    for text, nearest in zip(new, centres.distances(new).argmin(1), strict=True):
        assert topic_of(texts(out / centres.names[nearest], 'val')[0]) == topic_of(text)


def test_parts_by_a_field_and_one_that_is_held_out(root, dataset, tmp_path):
    given = ['--dataset', dataset / 'data', '--by', 'source', '--files', dataset / 'rows.jsonl']
    given += [dataset / 'val.jsonl', '--out_dir', tmp_path / 'parts']
    run(root, 'cluster.py', *given, '--held_out', 'the-cook')
    for topic in TOPICS:
        assert {topic_of(text) for text in texts(tmp_path / 'parts' / f'the-{topic}', 'train')} == {topic}
    seen = texts(tmp_path / 'parts' / 'seen', 'train')
    assert len(seen) == 40 and {topic_of(text) for text in seen} == {'law', 'sea'}
    _, told = run(root, 'cluster.py', *given, '--held_out', 'sky', status=2)
    assert '--held_out sky: the parts are the-cook, the-law, the-sea' in told
    _, told = run(root, 'cluster.py', *given[:4], '--files', dataset / 'val.jsonl', *given[-2:], status=2)
    assert 'documents of train are not in the rows of --files' in told


def test_other_things_and_older_parts_stay(root, dataset, tmp_path):
    given = ['--dataset', dataset / 'data', '--out_dir', tmp_path]
    run(root, 'cluster.py', *given, '--clusters', 3)
    before = (tmp_path / '2' / 'meta.json').read_bytes()
    _, told = run(root, 'cluster.py', *given, '--clusters', 2, status=2)
    assert 'holds parts of another division (2)' in told
    assert (tmp_path / '2' / 'meta.json').read_bytes() == before
    (tmp_path / 'report.md').unlink()
    _, told = run(root, 'cluster.py', *given, '--clusters', 3, status=2)
    assert 'holds other things' in told


def test_parts_are_balanced_by_size():
    """Four fifths of the points lie together; no part gets more than its share and one document."""
    places = np.random.default_rng(0)
    points = np.concatenate([places.normal(0, 0.1, (80, 4)), places.normal(3, 0.1, (20, 4))])
    sizes = places.integers(10, 50, 100)
    part = balanced_k_means(points.astype(np.float32), sizes, 4, seed=0)
    sums = np.bincount(part, weights=sizes, minlength=4)
    assert sums.max() <= -(-sizes.sum() // 4) + sizes.mean() and sums.min() >= 0.5 * sizes.sum() / 4


def test_who_has_most_to_lose_chooses_first():
    distances = np.array([[0.0, 1.0], [0.0, 9.0], [0.0, 5.0]], np.float32)
    assert give_away(distances, np.array([1, 1, 1]), 2).tolist() == [1, 0, 0]
    assert give_away(distances, np.array([1, 9, 1]), 5).tolist() == [1, 0, 1]  # one that fits nowhere


def test_centres_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / FILE).write_bytes(b'no archive')
    with pytest.raises(CorpusError, match=r'run data/cluster\.py again'):
        Centres.load(tmp_path / FILE)
