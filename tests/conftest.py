"""Tests import the flat modules of the repository root; text in ../shared is used where it is there."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault('OMP_NUM_THREADS', '1')  # tiny models: a second thread only slows them


@pytest.fixture(scope='session')
def root():
    return ROOT


@pytest.fixture(scope='session')
def shared():
    """The folder of sample text beside the checkout (or REFLEX_SHARED); the test skips without it."""
    folder = Path(os.environ.get('REFLEX_SHARED', ROOT.parent / 'shared'))
    if not (folder / 'data').is_dir():
        pytest.skip(f'needs sample text in {folder} (set REFLEX_SHARED)')
    return folder
