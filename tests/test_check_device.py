"""check_device.py in small, on a CPU: checks pass, what is wrong fails, what cannot be made is told."""

import json

import pytest
import torch

import check_device
from generation import draw


def run(tmp_path, only, *flags):
    out = tmp_path / 'check.json'
    argv = ['--size=tiny', '--device=cpu', '--dtype=bfloat16', '--backend=eager', f'--only={only}']
    precision = torch.get_float32_matmul_precision()
    try:
        status = check_device.main([*argv, f'--out={out}', *flags])
    finally:
        torch.set_float32_matmul_precision(precision)
    return status, json.loads(out.read_text(encoding='utf-8'))['checks']


def test_what_is_right_passes(tmp_path, capsys):
    status, checks = run(tmp_path, 'steps,loss,low precision,compiled')
    assert status == 0 and set(checks) == set(check_device.COMPUTED)
    assert all(row['passed'] and row['found'] <= row['allowed'] for row in checks.values())
    assert capsys.readouterr().out.count('| passed |') == 6


def test_runs_pass_and_fp16_is_left_out(tmp_path):
    status, checks = run(tmp_path, 'DDP,fp16')
    assert status == 0
    assert checks['one rank of DDP']['passed'] and checks['fp16 with its scaler'] == {
        'left out': 'fp16 needs CUDA'
    }


def test_other_tokens_and_what_breaks_are_failures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('decoding.draw', lambda *args: draw(*args) ^ 1)
    monkeypatch.setattr(check_device.loss, 'linear_cross_entropy', None)
    status, checks = run(tmp_path, 'drawn,loss')
    assert status == 1 and checks['drawn tokens by steps']['found'] > 0
    assert (
        not checks['drawn tokens by steps']['passed']
        and 'TypeError' in checks['loss and gradients in chunks']['error']
    )
    assert '0 of 2 without a failure' in capsys.readouterr().out


def test_nothing_begins_when_the_time_is_over(tmp_path):
    status, checks = run(tmp_path, 'drawn', '--seconds=0')
    assert status == 0 and 'were over' in checks['drawn tokens by steps']['left out']


@pytest.mark.parametrize('name', check_device.RUNS)
def test_every_run_belongs_to_a_check(name):
    needs = ('resuming', 'one rank of DDP') if name == 'straight' else (check_device.of_run(name),)
    assert set(needs) <= check_device.TRAINED.keys()
