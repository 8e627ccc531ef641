"""Every kind of tokenizer: there and back, spec, fingerprint, and what is said when it cannot be had."""

import hashlib
import json
import random
import time

import pytest
import tiktoken

from data import tokenizer as tk
from data.tokenizer import Bytes, Chars, HuggingFace, Tiktoken, TokenizerError, from_spec, load, train_bpe

TEXT = "How the <|endoftext|> is written: naïve café, 日本語, 👍🏽 and\r\n\ttabs  \n\n  done. It's 1234567."
CORPUS = [TEXT * 3, 'the quick brown fox jumps over the lazy dog ' * 20, 'def f(x):\n    return x + 1\n' * 20]


@pytest.fixture(scope='module')
def bpe():
    return train_bpe(CORPUS, 320)


@pytest.fixture
def tokenizers(bpe, gpt2):
    return [Bytes(), Chars(sorted(set(TEXT))), Tiktoken('gpt2'), bpe]


def save_hf(folder, bpe, config=None, special=None, model=None):
    """Writes a Hugging Face tokenizer folder around the text of a tokenizer.json."""
    (folder / 'tokenizer.json').write_text(bpe.spec['json'], encoding='utf-8')
    files = {'tokenizer_config.json': config, 'special_tokens_map.json': special, 'config.json': model}
    for name, content in files.items():
        if content is not None:
            (folder / name).write_text(json.dumps(content), encoding='utf-8')
    return folder


def test_there_and_back(tokenizers):
    for tokenizer in tokenizers:
        ids = tokenizer.encode(TEXT)
        assert tokenizer.decode(ids) == TEXT, tokenizer.kind
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.encode_batch([TEXT, '', 'the']) == [ids, [], tokenizer.encode('the')]
        found = tokenizer.encode_utf8_batch([TEXT.encode('utf-8'), b'', b'a<|endoftext|>b'])
        assert [list(part) for part in found] == [ids, [], tokenizer.encode('a<|endoftext|>b')]


def test_special_tokens_in_a_text_are_text(tokenizers):
    for tokenizer in tokenizers:
        ids = tokenizer.encode('a<|endoftext|>b')
        assert tokenizer.eot not in ids, tokenizer.kind
        assert tokenizer.decode(ids) == 'a<|endoftext|>b'


def test_the_end_of_text_is_shown(tokenizers):
    for tokenizer in tokenizers:
        if tokenizer.eot is not None:
            assert tokenizer.decode([tokenizer.eot]) == '<|endoftext|>'


def test_known_values(gpt2):
    gpt2_ids = Tiktoken('gpt2')
    assert gpt2_ids.encode('Hello world') == [15496, 995]
    assert (gpt2_ids.vocab_size, gpt2_ids.eot, gpt2_ids.bos) == (50257, 50256, None)
    assert Bytes().encode('é') == [0xC3, 0xA9]
    assert (Bytes().vocab_size, Bytes().eot) == (257, 256)
    assert Chars(['a', 'é']).encode('éa') == [1, 0]


@pytest.fixture
def gapped(monkeypatch):
    """An encoding like cl100k_base: bytes and a merge, ids that no text has, special tokens beyond them."""
    ranks = {bytes([i]): i for i in range(256)} | {b'he': 256}
    special = {'<|fim|>': 258, '<|endoftext|>': 260}
    encoding = tiktoken.Encoding('gapped', pat_str=r'\S+|\s+', mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr('data.tokenizer._tiktoken_encoding', lambda name: encoding)
    return Tiktoken('gapped')


def test_ids_that_no_text_has_are_shown_as_replaced(gapped):
    assert (gapped.vocab_size, gapped.eot) == (261, 260)
    assert gapped.decode([*gapped.encode('he said'), 257, 259, 33]) == 'he said\ufffd\ufffd!'


def test_an_encoding_with_gaps_is_not_exported(gapped):
    hf = pytest.importorskip('hf')
    with pytest.raises(hf.ExportError, match=r'is token 258: transformers would give it another id'):
        hf.convert_tokenizer(gapped, 64)


def test_bytes_that_are_not_utf8_are_shown_as_replaced(tokenizers):
    assert Bytes().decode([0x61, 0xFF, 0x62]) == 'a\ufffdb'
    first = Bytes().encode('é')[:1]
    assert Bytes().decode(first) == '\ufffd'
    for tokenizer in tokenizers[2:]:
        ids = tokenizer.encode('👍')
        assert len(ids) > 1
        assert '\ufffd' in tokenizer.decode(ids[:1])


def test_an_id_outside_the_vocabulary_is_refused(tokenizers):
    for tokenizer in tokenizers:
        for bad in (tokenizer.vocab_size, -1):
            with pytest.raises(ValueError, match=f'{bad} is not in the vocabulary of {tokenizer.vocab_size}'):
                tokenizer.decode([0, bad])


def test_lone_surrogates_become_the_replacement_character(bpe, gpt2):
    for tokenizer in (Bytes(), Tiktoken('gpt2'), bpe):
        assert tokenizer.decode(tokenizer.encode('a\ud800b')) == 'a\ufffdb'
        assert tokenizer.decode(tokenizer.encode('\ud83d\udc4d')) == '👍'


def test_a_spec_rebuilds_the_tokenizer(tokenizers):
    for tokenizer in tokenizers:
        spec = json.loads(json.dumps(tokenizer.spec))
        again = from_spec(spec)
        assert again.fingerprint == tokenizer.fingerprint == spec['fingerprint']
        assert again.encode(TEXT) == tokenizer.encode(TEXT)
        assert (again.eot, again.bos, again.vocab_size) == (
            tokenizer.eot,
            tokenizer.bos,
            tokenizer.vocab_size,
        )


def test_fingerprints_tell_tokenizers_apart(tokenizers, bpe):
    others = [Chars(sorted(set(TEXT), reverse=True)), train_bpe(CORPUS, 310), HuggingFace(bpe.text, eot=1)]
    fingerprints = [t.fingerprint for t in tokenizers + others]
    assert len(set(fingerprints)) == len(fingerprints)


def test_a_spec_that_was_tampered_with_is_refused(bpe, gpt2):
    changed = {
        'json': {**bpe.spec, 'json': train_bpe(CORPUS, 310).spec['json']},
        'eot': {**bpe.spec, 'eot': 5},
        'characters': {**Chars('ab').spec, 'characters': ['b', 'a']},
        'fingerprint': {**Tiktoken('gpt2').spec, 'fingerprint': '0' * 64},
    }
    for what, spec in changed.items():
        with pytest.raises(TokenizerError, match='its ids mean other text') as error:
            from_spec(spec)
        assert '\n' not in str(error.value), what
    broken = [{}, None, [], {'kind': 'pickle'}, {'kind': 'chars', 'fingerprint': ''}, {'kind': ['bytes']}]
    broken += [{**bpe.spec, 'eot': '0'}, {**bpe.spec, 'bos': -1}, {**bpe.spec, 'json': None}]
    broken += [{**Chars('ab').spec, 'characters': 5}, {**Bytes().spec, 'deep': [[[]]]}]
    for spec in broken:
        with pytest.raises(TokenizerError, match='not a tokenizer spec'):
            from_spec(spec)


def test_training_depends_on_the_text_alone(bpe):
    shuffled = CORPUS[:]
    random.Random(0).shuffle(shuffled)
    assert train_bpe(iter(shuffled), 320).spec == bpe.spec
    assert bpe.vocab_size == 320
    assert bpe.eot == 0


def words_of(model, text):
    return [text[slice(*span)] for _, span in model.tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def test_the_words_of_a_bpe_are_those_of_gpt2(bpe):
    from tokenizers.pre_tokenizers import ByteLevel

    draw = random.Random(0)
    parts = [*"abZß日ж19²_.-#'", ' ', ' ', '\n', '\t', '\u00a0', "'s", "'ll", "I'm", '👍🏽', '\r\n', '   ']
    for _ in range(300):
        text = ''.join(draw.choice(parts) for _ in range(40))
        theirs = ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
        assert words_of(bpe, text) == [text[slice(*span)] for _, span in theirs]


@pytest.mark.parametrize('kind', ['a', '7', '=', ' ', '\n', '日', 'é'])
def test_a_word_that_is_longer_than_the_bound_is_divided(bpe, kind):
    for n, count in ((tk.WORD, 1), (tk.WORD + 1, 2), (2 * tk.WORD + 1, 3)):
        text = kind * n
        found = words_of(bpe, text)
        assert len(found) == count
        assert max(map(len, found)) <= tk.WORD
        whole = f'before {text} after'
        assert bpe.decode(bpe.encode(whole)) == whole
    trained = train_bpe([kind * (tk.WORD + 1)] * 3, 300)
    text = kind * (4 * tk.WORD + 3)
    assert trained.decode(trained.encode(text)) == text
    assert from_spec(json.loads(json.dumps(trained.spec))).encode(text) == trained.encode(text)


def test_a_bpe_is_trained_on_long_words_in_a_time_that_grows_with_them():
    """Without a bound twice the length takes four times as long: this text, a minute in place of a second."""
    draw = random.Random(0)
    text = ''.join(draw.choice('abcdefghijklmnop') for _ in range(600_000))
    began = time.process_time()
    model = train_bpe([text], 400)
    assert model.decode(model.encode(text)) == text
    assert time.process_time() - began < 10


def test_a_tokenizer_of_unbounded_words_keeps_them():
    """tokenizer.json files of before hold their own pattern."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    text = 'ab' * 700 + ' cd'
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    model.train_from_iterator([text] * 3, trainer)
    loaded = HuggingFace(model.to_str())
    assert words_of(loaded, text) == ['ab' * 700, ' cd']
    assert loaded.encode(text) == model.encode(text).ids


def test_a_small_corpus_gives_a_small_vocabulary_and_a_tiny_one_is_refused():
    small = train_bpe(['ab'], 4096)
    assert 257 <= small.vocab_size < 260
    assert small.decode(small.encode('日本')) == '日本'
    with pytest.raises(TokenizerError, match='at least 257 tokens, not 256'):
        train_bpe(['ab'], 256)


def test_a_stored_maximum_length_does_not_cut(bpe):
    content = json.loads(bpe.text)
    content['truncation'] = {'direction': 'Right', 'max_length': 4, 'strategy': 'LongestFirst', 'stride': 0}
    content['padding'] = {
        'strategy': {'Fixed': 512},
        'direction': 'Right',
        'pad_to_multiple_of': None,
        'pad_id': 0,
        'pad_type_id': 0,
        'pad_token': 'x',
    }
    assert HuggingFace(json.dumps(content), eot=0).spec == bpe.spec


def test_a_template_of_special_tokens_is_not_applied(bpe):
    from tokenizers import Tokenizer, processors

    model = Tokenizer.from_str(bpe.text)
    model.post_processor = processors.TemplateProcessing(
        single='<|endoftext|> $A', special_tokens=[('<|endoftext|>', 0)]
    )
    assert HuggingFace(model.to_str(), eot=0).encode('the fox') == bpe.encode('the fox')


def test_load_a_tokenizer_json(bpe, tmp_path):
    path = tmp_path / 'any.json'
    path.write_text(json.dumps(json.loads(bpe.text), indent=2), encoding='utf-8')
    loaded = load(str(path))
    assert (
        loaded.spec == bpe.spec
    )  # the layout of the file does not matter; the end of text is known by its name


@pytest.mark.parametrize(
    ('config', 'special', 'model', 'eot', 'bos'),
    [
        ({'eos_token': 'the'}, None, None, 'the', None),
        ({'eos_token': {'content': 'the'}, 'bos_token': 'Ġfox'}, None, None, 'the', 'Ġfox'),
        (None, {'eos_token': {'content': 'the'}}, None, 'the', None),
        ({'eos_token': None}, None, {'eos_token_id': 7, 'bos_token_id': 8}, 7, 8),
        (None, None, {'eos_token_id': [9, 7]}, 9, None),
        ({'model_max_length': 1024}, None, None, '<|endoftext|>', None),
    ],
)
def test_load_a_folder(bpe, tmp_path, config, special, model, eot, bos):
    loaded = load(str(save_hf(tmp_path, bpe, config, special, model)))
    vocabulary = bpe.tokenizer.get_vocab()
    assert [loaded.eot, loaded.bos] == [vocabulary.get(token, token) for token in (eot, bos)]
    assert loaded.encode(TEXT) == bpe.encode(TEXT)


def test_load_a_folder_with_vocab_and_merges_only(bpe, tmp_path):
    content = json.loads(bpe.text)['model']
    special = {'<s>': len(content['vocab']), '</s>': len(content['vocab']) + 1}
    (tmp_path / 'vocab.json').write_text(json.dumps({**content['vocab'], **special}), encoding='utf-8')
    merges = '\n'.join(' '.join(pair) for pair in content['merges'])
    (tmp_path / 'merges.txt').write_text('#version: 0.2\n' + merges + '\n', encoding='utf-8')
    names = {'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '<pad>'}  # <pad> has no id: it is left out
    (tmp_path / 'special_tokens_map.json').write_text(json.dumps(names), encoding='utf-8')
    loaded = load(str(tmp_path))
    assert (loaded.bos, loaded.eot) == (special['<s>'], special['</s>'])
    assert loaded.vocab_size == len(content['vocab']) + 2
    assert loaded.encode(TEXT) == bpe.encode(TEXT)
    assert loaded.decode(loaded.encode('a</s>b')) == 'a</s>b'
    assert loaded.eot not in loaded.encode('a</s>b')
    assert from_spec(loaded.spec).encode(TEXT) == loaded.encode(TEXT)


def test_load_by_name(gpt2):
    assert load('bytes').kind == 'bytes'
    assert load('gpt2').spec['name'] == 'gpt2'


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    (tmp_path / 'broken.json').write_text('{"model": ', encoding='utf-8')
    (tmp_path / 'nested.json').write_text('[' * 100_000, encoding='utf-8')
    (tmp_path / 'tokens.json').write_text('{"added_tokens": [{"id": "1", "content": "a"}]}', encoding='utf-8')
    (tmp_path / 'latin').mkdir()
    (tmp_path / 'latin' / 'tokenizer.json').write_bytes(b'{"a": "\xe9"}')
    (tmp_path / 'config').mkdir()
    (tmp_path / 'config' / 'config.json').write_text('{"eos_token_id": "</s>"}', encoding='utf-8')
    (tmp_path / 'other.json').write_text('{"a": 1}', encoding='utf-8')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'sentencepiece').mkdir()
    (tmp_path / 'sentencepiece' / 'spiece.model').write_bytes(b'\x00')
    wanted = {
        'no-such-encoding': 'no encoding .*gpt2',
        str(tmp_path / 'broken.json'): 'is not JSON',
        str(tmp_path / 'nested.json'): 'is nested too deeply',
        str(tmp_path / 'tokens.json'): r"added_tokens\[0\]\.id is '1', not a whole number",
        str(tmp_path / 'latin'): 'cannot be read|not a tokenizer that can be read',
        str(tmp_path / 'config'): "eos_token_id is '</s>', not a whole number",
        str(tmp_path / 'other.json'): 'not a tokenizer.json',
        str(tmp_path / 'missing.json'): 'does not exist',
        str(tmp_path / 'no' / 'folder'): 'does not exist',
        str(tmp_path / 'empty'): 'neither tokenizer.json nor vocab.json',
        str(tmp_path / 'sentencepiece'): 'save_pretrained',
    }
    for name, message in wanted.items():
        with pytest.raises(TokenizerError, match=message) as error:
            load(name)
        assert '\n' not in str(error.value)


def test_characters_unknown_or_twice_are_refused():
    with pytest.raises(TokenizerError, match=r"'c' \(U\+0063\) is not among the 2"):
        Chars('ab').encode('abc')
    for bad in ([], ['ab'], ['a', 'a']):
        with pytest.raises(TokenizerError, match='single characters'):
            Chars(bad)


def test_without_a_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(
        'tiktoken.load.read_file', lambda url: (_ for _ in ()).throw(OSError('no route\nto host'))
    )
    monkeypatch.setattr('tiktoken.registry.ENCODINGS', {})
    with pytest.raises(TokenizerError) as error:
        load('gpt2')
    message = str(error.value)
    assert '\n' not in message
    for file in ('vocab.bpe', 'encoder.json'):
        url = f'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{file}'
        assert f'{url} to {tmp_path / hashlib.sha1(url.encode()).hexdigest()}' in message
    assert 'TIKTOKEN_CACHE_DIR' in message


def test_a_wrong_file_in_the_cache_is_named_and_not_deleted(tmp_path, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    url = tk.GPT2_URL + 'vocab.bpe'
    wrong = tmp_path / hashlib.sha1(url.encode()).hexdigest()
    wrong.write_bytes(b'precious')
    with pytest.raises(TokenizerError, match='SHA-256'):
        load('gpt2')
    assert wrong.read_bytes() == b'precious'


def test_a_repository_that_cannot_be_reached_is_one_line(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError('no network')

    monkeypatch.setattr('huggingface_hub.snapshot_download', unreachable)
    with pytest.raises(TokenizerError, match=r'huggingface.co/owner/name.*HF_HUB_OFFLINE') as error:
        load('owner/name@abc')
    assert '\n' not in str(error.value)


def test_a_repository_is_loaded_through_the_cache(bpe, tmp_path, monkeypatch):
    asked = {}

    def cached(repo, revision, allow_patterns):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(save_hf(tmp_path, bpe))

    monkeypatch.setattr('huggingface_hub.snapshot_download', cached)
    assert load('owner/name@abc').spec == bpe.spec
    assert (asked['repo'], asked['revision']) == ('owner/name', 'abc')
    assert not any(name.endswith(('.py', '.bin', '.model')) for name in asked['patterns'])
