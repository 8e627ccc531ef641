"""What the README tells people to type is there and works as it says."""

import re
from pathlib import Path

import pytest

from configurator import configure
from layers import plans
from model import GPT, GPTConfig
from runs.knobs import Knobs, model_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')


def test_the_plan_that_the_readme_writes_is_a_plan(monkeypatch):
    code = re.search(r'```python\n(def skip_values.*?)\nPLANS = ', README, re.DOTALL).group(1)
    namespace = {'Head': plans.Head}
    exec(code, namespace)
    monkeypatch.setitem(plans.PLANS, 'skip_values', namespace['skip_values'])
    config = GPTConfig(block_size=8, vocab_size=64, n_layer=3, n_head=4, n_embd=16, attention='skip_values')
    produced = [block.attn.heads_produced() for block in GPT(config, seed=0).transformer.h]
    assert produced == [(4, 4), (4, 2), (4, 2)]


@pytest.mark.parametrize('command', sorted(set(re.findall(r'python (\S+\.py)', README))))
def test_programs_of_the_readme_exist(command):
    assert (ROOT / command).is_file()


@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('*.py')), ids=lambda path: path.stem)
def test_every_config_builds_and_says_how_to_launch_it(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    knobs = configure(Knobs, [str(path)]).knobs
    if knobs.init_from == 'scratch':
        model_config(knobs, vocab_size=50304, vocab_used=50257)
    comment = '\n'.join(
        line for line in path.read_text(encoding='utf-8').splitlines() if line.startswith('#')
    )
    assert f'config/{path.name}' in comment and 'train.py' in comment


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r'\]\((?!http)([^)#]+)\)|src="(?!http)([^"]+)"', README):
        assert (ROOT / (target[0] or target[1])).exists(), target
