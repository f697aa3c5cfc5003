"""Measure how the package is built: its sizes, its imports, where its options are named, and what one image passes.

`python benchmarks/structure.py [TREE]` prints a table of the package in TREE (by default the repository of this
script); `python benchmarks/structure.py BEFORE AFTER` prints two trees side by side. Most of it is read from the
source, without running it:

* Lines of code are those that are not blank, hold more than a comment, and belong to no docstring.
* Imports are those of modules of the package, wherever they stand, also late ones, but not those below `if
  TYPE_CHECKING` or by a computed name. `from featcli.a import b` is an import of `featcli.a.b` if that is a module,
  else of `featcli.a`. A package is what lies directly in `featcli/`, a folder or a module.
* A circle is two or more modules that import one another, directly or not. Floors are the modules of the longest chain
  of imports, in which a circle counts as one.
* A module names an option if it has an identifier of that name (a variable, attribute, keyword or parameter), or a
  string that is the name or has the flag in it. Docstrings and calls of methods (`bytes.decode()`) do not count.
* An option is declared by a parameter with a default, by an annotated field of a class, and by `Name = Annotated[...]`
  with its help at the top of a module.
* Settings are indexed by string if `["name"]` or `.get("name")` follows `settings`, an attribute of that name, or a
  variable that was given one or a part of one. Their home, a module `settings.py`, does not count.

What one image passes is traced in a run: passage.py says how.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

PACKAGE = "featcli"
OPTIONS = ["decode", "alpha", "shard_size", "pool", "batch_size"]
SHORT_FILE, LONG_FUNCTION = 60, 60
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# These tokens make no line of code.
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


class Module:
    """A file of the package: its name, text and syntax."""

    def __init__(self, path, tree):
        parts = path.relative_to(tree).with_suffix("").parts
        self.is_top = len(parts) == 2
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        self.name, self.package = ".".join(parts), ".".join(parts[:2])
        self.text = path.read_text()
        self.lines = self.text.splitlines()
        self.syntax = ast.parse(self.text)
        self.nodes = list(ast.walk(self.syntax))
        self.functions = [node for node in self.nodes if isinstance(node, FUNCTIONS)]
        documented = [node for node in self.nodes if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS))]
        self.docstrings = {node.body[0].value for node in documented if ast.get_docstring(node) is not None}

    def code_lines(self):
        found = set()
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in LAYOUT:
                found.update(range(token.start[0], token.end[0] + 1))
        for node in self.docstrings:
            found.difference_update(range(node.lineno, node.end_lineno + 1))
        return sum(bool(self.lines[number - 1].strip()) for number in found)

    def imports(self, names):
        """Return which of the modules `names` this one imports."""
        left_out, found = set(), set()
        for node in self.nodes:
            if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                left_out.update(inner for statement in node.body for inner in ast.walk(statement))
            elif isinstance(node, ast.Import) and node not in left_out:
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node not in left_out:
                assert not node.level, f"{self.name}: a relative import"
                wanted = [f"{node.module}.{alias.name}" for alias in node.names]
                found.update(name if name in names else node.module for name in wanted)
        return (found & names) - {self.name}

    @cache  # noqa: B019  (modules live as long as the script)
    def words(self):
        """Return its identifiers, and its strings that are no docstrings."""
        called = {node.func for node in self.nodes if isinstance(node, ast.Call)}
        kinds = {ast.Name: "id", ast.Attribute: "attr", ast.keyword: "arg", ast.arg: "arg"}
        named = [node for node in self.nodes if type(node) in kinds]
        strings = [node for node in self.nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        return (
            {
                getattr(node, kinds[type(node)])
                for node in named
                if type(node) is not ast.Attribute or node not in called
            },
            [node.value for node in strings if node not in self.docstrings],
        )

    def names_option(self, option):
        identifiers, strings = self.words()
        flag = re.compile(f"--{option.replace('_', '-')}(?![\\w-])")
        return option in identifiers or any(text == option or flag.search(text) for text in strings)

    def declarations(self, option):
        """Return how often an option is declared here."""
        found = []
        for node in self.nodes:
            if isinstance(node, ast.arguments):
                positional = [*node.posonlyargs, *node.args]
                found += [one.arg for one in positional[len(positional) - len(node.defaults) :]]
                found += [one.arg for one, value in zip(node.kwonlyargs, node.kw_defaults, strict=True) if value]
            elif isinstance(node, ast.ClassDef):
                found += [ast.unparse(one.target) for one in node.body if isinstance(one, ast.AnnAssign)]
        for node in self.syntax.body:
            value = ast.unparse(node.value) if isinstance(node, ast.Assign) else ""
            if re.match(r"(\w+\.)?Annotated\[.*Option\(.*help=", value, re.DOTALL):
                found += [re.sub(r"(?<=.)([A-Z])", r"_\1", one.id).lower() for one in node.targets]  # ShardSize
        return found.count(option)

    def indexed_settings(self):
        """Return the lines in which settings are indexed by a string."""
        found = set()
        for scope in [self.syntax, *self.functions]:
            variables, inside = {"settings"}, list(ast.walk(scope))
            if scope is not self.syntax:  # each function has its own variables
                for target, value in assignments(inside):
                    if isinstance(target, ast.Name) and is_settings(value, variables):
                        variables.add(target.id)
            found.update(node.lineno for node in inside if (of := indexed(node)) and is_settings(of, variables))
        return found


def assignments(nodes):
    """Yield (target, value) of each, one by one if there are several, in the order of the source."""
    given = [node for node in nodes if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None]
    for node in sorted(given, key=lambda node: node.lineno):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                yield from zip(target.elts, node.value.elts, strict=False)
            else:
                yield target, node.value


def indexed(node):
    """Return what is indexed by a string here, or None."""
    if isinstance(node, ast.Subscript):
        value, key = node.value, node.slice
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args:
        value, key = node.func.value, node.args[0]
    else:
        return None
    return value if isinstance(key, ast.Constant) and isinstance(key.value, str) else None


def is_settings(node, variables):
    """Return whether it is settings, or a part of them."""
    if of := indexed(node):
        return is_settings(of, variables)
    is_attribute = isinstance(node, ast.Attribute) and node.attr == "settings"
    return is_attribute or (isinstance(node, ast.Name) and node.id in variables)


def circles_and_floors(graph):
    """Return the circles, as sets, and the length of the longest chain."""

    def reached(start):
        found, waiting = set(), [start]
        while waiting:
            new = graph[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    @cache
    def floors(one):
        return 1 + max((floors(group[below]) for name in one for below in graph[name] - one), default=0)

    below = {name: reached(name) for name in graph}
    group = {name: frozenset({name} | {other for other in below[name] if name in below[other]}) for name in graph}
    return [one for one in set(group.values()) if len(one) > 1], max(map(floors, group.values()))


def measures(tree):
    """Yield (measure, value) in the order of the table."""
    modules = [Module(path, tree) for path in sorted((tree / PACKAGE).rglob("*.py"))]
    home = {module.name: module.package for module in modules}
    graph = {module.name: module.imports(home.keys()) for module in modules}
    packages = {package: set() for package in home.values()}
    for name, imported in graph.items():
        packages[home[name]] |= {home[other] for other in imported} - {home[name]}
    yield "modules", len(modules)
    yield "lines", f"{sum(len(module.lines) for module in modules):,}"
    yield "lines of code", f"{sum(module.code_lines() for module in modules):,}"
    yield f"files directly in {PACKAGE}/", sum(module.is_top for module in modules)
    yield f"files of {SHORT_FILE} lines or fewer", sum(len(module.lines) <= SHORT_FILE for module in modules)
    yield "packages, top-level modules among them", len(packages)
    imports = sum(map(len, graph.values()))
    yield "imports a module (in all)", f"{imports / len(modules):.2f} ({imports})"
    for what, edges in (("modules", graph), ("packages", packages)):
        circles, floors = circles_and_floors(edges)
        yield f"floors of {what}", floors
        yield f"circles of {what} ({what} in them)", f"{len(circles)} ({sum(map(len, circles))})"

    sizes = {(module.name, one): one.end_lineno - one.lineno + 1 for module in modules for one in module.functions}
    name, function = max(sizes, key=sizes.get)
    yield "longest function, lines", f"{sizes[name, function]} ({name}.{function.name})"
    yield f"functions above {LONG_FUNCTION} lines", sum(lines > LONG_FUNCTION for lines in sizes.values())
    yield "lines of a function, median", f"{statistics.median(sizes.values()):.0f}"
    yield "lines of a function, 90th percentile", f"{statistics.quantiles(sizes.values(), n=10)[-1]:.0f}"

    for what, of in (("modules that name", Module.names_option), ("places that declare", Module.declarations)):
        found = {option: sum(of(module, option) for module in modules) for option in OPTIONS}
        yield from ((f"{what} `{option}`", number) for option, number in found.items())
        yield f"{what} an option, at most", max(found.values())
    indexed_lines = [len(module.indexed_settings()) for module in modules if not module.name.endswith(".settings")]
    yield "lines (modules) with settings indexed", f"{sum(indexed_lines)} ({sum(map(bool, indexed_lines))})"

    command = [sys.executable, str(Path(__file__).with_name("passage.py")), str(tree)]
    output = subprocess.check_output(command, env={**os.environ, "PYTHONPATH": str(tree)})
    for key, what in (("whole", "the whole command passes"), ("way", "an image passes from file to record")):
        yield f"functions (modules) that {what}", "{} ({})".format(*json.loads(output)[key])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trees", metavar="TREE", nargs="*", type=Path, default=[Path(__file__).parents[1]])
    chosen = parser.parse_args()
    trees = [tree.resolve() for tree in chosen.trees]
    if len(trees) > 2 or not all((tree / PACKAGE).is_dir() for tree in trees):
        parser.error(f"one tree or two, each with a folder {PACKAGE}/")
    columns = [dict(measures(tree)) for tree in trees]
    print("| measure |", " | ".join(["value"] if len(trees) == 1 else ["before", "after"]), "|")
    print("| --- |", " | ".join("---" for _ in trees), "|")
    for measure in columns[0]:
        print(f"| {measure} |", " | ".join(str(column[measure]) for column in columns), "|")


if __name__ == "__main__":
    main()
