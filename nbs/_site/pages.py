"A finished page, read back: its links are checked and its sections go into the search index."
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

HEADINGS, SILENT = {'h1', 'h2', 'h3'}, {'script', 'style', 'nav'}


class Page(HTMLParser):
    "Collects the ids, the addresses that the page refers to, and the text of <main> by heading."
    def __init__(self, html, title):
        super().__init__()
        self.title, self.ids, self.links, self.sections, self.keywords = title, set(), set(), [], ''
        self.in_main = self.in_heading = self.silent = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if 'id' in attrs: self.ids.add(attrs['id'])
        self.links |= {attrs[name] for name in ('href', 'src') if attrs.get(name)}
        if tag == 'meta' and attrs.get('name') == 'keywords': self.keywords = attrs['content']
        if tag == 'main': self.in_main = True
        if tag in SILENT: self.silent = True
        if tag in HEADINGS and self.in_main:
            self.in_heading = True
            self.sections.append({'id': attrs.get('id', ''), 'heading': '', 'text': ''})

    def handle_endtag(self, tag):
        if tag == 'main': self.in_main = False
        if tag in SILENT: self.silent = False
        if tag in HEADINGS: self.in_heading = False
        elif tag in ('p', 'li', 'td', 'th', 'pre', 'figcaption'): self.handle_data(' ')

    def handle_data(self, data):
        if self.in_main and not self.silent and self.sections:
            self.sections[-1]['heading' if self.in_heading else 'text'] += data

    def search_entries(self, name):
        """One entry per section: page title, heading (none for the page's opening), address, text, and for the opening
        what else the page is looked for by."""
        for number, section in enumerate(self.sections):
            yield {'title': self.title, 'heading': plain(section['heading']) if number else '',
                   'url': name + ('#' + section['id'] if number else ''), 'text': plain(section['text']),
                   'keywords': '' if number else self.keywords}


def plain(text): return re.sub(r'\s+', ' ', re.sub(r'\\[()\[\]]', '', text)).strip()


def broken_links(
        pages: dict[str, Page],  # by file name
        folder: Path,            # where the pages and their files lie
) -> list[str]:
    "Each internal address that leads nowhere, with the page it stands on."
    def leads_somewhere(name, link):
        target = urlsplit(link)
        if target.scheme or target.netloc: return True
        file = unquote(target.path) or name
        if file not in pages: return (folder / file).is_file()
        return not target.fragment or unquote(target.fragment) in pages[file].ids

    return [f'{name}: {link}' for name, page in pages.items() for link in sorted(page.links) if not leads_somewhere(name, link)]
