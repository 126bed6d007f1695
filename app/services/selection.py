"""Which of a user's records are wanted."""

import uuid
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement

from app.models import Record
from app.services.calls import RecordType
from app.services.period import Period

# When a record was made, and its id.
Place = tuple[datetime, int]
PlaceColumns = tuple[ColumnElement[datetime], ColumnElement[int]]
# In the order of the indexes that find them.
NEWEST_FIRST = (Record.created_at.desc(), Record.id.desc())
OLDEST_FIRST = (Record.created_at.asc(), Record.id.asc())


@dataclass(frozen=True, slots=True)
class HistoryFilter:
    """Which records are wanted: of a type, of a model, begun in a period; None is any."""

    kind: RecordType | None = None
    model: str | None = None
    period: Period | None = None

    def conditions(
        self, user_id: uuid.UUID, *, after: Place | PlaceColumns | None = None, before: Place | None = None
    ) -> list[ColumnElement[bool]]:
        """What holds for the wanted records of a user, or for those of them after one of them, or before one.

        The place of such a record is within the period: with a second bound, databases may take the wider one.
        """
        begins, ends = (self.period.begins, self.period.ends) if self.period else (None, None)
        wanted = [Record.user_id == user_id]
        if self.kind is not None:
            wanted.append(Record.type == self.kind)
        if self.model is not None:
            wanted.append(Record.model_name == self.model)
        if after is not None:
            wanted += [Record.created_at >= after[0], (Record.created_at > after[0]) | (Record.id > after[1])]
        elif begins is not None:
            wanted.append(Record.created_at >= begins)
        if before is not None:
            wanted += [Record.created_at <= before[0], (Record.created_at < before[0]) | (Record.id < before[1])]
        elif ends is not None:
            wanted.append(Record.created_at < ends)
        return wanted
