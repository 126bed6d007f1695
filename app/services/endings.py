"""What the end of a call means: for its bill, for its name, and for what is told of it."""

from typing import Any

from sqlalchemy import case, null

from app import metrics
from app.dashscope import may_have_worked
from app.errors import AppError, HandshakeTimeout, StorageError, UpstreamError
from app.models import Record
from app.services.calls import OpenRecord, Status

UNCOUNTED = "（没有收到用量，未计费；如百炼已处理，以百炼账单为准）"


def freed_name(record: OpenRecord, status: Status, failure: BaseException | None) -> dict[str, Any]:
    """A call that surely bought nothing lets go of its name: whoever asks again under it orders anew."""
    if status not in {"failed", "interrupted"} or record.quantity:
        return {}
    if _is_refusal(failure):
        return {"idempotency_key": None}
    return {"idempotency_key": case((Record.sent_at.is_(None), null()), else_=Record.idempotency_key)}


def tell_if_uncounted(record: OpenRecord, failure: BaseException) -> None:
    """Let nobody take a missing count for a proof that nothing was counted."""
    if isinstance(failure, AppError) and may_have_worked(failure) and record.is_sent and not record.quantity:
        failure.message += UNCOUNTED if record.price.per_unit else ""


def _is_refusal(failure: BaseException | None) -> bool:
    """Whether the provider, or we before it, surely took no work on."""
    if not isinstance(failure, AppError) or may_have_worked(failure):
        return False
    if isinstance(failure, UpstreamError):
        return not failure.is_its_fault and not isinstance(failure, StorageError)
    return failure.status < 500 or isinstance(failure, HandshakeTimeout)


def explain_orphan(orphan: Record) -> str:
    """What is told of a record whose process died."""
    if orphan.expected_quantity:
        return "服务中断，结果未能取回，费用按估算"
    if orphan.sent_at:
        return "服务中断，请求可能已被百炼接受，实际费用以百炼账单为准"
    return "服务中断，未产生费用"


def count_ending(record: OpenRecord, kind: str, model: str, status: Status) -> None:
    """Let whoever watches the service know of an end, and of what it cost."""
    metrics.RECORDS_ENDED.labels(kind, status).inc()
    if record.quantity:
        model = metrics.model_label(model)
        metrics.BILLED_AMOUNT.labels(model, record.price.currency).inc(float(record.amount))
        metrics.BILLED_UNITS.labels(model, record.price.unit).inc(record.quantity)
        metrics.BILLED_ESTIMATES.labels(model).inc(int(record.estimated))
