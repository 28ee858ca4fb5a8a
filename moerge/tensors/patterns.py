"""Regular expressions of an adapter config against module names: the same answers as `re`, in bounded work.

PEFT matches `target_modules`, `rank_pattern` and others with Python's backtracking engine, where a hostile pattern
takes time exponential in the name. Only yes or no is needed here, so a pattern is compiled to a small program and
every pair (instruction, position) is visited at most once: work is at most pattern times name (the method of Russ
Cox, "Regular Expression Matching: the Virtual Machine Approach", 2009, with a visited set). On top, one Budget counts
the steps of a whole config. Lookaround is supported; what cannot be decided so (back references, atomic and
possessive groups) is refused by name.
"""

import re
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from moerge.errors import ConfigInvalid

PLAIN = re.compile(r"[A-Za-z0-9_.\-]*")
_MAX_PROGRAM = 50_000
_MAX_PATTERN = 20_000
_LIST_NAMES = "List the module names instead of a pattern."
# Instructions: ("char", mask) ("fork", targets) ("at", test) ("look", behind, negate, width, program) ("match",)
Instruction = tuple[Any, ...]
Program = list[Instruction]


class Budget:
    """Steps that matching the patterns of one config may take together; the default is about a second's worth."""

    def __init__(self, steps: int = 250_000) -> None:
        self.left = steps

    def spend(self, steps: int) -> None:
        """Take steps away; raises ConfigInvalid when none are left."""
        self.left -= steps
        if self.left < 0:
            raise ConfigInvalid(
                "The patterns in adapter_config.json take too long to match.", pointer="/target_modules", rule="J3",
                met="more steps than allowed", wanted="patterns that are decided quickly", remedy=_LIST_NAMES,
            )  # fmt: skip


def matches(pattern: str, text: str, budget: Budget, *, whole: bool, pointer: str = "/target_modules") -> bool:
    """Whether `re.fullmatch` (or, unless `whole`, `re.match`) would find `pattern` in an ASCII text of one line.

    Raises ConfigInvalid for a pattern that is not a regular expression, is not supported, or spends the budget.
    """
    if PLAIN.fullmatch(pattern):
        budget.spend(1)
        return _plain(pattern, text[: len(pattern)]) and (not whole or len(text) == len(pattern))
    program, automaton = _compile(pattern, pointer)
    if automaton is not None and (found := automaton.matches(text, budget, whole=whole)) is not None:
        return found
    return _run(program, text, 0, len(text) if whole else None, budget)


class KeyTable:
    """The keys of a rank_pattern or alpha_pattern, asked for the one that fits a module.

    PEFT writes one plain name per module there when ranks were redistributed, so plain names are looked up instead of
    being tried one by one. A dot in a name stands for any character, as in `re`; so names lie in one dict per set of
    dot positions, and a module's name is looked up with dots put there.
    """

    def __init__(self, keys: Collection[str], *, pointer: str) -> None:
        self._pointer = pointer
        self._expressions: list[tuple[int, str]] = []
        self._names: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        for index, key in enumerate(keys):
            if PLAIN.fullmatch(key):
                dots = tuple(at for at, character in enumerate(key) if character == ".")
                self._names.setdefault(len(key), {}).setdefault(dots, {})[key] = index
            else:
                self._expressions.append((index, rf"(.*\.)?({key})$"))
        self._keys = list(keys)

    def key_for(self, module: str, budget: Budget) -> str:
        """The first key that matches the module's name or its last parts, else the name itself (PEFT's own rule)."""
        first = len(self._keys)
        for tail in _tails(module):
            for dots, names in self._names.get(len(tail), {}).items():
                budget.spend(1)
                first = min(first, names.get(_dotted(tail, dots), first))
        for index, expression in self._expressions:
            if index > first:
                break
            if matches(expression, module, budget, whole=False, pointer=self._pointer):
                return self._keys[index]
        return self._keys[first] if first < len(self._keys) else module


def _tails(module: str) -> Iterable[str]:
    """The name, and what follows each of its dots."""
    yield module
    start = module.find(".")
    while start >= 0:
        yield module[start + 1 :]
        start = module.find(".", start + 1)


def _dotted(text: str, positions: tuple[int, ...]) -> str:
    characters = list(text)
    for position in positions:
        characters[position] = "."
    return "".join(characters)


def _plain(pattern: str, text: str) -> bool:
    """Equal, where a dot of the pattern stands for any character."""
    if pattern == text:
        return True
    return len(pattern) == len(text) and "." in pattern and all(
        a in (b, ".") for a, b in zip(pattern, text, strict=True)
    )  # fmt: skip


@lru_cache(maxsize=64)
def _compile(pattern: str, pointer: str) -> "tuple[Program, _Automaton | None]":
    if len(pattern) > _MAX_PATTERN:
        raise _invalid(pattern, pointer, f"it has {len(pattern)} characters; at most {_MAX_PATTERN} are read")
    try:
        re.compile(pattern)
        tree = _parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise _invalid(pattern, pointer, str(error)) from error
    try:
        program = _Compiler().sequence(tree, tree.state.flags)
    except (_Unsupported, RecursionError) as error:
        raise _invalid(pattern, pointer, str(error)) from error
    program.append(("match",))
    return program, _Automaton(program) if _is_simple(program) else None


def _invalid(pattern: str, pointer: str, why: str) -> ConfigInvalid:
    return ConfigInvalid(
        f"A pattern cannot be used: {why}.", pointer=pointer, met=pattern[:200], rule="J3", remedy=_LIST_NAMES,
        wanted="a regular expression without back references, of moderate size",
    )  # fmt: skip


class _Unsupported(ValueError):
    """A construct whose answer depends on more than the set of matched texts."""


class _Compiler:
    """Parse tree to program; jumps inside a piece of program are relative, so that pieces can be moved."""

    def __init__(self) -> None:
        self._size = 0

    def sequence(self, nodes: Iterable[tuple[Any, Any]], flags: int) -> Program:
        program: Program = []
        for operation, argument in nodes:
            piece = self._node(str(operation), argument, flags)
            self._size += len(piece)
            if self._size > _MAX_PROGRAM:
                raise _Unsupported("it is too large once its repetitions are written out")
            program += piece
        return program

    def _node(self, operation: str, argument: Any, flags: int) -> Program:
        make: dict[str, Callable[[Any, int], Program]] = {
            "LITERAL": lambda code, flags: [("char", _mask(re.escape(chr(code)), flags))],
            "NOT_LITERAL": lambda code, flags: [("char", _mask(f"[^{_escape(code)}]", flags))],
            "ANY": lambda _, flags: [("char", _mask(".", flags))],
            "IN": lambda items, flags: [("char", _mask(_charset(items), flags))],
            "BRANCH": self._branch,
            "SUBPATTERN": lambda group, flags: self.sequence(group[3], (flags | group[1]) & ~group[2]),
            "MAX_REPEAT": self._repeat,
            "MIN_REPEAT": self._repeat,
            "AT": lambda where, _: [("at", str(where))],
            "ASSERT": lambda look, flags: self._look(look, flags, negate=False),
            "ASSERT_NOT": lambda look, flags: self._look(look, flags, negate=True),
            "FAILURE": lambda _, __: [("char", 0)],
        }
        if operation not in make:
            raise _Unsupported(f"{operation.lower().replace('_', ' ')} is not supported")
        return make[operation](argument, flags)

    def _branch(self, argument: Any, flags: int) -> Program:
        pieces = [self.sequence(nodes, flags) for nodes in argument[1]]
        starts, position = [], 1
        for piece in pieces:
            starts.append(position)
            position += len(piece) + 1
        program: Program = [("fork", tuple(starts))]
        for start, piece in zip(starts, pieces, strict=True):
            program += [*piece, ("fork", (position - start - len(piece),))]
        return program

    def _repeat(self, argument: Any, flags: int) -> Program:
        least, most, nodes = argument
        program: Program = []
        for _ in range(least):
            program += self.sequence(nodes, flags)
        if str(most) == "MAXREPEAT":
            piece = self.sequence(nodes, flags)
            return [*program, ("fork", (1, len(piece) + 2)), *piece, ("fork", (-len(piece) - 1,))]
        pieces = [self.sequence(nodes, flags) for _ in range(most - least)]
        left = sum(len(piece) + 1 for piece in pieces)
        for piece in pieces:
            program += [("fork", (1, left)), *piece]
            left -= len(piece) + 1
        return program

    def _look(self, argument: Any, flags: int, *, negate: bool) -> Program:
        direction, nodes = argument
        behind = direction < 0
        width = nodes.getwidth()[0] if behind else 0
        return [("look", behind, negate, width, [*self.sequence(nodes, flags), ("match",)])]


def _charset(items: list[tuple[Any, Any]]) -> str:
    written = []
    for operation, argument in items:
        kind = str(operation)
        if kind == "NEGATE":
            written.append("^")
        elif kind == "LITERAL":
            written.append(_escape(argument))
        elif kind == "RANGE":
            written.append(f"{_escape(argument[0])}-{_escape(argument[1])}")
        else:
            written.append(_CATEGORIES[str(argument)])
    return f"[{''.join(written)}]"


_CATEGORIES = {
    "CATEGORY_DIGIT": r"\d",
    "CATEGORY_NOT_DIGIT": r"\D",
    "CATEGORY_SPACE": r"\s",
    "CATEGORY_NOT_SPACE": r"\S",
    "CATEGORY_WORD": r"\w",
    "CATEGORY_NOT_WORD": r"\W",
}
_ASCII = "".join(map(chr, range(128)))


def _escape(code: int) -> str:
    return f"\\U{code:08x}"


@lru_cache(maxsize=4096)
def _mask(piece: str, flags: int) -> int:
    """Which ASCII characters a one-character pattern matches, as bits; `re` itself is asked, so case rules agree."""
    one = re.compile(piece, flags & (re.IGNORECASE | re.ASCII | re.DOTALL))
    return sum(1 << code for code, character in enumerate(_ASCII) if one.fullmatch(character))


def _run(program: Program, text: str, start: int, end: int | None, budget: Budget) -> bool:
    """Whether a path through the program leads from position `start` to "match" (at `end`, where one is given)."""
    stack = [(0, start)]
    visited = {(0, start)}
    while stack:
        counter, position = stack.pop()
        budget.spend(1)
        instruction = program[counter]
        if instruction[0] == "match" and (end is None or position == end):
            return True
        for step in _steps(instruction, counter, text, position, budget):
            if step not in visited:
                visited.add(step)
                stack.append(step)
    return False


def _steps(
    instruction: Instruction, counter: int, text: str, position: int, budget: Budget
) -> Iterable[tuple[int, int]]:
    """Where one instruction leads from one position: (instruction, position) pairs."""
    operation = instruction[0]
    if operation == "fork":
        return [(counter + jump, position) for jump in instruction[1]]
    if operation == "char":
        passes, width = position < len(text) and instruction[1] >> ord(text[position]) & 1, 1
    elif operation == "at":
        passes, width = _at(instruction[1], text, position), 0
    else:
        passes, width = operation == "look" and _look(instruction, text, position, budget), 0
    return [(counter + 1, position + width)] if passes else []


def _look(instruction: Instruction, text: str, position: int, budget: Budget) -> bool:
    _, behind, negate, width, program = instruction
    if behind:
        found = position >= width and _run(program, text, position - width, position, budget)
    else:
        found = _run(program, text, position, None, budget)
    return bool(found != negate)


class _Automaton:
    """The same program as a deterministic automaton built as texts need it: one look-up per character.

    Adapters of mixture-of-experts models have tens of thousands of module names that share most of their parts.
    """

    _MAX_ENTRIES = 20_000  # of all remembered sets together, so that hostile patterns cannot fill memory

    def __init__(self, program: Program) -> None:
        self._program = program
        self._entries = 0
        self._next: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self._closed: dict[tuple[frozenset[int], bool, bool], frozenset[int]] = {}

    def matches(self, text: str, budget: Budget, *, whole: bool) -> bool | None:
        """As `_run` from position 0; None when the pattern needs more memory than it may have."""
        budget.spend(1 + len(text) // 16)
        state = frozenset({0})
        match = len(self._program) - 1
        for position, character in enumerate(text):
            if not whole and match in self._closure(state, budget, at_start=position == 0, at_end=False):
                return True
            step = self._next.get((state, character))
            # The first state never comes back, so what is remembered for it always means the start, where ^ holds.
            if step is None:
                if self._entries > self._MAX_ENTRIES:
                    return None
                closed = self._closure(state, budget, at_start=position == 0, at_end=False)
                bit = ord(character)
                program = self._program
                step = frozenset(at + 1 for at in closed if program[at][0] == "char" and program[at][1] >> bit & 1)
                self._entries += 1 + len(step)
                self._next[state, character] = step
            if not step:
                return False
            state = step
        return match in self._closure(state, budget, at_start=not text, at_end=True)

    def _closure(self, state: frozenset[int], budget: Budget, *, at_start: bool, at_end: bool) -> frozenset[int]:
        key = (state, at_start, at_end)
        found = self._closed.get(key)
        if found is None:
            stack, seen = list(state), set(state)
            while stack:
                counter = stack.pop()
                operation, *arguments = self._program[counter]
                jumps: Iterable[int] = ()
                if operation == "fork":
                    jumps = arguments[0]
                elif operation == "at":
                    jumps = (1,) if (at_start if arguments[0] in _BEGINNINGS else at_end) else ()
                for jump in jumps:
                    if counter + jump not in seen:
                        seen.add(counter + jump)
                        stack.append(counter + jump)
            budget.spend(len(seen))
            found = frozenset(seen)
            if self._entries <= self._MAX_ENTRIES:
                self._entries += 1 + len(found)
                self._closed[key] = found
        return found


def _is_simple(program: Program) -> bool:
    return all(
        operation != "look" and (operation != "at" or arguments[0] in _BEGINNINGS | _ENDS)
        for operation, *arguments in program
    )


_BEGINNINGS = {"AT_BEGINNING", "AT_BEGINNING_STRING"}
_ENDS = {"AT_END", "AT_END_STRING"}
# Python before 3.14 says that an empty text has no place that is not a boundary.
_EMPTY_HAS_NO_BOUNDARY = re.match(r"\B", "") is None


def _at(where: str, text: str, position: int) -> bool:
    if where in _BEGINNINGS:
        return position == 0
    if where in _ENDS:
        return position == len(text)
    if not text and _EMPTY_HAS_NO_BOUNDARY:
        return False
    before = position > 0 and (text[position - 1].isalnum() or text[position - 1] == "_")
    after = position < len(text) and (text[position].isalnum() or text[position] == "_")
    return (before != after) == (where == "AT_BOUNDARY")
