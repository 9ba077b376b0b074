"What trains in the page: its numbers against the package's, under node; and what it does in a browser."
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch.nn.utils import parameters_to_vector

from conftest import ROOT
from lap_nb.nets import dense_net
from lap_nb.kinetic import block_energies
from lap_nb.least_action import DualAscent, FixedWeight, LeastAction
from lap_nb.transport import action_split

SITE = ROOT / 'nbs' / '_site'
NODE = shutil.which('node')
needs_node = pytest.mark.skipif(NODE is None, reason='node is missing: install Node.js, which the site needs as well')
SAME = dict(rtol=1e-5, atol=1e-9)


def node(code, given=None):
    "What a piece of JavaScript returns, with the modules of the page as `flow` and `drawing` and its input as `given`."
    script = f'''import * as flow from {json.dumps((SITE / "flow.mjs").as_uri())}
import * as drawing from {json.dumps((SITE / "drawing.mjs").as_uri())}
import {{readFileSync}} from 'node:fs'
const given = JSON.parse(readFileSync(0, 'utf8')), run = given => {{ {code} }}
const plain = (_, value) => ArrayBuffer.isView(value) ? Array.from(value) : Number.isFinite(value) || typeof value !== 'number' ? value : String(value)
console.log(JSON.stringify(run(given) ?? null, plain))'''
    done = subprocess.run([NODE, '--input-type=module', '-e', script], input=json.dumps(given), capture_output=True,
                          text=True, timeout=120)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


# The numbers

def example(K, hidden, n, seed):
    "A network of the package in float64, and points of two classes."
    torch.manual_seed(seed)
    net = dense_net(2, 2, K=K, hidden=hidden).double()
    y = torch.arange(n) % 2
    angle = 7 * torch.rand(n)
    return net, (1. - .5 * y)[:, None] * torch.stack([angle.cos(), angle.sin()], 1).double(), y


def as_json(net, x, y, K, hidden, **more):
    weights = parameters_to_vector(net.parameters()).tolist()
    return dict(weights=weights, blocks=K, hidden=hidden, points=x.flatten().tolist(), labels=y.tolist(), **more)


TRAIN = '''
  const net = new flow.Network(given.blocks, given.hidden, Float64Array.from(given.weights))
  const data = {points: Float64Array.from(given.points), labels: Uint8Array.from(given.labels)}
  const training = new flow.Training(net, data, {lambda: Infinity, ...given.settings}), curve = []
  for (let i = 0; i < given.steps; i++) { training.step(); curve.push([training.loss, training.lambda, training.action]) }
  return {curve, weights: net.weights, gradient: training.gradient, x: net.trajectory(data.points)}'''


@needs_node
@pytest.mark.parametrize('least_action', [False, True])
@pytest.mark.parametrize('K, hidden, n', [(1, 1, 2), (3, 5, 7), (9, 16, 64), (20, 16, 31)])
def test_gradient_is_the_packages(K, hidden, n, least_action):
    net, x, y = example(K, hidden, n, seed=K)
    la = LeastAction(net, FixedWeight(1 / .3)) if least_action else None
    loss = F.cross_entropy(net(x), y)
    (la(loss) if la else loss).backward()
    expected = torch.cat([p.grad.flatten() for p in net.parameters()])
    settings = dict(tau=0, **(dict([('lambda', .3)]) if least_action else {}))
    found = node(TRAIN, as_json(net, x, y, K, hidden, steps=1, settings=settings))
    torch.testing.assert_close(torch.tensor(found['gradient'], dtype=torch.float64), expected, **SAME)


@needs_node
@pytest.mark.parametrize('settings', [{}, {'lambda': .1, 'tau': .1, 'target': .05}, {'lambda': 2., 'tau': 1.}, {'lambda': .5, 'tau': 3., 'target': .6}, {'lambda': 5., 'tau': 0.}],
                         ids=['plain', 'as in the page', 'published', 'falls to its floor', 'constant'])
def test_fifty_steps_are_the_packages(settings):
    "Losses, multipliers and actions on the way, and the weights in the end."
    net, x, y = example(9, 16, 64, seed=1)
    given = as_json(net, x, y, 9, 16, steps=50, settings=settings | {'rate': .01})
    opt, curve = torch.optim.Adam(net.parameters(), lr=.01), []
    la = (
        LeastAction(net, DualAscent(settings['lambda'], settings['tau'], settings.get('target', 0.0)))
        if settings
        else None
    )
    for _ in range(50):
        task = F.cross_entropy(net(x), y)
        loss = la(task) if la else task
        opt.zero_grad(); loss.backward(); opt.step()
        curve.append([task.item(), la.lam.item() if la else 0., la.action.item() if la else 0.])
    found = node(TRAIN, given)
    torch.testing.assert_close(torch.tensor(found['weights'], dtype=torch.float64),
                               parameters_to_vector(net.parameters()).detach(), rtol=1e-5, atol=1e-5)
    columns = slice(None) if la else slice(1)
    numbers = torch.tensor([[float(v) for v in row[columns]] for row in found['curve']], dtype=torch.float64)
    torch.testing.assert_close(numbers, torch.tensor([row[columns] for row in curve], dtype=torch.float64), rtol=1e-5,
                               atol=1e-5)


@needs_node
@pytest.mark.parametrize('K, n', [(1, 2), (4, 40), (9, 64)])
def test_measures_are_the_packages(K, n):
    net, x, y = example(K, 16, n, seed=n)
    with torch.no_grad():
        for p in net.parameters(): p *= 2   # so that ways cross
        traj = net.trajectory(x)
    found = node(
        '''const x = Float64Array.from(given.x), K = given.blocks
                    return {energies: flow.energies(x, K), straightness: flow.straightness(x, K), split: flow.split(x, K)}''',
        dict(x=traj.x.flatten().tolist(), blocks=K))
    close = lambda a, b: torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), **SAME
    )
    close(found['energies'], block_energies(traj).mean(1))
    close(found['straightness'], traj.straightness().mean())
    expected = action_split(traj)
    close([found['split'][part] for part in ('transport', 'assignment', 'path')], expected.parts['all'])
    close(found['split']['total'], expected.total())


@needs_node
def test_ways_are_the_packages():
    net, x, y = example(5, 16, 20, seed=0)
    found = node(TRAIN, as_json(net, x, y, 5, 16, steps=0, settings={}))
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found['x'], dtype=torch.float64), net.trajectory(x).x.flatten(), **SAME)


@needs_node
def test_matching_is_the_cheapest():
    "Against SciPy's: random costs, ties, points that coincide, huge and tiny ones."
    rng = np.random.default_rng(0)
    costs = [rng.random((n, n)) * scale for n in (1, 2, 3, 8, 30, 64) for scale in (1., 1e-8, 1e8)]
    costs += [rng.integers(0, 3, (n, n)).astype(float) for n in (5, 20, 50)] + [
        np.zeros((7, 7)),
        np.subtract.outer(np.arange(12.0), np.arange(12.0)) ** 2,
    ]
    found = node('return given.map(c => flow.matching(Float64Array.from(c.flat()), c.length))',
                 [c.tolist() for c in costs])
    for cost, partner in zip(costs, found):
        assert sorted(partner) == list(range(len(cost)))
        assert cost[range(len(cost)), partner].sum() == pytest.approx(
            cost[linear_sum_assignment(cost)].sum(), rel=1e-9, abs=1e-12
        )
    assert node('return flow.matching(new Float64Array(0), 0)') == []


@needs_node
def test_same_seed_same_numbers():
    code = '''const pair = new flow.Pair(given); for (let i = 0; i < 20; i++) pair.step()
              return pair.measure(true).sides.map(side => [side.net.weights, side.points, side.split])'''
    first, again, other = (node(code, dict(seed=seed)) for seed in (3, 3, 4))
    assert first == again and first != other


@needs_node
@pytest.mark.parametrize('data', ['circles', 'moons', 'spirals'])
def test_starts_alike_and_least_action_moves_less(data):
    """Both begin with the same weights; the plain one rests at the target. The same on seven seeds, by a factor of two
    at least."""
    code = '''return given.seeds.map(seed => {
      const pair = new flow.Pair({data: given.data, seed}), [plain, least] = pair.sides
      const same = plain.net !== least.net && plain.net.weights.every((w, i) => w === least.net.weights[i])
      while (pair.steps < 1000) pair.step()
      const weights = plain.net.weights.slice(), loss = plain.training.loss
      pair.step()
      const [a, b] = pair.measure().sides.map(side => side.energy.reduce((sum, e) => sum + e, 0))
      return {same, rests: loss <= .05 && weights.every((w, i) => w === plain.net.weights[i]), ratio: a / b, losses: pair.sides.map(side => side.training.loss)}
    })'''
    for found in node(code, dict(data=data, seeds=list(range(7)))):
        assert found['same'] and found['rests'] and max(found['losses']) <= .05 and found['ratio'] > 2, found


@needs_node
def test_initial_weights_are_pytorchs():
    "Uniform within one over the root of the number of inputs, times the gain in the blocks."
    weights = np.array(node('return flow.Network.random(3, flow.generator(0), .5, 4).weights'))
    sizes, bounds = [8, 4, 8, 2] * 3 + [4, 2], [.5 / 2 ** .5] * 2 + [.25] * 2
    assert len(weights) == sum(sizes) == len(parameters_to_vector(dense_net(2, 2, K=3, hidden=4).parameters()))
    limits = np.repeat(bounds * 3 + [2 ** -.5] * 2, sizes)
    assert (
        (abs(weights) <= limits).all()
        and (abs(weights) > limits / 2).mean() > 0.3
        and abs((weights / limits).mean()) < 0.3
    )


@needs_node
@pytest.mark.parametrize('count', [0, 1, 2])
def test_hardly_any_points(count):
    "Of one's own points there may be none, or all of one class, or two at one place."
    found = node(
        '''const own = {points: Float64Array.from(given.points), labels: new Uint8Array(given.points.length / 2)}, pair = new flow.Pair({own})
                    for (let i = 0; i < 5; i++) if (own.labels.length) pair.step()
                    const side = pair.measure(true).sides[1]
                    return [drawing.frame(pair.sides), side.split, side.energy, ...side.net.weights]''',
        dict(points=[.5, .5] * count))
    assert 'NaN' not in json.dumps(found)


@needs_node
def test_still_picture_is_in_step(tmp_path):
    done = subprocess.run([NODE, SITE / 'still.mjs', tmp_path / 'still.svg'], capture_output=True, text=True,
                          timeout=120)
    assert not done.returncode, done.stderr
    drawn, kept = ((path / name).read_text(encoding='utf-8')
                   for path, name in ((tmp_path, 'still.svg'), (ROOT / 'nbs', 'explorable.svg')))
    assert drawn == kept, 'nbs/explorable.svg differs from what is drawn: run `node nbs/_site/still.mjs`'
    assert 'NaN' not in kept and len(kept) < 60_000


# The page

@pytest.fixture(scope='session')
def script():
    from render import explorable
    return explorable()


def test_one_script_without_modules(script):
    "As a page opened from a folder can load it."
    assert len(script.encode()) < 150_000 and not re.search(r'^\s*(import|export)\b', script, re.M)
    assert not re.search(r'https?://|\bfetch\(|XMLHttpRequest|\bimport\(', script)
    if NODE: assert not subprocess.run([NODE, '--check', '-'], input=script, capture_output=True, text=True).stderr


@pytest.fixture
def visit(browser, script, tmp_path):
    """Opens a page with the explorable, at a width, with options of the browser; afterwards there was no error, and no
    request beyond the folder."""
    (tmp_path / 'explorable.js').write_text(script, encoding='utf-8')
    for name in ('style.css', 'site.js'): shutil.copy(SITE / name, tmp_path)
    for picture in (ROOT / 'nbs').glob('explorable.svg'): shutil.copy(picture, tmp_path)
    contexts, faults = [], []

    def visit(width=1280, data='', **options):
        (tmp_path / 'page.html').write_text(
            f'''<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>A page</title>
          <link rel="stylesheet" href="style.css"><script src="explorable.js" defer></script></head>
          <body><main><h1>A page</h1><div class="explorable" {data}><img src="explorable.svg" alt="two networks"><p>words</p></div></main></body></html>''',
            encoding='utf-8')
        contexts.append(browser.new_context(viewport={'width': width, 'height': 900}, **options))
        page = contexts[-1].new_page()
        page.on('pageerror', lambda error: faults.append(str(error)))
        page.on('request', lambda request: request.url.startswith(('file:', 'data:')) or faults.append(request.url))
        page.goto((tmp_path / 'page.html').as_uri())
        return page

    yield visit
    for context in contexts: context.close()
    assert not faults


def steps(page): return page.evaluate('+document.querySelector(".explorable").dataset.steps')
def wait_for_steps(page, n):
    page.wait_for_function('n => +document.querySelector(".explorable").dataset.steps >= n', arg=n)
def energies(page):
    return [float(text) for text in page.locator('.explorable .numbers span:first-child b').all_inner_texts()]


@pytest.mark.browser
def test_trains_by_itself_and_stops(visit):
    page = visit()
    wait_for_steps(page, 20)
    page.get_by_role('button', name='Stop').click()
    page.get_by_role('button', name='Train').wait_for()
    page.evaluate('new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))')
    at = page.evaluate('document.querySelector(".explorable").explorable.pair.steps')
    page.evaluate('new Promise(done => setTimeout(done, 200))')
    assert page.evaluate('document.querySelector(".explorable").explorable.pair.steps') == at
    page.get_by_role('button', name='Reset').click()
    assert steps(page) == 0 and page.evaluate(
        '(({sides: [a, b]}) => a.net.weights.every((w, i) => w === '
        'b.net.weights[i]))(document.querySelector(".explorable").explorable.pair)'
    )


@pytest.mark.browser
@pytest.mark.parametrize('width', [390, 1280])
def test_slider_changes_the_energy(visit, width):
    """By keyboard, with a price that stays as it was set: a dear motion is a small one. Nothing is wider than the
    window."""
    page = visit(width)
    page.get_by_role('slider', name='Speed').press('End')
    page.get_by_label('sets itself').uncheck()
    found = {}
    for key in ('Home', 'End'):
        page.get_by_role('button', name='Reset').click()
        page.get_by_role('slider', name='Price of motion').press(key)
        wait_for_steps(page, 300)
        found[key] = energies(page)
    assert found['Home'][0] == pytest.approx(found['End'][0], rel=.05) and found['End'][1] < found['Home'][1] / 10
    assert page.evaluate('document.scrollingElement.scrollWidth <= innerWidth')


@pytest.mark.browser
def test_the_price_moves_its_own_slider(visit):
    """While it sets itself: also under the hand of somebody who turned it by keyboard, and who is told the price in
    words."""
    page = visit()
    slider = page.get_by_role('slider', name='Price of motion')
    slider.press('End')
    page.wait_for_function('() => +document.activeElement.value < 1.5')
    assert slider.evaluate('s => s === document.activeElement')
    page.get_by_role('button', name='Stop').click()
    page.evaluate('document.querySelector(".explorable").explorable.draw()')
    said, told = float(slider.get_attribute('aria-valuetext')), page.locator('.first output').inner_text()
    assert said == float(told) == pytest.approx(10 ** float(slider.input_value()), rel=.03)


@pytest.mark.browser
def test_each_idea_is_drawn(visit):
    "Four captions, four pictures, in both colours of the page."
    page = visit(data='data-idea="energy" data-blocks="5" data-data="moons"')
    page.get_by_role('button', name='Stop').click()
    seen = {}
    for scheme in ('light', 'dark'):
        page.evaluate('scheme => document.documentElement.dataset.scheme = scheme', scheme)
        assert page.locator('.ideas [aria-pressed=true]').inner_text() == (
            'How much it moves' if scheme == 'light' else 'The price sets itself'
        )
        for name in ('It flows', 'How much it moves', 'How straight', 'The price sets itself'):
            page.get_by_role('button', name=name).click()
            pictures = page.evaluate(
                '[...document.querySelectorAll(".explorable canvas")].map(c => c.toDataURL().length + '
                'c.toDataURL().slice(-200))'
            )
            seen[scheme, name] = page.locator('.caption').inner_text(), tuple(pictures)
    assert len({caption for caption, _ in seen.values()}) == 4 and len({pictures for _, pictures in seen.values()}) == 8
    assert (
        page.get_by_role('slider', name='Blocks').input_value() == '5'
        and page.get_by_role('combobox', name='Data').input_value() == 'moons'
    )


@pytest.mark.browser
def test_own_points_by_mouse_and_by_keyboard(visit):
    page = visit()
    page.get_by_role('combobox', name='Data').select_option('own')
    count = lambda: page.evaluate(
        '(({pair}) => [...pair.sides[0].labels])(document.querySelector(".explorable").explorable)')
    assert count() == [] and page.get_by_role('button', name='Train').count()
    picture = page.locator('.picture').first
    picture.click(position={'x': 60, 'y': 80})
    picture.focus()
    for key in ('ArrowLeft', 'ArrowUp', 'Enter', 'c', 'ArrowRight', ' '): page.keyboard.press(key)
    page.locator('.picture').last.click(position={'x': 150, 'y': 90})
    assert count() == [0, 0, 1, 1]
    page.get_by_role('button', name='Train').click()
    wait_for_steps(page, 10)
    page.get_by_role('button', name='Clear').click()
    assert count() == [] and steps(page) == 0
    page.get_by_role('combobox', name='Data').select_option('spirals')
    wait_for_steps(page, 5)


@pytest.mark.browser
def test_reduced_motion_starts_nothing(visit):
    "Nothing moves by itself; what is asked for is shown in steps, at the last layer."
    page = visit(reduced_motion='reduce')
    page.evaluate('new Promise(done => setTimeout(done, 300))')
    assert steps(page) == 0
    page.get_by_role('button', name='Train').click()
    wait_for_steps(page, 10)
    assert page.get_by_role('slider', name='Layer').input_value() == page.get_by_role(
        'slider', name='Layer'
    ).get_attribute('max')


@pytest.mark.browser
def test_without_script_a_picture_and_words(visit):
    page = visit(java_script_enabled=False)
    assert page.locator('.explorable img').is_visible() and page.locator('.explorable p').inner_text() == 'words'


@pytest.mark.browser
def test_frame_and_step_are_cheap(visit):
    """In the browser's own measure: a step of both networks costs less than eight million products and sums, which an
    ordinary laptop does in eight milliseconds; a whole frame of pictures, of the dearest kind, less than sixteen."""
    page = visit()
    page.evaluate('document.querySelector(".explorable").explorable.stop()')
    step, frame = page.evaluate('''() => {
      const e = document.querySelector('.explorable').explorable, numbers = new Float64Array(1000).fill(1.0001)
      e.pick('straight')
      const least = work => Math.min(...Array.from({length: 15}, () => { const begun = performance.now(); for (let i = 0; i < 8; i++) work(); return (performance.now() - begun) / 8 }))
      let sum = 0
      const million = least(() => { for (let r = 0; r < 1000; r++) for (let i = 0; i < 1000; i++) sum = sum * .999 + numbers[i] * numbers[i] })
      return [least(() => e.train()) / million, least(() => { e.measure(); e.draw() }) / million, sum]
    }''')[:2]
    assert step < 8 and step + frame < 16, f'a step {step:.1f}, a frame {frame:.1f} million products'


@pytest.mark.browser
@pytest.mark.parametrize('width', [390, 1280])
def test_no_barriers(visit, width):
    axe = SITE / 'node_modules' / 'axe-core' / 'axe.min.js'
    if not axe.exists(): pytest.skip('axe-core is missing: run `make test`, which installs it with npm')
    page = visit(width)
    page.get_by_role('button', name='Stop').click()
    page.get_by_role('combobox', name='Data').select_option('own')
    page.add_script_tag(path=axe)
    for scheme in ('light', 'dark'):
        page.evaluate('scheme => document.documentElement.dataset.scheme = scheme', scheme)
        found = page.evaluate(
            'axe.run({runOnly: {type: "tag", values: ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa"]}}).then(r => '
            'r.violations.map(v => v.id + ": " + v.nodes.map(n => n.html).join()))'
        )
        assert not found, f'{scheme}: {found}'
