"""The fields of the models' configs. They are declared here once: the models' configs, the trainer's knobs
and transformers' configs all inherit or copy them. This module imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass

from layers.spec import canonical


@dataclass(frozen=True)
class GPTShape:
    # model
    block_size: int = 1024  # longest context, in tokens
    n_layer: int = 6  # blocks
    n_head: int = 8  # attention heads per layer
    n_embd: int = 768  # width of the residual stream, a multiple of n_head
    dropout: float = 0.0  # on embeddings, attention weights and the outputs of attention and MLP
    bias: bool = False  # biases in linear layers and layernorms (an rmsnorm has none)
    attention: str = (
        'vanilla'  # a name of layers/registry.py, or by layer: 'leap(window=64)*4 reflex(4-2-2)*2'
    )
    head_split: str = (
        ''  # older spelling: attention='reflex', head_split='5-2-1' is attention='reflex(5-2-1)'
    )
    windows: str = ''  # older spelling: attention='leap', windows='global' is attention='leap(global)'
    norm: str = 'layernorm'  # layernorm | rmsnorm, before each half of a block and before the head
    mlp: str = 'gelu'  # gelu | gelu_tanh (GPT-2's approximation of it) | relu2 | swiglu, all of like size
    mlp_hidden: int = 0  # hidden size of the MLP, or of the one that swiglu is as large as; 0 = 4 n_embd
    position: str = 'learned'  # learned (a table) | rotary (queries and keys are turned) | none
    qk_norm: bool = False  # an rmsnorm per head on queries and keys
    x0_skip: bool = False  # a block's input is a learned mix of the stream and the token's embedding
    softcap: float = (
        0.0  # logits are kept within ± this, by softcap * tanh(logits / softcap); 0 = as they are
    )
    tied: bool = True  # the head's weight is the token table; false = it has one of its own

    def __post_init__(self):
        """attention gets its one canonical spelling; the older ones are folded into it. ValueError."""
        settled = canonical(self.attention, self.head_split, self.windows)
        for name, value in {'attention': settled, 'head_split': '', 'windows': ''}.items():
            object.__setattr__(self, name, value)  # of this instance, which is being made


@dataclass(frozen=True)
class HierarchyShape(GPTShape):
    """GPTShape's fields describe the latent stack (dropout and the kinds of norm, MLP and position: all
    blocks);
    these describe the way there and back. Lists run from tokens to the last level, as in '64-128-256'."""

    # hierarchy (model='hierarchy')
    groups: int = 16  # groups per sequence: block_size / groups tokens each
    latents: str = '16-2'  # latents per group, at level 1, level 2, ...
    widths: str = '64-128-768'  # width of tokens, of level 1, level 2, ...; the last one is n_embd
    compression: str = (
        'perceiver'  # perceiver (a group's last tokens attend to all of it) | transformer (blocks)
    )
    compress_blocks: int = 2  # blocks before every level when compression='transformer'
    local_blocks: str = (
        '1'  # blocks that see one group: one number for every length, or a list such as '1-2-0'
    )
    global_blocks: str = '1'  # blocks that see all groups: likewise
    block_order: str = (
        'interleaved'  # interleaved (local, global, local, ...) | serial (the local blocks first)
    )
    upsample: str = 'repeat'  # latents become tokens by: repeat | attention (repeat, then attend to them)
    skip: str = 'sum'  # how the encoder's stream joins the decoder's: sum | interpolate (learned shares)
    dense: bool = False  # DenseFormer: the input of a latent block is a learned sum of all earlier outputs
    channels: int = 1  # channels of a multi-channel block of the latent stack; 1 = plain blocks
    channel_every: int = 1  # every N-th block of the latent stack is a multi-channel block
    channel_mlp: float = 1.0  # hidden size of a channel's own MLP, in units of 4 n_embd / channels
    channel_shared_kv: bool = False  # all channels share one set of keys and values
    channel_shared_mlps: int = 0  # MLPs that every channel uses beside its own
    channel_merge: str = 'softmax'  # how channels are merged, elementwise: softmax | max | mean
    latent_loss: float = (
        0.0  # weight of the next-latent loss; ramps up linearly over the first 20 % of training
    )
