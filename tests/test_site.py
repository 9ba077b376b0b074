"The site and the scripts that make it: every page in a real browser, at two widths, from a server and from a folder."
import csv
import functools
import html
import http.server
import importlib
import inspect
import json
import re
import subprocess
import sys
import threading
import urllib.parse
from contextlib import closing, contextmanager
from dataclasses import is_dataclass

import pytest

from conftest import ROOT, copy_checkout, run

NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))
PAGES = [re.sub(r'^\d+[a-z]?_', '', notebook.stem) + '.html' for notebook in NOTEBOOKS]
ASSETS = ROOT / 'nbs' / '_site' / 'node_modules'
PHONE, WIDE = {'width': 390, 'height': 844}, {'width': 1440, 'height': 900}


def script(copy, name, *args):
    "Run a script of nbs/_site in a checkout."
    return run(sys.executable, f'nbs/_site/{name}', *args, cwd=copy)


# The pages

@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "The folder of the site, built from a copy of the checkout."
    if not (ASSETS / 'mathjax').exists():
        pytest.skip("the site's scripts are missing: run `make test`, which installs them with npm (needs Node.js)")
    folder = tmp_path_factory.mktemp('site')
    copy = copy_checkout(folder / 'checkout')
    (copy / 'nbs' / '_site' / 'node_modules').symlink_to(ASSETS)
    done = script(copy, 'render.py', folder / 'pages', '--pandoc')
    if done.returncode: pytest.fail(f'the site does not build\n{done.stdout}\n{done.stderr}', pytrace=False)
    return folder / 'pages'


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope='session')
def address(site):
    "Where the site is served, with a slash at the end."
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(QuietHandler, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}/'
        server.shutdown()


@contextmanager
def visit(browser, url, **options):
    "A settled page; afterwards fails if there was a script error, a failed request, or one beyond the site."
    home, faults = url.rpartition('/')[0] + '/', []
    context = browser.new_context(**{'viewport': WIDE} | options)
    context.set_default_timeout(60_000)
    page = context.new_page()
    page.on('console', lambda message: message.type == 'error' and faults.append(f'console: {message.text}'))
    page.on('pageerror', lambda error: faults.append(f'error: {error}'))
    page.on('requestfailed', lambda request: faults.append(f'failed: {request.url}'))
    page.on('response', lambda response: response.status >= 400 and faults.append(f'{response.status}: {response.url}'))
    page.on(
        'request',
        lambda request: request.url.startswith((home, 'data:', 'blob:')) or faults.append(f'external: {request.url}'),
    )
    page.goto(url)
    page.evaluate('document.fonts.ready')
    if page.query_selector('.cell-widget'): page.wait_for_selector('.cell-widget .jupyter-widgets')
    yield page
    context.close()
    assert not faults, f'{url}\n  ' + '\n  '.join(map(str, faults))


@pytest.fixture(scope='session')
def contents(site):
    "By page: its ids, its addresses, its running text, all its text, and the addresses of its names set in code."
    def words(html): return re.sub(r'<[^>]+>', '', html).lower()

    def read(html):
        main = re.sub(r'<(script|nav)\b.*?</\1>', '', html[html.index('<main'):html.index('</main>')], flags=re.S)
        prose = [p for p in re.findall(r'<p>(.*?)</p>', main, re.S) if 'class="math' not in p]
        return {'ids': re.findall(r' id="([^"]*)"', html), 'links': re.findall(r' (?:href|src)="([^"]*)"', html),
                'prose': words(' '.join(prose)), 'text': words(main),
                'names': re.findall(r'<p>[^<]*<a\s+href="([^"]*)"[^>]*><code>(.*?)</code></a>', main)}

    return {name: read((site / name).read_text(encoding='utf-8')) for name in PAGES}


def has_maths(notebook):
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    prose = [part for c in cells if c['cell_type'] == 'markdown' for part in ''.join(c['source']).split('`')[::2]]
    return any(re.search(r'\$\S[^$]*\$', part) for part in prose)


AXE = ASSETS / 'axe-core' / 'axe.min.js'
AUDIT = """async rules => {
  const found = await axe.run(document, {runOnly: rules, iframes: false, resultTypes: ['violations']});
  return found.violations.map(v => `${v.id}: ${v.help}: ` + v.nodes.slice(0, 3).map(n => n.target + ' ' + n.html.slice(0, 120)).join(' | '));
}"""
LEVELS = {'type': 'tag', 'values': ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa']}


def barriers(page):
    "What axe-core finds against level A or AA on a page, and in its other colours."
    page.add_script_tag(path=AXE)
    found = page.evaluate(AUDIT, LEVELS)
    page.locator('#theme').click()
    return found + [f'other colours: {f}' for f in page.evaluate(AUDIT, {'type': 'rule', 'values': ['color-contrast']})]


@pytest.mark.browser
@pytest.mark.parametrize('name', PAGES)
def test_page(browser, address, name):
    with visit(browser, address + name) as page:
        page.evaluate('document.querySelectorAll("details").forEach(d => d.open = true)')
        for viewport in (PHONE, WIDE):
            page.set_viewport_size(viewport)
            wide = page.evaluate('document.scrollingElement.scrollWidth - innerWidth')
            assert wide <= 0, f'at {viewport["width"]} pixels the page is {wide} pixels wider than the window'
            broken = page.evaluate(
                '[...document.querySelectorAll("main table:not(.parameters) code")].filter(c => '
                '/^[\\w.]+$/.test(c.innerText) && c.getClientRects().length > 1).map(c => c.innerText)'
            )
            assert not broken, f'at {viewport["width"]} pixels names in tables are broken in two: {broken}'
        cut = page.evaluate(
            '[...document.querySelectorAll("main pre")].filter(p => p.scrollWidth > p.clientWidth).map(p => '
            'p.innerText.slice(0, 80))'
        )
        assert not cut, f'code or output that is cut off on a wide window: {cut}'
        images = page.evaluate(
            '[...document.images].map(i => [i.alt, i.complete && i.naturalWidth > 0, i.src.slice(0, 80)])')
        assert not [i for i in images if not i[0]], 'pictures without alternative text'
        assert not [i for i in images if not i[1]], 'pictures that do not load'
        assert not re.search(
            r'.*\]\(http.*',
            page.locator('main').inner_text()), 'a link inside a link, or one in code, is shown as Markdown'
        assert page.locator('h1').count() == 1 and page.locator('header, main, footer, nav').count() >= 5
        assert re.search(r'Built with nbdev and pandoc \d', page.locator('footer').inner_text())
        formulas, typeset, wrong = page.evaluate(
            '["span.math", "span.math > mjx-container", "merror, mjx-merror, [data-mjx-error], mjx-container '
            '[fill=red]"].map(s => document.querySelectorAll(s).length)'
        )
        assert (formulas, wrong) == (typeset, 0)
        assert typeset or not has_maths(NOTEBOOKS[PAGES.index(name)])
        assert not (found := barriers(page)), '\n'.join(found)


@pytest.mark.browser
def test_first_page_is_light(browser, address, site):
    "What the landing page loads, fonts and all, is under 320 kB: it has no formulas, hence no maths engine."
    loaded = set()
    with closing(browser.new_page()) as page:
        page.on('response', lambda response: loaded.add(response.url))
        page.goto(address + 'index.html', wait_until='load')
        page.evaluate('document.fonts.ready')
    sizes = {
        name: (site / name).stat().st_size for url in loaded
        if (name := url.removeprefix(address)) and url.startswith(address)}
    assert {'index.html', 'explorable.js'} <= set(sizes) and sum(sizes.values()) < 320_000, (
        f'{sum(sizes.values()):,} bytes: {sizes}'
    )


def test_pages_are_below_a_megabyte(site):
    "Without figures; and formulas need no script."
    assert not [page for page in PAGES if (site / page).stat().st_size > 1_000_000]
    assert not list(site.rglob('tex-*.js')) and not [
        page for page in PAGES
        if r'\(' in re.sub(r'<(script|pre|code)\b.*?</\1>', '', (site / page).read_text(encoding='utf-8'), flags=re.S)]


def test_internal_links(contents, site):
    def leads_somewhere(name, link):
        target = urllib.parse.urlsplit(link)
        if target.scheme: return True
        file, anchor = target.path or name, urllib.parse.unquote(target.fragment)
        return (site / file).is_file() and (not anchor or anchor in contents[file]['ids'])

    broken = [
        f'{name}: {link}' for name, page in contents.items() for link in page['links']
        if not leads_somewhere(name, link)]
    assert not broken
    assert all(len(set(page['ids'])) == len(page['ids']) for page in contents.values()), 'an id stands twice on a page'


def linkcheck(url, depth=-1):
    """LinkChecker's rows for all that can be reached from a page within its site: address, where it stands, and whether
    it is there."""
    done = subprocess.run([
        sys.executable, '-m', 'linkcheck', '--no-status', '--verbose', '--threads=2', f'--recursion-level={depth}',
        '--output=csv', url], capture_output=True, text=True, timeout=300)
    return [(row['urlname'], row['parentname'], row['valid'] == 'True')
            for row in csv.DictReader((line for line in done.stdout.splitlines()
                                       if line and not line.startswith('#')), delimiter=';')]


def test_links_by_linkchecker(address, site):
    "A tool that knows nothing of this site finds each page from the first one, and no link that leads nowhere."
    pytest.importorskip('linkcheck', reason='LinkChecker is missing: run `make test`, which installs it')
    rows = linkcheck(address + 'index.html')
    assert not [row for row in rows if not row[2]]
    assert not set(PAGES) - {urllib.parse.urldefrag(name)[0].rpartition('/')[2]
                             for name, _, _ in rows}, 'pages that no link leads to'
    (site / 'broken.html').write_text('<a href="index.html">there</a><a href="nowhere.html">not there</a>',
                                      encoding='utf-8')
    assert {name for name, _, valid in linkcheck(address + 'broken.html', 1) if not valid} == {'nowhere.html'}
    (site / 'broken.html').unlink()


def rare_word(contents, name):
    "A word of the running text of the page `name` that stands on no other page."
    others = ' '.join(page['text'] for other, page in contents.items() if other != name)
    # a short page may have none of its own
    return next((word for word in re.findall(r'\b[a-z]{6,}\b', contents[name]['prose']) if word not in others), None)


MARKED = """word => [...document.querySelectorAll("#search-results [role=option] mark")].some(m => m.textContent.toLowerCase() === word)"""


@pytest.mark.browser
def test_search_finds_every_page(browser, address, contents):
    without = []
    with visit(browser, address + 'index.html') as page:
        for name in PAGES:
            word = rare_word(contents, name)
            if word is None: without.append(name); continue
            page.keyboard.press('Escape')
            page.keyboard.press('/')
            page.locator('#search').fill(word)
            page.wait_for_function(MARKED, arg=word)
            found = page.locator('#search-results a').evaluate_all('links => links.map(a => a.getAttribute("href"))')
            assert all(href.partition('#')[0] == name for href in found), word
        page.keyboard.press('Enter')
        page.wait_for_url(address + found[0])
    assert len(without) < len(PAGES) / 4


FOUND = '() => [...document.querySelectorAll("#search-results .where")].map(e => e.innerText)'


@pytest.mark.browser
def test_search_puts_titles_first_and_forgives_a_letter(browser, address):
    """The page of that name; entries by their own names; with a letter too few, too many, other, or two exchanged the
    same as without."""
    with visit(browser, address + 'index.html') as page:
        def search(words):
            page.locator('#search').fill('')
            page.locator('#search').fill(words)
            page.wait_for_selector('#search-results [role=option], #search-results .none')
            return page.evaluate(FOUND)

        for title in ('Optimal transport', 'The kinetic bias', 'Least action', 'Elastic depth'):
            assert search(title)[0] == title
        for words, found in dict(Wasserstein='Optimal transport', λ='Least action', pruning='Elastic depth').items():
            assert search(words)[0] == found
        for name in ('shorten', 'relative_energy', 'kinetic_energy'): assert search(name)[0].endswith(f' › {name}')
        for word, typos in {
                'lipschitz': ('lipshitz', 'lipschittz', 'lipschizt', 'lipschutz'),
                'straightness': ('straigthness',)}.items():
            right = search(word)
            assert right and all(search(typo) == right for typo in typos)
        assert not search('qzxqzx')


@pytest.mark.browser
def test_search_says_when_nothing_is_found(browser, address):
    with visit(browser, address + 'index.html', viewport=PHONE) as page:
        page.locator('#search').fill('qzxqzx')
        page.wait_for_selector('#search-results .none')
        page.keyboard.press('Escape')
        assert page.locator('#search-results').is_hidden()


@pytest.mark.browser
def test_names_in_prose_lead_to_their_definitions(browser, address, contents):
    links = [(name, text, href) for name, page in contents.items() for href, text in page['names']
             if '//' not in href and '#' in href]
    assert links, 'no name in the running text is linked'
    name, text, href = links[0]
    with visit(browser, address + name) as page:
        page.locator(f'main p > a[href="{href}"]:visible').first.click()
        page.wait_for_url(address + urllib.parse.urljoin(name, href))
        assert text.split('.')[-1] in page.locator('details.api[open] h3:target').inner_text()


def test_public_names_are_documented(contents):
    from lap_nb._modidx import d as index
    entries = {name: where[0] for module, names in index['syms'].items() for key, where in names.items()
               if (name := key.removeprefix(f'{module}.')) in importlib.import_module(module).__all__}
    missing = [name for name, where in entries.items() if '.' not in name and not name.startswith('_')
               and where.partition('#')[2] not in contents[where.partition('#')[0]]['ids']]
    assert entries and not missing


def entry_lacks(article, thing, file):
    """What is missing in the entry of a function: the link to its source, or an argument's row with its whole type and
    its meaning."""
    if not re.search(rf'<a href="[^"]*/{re.escape(file)}#L\d+" class="api-source">', article): yield 'source'
    cells = [re.findall(r'<td>(.*?)</td>', row, re.S) for row in re.findall(r'<tr>(.*?)</tr>', article, re.S)]
    texts = [[html.unescape(re.sub(r'<[^>]+>', '', cell)).strip() for cell in row] for row in cells if row]
    rows = {name.strip('`'): (kind, meaning) for name, kind, _, meaning in texts}
    for p in inspect.signature(thing).parameters.values():
        name = {p.VAR_POSITIONAL: '*', p.VAR_KEYWORD: '**'}.get(p.kind, '') + p.name
        kind, meaning = rows.get(name, ('', ''))
        if not meaning: yield name
        if kind.count('[') != str(p.annotation).count('['): yield f'{name}: {kind}'


@pytest.fixture(scope='session')
def entries(site):
    "Page and name of each entry: its address and its text."
    found = [
        (page, *re.search(r'<h3 [^>]*id="([^"]*)">([\w.]+)</h3>', article).groups(), article)
        for page in PAGES
        for article in re.findall(
            r'<details class="api">.*?</details>', (site / page).read_text(encoding='utf-8'), re.S
        )
    ]
    return {(page, name): (f'{page}#{anchor}', article) for page, anchor, name, article in found}


def test_entries_list_arguments_and_source(entries):
    from lap_nb._modidx import d as index
    lacking, seen = {}, 0
    for module, names in index['syms'].items():
        for full, (address, file) in names.items():
            name = full.removeprefix(f'{module}.')
            thing = getattr(importlib.import_module(module), name, None)   # methods are None
            if (
                not (inspect.isfunction(thing) or is_dataclass(thing))
                or name not in importlib.import_module(module).__all__
            ):
                continue
            lacks = list(entry_lacks(entries[address.partition('#')[0], name][1], thing, file))
            seen, lacking = seen + 1, lacking | ({full: lacks} if lacks else {})
    assert seen > 50 and not lacking


def test_every_link_of_a_name_leads_to_its_entry(contents, entries):
    "Also where a heading of the page, or another name, is the same but for capitals."
    wrong = []
    for page, content in contents.items():
        for href, name in content['names']:
            path, _, anchor = href.partition('#')
            where = entries.get((path or page, name.removesuffix('()')))
            if where and f'{path or page}#{anchor}' != where[0]:
                wrong.append(f'{page}: {name} leads to {href}, its entry is {where[0]}')
    assert not wrong
    namesakes = [name for (page, name), (address, _) in entries.items() if not address.endswith('#' + name.lower())]
    assert namesakes, 'nothing is tested here any more'


def sliders_say_what_they_show(page):
    "A screen reader is told the label and the number beside each slider; how many sliders there are."
    found = page.locator('[role=slider]').evaluate_all("""handles => handles.map(handle => [
      ['label', 'readout'].map(part => handle.closest('.widget-slider').querySelector('.widget-' + part).textContent),
      ['aria-label', 'aria-valuetext'].map(name => handle.getAttribute(name))])""")
    assert not [(shown, told) for shown, told in found if shown != told or not all(shown)], found
    return len(found)


def move_slider(page):
    "Alternative texts of the picture before and after three steps to the left."
    picture = page.locator('.cell-widget img:visible')
    before = picture.get_attribute('alt')
    page.locator('.cell-widget [role=slider]').focus()
    for _ in range(3): page.keyboard.press('ArrowLeft')
    page.wait_for_function('before => document.querySelector(".cell-widget img").alt !== before', arg=before)
    return before, picture.get_attribute('alt')


@pytest.mark.browser
@pytest.mark.parametrize('viewport', [PHONE, WIDE], ids=['phone', 'wide'])
def test_slider_changes_the_picture(browser, address, viewport):
    with visit(browser, address + 'dynamics.html', viewport=viewport) as page:
        before, after = move_slider(page)
        assert before != after and sliders_say_what_they_show(page)
        assert page.evaluate('document.scrollingElement.scrollWidth <= innerWidth')


@pytest.mark.browser
def test_playground_is_scrubbed_without_a_kernel(browser, address):
    "Both sliders of the static page choose other pictures and other numbers, by keyboard."
    with visit(browser, address + 'playground.html', viewport=WIDE) as page:
        shown = lambda: page.locator('.cell-widget img:visible').evaluate_all('images => images.map(i => i.src)')
        numbers = page.locator('.cell-widget p:visible').first
        seen = [(numbers.inner_text(), shown())]
        for slider in (0, 1):
            page.locator('.cell-widget [role=slider]').nth(slider).focus()
            page.keyboard.press('ArrowRight')
            page.wait_for_function(
                'old => [...document.querySelectorAll(".cell-widget p")].some(p => p.offsetParent && p.innerText !== old)',
                arg=seen[-1][0])
            seen.append((numbers.inner_text(), shown()))
            assert sliders_say_what_they_show(page) == 2
        assert len({text for text, _ in seen}) == len({str(images) for _, images in seen}) == 3
        assert all(len(images) == 6 for _, images in seen)


@pytest.mark.browser
@pytest.mark.parametrize('preferred', ['light', 'dark'])
def test_color_scheme(browser, address, preferred):
    def background(page): return page.evaluate('getComputedStyle(document.body).backgroundColor')
    def brightness(page): return sum(map(int, re.findall(r'\d+', background(page))[:3]))

    with visit(browser, address + 'index.html', color_scheme=preferred) as page:
        first = brightness(page)
        assert (first > 600) == (preferred == 'light')
        page.locator('#theme').click()
        second = brightness(page)
        assert (second > 600) == (preferred == 'dark')
        page.reload()
        assert brightness(page) == second, 'the choice is not remembered'


@pytest.mark.browser
def test_chapters_on_a_phone_are_behind_a_button(browser, address):
    with visit(browser, address + 'index.html', viewport=PHONE) as page:
        chapter = page.locator('#book').get_by_role('link', name='The dynamical view')
        assert chapter.is_hidden()
        page.get_by_role('button', name='Chapters').click()
        chapter.click()
        page.wait_for_url(address + 'dynamics.html')


@pytest.mark.browser
def test_keyboard_reaches_the_text(browser, address):
    with visit(browser, address + 'dynamics.html') as page:
        page.keyboard.press('Tab')
        assert page.locator('.skip').evaluate('e => e === document.activeElement && e.getBoundingClientRect().top >= 0')
        page.keyboard.press('Enter')
        page.keyboard.press('Tab')
        assert page.evaluate('document.activeElement.closest("main") !== null')
        assert page.evaluate('getComputedStyle(document.activeElement).outlineStyle') == 'solid'


FOCUSED = """() => { const e = document.activeElement, box = e.getBoundingClientRect(), style = getComputedStyle(e)
  if (e === document.body || e === document.documentElement) return null
  const look = () => [style.outlineStyle === 'none' ? '' : style.outlineWidth, style.boxShadow, style.borderColor, style.backgroundColor].join()
  const focused = look(), rest = e.blur() ?? look()
  e.focus()
  return {
    what: (e.getAttribute('aria-label') || e.innerText || e.id || e.tagName).trim().slice(0, 40),
    role: e.getAttribute('role') || e.tagName, seen: box.width > 0 && box.height > 0 && box.bottom > 0 && box.top < innerHeight && style.visibility === 'visible',
    marked: focused !== rest } }"""


@pytest.mark.browser
@pytest.mark.parametrize('name, among', [('index.html', {'A', 'BUTTON', 'combobox'}), ('playground.html', {'A', 'slider'}), ('guide.html', {'A', 'SUMMARY'})])
def test_each_stop_of_the_tab_key_is_seen(browser, address, name, among):
    """From the address bar through the whole page and out again: nothing that has the focus is hidden or unmarked,
    nothing is a trap."""
    with visit(browser, address + name) as page:
        page.add_style_tag(content='* { transition: none !important }')
        stops = []
        while len(stops) < 1000:
            page.keyboard.press('Tab')
            if (stop := page.evaluate(FOCUSED)) is None: break
            stops.append(stop)
        assert 20 < len(stops) < 1000, 'the focus does not leave the page'
        assert not [s for s in stops if not (s['seen'] and s['marked'])]
        assert among <= {s['role'] for s in stops}, {s['role'] for s in stops}


@pytest.mark.browser
def test_the_book_is_opened_by_keyboard_on_a_phone(browser, address):
    with visit(browser, address + 'index.html', viewport=PHONE) as page:
        page.get_by_role('button', name='Chapters').focus()
        page.keyboard.press('Enter')
        chapter = page.locator('#book').get_by_role('link', name='The playground')
        chapter.wait_for()
        page.keyboard.press('Escape')
        assert chapter.is_hidden()


@pytest.mark.browser
def test_code_is_copied_and_headings_have_addresses(browser, address):
    with visit(browser, address + 'index.html', permissions=['clipboard-read', 'clipboard-write']) as page:
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        blocks = page.locator('main div.sourceCode:not(.signature)')
        assert blocks.count() > 3 and page.locator('.copy').count() == blocks.count()
        for number in range(blocks.count()):
            blocks.nth(number).hover()
            blocks.nth(number).get_by_role('button', name='Copy the code').click()
            page.wait_for_function('n => document.querySelectorAll("main div.sourceCode .copy")[n].dataset.done',
                                   arg=number)
            assert page.evaluate('navigator.clipboard.readText()').split() == blocks.nth(number).locator(
                'code').inner_text().split()
        headings = page.locator('main :is(h2, h3)[id]:not(summary *)')
        assert headings.count() == page.locator('.permalink').count() > 3
        page.get_by_role('link', name='Link to: Two commands').click()
        page.wait_for_url(address + 'index.html#two-commands')


def test_no_two_chapters_share_a_page(): assert len(set(PAGES)) == len(PAGES)


def test_each_page_has_a_twin_in_markdown(site):
    "Listed in llms.txt; with the page's own words, links that lead somewhere, and nothing that only pandoc reads."
    listed = re.findall(r'^- \[.+\]\((\w+\.md)\)', (site / 'llms.txt').read_text(encoding='utf-8'), re.M)
    assert sorted(listed) == sorted(page.replace('.html', '.md') for page in PAGES)
    for page in PAGES:
        text, whole = ((site / page).with_suffix(kind).read_text(encoding='utf-8') for kind in ('.md', '.html'))
        prose = re.sub(r'^(`{3,}).*?^\1$|`[^`\n]+`', '', text, flags=re.M | re.S)
        assert text.startswith('# ') and f'href="{page.replace(".html", ".md")}"' in whole
        assert not re.search(r'^:::|\{=html\}|^`{3,} ?\{', text, re.M), page
        files = {
            link.partition('#')[0]
            for link in re.findall(r'\]\(([^()\s]+)\)', prose) if not re.match(r'[a-z]+:', link)} - {''}
        assert not [file for file in files if not (site / file).is_file()], page


def test_a_link_to_a_page_shows_what_it_is(site):
    "What messengers read: title, description, and a picture that is there, by whole addresses."
    for page in PAGES:
        card = dict(
            re.findall(r'<meta property="og:(\w+)" content="([^"]+)">', (site / page).read_text(encoding='utf-8')))
        assert {'title', 'description', 'url', 'image'} <= set(card) and card['url'].endswith('/' + page)
        assert (site / card['image'].removeprefix(card['url'].removesuffix(page))).is_file()


@pytest.mark.browser
def test_works_from_a_folder_without_network(browser, site):
    with visit(browser, (site / 'dynamics.html').as_uri(), offline=True) as page:
        assert page.locator('mjx-container').count()
        before, after = move_slider(page)
        assert before != after
        page.locator('#search').fill('kantorovich')
        page.wait_for_selector('#search-results [role=option] a')
        page.keyboard.press('Enter')
        page.wait_for_url(re.compile(r'^file:.*transport\.html'))


# What stops the build

@pytest.fixture(scope='session')
def scripts():
    "The modules of nbs/_site that can be imported."
    import pages
    import render
    return {'pages': pages, 'render': render}


def test_broken_links_are_found(scripts, tmp_path):
    (tmp_path / 'there.png').touch()
    html = '<main><h1 id="top"></h1><a href="#top"><a href="#gone"><a href="b.html"><a href="https://example.org/x"><img src="there.png"></main>'
    pages = {'a.html': scripts['pages'].Page(html, 'A')}
    assert scripts['pages'].broken_links(pages, tmp_path) == ['a.html: #gone', 'a.html: b.html']


def test_sidebar_and_notebooks_must_agree(scripts, tmp_path):
    (tmp_path / 'new.ipynb').touch()
    config = {'website': {'sidebar': {'contents': [{'section': 'Part', 'contents': ['old.ipynb']}]}}}
    with pytest.raises(scripts['render'].SiteError, match=r'old.ipynb is listed(.|\n)*new.ipynb is not listed'):
        scripts['render'].check_sidebar(config, tmp_path)


def test_a_formula_that_cannot_be_typeset_is_named(scripts, tmp_path):
    page = tmp_path / 'page.html'
    for tex, wrong in (('x &lt; y', False), (r'\frac{1}{', True), (r'\nosuchmacro', True)):
        page.write_text(rf'<main><span class="math inline">\({tex}\)</span></main>', encoding='utf-8')
        if not wrong:
            scripts['render'].typeset([page], tmp_path / 'maths.css')
            assert '<mjx-container' in page.read_text(encoding='utf-8') and (tmp_path / 'maths.css').stat().st_size
        else:
            with pytest.raises(scripts['render'].SiteError, match=f'page.html: .*{re.escape(tex)}'):
                scripts['render'].typeset([page], tmp_path / 'maths.css')


def test_missing_assets_have_a_remedy(copy):
    done = script(copy, 'render.py', '--pandoc')
    assert done.returncode == 1 and 'make site' in done.stderr and 'Traceback' not in done.stderr


# The runner

def write_notebook(path, *codes, outputs=()):
    cells = [
        {
            'cell_type': 'code',
            'id': f'cell{i}',
            'metadata': {},
            'execution_count': None,
            'source': code.splitlines(True),
            'outputs': [],
        }
        for i, code in enumerate(codes)
    ]
    cells[-1]['outputs'] = list(outputs)
    meta = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
    path.write_text(json.dumps({'cells': cells, 'metadata': meta, 'nbformat': 4, 'nbformat_minor': 5}),
                    encoding='utf-8')


def test_running_twice_changes_nothing(tmp_path):
    path = tmp_path / 'toy.ipynb'
    kept = {'output_type': 'stream', 'name': 'stdout', 'text': ['from a GPU\n']}
    write_notebook(
        path, 'from ipywidgets import HTML, IntSlider, Stack, VBox, jslink',
        's, t = IntSlider(0, 0, 1), Stack([HTML("a"), HTML("b")])\njslink((s, "value"), (t, '
        '"selected_index"))\nVBox([s, t])',
        '#| gpu\nraise RuntimeError', outputs=[kept])
    texts = []
    for _ in range(2):
        done = script(ROOT, 'execute.py', path)
        assert done.returncode == 0, done.stderr
        texts.append(path.read_text(encoding='utf-8'))
    assert texts[0] == texts[1]
    assert 'IntSliderModel' in texts[0] and 'LinkModel' in texts[0]
    assert json.loads(texts[0])['cells'][2]['outputs'] == [kept]


def test_unpresentable_outputs_are_refused(tmp_path):
    path = tmp_path / 'toy.ipynb'
    write_notebook(path, 'print("/home" + "/someone/data")', 'import warnings\nwarnings.warn("beware")')
    before = path.read_bytes()
    done = script(ROOT, 'execute.py', path)
    assert done.returncode == 1 and 'cell 1: a machine path' in done.stderr and 'cell 2: standard error' in done.stderr
    assert path.read_bytes() == before


def test_a_thin_line_keeps_its_color_in_few(scripts):
    "Beside broad gradients, which would take all colours of a palette for themselves."
    from PIL import Image, ImageDraw

    from pictures import FAR, farthest, in_few_colors
    picture = Image.radial_gradient('L').resize((300, 300)).convert('RGB')
    picture.paste(Image.merge('RGB', [picture.getchannel(0), Image.linear_gradient('L').resize((300, 300)),
                                      picture.getchannel(2)]))
    drawn = ImageDraw.Draw(picture)
    for y, color in ((40, (200, 82, 0)), (60, (0, 107, 164)), (80, (95, 158, 209))):
        drawn.line((100, y, 130, y), fill=color)
    few = in_few_colors(picture)
    assert len(few.getcolors(256)) <= 256 and farthest(picture, few.convert('RGB')) <= FAR
    assert farthest(picture, picture.quantize(64, dither=Image.Dither.NONE).convert('RGB')) > FAR


LONG = '\n'.join(f'a{k} = {k}' for k in range(12))


@pytest.mark.parametrize('code, options, kinds, folded', [
    ('import os\nfrom torch import nn', {}, [], ('Imports', False)),
    ('assert 1 < 2\nwith expect_fail(ValueError): f()', {}, [], ('Checks', False)),
    ('for k in (1, 2): test_eq(k, k)', {}, [], ('Check', False)),
    ('assert 1 < 2\nx', {}, ['text/plain'], None),
    ('fig = plot()\nfig.show()', {}, ['image/png'], None),
    (LONG, {}, ['image/png'], ('Code of the picture <span class="lines">12 lines</span>', False)),
    (LONG, {}, ['text/html'], ('Code of the table <span class="lines">12 lines</span>', False)),
    (LONG, {'code-fold': False}, ['image/png'], None),
    ('x = 1', {'code-fold': True, 'code-summary': 'A <b>'}, [], ('A &lt;b&gt;', False)),
    ('x = 1', {'code-fold': 'show'}, [], ('Code', True)),
    ('def f(x):\n    "Twice `x`."\n' + '    x = x\n' * 9, {}, [], ('<code>f</code>: Twice `x` <span class="lines">11 lines</span>', False)),
    ('%load_ext autoreload', {}, [], None),
])
def test_what_is_folded(code, options, kinds, folded):
    from folds import fold
    assert fold(code, options, kinds) == folded
