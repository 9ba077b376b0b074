"Data: what a lesson cannot hold. Faults, servers that misbehave, many seeds, several processes, the real files."
import gzip
import itertools
import os
import pickle
import random
import struct
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, replace
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from conftest import ROOT
from lap_nb import data
from lap_nb.data import Dataset, IdxSource, Split, apportion, download_file, parse_idx, read_source

SEEDS = range(25)


def exact(a, b): assert_close(a, b, rtol=0, atol=0)


def lopsided(sizes, n_test=0, seed=0):
    """A data set with `sizes[c]` samples of class c in its pool, in mixed order, and `n_test` test samples of each
    class."""
    y = torch.cat([torch.full((size + n_test,), c) for c, size in enumerate(sizes)] or [torch.zeros(0).long()])
    test = torch.cat([(y == c).nonzero()[:n_test, 0] for c in range(len(sizes))])
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    place = order.argsort()
    return Dataset(torch.randn(len(y), 2, generator=torch.Generator().manual_seed(seed)), y[order], place[test],
                   'lopsided', len(sizes))


@pytest.fixture(scope='module')
def digits(): return data.digits()


# Samples, labels and indices that are not what they should be

X, Y, TEST = torch.zeros(6, 2), torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([3, 4, 5])


def with_value(value, *index):
    x = X.clone()
    for i in index: x[i, 1] = value
    return x


@pytest.mark.parametrize('changes, words', [
    (dict(x=with_value(torch.nan, 2, 4)), '2 of 6 samples hold NaN or Inf, the first at index 2'),
    (dict(x=with_value(torch.inf, 5)), '1 of 6 samples hold NaN or Inf, the first at index 5'),
    (dict(x=with_value(-torch.inf, 0)), '1 of 6 samples hold NaN or Inf, the first at index 0'),
    (dict(x=X.long()), 'floating-point tensor .* found a tensor .* of int64'),
    (dict(x=X.numpy()), 'floating-point tensor .* found an array'),
    (dict(x=X[:, 0]), r'floating-point tensor .* found a tensor \[6\] of float32'),
    (dict(x=X[:0], y=Y[:0]), r'N > 0, found a tensor \[0, 2\]'),
    (dict(y=Y[:5]), r'int64 \[6\], one for each sample, found a tensor \[5\]'),
    (dict(y=Y.float()), r'labels must be int64 \[6\].*found a tensor .* of float32'),
    (dict(y=Y.tolist()), 'labels must be int64 .* found a list'),
    (dict(y=Y[:, None]), r'found a tensor \[6, 1\]'),
    (dict(y=Y + 1), r'labels must lie in 0\.\.2, found 3 at index 2: number the classes from 0'),
    (dict(y=Y - 1), r'labels must lie in 0\.\.2, found -1 at index 0'),
    (dict(classes=2), r'labels must lie in 0\.\.1, found 2 at index 2'),
    (dict(classes=0), 'classes is 0, expected a whole number, at least 1'),
    (dict(test=torch.tensor([3, 6])), r'test indices must lie in 0\.\.5, found 3 to 6'),
    (dict(test=torch.tensor([-1, 3])), r'test indices must lie in 0\.\.5, found -1 to 3'),
    (dict(test=torch.tensor([3, 4, 3])), 'test uses sample 3 a second time'),
    (dict(test=torch.tensor([3., 4.])), r'test indices must be int64 .* found a tensor \[2\] of float32'),
    (dict(test=torch.tensor([[3], [4]])), r'test indices must be int64 \[M\], found a tensor \[2, 1\]'),
    (dict(test=TEST[:0]), 'not empty'),
    (dict(test=[3, 4]), 'found a list'),
])
def test_bad_samples_are_refused(changes, words):
    good = dict(x=X, y=Y, test=TEST, name='six', classes=3)
    Dataset(**good)
    with pytest.raises(ValueError, match=words): Dataset(**good | changes)


@pytest.mark.parametrize('changes, words', [
    (dict(val=torch.tensor([0, 2])), r'val uses sample 0 a second time \(row 0\)'),
    (dict(test=torch.tensor([1, 5])), 'test uses sample 1 a second time'),
    (dict(test=torch.tensor([5, 2])), 'test uses sample 2 a second time'),
    (dict(train=torch.tensor([0, 0])), 'train uses sample 0 a second time'),
    (dict(train=torch.tensor([0, 6])), r'train indices must lie in 0\.\.5, found 0 to 6'),
    (dict(train=torch.tensor([[0, 1]])), r'found train a tensor \[1, 2\] of int64, val a tensor \[2\]'),
    (dict(test=torch.tensor([[4, 5]])), r'test a tensor \[1, 2\]'),
    (dict(seeds=(0, 1)), 'and 2 seeds'),
    (dict(train=torch.tensor([[0, 1], [0, 1]]), val=torch.tensor([[2], [0]]), seeds=(0, 1)),
     r'val uses sample 0 a second time \(row 1\)'),
    (dict(train=torch.tensor([[0, 1], [0, 1]]), val=torch.tensor([[2], [2], [3]]), seeds=(0, 1)), 'differ in their number'),
    (dict(train=torch.tensor([[0], [1]]), val=torch.tensor([[2], [2]]), seeds=(0,)), 'and 1 seeds'),
    (dict(x=with_value(torch.nan, 2)), '1 of 6 samples hold NaN or Inf, the first at index 2: remove or repair'),
    (dict(y=Y + 1), r'labels must lie in 0\.\.2, found 3 at index 2: number the classes'), (dict(classes=0), 'classes is 0, expected a whole number, at least 1'),
])
def test_bad_splits_are_refused(changes, words):
    good = dict(x=X, y=Y, train=torch.tensor([0, 1]), val=torch.tensor([2, 3]), test=torch.tensor([4, 5]), name='six',
                classes=3, seeds=(0,))
    Split(**good)
    with pytest.raises(ValueError, match=words): Split(**good | changes)


@pytest.mark.parametrize('n, n_val, error, words', [
    (9, None, ValueError, 'n is 9, expected a whole number, at least 10'),
    (0, None, ValueError, 'n is 0, expected a whole number, at least 10'),
    (-5, None, ValueError, 'n is -5, expected a whole number, at least 10'),
    (100.5, None, TypeError, 'n is 100.5'),
    ('100', None, TypeError, "n is '100'"),
    (True, None, TypeError, 'n is True'),
    (None, None, TypeError, 'n is None'),
    (1191, None, ValueError, '1,191 for training and 10 for validation, but digits has 1,200 .* n of at most 1,190'),
    (1200, None, ValueError, 'more samples asked for than exist'),
    (5000, None, ValueError, '5,000 for training'),
    (600, 601, ValueError, '600 for training and 601 for validation, .* n of at most 599'),
    (100, 9, ValueError, 'n_val is 9, expected a whole number, at least 10'),
    (100, .5, TypeError, 'n_val is 0.5'),
    (100, 2000, ValueError, 'n of at most 0'),
])
def test_bad_sizes_are_refused(digits, n, n_val, error, words):
    with pytest.raises(error, match=words): digits.split(n, n_val=n_val)
    with pytest.raises(error, match=words): digits.splits(n, [0, 1], n_val=n_val)


@pytest.mark.parametrize('seed, error', [(1.5, TypeError), ('0', TypeError), (None, TypeError), (-1, ValueError)])
def test_bad_seeds_are_refused(digits, seed, error):
    with pytest.raises(error, match=f'^seed is {seed!r}, expected'): digits.split(20, seed=seed)
    with pytest.raises(error, match='seeds is .*, expected'): digits.splits(20, seeds=[0, seed])


def test_class_only_in_the_test_part_is_named():
    y = Y.repeat(3)
    odd = Dataset(X.repeat(3, 1), y, (y == 2).nonzero()[:, 0], 'odd', 3)
    with pytest.raises(ValueError, match=r'classes \[2\] of odd have no sample outside the test part'): odd.split(3)


def test_bad_clouds_are_refused():
    for cloud in (data.circles, data.moons):
        with pytest.raises(ValueError, match='n is 3, expected a whole number, from 8'): cloud(3)
        with pytest.raises(TypeError, match='n is 100.5, expected'): cloud(100.5)
        with pytest.raises(ValueError): cloud(noise=-1)


def test_a_value_is_frozen(digits):
    with pytest.raises(FrozenInstanceError): digits.name = 'other'
    with pytest.raises(FrozenInstanceError): digits.split(20).train = None


# Splits

def parts(split): return {part: set(getattr(split, part).tolist()) for part in ('train', 'val', 'test')}


@pytest.mark.parametrize('n, n_val, expected', [
    (10, None, (10, 10)), (137, None, (137, 137)), (600, None, (600, 600)), (1000, None, (1000, 200)),
    (1190, None, (1190, 10)), (10, 1190, (10, 1190)), (300, 77, (300, 77))])
def test_sizes_and_disjoint_parts(digits, n, n_val, expected):
    for seed in SEEDS:
        split = digits.split(n, seed, n_val)
        assert (len(split.train), len(split.val), len(split.test)) == (*expected, 597)
        named = parts(split)
        assert tuple(map(len, named.values())) == (*expected, 597), 'a sample is repeated'
        assert not any(a & b for a, b in combinations(named.values(), 2))
        assert named['train'] | named['val'] <= set(digits.pool.tolist())
        assert split.seeds == (seed,) and split.classes == 10 and split.name == 'digits'


def test_pool_and_test_part_are_everything(digits):
    exact(torch.cat([digits.pool, digits.test]).sort().values, torch.arange(1797))


@pytest.mark.parametrize('n', [10, 13, 50, 99, 100, 500, 1190])
def test_stratified(digits, n):
    share = n * digits.y[digits.pool].bincount() / 1200
    for seed in SEEDS:
        counts = digits.y[digits.split(n, seed).train].bincount(minlength=10)
        assert ((counts - share).abs() < 1).all() and counts.min() >= 1, (seed, counts)


def test_validation_is_stratified_too(digits):
    for seed in SEEDS:
        split = digits.split(300, seed)
        left = digits.y[digits.pool].bincount() - digits.y[split.train].bincount()
        counts = digits.y[split.val].bincount(minlength=10)
        assert ((counts - 300 * left / left.sum()).abs() < 1).all()


@pytest.mark.parametrize('sizes', [[970, 10, 10, 10], [400, 3, 2], [2, 2], [50] * 20, [7, 11, 13, 500], [100]])
def test_apportion(sizes):
    total, sizes = sum(sizes), np.array(sizes)
    for n in range(len(sizes), total + 1):
        seats, share = apportion(n, sizes), n * sizes / total
        assert seats.sum() == n and (seats >= 1).all() and (seats <= sizes).all()
        if share.min() < 1: continue
        up, remainder = seats > np.floor(share), share - np.floor(share)
        assert (abs(seats - share) < 1).all()
        if up.any(): assert remainder[up].min() >= remainder[~up].max(initial=0), 'a larger remainder went without'


@pytest.mark.parametrize('n, sizes, error', [(1e308, [3, 4], TypeError), (8, [3, 4], ValueError), (1, [3, 4], ValueError), (-1, [3], ValueError), (True, [3], TypeError),
                                             (2, [], ValueError), (2, [0, 0], ValueError), (2, [-3, 9], ValueError), (2, [1.5, 2], TypeError), (2, [[3]], TypeError),
                                             (float('nan'), [3], TypeError), (10 ** 30, [3, 4], ValueError)])
def test_seats_that_cannot_be_given_are_refused(n, sizes, error):
    with pytest.raises(error, match='expected|must be'): apportion(n, sizes)


def test_apportion_at_random():
    rng = np.random.default_rng(0)
    for _ in range(500):
        sizes = rng.integers(1, 200, rng.integers(1, 15))
        n = int(rng.integers(len(sizes), sizes.sum() + 1))
        seats = apportion(n, sizes)
        assert seats.sum() == n and (seats >= 1).all() and (seats <= sizes).all(), (n, sizes, seats)


def test_rare_classes_are_never_left_out():
    rare = lopsided([500, 400, 3, 2], n_test=2)
    for seed in SEEDS:
        split = rare.split(10, seed)
        assert rare.y[split.train].bincount(minlength=4).min() >= 1
        assert rare.y[split.val].bincount(minlength=4).min() >= 1


def test_a_class_used_up_by_training_is_absent_from_validation():
    assert apportion(5, [10, 0]).tolist() == [5, 0]
    single = lopsided([50, 1], n_test=1)
    for seed in SEEDS:
        split = single.split(10, seed)
        assert (
            (single.y[split.train] == 1).sum() == 1 and (single.y[split.val] == 1).sum() == 0 and len(split.val) == 10
        )


def test_draw_takes_from_the_front():
    order, y = torch.tensor([5, 3, 0, 4, 1, 2]), torch.tensor([0, 0, 1, 0, 1, 0])
    taken, left = data.draw(order, y, 3, 2)
    assert (taken.tolist(), left.tolist()) == ([5, 3, 4], [0, 1, 2])


@pytest.fixture(scope='module')
def elsewhere():
    "Two lines of another process: heavy modules that come with `lap_nb.data`, and a split."
    code = ('import sys, lap_nb.data\n'
            'print([m for m in ("sklearn", "matplotlib", "pandas", "ot", "scipy", "IPython") if m in sys.modules])\n'
            's = lap_nb.data.digits().split(100, 7); print(s.train.tolist(), s.val.tolist())')
    return subprocess.run([sys.executable, '-W', 'error', '-c', code], cwd=ROOT, capture_output=True, text=True,
                          check=True).stdout.splitlines()


def test_same_seed_same_split_in_another_process(digits, elsewhere):
    split = digits.split(100, 7)
    assert elsewhere[1] == f'{split.train.tolist()} {split.val.tolist()}'


def test_other_seed_other_split(digits):
    drawn = {tuple(digits.split(100, seed).train.tolist()) for seed in range(100)}
    assert len(drawn) == 100


def test_every_pool_sample_gets_its_turn(digits):
    counts = torch.stack([digits.split(400, seed).train for seed in range(100)]).flatten().bincount(minlength=1797)
    drawn = counts[digits.pool].double()
    assert drawn.min() > 10 and drawn.max() < 60 and abs(drawn.mean() - 100 / 3) < 1e-6
    assert 3.5 < drawn.std() < 6, 'a binomial of 100 at 1/3 has 4.7'


def test_train_comes_in_mixed_order(digits):
    for index in (digits.split(500).train, digits.y[digits.split(500).train]):
        assert 150 < (index.diff() < 0).sum() < 350


def test_small_parts_are_nested_in_larger_ones(digits):
    for seed in SEEDS:
        smaller, larger = (set(digits.split(n, seed).train.tolist()) for n in (50, 500))
        assert smaller <= larger


def test_stacked_members_equal_single_splits(digits):
    seeds = [5, 0, np.int64(17), 5]
    stacked = digits.splits(60, seeds)
    assert stacked.train.shape == stacked.val.shape == (4, 60) and stacked.test.shape == (597,)
    assert stacked.seeds == (5, 0, 17, 5) and all(type(seed) is int for seed in stacked.seeds)
    for i, seed in enumerate(seeds):
        one, member = digits.split(60, seed), stacked.member(i)
        for part in ('train', 'val', 'test'): exact(getattr(member, part), getattr(one, part))
        assert member.seeds == one.seeds and member.x is digits.x
    assert digits.splits(60, (s for s in (1, 2))).seeds == (1, 2)
    assert digits.splits(60, [3]).train.shape == (1, 60)


def test_members_out_of_range(digits):
    stacked = digits.splits(20, [0, 1])
    with pytest.raises(IndexError, match='member 2 of 2'): stacked.member(2)
    with pytest.raises(ValueError, match='i is -1, expected'): stacked.member(-1)
    with pytest.raises(TypeError, match='i is .*, expected'): stacked.member(slice(1))
    with pytest.raises(ValueError, match='not stacked'): stacked.member(0).member(0)


def test_global_random_states_are_untouched():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    made = data.circles(), data.moons(), data.digits()
    for dataset in made: dataset.splits(20, range(3))
    exact(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]


def test_global_seed_has_no_influence():
    torch.manual_seed(1), np.random.seed(1)
    a = data.circles(50), data.digits().split(20)
    torch.manual_seed(2), np.random.seed(2)
    b = data.circles(50), data.digits().split(20)
    exact(a[0].x, b[0].x)
    exact(a[1].train, b[1].train)


def test_split_moves_as_a_whole(digits):
    there = digits.splits(20, [0, 1]).to(data.pick_device())
    assert {t.device.type for t in (there.x, there.y, there.train, there.val, there.test)} == {data.pick_device().type}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device here')
def test_split_on_cuda(digits):
    there = digits.splits(50, range(3)).to('cuda')
    back = there.member(1).to('cpu')
    exact(back.train, digits.split(50, 1).train)
    exact(there.x[there.train].cpu(), digits.x[there.train.cpu()])
    with pytest.raises(ValueError, match='a second time'): replace(there, val=there.train)


def test_pickled_for_another_process(digits):
    split = digits.splits(20, [0, 1])
    copy = pickle.loads(pickle.dumps(split))
    exact(copy.train, split.train)
    assert copy.seeds == split.seeds


# The embedded data sets

@pytest.mark.parametrize('name, shape, classes, n_test', [
    ('circles', (2000, 2), 2, 1000), ('moons', (2000, 2), 2, 1000), ('digits', (1797, 64), 10, 597)])
def test_embedded(name, shape, classes, n_test):
    dataset = data.load(name)
    assert dataset.name == name and dataset.x.shape == shape and dataset.x.dtype == torch.float32
    assert dataset.y.dtype == torch.int64 and dataset.classes == classes and len(dataset.test) == n_test
    exact(data.load(name).x, dataset.x)
    exact(data.load(name).test, dataset.test)
    share = n_test * dataset.y.bincount() / len(dataset.y)
    assert ((dataset.y[dataset.test].bincount() - share).abs() < 1).all()


def test_digits_are_scikit_learns(digits):
    from sklearn.datasets import load_digits
    x, y = load_digits(return_X_y=True)
    assert (digits.x.numpy() * 16 == x).all() and (digits.y.numpy() == y).all()


def test_clouds_follow_their_arguments():
    assert not torch.equal(data.circles(seed=0).x, data.circles(seed=1).x)
    assert not torch.equal(data.moons(seed=0).x, data.moons(seed=1).x)
    assert data.circles(100).x.shape == (100, 2) and len(data.moons(11).test) == 5
    rings = data.circles(noise=0., factor=.25)
    assert_close(rings.x.norm(dim=1), torch.where(rings.y == 0, 1., .25))


def test_load_refuses_unknown_names():
    for name in ('MNIST', 'cifar10', ''):
        with pytest.raises(ValueError, match='there are circles, moons, digits, mnist, fashion_mnist'): data.load(name)


@pytest.mark.parametrize('name', ['gpu', 'cuda:99', 'meta', '', None, 0])
def test_unavailable_devices_are_refused(name):
    with pytest.raises(ValueError, match='here; there are auto, cpu'): data.pick_device(name)


def test_devices():
    auto = data.pick_device()
    assert auto.type == ('cuda' if torch.cuda.is_available() else 'cpu')
    assert data.pick_device('cpu') == data.pick_device(torch.device('cpu')) == torch.device('cpu')
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no device 'cuda' here"): data.pick_device('cuda')


def test_import_stays_light(elsewhere):
    assert elsewhere[0] == '[]'


# IDX files

NAMES = [f'{part}-{kind}-ubyte.gz' for part in ('train', 't10k') for kind in ('images-idx3', 'labels-idx1')]


def idx(array): return struct.pack(f'>HBB{array.ndim}I', 0, 8, array.ndim, *array.shape) + array.tobytes()


def tiny_files(n=40, n_test=20, size=9, seed=0):
    "The four files of a small data set, and its arrays."
    rng = np.random.default_rng(seed)
    arrays = [a for count in (n, n_test) for a in (rng.integers(0, 256, (count, size, size), np.uint8),
                                                   (np.arange(count) % 10).astype(np.uint8))]
    return {name: gzip.compress(idx(a)) for name, a in zip(NAMES, arrays)}, arrays


def source(files, url='http://127.0.0.1:9/'):
    return IdxSource('tiny_set', url, {name: md5(content).hexdigest() for name, content in files.items()})


def put(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items(): (folder / name).write_bytes(content)


@pytest.fixture
def tiny(tmp_path):
    "The source, its root folder with the files in it, and the arrays."
    files, arrays = tiny_files()
    put(tmp_path / 'tiny-set', files)
    return source(files), tmp_path, arrays


def test_pictures_are_read_exactly(tiny):
    src, root, (x, y, x_test, y_test) = tiny
    dataset = read_source(src, root)
    assert dataset.x.shape == (60, 1, 9, 9) and dataset.x.dtype == torch.float32 and dataset.y.dtype == torch.int64
    assert (dataset.x.squeeze(1) * 255).round().byte().numpy().tobytes() == x.tobytes() + x_test.tobytes()
    assert dataset.x.min() >= 0 and dataset.x.max() <= 1
    assert dataset.y.tolist() == [*y, *y_test] and dataset.test.tolist() == list(range(40, 60))


def test_folder_from_the_environment(tiny, monkeypatch):
    src, root, _ = tiny
    monkeypatch.setenv('LAP_NB_DATA', str(root))
    assert len(read_source(src).x) == 60
    with pytest.raises(FileNotFoundError): read_source(src, root / 'argument_wins')
    monkeypatch.delenv('LAP_NB_DATA')
    assert data.data_root() == Path.home() / '.cache' / 'lap_nb'


@pytest.mark.parametrize('name', ['mnist', 'fashion_mnist'])
def test_missing_folder_is_named(name, tmp_path):
    with pytest.raises(FileNotFoundError) as caught: data.load(name, root=tmp_path / 'nowhere')
    for words in (name, str(tmp_path / 'nowhere'), 'LAP_NB_DATA', 'root=', 'download=True', *NAMES):
        assert words in str(caught.value)


def test_only_missing_files_are_named(tiny):
    src, root, _ = tiny
    (root / 'tiny-set' / NAMES[2]).unlink()
    with pytest.raises(FileNotFoundError, match=f'tiny_set: {NAMES[2]} not found'): read_source(src, root)


@pytest.mark.parametrize('harm', [
    lambda b: b[:len(b) // 2], lambda b: b'', lambda b: b[:20] + bytes([b[20] ^ 1]) + b[21:], lambda b: b + b'\0'],
    ids=['truncated', 'empty', 'one bit', 'longer'])
@pytest.mark.parametrize('name', NAMES)
def test_altered_files_are_refused(tiny, name, harm):
    src, root, _ = tiny
    path = root / 'tiny-set' / name
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(ValueError) as caught: read_source(src, root)
    for words in (str(path), src.md5[name], md5(path.read_bytes()).hexdigest(), 'delete the file', 'download=True'):
        assert words in str(caught.value)


PIXELS = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@pytest.mark.parametrize('content, ndim, words', [
    (b'', 3, 'nothing and 0 found'),
    (b'\0\0', 3, 'and 2 found'),
    (PIXELS[:15], 3, '16 bytes of header expected, 00000803 and 15 found'),
    (PIXELS, 1, 'magic number 00000801 .* 00000803'),
    (b'\x1f\x8b' + PIXELS[2:], 3, 'magic number 00000803 .* 1f8b0803'),
    (PIXELS[:2] + b'\x0d' + PIXELS[3:], 3, '00000d03'),
    (PIXELS[:-1], 3, r'announces \[2, 3, 4\], 24 bytes, but 23 follow'),
    (PIXELS + b'\0', 3, 'but 25 follow'),
    (PIXELS[:4] + b'\xff' * 12 + PIXELS[16:], 3, 'but 24 follow'),
    (PIXELS[:4] + b'\0' * 4 + b'\xff' * 8, 3, 'an axis without anything'),
])
def test_bad_headers_are_refused(content, ndim, words):
    with pytest.raises(ValueError, match=words): parse_idx(content, ndim, 'file')
    parse_idx(PIXELS, 3)


def test_idx_arrays_own_their_memory():
    a = parse_idx(PIXELS, 3)
    exact(a, torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4))
    a += 1
    assert a[0, 0, 0] == 1 and PIXELS[16] == 0


def test_counts_must_agree(tmp_path):
    files, arrays = tiny_files()
    files[NAMES[1]] = gzip.compress(idx(arrays[1][:-1]))
    put(tmp_path / 'tiny-set', files)
    with pytest.raises(ValueError, match='40 pictures, but 39 labels'): read_source(source(files), tmp_path)


def test_labels_in_files_are_checked(tmp_path):
    files, arrays = tiny_files()
    files[NAMES[3]] = gzip.compress(idx(arrays[3] + 100))
    put(tmp_path / 'tiny-set', files)
    with pytest.raises(ValueError, match=r'labels must lie in 0\.\.9, found 100 at index 40'):
        read_source(source(files), tmp_path)


def test_concurrent_reading(tiny):
    src, root, _ = tiny
    alone = read_source(src, root)
    with ThreadPoolExecutor(8) as pool: together = list(pool.map(lambda _: read_source(src, root), range(16)))
    for other in together: exact(other.x, alone.x)


# Downloads, from servers on this machine

class Server(ThreadingHTTPServer):
    "Serves `files`; `manners` decides how. `asked` records each request's path and Range header."
    daemon_threads = True

    def __init__(self, files, **manners):
        super().__init__(('127.0.0.1', 0), Handler)
        self.files, self.asked, self.stop = files, [], threading.Event()
        self.manners = dict(ranges=True, cut=None, stall=None, wrong=False, chunked=False, delay=0) | manners

    @property
    def url(self): return f'http://127.0.0.1:{self.server_port}/'


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def do_GET(self):
        manners, body, wanted = self.server.manners, self.server.files.get(self.path[1:]), self.headers.get('Range')
        self.server.asked.append((self.path[1:], wanted))
        if body is None: return self.send_error(404)
        time.sleep(manners['delay'])
        start = int(wanted.removeprefix('bytes=').removesuffix('-')) if wanted and manners['ranges'] else 0
        if start >= len(body): return self.send_error(416)
        self.send_response(206 if start else 200)
        if start: self.send_header('Content-Range', f'bytes {start}-{len(body) - 1}/{len(body)}')
        if not manners['chunked']: self.send_header('Content-Length', str(len(body) - start))
        self.end_headers()
        rest = body[start:]
        if manners['wrong']: rest = bytes(len(rest))
        if manners['cut']: rest = rest[:manners['cut']]
        if manners['stall']:
            self.wfile.write(rest[:manners['stall']])
            self.wfile.flush()
            return self.server.stop.wait(30)
        self.wfile.write(rest)


@contextmanager
def serving(files, **manners):
    with Server(files, **manners) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.01), daemon=True)
        thread.start()
        try: yield server
        finally:
            server.stop.set()
            server.shutdown()
            thread.join()


BODY = random.Random(0).randbytes(200_000)
SUM = md5(BODY).hexdigest()


def fetch(server, path, **kwargs): return download_file(server.url + 'file', path, SUM, progress=False, **kwargs)


def left(folder): return sorted(p.name for p in folder.iterdir())


def test_download(tmp_path):
    path = tmp_path / 'new' / 'folder' / 'file'
    with serving({'file': BODY}) as server: assert fetch(server, path) == path
    assert path.read_bytes() == BODY and left(path.parent) == ['file'] and server.asked == [('file', None)]


def test_download_of_unknown_length(tmp_path):
    with serving({'file': BODY}, chunked=True) as server: fetch(server, tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == BODY


def test_cut_connection_is_resumed(tmp_path):
    path = tmp_path / 'file'
    with serving({'file': BODY}, cut=70_000) as server:
        with pytest.raises(OSError) as caught: fetch(server, path)
        for words in (server.url, 'Call again to resume', '70,000 of 200,000 bytes', str(path)):
            assert words in str(caught.value)
        assert left(tmp_path) == ['file.part'] and (tmp_path / 'file.part').read_bytes() == BODY[:70_000]
        server.manners['cut'] = None
        fetch(server, path)
    assert path.read_bytes() == BODY and left(tmp_path) == ['file']
    assert server.asked == [('file', None), ('file', 'bytes=70000-')]


def test_many_cuts(tmp_path):
    with serving({'file': BODY}, cut=30_000) as server:
        for _ in range(6):
            with pytest.raises(OSError): fetch(server, tmp_path / 'file')
        fetch(server, tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == BODY
    assert [asked for _, asked in server.asked] == [None] + [f'bytes={30_000 * i}-' for i in range(1, 7)]


def test_server_without_ranges_starts_afresh(tmp_path):
    (tmp_path / 'file.part').write_bytes(BODY[:70_000])
    with serving({'file': BODY}, ranges=False) as server: fetch(server, tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == BODY and left(tmp_path) == ['file']
    assert server.asked == [('file', 'bytes=70000-')], 'the whole file came with the first answer'


@pytest.mark.parametrize('part', [b'other bytes', BODY[:100_000][::-1], BODY + b'longer', b'x' * len(BODY)],
                         ids=['other', 'reversed', 'longer', 'same length'])
def test_inconsistent_part_starts_afresh(tmp_path, part):
    (tmp_path / 'file.part').write_bytes(part)
    with serving({'file': BODY}) as server: fetch(server, tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == BODY and left(tmp_path) == ['file']
    assert server.asked == [('file', f'bytes={len(part)}-'), ('file', None)]


def test_complete_part_needs_no_server(tmp_path):
    (tmp_path / 'file.part').write_bytes(BODY)
    with serving({'file': BODY}) as server: fetch(server, tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == BODY and left(tmp_path) == ['file'] and not server.asked


@pytest.mark.parametrize('part', [None, BODY[:50_000]], ids=['fresh', 'resumed'])
def test_wrong_bytes_are_not_kept(tmp_path, part):
    if part: (tmp_path / 'file.part').write_bytes(part)
    with serving({'file': BODY}, wrong=True) as server:
        with pytest.raises(ValueError) as caught: fetch(server, tmp_path / 'file')
    for words in (server.url, SUM, md5(bytes(len(BODY))).hexdigest()): assert words in str(caught.value)
    assert left(tmp_path) == [] and len(server.asked) == (2 if part else 1)


def test_stalled_server_times_out(tmp_path):
    with serving({'file': BODY}, stall=90_000) as server:
        with pytest.raises(OSError, match='timed out'): fetch(server, tmp_path / 'file', timeout=5)
        assert left(tmp_path) == ['file.part']
        server.manners['stall'] = None
        fetch(server, tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == BODY


def test_absent_file_and_absent_server(tmp_path):
    with serving({}) as server:
        with pytest.raises(OSError, match='404') as caught: fetch(server, tmp_path / 'file')
    assert server.url in str(caught.value) and left(tmp_path) == []
    with pytest.raises(OSError, match='could not fetch http://127.0.0.1.*by other means'):
        fetch(server, tmp_path / 'file', timeout=2)


def test_a_good_file_stays_until_a_better_one_is_there(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(b'an older edition')
    with serving({'file': BODY}, cut=1000) as server:
        with pytest.raises(OSError): fetch(server, path)
        assert path.read_bytes() == b'an older edition'
        server.manners['cut'] = None
        fetch(server, path)
    assert path.read_bytes() == BODY


def test_interrupted_process_leaves_no_half_file(tmp_path):
    "The process is killed while the server stalls; the next one asks for the rest only."
    code = 'import sys; from lap_nb.data import download_file; download_file(*sys.argv[1:], progress=False)'
    with serving({'file': BODY}, stall=131_072) as server:
        process = subprocess.Popen([sys.executable, '-c', code, server.url + 'file',
                                    str(tmp_path / 'file'), SUM], cwd=ROOT)
        deadline = time.monotonic() + 60
        while not (tmp_path / 'file.part').exists() or (tmp_path / 'file.part').stat().st_size < 65_536:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(.02)
        process.kill()
        process.wait()
        have = (tmp_path / 'file.part').stat().st_size
        assert left(tmp_path) == ['file.part']
        server.manners['stall'] = None
        fetch(server, tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == BODY and server.asked[-1] == ('file', f'bytes={have}-')


def test_progress_is_shown_only_when_asked_for(tmp_path, capsys):
    with serving({'file': BODY}) as server:
        fetch(server, tmp_path / 'quiet')
        assert capsys.readouterr() == ('', '')
        download_file(server.url + 'file', tmp_path / 'file', SUM)
    assert '200k/200k' in capsys.readouterr().err


# Whole data sets, fetched

def test_fetch_and_read(tmp_path):
    files, _ = tiny_files()
    with serving(files) as server:
        src = source(files, server.url)
        data.fetch_source(src, tmp_path, progress=False)
        assert [name for name, _ in server.asked] == NAMES
        data.fetch_source(src, tmp_path, progress=False)
        assert len(server.asked) == 4, 'what is there is not fetched again'
        (tmp_path / 'tiny-set' / NAMES[1]).unlink()
        data.fetch_source(src, tmp_path, progress=False)
        assert len(server.asked) == 5
    assert len(read_source(src, tmp_path).x) == 60


def test_mnist_downloads_when_asked(tmp_path, monkeypatch, capsys):
    files, _ = tiny_files()
    for name, constant in (('mnist', 'MNIST'), ('fashion_mnist', 'FASHION_MNIST')):
        with serving(files) as server:
            monkeypatch.setattr(data, constant, replace(source(files, server.url), name=name))
            with pytest.raises(FileNotFoundError): data.load(name, tmp_path)
            assert not server.asked
            assert data.load(name, tmp_path, download=True).name == name
            assert len(server.asked) == 4
        assert len(data.load(name, tmp_path).x) == 60 and (tmp_path / name.replace('_', '-')).is_dir()
    monkeypatch.setenv('LAP_NB_DATA', str(tmp_path))
    assert len(data.mnist().x) == 60


def test_processes_do_not_fetch_twice(tmp_path):
    "Four processes start together; the files cross the wire once, and all four read them."
    files, _ = tiny_files()
    with serving(files, delay=1) as server:
        code = ('import os, sys; from lap_nb.data import IdxSource, fetch_source, read_source\n'
                f's = IdxSource("tiny_set", {server.url!r}, {source(files).md5!r})\n'
                'for _ in range(4):\n'
                '    if os.fork(): continue\n'
                '    fetch_source(s, sys.argv[1], progress=False)\n'
                '    os.write(1, f"{read_source(s, sys.argv[1]).x.sum().item()}\\n".encode())\n'
                '    os._exit(0)\n'
                'sys.exit(any(os.wait()[1] for _ in range(4)))')
        done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                              timeout=120)
    printed = done.stdout.split()
    assert done.returncode == 0 and len(printed) == 4 and len(set(printed)) == 1
    assert sorted(name for name, _ in server.asked) == sorted(NAMES)


# The real files

REAL = next((p for p in (Path(os.environ.get('LAP_NB_DATA') or '/nonexistent'), ROOT.parent / 'shared' / 'data')
             if (p / 'mnist').is_dir() and (p / 'fashion-mnist').is_dir()), None)
real = pytest.mark.skipif(REAL is None,
                          reason='no MNIST here: LAP_NB_DATA is not set and ../shared/data does not exist')


@real
@pytest.mark.parametrize('name, mean, first', [('mnist', .1307, [5, 0, 4, 1, 9]), ('fashion_mnist', .2860, [9, 0, 0, 3, 0])])
def test_real_pictures(name, mean, first):
    dataset = data.load(name, REAL)
    assert dataset.x.shape == (70000, 1, 28, 28) and dataset.x.dtype == torch.float32
    assert dataset.x.min() == 0 and dataset.x.max() == 1
    assert abs(dataset.x[:60000].mean(dtype=torch.float64) - mean) < 5e-5, 'the mean everybody normalises by'
    assert dataset.y[:5].tolist() == first and dataset.test.tolist() == list(range(60000, 70000))
    split = dataset.splits(100, range(3))
    assert dataset.y[split.train].sort().values[0].bincount().min() >= 8


# A part of CIFAR-10

def test_cifar_part_altered_or_absent(tmp_path):
    folder = tmp_path / 'cifar10-lossless-subset'
    with pytest.raises(FileNotFoundError, match='train.webp, test.webp, index.npz not found'):
        data.cifar10_part(tmp_path)
    folder.mkdir()
    for name in data.CIFAR10_PART: (folder / name).write_bytes(b'not this')
    with pytest.raises(ValueError, match='train.webp is truncated or altered: md5 4cc42e'):
        data.load('cifar10_part', tmp_path)
    (folder / 'index.npz').unlink()
    with pytest.raises(FileNotFoundError, match=r': index.npz not found'): data.cifar10_part(tmp_path)


@pytest.mark.skipif(REAL is None or not (REAL / 'cifar10-lossless-subset').is_dir(), reason='no part of CIFAR-10 here')
def test_real_cifar_part():
    """Pixels in official order, row by row: their checksums are those of the arrays [N, 32, 32, 3] the files were made
    from."""
    import hashlib
    dataset = data.load('cifar10_part', REAL)
    bytes_ = dataset.x.mul(255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    assert hashlib.md5(bytes_[:8068].tobytes()).hexdigest() == '85efaae1afe00015301186f49f38753f'
    assert hashlib.md5(bytes_[8068:].tobytes()).hexdigest() == '0c4c38dfa836385de34b32047bf21481'
    assert dataset.y[:5].tolist() == [6, 9, 9, 4, 1] and dataset.test.tolist() == list(range(8068, 9085))
    assert dataset.classes == 10 and dataset.split(8000, n_val=68).val.shape == (68,)


@pytest.mark.parametrize("y", [torch.rand(20), torch.full((20,), -1), torch.zeros(20, 1, dtype=torch.long), torch.eye(20), torch.zeros(0, dtype=torch.long)])
def test_labels_that_are_no_classes_are_refused(y):
    with pytest.raises(ValueError, match=r"labels must be whole numbers 0, 1, .* found a tensor \["):
        data.with_test(torch.randn(len(y), 2), y, 4, "mine")


def test_a_test_part_that_cannot_be():
    x, y = torch.randn(20, 2), torch.arange(20) % 2
    for n, error in ((0, ValueError), (-1, ValueError), (20, ValueError), (21, ValueError), (2.5, TypeError),
                     (.3, TypeError)):
        with pytest.raises(error, match="n_test"): data.with_test(x, y, n, "mine")


def test_a_test_part_has_a_sample_of_each_class():
    x, y = torch.randn(100, 2), torch.arange(100) % 10
    with pytest.raises(ValueError, match="n_test.*one sample for each class"): data.with_test(x, y, 9, "mine")
    assert len(data.with_test(x, y, 10, "mine").test) == 10


# Servers that cannot be trusted

class Hostile(BaseHTTPRequestHandler):
    "Sends the bytes that `server.say` yields, whatever they are, until the client is gone."
    def log_message(self, *args): pass

    def do_GET(self):
        self.close_connection = True
        self.server.asked.append(self.headers.get('Range'))
        try:
            for piece in self.server.say(self):
                self.wfile.write(piece); self.wfile.flush()
        except OSError: self.server.gone.set()


@contextmanager
def hostile(say):
    with ThreadingHTTPServer(('127.0.0.1', 0), Hostile) as server:
        server.daemon_threads, server.say, server.asked, server.gone = True, say, [], threading.Event()
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.01), daemon=True)
        thread.start()
        try: yield f'http://127.0.0.1:{server.server_port}/file', server
        finally: server.shutdown(); thread.join()


def head(*lines): return ('HTTP/1.1 200 OK\r\n' + ''.join(f'{line}\r\n' for line in lines) + '\r\n').encode()


def forever(piece, pause=0):
    while True:
        yield piece
        time.sleep(pause)


@pytest.mark.parametrize('length', ['many', '-5', '1e3', '', '1' * 5000, '٣', '0x10'])
def test_a_length_that_is_no_number_is_passed_over(tmp_path, length):
    with hostile(lambda _: [(f'HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n').encode(), BODY]) as (url, _):
        try: download_file(url, tmp_path / 'file', SUM, progress=False)
        except OSError as e: assert 'could not fetch' in str(e)
        else: assert (tmp_path / 'file').read_bytes() == BODY


@pytest.mark.parametrize('announced', [199_999, 200_001, 10 ** 15])
def test_a_size_other_than_the_known_one_is_refused_unread(tmp_path, announced):
    with hostile(lambda _: [head(f'Content-Length: {announced}'), BODY]) as (url, _):
        with pytest.raises(OSError, match=f'offers {announced:,} bytes, expected 200,000'):
            download_file(url, tmp_path / 'file', SUM, progress=False, size=200_000)
    assert left(tmp_path) == []


@pytest.mark.parametrize('size', [None, 200_000])
def test_an_answer_without_end_is_cut(tmp_path, monkeypatch, size):
    monkeypatch.setattr(data, 'LARGEST', 1_000_000)
    most = size or 1_000_000
    with hostile(lambda _: itertools.chain([head()], forever(bytes(1 << 16)))) as (url, server):
        with pytest.raises(OSError, match=f'more than the {most:,} bytes expected'):
            download_file(url, tmp_path / 'file', SUM, progress=False, size=size)
        assert server.gone.wait(60)
    assert left(tmp_path) == []
    with hostile(lambda _: [head(f'Content-Length: {10 ** 12}'), BODY]) as (url, _):
        with pytest.raises(OSError, match=f'offers 1,000,000,000,000 bytes, expected .*{most:,}'):
            download_file(url, tmp_path / 'file', SUM, progress=False, size=size)


DRIPS = [([head()], b'x'), ([b'HTTP/1.1 200 OK\r\nA: '], b'x'),
         ([b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n'], b'1\r\nx\r\n'),
         ([], b'HTTP/1.1 100 Continue\r\n\r\n')]


def test_a_drip_has_an_end(tmp_path, monkeypatch):
    """In the body, in the header, in chunks, before the answer: no pause is longer than the timeout, it is the time for
    the whole that ends it and cuts the connection."""
    monkeypatch.setattr(data, 'PATIENCE', .1)
    def fetch_drip(i):
        start, piece = DRIPS[i]
        with hostile(lambda _: itertools.chain(start, forever(piece, .05))) as (url, server):
            with pytest.raises(OSError, match='it was not there after 2 s'):
                download_file(url, tmp_path / str(i), SUM, timeout=20., progress=False)
            return server.gone.wait(60)
    with ThreadPoolExecutor(4) as pool: assert all(pool.map(fetch_drip, range(len(DRIPS))))


@pytest.mark.parametrize('to', ['file:///etc/passwd', 'ftp://127.0.0.1/file', 'data:,x', 'gopher://a', 'javascript:a'])
def test_a_server_leads_nowhere_but_to_the_web(tmp_path, to):
    with hostile(lambda _: [f'HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n'.encode()]) as (url, _):
        with pytest.raises(OSError, match='could not fetch'):
            download_file(url, tmp_path / 'file', SUM, progress=False, timeout=5)
    assert left(tmp_path) == []


def test_a_server_may_lead_on(tmp_path):
    with serving({'file': BODY}) as server, hostile(lambda _: [
            f'HTTP/1.1 302 Found\r\nLocation: {server.url}file\r\nContent-Length: 0\r\n\r\n'.encode()]) as (url, _):
        download_file(url, tmp_path / 'file', SUM, progress=False)
    assert (tmp_path / 'file').read_bytes() == BODY


@pytest.mark.parametrize('answer', [b'', b'nonsense\r\n\r\n', b'HTTP/1.1 500 Oops\r\n\r\n', b'HTTP/1.1 abc\r\n\r\n', b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n', b'\0' * 100_000])
def test_answers_that_are_none(tmp_path, answer):
    with hostile(lambda _: [answer]) as (url, _):
        with pytest.raises(OSError, match='could not fetch http.*by other means'):
            download_file(url, tmp_path / 'file', SUM, progress=False, timeout=5)


@pytest.mark.parametrize('url', ['ftp://a/b', 'data:,x', 'nothing', '', 'javascript:a'])
def test_other_addresses_are_refused(tmp_path, url):
    with pytest.raises(ValueError, match='expected http, https or file'): download_file(url, tmp_path / 'file', SUM)


@pytest.mark.parametrize('plant', [lambda part, victim: part.symlink_to(victim), lambda part, victim: os.link(victim, part)], ids=['symlink', 'hard link'])
@pytest.mark.parametrize('content', [b'precious', BODY, BODY[:50_000]], ids=['other', 'the file itself', 'its beginning'])
def test_a_planted_link_is_not_followed(tmp_path, plant, content):
    victim, folder = tmp_path / 'victim', tmp_path / 'folder'
    folder.mkdir(); victim.write_bytes(content)
    plant(folder / 'file.part', victim)
    with serving({'file': BODY}) as server: fetch(server, folder / 'file')
    assert victim.read_bytes() == content and left(folder) == ['file'] and not (folder / 'file').is_symlink()
    assert (folder / 'file').read_bytes() == BODY and (folder / 'file').stat().st_nlink == 1 and server.asked == [
        ('file', None)]


def test_a_dangling_link_makes_no_file(tmp_path):
    (tmp_path / 'file.part').symlink_to(tmp_path / 'planted')
    with serving({'file': BODY}) as server: fetch(server, tmp_path / 'file')
    assert left(tmp_path) == ['file']


def test_the_mode_of_a_fetched_file_is_the_users(tmp_path):
    old = os.umask(0o027)
    try:
        with serving({'file': BODY}) as server: fetch(server, tmp_path / 'file')
    finally: os.umask(old)
    assert (tmp_path / 'file').stat().st_mode & 0o777 == 0o640


def test_known_sizes_are_asked_for(tmp_path):
    files, _ = tiny_files()
    with serving(files) as server:
        src = replace(source(files, server.url), sizes={name: len(content) for name, content in files.items()})
        data.fetch_source(src, tmp_path, progress=False)
        assert len(read_source(src, tmp_path).x) == 60
        wrong = replace(src, name='other', sizes={NAMES[0]: 1})
        with pytest.raises(OSError, match='expected 1'): data.fetch_source(wrong, tmp_path, progress=False)


@real
def test_sizes_of_the_real_files():
    for src in (data.MNIST, data.FASHION_MNIST):
        assert {name: (REAL / src.folder / name).stat().st_size for name in src.md5} == src.sizes


# Packed files that are larger than they look

def test_packed_zeros_are_refused(tmp_path):
    path = tmp_path / 'zeros.npz'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name in 'ab':
            with archive.open(f'{name}.npy', 'w', force_zip64=True) as f:
                np.lib.format.write_array_header_1_0(f, dict(descr='|u1', fortran_order=False, shape=(100 << 20,)))
                for _ in range(100): f.write(bytes(1 << 20))
    assert path.stat().st_size < 1_000_000
    with pytest.raises(ValueError, match='its arrays take 209,.* bytes, expected no more than'): data.read_npz(path)
    np.savez_compressed(path, a=np.zeros(1_000_000))
    assert data.read_npz(path)['a'].shape == (1_000_000,)
    content = struct.pack('>I3I', 0x803, 200, 1024, 1024)
    path = tmp_path / 'zeros.gz'
    with gzip.open(path, 'wb') as f:
        f.write(content)
        for _ in range(200): f.write(bytes(1 << 20))
    with pytest.raises(ValueError, match='announces 209,715,200 bytes, expected no more than'):
        data.read_idx(path, data.file_md5(path), 3)


@pytest.mark.filterwarnings('ignore:The PyTorch API of nested tensors')
def test_samples_without_values_and_seeds_without_end_are_refused():
    x, y = torch.randn(8, 4), torch.arange(8) % 2
    nested = torch.nested.nested_tensor(list(x))
    for bad in (x.to_sparse(), x.to('meta'), nested):
        with pytest.raises(ValueError, match='samples must be a floating-point tensor'):
            Dataset(bad, y, torch.arange(6, 8), 's', 2)
    for bad in (y.to_sparse(), y.to('meta'), nested):
        with pytest.raises(ValueError, match='labels must be int64'): Dataset(x, bad, torch.arange(6, 8), 's', 2)
        with pytest.raises(ValueError, match='test indices must be int64'): Dataset(x, y, bad, 's', 2)
    with pytest.raises(ValueError, match='seeds has 1,000,000,000 values'):
        Dataset(x, y, torch.arange(6, 8), 's', 2).splits(2, range(10 ** 9))
