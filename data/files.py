"""Opening files: local ones and URLs that fsspec knows (hf://...), compressed, or inside a .zip.

A stream from here ends only if its file ends: one that is truncated, or that goes on as something else, is a
CorpusError. A file inside an archive is named as if the archive were a folder: `texts.zip/a.txt`.
"""

import bz2
import hashlib
import io
import lzma
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol, cast

from configurator import UserError

BLOCK = 1 << 18  # bytes read at a time
# Bytes of compressed data that are decompressed at a time: so few that even data that is thousands of times
# smaller than its text, as repetitions are, takes little memory. More would hardly be faster.
FEED = 512
# suffix -> about how many bytes of text a stored byte holds
COMPRESSED = {'.gz': 4, '.xz': 5, '.bz2': 5, '.zst': 4, '.zip': 3}
ZERO_PADDED = ('.gz', '.xz')  # whose streams zero bytes may follow
IN_PARTS = ('.bz2', '.xz')  # whose few bytes may hold so much that it is taken in parts


class CorpusError(UserError):
    """Text that cannot be made into token files, in one line: which, why, and the fix."""


class Decompressor(Protocol):
    """One stream of zlib, bz2, lzma or zstandard: after its end `eof` is true.

    Those of bz2 and lzma give at most so many bytes as asked for, and `needs_input` is false while they hold
    more.
    """

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    @property
    def needs_input(self) -> bool: ...

    def decompress(self, data: bytes, at_most: int = ..., /) -> bytes: ...


def one_line(error: BaseException) -> str:
    """The class and the message of an error, in one line."""
    return f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'


@contextmanager
def named(path: str) -> Iterator[None]:
    """Turn whatever reading a file may raise into one line with its name."""
    try:
        yield
    except CorpusError:
        raise
    except Exception as error:  # of whichever library reads it
        raise CorpusError(f'{path} cannot be read: {one_line(error)}') from error


def suffixes(path: str | Path) -> tuple[str, str]:
    """'a/b.jsonl.xz' -> ('.jsonl', '.xz'): the format, and the compression or ''."""
    path = Path(path)
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), last) if last in COMPRESSED else (last, '')


def archive_and_member(path: str) -> tuple[str, str]:
    """'a/b.zip/c/d.txt' -> ('a/b.zip', 'c/d.txt') if the first is a file; else the path itself and ''."""
    if '://' not in path and not Path(path).exists():
        for parent in Path(path).parents:
            if parent.suffix.lower() == '.zip' and parent.is_file():
                return str(parent), Path(path).relative_to(parent).as_posix()
    return path, ''


def open_bytes(path: str) -> IO[bytes]:
    """The content of a file as a stream that is read from its start, decompressed as its suffix says."""
    kind = suffixes(path)[1]
    stored: Any = open_stored(path)
    if kind == '.zip':
        return open_only_member(stored, path)
    size = stored_size(path)
    whole = io.BufferedReader(WholeFile(stored, size, path), BLOCK)
    if not kind:
        return cast(IO[bytes], whole)
    return cast(IO[bytes], io.BufferedReader(Decompressed(cast(IO[bytes], whole), kind, path), BLOCK))


def open_stored(path: str) -> IO[bytes]:
    """A file as it is stored, at any position."""
    if '://' in path:
        import fsspec

        return cast(IO[bytes], fsspec.open(path, 'rb').open())
    archive, member = archive_and_member(path)
    return open(path, 'rb') if not member else zipfile.ZipFile(archive).open(member)


def open_seekable(path: str) -> IO[bytes]:
    """The content of a file at any position: if it is compressed, of a temporary copy that is not."""
    if not suffixes(path)[1]:
        return open_stored(path)
    copy = tempfile.TemporaryFile()  # the caller closes it
    with open_bytes(path) as file:
        shutil.copyfileobj(file, copy, BLOCK)
    copy.seek(0)
    return cast(IO[bytes], copy)


def members(path: str) -> list[str]:
    """The names of the files in a .zip, without folders, hidden files and what macOS adds."""
    with zipfile.ZipFile(path) as archive:
        return file_names(archive)


def file_names(archive: zipfile.ZipFile) -> list[str]:
    """As `members`."""
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    shown = [name for name in names if not any(part.startswith('.') for part in name.split('/'))]
    return sorted(name for name in shown if not name.startswith('__MACOSX/'))


def open_only_member(file: IO[bytes], path: str) -> IO[bytes]:
    """The file inside a .zip that holds one."""
    archive = zipfile.ZipFile(file)
    names = file_names(archive)
    if len(names) != 1:
        raise CorpusError(f'{path} holds {len(names)} files, not one: unpack it and give the folder')
    return archive.open(names[0])


class WholeFile(io.RawIOBase):
    """A file of a known size, read from its start; CorpusError if it ends before or after that size."""

    def __init__(self, file: IO[bytes], size: int | None, path: str) -> None:
        """size: in bytes; None if it is not known, as of some URLs."""
        self.file, self.size, self.path, self.position = file, size, path, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self.file.read(len(buffer))
        buffer[: len(block)] = block
        self.position += len(block)
        if not block and self.size not in (None, self.position):
            raise CorpusError(
                f'{self.path} ended after {self.position:,} of {self.size:,} bytes: it changed while it was '
                'read, or the connection was lost; run the same command again'
            )
        return len(block)

    def close(self) -> None:
        self.file.close()
        super().close()


class Decompressed(io.RawIOBase):
    """The content of a compressed file, of all its streams; CorpusError if the last one is not complete.

    The readers of bz2, lzma and zstandard end silently at a header that is damaged, or at the end of a file
    that is truncated.
    """

    def __init__(self, file: IO[bytes], kind: str, path: str) -> None:
        """kind: the suffix; path: for errors"""
        self.file, self.kind, self.path = file, kind, path
        self.decompressor: Decompressor | None = None  # of the stream that was begun
        self.streams = 0  # completed
        self.rest = b''  # read from the file, not decompressed
        self.ready, self.at = b'', 0  # decompressed; how much of it was taken
        self.new = decompressor(kind, path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self.at == len(self.ready):
            if not self.decompress():
                return 0
        block = self.ready[self.at : self.at + len(buffer)]
        buffer[: len(block)] = block
        self.at += len(block)
        return len(block)

    def decompress(self) -> bool:
        """Decompress the next few bytes, to `ready`; False at the end of the file."""
        self.ready, self.at = b'', 0
        more = self.kind in IN_PARTS and self.decompressor is not None and not self.decompressor.needs_input
        block = b'' if more else self.rest or self.file.read(FEED)
        self.rest = b''
        if self.decompressor is None and self.streams and self.kind in ZERO_PADDED:
            if block and not block.strip(b'\0'):
                return True
            block = block.lstrip(b'\0')
        if not block and not more:
            if self.decompressor is not None or not self.streams:
                raise CorpusError(
                    f'{self.path} is truncated: its {self.kind} data has no end; get the file again'
                )
            return False
        stream = self.decompressor or self.new()
        try:
            self.ready = stream.decompress(block, *([BLOCK] if self.kind in IN_PARTS else []))
        except Exception as error:  # each library has its own
            within = self.decompressor is not None or not self.streams
            what = 'damaged' if within else 'damaged, or followed by other data'
            raise CorpusError(
                f'{self.path}: its {self.kind} data is {what} ({one_line(error)}); get the file again'
            ) from error
        self.decompressor = stream
        if stream.eof:
            self.rest, self.decompressor, self.streams = stream.unused_data, None, self.streams + 1
        return True

    def close(self) -> None:
        self.file.close()
        super().close()


def decompressor(kind: str, path: str) -> Callable[[], Decompressor]:
    """What makes the decompressor of one stream of a file with the suffix `kind`."""
    if kind == '.gz':
        return lambda: cast(Decompressor, zlib.decompressobj(wbits=31))
    if kind == '.bz2':
        return bz2.BZ2Decompressor
    if kind == '.xz':
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)
    try:
        import zstandard
    except ImportError as error:
        raise CorpusError(
            f'{path}: nothing here reads {kind}: pip install zstandard, or decompress it'
        ) from error
    return lambda: cast(Decompressor, zstandard.ZstdDecompressor().decompressobj())


def stored_size(path: str) -> int | None:
    """Bytes of the file as it is stored; None if that is not known, as of some URLs."""
    if '://' in path:
        import fsspec

        filesystem, inner = fsspec.core.url_to_fs(path)
        size = filesystem.info(inner)['size']
        return None if size is None else int(size)
    archive, member = archive_and_member(path)
    if not member:
        return Path(path).stat().st_size
    with zipfile.ZipFile(archive) as file:
        return file.getinfo(member).file_size


def raw_blocks(path: str | Path) -> Iterator[bytes]:
    """The content of a file, decompressed, block after block; CorpusError names what cannot be read."""
    with named(str(path)), open_bytes(str(path)) as file:
        while block := file.read(BLOCK):
            yield block


def text_size(path: str) -> int:
    """Bytes of the content of a file; a compressed file is read for it."""
    size = None if suffixes(path)[1] else stored_size(path)
    return sum(map(len, raw_blocks(path))) if size is None else size


def text_sha256(path: str | Path) -> str:
    """SHA-256 of the content of a file."""
    digest = hashlib.sha256()
    for block in raw_blocks(path):
        digest.update(block)
    return digest.hexdigest()
