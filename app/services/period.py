"""Days as people count them, in the zone that clients are shown times in."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo


def begin_of(day: date, zone: tzinfo) -> datetime:
    """The instant at which a day begins in a zone, in UTC."""
    return datetime.combine(day, time(), zone).astimezone(UTC)


@dataclass(frozen=True, slots=True)
class Period:
    """Days of a zone, from the first to the last, both included; None is open on that side."""

    first: date | None
    last: date | None
    zone: tzinfo

    @property
    def begins(self) -> datetime | None:
        """The first instant, in UTC."""
        return None if self.first is None else begin_of(self.first, self.zone)

    @property
    def ends(self) -> datetime | None:
        """The first instant after it, in UTC."""
        return None if self.last is None else begin_of(self.last + timedelta(days=1), self.zone)

    def days(self) -> Iterator[tuple[date, datetime]]:
        """Each day with its first instant: they have 23, 24 or 25 hours. An open period has none."""
        if self.first is None or self.last is None:
            return
        for number in range((self.last - self.first).days + 1):
            day = self.first + timedelta(days=number)
            yield day, begin_of(day, self.zone)
