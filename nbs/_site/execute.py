"""Run notebooks in a real kernel and save their outputs: `python nbs/_site/execute.py [NOTEBOOK ...] [--flags gpu]`.

Cells that nbdev would not test (`#| eval: false`, or a flag of `tst_flags` that is not asked for) are left alone, their
saved outputs too. Running twice leaves the same files, and a notebook whose outputs cannot be published is not written.
"""
import argparse
import base64
import io
import json
import os
import re
import sys
import warnings
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from PIL import Image

from cells import LINKS, MACHINE_PATH, STATE
from pictures import in_few_colors

ROOT = Path(__file__).resolve().parents[2]
LINK_MODELS = {'LinkModel', 'DirectionalLinkModel'}
MODEL_ID = re.compile(r'(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])')
UNPRESENTABLE = {'a machine path': MACHINE_PATH, 'a traceback': re.compile(r'Traceback \(most recent call last\)')}


class Runner(NotebookClient):
    "Executes all cells but those with a flag in `skip`."
    skip = frozenset()

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        lines = [line[2:].strip() for line in cell.source.splitlines() if line.startswith('#|')]
        skipped = self.skip & set(lines) or 'eval: false' in lines or 'nbdev_export()' in cell.source
        return cell if skipped else await super().async_execute_cell(cell, cell_index, **kwargs)


def execute(path, skip):
    "Run, check, write and clean one notebook."
    nb = nbformat.read(path, as_version=4)
    runner = Runner(nb, timeout=600, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}},
                    coalesce_streams=True, extra_arguments=['--IPKernelApp.log_level=40'])
    runner.skip = skip
    runner.execute()
    if faults := list(unpresentable(nb)): sys.exit('\n  '.join([f'{path.name} is not written, its outputs show', *faults]))
    shrink_pictures(nb)
    path.write_text(set_links_aside(stable_ids(nbformat.writes(nb))), encoding='utf-8')
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)  # all that nbdev_clean says when it gives up
        nbdev_clean(str(path))


def unpresentable(nb):
    "What a reader should not see in saved outputs, by cell."
    for number, cell in enumerate(nb.cells, 1):
        for output in cell.get('outputs', []):
            if output.get('name') == 'stderr': yield f'cell {number}: standard error {output.text.strip()[:200]!r}'
            texts = [output.get('text', '')] + [v for k, v in output.get('data', {}).items() if k.startswith('text/')]
            for what, pattern in UNPRESENTABLE.items():
                if found := pattern.search('\n'.join(texts)): yield f'cell {number}: {what} {found[0]!r}'


def shrink_pictures(nb):
    "Saved PNG pictures with a palette, where that makes them smaller."
    for output in (output for cell in nb.cells for output in cell.get('outputs', [])):
        if 'image/png' not in output.get('data', {}): continue
        before, after = base64.b64decode(output.data['image/png']), io.BytesIO()
        picture = Image.open(io.BytesIO(before))
        in_few_colors(picture).save(after, 'PNG', optimize=True)
        if picture.mode != 'P' and len(after.getvalue()) < len(before):
            output.data['image/png'] = base64.b64encode(after.getvalue()).decode() + '\n'


def stable_ids(text):
    """Number the ids of widget models, random in every run, in the order in which the notebook refers to them; keep
    those a page shows."""
    nb = json.loads(text)
    widgets = nb['metadata'].get('widgets', {}).get(STATE)
    if not widgets: return text
    state, numbers = widgets['state'], {}

    def visit(model):
        if model in numbers or model not in state: return
        numbers[model] = f'{len(numbers):032x}'
        for other in MODEL_ID.findall(content(model)): visit(other)

    def content(model): return json.dumps(state[model], sort_keys=True)
    def numbered(text): return MODEL_ID.sub(lambda found: numbers.get(found[0], ''), text)

    for model in MODEL_ID.findall(json.dumps([cell.get('outputs', []) for cell in nb['cells']])): visit(model)
    links = [m for m in state if state[m]['model_name'] in LINK_MODELS and numbers.keys() >= set(MODEL_ID.findall(content(m)))]
    for model in sorted(links, key=lambda m: numbered(content(m))): visit(model)  # what is left is shown nowhere
    widgets['state'] = {model: state[model] for model in numbers}
    return MODEL_ID.sub(lambda found: numbers.get(found[0], found[0]), json.dumps(nb))


def set_links_aside(text):
    """nbdev cannot write the models of links (a list named `source`): they are kept as a string, which render.py puts
    back."""
    nb = json.loads(text)
    widgets = nb['metadata'].get('widgets', {}).get(STATE, {'state': {}})
    links = {model: widgets['state'].pop(model) for model in list(widgets['state'])
             if widgets['state'][model]['model_name'] in LINK_MODELS}
    if links: widgets[LINKS] = json.dumps(links, sort_keys=True)
    return json.dumps(nb)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('notebooks', nargs='*', type=Path, help='default: all in nbs/')
    parser.add_argument('--flags', nargs='+', default=[], help='run cells with these flags, too')
    args = parser.parse_args()
    os.environ['OMP_NUM_THREADS'] = '1'  # sums in one order on every machine
    skip = frozenset(get_config(path=ROOT).tst_flags.split()) - set(args.flags)
    for path in args.notebooks or sorted((ROOT / 'nbs').glob('*.ipynb')):
        print(path.name, flush=True)
        try: execute(path.resolve(), skip)
        except CellExecutionError as e: sys.exit(f'{path.name} stopped\n{e}')


if __name__ == '__main__': main()
