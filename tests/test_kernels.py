"""Which kernel of torch's attention runs where: a table, and that the names are torch's."""

import torch
from torch.nn.attention import SDPBackend

from layers.kernels import kernels, kernels_for

AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)
FLASH = ('FLASH_ATTENTION', 'EFFICIENT_ATTENTION', 'MATH')
MASKED = ('EFFICIENT_ATTENTION', 'MATH')


def test_the_table():
    """(capability, queries, keys, masked, learns)"""
    table = {
        (HOPPER, 1024, 1024, False, True): (),  # training: all shapes the same, cuDNN's plan is a good one
        (HOPPER, 1024, 1024, True, True): (),
        (AMPERE, 1, 700, False, False): (),  # torch does not prefer cuDNN there
        (HOPPER, 1, 700, False, False): FLASH,  # a token that is generated
        (BLACKWELL, 1, 700, False, False): FLASH,
        (HOPPER, 700, 700, False, False): FLASH,  # a text that is read
        (HOPPER, 1, 1, False, False): FLASH,
        (HOPPER, 9, 700, True, False): MASKED,  # guesses after a text, padding
        (HOPPER, 1, 700, True, False): MASKED,
        (HOPPER, 9, 700, False, False): MASKED,
    }
    assert {asked: kernels(*asked) for asked in table} == table


def test_cudnn_is_never_named_and_every_name_is_one_of_torch():
    for capability in (AMPERE, HOPPER, BLACKWELL):
        for T, S in ((1, 1), (1, 9), (9, 9), (4, 9)):
            for masked in (False, True):
                names = kernels(capability, T, S, masked, learns=False)
                assert 'CUDNN_ATTENTION' not in names
                assert all(hasattr(SDPBackend, name) for name in names)
                assert not names or names[-1] == 'MATH'  # which takes anything


def test_elsewhere_torch_chooses():
    with kernels_for(torch.zeros(1, 1, 1, 8), 9, False, False) as chosen:
        assert chosen is None
