"""The shape of the package: imports run one way, modules stay short, and what is public is documented."""

import ast
from pathlib import Path

import pytest

import lipjax

PACKAGE = Path(lipjax.__file__).parent
# A folder imports from the ones before it, and modules at the top from nothing.
FOLDERS = ("networks", "reading", "norms", "bounds", "certification", "training", "experiments")
LEAVES = ("errors", "files", "floating_point")
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
MAX_LINES = 350


def imports_of(path):
    """The modules of lipjax that a file imports, at any depth of it, as names without the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name.removeprefix("lipjax.") for name in names}
    return found & MODULES.keys()


GRAPH = {name: imports_of(path) for name, path in MODULES.items()}


def folder_of(name):
    return name.split(".")[0]


def test_every_folder_has_its_place_in_the_order():
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == set(FOLDERS)
    assert {name for name in MODULES if "." not in name} == set(LEAVES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    folder = folder_of(name)
    allowed = {*LEAVES, *FOLDERS[: FOLDERS.index(folder) + 1]} if folder in FOLDERS else set()
    wrong = {target for target in GRAPH[name] if folder_of(target) not in allowed}
    assert not wrong, f"{name} imports {sorted(wrong)}, of folders that come after its own"


def test_imports_are_acyclic():
    left = {name: set(targets) for name, targets in GRAPH.items()}
    assert any(left.values())
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these modules import each other in a circle: {sorted(left)}"


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_documented_and_without_star_imports(name):
    tree = ast.parse(MODULES[name].read_text())
    assert ast.get_docstring(tree)
    stars = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and any(a.name == "*" for a in n.names)]
    assert not stars


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_short(name):
    assert len(MODULES[name].read_text().splitlines()) <= MAX_LINES, f"{name} is too long"


@pytest.mark.parametrize("name", lipjax.__all__)
def test_every_public_name_exists_and_has_a_docstring(name):
    value = getattr(lipjax, name)
    if name == "__version__":
        assert value
        return
    doc = value.__doc__ or ""
    assert doc.strip()
    assert not doc.startswith(f"{name}("), "this is the signature that dataclasses write, not a docstring"


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_results_do_not_name_a_folder_of_the_machine_that_made_them():
    root = Path(__file__).parents[1]
    files = [
        path for path in (root / "results").rglob("*") if path.suffix in (".txt", ".json", ".csv", ".md", ".jsonl")
    ]
    assert len(files) > 10
    for path in files:
        text = path.read_text()
        assert str(root) not in text, path
        assert "successful to" not in text, path  # how Orbax ends the note that it leaves beside a checkpoint
