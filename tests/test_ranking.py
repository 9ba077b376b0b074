"""Rankings of blocks: cases with known answers, and what is refused."""
import numpy as np
import pytest
import torch
from torch import nn

from lap_nb.dynamics import Flow, ResidualNet
from lap_nb.nets import dense_net
from lap_nb.ranking import FREE, PRICED, rank_blocks
from lap_nb.tasks import Task


class Shift(nn.Module):
    "A constant velocity."
    def __init__(self, by):
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))
    def forward(self, x): return self.by + 0 * x


def line(*shifts):
    return ResidualNet(Flow([Shift(by) for by in shifts]), nn.Identity()).eval()


def pairs(n=24, width=2):
    g = torch.Generator().manual_seed(0)
    return [(x := torch.randn(3, width, generator=g), x + 1.) for _ in range(n)]


def test_costs_are_those_of_the_known_answer():
    "Of shifts that add up to the answer, each removal costs the square of what it added."
    net = line([.5, .5], [.1, .1], [.4, .4], [0., 0.])
    found = rank_blocks(net, pairs(), Task.regression(), n_blocks=3)
    costs = [i.mean for i in found.scores['removal']]
    np.testing.assert_allclose(costs, [.25, .01, .16, 0.], atol=1e-6)
    np.testing.assert_allclose([i.mean for i in found.scores['energy']], [.25, .01, .16, 0.], atol=1e-6)
    for way in ('energy', 'relative', 'removal', 'span', 'greedy'): assert found.chosen[way] == (3,), way
    assert found.rise['removal'].mean == pytest.approx(0.0, abs=1e-6) and found.agreement[
        'energy'
    ].mean == pytest.approx(1.0)
    assert found.stability['removal'] == 1. and found.passes['removal'] == 5 and found.passes['greedy'] == 4


def test_blocks_that_undo_one_another_leave_as_a_span():
    "Each removal alone is dear, both together are free: only a span and greedy search with a second look can see it."
    net = line([1., 1.], [3., 3.], [-3., -3.], [.3, .3], [-.3, -.3])
    found = rank_blocks(net, pairs(), Task.regression(), n_blocks=3)
    assert found.chosen['span'] in ((1, 2), (3, 4)) and found.rise['span'].mean == pytest.approx(0., abs=1e-5)
    assert found.chosen['removal'] == (3, 4)
    assert 'even' in found.chosen and found.rise['even'].mean > 1.


@pytest.mark.parametrize('measures', [FREE, PRICED, ('energy',), ('removal', 'span')])
def test_only_what_is_asked_for_is_measured(measures):
    calls = []
    net = dense_net(2, 3, K=4).eval()
    net.register_forward_hook(lambda *a: calls.append(1))
    data = [(torch.randn(2, 2), torch.tensor([0, 2])) for _ in range(20)]
    found = rank_blocks(net, data, measures=measures, resamples=20)
    assert set(found.chosen) == {*measures, 'even'} and set(found.scores) == set(measures) - {'span', 'greedy'}


def test_padding_says_nothing():
    "Tokens behind a mask change no score, whatever stands there."
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
            self.layers = nn.ModuleList(Layer() for _ in range(3))
        def forward(self, input_ids, attention_mask=None):
            x = self.table(input_ids)
            for layer in self.layers: x = layer(x)
            return self.head(x)
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        def forward(self, x): return x + self.f(x)
    torch.manual_seed(0)
    net, g = Words().eval(), torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 9, (2, 5), generator=g) for _ in range(16)]
    alone = [dict(input_ids=i, attention_mask=torch.ones_like(i)) for i in ids]
    padded = [dict(input_ids=torch.cat([i, torch.full((2, 3), 7)], 1),
                   attention_mask=torch.tensor([[1] * 5 + [0] * 3] * 2)) for i in ids]
    one, other = (rank_blocks(net, b, Task.language_model(), n_blocks=2, resamples=50) for b in (alone, padded))
    for name in one.scores:
        np.testing.assert_allclose(
            [i.mean for i in one.scores[name]], [i.mean for i in other.scores[name]], rtol=1e-4, atol=1e-6
        )
    assert one.chosen == other.chosen


def test_the_network_is_left_as_it_is_and_results_are_alike_again():
    torch.manual_seed(0)
    net = dense_net(2, 3, K=4)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    data = [(torch.randn(2, 2), torch.tensor([0, 2])) for _ in range(20)]
    one, other = (rank_blocks(net, data, resamples=50) for _ in range(2))
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert one == other and one.best in one.chosen and len(one.verdict.split('\n')) == len(one.chosen)
    assert '| energy |' in one._repr_markdown_()


@pytest.mark.parametrize('options, words', [
    (dict(n_blocks=4), 'nothing would leave'), (dict(n_blocks=0), 'expected'), (dict(n_blocks=5), 'expected'),
    (dict(measures=['no']), 'expected one of'),
    (dict(resamples=0), 'expected a whole number'), (dict(seed=-1), 'expected'), (dict(chunk=0), 'expected')])
def test_what_cannot_be_ranked_is_refused(options, words):
    data = [(torch.randn(2, 2), torch.tensor([0, 2])) for _ in range(20)]
    with pytest.raises(ValueError, match=words): rank_blocks(dense_net(2, 3, K=4), data, **options)
    with pytest.raises(ValueError, match='at least 8'): rank_blocks(dense_net(2, 3, K=4), data[:15])