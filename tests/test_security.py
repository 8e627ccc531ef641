"""Files from elsewhere run no code: the source has no way to let them."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOADERS = {'pickle', '_pickle', 'cPickle', 'cloudpickle', 'dill', 'joblib', 'marshal', 'shelve', 'yaml'}


def sources():
    try:
        git = ['git', '-C', ROOT, 'ls-files', '*.py']
        found = subprocess.run(
            git, capture_output=True, text=True, check=True, encoding='utf-8'
        ).stdout.split('\n')
        return [ROOT / name for name in found if name and (ROOT / name).exists()]
    except (OSError, subprocess.CalledProcessError):  # a copy without git
        return [p for p in ROOT.rglob('*.py') if not any(part.startswith('.') for part in p.parts)]


def faults(text: str) -> list[str]:
    """What in a Python source would run code from a file, or might."""
    found = []
    for node in ast.walk(ast.parse(text)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or '']
        found += [f'imports {m}' for m in modules if m.split('.')[0] in LOADERS]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if (
            name.split('.')[-1] == '__import__'
            and node.args
            and ast.unparse(node.args[0]).strip('\'"') in LOADERS
        ):
            found.append(f'imports {ast.unparse(node.args[0])}')
        if name == 'torch.load' and options.get('weights_only') != 'True':
            found.append('torch.load without weights_only=True')
        for option, safe in {
            'weights_only': 'True',
            'trust_remote_code': 'False',
            'allow_pickle': 'False',
        }.items():
            if options.get(option, safe) != safe:
                found.append(f'{option}={options[option]}')
        if name in ('eval', 'exec', 'os.system') or options.get('shell', 'False') != 'False':
            found.append(f'{name} of text')
    return found


ALLOWED = {('configurator.py', 'exec of text')}  # a config file is a program, and docs/security.md says so


def test_no_source_lets_a_file_run_code():
    paths = sources()
    assert {'train.py', 'checkpoint.py', 'model.py'} <= {path.name for path in paths}
    found = {
        (path.relative_to(ROOT).as_posix(), fault)
        for path in paths
        for fault in faults(path.read_text(encoding='utf-8'))
    }
    own_text = {
        (name, fault) for name, fault in found if name.startswith('tests/') and fault == 'exec of text'
    }
    assert found - own_text == ALLOWED  # a test may run the examples of the project's own documentation


@pytest.mark.parametrize(
    'text',
    [
        'import pickle',
        'from pickle import loads',
        'import torch; torch.load(f)',
        'torch.load(f, weights_only=False)',
        'torch.load(f, weights_only=flag)',
        'np.load(f, allow_pickle=True)',
        'AutoModel.from_pretrained(name, trust_remote_code=True)',
        'eval(text)',
        "subprocess.run('ls', shell=True)",
        "__import__('dill')",
    ],
)
def test_the_scan_finds(text):
    assert faults(text)


def test_the_scan_passes_what_is_safe():
    safe = (
        "'''import pickle'''\nmodel.eval()\ntorch.load(f, map_location='cpu', weights_only=True)\nnp.load(f)"
    )
    assert not faults(safe)
