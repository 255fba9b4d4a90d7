"""Methods declare what they need: nothing outside methods/ decides by a method's name or class."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from recall_jax.methods.method import Method
from recall_jax.methods.registry import METHODS

PACKAGE = Path(__file__).parent.parent / "recall_jax"

# What is decided by a name that is a method's too, or in truth a method's, and why it may be.
EXCEPTIONS = {
    ("experiments/continual/presets.py", "dict"): "strategies are named after the methods they use",
    ("experiments/ablation/recipe.py", "compare"): "an ablation is of RECALL's own choices",
    ("experiments/ablation/plan.py", "isinstance"): "an ablation is of RECALL's own choices",
    ("report/ablation_page.py", "dict"): "the average is a run that an ablation compares with",
    ("models/rope.py", "case"): "linear is a kind of rope scaling",
    ("training/optimizer.py", "dict"): "linear is a learning rate schedule",
    ("similarity/centred.py", "compare"): "linear is a kernel of CKA",
}


def classes() -> set[str]:
    """The names of the parameter classes of all methods but the shared base class."""
    found = {
        schema.__name__
        for method in METHODS.values()
        for schema in (method.parameters, method.model_parameters)
    }
    return found - {"Parameters"}


def is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value in METHODS


def holds_name(node: ast.AST) -> bool:
    """Whether an operand is a name, or a tuple, list or set with one."""
    parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return any(map(is_name, parts))


def decisions(tree: ast.AST, known: set[str]) -> Iterator[tuple[str, int]]:
    """The kind and line of everything that decides by a method's name or class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(map(holds_name, [node.left, *node.comparators])):
            yield "compare", node.lineno
        elif isinstance(node, ast.MatchValue) and is_name(node.value):
            yield "case", node.value.lineno
        elif isinstance(node, ast.MatchClass) and ast.unparse(node.cls).split(".")[-1] in known:
            yield "case", node.cls.lineno
        elif isinstance(node, ast.Dict) and any(
            key is not None and is_name(key) for key in node.keys
        ):
            yield "dict", node.lineno
        elif isinstance(node, ast.Subscript) and is_name(node.slice):
            yield "subscript", node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            named = {name.split(".")[-1] for name in map(ast.unparse, ast.walk(node.args[1]))}
            if named & known:
                yield "isinstance", node.lineno


def test_nothing_outside_of_methods_decides_by_a_methods_name_or_class():
    known = classes()
    assert "RecallParameters" in known and "TaskVectorParameters" in known
    offenders, used = [], set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith("methods/"):
            continue
        for kind, line in decisions(ast.parse(path.read_text(encoding="utf-8")), known):
            if (name, kind) in EXCEPTIONS:
                used.add((name, kind))
            else:
                offenders.append(f"{name}, line {line}: {kind}")
    assert not offenders
    assert used == set(EXCEPTIONS), "an exception that is none any more"


def test_no_template_decides_by_a_methods_name():
    templates = sorted(PACKAGE.rglob("*.jinja"))
    assert templates
    quoted = re.compile(rf"""["']({"|".join(METHODS)})["']""")
    assert [path.name for path in templates if quoted.search(path.read_text("utf-8"))] == []


def test_the_search_finds_each_kind_of_decision():
    code = """
if name == "ties" or kind in ("linear", "x"): ...
match rule:
    case "opcm": ...
    case RecallParameters(): ...
table = {"dare_ties": 1}
table["recall"]
isinstance(parameters, (LinearParameters, int))
"""
    found = [kind for kind, _ in decisions(ast.parse(code), classes())]
    assert sorted(found) == [
        "case",
        "case",
        "compare",
        "compare",
        "dict",
        "isinstance",
        "subscript",
    ]


def test_no_field_of_a_method_stands_in_for_its_name():
    texts = [field.name for field in fields(Method) if field.type in (str, "str")]
    assert texts == ["equation"]  # which reports print
