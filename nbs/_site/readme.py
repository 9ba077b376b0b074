"""Write README.md from `nbs/index.ipynb`: `python nbs/_site/readme.py`; with `--check`, say whether it is in step."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pypandoc
import yaml
from execnb.nbio import read_nb
from nbdev.config import get_config
from nbdev.processors import FilterDefaults

from cells import notebook_markdown

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def readme():
    "The text that README.md should have."
    os.chdir(ROOT)
    nb = read_nb('nbs/index.ipynb')
    FilterDefaults()(nb)
    front, markdown = notebook_markdown(nb, ROOT / 'nbs' / 'index_files')
    head = yaml.safe_dump({key: front[key] for key in ('title', 'description')}, allow_unicode=True)
    return subprocess.run(
        [pypandoc.get_pandoc_path(), '-f', 'markdown+lists_without_preceding_blankline', '-t', 'gfm-tex_math_gfm+tex_math_dollars',
         '--wrap=preserve', '-L', HERE / 'readme.lua'],
        input=f'---\n{head}---\n\n{to_notebooks(markdown)}', capture_output=True, text=True, encoding='utf-8', check=True).stdout


def to_notebooks(markdown):
    "Links to the site, which nbdev writes, lead to the notebooks instead; links to the repository become relative."
    cfg = get_config()
    pages = {re.sub(r'^\d+[a-z]?_', '', path.stem): path.name for path in Path('nbs').glob('*.ipynb')}
    page = re.escape(f'{cfg.doc_host}{cfg.doc_baseurl}/') + r'(\w+)\.html(#[\w.-]*)?'
    markdown = re.sub(page, lambda link: pages.get(link[1], link[0]), markdown)
    return markdown.replace(f'{cfg.git_url}/blob/{cfg.branch}/', '../')


def main(*options):
    path, text = ROOT / 'README.md', readme()
    if '--check' not in options: path.write_text(text, encoding='utf-8')
    elif path.read_text(encoding='utf-8') != text: sys.exit('README.md differs from nbs/index.ipynb: run `python nbs/_site/readme.py`')


if __name__ == '__main__': main(*sys.argv[1:])
