"""What the doctor found: one line each, with what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """ok: as wanted; note: it works, but not as one may expect; fails: the server would not start."""

    OK = "ok"
    NOTE = "note"
    FAILS = "fails"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table. fix: one sentence, "" where there is nothing to do."""

    subject: str
    status: Status
    text: str
    fix: str = ""


class Findings(list[Finding]):
    """All lines, in the order in which they were found."""

    def ok(self, subject: str, text: str) -> None:
        """As wanted."""
        self.append(Finding(subject, Status.OK, text))

    def note(self, subject: str, text: str, fix: str = "") -> None:
        """Works, but not as one may expect."""
        self.append(Finding(subject, Status.NOTE, text, fix))

    def fails(self, subject: str, text: str, fix: str = "") -> None:
        """Keeps the server from starting."""
        self.append(Finding(subject, Status.FAILS, text, fix))

    @property
    def starts(self) -> bool:
        """Whether nothing keeps the server from starting."""
        return all(finding.status is not Status.FAILS for finding in self)

    def as_json(self) -> dict[str, Any]:
        """JSON types."""
        return {"starts": self.starts, "findings": [asdict(f) | {"status": f.status.value} for f in self]}
