"A notebook that nbdev has processed, as markdown in the dialect that Quarto uses."
import ast
import base64
import inspect
import json
import re
from importlib import import_module
from pathlib import Path

import yaml
from fastcore.docments import docments
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup

from folds import fold

VIEW = 'application/vnd.jupyter.widget-view+json'
STATE = 'application/vnd.jupyter.widget-state+json'
LINKS = 'links'  # where execute.py keeps the models of links between widgets
PICTURES = {'image/png': 'png', 'image/jpeg': 'jpg'}
RICHEST_FIRST = [VIEW, 'text/html', 'image/svg+xml', *PICTURES, 'text/markdown', 'text/latex', 'text/plain']
ANSI = re.compile(r'\x1b\[[0-9;]*m')
GAP = re.compile(r'\S {2,}\S')  # between two columns of a printed table
WRAPS, WIDEST = 88, 105  # characters in a line: more are broken, and more even when set smaller
MACHINE_PATH = re.compile(r'(?<![\w.+-])/(?:work|root|tmp|home|Users|private|opt|mnt|usr|var)/[^\s"\']*|[A-Za-z]:\\+Users[^\s"\']*')


def notebook_markdown(
        nb: dict,     # parsed .ipynb file
        files: Path,  # folder for its pictures, made when there are any; links are relative to the folder above
) -> tuple[dict, str]:
    "Front matter and body, the entries of the names at its end."
    front, parts, entries = {}, [], []
    for cell in nb['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'raw': front |= yaml.safe_load(source.strip().strip('-'))
        elif cell['cell_type'] == 'markdown': parts.append(source)
        elif source.split('\n')[-1].startswith('show_doc('): parts += api_entry(cell, front['output-file'], entries)
        else: parts += code_cell(nb, cell, source, files)
    if entries: parts += ['## Names of this page', *entries]
    return front, '\n\n'.join(parts) + '\n'


def code_cell(nb, cell, source, files):
    "Code and outputs, as the `#|` options of the cell ask; what is not the lesson is folded, below a picture that it draws."
    options, code = split_options(source)
    if options.get('include') is False: return
    shown = options.get('output') is not False
    outputs = [output_markdown(nb, output, options, files / f'{cell["id"]}-{n}') for n, output in enumerate(cell['outputs']) if shown]
    echoed = options.get('echo') is not False and code.strip()
    folded = echoed and fold(code, options, [kind_of(output) for output in cell['outputs'] if shown])
    source = folded_code(code, *folded) if folded else fence(code, '.python .cell-code') if echoed else ''
    yield from filter(None, [*outputs, source] if folded and outputs and 'picture' in folded[0] else [source, *outputs])


def split_options(source):
    "The leading `#| name: value` lines as a dict, and the rest."
    options, lines = {}, source.split('\n')
    while lines and lines[0].startswith('#|'):
        name, _, value = lines.pop(0)[2:].partition(':')
        options[name.strip()] = yaml.safe_load(value)
    return options, '\n'.join(lines)


def folded_code(code, summary, is_open):
    opening = f'<details class="code-fold"{" open" if is_open else ""}><summary>{summary}</summary>'
    return html(opening) + fence(code, '.python .cell-code') + html('</details>')


def kind_of(output):
    "The media type that is shown of an output."
    return next((k for k in RICHEST_FIRST if k in output.get('data', {})), 'text/plain')


def output_markdown(nb, output, options, path):
    if output['output_type'] == 'stream': return printed(ANSI.sub('', ''.join(output['text'])))
    if output['output_type'] == 'error': return printed(ANSI.sub('', '\n'.join(output['traceback'])))
    kind = next((k for k in RICHEST_FIRST if k in output['data']), None)
    if kind is None: raise ValueError(f'no way to show an output of type {", ".join(output["data"])}')
    content = output['data'][kind]
    if kind == VIEW: return widget(nb, content)
    if kind in PICTURES: return picture(content, options, path.with_suffix('.' + PICTURES[kind]))
    content = ''.join(content)
    if kind == 'text/plain': return printed(content)
    return html(f'<div class="cell-output-display">{content}</div>') if 'ml' in kind else content


def printed(text):
    "Text as it was printed; a table a little wider than the page is marked, to be set smaller."
    columned = [line for line in text.split('\n') if GAP.search(line.strip())]
    wide = 2 * len(columned) > text.count('\n') and WRAPS < max(map(len, columned), default=0) <= WIDEST
    return fence(text, '.cell-output .wide-table' if wide else '.cell-output')


def widget(nb, view):
    "The place of a widget; its model stands in the notebook's metadata."
    if view['model_id'] not in nb['metadata'].get('widgets', {}).get(STATE, {}).get('state', {}):
        raise ValueError('a widget has no saved state: run nbs/_site/execute.py on the notebook')
    return html(f'<div class="cell-widget"><script type="{VIEW}">{script_json(view)}</script></div>')


def widget_state(nb):
    "The models of all widgets, for the end of the page; empty without widgets."
    saved = dict(nb['metadata'].get('widgets', {}).get(STATE, {}))
    if not saved.get('state'): return ''
    saved['state'] = saved['state'] | json.loads(saved.pop(LINKS, '{}'))
    return html(f'<script type="{STATE}">{script_json(saved)}</script>')


def picture(content, options, path):
    "Save the picture, refer to it with caption, label and alternative text."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(''.join(content)))
    caption, alt = options.get('fig-cap', ''), options.get('fig-alt') or options.get('fig-cap', '')
    label = f'#{options["label"]} ' if 'label' in options else ''
    return f'![{caption}]({path.parent.name}/{path.name}){{{label}alt={json.dumps(alt, ensure_ascii=False)}}}'


def documented(name, page):
    "The object `name` of a module whose names stand on `page`, and whether it is a property."
    library = get_config().lib_path.name
    modules = import_module(f'{library}._modidx').d['syms']
    of_page = [import_module(m) for m, names in modules.items() if any(at.startswith(f'{page}#') for at, _ in names.values())]
    thing = next(m for m in of_page if hasattr(m, name.partition('.')[0]))
    for part in name.split('.'): thing = inspect.getattr_static(thing, part) if inspect.isclass(thing) else getattr(thing, part)
    wrapped = next((name for name in ('fget', '__func__', 'f') if hasattr(thing, name)), None)   # a property; a class method, of Python and of fastcore
    return (thing if not wrapped or inspect.isclass(thing) else getattr(thing, wrapped)), wrapped == 'fget'


def api_entry(cell, page, entries):
    """The line that stands where a name is defined. Its entry goes to those at the end of the page: what `show_doc` wrote, the signature on top, the commented
    arguments as a table, the members of a class. Nothing of a method of Python's own kind without words."""
    name = re.search(r'show_doc\((.*?)\)$', ''.join(cell['source']))[1]
    if name.startswith('_'): return
    thing, is_property = documented(name, page)
    text = ''.join(cell['outputs'][0]['data']['text/markdown'])
    code, doc = re.fullmatch(r'---\n\n(?:\[source\]\(.*?\).*?\n\n)?### .*?\n\n```python\n(.*?)\n```\s*(.*)', text, re.S).groups()
    doc = re.sub(r'\A\*(.+)\*$', r'\1', doc, flags=re.M) if thing.__doc__ else ''   # else what Python or PyTorch says of the method it stands for
    if not doc and name.rpartition('.')[2].startswith('_'): return
    signature, table = signature_and_table(code, comments_of(thing), types_of(thing))
    if is_property: signature = f'{name}   # a property'
    first = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', doc.strip().split('\n\n')[0])   # the first paragraph, without links
    entries.append(f'''<details class="api">
<summary>

### {name} {{.unlisted .unnumbered}}

[{first}]{{.api-gist}}
</summary>

[source]({source_of(thing)}){{.api-source}} [in the text](#text-{name}){{.api-place}}

{fence(signature, ".python .signature")}

{doc}

{table}

</details>''')
    yield f'::: {{.defined #text-{name}}}\n[`{name}`](#{name.lower()}) {first}\n:::'


def source_of(thing):
    "Address of the line where a function or class of the library begins."
    config, function = get_config(), inspect.unwrap(thing)
    return f'{config.git_url}/blob/{config.branch}/{thing.__module__.replace(".", "/")}.py#L{inspect.getsourcelines(function)[1]}'


def comments_of(thing):
    "What stands beside the arguments of a function, or the fields of a class and of those it derives from, by name."
    library = thing.__module__.partition('.')[0]
    parts = [c for c in reversed(thing.__mro__) if c.__module__.partition('.')[0] == library] if inspect.isclass(thing) else [thing]
    found = {name: text for part in parts for name, text in docments(part, returns=False).items() if text}
    if inspect.isfunction(thing): found |= dict(re.findall(r'^ +[*]{1,2}(\w+)\b.*?# (.*)$', inspect.getsource(thing), re.M))   # docments leaves these out
    return found


def types_of(thing):
    "The types of the arguments by name, as they are written where Python can tell; the one returned under `return`."
    try: signature = inspect.signature(thing)
    except ValueError: return {}   # an exception without an __init__ of its own
    types = {name: p.annotation for name, p in signature.parameters.items()} | {'return': signature.return_annotation}
    return {name: inspect.formatannotation(a) for name, a in types.items() if a not in (inspect.Signature.empty, None)}


def signature_and_table(code, more, types):
    """From `def f(` one argument per line, `# comment`: a call without types, and the table of types and comments;
    `more` of both by name."""
    code = re.sub(r'^( {4}\w+:\w+) <.*?>(?==)', r'\1', code, flags=re.M)  # fastcore's help of an argument
    code = re.sub(r'=<[^<>]*>', '=...', code)                             # a function as a default value
    comments = {name: NbdevLookup().linkify(text) for name, text in more.items()} | dict(re.findall(r'^ {4}\*{0,2}(\w+)\b.*? # (.*)$', code, re.M))
    returned = ''.join(re.findall(r'^(?:def \w+\(|)\).*?: # (.*)$', code, re.M))
    try: function = ast.parse(re.sub(r' # .*$', '', code, flags=re.M) + ' pass').body[0]
    except SyntaxError: return code, ''  # a default value without a literal form
    starred = [more.get(a.arg) for a in (function.args.vararg, function.args.kwarg) if a]
    if returned in starred: returned = ''   # fastcore takes the comment of a starred argument for that of the value
    written = lambda name, annotation: types.get(name) or annotation and ast.unparse(annotation)
    rows = [(f'`{stars}{a.arg}`', kind(written(a.arg, a.annotation)), default, comments.get(a.arg, '')) for a, default, stars in arguments(function.args)]
    rows += [('*returns*', kind(written('return', function.returns)), '', returned)] if returned else []
    for a, *_ in arguments(function.args): a.annotation = None
    call = f'{function.name}({ast.unparse(function.args)})'
    return call, parameter_table(rows) if comments or returned else ''


def arguments(args):
    "Each argument with the text of its default value and the stars before its name."
    plain = args.posonlyargs + args.args
    defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults + args.kw_defaults
    for a, default in zip(plain + args.kwonlyargs, defaults): yield a, f'`{ast.unparse(default)}`' if default else '', ''
    for a, stars in ((args.vararg, '*'), (args.kwarg, '**')):
        if a: yield a, '', stars


def kind(annotation):
    "A type without the modules it comes from, linked where nbdev knows it."
    if annotation in (None, '', 'None', 'NoneType'): return ''
    return NbdevLookup().linkify(f'`{re.sub(r"(?:[A-Za-z_]+[.])+", "", annotation)}`')


def parameter_table(rows):
    cells = '\n'.join('<tr>' + ''.join(f'<td>{cell}</td>' for cell in row) + '</tr>' for row in rows)
    heads = ''.join(f'<th scope="col">{head}</th>' for head in ('Name', 'Type', 'Default', 'Meaning'))
    return f'<div class="table-scroll">\n<table class="parameters">\n<thead><tr>{heads}</tr></thead>\n{cells}\n</table>\n</div>'


def fence(text, classes):
    "A code block whose fence is longer than any in `text`."
    ticks = '`' * max([3, *(len(run) + 1 for run in re.findall('`+', text))])
    return f'\n{ticks} {{{classes}}}\n{text.rstrip()}\n{ticks}\n'


def html(text): return fence(text, '=html')


def script_json(value): return json.dumps(value, sort_keys=True).replace('</', '<\\/')
