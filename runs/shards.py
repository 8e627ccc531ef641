"""Checkpoints of a model whose tensors are shared out among ranks: each rank writes its own part.

OUT_DIR/last.pt is then small. It holds all but the tensors, which are in OUT_DIR/shards/NAME/, as
torch.distributed.checkpoint writes them, and it says where in those files each part of a tensor lies and
what CRC-32 each file has. Files are whole and on the disk before last.pt takes its name; nothing in the
folder is read that last.pt does not name, and none of it as a pickle. Any number of ranks can read it, or a
single process.
"""

from __future__ import annotations

import secrets
import warnings
import zlib
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException  # which is no Exception
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from declared import List, Object, OneOf, Shape, ShapeError, Table, Text, Whole, check
from runs import checkpoint, files
from runs.checkpoint import CheckpointError
from runs.files import SHARDS

TENSORS = ('model', 'optimizer')  # the entries of a checkpoint that hold tensors


class ShardSaver(checkpoint.Saver):
    """As Saver, of ranks that each have a part: all of them call it alike. Files are written in the
    background, over a group of ranks of its own; an error of one rank is that of all."""

    def __init__(self, out_dir: str | Path, timeout: float, before=lambda: None):
        """timeout: seconds after which ranks give up on one that does not answer."""
        super().__init__(out_dir, before)
        self.group = dist.new_group(backend='gloo', timeout=timedelta(seconds=timeout))
        self.mesh = DeviceMesh.from_group(self.group, 'cpu')

    def _copy(self, state):
        local = super()._copy(map_tensors(state, lambda path, x: x.to_local() if is_shared(x) else x))
        shared = dict(tensors_of(state))

        def rejoin(path, copy):
            x = shared[path]
            if not is_shared(x):
                return copy
            shape = {'shape': x.shape, 'stride': x.stride()}
            return DTensor.from_local(copy, self.mesh, x.placements, run_check=False, **shape)

        return map_tensors(local, rejoin)

    def _write(self, state, best):
        main = dist.get_rank(self.group) == 0
        try:
            if main:
                self.before()
            name = [f'{state["iter"]:07d}-{secrets.token_hex(4)}']
            dist.broadcast_object_list(name, group=self.group, group_src=0)
            folder = self.out_dir / SHARDS / name[0]
            index = write(state, folder, self.group)
            error = [None]
            if main:
                try:
                    checkpoint.save({**map_tensors(state, shape_only), 'shards': index}, self.out_dir, best)
                except CheckpointError as e:
                    error = [str(e)]
            dist.broadcast_object_list(error, group=self.group, group_src=0)
            if error[0] is not None:
                raise CheckpointError(error[0])
        except Exception as e:
            self.error = e


def is_shared(x) -> bool:
    return isinstance(x, DTensor)


def shape_only(path: str, x):
    """A tensor of the same shape and type without numbers."""
    return torch.empty(x.shape, dtype=x.dtype, device='meta')


def tensors_of(state: dict):
    """Yield (path, tensor) of every tensor of a checkpoint; a path is such as 'model.lm_head.weight' or
    'optimizer.state.3.exp_avg'."""

    def walk(path, x):
        if isinstance(x, torch.Tensor):
            yield path, x
        elif isinstance(x, dict):
            for key, value in x.items():
                yield from walk(f'{path}.{key}', value)
        elif isinstance(x, (list, tuple)):
            for i, value in enumerate(x):
                yield from walk(f'{path}.{i}', value)

    for name in TENSORS:
        yield from walk(name, state.get(name))


def map_tensors(state: dict, change):
    """The same checkpoint, with change(path, tensor) in the place of every tensor."""

    def walk(path, x):
        if isinstance(x, torch.Tensor):
            return change(path, x)
        if isinstance(x, dict):
            return {key: walk(f'{path}.{key}', value) for key, value in x.items()}
        if isinstance(x, (list, tuple)):
            return type(x)(walk(f'{path}.{i}', value) for i, value in enumerate(x))
        return x

    return {**state, **{name: walk(name, state[name]) for name in TENSORS if name in state}}


def write(state: dict, folder: Path, group) -> dict:
    """Write the tensors of a checkpoint into a new folder, each rank of the group its part -> the index, by
    which they are read: plain data. CheckpointError on all ranks where one of them cannot."""
    first, tensors, also = {}, {}, {}
    for path, x in tensors_of(state):  # a tied weight is one tensor under two names
        local = x.to_local() if is_shared(x) else x
        key = (local.data_ptr(), x.shape) if local.numel() else path
        known = first.setdefault(key, path)
        if known == path:
            tensors[path] = x
        else:
            also[path] = known
    # Whether two names are one tensor must not depend on the rank: an empty part has no address of its own
    names = [None]
    if dist.get_rank(group) == 0:
        names = [also]
    dist.broadcast_object_list(names, group=group, group_src=0)
    also = names[0]
    tensors = {path: x for path, x in tensors_of(state) if path not in also}
    try:
        writer = dcp.FileSystemWriter(folder, sync_files=True)
        metadata = dcp.save(tensors, storage_writer=writer, process_group=group)
        files.sync_folder(folder)
        own = sorted(folder.glob(f'__{dist.get_rank(group)}_*'))
        sums: list[dict] = [{}] * dist.get_world_size(group)
        dist.all_gather_object(sums, {path.name: crc(path) for path in own}, group=group)
    except (Exception, CheckpointException) as e:  # of any rank: it is raised on all
        raise CheckpointError(
            f'{folder} could not be written: {_reason(e)}; the checkpoint before it is whole: make room and '
            'go on with --init_from=resume'
        ) from e
    entries = {}
    for path, entry in metadata.state_dict_metadata.items():
        chunks = []
        for i, chunk in enumerate(entry.chunks):
            where = metadata.storage_data[MetadataIndex(path, chunk.offsets, i)]
            place = {'file': where.relative_path, 'at': where.offset, 'length': where.length}
            chunks.append({'offsets': list(chunk.offsets), 'sizes': list(chunk.sizes), **place})
        dtype = str(entry.properties.dtype).removeprefix('torch.')
        entries[path] = {'dtype': dtype, 'shape': list(entry.size), 'chunks': chunks}
    of_all = {name: value for of_rank in sums for name, value in of_rank.items()}
    return {'folder': folder.name, 'files': of_all, 'tensors': entries, 'also': also}


def _reason(e: Exception) -> str:
    """One line, of the rank that failed first."""
    failures = getattr(e, 'failures', None) or {}
    told = [f'rank {rank}: {error[0]}' for rank, error in sorted(failures.items())]
    return (' '.join((told or [str(e)])[0].split()) or type(e).__name__)[:300]


def crc(path: Path) -> list:
    """[bytes, CRC-32] of a file."""
    value, size = 0, 0
    with open(path, 'rb') as file:
        while block := file.read(2**24):
            value, size = zlib.crc32(block, value), size + len(block)
    return [size, value]


COUNT, TEXT = Whole(0), Text()
CHUNK: dict[str, Shape] = {
    'offsets': List(COUNT),
    'sizes': List(COUNT),
    'file': TEXT,
    'at': COUNT,
    'length': COUNT,
}
TENSOR: dict[str, Shape] = {
    'dtype': OneOf('float32', 'bfloat16', 'float16', 'float64', 'int64'),
    'shape': List(COUNT),
    'chunks': List(Object(CHUNK)),
}
INDEX = Object(
    {
        'folder': TEXT,
        'files': Table(TEXT, List(COUNT, 2)),
        'tensors': Table(TEXT, Object(TENSOR)),
        'also': Table(TEXT, TEXT),
    }
)


def check_index(path: Path, index):
    """CheckpointError where what a checkpoint says of its parts has another form than `write` gives it."""
    try:
        check(index, INDEX, str(path))
    except ShapeError as e:
        raise CheckpointError(f'{e}: what it says of its parts is damaged') from None


def verify(path: Path, index: dict):
    """CheckpointError where a file that the checkpoint at path names is missing or damaged."""
    for name, wanted in index['files'].items():
        part = path.parent / SHARDS / _plain(path, index['folder']) / _plain(path, name)
        if not part.exists():
            raise CheckpointError(f'{path} needs {part}, which is missing')
        size, value = crc(part)
        if [size, value] != list(wanted):
            what = f'has {size:,} bytes of {wanted[0]:,}' if size != wanted[0] else 'has another checksum'
            raise CheckpointError(f'{path} is damaged: its part {part} {what}')


def _plain(path: Path, name) -> str:
    """A name that stays in its folder; CheckpointError for any other."""
    if not isinstance(name, str) or Path(name).name != name or name.startswith('.'):
        raise CheckpointError(f'{path} is damaged: it names a part {name!r:.80}')
    return name


class Reader(dcp.FileSystemReader):
    """Reads by the index of last.pt, not by the metadata beside the files, which are a pickle."""

    def __init__(self, path: Path, index: dict):
        """path: of the checkpoint."""
        super().__init__(path.parent / SHARDS / _plain(path, index['folder']))
        self.index, self.of = index, path

    def read_metadata(self, *args, **kwargs) -> Metadata:
        entries, places = {}, {}
        for path, entry in self.index['tensors'].items():
            chunks = []
            for i, chunk in enumerate(entry['chunks']):
                offsets, sizes = torch.Size(chunk['offsets']), torch.Size(chunk['sizes'])
                chunks.append(ChunkStorageMetadata(offsets, sizes))
                place = _StorageInfo(_plain(self.of, chunk['file']), chunk['at'], chunk['length'])
                places[MetadataIndex(path, offsets, i)] = place
            properties = TensorProperties(dtype=getattr(torch, entry['dtype']))
            entries[path] = TensorStorageMetadata(properties, torch.Size(entry['shape']), chunks)
        return Metadata(entries, planner_data={}, storage_data=places)


def fill(state: dict, path: Path, places: dict | None = None) -> dict:
    """The checkpoint at path, whose tensors have shapes and no numbers (as load gives it with whole=False),
    with all of its tensors.

    places: {path of a tensor: what to read it into}, such as this rank's part of it (a DTensor); every rank
    then calls this. None: new tensors, read by this process alone.
    """
    index = state['shards']
    if places is None:
        dtypes = {name: getattr(torch, entry['dtype']) for name, entry in index['tensors'].items()}
        places = {
            name: torch.empty(entry['shape'], dtype=dtypes[name]) for name, entry in index['tensors'].items()
        }
    wanted = {name: x for name, x in places.items() if name in index['tensors']}
    try:
        alone = not any(map(is_shared, wanted.values()))
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'torch.distributed is disabled')  # it says what is asked for
            dcp.load(wanted, storage_reader=Reader(path, index), no_dist=alone)
    except (Exception, CheckpointException) as e:
        raise CheckpointError(f'{path} is damaged: its parts cannot be read ({_reason(e)})') from None
    also = index['also']
    return map_tensors(state, lambda name, x: wanted[also.get(name, name)])
