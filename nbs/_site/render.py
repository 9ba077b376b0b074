"""Build the site of the notebooks into `_docs/`: `python nbs/_site/render.py [FOLDER] [--pandoc]`.

nbdev prepares the notebooks (`_proc/`: links, API entries, hidden cells gone; no chapter is run). Quarto renders them
where it is installed, pandoc elsewhere, both by `_quarto.yml`. The pandoc site is checked before it counts as built.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from html import escape, unescape
from importlib import import_module
from pathlib import Path

import pypandoc
import yaml
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from PIL import Image

from cells import notebook_markdown, widget_state
from pages import Page, broken_links
from pictures import in_few_colors

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FONTS = [f'@fontsource-variable/{name}/files/{name}-latin-wght-{style}.woff2'
         for name in ('source-serif-4', 'source-sans-3', 'source-code-pro') for style in ('normal', 'italic')]
VENDORED = ['requirejs/require.js', '@jupyter-widgets/html-manager/dist/embed-amd.js', *FONTS]
MARKDOWN = 'markdown+lists_without_preceding_blankline+autolink_bare_uris'


@dataclass
class Chapter:
    notebook: str  # file name, as the sidebar lists it
    title: str
    page: str      # file name in the site
    markdown: str
    widgets: str   # saved models as a script element, or nothing


class SiteError(Exception): "The site cannot be built; the message says why and what to do."


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', nargs='?', type=Path, default=ROOT / '_docs', help='default: _docs')
    parser.add_argument('--pandoc', action='store_true', help='render with pandoc even where Quarto is installed')
    args = parser.parse_args()
    out, quarto = args.folder.resolve(), shutil.which('quarto') and not args.pandoc
    os.chdir(ROOT)
    missing = [name for name in (*VENDORED, 'mathjax/es5/node-main.js') if not (HERE / 'node_modules' / name).exists()]
    if missing and not quarto: raise SiteError(f'nbs/_site/node_modules lacks {missing[0]}: run `make site`, which installs it with npm')
    (quarto_site if quarto else pandoc_site)(process_notebooks(), out)


def process_notebooks():
    shutil.rmtree('_proc', ignore_errors=True)
    refresh_quarto_yml()
    return proc_nbs(force=True)


def quarto_site(processed, out):
    subprocess.run(['quarto', 'render', '--no-cache'], cwd=processed, check=True)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(processed / '_docs', out)


def pandoc_site(processed, out):
    config = load_config(processed)
    check_sidebar(config, processed)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(processed, out, ignore=shutil.ignore_patterns('*.ipynb', '*.yml'))
    chapters = [load_chapter(processed / name, out) for name in notebooks(config['website']['sidebar'])]
    for number in range(len(chapters)): write_page(config, chapters, number, out)
    write_twins(config['website'], chapters, out)
    tell_namesakes_apart([out / c.page for c in chapters])
    lead_to_pages([out / c.page for c in chapters])
    copy_assets(out)
    pages = {c.page: Page((out / c.page).read_text(encoding='utf-8'), c.title) for c in chapters}
    index = [section for name, page in pages.items() for section in page.search_entries(name)]
    (out / 'search-index.js').write_text(f'searchIndex = {json.dumps(index, ensure_ascii=False)}\n', encoding='utf-8')
    typeset([out / c.page for c in chapters], out / 'maths.css')   # after the index, which is to hold the formulas as they are written
    if broken := broken_links(pages, out): raise SiteError('\n  '.join(['broken links', *broken]))


def load_config(folder):
    "`_quarto.yml` with its metadata files below it, as Quarto merges them."
    config = yaml.safe_load((folder / '_quarto.yml').read_text(encoding='utf-8'))
    for name in config['metadata-files']: merge(config, yaml.safe_load((folder / name).read_text(encoding='utf-8')))
    return config


def merge(config, defaults):
    for key, value in defaults.items():
        if isinstance(value, dict): merge(config.setdefault(key, {}), value)
        else: config.setdefault(key, value)


def notebooks(node):
    "The notebooks that part of `_quarto.yml` names, in order."
    if isinstance(node, str): return [node] if node.endswith('.ipynb') else []
    return [name for child in (node.values() if isinstance(node, dict) else node) for name in notebooks(child)] \
        if isinstance(node, (dict, list)) else []


def check_sidebar(config, processed):
    listed, present = notebooks(config['website']['sidebar']), {p.name for p in processed.glob('*.ipynb')}
    faults = [f'{name} is listed, but there is no such notebook in nbs/' for name in listed if name not in present]
    faults += [f'{name} is not listed: add it' for name in sorted(present - set(listed))]
    if faults: raise SiteError('\n  '.join(['sidebar of _quarto.yml', *faults]))


def load_chapter(path, out):
    nb = json.loads(path.read_text(encoding='utf-8'))
    try: front, markdown = notebook_markdown(nb, out / f'{path.stem}_files')
    except ValueError as e: raise SiteError(f'{path.name}: {e}') from e
    head = yaml.safe_dump({key: front[key] for key in ('title', 'description', 'keywords') if key in front}, allow_unicode=True)
    return Chapter(path.name, front['title'], front['output-file'], f'---\n{head}---\n\n{markdown}', widget_state(nb))


def write_page(config, chapters, number, out):
    "Convert one chapter with pandoc, put it into the template and its links in order."
    chapter, variables = chapters[number], {}
    if number > 0: variables['previous'] = turn_link('prev', chapters[number - 1])
    if number < len(chapters) - 1: variables['next'] = turn_link('next', chapters[number + 1])
    website = config['website']
    variables |= dict(
        address=website['site-url'].rstrip('/') + '/', page=chapter.page, twin=twin(chapter.page),
        site=website['title'], css=config['format']['html']['css'], navbar=navbar(website['navbar']),
        sidebar=sidebar(website['sidebar']['contents'], chapters, chapter), footer=website['page-footer']['left'],
        engine=f'pandoc {pypandoc.get_pandoc_version()}', notebook=f'../nbs/{chapter.notebook}')
    if chapter.widgets: variables['widgets'] = 'true'
    if '{.explorable' in chapter.markdown: variables['explorable'] = 'true'
    done = subprocess.run(
        [pypandoc.get_pandoc_path(), '-f', MARKDOWN, '-t', 'html5', '--template', HERE / 'page.html', '--toc',
         f'--toc-depth={config["format"]["html"]["toc-depth"]}', '--mathjax', '--wrap=preserve',
         '-L', HERE / 'quarto.lua', *(f'--variable={name}={value}' for name, value in variables.items())],
        input=chapter.markdown + chapter.widgets, capture_output=True, text=True, encoding='utf-8')
    if done.returncode or done.stderr: raise SiteError(f'{chapter.notebook}: pandoc: {done.stderr.strip()}')
    html = LinkRewriter(website, chapters).rewrite(done.stdout)
    html = re.sub(r' id="toc-[^"]*"', '', html)  # the contents stand on the page twice
    (out / chapter.page).write_text(html, encoding='utf-8')


FORMULA = re.compile(r'(<span class="math (inline|display)">)\\[(\[](.*?)\\[)\]]</span>', re.S)


def typeset(pages, style):
    "Put pictures of the formulas into the pages: they need no script then."
    texts = {page: page.read_text(encoding='utf-8') for page in pages}
    formulas = [[{'tex': unescape(tex), 'display': kind == 'display'} for _, kind, tex in FORMULA.findall(text)] for text in texts.values()]
    if not shutil.which('node'): raise SiteError('node is missing: install Node.js, which typesets the formulas')
    done = subprocess.run(['node', HERE / 'maths.mjs'], input=json.dumps(formulas), capture_output=True, text=True, encoding='utf-8')
    if done.returncode: raise SiteError(f'maths.mjs: {done.stderr.strip()}')
    made = json.loads(done.stdout)
    for (page, text), found, drawn in zip(texts.items(), formulas, made['pages']):
        if bad := next((f['tex'] for f, picture in zip(found, drawn['typeset']) if 'data-mjx-error' in picture), None):
            raise SiteError(f'{page.name}: a formula that cannot be typeset: {bad}')
        pictures = iter(drawn['typeset'])
        text = FORMULA.sub(lambda formula: f'{formula[1]}{next(pictures)}</span>', text)
        if found: page.write_text(text.replace('</main>', drawn['glyphs'] + '</main>'), encoding='utf-8')
    style.write_text(made['style'], encoding='utf-8')


def twin(page): return page.replace('.html', '.md')


def write_twins(website, chapters, out):
    "Each page as plain Markdown beside it, and `llms.txt`, which lists them."
    links, listed = LinkRewriter(website, chapters), []
    for c in chapters:
        _, head, body = c.markdown.split('---\n', 2)
        front = yaml.safe_load(head)
        opening = f'# {front["title"]}\n\n' + (f'> {front["description"]}\n\n' if front.get('description') else '')
        (out / twin(c.page)).write_text(opening + links.rewrite_markdown(plain_markdown(body)), encoding='utf-8')
        listed.append(f'- [{front["title"]}]({twin(c.page)})' + (f': {front["description"]}' if front.get('description') else ''))
    (out / 'llms.txt').write_text(f'# {website["title"]}\n\n' + '\n'.join(listed) + '\n', encoding='utf-8')


def plain_markdown(text):
    "Without what only pandoc reads: classes of code blocks, fenced parts, and HTML around code."
    text = re.sub(r'^(`{3,}) ?\{\.python[^}]*\}$', r'\1python', text, flags=re.M)
    text = re.sub(r'^(`{3,}) ?\{\.[^}]*\}$', r'\1', text, flags=re.M)
    text = re.sub(r'^(`{3,}) ?\{=html\}\n(.*?)\n\1$', lambda raw: '' if '<script' in raw[2] else raw[2], text, flags=re.M | re.S)
    text = re.sub(r'^:{3,}.*\n', '', text, flags=re.M)
    return re.sub(r'(?<=[)\w])\{[.#][^}\n]*\}|(?<=\))\{alt=[^\n]*\}$', '', text, flags=re.M)


def lead_to_pages(pages):
    """A name of a module leads to its entry, on whichever page that stands; one without an entry, to the page that
    explains it."""
    syms = import_module(f'{get_config().lib_path.name}._modidx').d['syms']
    at = {entry.lower(): page for module in syms.values() for page, _, entry in (place.partition('#') for place, _ in module.values())}
    texts = {page: page.read_text(encoding='utf-8') for page in pages}
    entries = {f'{page.name}#{entry}' for page, text in texts.items() for entry in re.findall(r'\bid="([^"]+)"', text)}

    def lead(found):
        page, _, entry = found[0].partition('#')
        if found[0] in entries or entry.lower() not in at: return found[0]
        return there if (there := f'{at[entry.lower()]}#{entry}') in entries else page

    for page, text in texts.items():
        page.write_text(re.sub(r'(?<=href=")[\w.]+\.html#[^"]*', lead, text), encoding='utf-8')


def tell_namesakes_apart(pages):
    """nbdev addresses a name in lower case. Where a heading or another name has that address, links to the name go to
    its entry all the same."""
    texts, moved = {page: page.read_text(encoding='utf-8') for page in pages}, {}
    for page, text in texts.items():
        for anchor, name in re.findall(r'<details class="api">.*?<h3 [^>]*id="([^"]*)">([\w.]+)</h3>', text, re.S):
            if re.fullmatch(re.escape(name.lower()) + r'-\d+', anchor): moved[page.name, name] = anchor

    def link(found, page):
        path, name = found['path'] or page.name, found['name']
        return found[0] if found['anchor'] != name.lower() else f'href="{found["path"]}#{moved.get((path, name), found["anchor"])}"{found["rest"]}'

    pattern = re.compile(r'href="(?P<path>[\w.]*)#(?P<anchor>[\w.]+)"(?P<rest>[^>]*>\s*<code>(?P<name>[\w.]+)(?:\(\))?</code>)')
    for page, text in texts.items(): page.write_text(pattern.sub(lambda found: link(found, page), text), encoding='utf-8')


class LinkRewriter:
    "Links of notebooks, and the absolute ones that nbdev writes, become links between the pages."
    def __init__(self, website, chapters):
        self.address = website['site-url'].rstrip('/') + '/'
        self.repository = f'{website["repo-url"]}/blob/{website["repo-branch"]}/'
        self.pages = {c.notebook: c.page for c in chapters}

    def rewrite_markdown(self, text):
        def link(found):
            page, mark, anchor = self.target(found[2]).partition('#')
            return found[1] + (twin(page) if page in self.pages.values() else page) + mark + anchor + ')'
        return re.sub(r'(\]\()([^()\s]+)\)', link, text)

    def rewrite(self, text): return re.sub(r'(?<= href=")[^"]+', lambda link: self.target(link[0]), text)

    def target(self, link):
        if link.startswith(self.address): return link.removeprefix(self.address)
        if link.startswith('../'): return self.repository + link.removeprefix('../')
        notebook, mark, anchor = link.partition('#')
        return self.pages.get(notebook, notebook) + mark + anchor


def navbar(config):
    items = config.get('left', []) + config.get('right', [])
    return ''.join(f'<li><a href="{escape(item["href"])}">{escape(item["text"])}</a></li>' for item in items)


def sidebar(contents, chapters, current):
    "The nested lists of chapters, the current one marked."
    by_name = {c.notebook: c for c in chapters}

    def entry(item):
        if isinstance(item, dict): return f'<li><span class="part">{escape(item["section"])}</span>{listing(item["contents"])}</li>'
        here = ' aria-current="page"' if item == current.notebook else ''
        return f'<li><a href="{item}"{here}>{escape(by_name[item].title)}</a></li>'

    def listing(items): return f'<ul>{"".join(map(entry, items))}</ul>'

    return listing(contents)


def turn_link(rel, chapter): return f'<a rel="{rel}" href="{chapter.notebook}">{escape(chapter.title)}</a>'


def copy_assets(out):
    (out / 'vendor').mkdir()
    for name in VENDORED: shutil.copy(HERE / 'node_modules' / name, out / 'vendor')
    for name in ('style.css', 'site.js'): shutil.copy(HERE / name, out)
    (out / 'explorable.js').write_text(explorable(), encoding='utf-8')
    for picture in out.glob('results/*.png'): lighten(picture)


def explorable():
    """The modules of the explorable as one script without exports and comments: browsers load no module for a page
    opened from a folder."""
    parts = [(HERE / name).read_text(encoding='utf-8') for name in ('flow.mjs', 'drawing.mjs', 'explorable.mjs')]
    bare = [re.sub(r'^(import| *//).*\n|^export ', '', part, flags=re.M) for part in parts]
    return '{\n' + '\n'.join(bare) + '}\n'


def lighten(picture):
    "Store a drawing in few colours: the landing page loads it."
    with Image.open(picture) as image: small = in_few_colors(image)
    small.save(picture, optimize=True)


if __name__ == '__main__':
    try: main()
    except SiteError as e: sys.exit(f'render.py: {e}')
