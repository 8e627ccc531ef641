"""The lm-evaluation-harness (EleutherAI) on a model of this project, through its LM interface."""

from __future__ import annotations

import math
import sys

import torch
from torch.nn import functional as F

from configurator import ConfigError
from runs.text import check_sampling, finite_logits, stream_text

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ImportError as error:
    sys.exit(f'eval.py --tasks needs {error.name}: pip install -r requirements-extras.txt')


class HarnessLM(TemplateLM):
    """What the harness asks of a model, answered as its own HFLM does: contexts are cut on the left."""

    max_gen_toks = 256

    def __init__(self, model, tokenizer, begin: list[int], batch_size: int, device: str, autocast):
        super().__init__()
        self.model, self.tok, self.begin = model, tokenizer, begin
        self.batch_size, self._device, self.autocast = batch_size, device, autocast
        self.max_length = model.config.block_size

    @property
    def eot_token_id(self):
        return self.tok.eot

    @property
    def prefix_token_id(self):
        return self.begin[0]  # what an empty context is replaced by

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return self.tok.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of both together, cut where those of the context alone end, as the harness cuts them.

        Where a token spans the join ('Ans' and 'wer' are one token), nothing may be left behind that cut:
        then it is before the first token that the context alone does not have.
        """
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if not continuation_ids:
            whole, alone = self.tok_encode(context + continuation), self.tok_encode(context.rstrip())
            pairs = enumerate(zip(whole, alone, strict=False))
            cut = next((i for i, (a, b) in pairs if a != b), min(len(whole), len(alone)))
            context_ids, continuation_ids = whole[:cut], whole[cut:]
        return context_ids or self.begin, continuation_ids

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        """[(_, context ids, continuation ids)] -> [(log-probability, is it what greedy decoding gives?)].

        What is longer than the model reads is cut on the left: the context, then the continuation too.
        """
        for (context, continuation), _, ids in (r for r in requests if not r[2]):
            raise ConfigError(
                f'tasks: {continuation!r} after {context[-40:]!r} has no token of its own ({ids}): '
                'there is nothing to predict'
            )
        longest_first = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        used = self.model.config.vocab_used or None
        results = {}
        for at in range(0, len(requests), self.batch_size):
            batch = longest_first[at : at + self.batch_size]
            ids = [(requests[i][1] + requests[i][2])[-self.max_length - 1 :] for i in batch]
            x = torch.zeros(len(ids), max(map(len, ids)) - 1, dtype=torch.long)  # padding on the right
            for row, sequence in zip(x, ids, strict=True):
                row[: len(sequence) - 1] = torch.tensor(sequence[:-1])
            with self.autocast():
                hidden = self.model.hidden(x.to(self._device))  # (B, T, C)
                for i, row, sequence in zip(batch, hidden, ids, strict=True):
                    n = min(len(requests[i][2]), len(sequence) - 1)  # tokens of the continuation
                    target = torch.tensor(sequence[-n:], device=self._device)
                    end = len(sequence) - 1
                    logits = self.model.logits(row[end - n : end], used)  # (n, ids)
                    log_p = F.log_softmax(logits.float(), dim=-1)
                    total = log_p.gather(1, target[:, None]).sum().item()
                    if not math.isfinite(total):
                        raise ConfigError('tasks: the model gives inf or nan; try --dtype=float32')
                    results[i] = total, bool((log_p.argmax(dim=-1) == target).all())
        return [results[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        totals = []
        for request in requests:
            parts = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            parts = [(None, *make_disjoint_window(part)) for part in parts]
            totals.append(sum(log_p for log_p, _ in self._loglikelihood_tokens(parts)))
        return totals

    def generate_until(self, requests, disable_tqdm=False):
        answers = []
        for request in requests:
            context, asked = request.args
            options = normalize_gen_kwargs(asked, self.max_gen_toks)
            stop = handle_stop_sequences(options.pop('until', None), eos=None)
            n = options.pop('max_gen_toks')
            sampling: dict = {'temperature': 0.0, 'top_k': None, 'top_p': 1.0}
            options.pop('do_sample', None)  # said by the temperature too
            sampling |= {name: options.pop(name) for name in sampling.keys() & options.keys()}
            if options and options != {'num_beams': 1}:
                raise ConfigError(
                    f'tasks: generation with {options} is not offered here: the score would not be theirs'
                )
            if n >= self.max_length:
                raise ConfigError(
                    f'tasks: {n} tokens are to be made, but block_size={self.max_length}: no room to ask'
                )
            ids = (self.tok_encode(context) or self.begin)[n - self.max_length :]
            prompt = torch.tensor([ids], device=self._device)
            check_sampling(**sampling)
            with self.autocast(), finite_logits(self.model):
                pieces = stream_text(
                    self.model,
                    self.tok,
                    prompt,
                    n,
                    stop_token=self.eot_token_id,
                    stop=stop,
                    **{**sampling, 'top_k': sampling['top_k'] or None},
                )
                answers.append(''.join(pieces))
        return answers


def find_tasks(names: list[str], include_path: str) -> tuple[TaskManager, list[str]]:
    """An index of tasks, and the names that it has not. The harness's own thousands of files are read only
    where include_path has not all of them: it takes a while."""
    tasks, unknown = None, names
    if include_path:
        tasks = TaskManager(include_path=include_path, include_defaults=False)
        unknown = [name for name in names if not tasks.match_tasks([name])]
    if unknown:
        tasks = TaskManager(include_path=include_path or None)
        unknown = [name for name in names if not tasks.match_tasks([name])]
    return tasks, unknown


def run_tasks(model, tokenizer, begin, k, device, autocast) -> dict:
    """Run the tasks of the knobs (eval.py), print the harness's table, return its results."""
    if tokenizer is None or not begin:
        raise ConfigError(
            f'tasks={k.tasks!r}: they need a model with a tokenizer that has an end-of-text token'
        )
    names = k.tasks.split(',')
    tasks, unknown = find_tasks(names, k.include_path)
    if unknown:
        raise ConfigError(f'tasks={k.tasks!r}: the harness knows no {", ".join(unknown)}; add include_path?')
    results = lm_eval.simple_evaluate(
        model=HarnessLM(model, tokenizer, begin, k.batch_size, device, autocast),
        tasks=names,
        num_fewshot=k.num_fewshot,
        limit=k.limit or None,
        task_manager=tasks,
        log_samples=False,
    )
    print(make_table(results))
    return results['results']
