"""What only speed explains changes no result."""

import pytest
import torch
from torch.nn import functional as F

from model import DROPOUT_BLOCK, GPT, GPTConfig, attend
from system import keep_memory


@pytest.mark.parametrize('head_size', [16, 32, 64])
@pytest.mark.parametrize('masked', [False, True])
def test_attention_in_bf16_is_as_exact_as_torchs(head_size, masked):
    generator = torch.Generator().manual_seed(1)
    q, k, v, upstream = torch.randn(4, 2, 3, 20, head_size, generator=generator).bfloat16()
    mask = torch.ones(20, 20, dtype=torch.bool).tril(-3) | torch.eye(20, dtype=torch.bool) if masked else None

    def run(attention, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        y = attention(*inputs)
        return y, *torch.autograd.grad(y, inputs, upstream.to(dtype))

    def theirs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not masked)

    exact = run(theirs, torch.float64)
    with torch.autocast('cpu', torch.bfloat16):
        ours = run(lambda *qkv: attend(*qkv, mask), torch.bfloat16)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).norm() < 0.01 * b.norm()


@pytest.mark.parametrize('T', [DROPOUT_BLOCK, DROPOUT_BLOCK + 1, 3 * DROPOUT_BLOCK - 5])
def test_attention_with_dropout_in_blocks_is_attention(T):
    """With a dropout so rare that nothing is dropped; then half: on average the values stay."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, upstream = torch.randn(4, 1, 2, T, 8, generator=generator)

    def run(attention):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        y = attention(*inputs)
        return y, *torch.autograd.grad(y, inputs, upstream)

    ours = run(lambda *qkv: attend(*qkv, dropout_p=1e-12))
    for a, b in zip(
        ours, run(lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.manual_seed(1)
    v = torch.arange(1.0, T + 1).expand(1, 2, T).unsqueeze(-1)
    dropped, exact = attend(q, k, v, dropout_p=0.5), attend(q, k, v)
    assert abs(dropped.mean() / exact.mean() - 1) < 0.05
    assert set(dropped[0, :, 0, 0].tolist()) <= {0.0, 2.0}, 'the first query sees the first value alone'


def test_keeping_memory_changes_no_number():
    def losses():
        model = GPT(GPTConfig(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=32), seed=1)
        optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.98), 'cpu')
        idx = torch.randint(65, (4, 33), generator=torch.Generator().manual_seed(2))
        for _ in range(3):
            _, loss = model(idx[:, :-1], idx[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()

    expected = list(losses())
    keep_memory()
    try:
        assert list(losses()) == expected
    finally:
        keep_memory(False)
