"""The house's floors: a file imports only from floors below its own. See ARCHITECTURE.md.

The imports are read from the source, those inside functions and under TYPE_CHECKING included.
"""

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "airjax"

FLOORS = {
    "types": 0,
    "gguf": 1,
    "quants": 1,
    "layers": 1,
    "sampling": 1,
    "streaming": 1,
    "text": 2,
    "models": 2,
    "plan": 3,
    "engine": 4,
    "predict": 4,
    "api": 5,
    "server": 6,
    "bench": 6,
    "experiments": 6,
    "commands": 7,
    "main": 8,
}
# The package's own front: its names are imported when they are first used.
LAZY = PACKAGE / "__init__.py"
MAY_READ_ENVIRONMENT = {"commands", "main"}
MAY_USE_ABSL = {"commands", "main"}
STDLIB_AND_NUMPY_ONLY = {"gguf": {"numpy", "gguf"}}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != LAZY)


class Import(NamedTuple):
    """One imported module, with its line."""

    module: str
    line: int


def imports(tree: ast.AST) -> list[Import]:
    """All absolute modules that a file imports; `from airjax import x` counts as `airjax.x`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide the floor; write airjax.x"
            if node.module == "airjax":
                found += [Import(f"airjax.{alias.name}", node.lineno) for alias in node.names]
            else:
                found.append(Import(node.module or "", node.lineno))
    return found


def room_of(path: Path) -> str:
    """The package or module right under airjax that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


every_file = pytest.mark.parametrize("path", FILES, ids=name)


def climbs(room: str, tree: ast.AST) -> list[str]:
    """Imports that go up, or sideways to another room of the same floor."""
    wrong = []
    for module, line in imports(tree):
        parts = module.split(".")
        if parts[0] != "airjax" or parts[1:2] == [room] or parts[1:2] == ["__version__"]:
            continue
        assert len(parts) > 1, f"line {line}: import a room of airjax, not the whole house"
        assert parts[1] in FLOORS, f"line {line}: airjax.{parts[1]} has no floor: add it to the table"
        if FLOORS[parts[1]] >= FLOORS[room]:
            wrong.append(
                f"line {line}: {room} (floor {FLOORS[room]}) imports {module} (floor {FLOORS[parts[1]]})"
            )
    return wrong


@every_file
def test_a_file_imports_only_from_floors_below(path):
    assert room_of(path) in FLOORS, f"{name(path)} has no floor: add it to the table"
    assert climbs(room_of(path), parse(path)) == []


@every_file
def test_gguf_imports_only_numpy_and_the_gguf_package(path):
    allowed = STDLIB_AND_NUMPY_ONLY.get(room_of(path))
    if allowed is not None:
        tops = {module.split(".")[0] for module, _ in imports(parse(path))}
        assert tops - set(sys.stdlib_module_names) - allowed - {"airjax"} == set()


@every_file
def test_only_the_launcher_reads_the_environment_and_flags(path):
    tree, room = parse(path), room_of(path)
    if room not in MAY_READ_ENVIRONMENT:
        reads = [
            node.lineno
            for node in ast.walk(tree)
            if (isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "environb"})
            or (isinstance(node, ast.Name) and node.id in {"environ", "getenv"})
        ]
        assert reads == []
    if room not in MAY_USE_ABSL:
        assert [line for module, line in imports(tree) if module.split(".")[0] == "absl"] == []


@every_file
def test_architectures_do_not_import_one_another(path):
    shared = {"__init__.py", "architecture.py", "decoder.py", "experts.py", "latent.py", "per_layer.py"}
    shared |= {"attending.py", "attention_check.py", "norming.py"}
    if room_of(path) == "models" and path.name not in shared:
        architectures = {
            f"airjax.models.{other.stem}" for other in path.parent.glob("*.py") if other.name not in shared
        }
        assert {module for module, _ in imports(parse(path))} & architectures == set()


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("sampling", "from airjax.quants import matmul"),
        ("sampling", "from airjax import engine"),
        ("engine", "def f():\n    import airjax.api"),
        ("types", "import airjax.plan"),
    ],
)
def test_a_wrong_import_is_seen(room, source):
    assert len(climbs(room, ast.parse(source))) == 1


@pytest.mark.parametrize("module", ["airjax", "airjax.gguf", "airjax.main"])
def test_light_modules_do_not_load_jax(module):
    code = f"import sys, {module}; sys.exit('jax' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False).returncode == 0
