"""runs/records.py, runs/files.py: what is read is checked, what is packed is the same, a write is whole."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import compare
from runs import files
from runs.files import FileError, FolderLock
from runs.records import RecordError, find_runs, pack, read_jsonl, read_pack, read_run, unlike, unpack
from test_compare import make_run

ROOT = Path(__file__).resolve().parent.parent


def everything(folder) -> dict:
    """{path: bytes} of all files below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.fixture
def study(tmp_path):
    """kept/s: two arms of two seeds, a sweep beside them, and words. Written as train.py writes."""
    for arm, loss in (('vanilla', 4.2), ('mine', 4.1)):
        for seed in (0, 10):
            make_run(tmp_path / f'kept/s/{arm}/seed{seed}', loss + seed / 100, seed, attention=arm)
        make_run(tmp_path / f'kept/s-lr/{arm}-lr0.001/seed1000', loss, 1000, attention=arm)
    for path in (tmp_path / 'kept').rglob('run.json'):
        path.write_text(json.dumps(json.loads(path.read_text()), indent=1) + '\n', encoding='utf-8')
    with open(tmp_path / 'kept/s/mine/seed10/metrics.jsonl', 'a', encoding='utf-8') as file:
        print(json.dumps({'iter': 100, 'event': 'spike', 'value': 0.1 + 0.2, 'usual': None}), file=file)
    words = 'python compare.py kept/s\npython compare.py kept/s-lr\n'
    (tmp_path / 'kept/s/README.md').write_text(words, encoding='utf-8')
    return tmp_path / 'kept/s'


# ---- packed studies


def test_a_study_packed_and_unpacked_is_the_same_byte_for_byte(study, tmp_path):
    before = everything(tmp_path / 'kept')
    table = compare.markdown(compare.Comparison(find_runs([str(study)])), 's', 'x')
    written = pack([study], study)
    assert [path.name for path in written] == ['s.jsonl', 's-lr.jsonl', 's.md']
    assert sorted(path.name for path in study.parent.iterdir()) == ['s-lr.jsonl', 's.jsonl', 's.md']
    rows = [json.loads(line) for line in (tmp_path / 'kept/s.jsonl').read_text(encoding='utf-8').splitlines()]
    assert [row['folder'] for row in rows] == ['mine/seed0', 'mine/seed10', 'vanilla/seed0', 'vanilla/seed10']
    # by the name of the folder, of the file, and of a folder in it
    for name in ('s', 's.jsonl'):
        runs = find_runs([str(tmp_path / 'kept' / name)])
        assert compare.markdown(compare.Comparison(runs), 's', 'x') == table
    (one,) = find_runs([str(study / 'mine/seed10')])
    assert (one.arm, one.seed, one.folder) == ('mine', 10, study / 'mine/seed10')
    assert one.val_loss == pytest.approx(4.2)
    assert {r.arm for r in find_runs([str(study / 'mine')])} == {'mine'}
    unpack(study, tmp_path / 'again/s')
    assert everything(tmp_path / 'again') == before


def test_more_runs_join_a_packed_study(study, tmp_path):
    pack([study], study)
    lines = (tmp_path / 'kept/s.jsonl').read_text(encoding='utf-8').splitlines()
    more = make_run(tmp_path / 'out/more/mine/seed2', 4.0, 2, attention='mine')
    # beside it, in a folder of its name: one study
    shutil.copytree(more, study / 'mine/seed2')
    assert sorted(r.seed for r in find_runs([str(study)]) if r.arm == 'mine') == [0, 2, 10]
    shutil.rmtree(study)
    # from elsewhere
    pack([tmp_path / 'out/more'], study)
    after = (tmp_path / 'kept/s.jsonl').read_text(encoding='utf-8').splitlines()
    assert [line for line in after if line in lines] == lines and len(after) == 5
    assert more.exists(), 'only folders of the very name of the study go'
    # and the same once more changes nothing
    pack([tmp_path / 'out/more', study], study)
    assert (tmp_path / 'kept/s.jsonl').read_text(encoding='utf-8').splitlines() == after


def test_two_runs_of_one_place_are_not_mixed_up(study, tmp_path):
    pack([study], study)
    make_run(study / 'mine/seed10', 3.0, 10, attention='mine')
    with pytest.raises(RecordError, match='mine/seed10 holds another run than the packed one'):
        find_runs([str(study)])
    other = tmp_path / 'out/other'
    shutil.copytree(study, other)
    shutil.rmtree(study)
    before = everything(tmp_path / 'kept')
    with pytest.raises(RecordError, match='are different runs, and both would be mine/seed10 of'):
        pack([other], study)
    assert everything(tmp_path / 'kept') == before


def test_what_cannot_be_read_is_not_packed(study, tmp_path):
    (study / 'mine/seed0/run.json').write_text('{', encoding='utf-8')
    before = everything(tmp_path / 'kept')
    with pytest.raises(RecordError, match='mine/seed0 cannot be kept: its files cannot be read'):
        pack([study], study)
    assert everything(tmp_path / 'kept') == before


def test_a_damaged_line_of_a_packed_study_takes_no_other_down(study, tmp_path):
    pack([study], study)
    path = tmp_path / 'kept/s.jsonl'
    lines = path.read_text(encoding='utf-8').splitlines()
    lines[1] = lines[1][:-5]
    lines[2] = lines[2].replace('"tokens_per_step":32', '"tokens_per_step":0')
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    runs = {str(r.folder.relative_to(study)): r.state for r in find_runs([str(study)])}
    assert runs['mine/seed0'] == runs['vanilla/seed10'] == 'finished'
    assert runs['line2'].startswith(f'line 2 of {path} cannot be read')
    assert 'tokens_per_step is 0, not a whole number from 1' in runs['vanilla/seed0']


def test_every_kept_study_is_read_in_full():
    finished = 0
    for path in sorted((ROOT / 'results').glob('*.jsonl')):
        runs = find_runs([str(path)])
        assert all(run.finished for run in runs), path
        assert len(runs) == len(path.read_text(encoding='utf-8').splitlines())
        # those that were made of others' weights have logged no step
        stepped = {Path(s.folder) for s in read_pack(path) if any('loss' in record for record in s.metrics)}
        assert stepped <= {run.folder for run in runs}
        assert all(run.tokens_per_s > 0 for run in runs if run.folder in stepped), path
        finished += len(stepped)
    assert finished >= 271


# ---- what files may hold


@pytest.mark.parametrize(
    'line',
    [
        *(
            '5',
            'null',
            '{}',
            '[]',
            '"x"',
            '{"iter": -1}',
            '{"iter": true}',
            '{"iter": 1.5}',
            '{"iter": null}',
        ),
        *('{"iter": 1, "val/loss": "4"}', '{"iter": 1, "tokens_per_s": []}', '{"iter": 1, "loss": 1e999}'),
        *('[' * 10**5, '1' * 5000, '{"iter": 1e400}'),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    path = tmp_path / 'metrics.jsonl'
    path.write_text(f'{{"iter": 1}}\n{line}\n{{"iter": 2}}\n', encoding='utf-8')
    with pytest.raises(ValueError, match=r'metrics\.jsonl, line 2 is .*: delete the line') as error:
        read_jsonl(path)
    assert '\n' not in str(error.value) and len(str(error.value)) < 300


def test_numbers_that_json_has_not_are_nothing(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"iter": 1, "loss": NaN, "val/loss": -Infinity}\n', encoding='utf-8')
    assert read_jsonl(path) == [{'iter': 1, 'loss': None, 'val/loss': None}]


def append(folder, *rows):
    with open(folder / 'metrics.jsonl', 'a', encoding='utf-8') as file:
        for row in rows:
            print(json.dumps(row), file=file)


def test_two_different_records_of_one_iteration_do_not_count(tmp_path):
    folder = make_run(tmp_path / 'a', 4.0)
    append(folder, {'iter': 100, 'train/loss': 3.9, 'val/loss': 4.0})
    assert read_run(folder, 'a').finished, 'twice the same is one'
    append(folder, {'iter': 100, 'train/loss': 3.9, 'val/loss': 3.5})
    state = read_run(folder, 'a').state
    assert state == 'metrics.jsonl has two different records of iteration 100: more than one run wrote it'
    other = make_run(tmp_path / 'b', 4.0)
    append(other, {'iter': 50, 'loss': 1.0})
    assert 'two different records of iteration 50' in read_run(other, 'b').state


def test_a_curve_begins_where_the_evaluation_changed(tmp_path):
    folder = make_run(tmp_path / 'a', 4.0, last=50, max_iters=100)
    change = {'iter': 50, 'event': 'eval_changed', 'eval_iters': [1, 2]}
    append(folder, change, {'iter': 50, 'train/loss': 4.5, 'val/loss': 4.6})
    append(folder, {'iter': 100, 'train/loss': 4.0, 'val/loss': 4.1})
    run = read_run(folder, 'a')
    assert run.finished and run.evaluated_from == 50
    assert [(e['iter'], e['val/loss']) for e in run.evals] == [(50, 4.6), (100, 4.1)]
    # a run that was over then has no loss on the windows that run.json names
    over = make_run(tmp_path / 'b', 4.0)
    append(over, {**change, 'iter': 100})
    state = read_run(over, 'b').state
    assert state == (
        'ended without an evaluation at its last step, 100; its evaluation settings changed at step 100'
    )


def test_speeds_of_nothing_are_no_speeds(tmp_path):
    folder = make_run(tmp_path / 'a', 4.0, last=0, max_iters=0)
    assert read_run(folder, 'a').tokens_per_s is None
    append(folder, {'iter': 5, 'tokens_per_s': 0}, {'iter': 6, 'tokens_per_s': None})
    assert read_run(folder, 'a').tokens_per_s is None
    append(folder, {'iter': 7, 'tokens_per_s': 300.0}, {'iter': 8, 'tokens_per_s': 0.0})
    assert read_run(folder, 'a').tokens_per_s == 300.0


def test_paths_that_hold_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / 'lr=0.1', 4.0)
    (run,) = find_runs(['lr=0.1'])
    assert run.arm == 'lr=0.1'
    (run,) = find_runs(['x=lr=0.1'])
    assert run.arm == 'x'
    with pytest.raises(RecordError, match='give a name before the "="'):
        find_runs(['=lr=0.1'])


def test_files_of_a_run_stand_for_its_folder(tmp_path):
    folder = make_run(tmp_path / 'a', 4.0)
    assert [
        r.folder
        for r in find_runs(
            [
                str(folder / 'run.json'),
            ]
        )
    ] == [folder]
    assert [r.folder for r in find_runs([str(folder / 'metrics.jsonl')])] == [folder]


def test_knobs_that_older_runs_do_not_name(tmp_path):
    now = {'optimizer': 'muon', 'muon_qkv': 'apart', 'seed': 1}
    assert unlike(now, {'optimizer': 'muon', 'seed': 2}) == [('muon_qkv', 'apart', 'whole')]
    assert unlike({'optimizer': 'adamw', 'muon_qkv': 'apart'}, {'optimizer': 'adamw'}) == []


def test_records_are_read_without_torch():
    code = 'import sys, compare, runs.records; print(*{"torch", "matplotlib", "scipy"} & set(sys.modules))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == ''


# ---- files


@pytest.mark.parametrize('mode', ['w', 'wb'])
def test_a_file_is_replaced_when_all_of_it_is_there(tmp_path, mode):
    path = tmp_path / 'a'
    path.write_text('old', encoding='utf-8')
    new = 'neu ü' if mode == 'w' else 'neu ü'.encode()
    with files.replacing(path, mode) as file:
        file.write(new)
        file.flush()
        assert path.read_text(encoding='utf-8') == 'old'
    assert path.read_text(encoding='utf-8') == 'neu ü'
    with pytest.raises(KeyboardInterrupt), files.replacing(path, mode) as file:
        file.write(new)
        raise KeyboardInterrupt
    assert path.read_text(encoding='utf-8') == 'neu ü' and os.listdir(tmp_path) == ['a']


def test_a_write_that_fails_says_why(tmp_path):
    with pytest.raises(FileError, match=r'gone/a could not be written: its folder is gone') as error:
        files.write_text(tmp_path / 'gone/a', 'text')
    assert '\n' not in str(error.value)


def test_a_second_name_is_the_same_file_or_a_copy(tmp_path, monkeypatch):
    (tmp_path / 'a').write_text('a', encoding='utf-8')
    (tmp_path / 'b').write_text('b', encoding='utf-8')
    files.link(tmp_path / 'a', tmp_path / 'b')
    assert (tmp_path / 'a').samefile(tmp_path / 'b')

    def no_links(*_):
        raise OSError

    monkeypatch.setattr(os, 'link', no_links)
    files.link(tmp_path / 'a', tmp_path / 'c')
    assert (tmp_path / 'c').read_text(encoding='utf-8') == 'a' and not (tmp_path / 'a').samefile(
        tmp_path / 'c'
    )
    assert sorted(os.listdir(tmp_path)) == ['a', 'b', 'c']


def test_a_look_at_a_lock_does_not_refuse_who_takes_it(tmp_path):
    with FolderLock(tmp_path):
        pass
    with open(tmp_path / files.LOCK, 'r+b') as look:
        files._lock(look, shared=True)
        threading.Timer(0.05, look.close).start()
        with FolderLock(tmp_path):
            assert look.closed and files.lock_holder(tmp_path)


def test_who_holds_a_folder(tmp_path):
    assert files.lock_holder(tmp_path) == '', 'it has never been held'
    with FolderLock(tmp_path):
        assert files.lock_holder(tmp_path).startswith(f'process {os.getpid()} on ')
        with pytest.raises(
            FileError, match=r'in use by another study .*: wait for it, stop it, or give another --x'
        ):
            FolderLock(tmp_path, user='study', instead='--x').__enter__()
    assert files.lock_holder(tmp_path) == ''
    with FolderLock(tmp_path):
        pass
