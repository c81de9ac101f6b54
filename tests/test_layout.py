"""The layout of the package: imports go down a list of levels, and never up or in circles."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent

LEVELS = (
    ("__init__", "__main__"),
    ("train", "harvest", "intervene", "doctor"),
    ("explore", "interpret", "export", "experiments"),
    ("plan", "evaluate"),
    ("features",),
    ("training",),
    ("properties", "interventions", "hub"),
    ("metrics",),
    ("interop", "runs"),
    ("sources",),
    ("cache",),
    ("model",),
    ("data",),
    ("commandline",),
    ("config",),
    ("registry", "system", "embedded"),
    ("errors",),
)
"""Files and folders of `kronsae`, from the top down. What is on one line may not import another."""

LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name."""
    found = {}
    for path in sorted((ROOT / "kronsae").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


FACE = "kronsae.model.familiar"
"""Methods of an SAE that hand over to the rest of the package, which they import when called."""


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of the package that a module imports, anywhere in its text."""
    names: set[str] = set()
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in tree.body if module == FACE else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    found = set()
    for name in names:
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        if name and name != module:
            found.add(name)
    return frozenset(found)


def room(module: str) -> str:
    """The file or folder of `kronsae` that a module is, or is in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_every_file_and_folder_has_a_level():
    assert {room(module) for module in MODULES} - {"__main__"} == set(LEVEL) - {"__main__"}


def test_imports_go_down():
    upward = [
        f"{module} imports {other}"
        for module in MODULES
        for other in imports(module)
        if room(module) != room(other) and LEVEL[room(module)] >= LEVEL[room(other)]
    ]
    assert not upward


def test_no_import_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join((*path, module))}"
        if module not in done:
            for other in imports(module):
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_few_files_are_flat():
    assert len(list((ROOT / "kronsae").glob("*.py"))) <= 12


def test_longest_chain_of_rooms():
    below = {
        name: {room(other) for m in MODULES if room(m) == name for other in imports(m)} - {name}
        for name in LEVEL
    }

    def depth(name: str) -> int:
        return 1 + max((depth(other) for other in below[name]), default=0)

    assert max(depth(name) for name in LEVEL if name != "__init__") <= 11
