"The network and the step of the published code, against a plain account of them; progress and pairs of the study."
import json

import pytest
import torch
import torch.nn.functional as F

from lap_nb.data import Dataset
from lap_nb.least_action import DualAscent, LeastAction
from lap_nb.lab.published import (LAP, STARTS, Arm, _check_precision, _one_epoch, _price, _right, _Training,
                                  paired_points, published_cells, published_net, published_rows, start_from_,
                                  train_published)
from lap_nb.training import save_checkpoint


def plain_account(model, x, y, lam, tau):
    """C, lambda, objective and gradients as the authors' loop has them: the branch is penalised, lambda moves before
    the step."""
    weights = dict(model.named_parameters())
    convs = [m.weight for m in model.flow.modules() if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in model.flow.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    norm = lambda z, m: (
        (z - z.mean((0, 2, 3), keepdim=True))
        / (z.var((0, 2, 3), keepdim=True, unbiased=False) + m.eps).sqrt()
        * m.weight[:, None, None]
        + m.bias[:, None, None]
    )
    z, C, used = model.encoder(x), 0, 0
    for k in range(9):
        branch = z
        for j in range(2):
            if k or j: branch = F.relu(norm(branch, norms[used])); used += 1
            branch = F.conv2d(branch, convs[2 * k + j], padding=1)
        z, C = z + branch, C + (branch.abs() ** 2).mean()
    task = F.cross_entropy(model.head(z), y)
    lam = lam + tau * task.item()
    objective = task + C / lam
    return C.item(), lam, objective.item(), torch.autograd.grad(objective, list(weights.values()))


@pytest.mark.parametrize('start', STARTS)
def test_one_step_is_that_of_the_published_algorithm(start):
    torch.manual_seed(0)
    model = start_from_(published_net(side=8), start).double()
    x, y = torch.rand(6, 1, 8, 8, dtype=torch.float64), torch.arange(6)
    C, lam, objective, gradients = plain_account(model, x, y, 1., 1.)
    with LeastAction(model, DualAscent()) as la:
        found = la(F.cross_entropy(model(x), y))
        found.backward()
        assert la.action.item() == pytest.approx(C, rel=1e-6) and la.lam.item() == pytest.approx(lam, rel=1e-6)
    assert found.item() == pytest.approx(objective, rel=1e-6)
    for p, g in zip(model.parameters(), gradients, strict=True): assert (p.grad - g).norm() <= 1e-6 * g.norm() + 1e-12


def test_arms_of_a_start_share_their_weights_and_starts_differ():
    split = pictures()
    first = {
        start: [
            torch.cat([p.flatten() for p in _Training(split, Arm(start, **a), 3, 'float32').model.parameters()])
            for a in ({}, LAP, dict(label_smoothing=0.1))
        ]
        for start in STARTS
    }
    for same in first.values(): assert all(torch.equal(same[0], other) for other in same[1:])
    assert not torch.equal(first['official'][0], first['blocks'][0]) and not torch.equal(
        first['kaiming'][0], first['blocks'][0])


def pictures():
    g = torch.Generator().manual_seed(0)
    return Dataset(torch.rand(60, 1, 8, 8, generator=g),
                   torch.arange(60) % 3, torch.arange(30, 60), 'noise', 3).split(12, n_val=9)


def test_same_bits_after_any_epoch(tmp_path):
    whole, _ = train_published(pictures(), Arm(**LAP), 1, epochs=4)
    for stop in range(1, 4):
        state = tmp_path / f'{stop}.pt'
        _stopped(stop, state)
        again, _ = train_published(pictures(), Arm(**LAP), 1, progress=state, epochs=4)
        assert again == whole


def _stopped(stop, state):
    "What a process leaves that ends after so many epochs."
    half = (split := pictures()).test[torch.randperm(30, generator=torch.Generator().manual_seed(1))[:1000]]
    t = _Training(split, Arm(**LAP), 1, 'float32', 4)
    for _ in range(stop):
        _one_epoch(t)
        t.points.append(
            dict(epoch=t.epoch, val=_right(t, t.split.val), half=_right(t, half), loss=t.last_loss, **_price(t)))
    save_checkpoint(state, t.state())


def test_a_record_holds_one_precision(tmp_path):
    from lap_nb.lab.store import append_rows
    note = dict(config='c', device='cpu', device_name='x', threads=1, device_seconds=1.,
                settings=dict(method=dict(name='a/b'), net={}))
    append_rows(tmp_path / 'published-mnist.jsonl', note, [dict(seed=0, precision='float32')],
                dict(study='published-mnist', scale='published', data='mnist', n=100, net='n', method='a/b'))
    _check_precision(tmp_path / 'published-mnist.jsonl', 'float32')
    with pytest.raises(ValueError, match='holds networks in float32, expected bfloat16'):
        _check_precision(tmp_path / 'published-mnist.jsonl', 'bfloat16')
    assert len(published_rows(tmp_path)) == 1


def test_pairs_are_complete_before_the_next_seed():
    cells = published_cells()
    for seed in range(10):
        assert {c[2] for c in cells[9 * seed : 9 * seed + 9]} == {seed} and len(
            {c[1].name for c in cells[9 * seed : 9 * seed + 9]}
        ) == 9
    assert json.dumps([c[1].name for c in cells[:9]]).count('plain') == 3


def test_only_seeds_of_both_arms_are_paired():
    rows = [dict(start='official', objective=o, n=100, seed=s, test_accuracy_last=a) for o, s, a in
            [('plain', 0, .5), ('plain', 1, .6), ('LAP(1,1,1)', 1, .7), ('LAP(1,1,1)', 2, .9), ('plain', 3, None)]]
    torch.testing.assert_close(paired_points(rows, 'official', 'LAP(1,1,1)'), torch.tensor([10.], dtype=torch.float64))
