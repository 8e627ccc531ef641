"""What a trained model looks at: a text with its tokens shaded by weight, as a page and as a picture.

    python explain.py --out_dir=out/leap --text="Not every word matters as much as the next."
    python explain.py --out_dir=out/reflex_422 --text=FILE:prompt.txt

Writes OUT_DIR/explain.html (one file, no network: pick layer and head, click a token to see what it reads)
and OUT_DIR/explain.png. LEAP and additive attention have one logit per token and head, and a token reads the
softmax of those in its window. Of other attentions the picture shows what the last token pays to each token,
and the page what any token pays, in texts of up to 128 tokens. Of a composed model they also show which
expert each token asks for, and what the base reads of it.
"""

from __future__ import annotations

import html
import json
import math
import textwrap
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import matplotlib
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from composition import Composed
from configurator import ConfigError, configure, run_program
from data.tokenizer import from_spec
from layers.leap import Mean
from model import GPT
from runs.models import load_model
from runs.text import document_start, read_prompt

matplotlib.use('Agg')  # needs no display
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

ROOT = Path(__file__).resolve().parent
COLUMNS = 100  # characters in a line of the picture
TITLE = 110  # and in a line of a title, which is smaller and in a proportional font
SHADES = ('tab:orange', 'tab:blue', 'tab:green', 'tab:pink', 'tab:olive', 'tab:cyan', 'tab:purple', 'tab:red')
READERS = 128  # tokens of a text up to which the page has what each of them reads: their square, per head


@dataclass(frozen=True)
class Knobs:
    out_dir: str = 'out/leap'  # the folder of a run
    checkpoint: str = ''  # best.pt | last.pt | previous.pt; '' = best.pt if there is one, else last.pt
    text: str = ''  # the text to read, or FILE:prompt.txt
    head: int = -1  # of the picture: a head; -1 = the mean of all


@dataclass(frozen=True)
class View:
    """What one attention looks at. logits: the numbers are logits of all tokens, which every token reads
    through its window (0: all before); else they are the weights that the last token pays. readers: then the
    weights that every token pays to those up to it, unless the text is long. names: the rows are no heads but
    experts of these names, and the numbers are the gates of all tokens, 0 where one does not ask."""

    title: str
    logits: bool
    window: int
    heads: list[list[float]]  # (n_head, T)
    readers: list | None = None  # (n_head, T, 1 to T)
    names: tuple[str, ...] = ()

    def weights(self) -> torch.Tensor:
        """What each token weighs to those that read it, (n_head, T): for logits the mean of its weight over
        all windows that hold it, times their size (1 is what a plain mean gives); else the weights."""
        if not self.logits:
            return torch.tensor(self.heads)
        T = len(self.heads[0])
        age = torch.arange(T)[:, None] - torch.arange(T)
        seen = (age >= 0) & (age < (self.window or T))  # (T, T), reader first
        sizes = seen.sum(1, keepdim=True)
        heads = []
        for logits in torch.tensor(self.heads):
            weights = logits.expand(T, T).masked_fill(~seen, -math.inf).softmax(-1)
            heads.append((weights * sizes).sum(0) / seen.sum(0))
        return torch.stack(heads)


class Watch(TorchFunctionMode):
    """Inside, sees what tokens pay in every scaled dot-product attention; calls see((n_head, T, T))."""

    def __init__(self, see):
        super().__init__()
        self.see = see

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            q, k = (t.float() for t in args[:2])  # (B, n_head, T, head_size)
            kwargs = kwargs or {}
            scale, mask = kwargs.get('scale') or q.size(-1) ** -0.5, kwargs.get('attn_mask')
            scores = (q @ k.mT * scale)[0]  # (n_head, T, T), reader first
            seen = torch.ones_like(scores[0], dtype=torch.bool).tril() if mask is None else mask[0]
            self.see(scores.masked_fill(~seen, -math.inf).softmax(-1))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def look(model, ids: list[int]) -> list[View]:
    """What the model's attentions look at in one text, layer by layer. ids: at most its context."""
    views, layer, reads, hooks = [], 0, '', []

    def enter(module, args, l, what):
        nonlocal layer, reads
        layer, reads = l, what

    def see_gates(router, args, gates):
        names = tuple(model.joints)
        title = f'layer {model.first_read}: which expert each token asks for'
        views.append(View(title, False, 0, gates[0].T.tolist(), names=names))

    def see_logits(mean, args):
        title = f'layer {layer}: {mean.of}, ' + (f'window {mean.window}' if mean.window else 'global')
        views.append(View(title, True, mean.window, args[0][0].tolist()))

    def see_weights(weights):
        if not reads:  # an expert's own
            return
        title, readers = f'layer {layer}: {reads}', None
        weights = weights[:, -len(ids) :, -len(ids) :]  # moda has one key more, in front of the tokens
        if len(ids) <= READERS:
            readers = [[row[: i + 1] for i, row in enumerate(head)] for head in weights.tolist()]
        views.append(View(title, False, 0, weights[:, -1].tolist(), readers))

    for l, block in enumerate(model.transformer.h):
        hooks.append(block.attn.register_forward_pre_hook(partial(enter, l=l, what=block.attn.describe())))
        means = [module for module in block.attn.modules() if isinstance(module, Mean)]
        hooks += [mean.register_forward_pre_hook(see_logits) for mean in means]
    if isinstance(model, Composed):
        hooks.append(model.router.register_forward_hook(see_gates))
        for name, joint in model.joints.items():
            for block in model.experts[name].transformer.h:
                hooks.append(block.attn.register_forward_pre_hook(partial(enter, l=0, what='')))
            for l, reading in joint.reads.items():
                what = f'what heads read of {name} after {reading.depth} of its blocks'
                hooks.append(reading.register_forward_pre_hook(partial(enter, l=int(l), what=what)))
    try:
        with Watch(see_weights):
            model.hidden(torch.tensor([ids], device=model.lm_head.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return views


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds; '' where a character is not whole yet."""
    added, shown = [], ''
    for i in range(len(ids)):
        text = tokenizer.decode(ids[: i + 1])
        ready = text if i == len(ids) - 1 else text.rstrip('\ufffd')
        added.append(ready[len(shown) :])
        shown = ready
    return added


def page(tokens: list[str], views: list[View], about: str) -> str:
    """explain.html with the numbers in it: one file, no network."""

    def rounded(numbers, digits):
        if isinstance(numbers, list):
            return [rounded(x, digits) for x in numbers]
        return None if numbers is None else float(f'{numbers:.{digits}g}')

    shown = [
        {**asdict(view), 'heads': rounded(view.heads, 5), 'readers': rounded(view.readers, 3)}
        for view in views
    ]
    report = json.dumps({'about': about, 'tokens': tokens, 'views': shown}, ensure_ascii=False)
    report = report.replace('<', '\\u003c')  # nothing in it ends the script element
    template = (ROOT / 'explain.html').read_text(encoding='utf-8')
    return template.replace('__ABOUT__', html.escape(about)).replace('__REPORT__', report)


def picture(tokens: list[str], views: list[View], path: Path, head: int = -1):
    """A PNG: the text once per view, in a fixed-width font, tokens shaded by weight (see View.weights)."""
    places, column, line = [], 0, 0  # of every token
    for token in tokens:
        width = len(shown(token))
        if column and column + width > COLUMNS:
            column, line = 0, line + 1
        places.append((column, line, width))
        column += width
        if token.endswith('\n'):
            column, line = 0, line + 1
    lines = line + 1
    shades = [shades_of(view, head) for view in views]
    # in lines: the titles, the texts, and one empty between views
    height = sum(len(titles) for _, _, titles in shades) + len(views) * (lines + 1) - 0.5
    fig = plt.figure(figsize=(COLUMNS * 0.07, height * 0.18), dpi=150)  # what 8 points need
    axes = fig.add_axes((0.01, 0, 0.98, 1), xlim=(0, COLUMNS), ylim=(height, 0))
    axes.axis('off')
    top = 0
    for colours, alphas, titles in shades:
        for title in titles:
            axes.text(0, top + 0.5, title, fontsize=7, color='dimgray', va='center', parse_math=False)
            top += 1
        for token, colour, alpha, (x, y, width) in zip(tokens, colours, alphas, places, strict=True):
            axes.add_patch(Rectangle((x, top + y), width, 1, color=colour, alpha=alpha, linewidth=0))
            for i, character in enumerate(shown(token)):
                where = {'va': 'center', 'ha': 'center', 'family': 'monospace', 'parse_math': False}
                axes.text(x + i + 0.5, top + y + 0.5, character, fontsize=8, **where)
        top += lines + 1
    fig.savefig(path)
    plt.close(fig)


def shades_of(view: View, head: int) -> tuple[list[str], list[float], list[str]]:
    """How the picture shows a view: the colour of each token, how full it is, from 0 to 1, and the lines of
    the title, with what the shades mean."""
    weights = view.weights()
    rows = weights.argmax(0).tolist() if view.names else [0] * weights.size(1)
    one = 0 <= head < len(weights) and not view.names
    weights = weights.amax(0) if view.names else weights[head] if one else weights.mean(0)
    most = float(weights.max()) or 1.0
    title = f'{view.title} ({"; ".join(keys_of(view, most))})'
    colours = [SHADES[row % len(SHADES)] for row in rows]
    return colours, (weights / most).tolist(), textwrap.wrap(title, TITLE, break_on_hyphens=False)


def keys_of(view: View, most: float) -> list[str]:
    """What the shades of a view mean in the picture, where `most` is the darkest."""
    if view.names:
        shades = [SHADES[i % len(SHADES)].removeprefix('tab:') for i in range(len(view.names))]
        keys = [f'{shade}: {name}' for shade, name in zip(shades, view.names, strict=True)]
        return [*keys, f'darkest: a gate of {most:.2g}']
    if view.logits:
        return [f'darkest: {most:.2g} times a plain mean']
    return [f'last token, darkest: {most:.2g} of a sum of 1']


def shown(token: str) -> str:
    """A token in one line: line breaks and missing characters as signs, at most a line long."""
    return (token.replace('\n', '⏎').replace('\t', '→') or '·')[:COLUMNS]


def main(argv: list[str]) -> int:
    k = configure(Knobs, argv, __doc__).knobs
    text = read_prompt(k.text)
    if not text:
        raise ConfigError('text is empty: give --text="…" or --text=FILE:prompt.txt')
    model, state = load_model(k.out_dir, k.checkpoint)
    if state['tokenizer'] is None:
        raise ConfigError(f'{k.out_dir} was trained on plain token files: no tokenizer is known to read with')
    if not isinstance(model, GPT):
        raise ConfigError(
            f'{k.out_dir} holds a {type(model).__name__}: views are of single tokens, as in a GPT'
        )
    if not -1 <= k.head < model.config.n_head:
        raise ConfigError(f'head={k.head}: from 0 to {model.config.n_head - 1}, or -1 for the mean of all')
    tokenizer = from_spec(state['tokenizer'])
    ids = document_start(state, tokenizer) + tokenizer.encode(text)
    if len(ids) > model.context_limit:
        raise ConfigError(f'the text has {len(ids)} tokens, but the context is {model.context_limit}')
    views, tokens = look(model, ids), pieces(tokenizer, ids)
    if not views:
        raise ConfigError(
            f'{k.out_dir}: attention={model.config.attention!r} has no weights of single tokens to show'
        )
    about = f'{k.out_dir}, {model.config.attention}, iteration {state["iter"]}'
    folder = Path(k.out_dir)
    (folder / 'explain.html').write_text(page(tokens, views, about), encoding='utf-8')
    picture(tokens, views, folder / 'explain.png', k.head)
    print(f'{folder.as_posix()}/explain.html and explain.png: {len(ids)} tokens, {len(views)} views')
    return 0


if __name__ == '__main__':
    run_program(main)
