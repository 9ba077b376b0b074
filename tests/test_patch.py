"""An affine map in place of blocks that leave: exact where the blocks are affine, and never worse in least squares than
nothing."""
import pytest
import torch
from torch import nn

from lap_nb.depth import DepthSchedule, Elastic, shorten
from lap_nb.dynamics import Flow, ResidualNet
from lap_nb.nets import conv_net, dense_net
from lap_nb.tasks import Task


class Layer(nn.Module):
    "Somebody else's block."
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, x): return x + self.f(x)


class Tuple(Layer):
    def forward(self, x): return x + self.f(x), None


class Tuples(nn.Module):
    def __init__(self, *layers): super().__init__(); self.layers = nn.ModuleList(layers)
    def forward(self, x):
        for layer in self.layers: x, _ = layer(x)
        return x


def affine(kind, K=5):
    torch.manual_seed(0)
    if kind == 'flow':
        return ResidualNet(Flow([nn.Linear(4, 4) for _ in range(K)], h=0.5), nn.Linear(4, 2)), torch.randn(60, 4)
    if kind == 'tokens': return nn.Sequential(*(Layer(nn.Linear(4, 4)) for _ in range(K))), torch.randn(20, 6, 4)
    if kind == 'pictures':
        return nn.Sequential(*(Layer(nn.Conv2d(3, 3, 1)) for _ in range(K))), torch.randn(20, 3, 5, 5)
    return Tuples(*(Tuple(nn.Linear(4, 4)) for _ in range(K))), torch.randn(60, 4)


@pytest.mark.parametrize('kind', ['flow', 'tokens', 'pictures', 'tuples'])
@pytest.mark.parametrize('kept', [(0, 1, 4), (0,), (4,), (2,), (1, 3), (0, 1, 2, 3)])
def test_affine_blocks_are_replaced_exactly(kind, kept, monkeypatch):
    monkeypatch.setattr('lap_nb.depth.RIDGE', 1e-10)   # else exact to about its own size
    net, x = affine(kind)
    net.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    small = Elastic(net, x[:4]).cut(DepthSchedule(kept, [1.] * len(kept)), patch=x)
    new = 2 * torch.randn_like(x)   # it is the same map, not a fit to these samples
    with torch.no_grad(): torch.testing.assert_close(small(new), net(new), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize('net, x', [
    (dense_net(2, 3, K=6), torch.randn(50, 2)), (conv_net((1, 8, 8), 3, K=4, width=4), torch.randn(30, 1, 8, 8))])
def test_the_end_of_a_run_is_nearer_than_without(net, x):
    net.eval()
    K = len(net.flow.blocks)
    elastic, schedule = Elastic(net, x[:4]), DepthSchedule((0, K - 1), (1., 1.))
    with torch.no_grad():
        ends = [small.flow.blocks[:-1] for small in (elastic.cut(schedule), elastic.cut(schedule, patch=x))]
        z = net.encoder(x)
        full = nn.Sequential(*net.flow.blocks[:-1])(z)
        off = [(nn.Sequential(*blocks)(z) - full).square().sum() for blocks in ends]
    assert off[1] < off[0]


def test_batches_of_any_kind_and_training_state():
    net, x = affine('tokens')
    net.train()
    elastic = Elastic(net, x[:4])
    whole, parts = (
        elastic.cut(DepthSchedule((0, 4), (1.0, 1.0)), patch=p) for p in (x, [dict(input=part) for part in x.split(7)])
    )
    assert whole.training
    for a, b in zip(whole.parameters(), parts.parameters()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match='no batches'): elastic.cut(2, patch=[])


def test_shorten_takes_a_patch():
    net, x = affine('flow')
    y = net.eval()(x).argmax(1).detach()
    data = dict(train=[(x, y)], val=[(x, y)])
    plain, patched = (shorten(net, data, n_blocks=2, way='skip', patch=p, task=Task.classification(), verbose=False)
                      for p in (None, 'linear'))
    assert patched.shortened['val_score'][1] == 1. >= plain.shortened['val_score'][1]
    few = shorten(net, data, loss_rise=.01, way='skip', patch='linear', task=Task.classification(), verbose=False)
    assert few.shortened['blocks'][1] == 1
    with pytest.raises(ValueError, match="expected one of 'linear'"): shorten(net, data, n_blocks=2, patch='no')