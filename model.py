"""A GPT whose attention is pluggable: configuration, blocks, cache, initial values, loss and FLOPs.

What it shares with other models (hierarchy.py) is `LanguageModel`. Its attentions are in layers/, by the
names of layers/registry.py, each with the boundary `y = attention(x, memory, cache)` of layers/contract.py;
norms, MLPs and positions are classes that a config names. How text is drawn from a model is in generation.py.
Dimensions: B batch, T time, C n_embd."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from generation import stream_tokens
from layers.contract import PADDING, Attention, Counted, Memory
from layers.heads import HeadLinear
from layers.loss import linear_cross_entropy, soft_capped
from layers.mlps import MLPS
from layers.norms import NORMS
from layers.plans import HeadPlan
from layers.positions import POSITIONS, Position
from layers.registry import head_plan, make_attentions
from layers.tokens import TokenTable
from shape import GPTShape

# Limits beyond what anyone builds, yet small enough that a mistake is refused before it fills the memory
MOST = {'n_layer': 2**12, 'n_embd': 2**20, 'mlp_hidden': 2**24, 'vocab_size': 2**28, 'block_size': 2**32}


@dataclass(frozen=True)
class GPTConfig(GPTShape):
    """The architecture; what does not fit together is refused here, before anything is built."""

    vocab_size: int = 50304  # rows of the embedding: GPT-2's 50257 rounded up to a multiple of 64
    vocab_used: int = 0  # ids from here on are padding and never sampled; 0 = all ids are real

    def __post_init__(self):
        super().__post_init__()
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: must be at least 1')
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f'{name}={getattr(self, name)}: at most {most:,}')
        if self.n_embd % self.n_head:
            raise ValueError(
                f'n_embd={self.n_embd} is not a multiple of n_head={self.n_head}: heads would differ in size'
            )
        if self.mlp_hidden < 0 or self.softcap < 0:
            raise ValueError(
                f'mlp_hidden={self.mlp_hidden}, softcap={self.softcap:g}: neither may be negative'
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout}: must be in [0, 1)')
        if not 0 <= self.vocab_used <= self.vocab_size:
            raise ValueError(
                f'vocab_used={self.vocab_used}: must be between 0 and vocab_size={self.vocab_size}'
            )
        choices: dict[str, dict] = {'norm': NORMS, 'mlp': MLPS, 'position': POSITIONS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f'{name}={getattr(self, name)!r} is unknown: one of {", ".join(known)}')
        if self.position == 'rotary' and self.head_size % 2:
            raise ValueError(
                f"position='rotary' turns pairs of numbers, but n_embd={self.n_embd} / n_head={self.n_head} "
                f'gives heads of {self.head_size}: choose an even head size'
            )
        with torch.device('meta'):
            make_attentions(self)

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    def head_plan(self) -> HeadPlan | None:
        """Who reads what, over the layers that have keys and values; None where no layer has."""
        return head_plan(self)


class Block(nn.Module):
    """Attention, then an MLP, each behind a norm and added to the residual stream (GPT-2)."""

    def __init__(self, config: GPTConfig, attn: Attention):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config.n_embd, bias=config.bias)
        self.attn = attn
        self.ln_2 = NORMS[config.norm](config.n_embd, bias=config.bias)
        self.mlp = MLPS[config.mlp](config, config.mlp_hidden)

    def forward(self, x, memory: Memory, cache=None):
        normed = self.ln_1(x)
        memory.inputs.append(normed)
        x = x + self.attn(normed, memory, cache)
        return x + self.mlp(self.ln_2(x))


class Cache:
    """What generation carries from call to call: one state per layer, and how many tokens they hold."""

    def __init__(self, layers: list):
        self.layers = layers
        self.length = 0

    @property
    def rewinds(self) -> bool:
        return all(layer.rewinds for layer in self.layers)

    def rewind(self, length: int):
        """Forget all tokens but the first `length`; only where every layer can."""
        for layer in self.layers:
            layer.rewind(length)
        self.length = length

    def select(self, rows):
        """Keep the sequences rows (a LongTensor of batch indices), in that order."""
        for layer in self.layers:
            layer.select(rows)


def count(module: nn.Module) -> int:
    """The number of parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def flops(module: nn.Module, T: int, backward: bool = False) -> float:
    """FLOPs per token of a module's linear layers and attentions, over sequences of T tokens.

    Every multiply-add of the matrix products counts 2, heads that are not projected count nothing, and
    attention counts the full T x T square, which is the convention of MFU (PaLM, appendix B) and of
    torch's FlopCounterMode. The backward pass of a linear layer is twice its forward pass; attentions say
    what theirs is; recomputation does not count."""
    total = 0
    for m in module.modules():
        if isinstance(m, nn.Linear):
            total += 2 * m.weight.numel() * (1 + 2 * backward)
        elif isinstance(m, Counted):
            total += m.flops_per_token(T) + (m.backward_flops_per_token(T) if backward else 0)
    return total


def generator_of(seed: int, name: str) -> torch.Generator:
    """The generator that draws the initial values of a tensor of this name, and of no other."""
    digest = hashlib.sha256(f'{seed} {name}'.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], 'little') >> 1)


class LanguageModel(nn.Module):
    """What all models share: initial values, loss, optimizer, sampling.

    A model has config, context_limit, padding (as of Attention), lm_head and `transformer` with wte, and the
    methods
        hidden(idx, cache)   token ids (B, T) -> what the head reads (B, T, C)
        new_cache(B, reads)  empty generation state for B sequences; reads: where it can, in the faster form
        describe(), summary(), parts(), flops_per_token(), cache_bytes_per_token(), state_bytes()
    apart: prefixes of the names of weights that have files of their own and are not in a checkpoint
    steps: whether it takes a token in fixed shapes: hidden_at, as of GPT (decoding.py)
    """

    config_class: type  # of a frozen dataclass
    apart: tuple[str, ...] = ()
    steps: bool = False

    def finish(self, seed: int | None):
        """Called at the end of a model's constructor: the head, and all initial values."""
        wte = self.transformer.wte
        self.lm_head = nn.Linear(wte.embedding_dim, wte.num_embeddings, bias=False)
        if self.config.tied:
            self.lm_head.weight = wte.weight  # Press and Wolf, 2017
        self.init_weights(int(torch.randint(2**62, (), device='cpu')) if seed is None else seed)

    @torch.no_grad()
    def init_weights(self, seed: int):
        """GPT-2's initialisation. Each tensor draws from a generator of its own, seeded by (seed, name):
        models that share a tensor share its initial values, whatever else differs between them."""
        if self.lm_head.weight.is_meta:
            return
        for name, module in self.named_modules():
            generator = generator_of(seed, name)
            if hasattr(module, 'init_own'):  # parameters beside those of torch's layers
                module.init_own(generator)
            if not isinstance(module, (nn.Linear, nn.Embedding)):
                continue  # norms start as ones and zeros
            if module is self.lm_head and self.config.tied:
                continue
            # residual projections are smaller, so that the stream's variance does not grow with depth
            residual = name.endswith('c_proj')
            std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
            rows = getattr(module, 'rows_full', module.weight.size(0))
            full = torch.empty(rows, module.weight.size(1)).normal_(0.0, std, generator=generator)
            module.weight.copy_(full[module.rows] if isinstance(module, HeadLinear) else full)
            if getattr(module, 'bias', None) is not None:
                module.bias.zero_()

    def get_extra_state(self) -> str:
        """Saved with the weights, and compared when they are loaded."""
        return self.describe()

    def set_extra_state(self, state: str):
        if state != self.describe():
            raise ValueError(
                'these weights belong to another attention plan or kind of block: they were trained as\n'
                f'{state}\nand this model (attention={self.config.attention!r}) is\n{self.describe()}'
            )

    def forward(self, idx, targets=None, progress=None):
        """Token ids (B, T) -> (logits (B, T, vocab_size), None); with targets (B, T): (None, mean loss).

        Targets of -1 do not count. progress: in training, what part of it is done, as a scalar tensor: then a
        model adds what losses it has beside that of the tokens. Logits are not kept where only the loss is
        wanted: at 50304 tokens they are the largest tensor by far; ask for them without targets.
        """
        hidden = self.hidden(idx)
        if targets is None:
            return self.logits(hidden), None
        return None, self.loss(hidden, targets)

    def head(self, vocab: int | None = None):
        """The weight of the head (vocab_size, C); vocab: of the first ids alone."""
        weight = self.lm_head.weight
        return weight if vocab is None else weight[:vocab]

    def logits(self, hidden, vocab: int | None = None):
        """What hidden() gives (..., C) -> logits (..., vocab_size); vocab as of head."""
        logits = self.lm_head(hidden) if vocab is None else F.linear(hidden, self.head(vocab))
        return soft_capped(logits, self.config.softcap)

    def loss(self, hidden, targets, vocab: int | None = None):
        """The mean loss of targets (B, T), -1 where none counts, in nats per token; vocab as of head."""
        weight, softcap = self.head(vocab), self.config.softcap
        return linear_cross_entropy(hidden, weight, targets, ignore_index=-1, softcap=softcap)

    def step(self, part: nn.Module, *args):
        """part(*args), for every part of the model in turn; a subclass may compute it in another way."""
        return part(*args)

    def num_params(self, non_embedding: bool = True) -> int:
        """Parameters, without position embeddings by default (nanoGPT's count: a tied wte is also
        lm_head)."""
        total = count(self)
        tables = (m for m in self.modules() if isinstance(m, Position))
        return total - sum(map(count, tables)) if non_embedding else total

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type) -> torch.optim.AdamW:
        """AdamW, fused where the device has it; matrices decay, biases and norms do not."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
            {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0},
        ]
        fused = device_type in ('cuda', 'cpu')
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def cache_type(self) -> tuple:
        """(device, dtype) of keys and values in generation."""
        weight = self.transformer.wte.weight
        kind = weight.device.type
        autocast = torch.is_autocast_enabled(kind)
        return weight.device, torch.get_autocast_dtype(kind) if autocast else weight.dtype

    def stream(self, idx, max_new_tokens: int, **options):
        """Yield the next token (B, 1), max_new_tokens times, after idx (B, T); options of
        generation.stream."""
        return stream_tokens(self, idx, max_new_tokens, **options)

    def generate(self, idx, max_new_tokens: int, **options):
        """Prompt (B, T) -> prompt and max_new_tokens more (B, T + max_new_tokens); options of
        generation.stream."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, **options)], dim=1)


class GPT(LanguageModel):
    config_class = GPTConfig

    def __init__(self, config: GPTConfig, seed: int | None = None):
        """seed: of the initial weights; None draws one from torch's global generator (torch.manual_seed)."""
        super().__init__()
        self.config = config
        attentions = make_attentions(config)
        # no limit where positions are not a table and no layer keeps single tokens
        endless = not POSITIONS[config.position].table and all(attn.bounded for attn in attentions)
        self.context_limit = math.inf if endless else config.block_size
        self.padding = min((attn.padding for attn in attentions), key=PADDING.index)
        self.transformer = nn.ModuleDict(
            {
                'wte': TokenTable(config.vocab_size, config.n_embd),
                'wpe': POSITIONS[config.position](config),  # has parameters only where they are learned
                'drop': nn.Dropout(config.dropout),
                'h': nn.ModuleList([Block(config, attn) for attn in attentions]),
                'ln_f': NORMS[config.norm](config.n_embd, bias=config.bias),
            }
        )
        if (
            config.x0_skip
        ):  # a block's input: shares of the stream, and of the normed embedding (none at first)
            self.transformer['of_stream'] = nn.ParameterList([torch.ones(()) for _ in attentions])
            self.transformer['of_token'] = nn.ParameterList([torch.zeros(()) for _ in attentions])
        self.finish(seed)

    def describe(self) -> str:
        """What the layers compute, a line for the blocks and one per attention: shapes do not tell it."""
        c = self.config
        blocks = f'norm {c.norm}, mlp {c.mlp}, position {c.position}, qk_norm {c.qk_norm}'
        blocks += f', softcap {c.softcap:g}' if c.softcap else ''  # older weights do not speak of it
        return '\n'.join([blocks, *(block.attn.describe() for block in self.transformer.h)])

    def summary(self) -> str:
        """One line for people: what the model is."""
        c = self.config
        size = f'{self.num_params() / 1e6:.2f}M parameters'
        return f'{c.attention}, {c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, {size}'

    def parts(self) -> dict[str, int]:
        """Parameters by part of the model."""
        t = self.transformer
        named = {'tokens': t.wte, 'positions': t.wpe, 'blocks': t.h, 'final norm': t.ln_f}
        return {name: count(module) for name, module in named.items()}

    def hidden(self, idx, cache: Cache | None = None, pos=None, real=None):
        """Token ids (B, T) -> final normalised residual stream (B, T, n_embd).

        With a cache, idx follows the tokens that it holds, and the cache is advanced by T. For batches of
        padded sequences: pos (B, T), the positions of idx (None: one after the other), and real (B, S) bool,
        which tokens of the cache and idx together are no padding (None: all). Outputs at padding positions
        are undefined."""
        x, memory = self.embed(idx, cache, pos, real)
        for i in range(len(self.transformer.h)):
            x = self.block(i, x, memory, cache)
        if cache is not None:
            cache.length += idx.size(1)
        return self.transformer.ln_f(x)

    def embed(self, idx, cache: Cache | None = None, pos=None, real=None, embedded=None):
        """Arguments as of hidden -> (the stream that the first block reads (B, T, n_embd), the Memory that
        the blocks of this pass share). The cache is not advanced. embedded (B, T, n_embd): what to take for
        the embedding of idx, which may be None where no layer reads tokens."""
        t = self.transformer
        if embedded is None:
            embedded = t.wte(idx)  # (B, T, n_embd)
        T, start = embedded.size(1), cache.length if cache is not None else 0
        if start + T > self.context_limit:
            raise ValueError(
                f'{start + T} tokens do not fit block_size={self.config.block_size}: crop the sequence'
            )
        if pos is None:
            pos = torch.arange(start, start + T, device=embedded.device)[None]  # (1, T)
        x, rotate = t.wpe(embedded, pos)
        memory = Memory(rotate, real, T, tokens=idx, embedded=embedded, embed=t.wte)
        if self.config.x0_skip:
            memory.x0 = F.rms_norm(embedded, embedded.shape[-1:])
        return t.drop(x), memory

    def block(self, i: int, x, memory: Memory, cache: Cache | None = None):
        """Block i on the stream x (B, T, n_embd) -> the stream after it; memory: as embed made it."""
        t = self.transformer
        if memory.x0 is not None:
            x = t.of_stream[i] * x + t.of_token[i] * memory.x0
        return self.step(t.h[i], x, memory, cache.layers[i] if cache is not None else None)

    def flops_per_token(self, T: int | None = None, backward: bool = True) -> float:
        """FLOPs per token of one pass over sequences of T tokens (default block_size); see `flops`."""
        return flops(self, T or self.config.block_size, backward)

    def cache_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes of generation state that one more token of one sequence costs (itemsize 2: bf16)."""
        return sum(block.attn.cache_bytes_per_token(itemsize) for block in self.transformer.h)

    def state_bytes(self, itemsize: int = 2) -> int:
        """Bytes of generation state of one sequence that stay the same however many tokens it has."""
        return sum(block.attn.state_bytes(itemsize) for block in self.transformer.h)

    def new_cache(self, B: int, reads: bool = False) -> Cache:
        """Empty state for B sequences of at most block_size tokens, in the type of the keys. reads: layers
        hold what they read where they can (layers/heads.py), which is faster and takes as much memory as
        vanilla."""
        size, device_and_dtype = self.config.block_size, self.cache_type()
        layers = [b.attn for b in self.transformer.h]
        makers = [a.new_read_cache if reads and a.steps else a.new_cache for a in layers]
        return Cache([make(B, size, *device_and_dtype) for make in makers])

    @property
    def steps(self) -> bool:
        return all(block.attn.steps for block in self.transformer.h)

    def hidden_at(self, token, at, places, cache: Cache):
        """Tokens (B, 1) at the place `at`, a LongTensor (1,), after those that the cache holds before it ->
        the final residual stream (B, 1, n_embd). All shapes are fixed, and nothing but the tensors of the
        cache, made with reads=True, is advanced. places: 0, 1, 2, … in a LongTensor, those of the cache that
        are looked at."""
        x, memory = self.embed(token, pos=at[None])
        memory.at, memory.places = at, places
        for i in range(len(self.transformer.h)):
            x = self.block(i, x, memory, cache)
        return self.transformer.ln_f(x)
