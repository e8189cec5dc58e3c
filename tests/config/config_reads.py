"""Which fields of which config class the source reads: types followed through annotations, without running anything.

`reads(files, classes)` finds every `x.field` whose `x` is known to be a config: an annotated parameter, a group of RunConfig, an
attribute or a local name that was assigned one, what an annotated function returns. An attribute of an unknown `x` is no read, so a
field cannot pass because another object has an attribute of its name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

VALIDATORS = {"problems", "warnings", "world_problems", "train_problems", "__post_init__"}  # looking at a value is not using it


class Read(NamedTuple):
    """`owner.name` is read in `member` of class `reader` (None: outside of any config class)."""

    owner: str
    name: str
    reader: str | None
    member: str


def reads(files: Iterable[Path], configs: set[str]) -> set[Read]:
    """All reads of members of the classes in `configs`."""
    source = _Source([ast.parse(f.read_text(encoding="utf-8"), str(f)) for f in files])
    found = set()
    for owner, name, scope in source.attribute_reads():
        if owner in configs:
            reader = scope[0] if scope[0] in configs else None
            found.add(Read(owner, name, reader, scope[1]))
    return found


def used(found: set[Read]) -> set[tuple[str, str]]:
    """(class, member) that have an effect: read outside of the config classes, or by a member that is itself used."""
    alive = {(r.owner, r.name) for r in found if r.reader is None and r.name not in VALIDATORS}
    while True:
        more = {(r.owner, r.name) for r in found if (r.reader, r.member) in alive and r.name not in VALIDATORS} - alive
        if not more:
            return alive
        alive |= more


class _Source:
    """Types are class names; `[X]` is a collection of X, `(X, Y)` a tuple."""

    def __init__(self, trees: list[ast.Module]):
        self.trees = trees
        self.members: dict[str, dict[str, object]] = {}  # class -> attribute, or method -> what it gives
        self.returns: dict[str, object] = {}  # function -> what it gives
        self.literals = {id(t): {n.value for n in ast.walk(t) if isinstance(n, ast.Constant) and isinstance(n.value, str)} for t in trees}
        classes = [n for t in trees for n in ast.walk(t) if isinstance(n, ast.ClassDef)]
        self.members = {c.name: {} for c in classes}
        for tree in trees:
            for node in tree.body:
                if isinstance(node, ast.FunctionDef):
                    self.returns[node.name] = self._annotation(node.returns)
        for c in classes:
            for node in c.body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    self.members[c.name][node.target.id] = self._annotation(node.annotation)
                elif isinstance(node, ast.FunctionDef):
                    self.members[c.name][node.name] = self._annotation(node.returns)
        for _ in range(2):  # attributes of a class may be assigned from those of another
            for c in classes:
                for method in (n for n in c.body if isinstance(n, ast.FunctionDef)):
                    for name, kind in self._locals(method, c.name).items():
                        if name.startswith("self."):
                            self.members[c.name].setdefault(name[5:], kind)

    def attribute_reads(self) -> Iterator[tuple[str, str, tuple[str, str]]]:
        """(class, attribute, (class, function) it is read in)."""
        for tree in self.trees:
            for function, owner in _functions(tree):
                names = self._locals(function, owner)
                scope = (owner, getattr(function, "name", ""))
                derived = _fields_set_in_place(function)
                for node in _own_nodes(function):
                    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                        kind = self._infer(node.value, names)
                        if isinstance(kind, str):
                            # a field from which __post_init__ sets another one counts when that other one does
                            for member in derived or [scope[1]]:
                                yield kind, node.attr, (owner, member)
                    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
                        kind = self._infer(node.args[0], names)
                        for name in self._names_made(node.args[1], tree) if isinstance(kind, str) else ():
                            yield kind, name, scope

    def _names_made(self, node: ast.expr, tree: ast.Module) -> Iterator[str]:
        """'lr' -> lr; f"{a}_{b}" -> every pair of words of the file, joined that way."""
        if isinstance(node, ast.Constant):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            words = "|".join(re.escape(w) for w in sorted(self.literals[id(tree)]) if w.isidentifier())
            pattern = "".join(re.escape(v.value) if isinstance(v, ast.Constant) else f"(?:{words})" for v in node.values)
            yield from (f for fields in self.members.values() for f in fields if re.fullmatch(pattern, f))

    def _locals(self, function: ast.AST, owner: str) -> dict[str, object]:
        """What the names of a function (or module) are; `self.x` too."""
        names: dict[str, object] = {"self": owner, "cls": owner}
        for outer in getattr(function, "outer", []):
            names |= self._locals(outer, owner)
        if isinstance(function, ast.FunctionDef):
            for arg in [*function.args.args, *function.args.kwonlyargs]:
                if arg.annotation is not None:
                    names[arg.arg] = self._annotation(arg.annotation)
        for _ in range(2):  # a name may be used above the line that assigns it, in a loop
            for node in _own_nodes(function):
                if isinstance(node, ast.Assign):
                    for target in node.targets:
                        self._bind(target, node.value, self._infer(node.value, names), names)
                elif isinstance(node, ast.AnnAssign):
                    self._bind(node.target, None, self._annotation(node.annotation), names)
                elif isinstance(node, ast.NamedExpr):
                    self._bind(node.target, node.value, self._infer(node.value, names), names)
                elif isinstance(node, ast.For | ast.comprehension):
                    kind = self._infer(node.iter, names)
                    self._bind(node.target, None, kind[0] if isinstance(kind, list) else None, names)
        return names

    def _bind(self, target: ast.expr, value: ast.expr | None, kind: object, names: dict[str, object]) -> None:
        if isinstance(target, ast.Name) and kind is not None:
            names[target.id] = kind
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self" and kind is not None:
            names[f"self.{target.attr}"] = kind
        elif isinstance(target, ast.Tuple) and isinstance(kind, tuple) and len(kind) == len(target.elts):
            for one, its_kind in zip(target.elts, kind):
                self._bind(one, None, its_kind, names)

    def _annotation(self, node: ast.expr | None) -> object:
        if isinstance(node, ast.Constant):  # a quoted annotation, or a choice of a Literal
            return node.value if node.value in self.members else None
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            return name if name in self.members else None
        if isinstance(node, ast.BinOp):  # X | None
            return self._annotation(node.left) or self._annotation(node.right)
        if isinstance(node, ast.Subscript):
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            kinds = [self._annotation(p) for p in parts]
            if isinstance(node.value, ast.Name) and node.value.id == "tuple" and not isinstance(parts[-1], ast.Constant):
                return tuple(kinds)
            return [kinds[0]]
        return None

    def _infer(self, node: ast.expr, names: dict[str, object]) -> object:
        if isinstance(node, ast.Name):
            return names.get(node.id)
        if isinstance(node, ast.Tuple):
            return tuple(self._infer(e, names) for e in node.elts)
        if isinstance(node, ast.IfExp):
            return self._infer(node.body, names) or self._infer(node.orelse, names)
        if isinstance(node, ast.BoolOp):
            return next((k for v in node.values if (k := self._infer(v, names))), None)
        if isinstance(node, ast.Attribute):
            kind = self._infer(node.value, names)
            if isinstance(node.value, ast.Name) and node.value.id == "self" and f"self.{node.attr}" in names:
                return names[f"self.{node.attr}"]
            return self.members.get(kind, {}).get(node.attr) if isinstance(kind, str) else None
        if isinstance(node, ast.Subscript):
            kind = self._infer(node.value, names)
            return kind[0] if isinstance(kind, list) else None
        if isinstance(node, ast.Call):
            return self._call(node, names)
        return None

    def _call(self, node: ast.Call, names: dict[str, object]) -> object:
        name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name in self.members:  # a constructor
            return name
        if name == "parse_tool":  # gives instances of the classes that it is handed
            classes = node.args[0].elts if isinstance(node.args[0], ast.Tuple) else [node.args[0]]
            kinds = tuple(c.id if isinstance(c, ast.Name) else None for c in classes)
            return kinds if isinstance(node.args[0], ast.Tuple) else kinds[0]
        if name == "replace" and node.args:  # of dataclasses
            return self._infer(node.args[0], names)
        if isinstance(node.func, ast.Attribute):
            base = node.func.value
            kind = base.id if isinstance(base, ast.Name) and base.id in self.members else self._infer(base, names)
            if isinstance(kind, str):
                return self.members[kind].get(name) if kind in self.members else None
        return self.returns.get(name)


def _functions(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """The module, and each function with the class it belongs to; `outer` of a nested one are the functions around it."""

    def walk(node: ast.AST, owner: str, outer: list[ast.AST]) -> Iterator[tuple[ast.AST, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from walk(child, child.name, [])
            elif isinstance(child, ast.FunctionDef):
                child.outer = outer  # type: ignore[attr-defined]
                yield child, owner
                yield from walk(child, owner, [*outer, child])
            else:
                yield from walk(child, owner, outer)

    yield tree, ""
    yield from walk(tree, "", [])


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Nodes in order of the source, without those of functions and classes inside."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield child
            yield from _own_nodes(child)


def _fields_set_in_place(function: ast.AST) -> list[str]:
    """object.__setattr__(self, "name", ...) -> name."""
    if getattr(function, "name", "") != "__post_init__":
        return []
    calls = [n for n in ast.walk(function) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    return [c.args[1].value for c in calls if c.func.attr == "__setattr__" and isinstance(c.args[1], ast.Constant)]
