"The reference is complete: every exported name is run in a page, and says what shape its tensors have."
import ast
import builtins
import importlib
import inspect
import re
from dataclasses import is_dataclass

import pytest
from fastcore.docments import docments

from test_package import EXPORTED, code_cells, modules, no, parse, public

# Run by tests, not by a page: commands of a shell, and an app for a browser.
ELSEWHERE = {'lab.cli.lap_bench', 'lab.cli.lap_compare', 'lab.cli.lap_study', 'lab.widgets.playground'}
SHAPE = re.compile(r'\[.*\]|(?:same|any|its) shape')


def names(tree):
    "All names and attributes in a piece of code."
    return {
        n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(tree) if isinstance(n, ast.Name | ast.Attribute)}


def shown():
    "Names in the cells of all pages that run and are not exported themselves."
    return set().union(*(names(parse(lines)) for _, _, directives, lines in code_cells()
                         if not EXPORTED & set(directives)))


def returned(things):
    "Names in the return annotations of these functions, methods and properties."
    def annotations(thing):
        if isinstance(thing, property): thing = thing.fget
        if isinstance(thing, staticmethod | classmethod): thing = thing.__func__
        if inspect.isfunction(thing): yield str(inspect.signature(thing).return_annotation)
        if inspect.isclass(thing):
            for member in vars(thing).values(): yield from annotations(member) if not inspect.isclass(member) else ()

    return set(re.findall(r'\w+', ' '.join(a for thing in things for a in annotations(thing))))


def without_example(exported, run):
    "Of the exported things, by full name, those that no page calls, returns or derives from."
    called = {full: thing for full, thing in exported.items() if thing.__name__ in run}
    results = returned(called.values())
    bases = {base for thing in called.values() if inspect.isclass(thing) for base in thing.__mro__}
    return [
        full for full, thing in exported.items()
        if full not in called and thing.__name__ not in results and thing not in bases]


@pytest.fixture(scope='module')
def exported():
    sources = {name: importlib.import_module(f'lap_nb.{name}') for name in modules()}
    return {f'{module}.{name}': thing for module, source in sources.items() for name, thing in public(source).items()}


def test_every_name_is_run_in_a_page(exported):
    missing = set(without_example(exported, shown()))
    no(sorted(missing - ELSEWHERE), 'an example that is run')
    no(sorted(ELSEWHERE - missing), 'run in a page by now, no exception any more')


def test_a_name_without_an_example_is_found(exported):
    def lonely()->'Alone': ...
    class Alone: ...
    class Base: ...
    class Derived(Base): ...
    things = dict(lonely=lonely, Alone=Alone, Base=Base, Derived=Derived)
    assert without_example(things, set()) == list(things)
    assert without_example(things, {'lonely'}) == ['Base', 'Derived']
    assert without_example(things, {'Derived'}) == ['lonely', 'Alone']
    assert 'transport.exact_gap' in without_example(exported, shown() - {'exact_gap'})
    assert not set(things) & set(dir(builtins))


def shapeless(full, thing):
    "Parameters that are tensors and do not say of what shape."
    if inspect.isclass(thing) and '__init__' not in vars(thing): return
    for name, p in docments(thing, full=True, returns=False).items():
        if (
            re.search(r'\bTensor\b', str(p.anno))
            and not re.search('Callable|Module', str(p.anno))
            and p.docment is not None
            and not SHAPE.search(p.docment)
        ):
            yield f'{full}: {name}: {p.docment}'


def test_tensors_say_their_shape(exported):
    no((fault for full, thing in exported.items() for fault in shapeless(full, thing)),
       'a shape in the comment of each tensor')


def test_a_tensor_without_a_shape_is_found():
    import torch

    def f(
        x: torch.Tensor,  # some numbers
        y: torch.Tensor,  # some numbers, `[B, 2]`
    ): "Nothing."

    assert list(shapeless('f', f)) == ['f: x: some numbers']


# What could be counted in more than one way: a word of the unit stands beside it.
UNITS = dict(accuracy_drop='share', batch_size='samples', check_every='steps', chunk='samples|networks',
             crop='pixels|zeros', drop='share|probability|chance|unit of the score', eval_every='epochs', every='steps', height='inches',
             label_smoothing='share', length='samples|tuple', memory='bytes', noise='standard deviation',
             patience='points', seconds='time', shift='radii', side='pixels', steps='steps|gradient', timeout='seconds',
             tolerance='part|relative|mass', warmup='steps|share', width='units|channels|inches|tuple')


def unitless(full, thing):
    "Parameters, of a class those of its methods too, that do not say what they are counted in."
    for name, member in vars(thing).items() if inspect.isclass(thing) else ():
        written = not name.startswith('_') or name == '__init__' and not is_dataclass(thing)
        if inspect.isfunction(member) and written: yield from unitless(f'{full}.{name}', member)
    if inspect.isclass(thing) and not is_dataclass(thing): return
    for name, p in docments(thing, full=True, returns=False).items():
        number = re.search(r'\b(int|float)\b', str(p.anno))
        if name in UNITS and number and p.docment and not re.search(UNITS[name], p.docment):
            yield f'{full}: {name}: {p.docment}'


def test_numbers_say_their_unit(exported):
    no((fault for full, thing in exported.items() for fault in unitless(full, thing)),
       'a unit in the comment: ' + ', '.join(UNITS))


def test_a_number_without_a_unit_is_found():
    class Bell:
        def __init__(self,
            width: float,  # inches
        ): self.width = width

        def ring(self,
            timeout: float,  # how long to wait
        ): "Nothing."

    assert list(unitless('Bell', Bell)) == ['Bell.ring: timeout: how long to wait']


def speechless(exported):
    "Public methods and properties without a docstring; those that PyTorch or another library defines are left out."
    for full, thing in exported.items():
        theirs = (
            {name for base in thing.__mro__[1:] if not base.__module__.startswith('lap_nb') for name in vars(base)}
            if inspect.isclass(thing)
            else {}
        )
        for name, member in vars(thing).items() if inspect.isclass(thing) else ():
            code = isinstance(member, property | staticmethod | classmethod) or inspect.isfunction(member)
            if code and not name.startswith('_') and name not in theirs and not inspect.getdoc(member):
                yield f'{full}.{name}'


def test_every_method_says_what_it_does(exported):
    class Mute:
        def method(self): ...
    assert list(speechless({'Mute': Mute})) == ['Mute.method']
    no(list(speechless(exported)), 'a docstring')
