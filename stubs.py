"""Signatures of the package for type checkers: `.pyi` files, written when a wheel is built.

Methods added to a class with `@patch`, as chapters do, are invisible to a type checker. Here they stand in their class.
What a checker then takes for granted: that the module that adds a method is imported where the method is used. Nor does
a checker know `@delegates`: here a function that takes the fields of a dataclass as keywords names them one by one."""
import ast
import copy
from pathlib import Path

KEPT = {'dataclass', 'property', 'cached_property', 'classmethod', 'staticmethod', 'contextmanager', 'setter', 'abstractmethod', 'overload'}


def name_of(node):
    "The last name of a decorator: `dataclass` of `@dataclasses.dataclass(frozen=True)`."
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, 'id', '')


def delegated(function, classes):
    "The arguments of a function, with the fields of the dataclass that `@delegates` names in place of `**kwargs`."
    names = [ast.unparse(d.args[0]) for d in function.decorator_list if name_of(d) == 'delegates' and d.args]
    fields = [n for name in names if name in classes for n in classes[name].body if isinstance(n, ast.AnnAssign)]
    if not fields: return function.args
    args = copy.copy(function.args)
    args.kwonlyargs = [*args.kwonlyargs, *(ast.arg(n.target.id, n.annotation) for n in fields)]
    args.kw_defaults, args.kwarg = [*args.kw_defaults, *(n.value for n in fields)], None
    return args


def bodiless(function, extra=(), classes=()):
    "A function without its body; of its decorators only those that change how it is called."
    kept = [d for d in function.decorator_list if name_of(d) in KEPT]
    if 'call_parse' in map(name_of, function.decorator_list):   # annotations are those of the command line
        for argument in (*function.args.args, *function.args.kwonlyargs): argument.annotation = None
    new = ast.parse('def f(): ...').body[0]
    new.name, new.args, new.returns, new.decorator_list = function.name, delegated(function, classes), function.returns, [*extra, *kept]
    if function.name in ('__init__', '__post_init__') and new.returns is None: new.returns = ast.Constant(None)
    return new


def attributes(cls):
    """Declarations of what the methods of a class set on `self`: of the parameter's type where it is a parameter, else
    of any."""
    known = {n.target.id for n in cls.body if isinstance(n, ast.AnnAssign)} | {getattr(n, 'name', '') for n in cls.body}
    for method in (n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == '__init__'):
        types = {a.arg: a.annotation for a in (*method.args.posonlyargs, *method.args.args, *method.args.kwonlyargs)}
        for node in (n for n in ast.walk(method) if isinstance(n, (ast.Assign, ast.AnnAssign))):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            pairs = [(t, node.value) for target in targets for t in (target.elts if isinstance(target, ast.Tuple) else [target])]
            if isinstance(node.value, ast.Tuple) and isinstance(targets[0], ast.Tuple): pairs = list(zip(targets[0].elts, node.value.elts))
            for target, value in pairs:
                if not (isinstance(target, ast.Attribute) and getattr(target.value, 'id', '') == 'self') or target.attr in known: continue
                known.add(target.attr)
                kind = types.get(value.id) if isinstance(value, ast.Name) else None
                yield ast.AnnAssign(ast.Name(target.attr), kind or ast.Name('_Any'), None, 1)


def declared(cls, added):
    "A class without the bodies of its methods, with the methods added to it elsewhere."
    body = []
    for node in cls.body:
        if isinstance(node, ast.FunctionDef): body.append(bodiless(node))
        elif isinstance(node, ast.AnnAssign) and node.value is not None: body.append(ast.AnnAssign(node.target, node.annotation, ast.Constant(...), 1))
        elif isinstance(node, (ast.AnnAssign, ast.Assign)): body.append(node)
    new = ast.ClassDef(cls.name, cls.bases, cls.keywords, [*attributes(cls), *body, *added], [d for d in cls.decorator_list if name_of(d) in KEPT])
    new.body = new.body or [ast.Expr(ast.Constant(...))]
    return new


def patched(node):
    "Class and declaration of a function that `@patch` adds to a class, or None."
    for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
        if name_of(mark) not in ('patch', 'patch_to'): continue
        flags = {k.arg for k in mark.keywords} if isinstance(mark, ast.Call) else set()
        how = [ast.Name('property')] if 'as_prop' in flags else [ast.Name('classmethod')] if 'cls_method' in flags else []
        first = node.args.args[0]
        owner = mark.args[0] if name_of(mark) == 'patch_to' else first.annotation
        first.annotation = None
        return ast.unparse(owner).strip('\'"'), bodiless(node, how)


def classes_of(sources):
    "The classes that modules with these texts define, by name."
    return {n.name: n for source in sources for n in ast.parse(source).body if isinstance(n, ast.ClassDef)}


def stub(source, classes=None):
    "The text of the stub of a module with the text `source`; `classes` of other modules may be delegated to."
    tree, classes = ast.parse(source), classes_of([source]) | (classes or {})
    added = {}
    for found in filter(None, map(patched, tree.body)): added.setdefault(found[0], []).append(found[1])
    own = {n.name for n in tree.body if isinstance(n, ast.ClassDef)}
    returns = {n.name: n.returns for n in tree.body if isinstance(n, ast.FunctionDef)}
    for node in tree.body:   # `Class.name = property(getter, setter)`
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute) and ast.unparse(node.targets[0].value) in own:
            getter = node.value.args[0] if isinstance(node.value, ast.Call) and name_of(node.value) == 'property' else None
            added.setdefault(ast.unparse(node.targets[0].value), []).append(
                ast.AnnAssign(ast.Name(node.targets[0].attr), returns.get(getattr(getter, 'id', '')) or ast.Name('_Any'), None, 1))
    lines = ['from typing import Any as _Any']
    defined = {n.name for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
    if added.keys() - own: raise ValueError(f'methods are added to classes of other modules: {sorted(added.keys() - own)}')
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)): lines.append(ast.unparse(node))
        elif isinstance(node, ast.ClassDef): lines.append(ast.unparse(ast.fix_missing_locations(declared(node, added.get(node.name, [])))))
        elif isinstance(node, ast.FunctionDef) and not any(name_of(d) in ('patch', 'patch_to') for d in node.decorator_list):
            lines.append(ast.unparse(ast.fix_missing_locations(bodiless(node, classes=classes))))
        elif isinstance(node, ast.AnnAssign): lines.append(ast.unparse(ast.AnnAssign(node.target, node.annotation, None, 1)))
        elif isinstance(node, ast.Assign):
            plain = isinstance(node.value, ast.Constant)
            kind = type(node.value.value).__name__ if plain and node.value.value is not None else '_Any'
            for target in (t for t in node.targets if not isinstance(t, ast.Attribute | ast.Subscript)):
                if ast.unparse(target) == '__all__': lines.append(ast.unparse(node))
                else: lines += [f'{n.id}: {kind}' for n in ast.walk(target) if isinstance(n, ast.Name) and n.id not in defined]
    return '\n'.join(lines) + '\n'


def write_stubs(package, to):
    """Write a stub for each module of the folder `package`, and of its packages, in the folder `to`; one that is there
    already is taken as it is."""
    modules = {path: path.read_text(encoding='utf-8') for path in sorted(Path(package).rglob('*.py')) if path.name != '_modidx.py'}
    classes = classes_of(modules.values())
    for path, source in modules.items():
        own, new = path.with_suffix('.pyi'), Path(to) / path.relative_to(package).with_suffix('.pyi')
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(own.read_text(encoding='utf-8') if own.exists() else stub(source, classes), encoding='utf-8')
