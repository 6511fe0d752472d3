"""docstrings: Python functions, and the first lines of their docstrings, from CPython's library.

No download and no file of ours: the sources are read where Python is installed, not imported. Whole
modules validate. The same seed gives the same task for the same version of CPython; the library,
and with it the number of rows, differs between versions.
"""

import ast
import os
import pathlib
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from experiments.data import scores
from experiments.data.language import Exchange, LanguageTask, held_out, question
from experiments.data.task import Splits

TASK = LanguageTask("docstrings", 48, scores.chrf)

INSTRUCTION = "Write the first line of this function's docstring."
MAX_LINES, MAX_SOURCE = 40, 1200  # of a function without its docstring: lines and characters
MIN_WORDS, MAX_SUMMARY = 3, 150  # of a first line: words and characters
VALIDATION_SHARE = 0.1
_SKIPPED = {"test", "tests", "idle_test", "__pycache__"}

_Function = ast.FunctionDef | ast.AsyncFunctionDef
DOCUMENTED = _Function | ast.ClassDef


class Pair(NamedTuple):
    """A function of the library."""

    module: str  # the top-level one: asyncio, not asyncio.tasks
    source: str  # without docstrings
    summary: str  # the docstring's first line


def load(seed: int = 0) -> Splits[Exchange]:
    """The task drawn with `seed`: which modules validate, and the order of the rows."""
    rng = np.random.Generator(np.random.PCG64([seed, *b"docstrings"]))
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    found = pairs(library)
    modules = [pair.module for pair in found]
    if len(set(modules)) < 2:
        raise FileNotFoundError(
            f"{library} has docstrings in {len(set(modules))} modules of Python's own library; the "
            "task is made of its .py files, and this Python came without them. Install Python from "
            "python.org or a full package of it, or choose another --task"
        )
    validation = held_out(modules, int(len(found) * VALIDATION_SHARE), rng)
    rows = rng.permutation(len(found)).tolist()
    parts = ([found[i] for i in rows if (i in validation) == v] for v in (False, True))
    return Splits(*map(_split, parts))


def pairs(library: pathlib.Path) -> list[Pair]:
    """Every usable function in the folder; of two with one source or one first line, the first."""
    found: list[Pair] = []
    sources: set[str] = set()
    summaries: set[str] = set()
    for path in _files(library):
        module = path.relative_to(library).parts[0].removesuffix(".py")
        for source, summary in _functions(path):
            if source not in sources and summary not in summaries:
                found.append(Pair(module, source, summary))
                sources.add(source)
                summaries.add(summary)
    return found


def _split(rows: list[Pair]) -> tuple[Exchange, ...]:
    return tuple(
        question(f"{INSTRUCTION}\n\n{row.source}", row.summary, [row.summary], i)
        for i, row in enumerate(rows)
    )


def _files(library: pathlib.Path) -> list[pathlib.Path]:
    """The library's modules, sorted: a file system lists them in any order."""
    paths = []
    for folder, folders, files in os.walk(library):
        # site-packages, lib-dynload and config-3.11-... are no packages of the library.
        folders[:] = [name for name in folders if name.isidentifier() and name not in _SKIPPED]
        paths += [pathlib.Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(paths, key=lambda path: path.relative_to(library).parts)


def _functions(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """The source without docstrings and the docstring's first line of every usable function."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in strings, which are going to be errors
            tree = ast.parse(text)
    except (SyntaxError, ValueError):  # a template, or an encoding that this Python has not
        return
    lines = text.split("\n")  # as ast counts them: splitlines also cuts at a form feed
    documented = [node for node in _statements(tree) if _has_docstring(node)]
    for node in documented:
        summary = None if isinstance(node, ast.ClassDef) else _summary(node)
        source = _source(node, documented, lines) if summary else None
        if source:
            yield source, summary


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every statement inside, however deep: ast.walk would go through the expressions, too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield child
            yield from _statements(child)


def _has_docstring(node: ast.AST) -> bool:
    return isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None


def _summary(node: _Function) -> str | None:
    """The docstring's first line if it is a whole sentence of a fit length."""
    first, _, rest = ast.get_docstring(node).partition("\n")
    goes_on = rest.split("\n")[0].strip() and first.rstrip()[-1:] not in ".!?:"
    summary = " ".join(first.split())
    fits = len(summary.split()) >= MIN_WORDS and len(summary) <= MAX_SUMMARY
    return summary if fits and not goes_on else None


def _source(node: _Function, documented: list[DOCUMENTED], lines: list[str]) -> str | None:
    """The function's lines but those of docstrings, its own and those inside; None if unfit."""
    start = min(part.lineno for part in (node, *node.decorator_list)) - 1
    cut: set[int] = set()
    for inner in documented:
        if node.lineno <= inner.lineno and inner.end_lineno <= node.end_lineno:
            if not (rows := _docstring_lines(inner, lines)):
                return None
            cut.update(rows)
    kept = [lines[i].rstrip() for i in range(start, node.end_lineno) if i not in cut]
    source = textwrap.dedent("\n".join(kept))
    # A text that stands left of the function keeps dedent from moving it.
    fits = len(kept) <= MAX_LINES and len(source) <= MAX_SOURCE and not source[0].isspace()
    return source if fits else None


def _docstring_lines(node: DOCUMENTED, lines: list[str]) -> range | None:
    """Which lines to cut, with a blank one behind; None if the code could not stand without them.

    It could not if other code shares the lines, if nothing else is in the body, or if what follows
    is a string too: that would be the docstring.
    """
    docstring = node.body[0]
    first, last = docstring.lineno - 1, docstring.end_lineno - 1
    before = lines[first].encode()[: docstring.col_offset]
    behind = lines[last].encode()[docstring.end_col_offset :]
    if (before + behind).strip() or len(node.body) < 2 or _is_string(node.body[1]):
        return None
    return range(first, last + 1 + (not lines[last + 1].strip()))


def _is_string(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
