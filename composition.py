"""Composition: GPTs that were trained apart, joined by reading each other's layers.

A composed model is a GPT, the *base*, and beside it other GPTs, the *experts*, which may be wider, narrower,
deeper or shallower. All of them are frozen. What joins an expert to the base is trained, and is its `Joint`:

    reads  At chosen layers, heads of the base ask with the base's own queries and read keys and values that
           are projections of the expert's stream at a chosen depth (CALM; Bansal et al., 2024,
           arXiv:2401.02412). To that comes a projection of the expert's stream at the asking token itself
           (as in progressive networks; Rusu et al., 2016, arXiv:1606.04671): heads would take long to learn
           to find it. Both are added to the base's stream after that layer. The output projections are zero
           at first: a new composed model computes what its base computes, bit for bit.
    gate   A linear layer on the base's stream, as it enters the first layer that reads, gives a score, and
           its sigmoid says how much a token asks for the expert (PHATGOOSE; Muqeeth et al., 2024,
           arXiv:2402.05859). What is read counts times that.
    voice  What an expert predicts counts as well, in a mixture of probabilities as in cBTM (Gururangan et
           al., 2023, arXiv:2303.14177). Its share is its gate times a strength that is zero at first and is
           learned, and the base has the rest. Where shares would come to more than 1 they are divided by
           their sum. What experts would have that are not chosen goes to those that are.

Of the experts that a token asks for, `top_k` and `threshold` keep some. An expert that no token of a
sequence asks for is not run. In generation it runs when a token asks for it, over all tokens that it has
missed, so that a cache changes no result. Dimensions as in model.py; S tokens so far, the T new ones last; n
experts.
"""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F

from layers.contract import PADDING, Counted, captured
from layers.heads import KVCache, attend
from layers.loss import log_mixture, log_p
from layers.positions import POSITIONS
from layers.registry import ATTENTIONS
from layers.spec import by_layer
from model import GPT, Cache, GPTConfig, count, flops, generator_of

ROUTES = ('token', 'text')
NAME = re.compile(r'[A-Za-z0-9_-]+')  # of an expert: its file, and what its weights are called


class ExpertHead(NamedTuple):
    """Where one head reads its key and its value: (expert, depth in blocks of the expert, head)."""

    key: tuple[str, int, int]
    value: tuple[str, int, int]


class Read(NamedTuple):
    """Where the base reads its experts: after its layer `layer`, by its last `heads` heads, each expert after
    `depth` of the expert's blocks (0: after the same share of them as the base has passed)."""

    layer: int
    heads: int
    depth: int = 0

    def __str__(self):
        depth = f', depth={self.depth}' if self.depth else ''
        return f'{self.layer}(heads={self.heads}{depth})'


def parse_reads(text: str, n_layer: int, n_head: int) -> list[Read]:
    """'3 5(heads=2, depth=4)' -> [Read(3, n_head // 2), Read(5, 2, 4)]; '' is two layers of the upper half.
    ValueError where a word cannot be read, or names no layer of the base."""
    words = re.findall(r'(?:[^\s()]|\([^()]*\)|[()])+', text)
    reads = []
    for word in words or map(str, sorted({n_layer // 2, n_layer - 1})):
        found = re.fullmatch(r'(\d+)(?:\((.*)\))?', word)
        options = re.findall(r'(\w+)\s*=\s*(\d+)', (found and found[2]) or '')
        spelled = ', '.join(f'{name}={value}' for name, value in options)
        if not found or re.sub(r'[\s,]', '', found[2] or '') != re.sub(r'[\s,]', '', spelled):
            raise ValueError(
                f'reads={text!r}: {word!r} cannot be read; write layers of the base, with options in '
                "parentheses, as in '3 5(heads=4, depth=6)'"
            )
        given = {name: int(value) for name, value in options}
        if unknown := given.keys() - {'heads', 'depth'}:
            raise ValueError(f'reads={text!r}: {min(unknown)!r} is no option; there are heads and depth')
        read = Read(int(found[1]), given.get('heads', max(1, n_head // 2)), given.get('depth', 0))
        if read.layer >= n_layer:
            raise ValueError(f'reads={text!r}: the base has layers 0 to {n_layer - 1}')
        if not 1 <= read.heads <= n_head:
            raise ValueError(f'reads={text!r}: heads={read.heads}, but the base has 1 to {n_head}')
        reads.append(read)
    if any(after.layer <= before.layer for before, after in pairwise(reads)):
        raise ValueError(f'reads={text!r}: name each layer once, the lowest first')
    return reads


@dataclass(frozen=True)
class Expert:
    """One expert of a composed model."""

    name: str
    fingerprint: str  # of its weights, see runs/parts.py
    config: GPTConfig

    def __post_init__(self):
        if isinstance(self.config, dict):  # as a checkpoint has it
            object.__setattr__(self, 'config', GPTConfig(**self.config))


@dataclass(frozen=True)
class ComposedConfig(GPTConfig):
    """The fields of GPTConfig are the base's; what does not fit together is refused here."""

    base: str = ''  # fingerprint of the base's weights
    experts: tuple[Expert, ...] = ()
    reads: str = ''  # where the base reads its experts, see parse_reads; '' = two layers of the upper half
    top_k: int = 0  # experts that a token may have; 0 = all
    threshold: float = 0.0  # a gate below this asks for nothing
    route: str = 'token'  # who chooses: token (each for itself) | text (the mean score so far)
    voice: bool = False  # whether what the experts predict counts too; models from before there was this: no

    def __post_init__(self):
        super().__post_init__()
        experts = tuple(Expert(**e) if isinstance(e, dict) else e for e in self.experts)
        object.__setattr__(self, 'experts', experts)
        names = [expert.name for expert in experts]
        if not experts:
            raise ValueError('a composed model needs experts: compose.py makes one of a base and its experts')
        for name in names:
            if not NAME.fullmatch(name) or name == 'base':
                raise ValueError(f'expert {name!r}: a name has letters, digits, _ and -, and is not "base"')
            if names.count(name) > 1:
                raise ValueError(f'{names.count(name)} experts are called {name!r}: name them apart')
        if not 0 <= self.top_k <= len(experts):
            raise ValueError(f'top_k={self.top_k}: from 1 to {len(experts)} experts, or 0 for all')
        if not 0 <= self.threshold < 1:
            raise ValueError(f'threshold={self.threshold:g}: at least 0 and below 1')
        if self.route not in ROUTES:
            raise ValueError(f'route={self.route!r} is unknown: one of {", ".join(ROUTES)}')
        reads = parse_reads(self.reads, self.n_layer, self.n_head)
        object.__setattr__(self, 'reads', ' '.join(map(str, reads)))
        words = [word for word, _, _ in by_layer(self.attention, self.n_layer)]
        for read in reads:
            if not ATTENTIONS[words[read.layer].name].plan:
                raise ValueError(
                    f'reads={self.reads!r}: layer {read.layer} of the base is {words[read.layer]}, which has '
                    'no queries to ask with; read at another layer'
                )
        for expert in experts:
            c = expert.config
            for name in ('vocab_size', 'vocab_used'):
                if getattr(c, name) != getattr(self, name):
                    raise ValueError(
                        f'expert {expert.name!r} has {name}={getattr(c, name)}, the base '
                        f'{getattr(self, name)}: all parts must have the same tokens'
                    )
            if c.block_size < self.block_size:
                raise ValueError(
                    f'expert {expert.name!r} has block_size={c.block_size}, the base {self.block_size}: '
                    "an expert's context must be at least as long"
                )
            for read in reads:
                if read.depth > c.n_layer:
                    raise ValueError(
                        f'reads={self.reads!r}: depth={read.depth}, but expert {expert.name!r} has '
                        f'{c.n_layer} blocks'
                    )

    @property
    def selective(self) -> bool:
        """Whether some experts may not be asked for."""
        return 0 < self.top_k < len(self.experts) or self.threshold > 0

    def read_list(self) -> list[Read]:
        return parse_reads(self.reads, self.n_layer, self.n_head)

    def plan(self, expert: Expert) -> dict[int, list[ExpertHead | None]]:
        """For each layer that reads, what each head of the base reads of the expert, in the language of head
        plans: (key, value) with sources (expert, depth, head), the depth in blocks of the expert and the
        head among those that are projected there; None for a head that reads nothing."""
        table: dict[int, list[ExpertHead | None]] = {}
        for read in self.read_list():
            depth = read.depth or max(1, round((read.layer + 1) * expert.config.n_layer / self.n_layer))
            sources = [(expert.name, depth, i) for i in range(read.heads)]
            table[read.layer] = [None] * (self.n_head - read.heads) + [ExpertHead(s, s) for s in sources]
        return table


class Gate(nn.Module):
    """How much each token asks for an expert: a score, whose sigmoid is the gate."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_embd))
        self.bias = nn.Parameter(torch.zeros(()))

    def init_own(self, generator):
        self.weight.normal_(0.0, 0.02, generator=generator)
        self.bias.zero_()

    def forward(self, x):
        """The normed stream x (B, T, C) -> (B, T)"""
        return (x * self.weight).sum(-1) + self.bias


class Reading(Counted):
    """What heads of one layer of the base read of one expert."""

    def __init__(self, config: ComposedConfig, width: int, row: list[ExpertHead | None]):
        """width: of the expert's stream; row: of ComposedConfig.plan."""
        super().__init__()
        self.asking = [h for h, head in enumerate(row) if head is not None]
        _, self.depth, _ = row[self.asking[0]].key
        self.head_size, self.rotation = config.head_size, POSITIONS[config.position].rotation
        self.qk_norm = config.qk_norm
        rows = len(self.asking) * self.head_size
        self.c_kv = nn.Linear(width, 2 * rows, bias=config.bias)
        self.c_kv.matrix_rows = [rows, rows]
        self.c_proj = nn.Linear(rows, config.n_embd, bias=config.bias)
        self.c_same = nn.Linear(width, config.n_embd, bias=False)

    def init_own(self, generator):
        self.c_kv.weight.normal_(0.0, 0.02, generator=generator)
        self.c_proj.weight.zero_()
        self.c_same.weight.zero_()
        for linear in (self.c_kv, self.c_proj):
            if linear.bias is not None:
                linear.bias.zero_()

    def project(self, states, pos, T: int):
        """The expert's stream (B, S, width) at positions pos (B or 1, S) -> keys and values that the base's
        heads may read, (B, heads, S, hs) each, and what the last T tokens get of their own (B, T, n_embd)."""
        states = F.rms_norm(states, states.shape[-1:])
        kv = self.c_kv(states).unflatten(2, (-1, self.head_size)).transpose(1, 2)  # (B, 2 heads, S, hs)
        k, v = kv.chunk(2, dim=1)
        k = F.rms_norm(k, k.shape[-1:]) if self.qk_norm else k
        return self.rotation(pos, self.head_size)(k), v, self.c_same(states[:, -T:])

    def forward(self, q, k, v, same, mask):
        """The base's queries q (B, n_head, T, hs), and k, v, same of project -> (B, T, n_embd); mask: of
        Memory."""
        y = attend(q[:, self.asking[0] :], k, v, mask)  # (B, heads, T, hs): the last heads ask
        return self.c_proj(y.transpose(1, 2).flatten(2)) + same

    def flops_per_token(self, T: int) -> int:
        return 2 * 2 * T * len(self.asking) * self.head_size


class Joint(nn.Module):
    """All that joins one expert to the base."""

    def __init__(self, config: ComposedConfig, expert: Expert):
        super().__init__()
        self.gate = Gate(config.n_embd)
        self.reads = nn.ModuleDict(
            {
                str(layer): Reading(config, expert.config.n_embd, row)
                for layer, row in config.plan(expert).items()
            }
        )
        self.depth = max(read.depth for read in self.reads.values())  # blocks of the expert that are run
        if config.voice:
            self.depth, self.strength = expert.config.n_layer, nn.Parameter(torch.zeros(()))

    def init_own(self, generator):
        for strength in self.parameters(recurse=False):
            strength.zero_()

    def counted_strength(self):
        """A strength below 0 counts as 0, but keeps its gradient, so that it finds its way back."""
        return self.strength + (self.strength.clamp(min=0) - self.strength).detach()

    def backward_flops_per_token(self, T: int) -> int:
        """The expert's stream gets no gradient, so that of c_kv and c_same only the weights have one."""
        return sum(
            flops(nn.ModuleList([read.c_kv, read.c_same]), T)
            + 2 * flops(read.c_proj, T)
            + read.backward_flops_per_token(T)
            for read in self.reads.values()
        )


class Router(nn.Module):
    """Keeps the gates of the experts that are chosen."""

    def __init__(self, config: ComposedConfig):
        super().__init__()
        self.top_k = config.top_k if config.top_k < len(config.experts) else 0
        self.threshold, self.route = config.threshold, config.route

    @torch.no_grad()
    def chosen(self, scores, T: int, real=None):
        """Scores of all tokens so far (B, S, n) -> whether the last T ask for an expert (B, T, n)."""
        if self.route == 'text':
            counts = torch.ones_like(scores[..., :1]) if real is None else real[..., None].to(scores.dtype)
            scores = (scores * counts).cumsum(1) / counts.cumsum(1).clamp(min=1)
        scores = scores[:, -T:]
        keep = scores.sigmoid() >= self.threshold
        if self.top_k:
            best = scores.topk(self.top_k, dim=-1).indices
            keep &= torch.zeros_like(keep).scatter(2, best, True)
        return keep if real is None else keep & real[:, -T:, None]

    def forward(self, scores, T: int, real=None):
        """Arguments as of chosen -> the gates of the last T tokens (B, T, n), 0 where they do not ask."""
        gates = scores[:, -T:].sigmoid()
        return torch.where(self.chosen(scores, T, real), gates, torch.zeros_like(gates))


class ExpertCache(Cache):
    """What generation keeps of one expert: its own state, and behind that the keys and values which the base
    reads, by layer of the base."""

    def __init__(self, own: Cache, read: dict[str, KVCache]):
        super().__init__([*own.layers, *read.values()])
        self.read = read


class ComposedCache(Cache):
    """The base's state; of all tokens so far what an expert needs that runs later: ids, positions, scores;
    and the states of the experts that have run, which hold as many tokens as those have seen."""

    def __init__(self, model: Composed, B: int):
        super().__init__(GPT.new_cache(model, B).layers)
        self.model, self.B = model, B
        c, (self.device, self.dtype) = model.config, model.cache_type()
        self.tokens, self.pos = (
            torch.empty(B, c.block_size, dtype=torch.int64, device=self.device) for _ in range(2)
        )
        wide = torch.promote_types(self.dtype, torch.float32)
        self.scores = torch.empty(B, c.block_size, len(c.experts), dtype=wide, device=self.device)
        self.experts: dict[str, ExpertCache] = {}

    def remember(self, idx, pos, scores):
        """Keep ids (B, T), positions (B or 1, T) and scores (B, T, n) of new tokens -> the scores of all
        tokens so far (B, S, n)."""
        start, end = self.length, self.length + idx.size(1)
        self.tokens[:, start:end], self.pos[:, start:end] = idx, pos
        self.scores[:, start:end] = scores
        return self.scores[:, :end]

    def expert(self, name: str) -> ExpertCache:
        """The state of an expert; an empty one where it has not run yet."""
        if name not in self.experts:
            size, read = self.model.config.block_size, {}
            for layer, reading in self.model.joints[name].reads.items():
                heads = len(reading.asking)
                read[layer] = KVCache(self.B, heads, heads, size, reading.head_size, self.device, self.dtype)
            self.experts[name] = ExpertCache(self.model.experts[name].new_cache(self.B), read)
        return self.experts[name]

    @property
    def rewinds(self) -> bool:
        """Whether this state can, with every expert that it may still come to hold."""
        blocks = (block for expert in self.model.experts.values() for block in expert.transformer.h)
        return super().rewinds and all(
            block.attn.new_cache(1, 1, 'meta', self.dtype).rewinds for block in blocks
        )

    def rewind(self, length: int):
        super().rewind(length)
        for expert in self.experts.values():
            if expert.length > length:
                expert.rewind(length)

    def select(self, rows):
        super().select(rows)
        self.tokens, self.pos, self.scores = self.tokens[rows], self.pos[rows], self.scores[rows]
        self.B = len(rows)
        for expert in self.experts.values():
            expert.select(rows)


class Offer(NamedTuple):
    """What an expert that was run has for the base, in one pass."""

    joint: Joint
    gate: torch.Tensor  # (sequences, T, 1)
    rows: torch.Tensor | None  # the sequences of the batch that it was run on; None: all
    read: dict[str, tuple]  # layer of the base -> what Reading.project has for it
    said: torch.Tensor | None  # what the expert's head reads (sequences, T, width); None without voices


@contextlib.contextmanager
def beside(device: torch.device):
    """What is computed inside runs on a CUDA stream of its own, which is given: experts do not wait for each
    other, so that small ones fill a GPU together. None, and nothing special, on other devices and in
    training, where the backward pass would have to be joined too."""
    if device.type != 'cuda' or torch.is_grad_enabled() or torch.compiler.is_compiling():
        yield None
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # its inputs are made there
    with torch.cuda.stream(stream):
        yield stream


def wait_for(stream, read: dict[str, tuple], said):
    """Have the current stream wait for one of `beside`, where `read` and `said` (as of Offer) were made."""
    if stream is None:
        return
    current = torch.cuda.current_stream(stream.device)
    current.wait_stream(stream)
    for tensor in (tensor for tensors in (*read.values(), (said,)) for tensor in tensors):
        if tensor is not None:
            tensor.record_stream(current)  # its memory is not given away while the current stream reads it


class Composed(GPT):
    """The base's weights have the names that they have in a GPT; experts.NAME is an expert's GPT, joints.NAME
    what joins it. Only the joints are trained, and only they are in a checkpoint: base and experts have files
    of their own (runs/parts.py)."""

    config: ComposedConfig
    config_class = ComposedConfig
    part_class = GPT  # of the experts
    apart = ('transformer.', 'lm_head.', 'experts.')
    steps = False  # experts have caches of their own, and a router of who is asked

    def __init__(self, config: ComposedConfig, seed: int | None = None):
        """seed: of the joints' initial values; the parts wait for their weights."""
        super().__init__(config, seed)
        self.experts = nn.ModuleDict({e.name: self.part_class(e.config, seed=0) for e in config.experts})
        self.requires_grad_(False)
        self.joints = nn.ModuleDict({e.name: Joint(config, e) for e in config.experts})
        self.router = Router(config)
        self.first_read = config.read_list()[0].layer
        parts = [self, *self.experts.values()]
        self.context_limit = min(part.context_limit for part in parts)
        self.padding = min((part.padding for part in parts), key=PADDING.index)
        self.init_joints(int(torch.randint(2**62, (), device='cpu')) if seed is None else seed)

    @torch.no_grad()
    def init_joints(self, seed: int):
        if self.lm_head.weight.is_meta:
            return
        for name, module in self.joints.named_modules():
            if hasattr(module, 'init_own'):
                module.init_own(generator_of(seed, f'joints.{name}'))

    def train(self, mode: bool = True):
        """Dropout is never on in the parts, which do not train."""
        super().train(mode)
        self.transformer.eval()
        self.experts.eval()
        return self

    def describe(self) -> str:
        c = self.config
        chosen = f'top_k {c.top_k}, threshold {c.threshold:g}, route {c.route}'
        lines = [super().describe(), f'reads {c.reads}, {chosen}{", with voices" * c.voice}']
        for name, fingerprint in [('base', c.base), *((e.name, e.fingerprint) for e in c.experts)]:
            lines.append(f'{name} {fingerprint[:12]}')
        return '\n'.join(lines)

    def summary(self) -> str:
        c = self.config
        names = ', '.join(e.name for e in c.experts)
        layers = ', '.join(str(read.layer) for read in c.read_list())
        return (
            f'{c.attention}, {c.n_layer} layers, {c.n_embd} wide, with {len(c.experts)} experts ({names}) '
            f'that layers {layers} read{" and that speak" * c.voice}, '
            f'{self.num_params() / 1e6:.2f}M parameters, of which '
            f'{count(self.joints) / 1e6:.2f}M join them'
        )

    def parts(self) -> dict[str, int]:
        experts = {f'expert {name}': count(expert) for name, expert in self.experts.items()}
        return super().parts() | experts | {f'joint {n}': count(joint) for n, joint in self.joints.items()}

    def hidden(
        self, idx, cache: ComposedCache | None = None, pos=None, real=None, streams=None, weights=None
    ):
        """As GPT.hidden; with voices to that come (in the last dimension) what the head of each expert reads,
        zeros where a token does not ask for it, and gates and scores of all. Who wants to look into the base
        gives lists: streams gets what each block reads, weights who looks at whom, as in Memory."""
        x, memory = self.embed(idx, cache, pos, real)
        memory.weights = weights
        if pos is None:
            start = cache.length if cache is not None else 0
            pos = torch.arange(start, start + idx.size(1), device=idx.device)[None]  # (1, T)
        offers = []
        for i in range(len(self.transformer.h)):
            if i == self.first_read:
                gates, scores = self.ask(x, idx, cache, pos, real)
                offers = self.consult(gates, idx, cache, pos, real)
            if streams is not None:
                streams.append(x)
            x = self.block(i, x, memory, cache)
            for offer in offers:
                if str(i) in offer.read:
                    x = self.read(i, x, memory, offer)
        if cache is not None:
            cache.length += idx.size(1)
        x = self.transformer.ln_f(x)
        return self.beside_voices(x, gates, scores, offers) if self.config.voice else x

    def beside_voices(self, x, gates, scores, offers: list[Offer]):
        """What the base's head reads x (B, T, n_embd), gates and scores as ask gives them -> (B, T, n_embd +
        width of each expert + 2 n)"""
        parts, ran = [x], {offer.joint: offer for offer in offers}
        for joint, expert in zip(self.joints.values(), self.experts.values(), strict=True):
            offer, silent = ran.get(joint), x.new_zeros(*x.shape[:2], expert.config.n_embd)  # (B, T, width)
            if offer is None:
                parts.append(silent)
                continue
            said = offer.said.type_as(x)
            if self.config.selective:  # a sequence may have tokens that do not ask
                said = said * (offer.gate > 0)
            parts.append(said if offer.rows is None else silent.index_copy(0, offer.rows, said))
        return torch.cat([*parts, gates.type_as(x), scores.type_as(x)], dim=2)

    def split(self, hidden):
        """What beside_voices gives (..., C) -> what the base's head reads; what each expert's reads; which
        tokens ask for it, each a mask (...), or None for all; shares (n + 1, ...) of the base and all experts
        in what is predicted, whose sum is 1."""
        n, exact = len(self.joints), torch.promote_types(hidden.dtype, torch.float32)
        widths = [self.config.n_embd, *(expert.config.n_embd for expert in self.experts.values())]
        own, *said, gates, scores = hidden.split([*widths, n, n], dim=-1)
        said = [h.detach() for h in said]  # experts are frozen
        strengths = torch.stack([joint.counted_strength() for joint in self.joints.values()]).to(exact)
        of_all = scores.to(exact).sigmoid() * strengths  # (..., n)
        shares = of_all * (gates > 0) if self.config.selective else of_all
        given, wanted = (each.sum(-1, keepdim=True) for each in (shares, of_all))  # (..., 1)
        factor = wanted.clamp(max=1) / given.clamp(min=torch.finfo(exact).tiny)
        shares = shares * torch.where(given > 0, factor, torch.ones_like(factor))
        rest = (1 - shares.sum(-1, keepdim=True)).clamp(min=0)
        who = (gates > 0).unbind(-1) if self.config.selective else [None] * n
        return own, said, who, torch.cat([rest, shares], dim=-1).movedim(-1, 0)

    def logits(self, hidden, vocab: int | None = None):
        """As GPT.logits; with voices the log-probabilities of the mixture, where an expert has a share. Those
        of less than the smallest number that is not 0 are rounded up to it."""
        if not self.config.voice:
            return super().logits(hidden, vocab)
        own, said, asks, shares = self.split(hidden)
        own = super().logits(own.contiguous(), vocab)  # products of a cut would be rounded in another way
        exact = torch.promote_types(own.dtype, torch.float32)
        rest, *shares = shares.to(exact)[..., None]  # (..., 1) each
        p = rest * own.softmax(-1, dtype=exact)
        for expert, h, who, share in zip(self.experts.values(), said, asks, shares, strict=True):
            if who is None:
                p = torch.addcmul(p, share, expert.logits(h, vocab).softmax(-1, dtype=exact))
                continue
            rows, h = who.flatten().nonzero().squeeze(1), h.flatten(0, -2)  # (tokens that ask), (N, width)
            if len(rows):
                found = share.flatten(0, -2)[rows] * expert.logits(h[rows], vocab).softmax(-1, dtype=exact)
                p = p.flatten(0, -2).index_add(0, rows, found).view_as(p)  # (N, V) for a moment
        log_p = p.clamp(min=torch.finfo(exact).tiny).log()
        return torch.where(rest == 1, own.to(exact), log_p)

    def loss(self, hidden, targets, vocab: int | None = None):
        """As GPT.loss."""
        if not self.config.voice:
            return super().loss(hidden, targets, vocab)
        hidden, targets = hidden.flatten(0, -2), targets.flatten()  # (N, C), (N,)
        counted = targets != -1
        labels = targets.masked_fill(~counted, 0)
        own, said, asks, shares = self.split(hidden)
        found = []
        for part, h, who in zip([self, *self.experts.values()], [own, *said], [None, *asks], strict=True):
            weight, softcap = part.head(vocab), part.config.softcap
            if who is None:
                found.append(log_p(h, weight, labels, softcap))
            else:
                of_all = torch.full_like(found[0], -math.inf)
                found.append(of_all.index_put([who], log_p(h[who], weight, labels[who], softcap)))
        mixed = log_mixture(torch.stack(found), shares.to(found[0].dtype))  # (N,)
        return -mixed.masked_fill(~counted, 0).sum() / counted.sum()

    def ask(self, x, idx, cache, pos, real):
        """The stream x (B, T, C) that enters the first layer which reads -> gates (B, T, n), 0 where a token
        does not ask for an expert; and the scores of all experts, likewise."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = F.rms_norm(x, x.shape[-1:])
        scores = torch.stack([joint.gate(x) for joint in self.joints.values()], dim=2)  # (B, T, n)
        of_all = scores if cache is None else cache.remember(idx, pos, scores)  # (B, S, n)
        return self.router(of_all, idx.size(1), real), scores

    def consult(self, gates, idx, cache, pos, real) -> list[Offer]:
        """Run the experts that some token asks for, each on the sequences whose tokens do; with a cache, on
        all, over all tokens that it has not seen."""
        if self.config.selective and captured():
            raise ValueError(
                f'top_k={self.config.top_k}, threshold={self.config.threshold:g}: which experts run depends '
                'on the tokens, and a graph has one way for all; compose with --top_k=0 --threshold=0'
            )
        asking = (gates > 0).any(dim=1).T.tolist() if self.config.selective else None  # [n][B]; None: all do
        offers, running = [], []
        for e, (name, joint) in enumerate(self.joints.items()):
            asks = None if asking is None or all(asking[e]) else asking[e]  # [B]; None: all do
            if asks is not None and not any(asks):
                continue
            gate, rows, own = gates[:, :, e, None], None, None
            ids, at, there = idx, pos, real
            if cache is not None:
                own, end = cache.expert(name), cache.length + idx.size(1)
                ids, at = cache.tokens[:, own.length : end], cache.pos[:, own.length : end]
            elif asks is not None:
                rows = torch.tensor([b for b, does in enumerate(asks) if does], device=idx.device)
                ids, gate, at = idx[rows], gate[rows], pos if pos.size(0) == 1 else pos[rows]
                there = None if real is None else real[rows]
            inputs = (ids, at, there)
            with beside(idx.device) as stream:
                read, said = self.run(name, idx.size(1), *inputs, own)
            running.append((stream, inputs))  # whose memory is not to be given away before it is read
            offers.append(Offer(joint, gate, rows, read, said))
        for (stream, _), offer in zip(running, offers, strict=True):
            wait_for(stream, offer.read, offer.said)
        return offers

    def run(self, name: str, T: int, idx, pos, real, cache: ExpertCache | None = None) -> tuple:
        """Run an expert on ids idx at positions pos, which it has not seen and of which the last T are new to
        the base -> ({layer of the base: what Reading.project has for it}, what the expert's own head reads of
        the last T, or None without voices)."""
        expert, joint = self.experts[name], self.joints[name]
        x, memory = expert.embed(idx, cache, pos, real)
        read = {}
        for i in range(joint.depth):
            x = expert.block(i, x, memory, cache)
            for layer, reading in joint.reads.items():
                if reading.depth == i + 1:
                    k, v, same = reading.project(x, pos, T)
                    k, v = (k, v) if cache is None else cache.read[layer].append(k, v)
                    read[layer] = k, v, same
        if cache is not None:
            cache.length += idx.size(1)
        return read, expert.transformer.ln_f(x[:, -T:]) if self.config.voice else None

    def read(self, i: int, x, memory, offer: Offer):
        """The base's stream x (B, T, C) after layer i, with what its heads read of an expert."""
        q, mask, rows = memory.queries, memory.mask, offer.rows
        if rows is not None:
            q, mask = q[rows], None if mask is None else mask[rows]
        y = offer.joint.reads[str(i)](q, *offer.read[str(i)], mask)  # (sequences, T, C)
        y = (offer.gate * y).type_as(x)
        return x + y if rows is None else x.index_add(0, rows, y)

    def flops_per_token(self, T: int | None = None, backward: bool = True) -> float:
        """FLOPs per token of one pass over sequences of T tokens (default block_size), as `flops` counts,
        where top_k experts are run (all, if top_k is 0): tokens that disagree have more of them run, and a
        threshold fewer. The backward pass is that of training the joints: frozen weights get no gradient, and
        nothing below the first layer that reads takes part."""
        T, blocks = T or self.config.block_size, self.transformer.h
        per_expert = [
            flops(self.experts[name].transformer.h[: joint.depth], T)
            + (flops(self.experts[name].lm_head, T) if self.config.voice else 0)
            + (flops(joint, T) + joint.backward_flops_per_token(T) if backward else flops(joint, T))
            for name, joint in self.joints.items()
        ]
        run = self.router.top_k or len(per_expert)
        total = flops(self.transformer, T) + flops(self.lm_head, T)
        if backward:
            # frozen linear layers have the gradient of their input alone, as much as the forward pass
            above = blocks[self.first_read + 1 :]
            linear = flops(above, T) - sum(block.attn.flops_per_token(T) for block in above)
            total += linear + sum(block.attn.backward_flops_per_token(T) for block in above)
            total += flops(self.lm_head, T)
        return total + run * sum(per_expert) / len(per_expert)

    def cache_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes of generation state that one more token of one sequence costs, where top_k experts are run
        (all, if top_k is 0), beside its id, its position and its scores."""
        per_expert = []
        for name, joint in self.joints.items():
            read = sum(2 * len(r.asking) * r.head_size * itemsize for r in joint.reads.values())
            per_expert.append(self.experts[name].cache_bytes_per_token(itemsize) + read)
        run = self.router.top_k or len(per_expert)
        own = 16 + 4 * len(per_expert)
        return round(super().cache_bytes_per_token(itemsize) + own + run * sum(per_expert) / len(per_expert))

    def state_bytes(self, itemsize: int = 2) -> int:
        return super().state_bytes(itemsize) + sum(e.state_bytes(itemsize) for e in self.experts.values())

    def new_cache(self, B: int) -> ComposedCache:
        return ComposedCache(self, B)
