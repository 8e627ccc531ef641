"""bench.py on tiny shapes: every part runs, and what it writes makes sense."""

import json
import textwrap

import pytest
import torch

import bench
import train
from configurator import ConfigError
from tiny import write_tokens

TINY = ['--threads=1', '--compile=false', '--batch=2', '--block=16', '--vocab=64', '--rounds=3', '--steps=1']


@pytest.fixture(scope='module')
def nanogpt(tmp_path_factory):
    """A folder that has what bench.py uses of a checkout of nanoGPT: its model in terms of ours."""
    folder = tmp_path_factory.mktemp('nanogpt')
    source = """
        from dataclasses import dataclass
        import torch
        import model

        @dataclass
        class GPTConfig:
            block_size: int
            vocab_size: int
            n_layer: int
            n_head: int
            n_embd: int
            dropout: float
            bias: bool

        class GPT(model.GPT):
            get_extra_state = torch.nn.Module.get_extra_state  # none: it has weights alone
            set_extra_state = torch.nn.Module.set_extra_state

            def __init__(self, config):
                super().__init__(model.GPTConfig(**vars(config)), seed=1)

            def forward(self, idx, targets=None):
                logits, loss = super().forward(idx)[0], None
                if targets is not None:
                    logits = logits.flatten(0, 1)
                    loss = torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-1)
                    logits = logits.view(*idx.shape, -1)
                return logits, loss

            @torch.no_grad()
            def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
                for _ in range(max_new_tokens):
                    idx = torch.cat([idx, self(idx)[0][:, -1:].argmax(-1)], dim=1)
                return idx
    """
    (folder / 'model.py').write_text(textwrap.dedent(source), encoding='utf-8')
    return folder


def run(tmp_path, *argv):
    threads = torch.get_num_threads()
    try:
        bench.main([*argv, *TINY, f'--out={tmp_path / "bench.json"}'])
    finally:
        torch.set_num_threads(threads)
        bench.keep_memory(False)
    return json.loads((tmp_path / 'bench.json').read_text(encoding='utf-8'))


def test_training_and_generation(tmp_path, nanogpt, capsys, monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda model: model)  # of nanoGPT at best: a minute
    arms = ['vanilla', 'reflex_422', 'leap']
    parts = '--parts=train,generate,tokens'
    result = run(
        tmp_path, *arms, parts, '--contexts=8,20', '--tokens=30', '--every=7', f'--nanogpt={nanogpt}'
    )
    assert list(result['train']) == [*arms, *bench.NANOGPT]
    for name, row in result['train'].items():
        assert len(row['seconds']) == 3 and min(row['seconds']) > 0
        low, high = row['tokens_per_s']['quartiles']
        assert 0 < low <= row['tokens_per_s']['median'] <= high
        assert row['ratio']['median'] == 1 if name == 'vanilla' else row['ratio']['median'] > 0
    assert list(result['generate']) == [*arms, 'nanoGPT']
    for name, by_context in result['generate'].items():
        assert list(by_context) == ['8', '20']
        for how in by_context.values():
            assert set(how) == ({'recomputed'} if name == 'nanoGPT' else {'cached', 'recomputed'})
    tokens = result['tokens']
    assert tokens['same_tokens'] and tokens['ratio'] == tokens['nanogpt_seconds'] / tokens['seconds'] > 0
    assert tokens['lookup_ratio'] == tokens['nanogpt_seconds'] / tokens['lookup_seconds'] > 0
    shape = result['shape']
    assert (shape['batch_size'], shape['block_size'], shape['vocab_size']) == (2, 16, 64)
    assert {'commit', 'versions', 'device', 'threads', 'load_before', 'command'} <= result.keys()
    told = capsys.readouterr().out
    assert '| reflex_422 |' in told and '| nanoGPT (best) |' in told and '30 greedy tokens, the same' in told


def test_other_tokens_are_told():
    times = {'seconds': 1.0, 'lookup_seconds': 0.5, 'nanogpt_seconds': 3.0, 'ratio': 3.0, 'lookup_ratio': 6.0}
    tokens = {'tokens': 5, **times, 'same_tokens': False}
    assert 'OTHER ones' in bench.markdown({'arms': ['vanilla'], 'tokens': tokens})


def test_tokens_of_trained_weights(tmp_path, nanogpt):
    """A text that repeats itself; and a model that nanoGPT does not have."""
    flags = ['--dataset=' + str(write_tokens(tmp_path / 'tokens')), '--max_iters=1', '--eval_iters=1']
    flags += [
        '--n_layer=1',
        '--n_head=2',
        '--n_embd=16',
        '--block_size=64',
        '--device=cpu',
        '--compile=false',
    ]
    argv = ['vanilla', '--parts=tokens', '--every=7', f'--nanogpt={nanogpt}']
    for attention in ('vanilla', 'reflex_all'):
        out = tmp_path / attention
        layers = ['--n_layer=2'] if attention == 'reflex_all' else []
        train.main([*flags, *layers, f'--attention={attention}', f'--out_dir={out}', '--batch_size=2'])
        if attention == 'vanilla':
            tokens = run(tmp_path, *argv, f'--weights={out}')['tokens']
            assert tokens['tokens'] == tokens['block_size'] == 64 and tokens['same_tokens']
        else:
            with pytest.raises(ConfigError, match='nanoGPT has no such model'):
                run(tmp_path, *argv, f'--weights={out}')


def test_memory_and_start_are_of_processes_of_their_own(tmp_path):
    result = run(tmp_path, 'reflex_all', '--parts=alone')
    for row in result['alone'].values():
        assert row['peak_bytes'] > 50 * 2**20 and 0.1 < row['first_step_s'] < 200
    assert 'train' not in result


def test_the_race_ends_at_the_target_or_with_the_recipe(tmp_path, nanogpt, monkeypatch):
    data = write_tokens(tmp_path / 'tokens')
    config = tmp_path / 'mine.py'
    recipe = f"dataset = '{data}'\nn_layer = 1\nn_head = 2\nn_embd = 16\nmax_iters = 40\neval_interval = 10\n"
    config.write_text(
        recipe + "optimizer = 'muon'\nlearning_rate = 1e-2\nwarmup_iters = 5\n", encoding='utf-8'
    )
    monkeypatch.setitem(bench.SIZES, 'cpu', ([], 256, 2))
    for name, value in {'max_iters': 20, 'eval_interval': 10}.items():
        monkeypatch.setitem(bench.NANOGPT_RECIPE, name, value)
    argv = [str(config), '--parts=race', f'--nanogpt={nanogpt}', '--vocab=256']
    monkeypatch.setattr('test_bench.TINY', [flag for flag in TINY if 'vocab' not in flag])
    rows = run(tmp_path, *argv, '--target=100')['race']['arms']
    assert all(row['reached'] and row['steps'] == 10 for row in rows.values())
    rows = run(tmp_path, *argv, '--target=0')['race']['arms']
    assert [row['steps'] for row in rows.values()] == [40, 20]
    for row in rows.values():
        assert not row['reached'] and [steps for steps, _, _ in row['curve']][-1] == row['steps']
        assert row['curve'][-1][2] < 5.6  # from log 256


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--parts=training'], "'training' is unknown"),
        (['--rounds=0'], 'must be at least 1'),
        (['--nanogpt=.'], 'no model.py'),
        (['--contexts=a'], 'numbers of tokens'),
        (['--clock=cpu', '--threads=2'], 'needs --device=cpu --threads=1'),
    ],
)
def test_what_cannot_work_is_one_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        bench.arguments(argv)
    assert message in capsys.readouterr().err


def test_arms_take_turns():
    seen = []
    seconds = bench.taking_turns(['a', 'b', 'c'], lambda name: seen.append(name) or 1.0, 3)
    assert seen == list('abcbcacab')
    assert seconds == {name: [1.0] * 3 for name in 'abc'}


def test_mfu_where_the_peak_is_known(monkeypatch):
    monkeypatch.setattr(bench.metrics, 'peak_flops', lambda device: 1e9)
    args = bench.arguments(['vanilla', '--parts=train', *TINY])
    row = bench.bench_training(args)['vanilla']
    assert row['mfu'] == pytest.approx(row['tokens_per_s']['median'] * row['flops_per_token'] / 1e9)
    told = bench.markdown({'arms': ['vanilla'], 'train': {'vanilla': row}})
    assert f'{row["mfu"]:.1%}' in told
    bench.keep_memory(False)


PRESET = '--preset=cuda --device=cpu --n_layer=4 --n_head=8 --n_embd=32 --contexts=16 --sequences=3'.split()


@pytest.mark.parametrize('part', bench.PRESETS['cuda'][2])
def test_each_part_of_the_preset(part, capsys):
    """In this process, in small: what a process of its own would print for it."""
    threads = torch.get_num_threads()
    try:
        bench.main([*PRESET, *TINY, f'--within={part}', '--seconds=100'])
    finally:
        torch.set_num_threads(threads)
        bench.keep_memory(False)
    rows = json.loads(capsys.readouterr().out)
    arms = bench.PRESETS['cuda'][0]
    if part == 'train':
        assert list(rows) == [*arms, bench.NANOGPT[0]]
        assert all(row['ms_per_step'] > 0 for row in rows.values())
        assert [name for name, row in rows.items() if 'kernels' in row] == arms[:2]
        vanilla, reflex = (rows[name]['kernels'] for name in arms[:2])
        assert vanilla['products']['ms'] > 0 and vanilla['attention']['number'] > 0
        assert reflex['joins']['number'] > vanilla['joins']['number']
    elif part == 'decode':
        assert list(rows) == [*arms, 'nanoGPT'] and set(rows['nanoGPT']) == {'whole'}
        assert rows['vanilla']['passes']['tokens_per_s']['median'] > 0
    elif part == 'loss':
        assert set(rows) == {'all rows at once', 'as trained', *bench.BORROWED}
        assert abs(rows['as trained']['from_exact']) < 0.1
    assert bench.markdown({'arms': arms, part: rows}).count('|') > 10


def test_losses_of_other_packages(monkeypatch, tmp_path, capsys):
    """One that is installed is called as it asks to be, one that fails is told, and one that is missing."""
    source = """
        import torch
        def linear_cross_entropy(e, c, targets, ignore_index=-100):
            return torch.nn.functional.cross_entropy(e @ c.t(), targets, ignore_index=ignore_index)
        def fails(*args, **options):
            raise RuntimeError('no such card')
    """
    (tmp_path / 'other_losses.py').write_text(textwrap.dedent(source), encoding='utf-8')
    monkeypatch.syspath_prepend(tmp_path)
    packages = {
        'one': ('other_losses', 'linear_cross_entropy', {}),
        'failing': ('other_losses', 'fails', {}),
        'strange': ('other_losses', 'nothing', {}),
        'missing': ('no_such_package.inside', 'loss', {'accum_dtype': 'float32'}),
    }
    monkeypatch.setattr(bench, 'BORROWED', packages)
    args = bench.arguments([*PRESET, *TINY])
    rows = bench.bench_loss(args)
    assert rows['one']['ms']['median'] > 0 and abs(rows['one']['from_exact']) < 0.1
    assert rows['failing'] == {'left_out': 'RuntimeError: no such card'}
    assert 'AttributeError' in rows['strange']['left_out']
    assert rows['missing'] == {'left_out': 'not installed: pip install --no-deps missing'}
    told = bench.markdown({'arms': ['vanilla'], 'loss': rows})
    assert '| one |' in told and 'failing left out: RuntimeError' in told
    # an error of our own way is none to go on from
    monkeypatch.setattr(bench, 'linear_cross_entropy', None)
    with pytest.raises(TypeError):
        bench.bench_loss(args)


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        ('cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3', 'attention'),
        ('void pytorch_flash::flash_bwd_kernel<Flash_bwd_traits>', 'attention'),
        ('nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT', 'products'),
        ('sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n', 'products'),
        ('aten::addmm', 'products'),
        ('row_kernel', 'loss'),
        ('triton_per_fused__to_copy_add_native_layer_norm_native_layer_norm_backward_view_5', 'norms'),
        ('triton_poi_fused__unsafe_view_cat_split_with_sizes_transpose_view_11', 'joins'),
        ('triton_poi_fused_zeros_12', 'joins'),
        ('triton_poi_fused__unsafe_view_gelu_7', 'gelu'),
        ('void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>', 'optimizer'),
        ('triton_poi_fused__to_copy_t_3', 'casts, copies'),
        ('Memcpy HtoD (Pinned -> Device)', 'casts, copies'),
        ('triton_poi_fused_embedding_dense_backward_19', 'other'),
    ],
)
def test_what_a_kernel_is(name, kind):
    found = (kind for kind, names in bench.KINDS.items() if bench.re.search(names, name))
    assert next(found, 'other') == kind


def test_steps_are_measured_where_they_are_compiled(monkeypatch, capsys):
    own = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, options, **rest: own(f, backend='eager', **rest))
    monkeypatch.setattr('test_bench.TINY', [flag for flag in TINY if 'compile' not in flag])
    argv = ['vanilla', 'leap', '--device=cpu', '--contexts=16', '--within=decode', '--compile=true']
    bench.main([*argv, *TINY])
    rows = json.loads(capsys.readouterr().out)
    bench.keep_memory(False)
    assert set(rows['vanilla']) == {'steps', 'passes'} and set(rows['leap']) == {'passes'}


def test_a_part_of_a_preset_that_fails_or_hangs_is_told_and_skipped(monkeypatch, tmp_path, capsys):
    class Done:
        returncode, stdout = 0, '{"vanilla": {}}'

    def process(command, timeout, **rest):
        part = command[-2].removeprefix('--within=')
        if part == 'train':
            raise bench.subprocess.TimeoutExpired('bench.py', timeout)
        done = Done()
        done.returncode = 3 if part == 'decode' else 0
        return done

    args = bench.arguments([*PRESET, *TINY])
    assert args.out.name.startswith('preset-cuda-') and args.out.parent.name == 'bench'
    monkeypatch.setattr(bench.subprocess, 'run', process)
    given, skipped = bench.bench_preset(args, [])
    assert given == {'together': {'vanilla': {}}, 'loss': {'vanilla': {}}}
    assert 'timed out after 230 seconds' in skipped['train'] and 'status 3' in skipped['decode']
    assert 'decode skipped after' in capsys.readouterr().err
    assert sum(args.limits.values()) <= 345  # of six minutes, with the start


def test_no_round_begins_when_the_time_is_over():
    assert bench.taking_turns(['a'], lambda name: 1.0, 5, until=bench.time.monotonic() - 1) == {'a': [1.0]}
