"""Imports run one way: face → checkpoints → models → ops → kernels."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the lowest floor to the highest: a module imports from its own floor and from those below.
FLOORS = (
    {"fp8jax.device", "fp8jax.no_gradient", "fp8jax.exact_division"},
    {"fp8jax.pallas_kernels"},
    {"fp8jax.schemes", "fp8jax.qarray", "fp8jax.quantization_config", "fp8jax.explicit_sharding"},
    {"fp8jax.ops"},
    {"fp8jax.models"},
    {"fp8jax.checkpoints"},
    {
        "fp8jax.batches",
        "fp8jax.compiled_model",
        "fp8jax.explanation",
        "fp8jax.generation",
        "fp8jax.generation_config",
        "fp8jax.language_model",
        "fp8jax.loading",
        "fp8jax.results",
        "fp8jax.sampling",
        "fp8jax.tokenizer",
    },
    {"fp8jax"},  # what `import fp8jax` offers
    {"fp8jax.evaluation"},
    {"fp8jax.devtools"},
)
FILES = sorted(
    file
    for folder in ("fp8jax", "models", "pallas_kernels")
    for file in (ROOT / folder).rglob("*.py")
    if not file.is_relative_to(ROOT / "fp8jax" / "models")
    and not file.is_relative_to(ROOT / "fp8jax" / "pallas_kernels")
)


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts if parts[0] == "fp8jax" else ("fp8jax", *parts))
    return name.removesuffix(".__init__")


def floor_of(module: str) -> int:
    """The floor of the longest known name that a module is or lies in."""
    known = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    while module not in known:
        module = module.rpartition(".")[0]
    return known[module]


def imported_by(source: str) -> list[tuple[int, str]]:
    """(line, module of this package) of every import that runs when a module or function does."""
    tree, found = ast.parse(source), []
    type_checking = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in type_checking:
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from fp8jax import ops` imports fp8jax.ops, another line a name or a module of it.
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in found if name.partition(".")[0] == "fp8jax"]


def against_the_direction(module: str, source: str) -> list[str]:
    own = floor_of(module)
    return [
        f"{module}, line {line}: imports {name} from a higher floor"
        for line, name in imported_by(source)
        if floor_of(name) > own
    ]


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_run_one_way(file):
    assert against_the_direction(module_of(file), file.read_text(encoding="utf-8")) == []


def test_every_module_has_a_floor_of_its_own():
    """A new file at the top of the package has to be put somewhere."""
    rooms = {room for floor in FLOORS for room in floor}
    top = {module_of(file) for file in FILES if module_of(file).count(".") == 1}
    assert top - rooms == set()


@pytest.mark.parametrize(
    "module, line, faults",
    [
        ("fp8jax.pallas_kernels.quantize", "from fp8jax.schemes import Scheme", 1),
        ("fp8jax.ops.matmul", "from fp8jax.models import layers", 1),
        ("fp8jax.models.layers", "from fp8jax import loading", 1),
        ("fp8jax.models.layers", "def late():\n    import fp8jax.checkpoints.folder", 1),
        ("fp8jax.models.layers", "from fp8jax import ops", 0),
        ("fp8jax.evaluation.metrics", "import fp8jax", 0),
        ("fp8jax.loading", "if TYPE_CHECKING:\n    from fp8jax.evaluation import metrics", 0),
    ],
)
def test_a_planted_import_is_named(module, line, faults):
    found = against_the_direction(module, line)
    assert len(found) == faults
    assert all(module in fault for fault in found)
