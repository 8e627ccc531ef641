"""decoding.py: steps of fixed shapes draw the tokens that passes over the whole text draw."""

import pytest
import torch

from conftest import random_gpt
from decoding import Decoder, places, way
from generation import Sampling
from layers.heads import attend, attend_one
from model import GPTConfig

PLANS = ['vanilla', 'reflex(4-2-2)', 'reflex_all', 'reflex(6-2, window=20)*2 lime*2']


def model_of(attention='reflex(4-2-2)', **changes):
    size = {'block_size': 300, 'vocab_size': 64, 'n_layer': 4, 'n_head': 8, 'n_embd': 32}
    return random_gpt(GPTConfig(**{**size, 'attention': attention, **changes}), std=0.2).eval()


def prompt(B=1, T=100):
    return torch.randint(64, (B, T), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize('attention', PLANS)
@pytest.mark.parametrize(
    'options', [{'temperature': 0}, {'temperature': 0.9, 'top_k': 20, 'top_p': 0.9}], ids=str
)
def test_the_tokens_are_those_of_whole_passes(attention, options):
    """Past the end of the context, and with the same decoder once more."""
    model = model_of(attention, vocab_used=60, block_size=140).double()
    decoder = Decoder(model, 2)

    def drawn(**more):
        generator = torch.Generator().manual_seed(4)
        return model.generate(prompt(2), 60, generator=generator, **options, **more)

    wanted = drawn(use_cache=False)
    assert torch.equal(drawn(decoder=decoder), wanted) and torch.equal(drawn(decoder=decoder), wanted)


def test_guesses_and_steps_together():
    """A text that repeats itself now and then: some tokens come with guesses, some from steps."""
    model = model_of().double()
    idx = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 5, 6, 7]])
    decoder, steps = Decoder(model), []
    decoder.next = lambda *rest, own=decoder.next: steps.append(rest) or own(*rest)
    wanted = model.generate(idx, 80, temperature=0, use_cache=False)
    assert torch.equal(model.generate(idx, 80, temperature=0, lookup=8, decoder=decoder), wanted)
    assert 0 < len(steps) < 80


def test_sequences_change_places():
    model, idx = model_of().double(), prompt(3)
    decoder, rows = Decoder(model, 3), torch.tensor([2, 0, 0])
    keys = decoder.cache.layers[0].k.data_ptr()
    with torch.no_grad():
        model.hidden(idx[:, :60], decoder.cache)
        decoder.cache.select(rows)
        found = decoder.step(idx[rows, 60:61], 60)
        wanted = model.logits(model.hidden(idx[rows, :61]))[:, -1].float()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert decoder.cache.layers[0].k.data_ptr() == keys  # a captured step knows where it lies


@pytest.mark.parametrize('attention', PLANS)
def test_in_bf16_the_weights_are_cast_once_and_the_logits_are_those_of_autocast(attention):
    model, idx = model_of(attention, position='rotary', qk_norm=True), prompt(2)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        decoder = Decoder(model, 2)
        model.hidden(idx[:, :-1], decoder.cache)
        found = decoder.step(idx[:, -1:], 99)
        wanted = model.logits(model.hidden(idx))[:, -1].float()
    exact = model(idx)[0][:, -1]
    assert (found - exact).abs().max() < 2 * (wanted - exact).abs().max()
    assert decoder.cache.layers[0].k.dtype == decoder.head.dtype == torch.bfloat16
    assert (
        model.lm_head.weight.dtype == torch.float32 and model.transformer.wte.weight is model.lm_head.weight
    )
    assert decoder.model.transformer.wte.weight.dtype == torch.float32
    assert decoder.model.transformer.h[1].mlp.c_fc.weight.dtype == torch.bfloat16


def test_compiled_one_program_serves_all_lengths_and_each_decoder_has_its_own(monkeypatch):
    made = []

    def compile(function, options, **rest):
        assert options['guard_filter_fn']([1, 2]) == [False, False]
        return own(function, backend=lambda g, inputs: made.append(g) or g.forward, **rest)

    own = torch.compile
    monkeypatch.setattr(torch, 'compile', compile)
    decoders = []
    for i, attention in enumerate(PLANS[::3]):
        model = model_of(attention, block_size=150).double()
        decoders.append((model, Decoder(model, compile=True)))
        wanted = model.generate(prompt(), 40, temperature=0)  # places: 128, then 150
        for some, decoder in decoders:
            found = some.generate(prompt(), 40, temperature=0, decoder=decoder)
        assert torch.equal(found, wanted) and len(made) == i + 1


def test_where_logits_are_no_numbers_no_token_is_drawn():
    model = model_of()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(torch.nan)
    drawn = model.generate(prompt(), 3, decoder=Decoder(model))[0, -3:]
    assert drawn.tolist() == [-1, -1, -1]


def test_a_decoder_of_another_number_of_sequences_is_refused():
    model = model_of()
    with pytest.raises(ValueError, match='for 2 sequences, and here are 3'):
        model.generate(prompt(3), 1, decoder=Decoder(model, 2))


def test_attention_of_one_token():
    """Against torch's, over the places that are there; compiled it is written as sums."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 4, n, 8, generator=g, dtype=torch.float64) for n in (1, 40, 40))
    mask = (torch.arange(40) <= 29)[None, None, None]
    wanted = attend(q, k[:, :, :30], v[:, :, :30])
    compiled = torch.compile(attend_one, backend='eager', fullgraph=True)
    for found in (attend_one(q, k, v, mask), compiled(q, k, v, mask)):
        torch.testing.assert_close(found, wanted)


def test_the_way_of_decoding():
    table = {
        (True, 'cuda', False): 'captured',
        (True, 'cuda', True): 'captured',
        (True, 'cpu', True): 'compiled',
        (True, 'mps', True): 'compiled',
        (True, 'cpu', False): 'plain',
        (False, 'cuda', True): 'plain',
        (False, 'cpu', True): 'plain',
    }
    assert {asked: way(*asked) for asked in table} == table


def test_places():
    assert [places(n, 1000, 'cpu') for n in (1, 128, 129, 900, 1000)] == [128, 128, 256, 1000, 1000]
    assert [places(n, 3000, 'cuda') for n in (1, 256, 257, 1025, 2049)] == [256, 256, 512, 2048, 3000]
    assert all(n <= places(n, 100, kind) <= 100 for kind in ('cpu', 'cuda') for n in range(1, 101))


def test_a_capture_that_fails_is_told_and_the_tokens_are_the_same(monkeypatch):
    model = model_of().double()
    decoder, calls = Decoder(model), []
    wanted = model.generate(prompt(), 20, temperature=0)
    decoder.kind = 'cuda'  # as far as next() is concerned

    def capture(*known):
        calls.append(known)
        raise RuntimeError('operation not permitted')

    monkeypatch.setattr(decoder, 'capture', capture)
    with pytest.warns(UserWarning, match='no CUDA graph of the step: operation not permitted') as told:
        assert torch.equal(model.generate(prompt(), 20, temperature=0, decoder=decoder), wanted)
    assert calls == [(256, Sampling(0), None)] and len(told) == 1
