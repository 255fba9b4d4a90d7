"""The house: data flows one way, the pure rooms open no file, heavy packages load when needed."""

import ast
import re
from collections import defaultdict
from collections.abc import Container, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "recall_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A module imports from rooms that stand before its own, and from its own.
ORDER = [
    "errors",
    "foreign",
    "files",
    "checkpoint",
    "models",
    "parallel",
    "inputs",
    "representations",
    "similarity",
    "generation",
    "engine",
    "methods",
    "recipes",
    "training",
    "evaluation",
    "cost",
    "integrations",
    "report",
    "jobs",
    "experiments",
    "cli",
]
PURE_ROOMS = ["models", "representations", "similarity", "generation", "methods", "cost"]
FILE_MODULES = {"os", "io", "pathlib", "shutil", "tempfile", "mmap", "glob", "subprocess"}
FILE_CALLS = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "memmap", "fromfile"}
HEAVY = {"torch", "transformers", "peft", "sklearn", "datasets", "safetensors"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(node: ast.AST) -> Iterator[str]:
    """Full names of the modules that an import statement may load."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are written in full"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [name for node in ast.walk(tree) for name in imported(node)]


def imports_when_loaded(path: Path) -> list[str]:
    """Of statements that run when the module is imported: those in no function."""
    found: list[str] = []
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        found += imported(node)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_imports_go_one_way():
    offenders = []
    for path in MODULES:
        room = room_of(path)
        if room == "__init__":
            continue  # it names all rooms, lazily; tests/cli holds it to importing none
        assert room in ORDER, f"{room} has no place in the order of the house"
        for name in imports(path):
            if not name.startswith("recall_jax.") or name == "recall_jax.__version__":
                continue
            other = name.split(".")[1]
            assert other in ORDER, f"{name_of(path)} imports {name}"
            if ORDER.index(other) > ORDER.index(room):
                offenders.append(f"{name_of(path)} imports {name}, right of it")
    assert offenders == []


def test_heavy_packages_load_only_where_they_are_used():
    loaded = {
        name_of(path): {name.split(".")[0] for name in imports_when_loaded(path)} & HEAVY
        for path in MODULES
    }
    assert {path: packages for path, packages in loaded.items() if packages} == {}


@pytest.mark.parametrize("room", PURE_ROOMS)
def test_pure_rooms_open_no_file(room):
    paths = sorted((PACKAGE / room).rglob("*.py"))
    assert paths
    for path in paths:
        top = {name.split(".")[0] for name in imports(path)}
        assert not top & FILE_MODULES, name_of(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func).split(".")[-1]
                assert called not in FILE_CALLS, f"{name_of(path)}, line {node.lineno}"


def test_nothing_lies_loose():
    loose = {path.name for path in PACKAGE.glob("*.py")}
    assert loose == {"__init__.py", "errors.py"}
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {*rooms, "errors"} == set(ORDER)


def test_the_document_lists_the_rooms_in_their_order():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)/?` \|", text, re.MULTILINE) == ORDER
    pure = re.search(r"((?:`\w+`(?:,| and)? ?)+)are pure", text.replace("\n", " "))
    assert pure is not None and re.findall(r"\w+(?=`)", pure[1]) == PURE_ROOMS
    for name in re.findall(r"`(\w+/[\w/]*\.py|\w+/[\w/]*/)`", text):
        assert (PACKAGE / name).exists() or (PACKAGE.parent / name).exists(), name


def test_no_module_needs_itself():
    """Whatever the order of two modules in one room, the house can be read from the ground up."""
    paths = {module_of(path): path for path in MODULES if path.parent != PACKAGE}
    needed = {
        module: {home_of(name, paths) for name in imports(path)} - {None}
        for module, path in paths.items()
    }
    list(TopologicalSorter(needed).static_order())  # CycleError, which names them


def module_of(path: Path) -> str:
    """The full name by which a module is imported, a package by that of its folder."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


def home_of(name: str, modules: Container[str]) -> str | None:
    """The module that an imported name is, or is in; None where it is none of these."""
    return next((home for home in (name, name.rpartition(".")[0]) if home in modules), None)


def test_checkpoints_are_read_without_jax():
    for path in sorted((PACKAGE / "checkpoint").glob("*.py")):
        top = {name.split(".")[0] for name in imports(path)}
        if path.name != "orbax.py":
            assert not top & {"jax", "jaxlib", "flax", "orbax"}, name_of(path)


def test_no_checkpoint_can_run_code():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            where = f"{name_of(path)}, line {node.lineno}"
            assert keywords.get("trust_remote_code", "False") == "False", where
            assert keywords.get("allow_pickle", "False") == "False", where
            assert called not in {"eval", "exec", "pickle.load", "pickle.loads"}, where
            if called == "torch.load":
                assert keywords.get("weights_only") == "True", where


# A function may share its name with another where a caller wants the same of both.
SHARED_FUNCTIONS = {
    **dict.fromkeys(
        (
            "ablate",
            "continual",
            "convert",
            "evaluate",
            "finetune",
            "gather",
            "merge",
            "select",
            "verify",
            "extract",
        ),
        "a command, and the job that it runs; `extract` also does that on trees in memory",
    ),
    **dict.fromkeys(
        (
            "linear_cka",
            "mutual_knn",
            "paired_rbf",
            "procrustes_distance",
            "rbf_cka",
            "row_cosine",
            "rsa",
        ),
        "a measure, and its counterpart in plain numpy that benchmarks compare it with",
    ),
    **dict.fromkeys(
        (
            "prepare_context",
            "run_block",
            "run_block_with_grams",
            "run_embed",
            "run_head",
            "run_head_with_grams",
        ),
        "one step of a forward, on a device and over a mesh",
    ),
    "architecture": "every family reads its config by the function of this name",
    "main": "the entry of a program",
    "prepare": "a merge method makes its rule by the function of this name; a job has it made",
}


def test_one_name_means_one_thing():
    """No public class shares its name, and a function only with reason."""
    homes: dict[str, list[str]] = defaultdict(list)
    classes, functions = set(), set()
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                (classes if isinstance(node, ast.ClassDef) else functions).add(node.name)
                homes[node.name].append(name_of(path))
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for name in (target.id for target in targets if isinstance(target, ast.Name)):
                    homes[name].append(name_of(path))
    shared = {name for name, paths in homes.items() if len(paths) > 1 and name[0] != "_"}
    assert {name: homes[name] for name in shared & classes} == {}
    unexpected = (shared & functions) ^ set(SHARED_FUNCTIONS)
    assert {name: homes[name] for name in unexpected} == {}
