"Files: whole or not there, with one writer, read back as written; names that do not act."
import collections
import dataclasses
import enum
import errno
import fractions
import io
import os
import pathlib
import resource
import signal
import stat
import subprocess
import sys
import threading
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lap_nb import files
from lap_nb.data import digits, file_md5, read_npz
from lap_nb.dynamics import Trajectory
from lap_nb.files import (CheckpointError, as_code, as_text, check_storable, claim, digest, find_unstorable, in_words,
                          load_checkpoint, read_bounded, save_checkpoint, tidy, write_atomically)
from lap_nb.nets import dense_net
from lap_nb.training import Checkpoints, Diverged, fit


def names(folder): return sorted(p.name for p in folder.iterdir())


@contextmanager
def umask(value):
    old = os.umask(value)
    try: yield
    finally: os.umask(old)


def python(code, *args, **kwargs):
    "A process that runs `code`; it says what it does on its standard output."
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True, cwd=Path(files.__file__).parents[1], **kwargs)


# The old file's place

@pytest.mark.parametrize('mask', [0o022, 0o077, 0o002, 0])
def test_a_new_file_has_the_mode_that_the_user_set(tmp_path, mask):
    with umask(mask): write_atomically(tmp_path / 'new', b'x')
    assert stat.S_IMODE((tmp_path / 'new').stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize('mode', [0o600, 0o640, 0o664, 0o755])
def test_an_old_file_keeps_its_mode(tmp_path, mode):
    path = tmp_path / 'old'
    path.touch(); path.chmod(mode)
    with umask(0o022): write_atomically(path, b'x')
    assert stat.S_IMODE(path.stat().st_mode) == mode and path.read_bytes() == b'x'


def test_a_private_file_is_never_open_to_others(tmp_path, monkeypatch):
    path, seen = tmp_path / 'old', []
    path.touch(); path.chmod(0o600)
    monkeypatch.setattr(files.os, 'fsync', lambda handle: seen.append(stat.S_IMODE(os.fstat(handle).st_mode)))
    write_atomically(path, b'secret')
    assert seen[0] == 0o600


@pytest.mark.parametrize('make', [
    lambda d: (d / 'link').symlink_to(d / 'there' / 'file'),
    lambda d: (d / 'link').symlink_to(Path('there') / 'file'),
    lambda d: ((d / 'between').symlink_to(d / 'there'), (d / 'link').symlink_to(d / 'between' / 'file'))], ids=['absolute', 'relative', 'over a folder'])
@pytest.mark.parametrize('old', [True, False], ids=['there', 'dangling'])
def test_a_link_stays_a_link(tmp_path, make, old):
    (tmp_path / 'there').mkdir()
    if old: (tmp_path / 'there' / 'file').write_bytes(b'old')
    make(tmp_path)
    write_atomically(tmp_path / 'link', b'new')
    assert (
        (tmp_path / 'link').is_symlink()
        and (tmp_path / 'there' / 'file').read_bytes() == b'new'
        and names(tmp_path / 'there') == ['file']
    )


def test_places_that_are_no_files(tmp_path):
    (tmp_path / 'loop').symlink_to(tmp_path / 'loop')
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'file').touch()
    for name, words in (('loop', 'leads to itself'), ('.', 'a folder; name a file in it'), ('pipe', 'not a plain file'),
                        ('missing/file', 'make its folder first'), ('file/file', 'a folder on the way to it is a file'),
                        ('x' * 250, 'choose a shorter name')):
        with pytest.raises(OSError, match=words) as e: write_atomically(tmp_path / name, b'x')
        assert str(tmp_path / name) in str(e.value) and e.value.errno
    assert names(tmp_path) == ['file', 'loop', 'pipe'] and stat.S_ISFIFO((tmp_path / 'pipe').stat().st_mode)
    with pytest.raises(OSError, match='not a plain file'): write_atomically('/dev/null', b'x')
    assert Path('/dev/null').is_char_device()


@pytest.mark.parametrize('number, words', [(errno.ENOSPC, 'make room'), (errno.EDQUOT, 'make room'), (errno.EROFS, 'where you may write'), (errno.EACCES, 'where you may write'),
                                           (errno.EIO, 'another place')])
@pytest.mark.parametrize('call', ['fsync', 'replace', 'open'])
def test_an_error_of_the_disk_names_the_file_and_says_what_to_do(tmp_path, monkeypatch, number, words, call):
    path = tmp_path / 'file'
    write_atomically(path, b'old')
    def fail(*args): raise OSError(number, os.strerror(number))
    with monkeypatch.context() as m:
        m.setattr(files.os, call, fail)
        with pytest.raises(OSError, match=words) as e: write_atomically(path, b'new')
    assert (
        e.value.errno == number
        and type(e.value) is type(OSError(number, ''))
        and str(path) in str(e.value)
        and os.strerror(number) in str(e.value)
    )
    assert path.read_bytes() == b'old' and names(tmp_path) == ['file']


def test_words_are_said_once(tmp_path):
    with pytest.raises(FileNotFoundError) as e, in_words('outer'), in_words('inner'): open(tmp_path / 'a' / 'b')
    assert str(e.value).count('make its folder first') == 1 and 'inner' in str(e.value)
    with pytest.raises(OSError, match='^mine$'), in_words('file'): raise OSError('mine')


# Tidying

def test_only_what_this_file_left_is_tidied_away(tmp_path):
    mine = ['.run.pt.0a1b2c3d.partial', '.run.pt.a_c4e6g8.partial']
    others = [
        '.run.pt.best.0a1b2c3d.partial', '.run[12].pt.0a1b2c3d.partial', '.run1.pt.0a1b2c3d.partial',
        '.run.2.0a1b2c3d.partial', '.run.0a1b2c3d.partial', '.xrun.pt.0a1b2c3d.partial', 'run.pt.0a1b2c3d.partial',
        '.run.pt.partial', '.runxpt.0a1b2c3d.partial', 'run.pt.best', '.run.pt.0a1b2c3d.partial.bak']
    for name in mine + others: (tmp_path / name).touch()
    (tmp_path / '.run.pt.folder.partial').mkdir()
    tidy(tmp_path / 'run.pt')
    assert names(tmp_path) == sorted(others + ['.run.pt.folder.partial'])
    for name, left in (('run[12].pt', '.run[12].pt.0a1b2c3d.partial'), ('run.2', '.run.2.0a1b2c3d.partial'),
                       ('run.pt.best', '.run.pt.best.0a1b2c3d.partial')):
        tidy(tmp_path / name)
        assert left not in names(tmp_path)
    assert {'.run1.pt.0a1b2c3d.partial', '.run.0a1b2c3d.partial'} < set(names(tmp_path))


WRITER = """
import os, sys
from lap_nb import files
sync = os.fsync
def slow(handle):
    print('writing', flush=True); sys.stdin.readline(); sync(handle)
files.os.fsync = slow
files.write_atomically(sys.argv[1], b'new')
print('written', flush=True)
"""


def test_what_a_living_process_writes_stays_and_what_a_killed_one_left_goes(tmp_path):
    path = tmp_path / 'file'
    with python(WRITER, path) as living, python(WRITER, path) as killed:
        assert living.stdout.readline() == killed.stdout.readline() == 'writing\n'
        assert len(names(tmp_path)) == 2
        killed.kill(); killed.wait()
        tidy(path)
        assert len(names(tmp_path)) == 1, 'one half-written file is gone, the other is being written'
        for _ in range(2): living.stdin.write('\n')   # the file, then its folder
        living.stdin.close()
        assert living.stdout.read().endswith('written\n')
    assert names(tmp_path) == ['file'] and path.read_bytes() == b'new'


# One writer

CLAIMANT = """
import os, sys
from lap_nb.files import claim
os.chdir(os.path.dirname(sys.argv[1]))
try: free = claim(sys.argv[1])
except BlockingIOError as e: print('refused', e, flush=True)
else: print('claimed', flush=True); sys.stdin.readline()
"""


def test_a_claim_holds_under_every_name_in_every_process_and_ends_with_it(tmp_path, monkeypatch):
    path = tmp_path / 'run.pt'
    (tmp_path / 'link').symlink_to(path)
    (tmp_path / 'sub').mkdir()
    monkeypatch.chdir(tmp_path)
    with python(CLAIMANT, path) as holder:
        assert holder.stdout.readline() == 'claimed\n'
        for name in (path, 'run.pt', './run.pt', 'sub/../run.pt', 'link'):
            with pytest.raises(BlockingIOError, match=f'{name} is in use by another training'): claim(name)
        for other in ('run.pt.best', 'run[12].pt', 'run', '.run.pt'): claim(other)()
        holder.send_signal(signal.SIGKILL); holder.wait()
    free = claim('link')
    with pytest.raises(BlockingIOError): claim(path)
    with python(CLAIMANT, path) as other: assert other.stdout.readline().startswith('refused')
    refused = []
    def in_a_thread():
        with suppress(BlockingIOError): refused.append(claim(path))
    thread = threading.Thread(target=in_a_thread)
    thread.start(); thread.join()
    assert not refused
    free(); free()
    claim(path)()
    assert names(tmp_path) == ['link', 'sub']


def test_giving_free_twice_does_not_free_another_claim(tmp_path):
    first = claim(tmp_path / 'run.pt'); first()
    second = claim(tmp_path / 'run.pt'); first()
    with pytest.raises(BlockingIOError): claim(tmp_path / 'run.pt')
    second()


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_so(tmp_path, monkeypatch, number):
    import fcntl
    def none(*args): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, 'flock', none)
    with pytest.raises(OSError, match='no locks, choose a place on a disk of this machine.*run.pt'):
        claim(tmp_path / 'run.pt')
    write_atomically(tmp_path / 'file', b'x')   # needs none
    (tmp_path / '.file.0a1b2c3d.partial').touch()
    tidy(tmp_path / 'file')
    assert '.file.0a1b2c3d.partial' in names(tmp_path), 'it may be in use'


def train(path, epochs=2, resume=False, model=None, rollback=0, **settings):
    torch.manual_seed(0)
    model = dense_net(64, 10, 2, 8) if model is None else model
    return fit(model,
               digits().split(40), epochs=epochs, eval_every=1,
               checkpoints=Checkpoints(path, resume, rollback=rollback), **settings)


TRAINER = """
import sys, torch
sys.path.insert(0, sys.argv[2])
import test_files
def tell(training):
    print('point', flush=True); sys.stdin.readline()
test_files.train(sys.argv[1], 5, callbacks=[tell])
"""


def test_two_trainings_on_one_file(tmp_path):
    path = tmp_path / 'run.pt'
    (tmp_path / 'link').symlink_to(path)
    with python(TRAINER, path, Path(__file__).parent) as first:
        assert first.stdout.readline() == 'point\n'
        for name, resume in ((path, True), (path, False), (tmp_path / 'link', 'force')):
            with pytest.raises(BlockingIOError, match='in use by another training'): train(name, 3, resume)
        train(tmp_path / 'run.pt.best')
        first.kill(); first.wait()
    train(path, 3, True)
    def again(training): train(tmp_path / 'link', 9, True)
    with pytest.raises(BlockingIOError): train(path, 9, True, callbacks=[again])
    class Stop(Exception): "Interrupts a training."
    def stop(training): raise Stop
    with pytest.raises(Stop) as kept: train(path, 9, True, callbacks=[stop])   # its frames are kept, as in a notebook
    assert len(train(path, 9, True).curves['epoch']) == 9 and kept
    assert names(tmp_path) == ['link', 'run.pt', 'run.pt.best']


def test_two_threads_on_one_file(tmp_path):
    inside, end = threading.Event(), threading.Event()
    def hold(training): inside.set(); end.wait(60)
    thread = threading.Thread(target=train, args=(tmp_path / 'run.pt',), kwargs=dict(callbacks=[hold]))
    thread.start()
    try:
        assert inside.wait(60)
        with pytest.raises(BlockingIOError): train(tmp_path / 'run.pt', resume=True)
    finally: end.set(); thread.join()
    train(tmp_path / 'run.pt', 3, True)


def test_a_name_of_a_checkpoint(tmp_path):
    for name in (3, ['run.pt'], b'run.pt', 'a\0b'):
        with pytest.raises(TypeError, match='path is .*, expected'): train(name)


# What a state can hold

@dataclasses.dataclass
class Record: a: int = 1


class Colour(enum.Enum): RED = 1
class Level(enum.IntEnum): LOW = 1
class Text(str): "A text of a type of its own."
Point = collections.namedtuple('Point', 'x y')


class Extra(nn.Linear):
    "A layer with a state beyond its tensors."
    def __init__(self, value):
        super().__init__(64, 10)
        self.value = value
    def get_extra_state(self): return {'inner': [self.value]}
    def set_extra_state(self, state): self.value = state['inner'][0]


STORABLE = dict(nothing=None, flag=True, whole=7, large=1 << 100, number=.5, nan=float('nan'), text='a',
                surrogate='\ud800', bytes=b'ab', bytearray=bytearray(b'ab'), empty_bytearray=bytearray(), tuple=(1, 2),
                list=[1], dict={'a': 1}, intkeys={1: 2}, ordered=collections.OrderedDict(a=1),
                counter=collections.Counter('aab'), set={1, 2, 3}, texts={'b', 'a', 'c'}, complex=1j,
                dtype=torch.float32, size=torch.Size([1, 2]), device=torch.device('cpu'), tensor=torch.ones(2),
                scalar=torch.tensor(3), half=torch.ones(2).bfloat16(), float8=torch.ones(2).to(torch.float8_e4m3fn),
                uint16=torch.ones(2, dtype=torch.uint16), bool=torch.ones(2, dtype=torch.bool), none=torch.zeros(0, 3),
                parameter=nn.Parameter(torch.ones(2)), view=torch.arange(12.).view(3, 4)[:, ::2],
                expanded=torch.zeros(1).expand(100, 3), conj=torch.ones(2, dtype=torch.complex64).conj(), shared=[
                    (t := torch.ones(3)), t])
UNSTORABLE = dict(
    array=np.ones(2),
    float64=np.float64(1),
    float32=np.float32(1),
    int64=np.int64(1),
    npbool=np.bool_(True),
    defaultdict=collections.defaultdict(list, a=[1]),
    deque=collections.deque([1]),
    path=Path('a'),
    enum=Colour.RED,
    intenum=Level.LOW,
    strange_text=Text('a'),
    record=Record(),
    fraction=fractions.Fraction(1, 2),
    frozenset=frozenset([1]),
    range=range(3),
    slice=slice(3),
    namedtuple=Point(1, 2),
    function=len,
    lambda_=lambda: 0,
    type=Record,
    generator=torch.Generator(),
    sparse=torch.ones(2).to_sparse(),
    meta=torch.ones(2, device='meta'),
    lock=threading.Lock(),
    file=io.BytesIO(),
    pure=pathlib.PurePosixPath('a'),
    huge=1 << 5000,
    key_type={Colour.RED: 1},
    iterator=iter([1]),
    empty_bytes=b'',
    quantised=torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
)


@pytest.mark.parametrize('kind', STORABLE)
def test_what_is_written_can_be_read(tmp_path, kind):
    value = STORABLE[kind]
    save_checkpoint(tmp_path / 'a', {'value': value})
    assert (
        digest(load_checkpoint(tmp_path / 'a')) == digest({'value': value})
        and find_unstorable({'value': value}) is None
    )


@pytest.mark.parametrize('kind', UNSTORABLE)
def test_what_could_not_be_read_is_not_written(tmp_path, kind):
    value = UNSTORABLE[kind]
    name = 'Colour' if kind == 'key_type' else type(value).__name__
    assert name in find_unstorable({'a': [1, {'b': value}]}) and '[1].b' in find_unstorable({'a': [1, {'b': value}]})
    with pytest.raises(TypeError, match='get_extra_state') as e:
        save_checkpoint(tmp_path / 'a', {'a': 1, 'value': value})
    assert name in str(e.value) and 'value' in str(e.value) and names(tmp_path) == []


@pytest.mark.parametrize('kind', ['array', 'float64', 'defaultdict', 'path', 'record', 'enum', 'lambda_'])
def test_a_training_with_such_a_state_is_refused_before_any_work(tmp_path, kind):
    model, steps = nn.Sequential(Extra(UNSTORABLE[kind])), []
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(TypeError, match=r'model\.0\._extra_state\.inner\[0\] of type'):
        train(tmp_path / 'run.pt', model=model, rollback=1, callbacks=[steps.append])
    assert names(tmp_path) == [] and not steps and all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    model[0].value = 1.5
    train(tmp_path / 'run.pt', model=model)
    model[0].set_extra_state = lambda state: None   # another version of the network, on resuming
    model[0].value = UNSTORABLE[kind]
    with pytest.raises(TypeError, match=r'_extra_state\.inner\[0\] of type'):
        train(tmp_path / 'run.pt', 3, True, model=model, callbacks=[steps.append])
    assert not steps and load_checkpoint(tmp_path / 'run.pt')['epoch'] == 2


def test_a_state_that_becomes_so_later_costs_no_work(tmp_path):
    model = nn.Sequential(Extra(1))
    def spoil(training): training.model[0].value = np.float64(1) if training.epoch < 3 else 1
    with pytest.warns(
            UserWarning,
            match=r'could not be written at step .*model\.0\._extra_state\.inner\[0\] of type numpy.float64.*still holds'
    ) as told:
        train(tmp_path / 'run.pt', 4, model=model, callbacks=[spoil])
    assert len(told) == 2 and load_checkpoint(tmp_path / 'run.pt')['epoch'] == 4


def test_roll_back_with_a_state_of_its_own(tmp_path):
    model = nn.Sequential(Extra(2))
    with pytest.warns(UserWarning, match='half|of the learning rate'), suppress(Diverged):
        train(tmp_path / 'run.pt', 6, model=model, optimizer='sgd', lr=1e38, rollback=2)
    assert model[0].value == 2


def test_nests_without_end():
    itself = []; itself.append(itself)
    deep = []
    for _ in range(5000): deep = [deep]
    wide = [0]
    for _ in range(60): wide = [wide, wide]
    for value in (itself, deep, wide):
        with pytest.raises(TypeError, match='cannot hold'): check_storable({'a': value})
    shared = torch.ones(10)
    check_storable({'a': [shared] * 1000, 'b': [0] * 200_000})


def test_a_set_has_one_fingerprint_in_every_process(tmp_path):
    code = "from lap_nb.files import digest; print(digest({'a', 'b', 'c', 'd', 'e'}))"
    found = {
        subprocess.run(
            [sys.executable, '-c', code],
            env=os.environ | {'PYTHONHASHSEED': str(seed)},
            capture_output=True,
            text=True,
            cwd=Path(files.__file__).parents[1],
        ).stdout
        for seed in (1, 2)
    }
    assert len(found) == 1


# Damage, and what is none

def handmade(state, path, **parts):
    torch.save({'kind': files.CHECKPOINT, 'format': files.CHECKPOINT_FORMAT, 'sha256': '', 'state': state} | parts,
               path)


def test_damaged_is_said_only_of_damage(tmp_path):
    path = tmp_path / 'run.pt'
    for kind in ('array', 'float64', 'defaultdict', 'path', 'record', 'enum', 'fraction', 'type', 'huge',
                 'empty_bytes'):
        handmade({'a': UNSTORABLE[kind]}, path)
        with pytest.raises(CheckpointError, match='run.pt is whole, but holds') as e: load_checkpoint(path)
        assert 'is damaged' not in str(e.value)
    save_checkpoint(path, {'a': torch.arange(1000.), 'b': 'text'})
    whole = path.read_bytes()
    for at in range(0, len(whole), 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1:])
        # in what means nothing
        try: assert digest(load_checkpoint(path)) == digest({'a': torch.arange(1000.), 'b': 'text'})
        except CheckpointError as e: assert 'damaged' in str(e) or 'checkpoint' in str(e) and 'whole' not in str(e), at


def test_an_error_of_the_system_is_no_damage(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / 'a', {})
    def fail(*args, **kwargs): raise OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(files.torch, 'load', fail)
    with pytest.raises(OSError, match='Input/output error'): load_checkpoint(tmp_path / 'a')


@contextmanager
def memory(more):
    "Lets this process take no more than so many bytes of address space beyond what it has."
    now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, old[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_AS, old)


def nested(levels):
    value = [0, 0]
    for _ in range(levels): value = [value, value]
    return value


BOMBS = dict(
    stride=lambda: torch.zeros(1).expand(1 << 32),
    overlapping=lambda: torch.zeros(1000).as_strided((1 << 20, 900), (0, 1)),
    many=lambda: [torch.zeros(1 << 10).expand(1 << 14, -1)] * 1000,
    lists=lambda: nested(50),
    dicts=lambda: {'a': nested(50)},
    tuples=lambda: tuple(nested(45)),
)


@pytest.mark.parametrize('kind', BOMBS)
def test_a_small_checkpoint_takes_little(tmp_path, kind):
    handmade({'a': BOMBS[kind]()}, tmp_path / 'run.pt')
    assert (tmp_path / 'run.pt').stat().st_size < 10_000
    with memory(256 << 20), pytest.raises(CheckpointError,
                                          match='run.pt is whole, but holds (tensors|lists) that share'):
        load_checkpoint(tmp_path / 'run.pt')


@pytest.mark.parametrize('old, new', [(b'K\x03', b'J\xff\xff\xff\x7f'), (b'K\x03', b'\x8a\x08' + (1 << 40).to_bytes(8, 'little')), (b'K\x03', b'J\xff\xff\xff\xff')])
def test_sizes_that_are_made_up(tmp_path, old, new):
    "The numbers of a tensor's shape, its storage and its strides, changed under checksums that fit."
    handmade({'a': torch.zeros(3)}, tmp_path / 'whole')
    with zipfile.ZipFile(tmp_path / 'whole') as archive:
        parts = {i.filename: archive.read(i) for i in archive.infolist()}
    name = next(n for n in parts if n.endswith('data.pkl'))
    found = [at for at in range(len(parts[name])) if parts[name].startswith(old, at)]
    assert found
    for places in ([at] for at in found), [found]:
        for some in places:
            code = parts[name]
            for at in reversed(some): code = code[:at] + new + code[at + len(old):]
            with zipfile.ZipFile(tmp_path / 'run.pt', 'w') as archive:
                for key, part in parts.items(): archive.writestr(key, code if key == name else part)
            with memory(256 << 20), pytest.raises(CheckpointError): load_checkpoint(tmp_path / 'run.pt')


@pytest.mark.parametrize('code', [b'c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.', b'ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R.', b'\x96\xff\xff\xff\xff\x0f\0\0\0.', b'Nr\xff\xff\xff\x7f0N.',
                                  b'\x8b\xff\xff\xff\x7f.', b'c__builtin__\nset\nc__builtin__\nrange\nJ\xff\xff\xff\x7f\x85R\x85R.'], ids=['bytearray', 'FloatTensor', 'BYTEARRAY8', 'memo', 'LONG4', 'range'])
def test_instructions_that_ask_for_memory(tmp_path, code):
    with zipfile.ZipFile(tmp_path / 'run.pt', 'w') as archive:
        for name, part in {'data.pkl': b'\x80\x02' + code, 'byteorder': b'little', 'version': b'3\n'}.items():
            archive.writestr(f'archive/{name}', part)
    with memory(256 << 20), pytest.raises(CheckpointError): load_checkpoint(tmp_path / 'run.pt')


NEST = b')q\0' + b'h\0h\0\x86q\0' * 45   # a tuple of 2^45 values, and what takes long to look at it
STORAGE = b'X\x07\0\0\0storagectorch\nFloatStorage\n'


@pytest.mark.parametrize('code', [
    NEST + b'}h\0Ns.', NEST + b'c__builtin__\nset\n]h\0a\x85R.', NEST + b'(' + STORAGE + b'h\0X\x03\0\0\0cpuK\1tQ.', NEST + b'ctorch\nSize\nh\0\x85R}h\0Ns.',
    b'c__builtin__\nbytearray\n(J\xff\xff\xff\x7ftR.', b'c_codecs\nencode\n(NNtR.',
    b'ctorch._utils\n_rebuild_tensor_v2\n((](K\1K\1eJ\xff\xff\xff\x7ftK\0K\1\x85K\1\x85ctorch\nfloat32\ntR.'],
    ids=['key of a dictionary', 'member of a set', 'name of numbers', 'shape as key', 'bytes by number', 'encoding', 'numbers made up'])
def test_instructions_that_ask_for_time_or_memory(tmp_path, code):
    with zipfile.ZipFile(tmp_path / 'run.pt', 'w') as archive: archive.writestr('archive/data.pkl', b'\x80\x02' + code)
    with memory(256 << 20), pytest.raises(CheckpointError): load_checkpoint(tmp_path / 'run.pt')


@pytest.mark.parametrize('name', [b'collections\nCounter', b'_codecs\nencode', b'torch._utils\n_rebuild_tensor_v2'])
@pytest.mark.parametrize('state', [b'}X\x07\0\0\0planted', b'(N}X\x07\0\0\0planted'], ids=['attributes', 'slots'])
def test_a_checkpoint_changes_nothing_in_the_process(tmp_path, name, state):
    with zipfile.ZipFile(tmp_path / 'run.pt', 'w') as archive:
        archive.writestr('archive/data.pkl',
                         b'\x80\x02c' + name + b'\n' + state + b'K\1s' + b't' * state.startswith(b'(') + b'b.')
    with pytest.raises(CheckpointError): load_checkpoint(tmp_path / 'run.pt')
    assert not hasattr(collections.Counter, 'planted') and not any(
        hasattr(maker, 'planted') for maker in files._MAKERS.values())


def test_one_text_many_times_and_long_keys_are_refused_by_reader_and_writer(tmp_path):
    handmade({'a': ['a' * 100_000] * 1000}, tmp_path / 'run.pt')
    with pytest.raises(CheckpointError, match='a text many times over'): load_checkpoint(tmp_path / 'run.pt')
    for state in ({'a': ['a' * 100_000] * 1000}, {'a': {(tuple(range(60)), tuple(range(60, 120))): 1}}):
        with pytest.raises(TypeError, match='a checkpoint cannot hold a'): save_checkpoint(tmp_path / 'new', state)
    save_checkpoint(tmp_path / 'new', state := {'a': {(1, ('b', 2)): ['a' * 1000] * 50}})
    assert load_checkpoint(tmp_path / 'new') == state


@pytest.mark.parametrize('read', [load_checkpoint, read_bounded, read_npz, file_md5, Trajectory.load])
def test_what_may_have_no_end_is_not_opened(tmp_path, read):
    os.mkfifo(tmp_path / 'pipe')
    for path in (tmp_path / 'pipe', '/dev/zero'):
        with pytest.raises((OSError, ValueError), match='not a plain file'): read(path)


def test_a_checkpoint_stays_where_it_was_begun(tmp_path, monkeypatch):
    "Though a callback goes to another folder."
    for name in ('here', 'there'): (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    fit(dense_net(64, 10, K=1, hidden=2),
        digits().split(20), epochs=2, eval_every=1, checkpoints='run.pt',
        callbacks=[lambda _: os.chdir(tmp_path / 'there')])
    assert (
        load_checkpoint(tmp_path / 'here' / 'run.pt')['epoch'] == 2
        and names(tmp_path / 'here') == ['run.pt']
        and not names(tmp_path / 'there')
    )


def test_parts_that_overlap_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / 'bomb', 'w') as archive:
        archive.writestr('archive/data.pkl', b'\x80\x02}.'); archive.writestr('archive/data/0', bytes(100_000))
        one = archive.filelist[1]
        for i in range(1, 200):
            copy = zipfile.ZipInfo(f'archive/data/{i}')
            for slot in ('header_offset', 'CRC', 'compress_size', 'file_size', 'compress_type', 'external_attr',
                         'flag_bits', 'create_version', 'extract_version'):
                setattr(copy, slot, getattr(one, slot))
            archive.filelist.append(copy)
    with pytest.raises(CheckpointError, match='damaged'): load_checkpoint(tmp_path / 'bomb')


# Other files

def test_a_file_longer_than_expected_is_not_read(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(b'x' * 100)
    assert read_bounded(path, 100) == path.read_bytes()
    with pytest.raises(ValueError, match='100 bytes or more, expected no more than 99'): read_bounded(path, 99)
    with open(path, 'wb') as f: f.truncate(1 << 40)   # takes no room on the disk
    with memory(256 << 20), pytest.raises(ValueError, match='expected no more than'): read_bounded(path)


# Names

@pytest.mark.parametrize('name', ['<img src=x onerror=alert(1)>', 'a|b', 'a`b', 'a\nb', '$x$', '**a**', '_a_', '[a](javascript:b)', 'a&lt;b', '"\'', '~~a~~', '\\|', '# a', '`', '', ' ', '\r\n|-|', '<!--', '&#60;b&#62;'])
def test_names_do_not_act(name):
    from html import unescape
    from html.parser import HTMLParser
    for text in (as_text(name), as_code(name)):
        assert '\n' not in text and '|' not in text and '$' not in text
        seen = []
        class Tags(HTMLParser):
            def handle_starttag(self, tag, attrs): seen.append((tag, attrs))
        Tags().feed(text)
        assert seen in ([], [('code', [])])
    assert unescape(as_text(name)) == ' '.join(name.split())


@pytest.mark.parametrize('name', ['flow.blocks.0', 'cifar10_part', 'least-action', 'layer1.0.conv1', 'K=3, h=0.5'])
def test_ordinary_names_stay_as_they_are(name): assert as_text(name) == name and as_code(name) == f'`{name}`'


EVIL = '<img src=x onerror=alert(1)>|`$x$'


def evil_net():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
        def forward(self, x): return x + self.inner(x)
    net = nn.Sequential(collections.OrderedDict([(EVIL, Layer()), ('plain', Layer())]))
    Layer.__name__ = Layer.__qualname__ = EVIL
    return net


def tables():
    "Everything that shows names in Markdown, with names that would act."
    from lap_nb.attach import Tracer, trace
    from lap_nb.hooks import find_blocks
    from lap_nb.lab.bench import bench_table
    from lap_nb.kinetic import EnergyLedger
    from lap_nb.least_action import KKTReport
    from lap_nb.regularity import LipschitzProfile
    from lap_nb.lab.analysis import standings_table
    from lap_nb.stats import Interval
    from lap_nb.transport import ActionSplit
    net, x = evil_net().eval(), torch.randn(5, 4)
    blocks = find_blocks(net, x)
    with Tracer(net, blocks) as tracer:
        net(x)
        kept = tracer.take()
    yield 'blocks', blocks._repr_markdown_()
    yield 'standings', standings_table([
        dict(n=EVIL, family=EVIL, seeds=3, diverged=0, last=Interval(50., 40., 60., 3), best=Interval(50., 40., 60., 3),
             gap=None)])
    yield 'report', KKTReport('satisfied', 1., 1., 1., 1., 0., 0., .1, 0., 0., notes=(EVIL,))._repr_markdown_()
    yield 'trace', kept._repr_markdown_()
    yield 'ledger', EnergyLedger(trace(net, x, blocks))._repr_markdown_()
    yield 'lipschitz', LipschitzProfile((EVIL,), torch.ones(1, 5), torch.ones(5), 1., 0.)._repr_markdown_()
    yield 'split', ActionSplit({EVIL: (1., 1., 1.)}, (), 'mean', ())._repr_markdown_()
    yield 'bench', bench_table(
        dict(rows=[
            dict(name=EVIL, what=EVIL.replace(
                '$x$', ''), ratio_median=1., ratio_low=1., ratio_high=1., ratio_min=1., ratio_max=1., ratio_of_best=1.,
                 goal=None, better='lower', met=None, pairs=1, unit='seconds', top=1., bottom=1.)]))


def test_names_do_not_act_in_any_table():
    for name, text in tables():
        rows = [line for line in text.splitlines() if line.startswith('|')]
        assert '<img' not in text and '$x$' not in text, name
        assert len({line.count('|') for line in rows}) == 1, f'{name}: a name ends a cell'
        assert 'alert' in text, name


def test_names_with_nul_are_refused_in_words(tmp_path):
    for save in (save_checkpoint, write_atomically):
        with pytest.raises(ValueError, match='no name of a file'):
            save(tmp_path / 'a\0', {} if save is save_checkpoint else b'')
