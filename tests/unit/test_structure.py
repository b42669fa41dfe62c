"""The house stands as docs/architecture.md says: imports flow one way, files stay small, public names are explained."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("megatron_m3", "launch", "data_tools", "ckpt_convert")
FLOW = ["platform", "config", "manifest", "tokenizer", "ops", "references", "retrieval", "model", "memory", "data",
        "training", "inference", "evaluation"]
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
ALL_PYTHON = FILES + sorted((ROOT / "tests").rglob("*.py"))


def imports(tree: ast.Module) -> Iterator[str]:
    """Every module that a file imports, at any depth; ``from a import b`` counts as both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write absolute imports"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def against_the_flow(folder: str, tree: ast.Module) -> list[str]:
    """Imports of a file in ``megatron_m3/folder`` that it may not have."""
    wrong = []
    for name in imports(tree):
        parts = name.split(".")
        if parts[0] in ("launch", "data_tools", "ckpt_convert", "tests"):
            wrong.append(name)
        elif parts[0] == "megatron_m3" and len(parts) > 1 and parts[1] in FLOW:
            later = FLOW.index(parts[1]) > FLOW.index(folder)
            strangers = {folder, parts[1]} == {"training", "inference"}
            if later or strangers or (folder == "training" and parts[1:3] == ["memory", "bank"]):
                wrong.append(name)
    return wrong


def inside(path: Path) -> str:
    """The folder of megatron_m3 in which a file lies, or nothing."""
    parts = path.relative_to(ROOT).parts
    return parts[1] if parts[0] == "megatron_m3" and len(parts) > 2 else ""


def test_every_folder_has_its_place_in_the_flow() -> None:
    folders = {inside(path) for path in FILES} - {""}
    assert folders <= set(FLOW)


@pytest.mark.parametrize("folder", FLOW)
def test_imports_flow_one_way(folder: str) -> None:
    wrong = {str(path.relative_to(ROOT)): names for path, tree in TREES.items() if inside(path) == folder
             and (names := against_the_flow(folder, tree))}
    assert not wrong


@pytest.mark.parametrize(("folder", "line"), [
    ("config", "from megatron_m3.model import Rope"),
    ("training", "from megatron_m3.memory.bank import MemoryBank"),
    ("training", "from megatron_m3.inference import Engine"),
    ("inference", "import megatron_m3.training.loop"),
    ("model", "import launch.m3"),
])
def test_a_wrong_import_is_seen(folder: str, line: str) -> None:
    assert against_the_flow(folder, ast.parse(f"def late():\n    {line}\n"))


def test_only_platform_asks_whether_cuda_is_there() -> None:
    asking = [str(path) for path in FILES if inside(path) != "platform" and "cuda.is_available" in path.read_text()]
    assert not asking


def test_no_file_is_too_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in ALL_PYTHON}
    assert not {name: length for name, length in lengths.items() if length > 400}


def test_public_names_have_docstrings() -> None:
    bare = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, tree in TREES.items()
        for name, node in public_definitions(tree)
        if not ast.get_docstring(node)
    ]
    assert not bare


def public_definitions(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Public functions and classes of a module, and public methods of its public classes."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public_definitions(child, f"{child.name}.")
