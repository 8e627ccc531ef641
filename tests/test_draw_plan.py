"""charts/draw_plan.py: the picture tells what the plan is, and a mistake is one line."""

import re
import subprocess
import sys

import pytest

from configurator import ConfigError


@pytest.fixture
def draw(root, monkeypatch, capsys):
    """draw(*arguments): the SVG."""
    monkeypatch.syspath_prepend(str(root / 'charts'))
    monkeypatch.chdir(root)
    import draw_plan

    def run(*arguments):
        assert draw_plan.main(list(arguments)) == 0
        return capsys.readouterr().out

    return run


def texts(svg: str) -> list[str]:
    return re.findall(r'<text[^>]*>([^<]*)</text>', svg)


def test_the_kept_pictures_are_those_of_their_configs(draw, root):
    for name in ('reflex_422', 'reflex_all'):
        assert draw(f'config/{name}.py') == (root / f'charts/{name}.svg').read_text(encoding='utf-8')


def test_a_head_with_key_and_value_of_two_layers_is_explained(draw):
    shown = texts(draw('config/plans/first_values_422.py'))
    assert 'layer0(8/4-2-2)' in shown and shown.count('5/0') == 2 and shown.count('5/4') == 2
    assert '5/2: the key of layer 5, the value of layer 2' in shown
    assert '5/2: the key of layer 5, the value of layer 2' not in texts(draw('config/reflex_422.py'))


def test_no_lag_has_the_colour_of_the_own_layer_and_the_legend_has_room(draw):
    svg = draw('config/plans/first_62.py', '--n_layer=12')
    legend = re.findall(r'<rect x="(\d+)" y="\d+" width="18" height="18" rx="6" fill="(#\w+)"', svg)
    assert len(legend) == 12 and [colour for _, colour in legend].count(legend[0][1]) == 1
    width = int(re.search(r'viewBox="0 0 (\d+)', svg)[1])
    assert int(legend[-1][0]) + 26 + 7 * len('11 before') <= width


@pytest.mark.parametrize(
    ('argument', 'words'),
    [('--model=x', "model='x'"), ('--attention=leap', 'no plan to draw'), ('--n_head=7', 'n_head=7')],
)
def test_what_cannot_be_drawn_is_one_line(draw, argument, words):
    with pytest.raises(ConfigError, match=words) as error:
        draw(argument)
    assert '\n' not in str(error.value)


def test_an_unknown_flag_is_one_line(root):
    command = [sys.executable, 'charts/draw_plan.py', '--n_hed=4']
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr == (
        "draw_plan.py: the command line sets 'n_hed', which is no knob; did you mean 'n_head'?\n"
    )
