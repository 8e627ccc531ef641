"""studies/lead_study.py: leads of several lengths, against numbers worked out by hand."""

import pytest

import studies.lead_study as lead
from test_compare import make_run


@pytest.fixture
def studies(tmp_path):
    """Of 100, 200 and 400 steps of 32 tokens: vanilla falls by 0.4 per doubling, and `arm` leads by 0.1, 0.2,
    0.2; at 400 there is one seed."""
    folders = []
    for steps, base, ahead in ((100, 4.0, 0.1), (200, 3.6, 0.2), (400, 3.2, 0.2)):
        folder = tmp_path / f'of-{steps}'
        for seed in range(1 if steps == 400 else 2):
            for name, loss in (('vanilla', base + seed), ('arm', base + seed - ahead)):
                knobs = {'attention': name, 'max_iters': steps, 'last': steps}
                # make_run's losses end where its 100 steps do
                loss += (steps - 100) / 50
                make_run(folder / name / f'seed{seed}', loss, seed, **knobs)
        folders.append(str(folder))
    return folders


def rows_of(studies):
    return [lead.row_of(path, 'arm', 'vanilla') for path in studies]


def test_a_row_is_what_the_ends_of_the_runs_say(studies):
    rows = rows_of(studies)
    assert [row.tokens for row in rows] == [3200, 6400, 12800]
    assert [row.base_loss for row in rows] == pytest.approx([4.5, 4.1, 3.2])
    assert [row.difference.mean for row in rows] == pytest.approx([-0.1, -0.2, -0.2])
    assert lead.row_of(studies[0], 'vanilla', 'arm').difference.mean == pytest.approx(0.1)
    assert lead.row_of(studies[0], 'nobody', 'vanilla') is None


@pytest.mark.parametrize(
    ('loss', 'tokens'),
    [
        (4.0, (100, False)),
        (3.8, (141.42, False)),  # half of a doubling
        (3.6, (200, False)),
        (3.5, (282.84, False)),
        (3.2, (800, True)),  # beyond: by the last line
        (4.2, (70.71, True)),  # before: by the first
    ],
)
def test_tokens_are_read_off_lines_over_log_tokens(loss, tokens):
    found = lead.tokens_for(loss, [(100, 4.0), (200, 3.6), (400, 3.4)])
    assert found == pytest.approx(tokens, rel=1e-4)


def test_there_is_no_line_through_one_end_nor_up(studies):
    assert lead.tokens_for(3.0, [(100, 4.0)]) is None
    assert lead.tokens_for(3.0, [(100, 4.0), (200, 4.1)]) is None


def test_the_slope_is_per_doubling(studies):
    rows = rows_of(studies)
    assert lead.per_doubling(rows) == pytest.approx(-0.05)
    assert lead.per_doubling(rows[:2]) is None


def test_the_table_and_the_picture(studies, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lead, 'ROOT', tmp_path)
    page = tmp_path / 'page.md'
    page.write_text('<!-- lead arm -->\n<!-- /lead arm -->\n', encoding='utf-8')
    lead.main([*reversed(studies), '--arm=arm', f'--insert={page}'])
    told = capsys.readouterr().out
    assert told.strip() in page.read_text(encoding='utf-8')
    cells = [line.split(' | ') for line in told.splitlines() if line.startswith('| of-')]
    assert [row[0] for row in cells] == ['| of-100', '| of-200', '| of-400']
    assert cells[0][6] == '−0.1000 [−0.1000, −0.1000]' and cells[2][6] == '−0.2000'
    assert cells[0][8].startswith('1.19 times') and cells[2][8].startswith('≈ 1.17 times')
    assert '−0.0500 nats per doubling' in told
    assert (tmp_path / 'charts/leads/arm.png').stat().st_size > 1000
