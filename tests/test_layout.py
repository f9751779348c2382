"""Modules depend on each other in one direction only, in what they import for types, too."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import halfbyte

SOURCE = Path(halfbyte.__file__).parent


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imported(tree: ast.AST) -> Iterator[str]:
    """Yields what is imported anywhere: below functions and `if TYPE_CHECKING`, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:  # a module of the package, or a name in it
                path = SOURCE.parent / node.module.replace(".", "/") / alias.name
                is_module = path.with_suffix(".py").exists() or (path / "__init__.py").exists()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def test_no_modules_import_each_other_in_a_circle() -> None:
    files = {name_of(path): path for path in SOURCE.rglob("*.py")}
    graph = {name: {*imported(ast.parse(path.read_text()))} for name, path in files.items()}
    assert "halfbyte.train.run" in graph["halfbyte"]  # which imports it for types alone
    TopologicalSorter(graph).prepare()  # a CycleError names the modules of a circle
