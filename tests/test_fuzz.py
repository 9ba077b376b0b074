"""Every reader of files, given damaged ones: only the documented errors may come out, and no memory that a header asks
for.

Damage is of two kinds: bytes changed anywhere, and contents changed under checksums that fit, which comes further.
LAP_NB_FUZZ sets the number of damaged files for each reader."""
import ast
import dataclasses
import gzip
import io
import json
import os
import random
import re
import resource
import struct
import time
import warnings
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from lap_nb import data, files
from lap_nb.lab import analysis, catalogue, design, store
from lap_nb.data import file_md5, parse_idx, read_idx, read_npz
from lap_nb.dynamics import Trajectory
from lap_nb.ensembles import _read_note
from lap_nb.lab.modes import read_modes
from lap_nb.lab.analysis import overview, load_records
from lap_nb.lab.store import done, read_lines
from lap_nb.files import CheckpointError, load_checkpoint, save_checkpoint
from test_package import module_text, modules

COUNT = int(os.environ.get('LAP_NB_FUZZ', 400))
MEMORY = 512 << 20   # bytes that reading a file of a few kB may ask for
SECONDS = 5          # of the processor that it may take
NUMBERS = [0, 1, 2, 127, 128, 255, 256, 32767, 65535, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
VALUES = [
    None, True, False, 0, -1, 1e308, 10 ** 400,
    float('nan'),
    float('inf'), '', 'x', '\ud800', [], [[]], {}, {'a': 1}, [None] * 3]
TOKENS = [
    b'null', b'[', b']', b'{', b'}', b'"', b',', b':', b'NaN', b'1e999', b'-1', b'\n', b'\0', b'\xff\xfe', b'[' * 3000,
    b'{"a":' * 2000, b'9' * 5000, b'PK\x03\x04', b'(((']


def damage(rng, content, others):
    "`content` changed in one to four places."
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, size = rng.randrange(len(content) + 1), rng.choice((1, 2, 4, 8, 64, 1024))
        match rng.randrange(10):
            case 0: content[at:at + 1] = bytes(b ^ 1 << rng.randrange(8) for b in content[at:at + 1])
            case 1: content[at:at + 1] = bytes([rng.choice(NUMBERS) & 255])
            case 2: content[at:at + 4] = struct.pack(rng.choice('<>') + 'I', rng.choice(NUMBERS))
            case 3: content[at:at + 8] = struct.pack(rng.choice('<>') + 'Q', rng.choice((0, 1 << 33, (1 << 63) - 1, (1 << 64) - 1)))
            case 4: del content[at:at + size]
            case 5: content[at:at] = content[at:at + size]
            case 6: content[at:at] = rng.randbytes(size)
            case 7: content[at:at] = rng.choice(TOKENS)
            case 8: del content[at:]
            case 9:
                other = rng.choice(others)
                content[at:at + size] = other[(start := rng.randrange(len(other) + 1)):start + size]
    if rng.random() < .2 and (digits := list(re.finditer(rb'\d+', content))):
        found = rng.choice(digits)
        content[found.start():found.end()] = rng.choice((b'0', b'-1', b'99999999999', b'1e400'))
    return bytes(content)


def twist(rng, value):
    "A JSON `value` in which one place, however deep, is something else, gone, or there twice."
    place = [value]
    while rng.random() < .85 and isinstance(place[-1], (dict, list)) and place[-1]:
        place.append(rng.choice(list(place[-1].values() if isinstance(place[-1], dict) else place[-1])))
    if len(place) == 1: return rng.choice(VALUES)
    into, old = place[-2], place[-1]
    key = next(k for k, v in (into.items() if isinstance(into, dict) else enumerate(into)) if v is old)
    match rng.randrange(4):
        case 0: del into[key]
        case 1 if isinstance(into, list): into.insert(key, json.loads(json.dumps(old)))
        case _: into[key] = rng.choice(VALUES)
    return value


def repacked(rng, content, others):
    "A zip archive with one part damaged, or gone, under checksums that fit."
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {i.filename: archive.read(i) for i in archive.infolist()}
    name = rng.choice(list(parts))
    if rng.random() < .05: del parts[name]
    else: parts[name] = damage(rng, parts[name], list(parts.values()))
    out, how = io.BytesIO(), rng.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))
    with zipfile.ZipFile(out, 'w', how) as archive:
        for key, part in parts.items(): archive.writestr(key, part)
    return out.getvalue()


def twisted_json(rng, content, others): return json.dumps(twist(rng, json.loads(content))).encode()


def twisted_record(rng, content, others):
    "A record with one line changed, dropped, doubled or moved, under a checksum that fits."
    lines = [json.loads(line) for line in content.splitlines()]
    at = rng.randrange(len(lines))
    match rng.randrange(6):
        case 0: del lines[at]
        case 1: lines.insert(rng.randrange(len(lines)), lines.pop(at))
        case 2: lines.append(lines[at])
        case _: lines[at] = twist(rng, lines[at])
    sealed = [
        line | {'sha': design.checksum({k: v for k, v in line.items() if k != 'sha'})}
        if isinstance(line, dict)
        else line
        for line in lines
    ]
    return b''.join(json.dumps(line).encode() + b'\n' for line in sealed)


def recompressed(rng, content, others):
    "A gzip file of damaged content."
    return gzip.compress(damage(rng, gzip.decompress(content), [gzip.decompress(o) for o in others]), 1, mtime=0)


# The readers: a whole file or several, how to damage it besides anywhere, what reads it, and what may come out

def idx(*shape):
    return struct.pack(f'>I{len(shape)}I', 0x800 + len(shape), *shape) + bytes(
        i & 255 for i in range(int(np.prod(shape)))
    )


def trajectory_file(folder):
    torch.manual_seed(0)
    Trajectory([torch.randn(3, 4, 5), torch.randn(2, 4, 2).bfloat16()], [0.5, 1.0], ['a', 'b', 'c']).save(
        folder / 'whole'
    )
    return (folder / 'whole').read_bytes()


def checkpoint_file(folder):
    state = {
        'weights': torch.arange(12.).view(3, 4), 'half': torch.ones(2, dtype=torch.bfloat16), 'step': 7,
        'points': [{'loss': .5}], 'rng': [[torch.get_rng_state()[:9]]]}
    save_checkpoint(folder / 'whole', state)
    return (folder / 'whole').read_bytes()


TINY = design.Study('tiny', 'Does it work?', (design.Grid(('circles',), (20,), (design.Method('default'),), seeds=3),))


def record_file(folder):
    cell = next(iter(TINY.cells()))[0]
    note = {
        'id': 'r1', 'config': cell.config, 'device': 'cpu', 'device_name': 'a processor', 'threads': 1,
        'device_seconds': 2.5, 'lap_nb': '0', 'settings': {'method': {'name': 'default'}, 'net': {'K': 3}}}
    head = {'study': 'tiny', 'scale': 'cpu', 'data': 'digits', 'n': 50, 'net': 'dense', 'method': 'default'}
    lines = [{'kind': 'run', 'format': store.FORMAT, 'study': 'tiny', 'scale': 'cpu', **note}]
    lines += [
        head | {'run': 'r1', 'config': cell.config, 'seed': s, 'test_accuracy_last': .5, 'curve': [[1, .5]]}
        for s in range(3)]
    return ''.join(store._line(line) for line in lines).encode()


def read_record(path):
    "All that reads a record: its lines, what is done, and the rows of a study."
    with pytest.MonkeyPatch.context() as patch:
        for room in (catalogue, analysis): patch.setattr(room, 'STUDIES', {'tiny': lambda scale: TINY})
        read_lines(path); done(path)
        found = load_records('tiny', path.parent, stale=True)
        len(found), found.device, found.where(seed=[0, 1]), repr(found)
        overview(path.parent)


def cifar_files(folder):
    "Grids of 3 and 2 pictures with their labels, as one archive of three files."
    from PIL import Image
    rng, out = np.random.default_rng(0), io.BytesIO()
    with zipfile.ZipFile(out, 'w') as archive:
        for name, columns in (('train.webp', 3), ('test.webp', 2)):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (32, 32 * columns, 3),
                                         dtype=np.uint8)).save(file, 'WEBP', lossless=True)
            archive.writestr(name, file.getvalue())
        file = io.BytesIO()
        np.savez(file, train_labels=np.array([0, 1, 2]), test_labels=np.array([3, 4]))
        archive.writestr('index.npz', file.getvalue())
    return out.getvalue()


def read_cifar(path):
    """Read the part of CIFAR-10 with checksums that fit whatever is there, so that damage comes further than the
    checksums."""
    folder = path.parent / 'cifar10-lossless-subset'
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(path) as archive:
        for name in data.CIFAR10_PART: (folder / name).write_bytes(archive.read(name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, 'CIFAR10_PART', {name: file_md5(folder / name) for name in data.CIFAR10_PART})
        return data.cifar10_part(path.parent)


def damaged_cifar(rng, content, others):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {i.filename: archive.read(i) for i in archive.infolist()}
    name, out = rng.choice(list(parts)), io.BytesIO()
    how = repacked if name == 'index.npz' and rng.random() < .5 else damage
    parts[name] = how(rng, parts[name], list(parts.values()))
    with zipfile.ZipFile(out, 'w') as archive:
        for key, part in parts.items(): archive.writestr(key, part)
    return out.getvalue()


def modes_file(folder):
    "A record of measured modes with two rows."
    row = {
        'net': 'dense', 'members': 2, 'mode': 'batched', 'device': 'cpu', 'device_name': 'a processor', 'threads': 1,
        'wall': [.1, .2], 'processor': [.1, .3]}
    return json.dumps({'format': 1, 'rows': [row, row | {'members': 5}]}).encode()


def read_measured(path):
    "A record of modes, and what a figure makes of it."
    return {(r['net'], r['members'], r['mode']): torch.tensor(r['processor'], dtype=torch.float64).median().item()
            for r in read_modes(path)['rows']}


@dataclasses.dataclass
class Reader:
    make: object                 # folder -> bytes of whole files
    read: object                 # path -> anything
    ways: list                   # of damaging them
    errors: object = ValueError  # that are documented
    name: str = 'file'           # of the file


READERS = {
    'parse_idx': Reader(
        lambda _: [idx(3, 2, 2), idx(5)],
        lambda p: (parse_idx(p.read_bytes(), 3), parse_idx(p.read_bytes(), 1)),
        [damage],
    ),
    'read_idx': Reader(
        lambda _: [gzip.compress(idx(3, 2, 2), mtime=0), gzip.compress(bytes(9), mtime=0)],
        lambda p: read_idx(p, file_md5(p), 3),
        [damage, recompressed],
    ),
    'read_npz': Reader(lambda f: [trajectory_file(f)], read_npz, [damage, repacked]),
    'trajectory': Reader(lambda f: [trajectory_file(f)], Trajectory.load, [damage, repacked]),
    'checkpoint': Reader(lambda f: [checkpoint_file(f)], load_checkpoint, [damage, repacked], CheckpointError),
    'record': Reader(lambda f: [record_file(f)], read_record, [damage, twisted_record], name='tiny.jsonl'),
    'ensemble': Reader(
        lambda _: [
            json.dumps(
                {
                    'format': 1,
                    'members': [{'seed': 0}],
                    'settings': {'epochs': 1},
                    'ways': [['batched', 'grouped']],
                    'rows': [[0]],
                }
            ).encode()
        ],
        _read_note,
        [damage, twisted_json],
    ),
    'modes': Reader(lambda f: [modes_file(f)], read_measured, [damage, twisted_json]),
    'cifar': Reader(lambda f: [cifar_files(f)], read_cifar, [damaged_cifar]),
}


@contextmanager
def limited_memory(more):
    "No more than `more` bytes of address space beyond what there is; asking for them raises."
    now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, old[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_AS, old)


def chain(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize('name', READERS)
def test_damaged_files_raise_only_what_is_documented(name, tmp_path, monkeypatch):
    reader, rng = READERS[name], random.Random(f'{name} 1')
    path, wholes = tmp_path / reader.name, reader.make(tmp_path)
    path.write_bytes(wholes[0])
    if name != 'parse_idx': reader.read(path)   # the whole file is read
    refused, slowest = 0, 0.
    with limited_memory(MEMORY), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for i in range(COUNT):
            content = rng.choice(reader.ways)(rng, rng.choice(wholes), wholes)
            path.write_bytes(content)
            start = time.process_time()
            try: reader.read(path)
            except Exception as error:
                refused += 1
                asked = [e for e in chain(error) if isinstance(e, MemoryError) or 'allocate' in str(e)]
                if isinstance(error, reader.errors) and not asked: continue
                (keep := tmp_path / 'culprit').write_bytes(content)
                pytest.fail(
                    f'file {i} raises {type(error).__name__}: {str(error)[:300]}; memory asked for: {asked[:1]}; the '
                    f'file is {keep}'
                )
            finally: slowest = max(slowest, time.process_time() - start)
    assert slowest < SECONDS, f'{slowest:.1f} s for one file'
    assert refused > COUNT / 4, f'only {refused} of {COUNT} damaged files were refused'
    print(f'{name}: {COUNT} files, {refused} refused, the slowest took {1000 * slowest:.0f} ms')


OPENS = re.compile(
    r'json\.loads?\(|np\.load\(|torch\.load\(|zipfile\.ZipFile\(|gzip\.open\(|Image\.open\(|\bread_bytes\(|\bread_text\('
)
# The functions that read a file or decode one. Not of a user's files: pictures just drawn (`_png`), what a worker
# process
# sends (`_unpacked`), settings through JSON and back (`_noted`), a file compared with what it should hold (`_kept`),
# whether the
# Trainer's own file is whole (`_lacks`), the system's own files (`free_memory`, `_processor`). All others are called by
# the readers above.
OPENING = {
    'data.cifar10_part', 'data.read_idx', 'data.read_npz', 'dynamics._png', 'dynamics._read', 'ensembles._noted',
    'files.read_json', 'ensembles._unpacked', 'ensembles._kept', 'adapters._lacks', 'lab.modes.read_modes',
    'lab.store._parsed', 'lab.store.read_lines', 'files._check_archive', 'training._processor', 'files.load_checkpoint',
    'checks.free_memory'}


def test_no_reader_is_left_out():
    "A new function that opens a file needs a reader above."
    found = set()
    for module in modules():
        text = module_text(module)
        opening = [
            n for n in ast.walk(ast.parse(text))
            if isinstance(n, ast.FunctionDef) and OPENS.search(ast.get_source_segment(text, n))]
        # the innermost one
        found |= {f'{module}.{n.name}' for n in opening if not any(m in opening for m in ast.walk(n) if m is not n)}
    assert found == OPENING


def test_checkpoints_that_are_not_archives_are_refused_unread(tmp_path):
    "PyTorch's older formats allocate what they announce before they read it."
    torch.save({'kind': files.CHECKPOINT, 'format': 1, 'state': {}, 'sha256': ''}, tmp_path / 'old.pt',
               _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match='damaged, or not a checkpoint .BadZipFile'):
        load_checkpoint(tmp_path / 'old.pt')
