import ast
from pathlib import Path

import featcli

PACKAGE = Path(featcli.__file__).parent

# Reading order, from the command line down. A module may import only from rows below its own; modules in one
# row know nothing of each other. A module without a row fails until someone gives it one.
ROWS = [
    {"__main__"},
    {"cli"},
    {"dump_commands"},
    {"commands"},
    {"recompute", "extraction", "tables", "export", "survey"},
    {"engines.local", "engines.processes", "engines.ray"},
    {"engines.ray_worker"},
    {"engines.worker", "engines.queue", "engines.progress", "engines"},
    {"shard_runner"},
    {"show"},
    {"dump_pictures", "stage_view", "output_file"},
    {"forward"},
    {"planning"},
    {"transfers", "loading"},
    {"tuning"},
    {"options"},
    {"exports"},
    {"exports.hdf5", "exports.safetensors", "exports.npy", "exports.jsonl", "exports.parquet"},
    {"exports.arrays"},
    {"exports.content"},
    {"inspection", "models", "verify", "target"},
    {"manifest", "reader"},
    {"torch_dataset"},
    {"stage_array"},
    {"open_shards", "row_index"},
    {"config"},
    {"dump", "batches"},
    {"records", "sizes", "committed"},
    {"plan"},
    {"writers.shard"},
    {"writers.direct", "writers"},
    {"writers.hdf5", "writers.safetensors"},
    {"writers.sealed", "writers.rows"},
    {"writers.layout", "writers.background", "writers.publish", "writers.lock"},
    {"pooling", "parts"},
    {"backbones", "backbones.recorded"},
    {"backbones.from_transformers"},
    {"backbones.auto_backbone", "backbones.hidden_states", "backbones.timm_inside"},
    {"backbones.transformers_source"},
    {"backbones.from_timm"},
    {"backbones.checkpoint", "backbones.image_processor", "backbones.timm_transform"},
    {"backbones.input_size"},
    {"backbones.source"},
    {"backbones.folding"},
    {"backbones.backbone"},
    {"backbones.execution"},
    {"backbones.weights", "backbones.fitting"},
    {"backbones.stages", "backbones.hub", "backbones.torchvision_operators", "backbones.replay"},
    {"images"},
    {"inputs", "upright"},
    {"tars", "remote"},
    {"image_list"},
    {"files"},
    {"decoding"},
    {"device", "progress"},
    {"pace"},
    {"machine"},
    {"errors"},
]
# checkpoint.py decides which source to import, when it is needed; a dataset is of the reader that makes it.
LATE = {
    ("backbones.checkpoint", "backbones.from_timm"),
    ("backbones.checkpoint", "backbones.from_transformers"),
    ("torch_dataset", "reader"),
}
ROW = {module: number for number, row in enumerate(ROWS) for module in row}
PUBLIC = [
    "CheckpointError",
    "ConflictError",
    "DamagedError",
    "FeatcliError",
    "IncompleteError",
    "MachineError",
    "UsageError",
    "extract",
    "load_backbone",
    "open_dump",
    "replay",
]


def modules():
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported(path):
    """The modules of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("featcli"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("featcli.")]
        for name in names:
            below = name.removeprefix("featcli.")
            while below and below not in ROW:
                below = below.rpartition(".")[0]
            if below:
                yield below


def test_every_module_has_a_row():
    """Each module has its place in the order, and each place a module."""
    assert {name for name, _ in modules() if name} == set(ROW)


def test_imports_point_down():
    """The flow is one way: nothing imports what stands above it or beside it."""
    wrong = [
        (name, below)
        for name, path in modules()
        if name
        for below in imported(path)
        if ROW[below] <= ROW[name] and (name, below) not in LATE
    ]
    assert wrong == []


def test_the_readme_has_a_line_for_every_module():
    """A newcomer finds every module in the README's tree."""
    readme = (PACKAGE.parent / "README.md").read_text()
    missing = [path.name for name, path in modules() if path.name != "__init__.py" and f" {path.name} " not in readme]
    assert missing == []


def test_public_names():
    """What `import featcli` offers is this, all of it importable, and nothing else by accident."""
    assert featcli.__all__ == PUBLIC
    assert all(callable(getattr(featcli, name)) for name in PUBLIC)
    assert callable(featcli.extract)  # never shadowed by a module of that name


def test_tests_are_promises():
    """Every test says in one line what it guarantees."""
    silent = [
        f"{path.name}: {node.name}"
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and not ast.get_docstring(node)
    ]
    assert silent == []


def test_sizes():
    """No module grows past what can be read in one sitting."""
    long = {str(p.relative_to(PACKAGE)): n for _, p in modules() if (n := len(p.read_text().splitlines())) > 330}
    assert long == {}


def test_tables_of_types_agree():
    """A precision or a stored type is known everywhere or nowhere."""
    import torch

    from featcli.backbones.execution import LAYOUTS, PRECISIONS
    from featcli.dump.formats import hdf5, layout, safetensors
    from featcli.dump.formats.rows import NUMPY_TYPES
    from featcli.spec.words import DTYPES

    assert all(isinstance(getattr(torch, name), torch.dtype) for name in (*DTYPES, *PRECISIONS.values()))
    assert all(isinstance(getattr(torch, name), torch.memory_format) for name in LAYOUTS.values())
    stored = {*DTYPES, "uint8", "uint32"}
    for table in (layout.ITEM_BYTES, safetensors.NAMES, hdf5._types(), NUMPY_TYPES):
        assert set(table) == stored
