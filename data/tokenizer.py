"""Tokenizers: text to token ids and back, each identified by a fingerprint and rebuilt from a JSON-able spec.

Every class has the same interface: `vocab_size`, `eot` (the id of the token that ends a document, or None),
`bos` (the id of the token that begins one, or None), `encode`, `encode_batch`, `decode`, `spec` and
`fingerprint`. A text holds no special tokens: '<|endoftext|>' written in a document is 13 characters, never
the token (except for Unigram models whose special tokens are among their pieces). A checkpoint carries
`spec`, so that decoding does not depend on the data folder: `from_spec(spec)` builds the tokenizer again and
compares the fingerprint.

`load(name)` knows: bytes | a tiktoken encoding (gpt2, cl100k_base, ...) | a tokenizer.json | a Hugging Face
tokenizer folder | a Hugging Face repository (owner/name or owner/name@revision). The other two ways to get
one read the corpus first: `train_bpe(texts, vocab_size)` and `Chars(characters)`.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from configurator import UserError
from declared import (
    SHA256,
    Either,
    Flag,
    List,
    Null,
    Object,
    OneOf,
    Shape,
    ShapeError,
    Table,
    Text,
    Whole,
    check,
)
from declared import read_json as read_declared

if TYPE_CHECKING:
    import tiktoken

Spec = dict[str, Any]  # JSON-able: kind, eot, bos, fingerprint, and what the kind needs
Ids = list[int] | NDArray[Any]

TOKEN_ID = Whole(0, (1 << 32) - 1)
MAYBE_ID = Either(TOKEN_ID, Null())
# kind -> what its spec holds besides its kind, eot, bos and fingerprint
SPECS: dict[str, dict[str, Shape]] = {
    'bytes': {},
    'chars': {'characters': List(Text(r'(?s:.)', 'a single character'), least=1)},
    'tiktoken': {'name': Text(r'[\w.-]{1,100}', 'the name of an encoding')},
    'tokenizers': {'json': Text()},
}
# of the files of others, what is read here
TOKENIZER_JSON = Object(
    optional={'added_tokens': Either(List(Object({'id': TOKEN_ID, 'content': Text()})), Null())}
)
CONFIG_IDS = Either(TOKEN_ID, List(TOKEN_ID), Null())
CONFIG_JSON = Object(
    optional={
        'eos_token_id': CONFIG_IDS,
        'bos_token_id': CONFIG_IDS,
        'add_prefix_space': Either(Flag(), Null()),
    }
)
ADDED_JSON = Table(Text(), TOKEN_ID)

END_OF_TEXT = '<|endoftext|>'
# The words of a BPE that is trained here are GPT-2's, but none is longer than so many characters: a longer
# one is divided into several, whose tokens decode to the same text. The time for the merges within a word
# grows with the square of its length, and a text may hold a word of a million characters.
WORD = 1024
WORDS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}{1,%d}| ?\p{N}{1,%d}| ?[^\s\p{L}\p{N}]{1,%d}|\s{1,%d}(?!\S)|\s{1,%d}"
).replace('%d', str(WORD))
# names of the token that ends a document, for a tokenizer.json that comes without a config beside it
END_NAMES = (END_OF_TEXT, '</s>', '<|end_of_text|>', '<eos>', '<|eot_id|>', '[EOS]')
HF_FILES = (
    'tokenizer.json',
    'vocab.json',
    'merges.txt',
    'tokenizer_config.json',
    'special_tokens_map.json',
    'added_tokens.json',
    'config.json',
)
# What tiktoken reads for the GPT-2 encoding. It names a cached file by the SHA-1 of its address, and deletes
# one whose SHA-256 is not this.
GPT2_URL = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'
GPT2_SHA256 = {
    'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
    'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783',
}


TIKTOKEN_SIZES = {
    'gpt2': 50_257,
    'r50k_base': 50_257,
    'p50k_base': 50_281,
    'p50k_edit': 50_284,
    'cl100k_base': 100_277,
    'o200k_base': 200_019,
    'o200k_harmony': 201_088,
}


class TokenizerError(UserError):
    """A tokenizer that cannot be loaded, in one line: which, why, and the fix."""


def well_formed(text: str) -> str:
    """The text with lone surrogates replaced by U+FFFD: they have no UTF-8 form."""
    try:
        text.encode('utf-8')
        return text
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def fingerprint(spec: dict[str, Any]) -> str:
    """SHA-256 (hex) of a spec without its fingerprint. A spec of tiktoken only names an encoding, so
    `Tiktoken` adds the encoding's ranks first."""
    text = json.dumps({k: v for k, v in spec.items() if k != 'fingerprint'}, sort_keys=True)
    return hashlib.sha256(text.encode('ascii')).hexdigest()


class Tokenizer:
    """What all kinds share. A subclass sets `kind`, `vocab_size`, `eot` and `bos`, passes its part of the
    spec to `__init__`, and implements `_encode_batch` and `_decode`."""

    kind = ''
    vocab_size: int
    eot: int | None = None
    bos: int | None = None

    def __init__(self, definition: Spec, identity: dict[str, Any] | None = None) -> None:
        """`definition`: this kind's part of the spec. `identity`: what the fingerprint covers besides it."""
        spec = {'kind': self.kind, **definition, 'eot': self.eot, 'bos': self.bos}
        self.fingerprint = fingerprint(spec if identity is None else {**spec, **identity})
        self.spec = {**spec, 'fingerprint': self.fingerprint}

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text."""
        return self._encode_batch([well_formed(text) for text in texts])

    def encode_utf8_batch(self, pieces: list[bytes]) -> list[Ids]:
        """The ids of each text, given as UTF-8; UnicodeDecodeError if it is not UTF-8."""
        return [*self._encode_batch([piece.decode('utf-8') for piece in pieces])]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD. ValueError: there is no such id."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f'token id {i} is not in the vocabulary of {self.vocab_size}')
        return self._decode(ids)

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError


class Bytes(Tokenizer):
    """Ids 0..255 are the bytes of the UTF-8 text; 256 ends a document."""

    kind = 'bytes'
    vocab_size = 257
    eot = 256

    def __init__(self) -> None:
        super().__init__({})

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode('utf-8')) for text in texts]

    def encode_utf8_batch(self, pieces: list[bytes]) -> list[Ids]:
        return [np.frombuffer(piece, np.uint8) for piece in pieces]  # any bytes will do: nothing is decoded

    def _decode(self, ids: list[int]) -> str:
        end = END_OF_TEXT.encode('ascii')
        return b''.join(end if i == self.eot else bytes([i]) for i in ids).decode('utf-8', 'replace')


class Chars(Tokenizer):
    """One id per character of a fixed list. There is no end-of-text id."""

    kind = 'chars'

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = list(characters)
        self.ids = {c: i for i, c in enumerate(self.characters)}
        if not self.characters or len(self.ids) != len(self.characters) or any(len(c) != 1 for c in self.ids):
            raise TokenizerError('a character tokenizer needs a list of single characters, each once')
        self.vocab_size = len(self.characters)
        super().__init__({'characters': self.characters})

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        try:
            return [[self.ids[c] for c in text] for text in texts]
        except KeyError as error:
            c = error.args[0]
            raise TokenizerError(
                f'the character {c!r} (U+{ord(c):04X}) is not among the {self.vocab_size} of this tokenizer'
            ) from None

    def _decode(self, ids: list[int]) -> str:
        return ''.join(self.characters[i] for i in ids)


class Tiktoken(Tokenizer):
    """An encoding that ships with tiktoken, by name."""

    kind = 'tiktoken'

    def __init__(self, name: str) -> None:
        self.encoding = _tiktoken_encoding(name)
        self.vocab_size = self.encoding.n_vocab
        self.eot = self.encoding._special_tokens.get(END_OF_TEXT)
        # not the pattern that splits words: tiktoken rewrites it for speed without changing what it matches
        ranks = hashlib.sha256()
        for token, rank in sorted(self.encoding._mergeable_ranks.items()):
            ranks.update(b'%d %s\n' % (rank, token.hex().encode('ascii')))
        identity = {'ranks': ranks.hexdigest(), 'special': self.encoding._special_tokens}
        super().__init__({'name': name}, identity)

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self.encoding.encode_ordinary_batch(texts, num_threads=1)

    def encode_utf8_batch(self, pieces: list[bytes]) -> list[Ids]:
        # arrays, because making an object per id would take a third of the time; special tokens are text
        return [self.encoding.encode_to_numpy(p.decode('utf-8'), disallowed_special=()) for p in pieces]

    def _decode(self, ids: list[int]) -> str:
        try:
            return self.encoding.decode(ids, errors='replace')
        except KeyError:  # some encodings have gaps, and a model may draw an id that it has never seen
            return b''.join(map(self._bytes, ids)).decode('utf-8', errors='replace')

    def _bytes(self, i: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(i)
        except KeyError:
            return '\ufffd'.encode()


def _tiktoken_encoding(name: str) -> 'tiktoken.Encoding':
    """The encoding of that name; TokenizerError tells which files are missing and where they belong."""
    import tiktoken

    if name not in tiktoken.list_encoding_names():
        known = ', '.join(tiktoken.list_encoding_names())
        raise TokenizerError(f'tiktoken has no encoding {name!r}; it has {known}')
    folder = os.environ.get('TIKTOKEN_CACHE_DIR', os.environ.get('DATA_GYM_CACHE_DIR'))
    if folder is None:
        folder = str(Path(tempfile.gettempdir()) / 'data-gym-cache')  # as tiktoken does
    wanted = {}
    if name == 'gpt2' and folder:
        for file, sha256 in GPT2_SHA256.items():
            url = GPT2_URL + file
            cached = Path(folder) / hashlib.sha1(url.encode('ascii')).hexdigest()
            wanted[url] = cached
            if cached.is_file() and hashlib.sha256(cached.read_bytes()).hexdigest() != sha256:
                raise TokenizerError(
                    f'{cached} is not {url} (its SHA-256 is not {sha256}): delete it or replace it; '
                    'tiktoken itself would delete it silently'
                )
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # any failure of the network: one line that says what to do without one
        missing = [f'download {url} to {path}' for url, path in wanted.items() if not path.is_file()]
        how = ' and '.join(missing) or f'run it once where there is a network, and copy the files of {folder}'
        raise TokenizerError(
            f'tiktoken cannot load the encoding {name} ({type(error).__name__}); without a network: {how}, '
            'then set TIKTOKEN_CACHE_DIR to that folder'
        ) from error


class HuggingFace(Tokenizer):
    """Anything that the `tokenizers` library reads from the text of a tokenizer.json."""

    kind = 'tokenizers'

    def __init__(self, text: str, eot: int | None = None, bos: int | None = None) -> None:
        """`text`: the content of a tokenizer.json; `eot`, `bos`: ids, or None."""
        import tokenizers

        try:
            content = json.loads(text)
            # a stored maximum length would truncate documents silently
            content['truncation'] = content['padding'] = None
            self.text = json.dumps(content, ensure_ascii=False, sort_keys=True)
            self.tokenizer = tokenizers.Tokenizer.from_str(self.text)
        except Exception as error:  # tokenizers raises bare Exception
            reason = ' '.join(str(error).split())
            raise TokenizerError(f'not a tokenizer.json that `tokenizers` can read: {reason}') from error
        self.tokenizer.encode_special_tokens = True  # '<|endoftext|>' in a text is text
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        for which, value in (('eot', eot), ('bos', bos)):
            if value is not None and not 0 <= value < self.vocab_size:
                raise TokenizerError(f'{which} {value} is not in the vocabulary of {self.vocab_size}')
        self.eot, self.bos = eot, bos
        super().__init__({'json': self.text})

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text


def train_bpe(texts: Iterable[str], vocab_size: int) -> HuggingFace:
    """A byte-level BPE with GPT-2's words (see WORD), trained on `texts`; <|endoftext|> is id 0.

    The result depends on the texts alone, not on their order or on the number of threads. A small corpus may
    give fewer than `vocab_size` tokens. TokenizerError if `vocab_size` is below 257.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Model

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 1:
        raise TokenizerError(f'a byte-level BPE has at least {len(alphabet) + 1} tokens, not {vocab_size}')
    model = Model(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), 'isolated')
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    return HuggingFace(model.to_str(), eot=model.token_to_id(END_OF_TEXT))


def check_spec(spec: Any) -> None:
    """TokenizerError unless this is a spec as `Tokenizer.spec` is."""
    try:
        check(spec, Object({'kind': OneOf(*SPECS)}), 'not a tokenizer spec')
        fields: dict[str, Shape] = {'kind': Text(), 'eot': MAYBE_ID, 'bos': MAYBE_ID, 'fingerprint': SHA256}
        check(spec, Object({**fields, **SPECS[spec['kind']]}, closed=True), 'not a tokenizer spec')
    except ShapeError as error:
        raise TokenizerError(str(error)) from error


def vocab_size_of(spec: Spec) -> int:
    """How many ids the tokenizer of a spec has; TokenizerError as `from_spec`.

    An encoding of tiktoken whose size is known here is not loaded: training on its tokens needs no more.
    """
    check_spec(spec)
    known = TIKTOKEN_SIZES.get(spec['name']) if spec['kind'] == 'tiktoken' else None
    return known or from_spec(spec).vocab_size


def from_spec(spec: Spec) -> Tokenizer:
    """The tokenizer of a spec. TokenizerError if its fingerprint is not the one that the spec holds."""
    builders: dict[str, Callable[[], Tokenizer]] = {
        'bytes': Bytes,
        'chars': lambda: Chars(spec['characters']),
        'tiktoken': lambda: Tiktoken(spec['name']),
        'tokenizers': lambda: HuggingFace(spec['json'], spec['eot'], spec['bos']),
    }
    check_spec(spec)
    tokenizer, expected = builders[spec['kind']](), spec['fingerprint']
    if tokenizer.fingerprint != expected:
        raise TokenizerError(
            f'the {tokenizer.kind} tokenizer here has fingerprint {tokenizer.fingerprint[:12]}, '
            f'the one that made the tokens had {expected[:12]}: its ids mean other text'
        )
    return tokenizer


def load(name: str) -> Tokenizer:
    """The tokenizer of that name (the module's docstring lists the forms), or TokenizerError."""
    path = Path(name).expanduser()
    if name == 'bytes':
        return Bytes()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_json_file(path)
    if path.suffix == '.json':
        raise TokenizerError(f'{path} does not exist')
    repo, _, revision = name.partition('@')
    if repo.count('/') == 1 and not repo.startswith(('.', '/', '~')):
        return _from_folder(_download(repo, revision or None))
    if '/' in name or '\\' in name:
        raise TokenizerError(f'{path} does not exist: not a tokenizer.json, and not a folder with one')
    return Tiktoken(name)


def _download(repo: str, revision: str | None) -> Path:
    """The folder in the local cache that has the tokenizer's files of a Hugging Face repository."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(HF_FILES)))
    except Exception as error:
        raise TokenizerError(
            f'cannot download https://huggingface.co/{repo} ({type(error).__name__}); without a network: put '
            f'its {", ".join(HF_FILES[:5])} (those that it has) in a folder and give that folder; or, with a '
            'copy in the cache of huggingface_hub, set HF_HUB_OFFLINE=1'
        ) from error


def _read_json(path: Path, shape: Shape) -> Any:
    try:
        return read_declared(path, shape)
    except ShapeError as error:
        raise TokenizerError(f'not a tokenizer that can be read: {error}') from error


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8')
    except (OSError, UnicodeError) as error:
        raise TokenizerError(f'not a tokenizer that can be read: {path} ({error})') from error


def _from_json_file(path: Path) -> HuggingFace:
    """A tokenizer.json without config files beside it: the end-of-text token is recognised by its name."""
    content = _read_json(path, TOKENIZER_JSON)
    names = {token['content']: token['id'] for token in content.get('added_tokens') or []}
    eot = next((names[name] for name in END_NAMES if name in names), None)
    return HuggingFace(_read_utf8(path), eot=eot)


def _from_folder(folder: Path) -> HuggingFace:
    """A Hugging Face tokenizer folder: tokenizer.json, or vocab.json and merges.txt as GPT-2 has them."""
    configs: dict[str, Any] = {}
    for file in ('config.json', 'special_tokens_map.json', 'tokenizer_config.json'):  # the later wins
        if (folder / file).is_file():
            found = _read_json(folder / file, CONFIG_JSON)
            configs.update({k: v for k, v in found.items() if v is not None})
    # a token is written as its text or as {"content": text, ...}
    tokens = {k: v for k, v in configs.items() if k.endswith('_token')}
    tokens = {k: v.get('content') if isinstance(v, dict) else v for k, v in tokens.items()}
    special = {k: v for k, v in tokens.items() if isinstance(v, str)}
    if (folder / 'tokenizer.json').is_file():
        text = _read_utf8(folder / 'tokenizer.json')
    elif (folder / 'vocab.json').is_file() and (folder / 'merges.txt').is_file():
        text = _gpt2_json(folder, special, bool(configs.get('add_prefix_space', False)))
    else:
        raise TokenizerError(
            f'{folder} holds neither tokenizer.json nor vocab.json and merges.txt: with `transformers` '
            'installed, AutoTokenizer.from_pretrained(...).save_pretrained(...) writes a tokenizer.json'
        )
    vocabulary = HuggingFace(text).tokenizer

    def token_id(which: str) -> int | None:
        """The id of 'eos' or 'bos': by the token's text, else by config.json's number (a list: the first)."""
        number = configs.get(f'{which}_token_id')
        number = number[0] if isinstance(number, list) and number else number
        found = vocabulary.token_to_id(special[f'{which}_token']) if f'{which}_token' in special else None
        return number if found is None and isinstance(number, int) else found

    eot = token_id('eos')
    if eot is None:
        eot = next((i for i in map(vocabulary.token_to_id, END_NAMES) if i is not None), None)
    return HuggingFace(text, eot=eot, bos=token_id('bos'))


def _gpt2_json(folder: Path, special: dict[str, str], add_prefix_space: bool) -> str:
    """The text of a tokenizer.json for a folder with only vocab.json and merges.txt."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Model

    try:
        model = Model(models.BPE.from_file(str(folder / 'vocab.json'), str(folder / 'merges.txt')))
    except Exception as error:
        raise TokenizerError(f'{folder}: vocab.json and merges.txt cannot be read: {error}') from error
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    model.decoder = decoders.ByteLevel()
    added = folder / 'added_tokens.json'
    if added.is_file():
        model.add_tokens(
            [token for token, _ in sorted(_read_json(added, ADDED_JSON).items(), key=lambda item: item[1])]
        )
    # only tokens that have an id: a name that the vocabulary lacks would get an id that no model knows
    ids = {token: model.token_to_id(token) for token in (*special.values(), END_OF_TEXT)}
    known = sorted((i, token) for token, i in ids.items() if i is not None)
    model.add_special_tokens([AddedToken(token, special=True) for _, token in known])
    return str(model.to_str())
