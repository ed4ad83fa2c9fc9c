"""Measure the house: files to open, files with one importer, comments, `Any`, tab completion.

    python experiments/house/measure.py                 # compress_jax
    python experiments/house/measure.py PACKAGE_FOLDER  # any other package

Signals, not verdicts. README.md in this folder has the numbers before and after.
"""

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2] / "compress_jax"
SEEDS = ("gptq", "smooth", "shrink", "awq", "sparsegpt", "integer")


class Package:
    """The modules of a package: their source, their syntax trees, and what each imports."""

    def __init__(self, root: Path) -> None:
        """Read every module."""
        self.root = root.resolve()
        self.paths = {self.name_of(path): path for path in sorted(self.root.rglob("*.py"))}
        self.texts = {name: path.read_text() for name, path in self.paths.items()}
        self.trees = {name: ast.parse(text) for name, text in self.texts.items()}
        self.exports = dict(self._exports())
        self.imports = {name: set(self._imports(name)) for name in self.paths}

    def name_of(self, path: Path) -> str:
        """Return the dotted name of a module."""
        parts = path.relative_to(self.root.parent).with_suffix("").parts
        return ".".join(parts).removesuffix(".__init__")

    def is_door(self, name: str) -> bool:
        """Return whether a module is the ``__init__`` of a folder."""
        return self.paths[name].name == "__init__.py"

    def _statements(self, name: str) -> Iterator[ast.ImportFrom]:
        for node in ast.walk(self.trees[name]):
            if isinstance(node, ast.ImportFrom) and node.module:
                if node.module.split(".")[0] == self.root.name:
                    yield node

    def _exports(self) -> Iterator[tuple[tuple[str, str], str]]:
        for name in filter(self.is_door, self.paths):
            for node in self._statements(name):
                for alias in node.names:
                    yield (name, alias.name), node.module or ""

    def _imports(self, name: str) -> Iterator[str]:
        for node in self._statements(name):
            for alias in node.names:
                if found := self.home(node.module or "", alias.name):
                    yield found

    def home(self, module: str, name: str) -> str | None:
        """Return the module that holds a name, through the doors that pass it on."""
        for _ in range(6):
            for each in (f"{module}.{name}", module):
                if each in self.paths and not self.is_door(each):
                    return each
            if (module, name) not in self.exports:
                return None
            module = self.exports[module, name]
        return None

    def opened(self, name: str) -> set[str]:
        """Return the modules that a reader of one must open, beside core."""
        found, queue = {name}, [name]
        while queue:
            new = self.imports[queue.pop()] - found
            found |= new
            queue += new
        return {each for each in found if not each.startswith(f"{self.root.name}.core")}


def documented(tree: ast.AST) -> set[int]:
    """Return the lines of all docstrings."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            first = node.body[0] if node.body else None
            if ast.get_docstring(node) and first is not None:
                lines |= set(range(first.lineno, (first.end_lineno or 0) + 1))
    return lines


def code_lines(text: str, tree: ast.AST) -> list[str]:
    """Return the lines that are neither blank, comment nor docstring."""
    skipped = documented(tree)
    lines = enumerate(text.splitlines(), 1)
    return [x for i, x in lines if i not in skipped and x.strip() and x.strip()[0] != "#"]


def comments(text: str) -> int:
    """Count the comments that are no instruction to a tool."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    own = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return sum(not re.match(r"#\s*(noqa|type:|pyright)", each) for each in own)


def packed(trees: Iterable[ast.AST]) -> float:
    """Return the share of assignments that pack several into one statement."""
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    pairs = [isinstance(n.targets[0], ast.Tuple) and isinstance(n.value, ast.Tuple) for n in nodes]
    return sum(pairs) / max(len(pairs), 1)


def leaked(package: str) -> list[str]:
    """Return the modules that tab completion shows beside what may be called."""
    code = (
        f"import importlib, types, {package} as p\n"
        "for name in p.__all__:\n"
        "    value = getattr(p, name)\n"
        "    if isinstance(value, types.ModuleType):\n"
        "        for each in dir(value):\n"
        "            own = getattr(value, each)\n"
        "            listed = each in getattr(value, '__all__', [])\n"
        "            if isinstance(own, types.ModuleType) and not listed and each[0] != '_':\n"
        "                print(f'{name}.{each}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def report(package: Package) -> Iterator[str]:
    """Yield the measures, one a line."""
    files = [name for name in package.paths if not package.is_door(name)]
    users: dict[str, set[str]] = defaultdict(set)
    for name in files:
        for each in package.imports[name]:
            users[each].add(name)
    doors = [name for name in package.paths if package.is_door(name)]
    public = {each for door in doors for each in package.imports[door]}
    alone = [name for name in files if len(users[name]) == 1 and name not in public]
    code = [line for n in package.paths for line in code_lines(package.texts[n], package.trees[n])]
    thousand = max(len(code), 1) / 1000
    said = sum(map(comments, package.texts.values()))
    unknown = sum(len(re.findall(r"\bAny\b", line)) for line in code)
    folders = Counter(str(package.paths[n].parent.relative_to(package.root.parent)) for n in files)
    width = sorted(map(len, code))[int(0.9 * (len(code) - 1))]
    yield f"{len(files)} files, {len(code):,} code lines, 90 % of them within {width} columns"
    for seed in SEEDS:
        for name in files:
            if name.rpartition(".")[2].lstrip("_") == seed and len(package.opened(name)) > 1:
                yield f"files open for {seed}, beside core: {len(package.opened(name))}"
    yield f"files with one importer, not exported: {len(alone)}"
    yield f"per 1,000 code lines: {said / thousand:.0f} comments, {unknown / thousand:.0f} Any"
    yield f"assignments that pack tuples: {packed(package.trees.values()):.1%}"
    yield "largest folders: " + ", ".join(f"{name} {n}" for name, n in folders.most_common(4))


def main() -> None:
    """Print the measures of a package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT)
    folder = parser.parse_args().folder
    for line in report(Package(folder)):
        print(line)
    if folder == ROOT:
        print(f"helper modules in tab completion: {len(leaked('compress_jax'))}")


if __name__ == "__main__":
    main()
