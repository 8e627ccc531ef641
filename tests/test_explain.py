"""explain.py: the weights that it shows are those that the model used; page, picture and complaints."""

import json
import math
import re
from dataclasses import asdict

import pytest
import torch

import explain
from composition import Composed, ComposedConfig, Expert
from configurator import ConfigError
from data.tokenizer import Bytes
from model import GPT, GPTConfig
from runs import checkpoint
from runs.models import load_model

TEXT = 'Straße </script> & <b>"ё"</b>\nnot every word matters as much'


SIZE = {'block_size': 96, 'vocab_size': 257, 'n_layer': 3, 'n_head': 4, 'n_embd': 32}
EXPERTS = {'law': {'n_embd': 48}, 'code': {'n_layer': 2, 'attention': 'leap'}}


def gpt(**changes):
    model = GPT(GPTConfig(**{**SIZE, **changes}), seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.empty_like(p).normal_(0, 0.3, generator=generator))
    return model


def run_of(model, folder):
    folder.mkdir()
    state = {'model': model.state_dict(), 'model_args': asdict(model.config), 'tokenizer': Bytes().spec}
    checkpoint.save({**state, 'iter': 7, 'config': {}, 'data_fingerprint': None}, folder)
    return folder


def test_views_of_leap_are_the_weights_of_its_means():
    """A mean of vectors that are 1 for one token and 0 for all others is that token's weight."""
    model = gpt(attention='leap', windows='5-1-0')
    ids = list(range(20))
    views = explain.look(model, ids)
    assert [view.window for view in views] == [5, 1, 0]
    assert views[0].title == 'layer 0: keys and values, window 5'
    for view in views:
        logits = torch.tensor(view.heads)
        window = view.window or 20
        each = torch.zeros(4, 20, 20)  # reader, token
        for i in range(20):
            first = max(0, i - window + 1)
            each[:, i, first : i + 1] = logits[:, first : i + 1].softmax(-1)
        times = [each[:, i] * min(i + 1, window) for i in range(20)]  # a plain mean gives 1
        wanted = torch.stack(
            [torch.stack(times[l : l + window])[..., l].mean(0) for l in range(20)], dim=-1
        )  # (n_head, 20)
        torch.testing.assert_close(view.weights(), wanted)
    assert (views[1].weights() == 1).all()
    assert views[2].weights().std() > 0.1


def test_additive_attention_has_two_views_per_layer():
    titles = [view.title for view in explain.look(gpt(attention='additive'), [1, 2, 3])]
    assert titles[:2] == ['layer 0: queries, window 4', 'layer 0: keys, window 4'] and len(titles) == 6
    assert titles[4] == 'layer 2: queries, global'


@pytest.mark.parametrize('attention', ['vanilla', 'reflex(2-2)', 'lime'])
def test_views_of_other_attentions_are_what_the_last_token_pays(attention):
    model = gpt(attention=attention)
    ids = list(range(20))
    views = explain.look(model, ids)
    assert len(views) == 3 and not any(view.logits for view in views)
    for view in views:
        torch.testing.assert_close(view.weights().sum(1), torch.ones(4))
    t, hs = model.transformer, 8
    x = t.wte.weight[ids] + t.wpe.weight[:20]
    q, k, _ = t.h[0].attn.c_attn(t.h[0].ln_1(x)).split(32, dim=-1)
    for h in range(4):  # of the first layer, where all of these are plain self-attention
        rows = slice(h * hs, (h + 1) * hs)
        wanted = (q[-1, rows] @ k[:, rows].T / math.sqrt(hs)).softmax(-1)
        torch.testing.assert_close(views[0].weights()[h], wanted)
        wanted = (q[6, rows] @ k[:7, rows].T / math.sqrt(hs)).softmax(-1)  # of token 6, to those up to it
        torch.testing.assert_close(torch.tensor(views[0].readers[h][6]), wanted)


def test_long_texts_keep_the_last_reader_alone(monkeypatch):
    monkeypatch.setattr(explain, 'READERS', 19)
    model = gpt()
    assert explain.look(model, list(range(20)))[0].readers is None
    assert [len(row) for row in explain.look(model, list(range(19)))[0].readers[3]] == list(range(1, 20))


def test_the_last_token_pays_nothing_outside_its_window():
    views = explain.look(gpt(attention='vanilla(window=5)'), list(range(20)))
    for view in views:
        paid = torch.tensor(view.heads)
        assert (paid[:, :15] == 0).all() and (paid[:, 15:] > 0).all()


def composed(experts=EXPERTS, **changes) -> Composed:
    parts = {name: GPTConfig(**{**SIZE, **more}) for name, more in experts.items()}
    experts = tuple(Expert(name, '', config) for name, config in parts.items())
    model = Composed(ComposedConfig(**SIZE, experts=experts, **changes), seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.empty_like(p).normal_(0, 0.3, generator=generator))
    return model


def test_a_composed_model_shows_whom_tokens_ask_for_and_what_is_read_of_experts():
    """What experts look at themselves is no view."""
    model = composed(top_k=1, reads='1 2(heads=3, depth=1)')
    views = explain.look(model, list(range(20)))
    gates = next(view for view in views if view.names)
    assert gates.title == 'layer 1: which expert each token asks for' and gates.names == ('law', 'code')
    asked = torch.tensor(gates.heads)  # (experts, T)
    assert ((asked > 0).sum(0) == 1).all() and (asked > 0).any(1).all() and asked.max() <= 1
    titles = [view.title for view in views if 'what heads read' in view.title]
    assert titles == [
        'layer 1: what heads read of law after 2 of its blocks',
        'layer 1: what heads read of code after 1 of its blocks',
        'layer 2: what heads read of law after 1 of its blocks',
        'layer 2: what heads read of code after 1 of its blocks',
    ]
    assert len(views) == 3 + 1 + 4  # of the base's layers, of the gates, of the readings
    for view in views:
        if not view.names:
            torch.testing.assert_close(view.weights().sum(1), torch.ones(len(view.heads)))
    assert [len(view.heads) for view in views][-1] == 3


def test_looking_leaves_the_model_as_it_was():
    model = gpt(attention='leap vanilla*2')
    ids = torch.arange(20)[None]
    before = model(ids)[0]
    assert [view.logits for view in explain.look(model, ids[0].tolist())] == [True, False, False]
    assert torch.equal(model(ids)[0], before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_tokens_add_up_to_the_text():
    tokenizer = Bytes()
    added = explain.pieces(tokenizer, tokenizer.encode('ё=\ufffd.'))
    assert added == ['', 'ё', '=', '', '', '', '\ufffd.'] and ''.join(added) == 'ё=\ufffd.'


@pytest.mark.parametrize('attention', ['leap(auto)', 'additive(auto)', 'reflex(2-2)'])
def test_the_program_writes_a_page_and_a_picture(attention, tmp_path, capsys):
    run = run_of(gpt(attention=attention), tmp_path / 'run')
    assert explain.main([f'--out_dir={run}', f'--text={TEXT}', '--head=1']) == 0
    page = (run / 'explain.html').read_text(encoding='utf-8')
    assert not re.search(r'https?:|src=|@import', page), 'nothing is loaded from elsewhere'
    data = re.search(r'<script type="application/json" id="report">(.*?)</script>', page, re.DOTALL).group(1)
    report = json.loads(data)
    assert ''.join(report['tokens']).endswith(TEXT)
    assert {len(head) for view in report['views'] for head in view['heads']} == {len(report['tokens'])}
    assert f'{attention}, iteration 7' in report['about']
    assert (run / 'explain.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
    assert f'{len(report["views"])} views' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['--text='], 'text is empty'),
        (['--text=' + 'x' * 200], r'200 tokens.* 96|201 tokens.* 96'),
        (['--text=x', '--head=4'], 'head=4: from 0 to 3'),
        (['--text=FILE:nowhere.txt'], 'nowhere.txt'),
    ],
)
def test_what_cannot_be_shown_is_refused(flags, words, tmp_path):
    run = run_of(gpt(), tmp_path / 'run')
    with pytest.raises(ConfigError, match=words):
        explain.main([f'--out_dir={run}', *flags])


def test_the_page_in_a_browser(browser, tmp_path):
    """Any token can read, whatever the attention; heads say what their plan has them read."""
    run = run_of(gpt(attention='reflex', head_split='2-2'), tmp_path / 'run')
    assert explain.main([f'--out_dir={run}', '--text=one two']) == 0
    page = browser.new_page()
    problems = []
    page.on('pageerror', lambda error: problems.append(str(error)))
    page.goto((run / 'explain.html').as_uri())
    (model, _), T = load_model(run), 8  # the begin of the text, and seven bytes
    view = explain.look(model, [256, *b'one two'])[2]
    titles_of = 'all => all.map(s => s.title.split(": ")[1])'
    shown = [float(title) for title in page.locator('#text span').evaluate_all(titles_of)]
    assert shown == pytest.approx(torch.tensor(view.heads).mean(0).tolist(), rel=1e-2)
    assert 'how many layers before this one' in page.locator('#plan').inner_text()
    options = page.locator('#head option').all_text_contents()
    assert options == [
        'mean of all',
        '0: own layer',
        '1: own layer',
        '2: 1 layer before',
        '3: 1 layer before',
    ]
    page.select_option('#head', '2')
    page.locator('#text span').nth(3).click()
    titles = page.locator('#text span').evaluate_all(titles_of)
    assert titles[4:] == ['not read'] * (T - 4)
    assert [float(t) for t in titles[:4]] == pytest.approx(view.readers[2][3], rel=1e-2)
    page.locator('#all').click()
    assert 'times what a plain mean would give it' in page.locator('#scale').inner_text()
    page.select_option('#view', '0')
    assert page.locator('#head').input_value() == '2', 'the head stays when the view changes'
    # of a long text only the last token reads, and the page says so
    assert explain.main([f'--out_dir={run}', '--text=one two']) == 0
    text = (run / 'explain.html').read_text(encoding='utf-8')
    short = re.sub(r'"readers": \[.*?\]\]\]', '"readers": null', text)
    (run / 'explain.html').write_text(short, encoding='utf-8')
    page.goto((run / 'explain.html').as_uri())
    assert not page.locator('#all').is_visible()
    assert 'of a text this long' in page.locator('#guide').inner_text()
    assert problems == []
    page.close()


def test_the_page_of_a_composed_model_in_a_browser(browser, tmp_path):
    """It opens on whom tokens ask for; narrow pages and pictures show all of it."""
    names = [f'an-expert-of-a-long-name-{i}' for i in range(4)]
    views = explain.look(composed({name: {} for name in names}, top_k=1), list(range(16)))
    (tmp_path / 'explain.html').write_text(explain.page(['a'] * 16, views, 'a run'), encoding='utf-8')
    page = browser.new_page(viewport={'width': 400, 'height': 600})
    problems = []
    page.on('pageerror', lambda error: problems.append(str(error)))
    page.goto((tmp_path / 'explain.html').as_uri())
    (gates,) = (view for view in views if view.names)
    assert page.locator('#view option:checked').inner_text() == gates.title
    assert page.locator('#row').inner_text() == 'expert'
    assert page.locator('#scale span').all_inner_texts() == names
    colours = page.locator('#text span').evaluate_all('all => all.map(s => s.style.backgroundColor)')
    best = torch.tensor(gates.heads).argmax(0).tolist()
    hues = [colour.split('(')[1].split()[0] for colour in colours]
    assert all((hues[i] == hues[j]) == (best[i] == best[j]) for i in range(16) for j in range(16))
    assert page.evaluate('document.documentElement.scrollWidth') <= 400
    page.select_option('#head', '1')
    assert page.locator('#scale span').all_inner_texts() == names[1:2]
    page.select_option('#view', '0')
    assert page.locator('#row').inner_text() == 'head'
    assert problems == []
    page.close()
    _, _, lines = explain.shades_of(gates, -1)
    assert len(lines) > 1 and all(name in ' '.join(lines) for name in names)
    assert max(map(len, lines)) <= explain.TITLE
