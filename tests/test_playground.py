"The playground: its logic without a browser, and the app in a real one."
import html
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing, contextmanager

import pytest
import torch
from traitlets import TraitError

from conftest import ROOT
from lap_nb.lab.widgets import LIMITS, PICTURES, Explorer, Setting, Trial, playground
from test_site import AUDIT, AXE, LEVELS, sliders_say_what_they_show

# the app, and how it is served
VOILA = re.search(r'-m voila (\S+) (.+)', (ROOT / 'Makefile').read_text(encoding='utf-8')).groups()
PATIENCE = 300   # seconds until what never comes is called missing


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def panel():
    panel = Explorer()
    yield panel
    panel.close()


# Logic

@pytest.mark.parametrize('wrong, says', [
    (dict(data='squares'), "'circles', 'moons', 'digits'"), (dict(blocks=0), 'whole number'), (dict(blocks=2.5), 'whole number'),
    (dict(steps=0), 'whole number'), (dict(gain=-1.), 'zero or more'), (dict(gain=float('nan')), 'zero or more'),
    (dict(lambda0=0.), 'positive'), (dict(tau=-.1), 'zero or more'), (dict(target=-1.), 'zero or more'),
    (dict(gain='much'), 'zero or more'), (dict(tau=None), 'zero or more'), (dict(lambda0=[1.]), 'positive'), (dict(lambda0=float('inf')), 'positive')])
def test_bad_settings(wrong, says):
    with pytest.raises(ValueError, match=says): Setting(**wrong)


@pytest.mark.parametrize('beyond, says', [
    (dict(gain=0.), 'gain is 0, its slider starts at 0.01'), (dict(gain=3.17), 'gain is 3.17, its slider ends at 3.16228'),
    (dict(blocks=30), 'blocks is 30, its slider ends at 20'), (dict(lambda0=1000.), 'lambda0 is 1000, its slider ends at 100'),
    (dict(tau=20.), 'tau is 20, its slider ends at 10'), (dict(target=1.), 'target is 1, its slider ends at 0.5')])
def test_what_lies_beyond_a_slider_is_refused(beyond, says):
    with pytest.raises(ValueError, match=says): Explorer(Setting(**beyond))


@pytest.mark.parametrize('ends', [dict(gain=.01, lambda0=.01, tau=0, target=0, blocks=1), dict(gain=10 ** .5, lambda0=100., tau=10, target=.5, blocks=20)])
def test_the_ends_of_the_sliders_can_be_set(ends):
    panel = Explorer(Setting(**ends))
    assert panel.setting == Setting(**ends)
    panel.close()


def test_same_setting_same_network():
    first, second = (Trial(Setting(steps=30)) for _ in range(2))
    assert first.train() and second.train()
    for a, b in zip(first.model.parameters(), second.model.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_plain_training_has_no_multiplier():
    trial = Trial(Setting(least_action=False, steps=9))
    trial.train()
    assert 'lambda' not in trial.curves and len(trial.curves['loss']) == 3


@pytest.mark.parametrize('data', ['moons', 'digits'])
def test_every_picture_of_every_data_set(data):
    trial = Trial(Setting(data, blocks=2, steps=300))
    untrained = {name: trial.picture(name) for name in PICTURES}
    trial.train()
    assert not [name for name in PICTURES if trial.picture(name) == untrained[name]]


def test_moving_a_slider_shows_the_untrained_network_of_the_new_setting(panel):
    before = panel.places['paths'].value
    panel.controls['gain'].value = .1
    assert panel.trial.setting.gain == pytest.approx(.1) and not panel.trial.curves
    assert panel.places['paths'].value != before and 'untrained' in panel.status.value


def filled(panel):
    "Wait until every picture is there."
    end = time.monotonic() + PATIENCE
    while not all(place.value for place in panel.places.values()):
        assert time.monotonic() < end, 'not all pictures were drawn'
        time.sleep(.02)
    return {name: place.value for name, place in panel.places.items()}


def test_a_new_panel_has_all_its_pictures(panel):
    "A page that is still loading while they come could miss some."
    assert all(place.value for place in panel.places.values())


def test_the_other_views_follow_a_slider_that_rests(panel):
    panel.controls['gain'].value = .1
    panel.controls['lambda0'].value = 10.
    shown, expected = filled(panel), Trial(panel.setting)
    assert shown == {name: expected.picture(name) for name in PICTURES}, 'the views are not all of the newest setting'


def test_the_layer_moves_the_points_and_marks_the_block_before(panel):
    before = filled(panel)
    panel.layer.value = 4
    changed = {name for name, place in panel.places.items() if place.value != before[name]}
    assert changed == {'paths', 'energies'}
    assert panel.places['energies'].value == panel.trial.picture('energies', 4) != panel.trial.picture('energies', 5)


def test_fewer_blocks_bring_the_layer_slider_along(panel):
    panel.controls['blocks'].value = 3
    assert panel.layer.max == panel.layer.value == 3


def test_stop_is_heard_and_keeps_what_was_reached(panel):
    panel.base = Setting(steps=30_000)
    panel.reset()
    panel.train()
    end = time.monotonic() + PATIENCE
    while not panel.trial.curves:
        assert panel.worker.is_alive() and time.monotonic() < end, panel.status.value
        time.sleep(.01)
    panel.train()   # a second press changes nothing
    panel.stop.set()
    under_way = len(panel.trial.curves['epoch']) + 1
    panel.worker.join(PATIENCE)
    assert len(panel.trial.curves['epoch']) <= under_way, 'the epoch that was under way was not the last one'
    assert not panel.start.disabled and panel.halt.disabled
    assert 'stopped after epoch' in panel.status.value and 0 < len(panel.trial.curves['epoch']) < panel.trial.epochs


def test_stop_before_the_first_epoch_and_a_change_while_training(panel):
    panel.base = Setting(steps=30_000)
    panel.reset()
    panel.train()
    panel.controls['gain'].value = .3   # stops the training, and starts from a new network
    assert not panel.worker.is_alive() and not panel.trial.curves and panel.trial.setting.gain == pytest.approx(.3)


def test_an_error_in_training_is_shown_and_the_panel_lives_on(panel, monkeypatch):
    def fail(self, *args): raise FloatingPointError('the loss is <nan>')
    monkeypatch.setattr(Trial, 'train', fail)
    panel.train()
    panel.worker.join(30)
    assert 'the loss is &lt;nan&gt;' in panel.status.value and not panel.start.disabled


def test_a_slider_waits_for_few_pictures_of_few_parts(panel, monkeypatch):
    """What a turn costs, counted: the layer two pictures, a setting one, of a line and a set of points for each class;
    all else is drawn beside."""
    from matplotlib.axes import Axes
    drawn, parts, me = [], [], threading.get_ident()
    inner, plot = Trial.picture, Axes.plot
    def picture(self, name, *args):
        if threading.get_ident() == me: drawn.append(name)
        return inner(self, name, *args)
    def lines(self, *args, **kwargs):
        if threading.get_ident() == me: parts.append(self)
        return plot(self, *args, **kwargs)
    filled(panel)
    monkeypatch.setattr(Trial, 'picture', picture)
    monkeypatch.setattr(Axes, 'plot', lines)
    panel.layer.value = 4
    assert drawn == ['paths', 'energies'] and len(parts) == panel.trial.split.classes
    drawn.clear()
    panel.controls['gain'].value = .1
    assert drawn == ['paths']


def test_a_training_takes_no_more_passes_than_its_steps():
    "300 steps are 300 passes in training, and the two after each epoch that its curve shows."
    trial, passes = Trial(Setting(steps=300)), {True: 0, False: 0}
    def count(model, *_): passes[model.training] += 1
    trial.model.register_forward_hook(count)
    trial.train()
    assert passes[True] == 300 and passes[False] <= 2 * trial.epochs


# What a browser may send: any state of any widget

@pytest.fixture(scope='module')
def trained():
    panel = Explorer()
    panel.train()
    panel.worker.join()
    yield panel
    panel.close()


@pytest.fixture(autouse=True)
def as_trained(request):
    """Where ipywidgets itself takes a value to an end, a new network is right; the next test finds the trained one
    again."""
    if 'trained' not in request.fixturenames: return (yield)
    panel = request.getfixturevalue('trained')
    trial = panel.trial
    yield
    panel.trial = trial
    panel.put(trial.setting)


def beyond(low, high):
    "States of a slider outside its limits, with its ends moved out of the way where ipywidgets would hold it."
    for value in (low - 1, -high, high + 1, 20_000, 1e9, float('inf'), float('nan')):
        for ends in (dict(min=-1e12, max=1e12), dict(min=value - 1, max=value + 1), dict(base=1e9, min=-9., max=2.)):
            yield ends | dict(value=value)


@pytest.mark.parametrize('name', LIMITS)
def test_the_ends_of_a_slider_hold_in_python(trained, name):
    "Whatever is sent, no network outside the limits is made, a refusal says which limit, and what was trained stays."
    control, refused = trained.controls[name], 0
    for state in beyond(*LIMITS[name]):
        trained.status.value, setting, trial = '', trained.setting, trained.trial
        try: control.set_state({key: value for key, value in state.items() if control.has_trait(key)})
        except Exception: pass   # ipywidgets or traitlets refuse it themselves: no number, or no whole one
        low, high = LIMITS[name]
        assert low <= getattr(trained.trial.setting, name) <= high * (1 + 1e-9), state
        if not trained.status.value.startswith('<b>refused:'): continue
        refused += 1
        assert name in trained.status.value and trained.trial is trial and trained.setting == setting, state
        assert {end: getattr(control, end) for end in trained.ends[name]} == trained.ends[name]
    assert refused > 5


@pytest.mark.parametrize('name, state', [
    ('data', dict(index=7)), ('data', dict(_options_labels=['a'] * 9, index=7)), ('data', dict(index='1')), ('blocks', dict(value='many')),
    ('gain', dict(value=None)), ('least_action', dict(value='yes')), ('tau', dict(value=[1]))])
def test_what_is_no_value_of_a_widget_changes_nothing(trained, name, state):
    before, trial = trained.setting, trained.trial
    with pytest.raises((TraitError, TypeError, ValueError, IndexError)): trained.controls[name].set_state(state)
    assert trained.setting == before and trained.trial is trial


@pytest.mark.parametrize('at, shown', [(-3, 0), (40, 9), (10 ** 9, 9)])
def test_a_layer_that_is_not_there_is_the_nearest_one(trained, at, shown):
    trained.layer.set_state(dict(min=-10, max=10 ** 10, value=at))
    assert trained.place == shown and trained.places['paths'].value == trained.trial.picture('paths', shown)


def test_a_button_that_the_page_says_is_free_starts_no_second_training(panel):
    panel.base = Setting(steps=30_000)
    panel.reset()
    panel.train()
    worker = panel.worker
    panel.start.set_state(dict(disabled=False))
    panel.train()
    assert panel.worker is worker and worker.is_alive()


def test_two_panels_side_by_side():
    box = playground()
    assert len(box.children) == 2
    with pytest.raises(ValueError, match='picture'): Trial(Setting()).picture('weather')


# The server

class Server:
    "voila, its address with the token, and what it has said."
    def __init__(self, process):
        self.process, self.said, self.news = process, [], threading.Condition()
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        self.address = self.wait('http://').strip()

    def read(self):
        for line in self.process.stdout:
            with self.news: self.said.append(line); self.news.notify_all()
        with self.news: self.process = None; self.news.notify_all()

    def wait(self, words, count=1):
        "The line that holds `words` for the `count`-th time."
        found = lambda: [line for line in self.said if words in line]
        with self.news: came = self.news.wait_for(lambda: len(found()) >= count or self.process is None, PATIENCE)
        assert came and len(found()) >= count, f'{words!r} was not said\n{"".join(self.said)}'
        return found()[count - 1]


@contextmanager
def served(notebook, *options):
    "The `Server` of a notebook, with the options of the Makefile and these."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    command = [
        sys.executable, '-m', 'voila',
        str(notebook), *VOILA[1].split(), '--no-browser', f'--port={port}', *options]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as voila:
        server = None
        try: yield (server := Server(voila))
        finally:
            voila.terminate()
            if server: server.reader.join(PATIENCE)


def fetch(address):
    "Status and text of a page."
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor())
    try:
        with opener.open(address, timeout=PATIENCE) as reply: return reply.status, reply.geturl(), reply.read().decode()
    except urllib.error.HTTPError as e: return e.code, address, e.read().decode()


@pytest.fixture
def small(tmp_path):
    "A notebook whose kernel is there soon."
    import nbformat
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell('6 * 7')],
        metadata=dict(kernelspec=dict(name='python3', display_name='', language='python')))
    nbformat.write(notebook, tmp_path / 'small.ipynb')
    return tmp_path / 'small.ipynb'


def test_a_page_too_many_is_refused_and_an_abandoned_one_gives_its_place_back(small):
    with served(small, '--FewKernels.most=1', '--MappingKernelManager.cull_idle_timeout=5',
                '--MappingKernelManager.cull_interval=1') as server:
        answers = []
        first = threading.Thread(target=lambda: answers.append(fetch(server.address)))
        first.start()
        server.wait('Kernel started')
        status, _, page = fetch(server.address)
        assert status == 503 and '1 pages of the playground are open' in page and 'close one, or wait 1 minutes' in page
        first.join(PATIENCE)
        assert answers[0][0] == 200 and '42' in answers[0][2]
        # nobody looks at the first page, which a browser would have connected to its kernel
        server.wait('Kernel shutdown')
        end = time.monotonic() + PATIENCE   # it is said before it is done
        while fetch(server.address)[0] != 200: assert time.monotonic() < end, server.said
        server.wait('Kernel started', 2)


def test_the_app_is_for_this_machine_and_its_user(small):
    "Without the token no kernel starts; another address of this machine is not listened at."
    with served(small) as server:
        address, _, token = server.address.partition('?token=')
        assert address.startswith('http://127.0.0.1:') and len(token) >= 32
        for wrong in (address, f'{address}?token=guessed'):
            status, where, page = fetch(wrong)
            assert status in (401, 403) or '/login' in where
        assert not [line for line in server.said if 'Kernel started' in line]
        with closing(socket.socket()) as other, pytest.raises(OSError):
            other.settimeout(PATIENCE)
            other.connect(('127.0.0.2', int(address.rsplit(':')[-1].strip('/'))))


def test_the_chapter_states_what_the_server_is_set_to():
    from traitlets.config import PyFileConfigLoader
    config = PyFileConfigLoader('voila.py', str(ROOT / 'nbs' / '_app')).load_config()
    chapter = (ROOT / 'nbs' / '10_playground.ipynb').read_text(encoding='utf-8')
    assert config.MappingKernelManager.cull_idle_timeout == 600 and 'ends after ten minutes' in chapter
    assert config.VoilaConfiguration.multi_kernel_manager_class.most.default_value == 4 and 'four at most' in chapter
    assert config.Voila.ip == '127.0.0.1' and '127.0.0.1 only' in chapter


# In a browser

@pytest.fixture(scope='module')
def app():
    "The address of the app."
    with served(ROOT / VOILA[0]) as server: yield server.address


PANEL = 'document.querySelector(".explorer")'   # the left one


@pytest.fixture
def app_page(browser, app):
    "The app with all pictures of both panels; afterwards fails if there was an error."
    page, faults = browser.new_page(viewport={'width': 1500, 'height': 1100}), []
    page.on('console', lambda m: m.type == 'error' and faults.append(m.text))
    page.on('requestfailed', lambda r: faults.append(f'failed: {r.url}'))
    page.on('pageerror', lambda e: faults.append(str(e)))
    # voila asks a content network for its icon font: an empty answer stands in for it, here there is no network
    page.route(re.compile(r'^https://cdn\.jsdelivr\.net/'),
               lambda route: route.fulfill(body='', content_type='text/css'))
    page.set_default_timeout(1000 * PATIENCE)
    page.goto(app)
    page.wait_for_function('n => document.querySelectorAll(".explorer img").length == n', arg=2 * len(PICTURES))
    yield page
    page.close()
    assert not faults, faults


def shown(panel):
    return {alt: panel.locator(f'img[alt="{html.escape(alt)}"]').get_attribute('src') for _, alt in PICTURES.values()}


def picture(alt, unlike):
    "A JavaScript expression: the left panel shows a picture with this text, another than `unlike`."
    return f'(i => i && i.src != {json.dumps(unlike)})({PANEL}.querySelector(`img[alt^="{alt}"]`))'


@pytest.mark.browser
def test_app(app_page):
    page, (left, right) = app_page, app_page.locator('.explorer').all()
    status = lambda text: left.get_by_text(text).wait_for()
    alts = [alt for _, alt in PICTURES.values()]
    status('untrained')
    gain, layer = (left.get_by_role('slider', name=name) for name in ('initial gain', 'layer'))

    # a slider, by keyboard: the paths answer, the other pictures follow (how much is drawn for an answer is counted
    # above)
    untrained, beside = shown(left), shown(right)
    gain.focus()
    page.keyboard.press('ArrowLeft')
    page.wait_for_function(picture('sample points', untrained[alts[0]]))
    page.wait_for_function(f'{PANEL}.querySelectorAll("img").length == {len(alts)}')
    assert not [alt for alt, src in shown(left).items() if src == untrained[alt] and not alt.startswith('curves over')]

    # training changes every picture of this panel and none of the other
    before = shown(left)
    left.get_by_role('button', name='Train').click()
    status(re.compile('^trained; test accuracy'))
    for alt, src in before.items(): page.wait_for_function(picture(alt, src))
    assert shown(right) == beside

    # the layer moves the points
    layer.focus()
    before = shown(left)[alts[0]]
    page.keyboard.press('ArrowLeft')
    page.wait_for_function(picture('sample points', before))

    # Stop is answered, and what was reached stays
    left.get_by_role('slider', name='blocks').press('End')   # a long training
    status('untrained')
    for _ in range(4):   # where the machine is so busy that the training ends before the click, once more
        left.get_by_role('button', name='Train').click()
        status(re.compile('^epoch [0-9]+ of'))
        page.evaluate(
            "[...document.querySelectorAll('.explorer button')].find(button => button.innerText == 'Stop').click()")
        status(re.compile('^(stopped after epoch|trained)'))
        if 'stopped after epoch' in left.inner_text(): break
    accuracy = re.search(r'stopped after epoch (\d+); test accuracy ([\d.]+) %', left.inner_text())
    assert 0 < int(accuracy[1]) < 100 and float(accuracy[2]) > 0


@pytest.mark.browser
def test_app_stands_side_by_side_and_is_accessible(app_page):
    """On a desktop two panels are beside each other, on a phone below each other; axe-core finds nothing of level A or
    AA."""
    boxes = lambda: [panel.bounding_box() for panel in app_page.locator('.explorer').all()]
    one, two = boxes()
    assert one['y'] == two['y'] and one['x'] + one['width'] <= two['x'] and two['x'] + two['width'] <= 1500
    assert app_page.locator('h1').inner_text().startswith('The playground')
    assert sliders_say_what_they_show(app_page) == 2 * 6
    told = app_page.locator('.explorer').get_by_role('status').evaluate_all(
        'lines => lines.map(line => [line.ariaLive, line.innerText])')
    assert [(live, text.split(';')[0]) for live, text in told] == [('polite', 'untrained')] * 2
    app_page.set_viewport_size({'width': 390, 'height': 844})
    one, two = boxes()
    assert one['y'] + one['height'] <= two['y'] and max(one['width'], two['width']) <= 390
    if not AXE.exists(): pytest.skip("axe-core is missing: run `make test`, which installs it with npm (needs Node.js)")
    app_page.add_script_tag(path=AXE)
    assert not (found := app_page.evaluate(AUDIT, LEVELS)), '\n'.join(found)
