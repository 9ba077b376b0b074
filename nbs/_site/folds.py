"What of a page is not the lesson: it is folded, below a line that says what it is."
import ast
from html import escape

SHORT, LONG = 3, 9  # lines: code of a picture or a table stays in sight up to here, any other up to there
CHECKS = {'test_eq', 'test_close', 'assert_close', 'expect_fail', 'test_fail'}
PICTURES = ('image/', 'application/vnd.jupyter.widget')
TABLES = ('text/html', 'text/markdown')


def fold(
        code: str,             # of a cell, without options
        options: dict,         # of the cell
        kinds: list[str],      # what it shows, as media types; `text/plain` of what was printed
) -> tuple[str, bool] | None:
    "What stands beside the triangle, as HTML, and whether the code is open; nothing for code that is not folded."
    asked = options.get('code-fold')
    if asked is False: return None
    lines, tree = len(code.strip().split('\n')), parsed(code)
    if asked and options.get('code-summary') != 'Exported source': return escape(options.get('code-summary', 'Code')), asked == 'show'
    if asked: return counted('Source of ' + names(tree), lines), lines <= LONG
    if tree and all(map(is_import, tree)): return 'Imports', False
    if tree and not kinds and all(map(is_check, tree)): return 'Checks' if len(tree) > 1 else 'Check', False
    if lines > SHORT and (shown := picture_or_table(kinds)): return counted(f'Code of the {shown}', lines), False
    if lines > LONG: return counted(gist(tree) or 'Code', lines), False
    return None


def picture_or_table(kinds):
    if any(kind.startswith(PICTURES) for kind in kinds): return 'picture'
    return 'table' if any(kind in TABLES for kind in kinds) else ''


def parsed(code):
    "The statements; none of what is not Python."
    try: return ast.parse(code).body
    except SyntaxError: return []


def is_import(statement): return isinstance(statement, (ast.Import, ast.ImportFrom))


def is_check(statement):
    "Asserts, tests and errors that are expected, alone or in a loop."
    if isinstance(statement, ast.Assert): return True
    if isinstance(statement, ast.With): return all(called(item.context_expr) in CHECKS for item in statement.items)
    if isinstance(statement, (ast.For, ast.If)): return all(map(is_check, statement.body + statement.orelse))
    return isinstance(statement, ast.Expr) and called(statement.value) in CHECKS


def called(value): return isinstance(value, ast.Call) and getattr(value.func, 'id', None)


def defined(tree): return [s for s in tree if isinstance(s, (ast.FunctionDef, ast.ClassDef))]


def names(tree): return ', '.join(f'<code>{s.name}</code>' for s in defined(tree)) or 'the library'


def gist(tree):
    "Name and first words of what a cell defines."
    if not (things := defined(tree)): return ''
    words = (ast.get_docstring(things[0]) or '').split('\n')[0].rstrip('.')
    return names(tree) + (f': {escape(words)}' if words and len(things) == 1 else '')


def counted(what, lines): return f'{what} <span class="lines">{lines} lines</span>'
