"""The doctor's findings, each with a suggested fix."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """ok: works as requested; note: works, but maybe not as expected; fails: the server would not start."""

    OK = "ok"
    NOTE = "note"
    FAILS = "fails"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table. fix: one sentence, "" if nothing needs to be done."""

    subject: str
    status: Status
    text: str
    fix: str = ""


class Findings(list[Finding]):
    """All findings, in the order of the checks."""

    def ok(self, subject: str, text: str) -> None:
        """Add something that works as requested."""
        self.append(Finding(subject, Status.OK, text))

    def note(self, subject: str, text: str, fix: str = "") -> None:
        """Add something that works, but maybe not as expected."""
        self.append(Finding(subject, Status.NOTE, text, fix))

    def fails(self, subject: str, text: str, fix: str = "") -> None:
        """Add something that prevents the server from starting."""
        self.append(Finding(subject, Status.FAILS, text, fix))

    @property
    def starts(self) -> bool:
        """Whether the server would start."""
        return all(finding.status is not Status.FAILS for finding in self)

    def as_json(self) -> dict[str, Any]:
        """The findings as JSON types."""
        return {"starts": self.starts, "findings": [asdict(f) | {"status": f.status.value} for f in self]}
