"""The house rules that no linter knows: imports, names, examples, errors, file sizes."""

import ast
import builtins
import importlib
import inspect
import re
from pathlib import Path

import pytest

import compress_jax

ROOT = Path(compress_jax.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
FLOORS = [
    {"core"},
    {"trace"},
    {"layerwise"},
    {"quantize", "prune", "cluster", "lowrank", "distill"},  # neighbours do not know each other
    {"data"},
    {"models"},
    {"tasks"},
    {"train"},
    {"export"},
    {"report"},
    {"search"},
    {"cli", "__main__"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
FORBIDDEN = re.compile(
    r"jax\._src|pickle|cloudpickle|dill|tensorflow(?!_datasets)|keras|torch|jax\.experimental\.maps"
)
ids = [str(path.relative_to(ROOT)) for path in FILES]
every_file = pytest.mark.parametrize("path", FILES, ids=ids)


def imports(path: Path) -> set[str]:
    """Return the full names of what a file imports, relative imports made absolute."""
    package = ["compress_jax", *path.relative_to(ROOT).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def part(module: str) -> str:
    """Return the subpackage a full name of ours belongs to, "" for the top."""
    return (module.split(".") + [""])[1]


def test_the_walk_sees_the_house():
    assert {"core", "quantize", "prune", "cluster", "lowrank"} <= {
        path.relative_to(ROOT).parts[0] for path in FILES
    }
    assert "compress_jax.core.layout.Layout" in imports(ROOT / "core/packed.py")


@pytest.mark.wide(245)
@every_file
def test_imports_point_one_way(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if own == "__init__":  # the table of contents may name everything
        return
    assert own in FLOOR, f"{own} has no floor in the house; put it in FLOORS"
    for module in sorted(name for name in imports(path) if name.split(".")[0] == "compress_jax"):
        other = part(module)
        assert other in FLOOR, (
            f"{path} imports {module}: take it from its own module, not from the top of the package"
        )
        assert other == own or FLOOR[other] < FLOOR[own], (
            f"{path} is in {own} and must not import {module}"
        )


# It says how a config's functions travel to grain's workers, and reads nothing.
REGISTERS = {"config.py": {"cloudpickle"}}


@every_file
def test_nothing_private_unsafe_or_foreign_is_imported(path):
    allowed = REGISTERS.get(path.name, set())
    bad = sorted(name for name in imports(path) if FORBIDDEN.match(name) and name not in allowed)
    assert not bad, f"{path} imports {bad}"
    assert "jax._src" not in path.read_text()


@pytest.mark.parametrize(
    "name", ["tensorflow", "tensorflow.io", "jax._src.core", "pickle", "keras.layers"]
)
def test_the_rule_would_catch_it(name):
    assert FORBIDDEN.match(name) and not FORBIDDEN.match("tensorflow_datasets.core")


def code_lines(path: Path) -> int:
    """Count the lines of code: a thorough docstring is no second idea."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(path.read_text().splitlines(), 1)
    return sum(
        i not in documented and bool(line.strip()) and not line.strip().startswith("#")
        for i, line in lines
    )


@pytest.mark.wide(240)
@every_file
def test_a_file_is_one_idea(path):
    lines = code_lines(path)
    assert lines <= 400, (
        f"{path} has {lines} lines of code; a file that needs more than 400 is two ideas"
    )


@every_file
def test_modules_and_their_public_definitions_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} has no docstring"
    nodes = [
        node
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"
    ]
    silent = [node.name for node in nodes if not ast.get_docstring(node)]
    assert not silent, f"{path}: no docstring on {silent}"


PACKAGES = sorted({path.parent for path in FILES if path.name == "__init__.py"})
dotted = [".".join(["compress_jax", *path.relative_to(ROOT).parts]) for path in PACKAGES]


@pytest.mark.parametrize("name", dotted)
def test_every_public_function_has_an_example(name):
    package = importlib.import_module(name)
    exported = {each: getattr(package, each) for each in getattr(package, "__all__", [])}
    functions = {each: value for each, value in exported.items() if inspect.isfunction(value)}
    modules = {value.__module__.split(".")[0] for value in functions.values()}
    assert modules <= {"compress_jax"}
    without = [each for each, value in functions.items() if ">>>" not in (value.__doc__ or "")]
    assert not without, f"{name}: no Example in the docstring of {without}"
    silent = [
        each for each, value in exported.items() if inspect.isclass(value) and not value.__doc__
    ]
    assert not silent, f"{name}: no docstring on {silent}"


def test_packages_list_their_contents():
    lists = {name: len(getattr(importlib.import_module(name), "__all__", [])) for name in dotted}
    assert lists["compress_jax"] >= 10 and lists["compress_jax.core"] >= 20
    assert not [name for name, n in lists.items() if not n and name.split(".")[-1] in FLOOR]


PUBLIC = [name for name in dotted if "._" not in name]


@pytest.mark.parametrize("name", PUBLIC)
def test_tab_completion_shows_what_may_be_called(name):
    package = importlib.import_module(name)
    assert dir(package) == sorted(package.__all__)
    modules = [each for each in dir(package) if inspect.ismodule(getattr(package, each))]
    rooms = {
        "compress_jax": FLOOR,
        "compress_jax.trace": {"reducers"},
        "compress_jax.prune": {"importance"},
        "compress_jax.models": {"pretrained"},
        "compress_jax.train": {"evaluate"},
    }
    assert set(modules) <= set(rooms.get(name, ()))


@pytest.mark.parametrize("name", PUBLIC)
def test_no_module_takes_the_name_of_a_function(name):
    package = importlib.import_module(name)
    folder = Path(package.__file__).parent
    shadowed = [each for each in package.__all__ if (folder / f"{each}.py").exists()]
    assert all(inspect.ismodule(getattr(package, each)) for each in shadowed), shadowed


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_are_what_a_user_would_write(name):
    package = importlib.import_module(name)
    inside = re.compile(r">>> (from compress_jax|import compress_jax(?! as cj))")
    docs = {each: inspect.getdoc(getattr(package, each)) or "" for each in package.__all__}
    wrong = [each for each in docs if inside.search(docs[each])]
    assert not wrong, f"{name}: examples that import more than `compress_jax as cj`: {wrong}"


# What Python's own protocols ask for, and what can only be a mistake of ours.
PROTOCOLS = {"__getattr__": {"AttributeError"}, "__getitem__": {"KeyError", "IndexError"}}
OURS = {"NotImplementedError", "AssertionError"}


@pytest.mark.wide(165)
@every_file
def test_what_is_raised_is_ours(path):
    """Whoever catches CompressError catches everything that is raised on purpose."""
    builtin = {name for name, value in vars(builtins).items() if isinstance(value, type)}
    builtin = {name for name in builtin if issubclass(getattr(builtins, name), Exception)}
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    innermost = {id(node): each.name for each in functions for node in ast.walk(each)}
    for node in {id(n): n for each in functions for n in ast.walk(each)}.values():
        raised = node.exc if isinstance(node, ast.Raise) else None
        raised = raised.func if isinstance(raised, ast.Call) else raised
        if isinstance(raised, ast.Name) and raised.id in builtin:
            allowed = PROTOCOLS.get(innermost[id(node)], set()) | OURS
            assert raised.id in allowed, f"{path}:{node.lineno} raises {raised.id}"
