"""What a run of the fuzz went through, and what it found."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Cases of one part: how many of each subject were tried, how many of each check were made, and what failed."""

    part: str
    cases: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    answers: Counter[tuple[str, str | int]] = field(default_factory=Counter)
    failures: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def fail(self, subject: str, check: str, what: str) -> None:
        """Note a failure of a check."""
        self.failures.setdefault((subject, check), []).append(what)

    def note(self, subject: str, told: str | int) -> None:
        """Note what came of a case."""
        self.answers[subject, told] += 1

    @property
    def failed(self) -> int:
        """How many failures there are, each as often as it happened."""
        return sum(map(len, self.failures.values()))

    def describe(self, examples: int = 2) -> str:
        """The counts, and some examples of each failure, in lines."""
        lines = [f"{self.part}: {len(self.cases)} subjects, {self.cases.total()} cases, {self.failed} failures"]
        for subject, number in sorted(self.cases.items()):
            told = " ".join(
                f"{code}:{times}" for (of, code), times in sorted(self.answers.items(), key=str) if of == subject
            )
            lines.append(f"    {number:7} {subject:50} {told}")
        failed = Counter(check for _, check in self.failures)
        lines += [
            f"    {number:7} {check}: {failed[check]} subjects failed" for check, number in sorted(self.checks.items())
        ]
        for (subject, check), seen in self.failures.items():
            lines.append(f"  WRONG: {subject}: {check}, {len(seen)} times")
            lines += [f"      {each}" for each in seen[:examples]]
        return "\n".join(lines)
