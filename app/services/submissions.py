"""Files that the provider is asked to transcribe, as the database knows them until it is known what became of that."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Executable, delete, exists, select, update

from app.completion import run_to_end
from app.database import Database, once_more
from app.errors import NotReady
from app.jobs import Claimed, Claims
from app.models import Bill, Record, SubmittedFile, Transcription
from app.services.calls import OpenRecord, Status, reopened, standing
from app.services.records import REOPENED, RecordService

ClaimedFile = Claimed[SubmittedFile]


class OpenSubmissions(Claims[SubmittedFile]):
    """The submissions of which it is not known whether the provider made a task of them, and which."""

    def __init__(self, database: Database, records: RecordService) -> None:
        super().__init__(database, SubmittedFile)
        self._records = records

    async def announce(self, record: OpenRecord, file: SubmittedFile) -> ClaimedFile:
        """Write down that the provider is about to be asked; from now on this ends the record.

        Raises NotReady when another process was quicker than this one, which must have slept.
        """
        await run_to_end(self._records.hand_over(record, file, is_sent=True))
        claimed = await self.claim(record.id)
        if claimed is None:
            raise NotReady
        return claimed

    @once_more
    async def settle(self, claimed: ClaimedFile, task: Transcription) -> None:
        """Put the task that the provider's answer names in the place of a submission, whoever looks for it meanwhile.

        Doing it twice is harmless.
        """
        record_id = claimed.record.id
        async with self._database.transaction() as session:
            await session.execute(delete(SubmittedFile).where(SubmittedFile.record_id == record_id))
            is_standing = await session.scalar(standing(record_id)) is not None
            if is_standing and await session.get(Transcription, record_id) is None:
                await session.execute(_reopening(record_id))
                session.add(task)

    @once_more
    async def adopt(self, claimed: ClaimedFile, task: Transcription) -> bool:
        """Put a task that was found in the place of a lost submission. False if it is of another record, or too late.

        A record that was told to have failed is opened again.
        """
        is_taken = exists().where(Transcription.task_id == task.task_id)
        # Of two submissions of one file, which look for it at once, only one may take a task: they queue here.
        twins = select(SubmittedFile.record_id).where(SubmittedFile.file_url == claimed.row.file_url)
        async with self._database.transaction() as session:
            await session.execute(twins.order_by(SubmittedFile.record_id).with_for_update())
            if (await session.execute(_closing(claimed).where(~is_taken))).first() is None:
                return False
            await session.execute(_reopening(claimed.record.id))
            session.add(task)
        return True

    async def attributed(self, task_ids: list[str]) -> set[str]:
        """Which of these tasks are known to be of some record."""
        taken = select(Transcription.task_id).where(Transcription.task_id.in_(task_ids))
        async with self._database.snapshot() as session:
            return set(await session.scalars(taken))

    async def has_rival(self, claimed: ClaimedFile) -> bool:
        """Whether the answer to another submission of this very file is waited for, whose task could be mistaken."""
        others = select(SubmittedFile.record_id).where(
            SubmittedFile.file_url == claimed.row.file_url,
            SubmittedFile.record_id != claimed.row.record_id,
            SubmittedFile.checked_at.is_(None),
            SubmittedFile.claimed_until > datetime.now(UTC),
        )
        async with self._database.snapshot() as session:
            return (await session.execute(others.limit(1))).first() is not None

    @once_more
    async def lose(self, claimed: ClaimedFile) -> None:
        """Write down that the provider's answer is lost."""
        losing = update(SubmittedFile).where(claimed.is_mine).values(checked_at=datetime.now(UTC))
        async with self._database.transaction() as session:
            await session.execute(losing)

    async def despair(self, claimed: ClaimedFile, status: Status, failure: BaseException) -> None:
        """End the record, although the search for its task goes on."""
        await self._records.end(reopened(claimed), status, failure, provided=exists().where(claimed.is_mine))

    async def fail(self, claimed: ClaimedFile, status: Status, failure: BaseException) -> None:
        """End the record without a task, and the search; what a record with an end tells is brought up to date."""
        await self._records.end(reopened(claimed), status, failure, first=_closing(claimed), corrects=True)


def _closing(claimed: ClaimedFile) -> Any:
    return delete(SubmittedFile).where(claimed.is_mine).returning(SubmittedFile.record_id)


def _reopening(record_id: int) -> Executable:
    """Have a record run again, whatever was told of it for want of news."""
    is_open = Record.status.in_(("running", "failed", "interrupted")) & ~exists().where(Bill.record_id == Record.id)
    return update(Record).where(Record.id == record_id, is_open).values(**REOPENED)
