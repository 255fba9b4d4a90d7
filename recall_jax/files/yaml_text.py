"""Parse YAML from outside like `yaml.safe_load`, within limits, with InputError for every fault.

Unlike `safe_load`, it reads 1e-3 as a number and refuses a key given twice.
"""

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from recall_jax.errors import InputError, brief, reading, shown

MAX_BYTES = 4_000_000
_MAX_NODES = 100_000
_MAX_DEPTH = 100
_MAX_DIGITS = 100
_MANY = f"more than {_MAX_NODES:,} values, repeated aliases included"
_DEEP = f"nested more than {_MAX_DEPTH} levels deep"
_TAG = "tag:yaml.org,2002:"


def parse_documents(text: str, where: str) -> list[Any]:
    """Return the documents in a YAML text without the empty ones; errors name it `where`.

    Raises InputError with the line and column if it is not YAML of plain values, gives a key twice,
    contains itself, or exceeds 100,000 values (repeated aliases included), 100 levels or a number
    of 100 digits.
    """
    with reading(where):
        try:
            return [each for each in yaml.load_all(text, _Loader) if each is not None]
        except yaml.MarkedYAMLError as error:
            said = brief(", ".join(filter(None, (error.context, error.problem))))
            if mark := error.problem_mark or error.context_mark:
                said += f" (line {mark.line + 1}, column {mark.column + 1})"
            raise InputError(f"{where} is not YAML: {said}") from error
        except yaml.YAMLError as error:
            raise InputError(f"{where} is not YAML: {brief(error)}") from error


class _Loader(yaml.SafeLoader):
    """Enforce the limits while nodes are composed; an alias counts as much as its target."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._open = 0  # levels open at present
        self._sizes: dict[yaml.Node, tuple[int, int]] = {}  # values in each node, and its levels
        self._flat: set[yaml.Node] = set()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        self._open += 1
        _refuse(self._open > _MAX_DEPTH, _DEEP, mark)
        _refuse(len(self._sizes) >= _MAX_NODES, _MANY, mark)
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._open -= 1
        if node is None:
            return None
        if is_alias:
            _refuse(node not in self._sizes, "an alias inside the value that it refers to", mark)
        else:
            self._sizes[node] = self._size(node)
        return node

    def _size(self, node: yaml.Node) -> tuple[int, int]:
        """Return the number of values and levels in a node; ConstructorError over the limits."""
        if isinstance(node, yaml.ScalarNode):
            is_number = node.tag in (f"{_TAG}int", f"{_TAG}float")
            digits = len(node.value) if is_number else 0
            _refuse(digits > _MAX_DIGITS, f"a number of {digits} digits", node.start_mark)
            return 1, 1
        inner = [
            self._sizes[part]
            for entry in node.value
            for part in (entry if isinstance(entry, tuple) else (entry,))
        ]
        count = 1 + sum(each for each, _ in inner)
        depth = 1 + max((levels for _, levels in inner), default=0)
        _refuse(count > _MAX_NODES, _MANY, node.start_mark)
        _refuse(depth > _MAX_DEPTH, _DEEP, node.start_mark)
        return count, depth

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Expand `<<` once, after a check that the mapping itself gives no key twice."""
        if node in self._flat:
            return
        self._flat.add(node)
        keys = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == f"{_TAG}merge":
                continue
            is_plain = key_node.tag == f"{_TAG}value"  # "=", which becomes text only later
            key = key_node.value if is_plain else self.construct_object(key_node)
            _refuse(key in keys, f"the key {shown(key)} is given twice", key_node.start_mark)
            keys.add(key)
        super().flatten_mapping(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct as yaml does, but give the position of a text of the wrong kind ("!!int z")."""
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            kind = node.tag.removeprefix(_TAG)
            said = f"{shown(node.value)} is no {kind}"
            raise ConstructorError(None, None, said, node.start_mark) from error


_Loader.add_implicit_resolver(
    f"{_TAG}float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _refuse(wrong: bool, what: str, mark: Any) -> None:
    if wrong:
        raise ConstructorError(None, None, what, mark)
