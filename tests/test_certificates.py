"Certificates: broken as rarely as they say, exact where all outcomes can be counted, refused where they mean nothing."
import json
import math
from dataclasses import FrozenInstanceError, replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import binom

from lap_nb.certificates import Certificate, certify, fewest_samples, p_value, samples_missing
from lap_nb.data import digits
from lap_nb.depth import shorten
from lap_nb.nets import dense_net
from lap_nb.penalties import Penalty
from lap_nb.training import fit

ROWS = st.lists(st.sampled_from([-1., 0., 1.]) | st.floats(-1, 1), min_size=1, max_size=40).map(np.array)
DROPS = st.floats(0, .9)


def drawn(rng, worse, better, n): return rng.choice([1., -1., 0.], n, p=[worse, better, 1 - worse - better])


def scores(d): return (d >= 0).astype(float), (d <= 0).astype(float)   # of two networks whose difference is d


@pytest.mark.parametrize('worse, better, drop, n, confidence', [
    (.01, 0, .01, 400, .95), (.03, .02, .01, 600, .95), (.06, .01, .05, 300, .95), (.3, .2, .1, 300, .9),
    (.05, .05, 0, 300, .9), (.5, .3, .2, 100, .8), (.02, .01, .01, 2000, .9)])
def test_promises_are_broken_no_more_often_than_said(worse, better, drop, n, confidence):
    rng, runs = np.random.default_rng(0), 400
    pairs = (scores(drawn(rng, worse, better, n)) for _ in range(runs))
    broken = sum(certify(full, {'c': other}, drop, confidence).certified is not None for full, other in pairs)
    assert broken <= binom.ppf(.999, runs, 1 - confidence)


def test_bounds_hold_for_scores_of_any_kind():
    rng, runs = np.random.default_rng(1), 400
    broken = sum(p_value(rng.beta(.2, .2 * (1 - .55) / .55, 300) * 2 - 1, .1, .9) <= .1 for _ in range(runs))
    assert broken <= binom.ppf(.999, runs, .1)   # the mean of 2 beta - 1 is .1


def test_the_first_bad_depth_ends_it_and_all_before_are_promised_together():
    "Two good depths, then three that break the promise: a false one is certified in at most a twentieth of the runs."
    rng, runs, false = np.random.default_rng(2), 300, 0
    for _ in range(runs):
        full = np.ones(800)
        others = {str(k): full - (rng.random(800) < worse) for k, worse in enumerate((.0, .002, .02, .02, .02))}
        false += certify(full, others, .02).certified in ('2', '3', '4')
    assert false <= binom.ppf(.999, runs, .05)


@pytest.mark.parametrize('n', range(1, 8))
@pytest.mark.parametrize('drop, confidence', [(.3, .7), (.5, .6), (0., .5), (.1, .8)])
def test_exactly_over_all_outcomes(n, drop, confidence):
    won = [d for d in product((1., 0., -1.), repeat=n) if p_value(np.array(d), drop, confidence) <= 1 - confidence]
    for better in (0., .1, .25):
        chance = {1.: drop + better, -1.: better, 0.: 1 - drop - 2 * better}
        assert sum(math.prod(chance[v] for v in d) for d in won) <= 1 - confidence + 1e-12


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ROWS, DROPS, DROPS, st.floats(.5, .999))
def test_who_allows_more_is_promised_no_less(d, a, b, confidence):
    a, b = sorted((a, b))
    assert p_value(d, b, confidence) <= p_value(d, a, confidence) * (1 + 1e-9)
    assert 0 < p_value(d, a, confidence) <= 1


def test_against_a_wager_in_plain_python():
    d, drop, confidence = drawn(np.random.default_rng(3), .1, .05, 50), .1, .9
    capital, best, seen, squares = 1., 1., [], .02
    for value in d:
        spread = squares / (len(seen) + 1)
        stake = min(math.sqrt(2 * math.log(1 / (1 - confidence)) / (len(d) * spread)), .9 / (1 - drop))
        capital *= 1 + stake * (drop - value)
        best = max(best, capital)
        seen.append(value)
        squares += (value - sum(seen) / (len(seen) + 1)) ** 2
    assert p_value(d, drop, confidence) == pytest.approx(1 / best, rel=1e-9)


def test_the_stake_looks_at_the_past_alone():
    "What the last samples are changes nothing in the capital before them."
    d = drawn(np.random.default_rng(4), .0, .05, 60)
    worse = np.concatenate([d[:-1], [1.]])
    assert p_value(d[:-1].repeat(1), .1, .9) <= .1
    assert p_value(worse, .1, .9) == p_value(np.concatenate([d[:-1], [.9]]), .1, .9)


def test_power_beside_bernstein_and_an_oracle():
    """Eight depths of evenly rising drops, 5,000 samples: more are won than by the empirical bound of Maurer and Pontil
    (its range is 2), no more than by an oracle that knows the drops, but for promises that are broken by chance."""
    rng, drops, n, saved, bernstein, alpha = np.random.default_rng(5), np.linspace(0, .03, 8), 5000, 0, 0, .05
    def first_lost(won): return [*won, False].index(False)
    def above(d):
        return d.mean() + math.sqrt(2 * d.var(ddof=1) * math.log(2 / alpha) / n) + 14 * math.log(2 / alpha) / (3 * n - 3)
    for _ in range(30):
        rows = [drawn(rng, .002 + 2 * q, .002 + q, n) for q in drops]
        saved += first_lost(p_value(d, .01, 1 - alpha) <= alpha for d in rows)
        bernstein += first_lost(above(d) <= .01 for d in rows)
    oracle = 30 * first_lost(drops < .01)
    assert bernstein < saved <= oracle + binom.ppf(.999, 30, alpha)


def test_as_many_samples_as_are_missing_give_about_an_even_chance():
    rng, d = np.random.default_rng(6), np.repeat([0., 1., -1.], [392, 4, 4])
    n = len(d) + samples_missing(d, .01, .95)
    won = lambda n: np.mean([p_value(rng.choice(d, n), .01, .95) <= .05 for _ in range(300)])
    assert won(len(d)) < .3 < won(n) < .8 < won(2 * n)
    assert samples_missing(d + .01, .01, .95) is None and samples_missing(np.zeros(10), 0., .95) is None


@pytest.mark.parametrize('drop, confidence', [(.01, .95), (.05, .95), (.1, .99), (.5, .6), (.003, .9)])
def test_fewest_samples_is_no_more_than_are_needed(drop, confidence):
    n = fewest_samples(drop, confidence)
    assert p_value(np.zeros(n - 1), drop, confidence) > 1 - confidence
    assert p_value(np.zeros(math.ceil(1.2 * n) + 2), drop, confidence) <= 1 - confidence
    with pytest.raises(ValueError, match=f'found {n - 1:,} calibration samples, expected at least {n:,}'):
        certify(np.ones(n - 1), {'c': np.ones(n - 1)}, drop, confidence)


def test_what_a_certificate_says():
    full, rows = np.ones(400), torch.arange(1000.)[:, None]
    candidates = {'8': full, '7': full * .9, '6': full}
    found = certify(torch.ones(400), candidates, .01, samples=rows[:400], searched=rows[400:])
    assert (found.certified, found.samples, found.searched, found.candidates) == ('8', 400, 600, 3)
    assert [t[0] for t in found.tested] == ['8', '7'] and found.missing is None
    assert '8: a drop of at most 0.01 with confidence 0.95' in repr(found) and 'do not help' in str(found)
    assert found._repr_markdown_().count('| yes |') == 1
    with pytest.raises(FrozenInstanceError): found.drop = .5
    with pytest.raises(TypeError): replace(found, drop='much')
    alone = certify(full, {'8': full}, .01)
    assert alone.missing is None and 'more' not in str(alone)


def test_a_loss_is_scaled_by_its_bounds():
    rng = np.random.default_rng(7)
    full = rng.random(500)
    other = (full - .1 * rng.random(500)).clip(0, 1)
    small, large = (certify(-a * (1 - full), {'c': -a * (1 - other)}, a * .1, bounds=(-a, 0.)) for a in (1., 50.))
    assert small.tested[0][2] == pytest.approx(large.tested[0][2], rel=1e-9) and large.certified == 'c'
    assert large.tested[0][1] == pytest.approx(50 * small.tested[0][1])


GOOD = dict(full=np.ones(400), candidates={'c': np.ones(400)}, drop=.01)


@pytest.mark.parametrize('bad, message', [
    *[(dict(confidence=c), 'confidence is') for c in (0, 1, -1, 2, float('nan'), 95)],
    *[(dict(drop=d), 'drop is') for d in (-.1, 1, 5, float('nan'))],
    *[(dict(bounds=b), 'bounds') for b in (
        None, (0, math.inf), (-math.inf, 0), (1, 0), (0, 0), (0, float('nan')), (-1e308, 1e308))],
    *[(dict(full=f), 'the scores of full') for f in (
        np.full(400, 2.), np.full(400, np.nan), -np.ones(400), np.full(400, np.inf), np.ones((4, 100)), np.ones(0),
        'yes', None, np.ones(400) * 1j)],
    (dict(candidates={'c': np.ones(400) * 3}), 'the scores of c reach from 3'),
    (dict(candidates={'c': np.ones(399)}), 'c has 399 scores, expected one for each of the 400'),
    (dict(candidates={}), 'expected at least one'), (dict(candidates={1: np.ones(400), '1': np.ones(400)}), 'own name'),
    (dict(searched=torch.zeros(3, 2)), 'found searched without samples'),
    (dict(samples=torch.zeros(400, 2), searched=torch.zeros(4, 3)), 'expected rows of one shape'),
    (dict(samples=torch.zeros(3, 2)), 'samples holds 3, expected one for each of the 400'),
    (dict(samples=torch.arange(800.).view(400, 2), searched=torch.tensor([[2., 3.], [8., 9.], [1., 2.]])),
     '2 of the 400'),
])
def test_refusals(bad, message):
    assert certify(**GOOD).certified == 'c'
    with pytest.raises(ValueError, match=message): certify(**GOOD | bad)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16, torch.uint8, torch.int64, torch.bool])
def test_rows_are_compared_in_any_kind(dtype):
    x = (torch.rand(400, 3, 8, generator=torch.Generator().manual_seed(0)) * 100 % 2).to(dtype)
    with pytest.raises(ValueError, match='400 of the 400'): certify(**GOOD, samples=x, searched=x.flip(0))
    turned, zeros = x.transpose(0, 2).contiguous().transpose(0, 2), torch.zeros(400, 2)
    for a, b in ((x, turned), (turned, x.double()), (zeros, -zeros)):
        with pytest.raises(ValueError, match='400 of the 400'): certify(**GOOD, samples=a, searched=b)
    assert certify(**GOOD, samples=x, searched=x[:0]).searched == 0


@pytest.fixture(scope='module')
def split(): return (lambda s: replace(s, val=s.test, test=s.val))(digits().split(100, 0, n_val=100))


@pytest.fixture(scope='module')
def trained(split):
    torch.manual_seed(0)
    net = dense_net(64, 10, K=5, hidden=16)
    fit(net, split, Penalty(net, 1.), epochs=30, lr=3e-3, eval_every=30)
    return net.eval()


def test_shorten_certifies_on_what_it_did_not_search(trained, split):
    small = shorten(trained, split, accuracy_drop=.1, confidence=.9, verbose=False)
    c = small.certificate
    assert isinstance(c, Certificate) and c.searched + c.samples == len(split.val) and c.samples == 418
    m = len(small.flow.blocks)
    assert m < 5 and c.certified == f'{m} block{"s" * (m > 1)}'
    assert json.loads(json.dumps(small.shortened))['certificate']['certified'] == c.certified
    again = shorten(trained, split, accuracy_drop=.1, confidence=.9, verbose=False)
    assert again.certificate == c
    right = lambda net, index: (net(split.x[index]).argmax(1) == split.y[index]).float().mean().item()
    seen = dict((name, drop) for name, drop, _ in c.tested)[c.certified]   # on the calibration samples alone
    parts = torch.randperm(len(split.val), generator=torch.Generator().manual_seed(0)).split([179, 418])
    index = split.val[parts[1]]
    assert right(trained, index) - right(small, index) == pytest.approx(seen, abs=1e-6)


def test_without_a_certificate_the_full_network_comes_back(trained, split, capsys):
    small = shorten(trained, split, accuracy_drop=.008, confidence=.95, epochs=1)
    assert small.certificate.certified is None and len(small.flow.blocks) == 5 and small is not trained
    for name, value in trained.state_dict().items(): torch.testing.assert_close(small.state_dict()[name], value)
    assert 'nothing certified' in capsys.readouterr().out
    assert small.shortened['kept'] == [0, 1, 2, 3, 4]


def test_without_confidence_nothing_is_promised(trained, split):
    assert not hasattr(shorten(trained, split, accuracy_drop=.1, verbose=False), 'certificate')


@pytest.mark.parametrize('goal, message', [
    *[(dict(accuracy_drop=.05, confidence=c), 'confidence is') for c in (0., 1., 1.5, -1., float('nan'))],
    (dict(n_blocks=2, confidence=.9), 'confidence is 0.9 without accuracy_drop'),
    (dict(budget_ms=5., confidence=.9), 'without accuracy_drop'),
    (dict(accuracy_drop=.001, confidence=.95), 'found 418 calibration samples, expected at least 3,3')])
def test_shorten_refuses(trained, split, goal, message):
    with pytest.raises(ValueError, match=message): shorten(trained, split, verbose=False, **goal)


def test_samples_that_repeat_cannot_be_searched_and_certified(trained, split):
    x = split.x.clone()
    x[split.val[::2]] = x[split.val[1]].clone()
    with pytest.raises(ValueError, match='of the 418 calibration samples are among those searched on'):
        shorten(trained, replace(split, x=x), accuracy_drop=.1, confidence=.9, verbose=False)


def test_promises_are_judged_by_the_whole_population(trained, split):
    "True drops and blocks of each choice, by networks that are cut; the same draws give the same columns."
    from lap_nb.lab.promises import COLUMNS, measure_promises, Population
    found, again = (measure_promises(trained, split, samples=(150, 700), drops=(.02, .1)) for _ in range(2))
    assert found == again and found['population'] == len(split.test) and all(len(found[c]) == 4 for c in COLUMNS)
    population = Population(trained, split)
    rows = population.rows(torch.arange(100))
    for row in rows: assert 0 <= row['hits'].mean() <= 1 and len(row['hits']) == len(split.test)
    with torch.no_grad(): right = (trained.eval()(split.x[split.test]).argmax(1) == split.y[split.test]).double()
    assert torch.equal(rows[-1]['hits'], right)
    for blocks, drop, allowed in zip(found['blocks_certified'], found['drop_certified'], found['allowed']):
        assert blocks <= found['depth'] and (blocks < found['depth'] or drop == 0)
