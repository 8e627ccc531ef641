"""What the README tells people to type is there and works as it says."""

import re
import shlex
from pathlib import Path

import pytest

import compare
from configurator import configure
from layers.plans import Head
from layers.registry import ATTENTIONS, Kind
from model import GPT, GPTConfig
from runs.knobs import Knobs, model_config
from runs.records import find_runs

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')
PAGES = {path: path.read_text(encoding='utf-8') for path in [*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')]}


def test_the_plan_that_the_readme_writes_is_a_plan(monkeypatch):
    code = re.search(r'```python\n(def skip_values.*?)\nATTENTIONS = ', README, re.DOTALL).group(1)
    namespace = {'Head': Head}
    exec(code, namespace)
    monkeypatch.setitem(ATTENTIONS, 'skip_values', Kind(plan=namespace['skip_values']))
    config = GPTConfig(
        block_size=8, vocab_size=64, n_layer=3, n_head=4, n_embd=16, attention='skip_values(2)'
    )
    produced = [block.attn.heads_produced() for block in GPT(config, seed=0).transformer.h]
    assert produced == [(4, 4), (4, 2), (4, 2)]


@pytest.mark.parametrize('command', sorted(set(re.findall(r'python (\S+\.py)', ''.join(PAGES.values())))))
def test_programs_of_the_pages_exist(command):
    assert (ROOT / command).is_file()


@pytest.mark.parametrize('path', sorted((ROOT / 'config').rglob('*.py')), ids=lambda path: path.stem)
def test_every_config_builds_and_says_how_to_launch_it(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    knobs = configure(Knobs, [str(path)]).knobs
    if knobs.init_from == 'scratch':
        model_config(knobs, vocab_size=50304, vocab_used=50257)
    comment = '\n'.join(
        line for line in path.read_text(encoding='utf-8').splitlines() if line.startswith('#')
    )
    assert path.relative_to(ROOT).as_posix() in comment and 'train.py' in comment


@pytest.mark.parametrize('page', sorted(PAGES), ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\((?!http)([^)#]+)\)|src="(?!http)([^"]+)"', PAGES[page]):
        assert (page.parent / (target[0] or target[1])).exists(), target


def test_the_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 200 and len(README.encode()) <= 12_000


@pytest.mark.parametrize(
    'path', sorted((ROOT / 'charts').glob('*/table.md')), ids=lambda path: path.parent.name
)
def test_a_kept_table_is_that_of_the_kept_runs(path, monkeypatch):
    """Made again by the command that it names; the README has one of them between its markers."""
    monkeypatch.chdir(ROOT)
    kept, name = path.read_text(encoding='utf-8'), path.parent.name
    (command,) = re.findall(r'- made by `(python compare.py (.*))`', kept)
    k, _, paths = configure(compare.Knobs, shlex.split(command[1]), words='[NAME=]PATH …')
    chosen = k.arms.split(',') if k.arms else None
    c = compare.Comparison(find_runs(paths), k.baseline or None, chosen)
    assert compare.markdown(c, name, command[0]) == kept
    if k.insert:
        assert f'<!-- {name} -->\n{kept}<!-- /{name} -->' in (ROOT / k.insert).read_text(encoding='utf-8')
