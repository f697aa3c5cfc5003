"""Check the layout of the code: which package may import which, no circles, and a page that lists every module."""

import ast
import re
from pathlib import Path

import featcli

PACKAGE = Path(featcli.__file__).parent
REPOSITORY = PACKAGE.parent

# The list begins with the command line. A package imports itself and those below it, late imports included.
PACKAGES = [
    "cli",  # commands made from the spec; the one place that catches
    "extraction",  # a run as a whole
    "views",  # what people look at
    "export",  # other files
    "workers",  # processes, Ray
    "run",  # what a worker runs
    "reading",  # open_dump
    "dump",  # the folder
    "backbones",  # checkpoint -> Backbone
    "pixels",  # file -> pixels
    "inputs",  # what was named -> images
    "system",  # the machine
    "spec",  # what can be asked
    "events",  # what a run reports
    "errors",
]
LONGEST_FUNCTION = 60
PUBLIC = [
    "Backbone",
    "CheckpointError",
    "ConflictError",
    "DamagedError",
    "DumpReader",
    "FeatcliError",
    "IncompleteError",
    "MachineError",
    "Report",
    "StageArray",
    "UsageError",
    "WorkerError",
    "extract",
    "load_backbone",
    "open_dump",
    "progress_bar",
    "replay",
]


def modules():
    """Return name below the package -> path. A package has the name of its folder."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path, known):
    """Return the modules of the package that a file imports anywhere, except those only for type checkers."""
    waiting = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "featcli":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            below = name.removeprefix("featcli.") if name.startswith("featcli.") else ""
            while below and below not in known:
                below = below.rpartition(".")[0]
            if below:
                yield below


def test_packages_import_what_is_below_them():
    """A module imports only what stands below it, also late and for its types."""
    known, place = modules(), {name: number for number, name in enumerate(PACKAGES)}
    assert {name.partition(".")[0] for name in known} - {"", "__main__"} == set(PACKAGES)
    wrong = []
    for name, path in known.items():
        if name in ("", "__main__"):  # they may import everything
            continue
        text = re.findall(r"(?:from|import) featcli\.(\w+)", path.read_text())  # also imports for type checkers
        wrong += [(name, below) for below in text if place[below] < place[name.partition(".")[0]]]
    assert wrong == []


def test_there_are_no_circles():
    """No module needs itself by way of others, late imports included."""
    known = modules()
    left = {name: {below for below in imported(path, known) if below != name} for name, path in known.items()}
    del left[""]  # it imports late, by name
    while left:
        free = {name for name, needs in left.items() if not needs & left.keys()}
        assert free, f"in or behind a circle: {sorted(left)}"
        for name in free:
            del left[name]


def test_packages_say_what_comes_in_and_what_goes_out():
    """The first line of each package says what comes in and what goes out."""
    for name in PACKAGES[:-2]:
        text = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text())) or ""
        assert "come in" in text or "comes in" in text, name
        assert "go out" in text or "goes out" in text, name


def test_the_architecture_page_has_a_line_for_every_module():
    """docs/architecture.md has every module in its place in the tree, and none that is gone."""
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    listed, above = [], []
    for line in page[page.index("featcli/\n") : page.index("\ntests/")].splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        above[depth:] = [name]
        if not name.endswith("/"):
            listed.append("".join(above).removeprefix("featcli/"))
    there = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".csv", ".html")]
    assert sorted(listed) == sorted(str(path.relative_to(PACKAGE)) for path in there if path.name != "__init__.py")
    assert list(dict.fromkeys(name.partition("/")[0].removesuffix(".py") for name in listed))[:-1] == PACKAGES


def test_no_function_is_long():
    """Every function can be read without turning a page."""
    long = {
        f"{name}.{node.name}": lines
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and (lines := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION
    }
    assert long == {}


def test_settings_are_read_in_one_place():
    """Only dump/settings.py reads the choices of a run by their names as text."""
    wrong = [
        f"{name}:{number}: {line.strip()}"
        for name, path in modules().items()
        if name != "dump.settings"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"\bsettings(\[|\.get\()|settings\.(backbone|preprocessing)(\[|\.get\()", line)
    ]
    assert wrong == []


def test_an_option_is_declared_once():
    """Flags and help of an option stand in spec/ alone."""
    outside = [
        name
        for name, path in modules().items()
        if not name.startswith(("spec", "cli.signature", "cli.commands"))
        and re.search(r"\b(typer\.)?Option\(", path.read_text())
    ]
    assert outside == []


def test_public_names():
    """`import featcli` offers exactly these names, and all of them can be imported."""
    assert featcli.__all__ == PUBLIC
    assert all(callable(getattr(featcli, name)) for name in PUBLIC)
    assert callable(featcli.extract)  # no module of that name hides it


def test_tests_are_promises():
    """Every test says in one line what it guarantees."""
    silent = [
        f"{path.name}: {node.name}"
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and not ast.get_docstring(node)
    ]
    assert silent == []
