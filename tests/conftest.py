"""Tests import the flat modules of the repository root; text in ../shared is used where it is there."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: the tests of Ctrl-C need it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault('OMP_NUM_THREADS', '1')  # tiny models: a second thread only slows them


# `pytest -m fast`, a minute: modules whose tests start no process and compile nothing
FAST = (
    *('arms', 'configurator', 'declared', 'draw_plan', 'gated_delta', 'data_reader', 'peers', 'pretrained'),
    *('readme', 'records', 'spec', 'step', 'tokendata', 'tokenizer'),
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.removeprefix('test_') in FAST:
            item.add_marker('fast')


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


@pytest.fixture(scope='session')
def browser():
    """A headless Chromium; the test skips without one."""
    sync_api = pytest.importorskip('playwright.sync_api', reason='needs playwright')
    names = ('chromium', 'chromium-browser', 'chromium-headless-shell', 'google-chrome', 'chrome')
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip('needs a Chromium: none of ' + ', '.join(names) + ' is here')
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield browser
        browser.close()


def random_gpt(config, seed=0, std=0.2):
    """A GPT, or what else the config is of, whose attention is far from uniform; norms, biases and shares
    are not at their start either."""
    import torch

    from runs.models import MODELS

    model = next(m for m in MODELS.values() if m.config_class is type(config))(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.empty_like(p).normal_(0.0, std, generator=generator))
    return model.eval()


def small_specs() -> list[str]:
    """Every attention of the registry, with options for models of 3 or 4 layers of 4 heads."""
    from layers.registry import ATTENTIONS

    options = {'reflex': '2-2', 'layer0': '4/2-2', 'layer0_residual': '4/2-2'}
    options |= dict.fromkeys(['shared_above', 'fused_lite', 'midpoint'], 'layer=0')
    return [f'{name}({options[name]})' if name in options else name for name in ATTENTIONS]


CAPITALS = {'Франции': 'Париж', 'Японии': 'Токио', 'Китая': 'Пекин'}
INSTRUCTIONS = [
    {'question': f'Какая столица {country}?', 'answer': f'Столица {country} — {city}.'}
    for country, city in CAPITALS.items()
]


@pytest.fixture(scope='session')
def gpt2_folder(tmp_path_factory):
    """What `transformers` saves of a GPT-2 with random weights at ruGPT's proportions, and of its tokenizer:
    a byte-level BPE whose texts begin with <s> and end with </s>."""
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('safetensors')
    import tokenizers
    import torch

    folder = tmp_path_factory.mktemp('gpt2')
    bpe = tokenizers.ByteLevelBPETokenizer()
    texts = [text for row in INSTRUCTIONS for text in row.values()] + ['The quick brown fox jumps.'] * 5
    bpe.train_from_iterator(
        texts * 5, vocab_size=300, special_tokens=['<pad>', '<s>', '</s>'], show_progress=False
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token='<s>', eos_token='</s>', pad_token='<pad>'
    )
    tokenizer.save_pretrained(folder)
    sizes = {'n_positions': 64, 'n_embd': 96, 'n_layer': 24, 'n_head': 16}
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes
    )
    model = transformers.GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():  # far from the start, where every layer does next to nothing
            at = 1.0 if name.endswith(('ln_1.weight', 'ln_2.weight', 'ln_f.weight')) else 0.0
            p.normal_(at, 0.15, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope='session')
def tiktoken_cache(shared, tmp_path_factory):
    """A copy of tiktoken's files of the GPT-2 encoding: tiktoken deletes a cached file that it does not
    like."""
    folder = tmp_path_factory.mktemp('tiktoken') / 'cache'
    shutil.copytree(shared / 'tiktoken_cache', folder, copy_function=shutil.copyfile)
    return folder


@pytest.fixture
def gpt2(tiktoken_cache, monkeypatch):
    """GPT-2's encoding can be loaded without a network, here and in processes started from here."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tiktoken_cache))
