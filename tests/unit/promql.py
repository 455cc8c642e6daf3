"""A strict parser of the part of PromQL that dashboard and alerts use, which follows labels through an expression.

What Prometheus would refuse is refused, and so is what it would answer with nothing, or with nonsense: metrics and
labels that nobody exposes, counters that are not read as rates, sides of an operator whose labels cannot match.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

OF_PROMETHEUS = frozenset({"job", "instance"})
"""Labels that every scraped sample has."""
TOKEN = re.compile(
    r"""\s*(?:(?P<duration>\d+(?:ms|[smhdwy])|\$__\w+)
    |(?P<number>\d+(?:\.\d+)?)
    |(?P<name>[a-zA-Z_][\w:]*)
    |"(?P<string>(?:[^"\\]|\\.)*)"
    |(?P<sign>=~|!~|!=|==|>=|<=|[-+*/<>=(){}\[\],]))""",
    re.VERBOSE,
)
RATES = {"rate", "increase"}
AGGREGATIONS = {"sum", "avg", "min", "max", "count"}
COMPARISONS = {"==", "!=", "<", ">", "<=", ">="}
LEVELS = ({"or"}, {"and", "unless"}, COMPARISONS, {"+", "-"}, {"*", "/"})
"""Binary operators, those that bind least first."""
SETS = {"and", "or", "unless"}


class PromQLError(ValueError):
    """An expression that Prometheus would refuse, or that cannot find what it asks for."""


@dataclass(frozen=True)
class Value:
    """What a part of an expression yields. kind: scalar, vector or range; labels: of its samples."""

    kind: str
    labels: frozenset[str] = frozenset()
    is_counter: bool = False


@dataclass
class Parser:
    """One expression. metrics: labels by name of what is exposed; variables: what a `$` may name."""

    text: str
    metrics: Mapping[str, Collection[str]]
    variables: Collection[str] = ()
    _tokens: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        at, text = 0, self.text.rstrip()
        while at < len(text):
            found = TOKEN.match(text, at)
            if found is None or found.lastgroup is None:
                raise PromQLError(f"{text[at:]!r} is no PromQL")
            self._tokens.append((found.lastgroup, found[found.lastgroup]))
            at = found.end()

    def parse(self) -> Value:
        """Labels of what the expression yields; raises PromQLError."""
        found = self._binary(0)
        self._end()
        self._vector(found, "the expression")
        return found

    def parse_label_values(self) -> None:
        """Accept Grafana's `label_values(metric{…}, label)`; raises PromQLError for anything else."""
        self._expect("label_values", "(")
        name = self._peek()
        found = self._selector()
        self._expect(",")
        self._known([self._take("name")], found.labels, name)
        self._expect(")")
        self._end()

    def _end(self) -> None:
        if self._tokens:
            raise PromQLError(f"{self._peek()!r} is left over")

    def _peek(self) -> str:
        return self._tokens[0][1] if self._tokens else ""

    def _take(self, kind: str) -> str:
        if not self._tokens or self._tokens[0][0] != kind:
            raise PromQLError(f"{self._peek() or 'the end'!r} where a {kind} should be")
        return self._tokens.pop(0)[1]

    def _expect(self, *texts: str) -> None:
        for text in texts:
            if not self._tokens or self._tokens[0][0] == "string" or self._tokens[0][1] != text:
                raise PromQLError(f"{self._peek() or 'the end'!r} where {text!r} should be")
            self._tokens.pop(0)

    def _takes(self, text: str) -> bool:
        found = bool(self._tokens) and self._tokens[0][0] != "string" and self._tokens[0][1] == text
        if found:
            self._tokens.pop(0)
        return found

    def _binary(self, level: int) -> Value:
        if level == len(LEVELS):
            return self._operand()
        left = self._binary(level + 1)
        while self._tokens and self._tokens[0][0] != "string" and self._peek() in LEVELS[level]:
            operator = self._tokens.pop(0)[1]
            on = self._labels() if self._takes("on") else None
            is_many = self._takes("group_left")
            added = self._labels() if is_many and self._peek() == "(" else frozenset()
            left = self._join(operator, left, self._binary(level + 1), on, is_many, added)
        return left

    def _join(
        self,
        operator: str,
        left: Value,
        right: Value,
        on: frozenset[str] | None,
        is_many: bool,
        added: frozenset[str],
    ) -> Value:
        """What two operands yield. on, added: the labels of on() and group_left(); is_many: whether it is there."""
        for side in (left, right):
            self._vector(side, f"a side of {operator!r}")
        if "scalar" in (left.kind, right.kind):
            if operator in SETS or on is not None or is_many:
                raise PromQLError(f"{operator!r} of a scalar has no labels to match")
            return left if right.kind == "scalar" else right
        if on is None:
            if left.labels != right.labels:
                raise PromQLError(f"{operator!r} never matches {set(left.labels)} with {set(right.labels)}")
            return left
        self._known(on, left.labels & right.labels, f"both sides of {operator!r}")
        if operator in SETS:
            if is_many:
                raise PromQLError(f"{operator!r} has no group_left")
            return left
        if right.labels != on or (left.labels != on and not is_many):
            raise PromQLError(f"several samples of {set(left.labels)} and {set(right.labels)} have the same {set(on)}")
        self._known(added, right.labels, "group_left")
        return replace(left, labels=left.labels | added)

    def _operand(self) -> Value:
        kind = self._tokens[0][0] if self._tokens else ""
        if kind == "number":
            self._tokens.pop(0)
            return Value("scalar")
        if self._takes("("):
            found = self._binary(0)
            self._expect(")")
            return found
        following = self._tokens[1][1] if len(self._tokens) > 1 else ""
        if kind == "name" and (following == "(" or self._peek() in AGGREGATIONS):
            return self._call(self._take("name"))
        return self._selector()

    def _call(self, name: str) -> Value:
        if name in RATES:
            self._expect("(")
            found = self._binary(0)
            self._expect(")")
            if found.kind != "range" or not found.is_counter:
                raise PromQLError(f"{name}() of what is no range of a counter")
            return Value("vector", found.labels)
        if name not in AGGREGATIONS:
            raise PromQLError(f"{name}() is not known")
        by = self._labels() if self._takes("by") else None
        self._expect("(")
        found = self._binary(0)
        self._expect(")")
        if by is None:
            by = self._labels() if self._takes("by") else frozenset()
        self._vector(found, name)
        if found.kind == "scalar":
            raise PromQLError(f"{name}() of a scalar")
        self._known(by, found.labels, f"what {name}() gets")
        return Value("vector", by)

    def _selector(self) -> Value:
        name = self._take("name")
        if name not in self.metrics:
            raise PromQLError(f"nobody exposes {name}")
        labels = frozenset(self.metrics[name]) | OF_PROMETHEUS
        if self._takes("{"):
            while not self._takes("}"):
                self._known([self._take("name")], labels, name)
                operator = self._take("sign")
                if operator not in ("=", "!=", "=~", "!~"):
                    raise PromQLError(f"{operator!r} does not match labels")
                self._check_string(self._take("string"), is_pattern="~" in operator)
                if self._peek() != "}":
                    self._expect(",")
        kind = "vector"
        if self._takes("["):
            duration = self._take("duration")
            if duration.startswith("$") and duration[1:] not in self.variables:
                raise PromQLError(f"{duration} is not declared")
            self._expect("]")
            kind = "range"
        return Value(kind, labels, name.endswith("_total"))

    def _check_string(self, text: str, is_pattern: bool) -> None:
        for name in re.findall(r"\$\{?(\w+)", text):
            if name not in self.variables:
                raise PromQLError(f"${name} is not declared")
        if is_pattern:
            try:
                re.compile(re.sub(r"\$\{?\w+\}?", "variable", text))
            except re.error as error:
                raise PromQLError(f"{text!r} is no pattern: {error}") from None
        elif "$" in text:
            raise PromQLError(f"{text!r}: a variable of several values is a pattern")

    def _labels(self) -> frozenset[str]:
        """A list of labels in parentheses."""
        found: set[str] = set()
        self._expect("(")
        while not self._takes(")"):
            found.add(self._take("name"))
            if self._peek() != ")":
                self._expect(",")
        return frozenset(found)

    def _known(self, wanted: Collection[str], labels: Collection[str], what: str) -> None:
        if unknown := set(wanted) - set(labels):
            raise PromQLError(f"{what} has no label {', '.join(sorted(unknown))}")

    def _vector(self, value: Value, what: str) -> None:
        """Refuse a range, and a counter that is not read as a rate."""
        if value.kind == "range":
            raise PromQLError(f"{what} is a range")
        if value.is_counter:
            raise PromQLError(f"{what} is a counter that only rate() and increase() can read")
