"""A token at a time in fixed shapes: what is compiled once, or captured once as a CUDA graph, and then
repeated.

A pass over one token is hundreds of small operations, and starting them takes longer than computing them.
Here the cache is whole from the start, the token and its place are data, and every operation has the same
shapes for each token: `step(token, position) -> logits`. torch.compile makes one program of it (10 to 60
seconds on a CPU); on a GPU it is captured as a CUDA graph, together with the drawing of the token.
"""

from __future__ import annotations

import copy
import warnings
from types import FunctionType

import torch
import torch.nn as nn
from torch.nn import functional as F

from generation import Sampling, draw, no_dropout
from layers.loss import soft_capped

CPU_PLACES = 128  # a step looks at a multiple of so many places of the cache; one program serves them all
GPU_PLACES = 256  # … or at 1, 2, 4, 8, … times as many: each is a graph


def way(steps: bool, device_type: str, compile: bool) -> str:
    """How the tokens after the first are best computed: 'captured' (a CUDA graph), 'compiled', or 'plain',
    pass by pass. steps: whether all layers of the model take a token in fixed shapes; compile: whether that
    was asked for, which also compiles what is captured."""
    if not steps:
        return 'plain'
    if device_type == 'cuda':
        return 'captured'
    return 'compiled' if compile else 'plain'


def places(n: int, most: int, device_type: str) -> int:
    """How many places of a cache of `most` a step looks at that needs n of them."""
    size = GPU_PLACES
    if device_type == 'cuda':
        while size < n:
            size *= 2
    else:
        size = -(-n // CPU_PLACES) * CPU_PLACES
    return min(size, most)


def logits_at(model, head, token, at, where, cache):
    """The step: tokens (B, 1) at the place `at`, a LongTensor (1,) -> logits (B, vocab_size) of the next
    ones.

    head: the weight of lm_head, in the type that the product runs in. The layers of the cache are written in
    place at `at`, and their places `where`, a LongTensor of 0, 1, 2, …, are looked at."""
    hidden = model.hidden_at(token, at, where, cache)[:, 0]  # (B, n_embd)
    return soft_capped(F.linear(hidden.to(head.dtype), head), model.config.softcap).float()


def in_type(model, dtype):
    """(the model, the weight of its head), the weights of linear layers in dtype already: autocast would cast
    them anew for every token. The other weights keep their type, as under autocast."""
    head = model.lm_head.weight
    if dtype == head.dtype:
        return model, head
    copied = copy.deepcopy(model).requires_grad_(False)
    table = copied.transformer.wte.weight
    for module in copied.modules():
        if isinstance(module, nn.Linear) and module.weight is not table:
            module.to(dtype)
    return copied, head.detach().to(dtype)


def compiled_step():
    """logits_at, compiled for one model and one cache. torch keeps what it compiles by the code of a
    function, and checks at each call that it fits, which takes a quarter of a step on a CPU: this one has a
    code of its own, is called with the same model and cache alone, and checks nothing."""
    code = logits_at.__code__.replace(co_name='step')
    own = FunctionType(code, logits_at.__globals__, 'step')
    unchecked = {'guard_filter_fn': lambda guards: [False] * len(guards)}
    return torch.compile(own, fullgraph=True, options=unchecked)


class Decoder:
    """Steps of fixed shapes for B sequences of one model, as its weights are now: `model.stream(...,
    decoder=…)` draws its tokens with it, one stream after the other.

    Raises ValueError where the model has a layer that takes none. A step computes in the type of autocast, if
    that is on when the decoder is made."""

    def __init__(self, model, B: int = 1, compile: bool = False):
        if not model.steps:
            raise ValueError(
                f'attention={model.config.attention!r}: a layer takes no step of fixed shapes; draw '
                'without a decoder'
            )
        device, dtype = model.cache_type()
        self.kind, self.most = device.type, model.config.block_size
        self.dtype = dtype if torch.is_autocast_enabled(device.type) else None
        self.cache = model.new_cache(B, reads=True)
        with torch.no_grad():
            self.model, self.head = in_type(model, dtype)
        self.modules = list(self.model.modules())
        self.token = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.where = torch.arange(self.most, device=device)
        self.run = compiled_step() if compile else logits_at
        self.begun = False
        self.graphs = {}  # (places, sampling, generator) -> (CUDA graph, where it leaves the tokens)

    @torch.no_grad()
    def step(self, token, position: int):
        """Tokens (B, 1) at the place `position` of the cache -> logits (B, vocab_size) of what follows
        them."""
        self.token.copy_(token)
        self.at.fill_(position)
        return self.logits(places(position + 1, self.most, self.kind))

    def logits(self, size: int):
        """Of self.token at self.at."""
        where = self.where[:size]
        if not self.begun and self.most > size > 1:
            torch._dynamo.mark_dynamic(
                where, 0
            )  # the one length that a compiled step must not take for fixed
        self.begun = True
        # without its cache of casts: a graph must not read what is dropped when autocast ends
        low = self.dtype is not None
        cast = torch.autocast(self.kind, dtype=self.dtype, enabled=low, cache_enabled=False)
        with cast, no_dropout(self.modules):
            return self.run(self.model, self.head, self.token, self.at, where, self.cache)

    @torch.no_grad()
    def next(self, token, sampling: Sampling, generator=None):
        """Read the tokens (B, 1) that follow those of the cache -> the next ones (B, 1), -1 where the logits
        are inf or nan. generator: of the draws; None is torch's own."""
        self.token.copy_(token)
        self.at.fill_(self.cache.length)
        size = places(self.cache.length + 1, self.most, self.kind)
        found = self.captured(size, sampling, generator) if self.kind == 'cuda' else None
        if found:
            graph, tokens = found
            graph.replay()
            tokens = tokens.clone()  # the next replay writes there again
        else:
            tokens = draw(self.logits(size), sampling, generator)
        self.cache.rewind(self.cache.length + 1)  # sets the length, which a captured step cannot
        return tokens

    def captured(self, size: int, sampling: Sampling, generator):
        """(CUDA graph, where it leaves its tokens) of a step that looks at `size` places; None where it
        cannot be captured, which is told once."""
        known = size, sampling, generator
        if known not in self.graphs:
            try:
                self.graphs[known] = self.capture(*known)
            except RuntimeError as e:
                warnings.warn(
                    f'no CUDA graph of the step: {e}; tokens are computed without one', stacklevel=4
                )
                self.graphs[known] = None
        return self.graphs[known]

    def capture(self, size: int, sampling: Sampling, generator):
        """Warming up computes the same keys and values at the same place as the step, and draws nothing, so
        that random numbers stay as they are."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.logits(size)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            tokens = draw(self.logits(size), sampling, generator)
        return graph, tokens


def decoder_for(model, B: int = 1, compile: bool = False) -> Decoder | None:
    """A Decoder where the device has a way that is faster than pass by pass, else None; that compile was
    asked for and cannot be is told."""
    found = way(model.steps, model.lm_head.weight.device.type, compile)
    if found == 'plain' and compile:
        warnings.warn('compile: the model has a layer that takes no step of fixed shapes', stacklevel=2)
    return None if found == 'plain' else Decoder(model, B, compile)
