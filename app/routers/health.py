"""What load balancers and monitors ask."""

import asyncio
import uuid

import structlog
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field
from sqlalchemy.exc import SQLAlchemyError

from app.errors import NotReady, ObjectNotFound, StorageError
from app.observability import METRICS_CONTENT_TYPE, Metrics
from app.routers.dependencies import ServicesDep
from app.routers.envelope import Envelope, error_answers
from app.services import Services

router = APIRouter(tags=["运行状态"])
log = structlog.get_logger(__name__)

CHECK_SECONDS = 3.0


class Health(BaseModel):
    """运行状态。"""

    status: str = Field(description="ok 表示正常", examples=["ok"])


@router.get("/health/live", summary="进程存活", description="进程能应答即为正常。", responses=error_answers())
async def live() -> Envelope[Health]:
    """Say that the process answers."""
    return Envelope(data=Health(status="ok"))


@router.get(
    "/health/ready",
    summary="可以服务",
    description="检查数据库与存储；任一不可用时返回 503。",
    responses=error_answers(503),
)
async def ready(services: ServicesDep) -> Envelope[Health]:
    """Ask the database and the store."""
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await services.database.check()
    except (SQLAlchemyError, OSError) as error:
        raise NotReady("数据库不可用") from error
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await _ask_store(services)
    except (StorageError, OSError) as error:
        raise NotReady("存储不可用") from error
    return Envelope(data=Health(status="ok"))


async def _ask_store(services: Services) -> None:
    """A store that can say of an object that it is not there is one that answers."""
    try:
        async with services.storage.open(f"health/{uuid.uuid4()}"):
            return
    except ObjectNotFound:
        return


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """Prometheus' view."""
    collected: Metrics = request.app.state.metrics
    return Response(collected.render(), media_type=METRICS_CONTENT_TYPE)
