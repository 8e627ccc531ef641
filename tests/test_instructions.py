"""From a GPT-2-shaped checkpoint to a model that answers and stops, at ruGPT's proportions."""

import json
import subprocess
import sys

import pytest
import torch

import sample
from configurator import ConfigError
from conftest import CAPITALS, INSTRUCTIONS
from data.tokenizer import Bytes, Chars
from runs import pretrained
from runs.text import document_start, stream_text


@pytest.fixture(scope='module')
def run(gpt2_folder, tmp_path_factory, root):
    """prepare.py, then train.py with rugpt_reflex, made small: its folder and what it said."""
    folder = tmp_path_factory.mktemp('instructions')
    new = [{**row, 'question': row['question'].replace('Какая', 'Назови:')} for row in INSTRUCTIONS]
    for name, content in (('rows', INSTRUCTIONS * 40), ('val', new * 2)):
        rows = [json.dumps(row, ensure_ascii=False) for row in content]
        (folder / f'{name}.jsonl').write_text('\n'.join(rows), encoding='utf-8')
    prepare = 'data/russian_instructions/prepare.py'
    prepare += f' --files {folder / "rows.jsonl"} --val_files {folder / "val.jsonl"}'
    prepare += f' --tokenizer {gpt2_folder} --out_dir {folder / "data"} --num_proc 1'
    train = f'train.py config/recipes/rugpt_reflex.py --init_from={gpt2_folder} --dataset={folder / "data"}'
    train += (
        f' --out_dir={folder / "run"} --n_embd=96 --block_size=64 --dropout=0 --gradient_accumulation_steps=1'
    )
    train += ' --max_iters=150 --warmup_iters=10 --learning_rate=3e-3 --eval_interval=1000 --eval_iters=2'
    train += ' --compile=false --dtype=float32 --threads=1'
    for command in (prepare, train):
        done = subprocess.run(
            [sys.executable, *command.split()],
            cwd=root,
            capture_output=True,
            text=True,
            encoding='utf-8',
            check=False,
        )
        assert done.returncode == 0, done.stderr
    return folder / 'run', done.stdout


def test_training_says_what_it_took_from_the_checkpoint(run):
    _, said = run
    lines = [' '.join(line.split()) for line in said.splitlines()]
    assert 'wte.weight 320 x 96 300 x 96 the first 300 rows copied, the other 20 initialised' in lines
    assert 'h.0-5.attn.c_proj.weight 96 x 96 96 x 96 copied' in lines
    assert any(line.startswith('h.5.attn.c_attn.weight') and 'except 10 dead heads' in line for line in lines)
    assert 'h.0-5.mlp.c_gate.weight 256 x 96 - initialised: not in the checkpoint' in lines
    assert 'h.6-23 - - left out with 12 tensors: the model has 6 layers' in lines


def test_it_answers_and_stops(run, capsys):
    for country, city in CAPITALS.items():
        options = ['--template={start}\\n', '--stop=eot', '--temperature=0', '--dtype=float32', '--threads=1']
        assert sample.main([f'--out_dir={run[0]}', f'--start=Какая столица {country}?', *options]) == 0
        out = capsys.readouterr()
        assert out.out == f'Столица {country} — {city}.'
        assert 10 < int(out.err.split()[1]) < 40  # tokens: it ended long before max_new_tokens=300


def test_resuming_needs_no_checkpoint_to_start_from(run, root):
    command = [sys.executable, 'train.py', f'--out_dir={run[0]}', '--init_from=resume', '--eval_only=true']
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, encoding='utf-8', check=False)
    assert done.returncode == 0, done.stderr
    assert 'copied' not in done.stdout and 'reflex_all, 6 layers, 8 heads, 96 wide' in done.stdout


def test_the_shape_is_the_checkpoints_where_nothing_else_is_said(gpt2_folder):
    from runs.knobs import Knobs
    from runs.start import pretrained_knobs

    found = pretrained.read(gpt2_folder).config
    k = pretrained_knobs(Knobs(n_layer=6, bias=False), {'n_layer': 6, 'bias': False}, found)
    assert (k.n_layer, k.n_head, k.n_embd, k.block_size) == (6, 16, 96, 64)
    assert (k.bias, k.mlp, k.dropout, k.attention) == (False, 'gelu_tanh', 0.0, 'vanilla')


NOTHING = torch.zeros(1, 1, dtype=torch.long)  # a prompt that does not show


class Script:
    """Stands in for a model: says the tokens that it was given."""

    def __init__(self, tokens):
        self.tokens = tokens

    def stream(self, prompt, max_new_tokens, **options):
        for token in self.tokens[:max_new_tokens]:
            yield torch.tensor([[token]])


@pytest.mark.parametrize(
    'stop, said, shown',
    [
        ('', 'one two', 'one two'),
        ('two', 'one two three', 'one '),
        ('t', 'one two', 'one '),
        ('two||e t', 'one two three', 'on'),
        ('twos', 'one two', 'one two'),  # held back until it is known not to be one
        ('tt', 'one ttt', 'one '),
        ('\\n\\n', 'a\nb\n\nc', 'a\nb'),
        ('ö', 'schön', 'sch'),
        ('один', 'сто один', 'сто '),
    ],
)
def test_a_stop_text_ends_a_sample_before_it(stop, said, shown):
    tokenizer = Bytes()
    token, texts = sample.read_stops(stop, tokenizer)
    assert token is None
    pieces = list(stream_text(Script(tokenizer.encode(said)), tokenizer, NOTHING, 99, token, texts))
    assert ''.join(pieces) == shown
    everything = stream_text(Script(tokenizer.encode(said)), tokenizer, NOTHING, 99)
    assert len(pieces) <= len(list(everything)) == len(tokenizer.encode(said)) + 1


def test_a_streamed_text_is_that_of_all_its_tokens():
    """Whatever a tokenizer does to a text's first space: this one goes on, and so does each new line."""
    tokenizers = pytest.importorskip('tokenizers')
    text = 'Once upon a time\n  two   spaces\n three'
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer, inner.decoder = (
        tokenizers.pre_tokenizers.Metaspace(),
        tokenizers.decoders.Metaspace(),
    )
    inner.train_from_iterator([text], tokenizers.trainers.BpeTrainer(vocab_size=60, show_progress=False))

    class Spaces:
        decode = staticmethod(lambda ids: inner.decode(list(ids)))

    ids = inner.encode(text).ids
    assert inner.decode(ids) == text
    for begin in range(1, 8):
        prompt = torch.tensor([ids[:begin]])
        pieces = stream_text(Script(ids[begin:]), Spaces, prompt, 99)
        assert inner.decode(ids[:begin]) + ''.join(pieces) == text


def test_the_end_of_text_token_ends_a_sample():
    tokenizer = Bytes()
    token, texts = sample.read_stops('eot||stop', tokenizer)
    assert (token, texts) == (256, ['stop'])
    tokens = [*tokenizer.encode('yes'), 256, *tokenizer.encode('no')]
    pieces = list(stream_text(Script(tokens), tokenizer, NOTHING, 99, token, texts))
    assert ''.join(pieces) == 'yes' and len(pieces) == 5  # a piece for each of 4 tokens, and the end
    with pytest.raises(ConfigError, match='this chars tokenizer has no end-of-text token'):
        sample.read_stops('eot', Chars('abc'))


def test_a_document_begins_as_in_the_data():
    assert document_start({'begin': 7}, Bytes()) == [7]
    assert document_start({'begin': None}, Bytes()) == [256]
    assert document_start({}, Chars('abc')) == []


def test_a_template_without_a_place_for_the_prompt_is_refused():
    with pytest.raises(ConfigError, match=r"template='hello': it must have '\{start\}'"):
        sample.main(['--template=hello'])
