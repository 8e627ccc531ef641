"""Where the parts of a data set lie: documents as vectors of tf-idf, and a centre for each part.

data/cluster.py finds them; whoever mixes models by how near a text is to their parts reads them (cBTM;
Gururangan et al., 2023, arXiv:2303.14177). A document is the tf-idf of its words, reduced by a truncated SVD
(Deerwester et al., 1990) and scaled to length 1. Needs scikit-learn (requirements-extras.txt).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.files import CorpusError

FILE = 'centres.npz'
WORDS = 20_000  # the most frequent ones that count
AXES = 100  # of the vectors
WORD = r'(?u)[^\W\d_][\w-]+'  # what a word is: at least two characters, the first a letter
ROUNDS = 20  # of balanced k-means at most

Floats = NDArray[np.float32]


def sklearn_module(name: str) -> Any:
    """A module of scikit-learn; CorpusError where it is not installed."""
    from importlib import import_module

    try:
        return import_module(f'sklearn.{name}')
    except ImportError as error:
        raise CorpusError(
            'clusters are found with scikit-learn: pip install -r requirements-extras.txt'
        ) from error


@dataclass
class Centres:
    """A centre for each part, and how a text becomes a vector."""

    names: list[str]  # of the parts
    points: Floats  # (parts, AXES or fewer)
    words: list[str]
    idf: Floats  # (words,)
    axes: Floats  # (AXES or fewer, words)

    def distances(self, texts: Iterable[str]) -> Floats:
        """Squared distances of texts to the centres, (texts, parts)."""
        return squared_distances(vectors(self.tf_idf(texts), self.axes), self.points)

    def tf_idf(self, texts: Iterable[str]) -> Any:
        """Sparse (texts, words)."""
        vectorizer = make_vectorizer(vocabulary=self.words)
        vectorizer.idf_ = self.idf
        return vectorizer.transform(texts)

    def save(self, path: Path) -> None:
        names, words = np.array(self.names), np.array(self.words)
        with path.open('wb') as file:
            np.savez(file, names=names, words=words, points=self.points, idf=self.idf, axes=self.axes)

    @classmethod
    def load(cls, path: Path) -> Centres:
        try:
            with np.load(path) as file:
                found = {name: file[name] for name in ('points', 'idf', 'axes')}
                return cls(names=file['names'].tolist(), words=file['words'].tolist(), **found)
        except (OSError, ValueError, KeyError) as error:
            raise CorpusError(f'{path} cannot be read ({error}): run data/cluster.py again') from error


def make_vectorizer(**options: Any) -> Any:
    text = sklearn_module('feature_extraction.text')
    return text.TfidfVectorizer(token_pattern=WORD, sublinear_tf=True, dtype=np.float32, **options)


def fit_vectors(texts: Iterable[str], seed: int) -> tuple[list[str], Floats, Floats, Any]:
    """Of texts: the words, the idf of each, the axes of the SVD, and their tf-idf, sparse (texts, words)."""
    vectorizer = make_vectorizer(max_features=WORDS, min_df=2, max_df=0.5)
    try:
        table = vectorizer.fit_transform(texts)
    except ValueError as error:  # no word is in two documents
        raise CorpusError(f'the documents have no words in common ({error}): give more of them') from error
    words = vectorizer.get_feature_names_out().tolist()
    size = min(AXES, *(n - 1 for n in table.shape))
    if size < 1:
        raise CorpusError(f'{table.shape[0]} documents with {len(words)} words in common: too few for parts')
    svd = sklearn_module('decomposition').TruncatedSVD(size, random_state=seed)
    svd.fit(table)
    return words, vectorizer.idf_.astype(np.float32), svd.components_.astype(np.float32), table


def vectors(table: Any, axes: Floats) -> Floats:
    """Sparse tf-idf (texts, words) -> vectors of length 1, (texts, axes); zeros for a text without words."""
    found: Floats = np.asarray(table @ axes.T, np.float32)
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    return found


def squared_distances(points: Floats, centres: Floats) -> Floats:
    """(n, d) and (k, d) -> (n, k)"""
    found: Floats = (points**2).sum(1)[:, None] + (centres**2).sum(1)[None] - 2 * points @ centres.T
    return found


def balanced_k_means(points: Floats, sizes: NDArray[np.int64], k: int, seed: int) -> NDArray[np.int64]:
    """The part of each of n points (n, d), so that parts have about the same sum of sizes (n,).

    k-means, and in each of its rounds the points are given away by how much they have to lose, each to the
    nearest centre that has room.
    """
    start = sklearn_module('cluster').KMeans(k, n_init=10, random_state=seed).fit(points)
    centres: Floats = start.cluster_centers_.astype(np.float32)
    room = -(-int(sizes.sum()) // k) + int(sizes.mean())
    part = np.full(len(points), -1, np.int64)
    for _ in range(ROUNDS):
        before, part = part, give_away(squared_distances(points, centres), sizes, room)
        if (part == before).all():
            break
        centres = centres_of(points, part, k)
    return part


def give_away(distances: Floats, sizes: NDArray[np.int64], room: int) -> NDArray[np.int64]:
    """The part of each point, for distances (n, k) and sizes (n,); room: the sizes that a part takes."""
    order = np.argsort(distances, axis=1)  # parts, the nearest first
    nearest = np.sort(distances, axis=1)
    to_lose = nearest[:, 1] - nearest[:, 0] if nearest.shape[1] > 1 else nearest[:, 0]
    part, left = np.empty(len(distances), np.int64), [room] * distances.shape[1]
    for i in np.argsort(-to_lose, kind='stable').tolist():
        free = [p for p in order[i].tolist() if left[p] >= sizes[i]]
        part[i] = free[0] if free else int(np.argmax(left))  # one that is larger than what is left anywhere
        left[part[i]] -= int(sizes[i])
    return part


def centres_of(points: Floats, part: NDArray[np.int64], k: int) -> Floats:
    """The mean of the points (n, d) of each part, (k, d)."""
    sums: Floats = np.zeros((k, points.shape[1]), np.float32)
    np.add.at(sums, part, points)
    sums /= np.maximum(np.bincount(part, minlength=k), 1)[:, None]
    return sums
