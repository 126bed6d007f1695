"""What load balancers and monitors ask."""

import asyncio

from anyio import to_thread
from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import BaseModel, Field
from sqlalchemy.exc import SQLAlchemyError

from app.errors import NotReady, StorageError
from app.metrics import CONTENT_TYPE, render
from app.routers.dependencies import ServicesDep
from app.routers.envelope import Envelope, error_answers

router = APIRouter(tags=["运行状态"])

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
    description="检查数据库与存储；数据库不可用、新的音频无处保存，或服务正在停止时返回 503。",
    responses=error_answers(503),
)
async def ready(services: ServicesDep) -> Envelope[Health]:
    """Ask the database and the store; one that is away is fine for as long as this machine shelters audio."""
    if services.in_flight.leaving:
        raise NotReady("服务正在停止")
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await services.database.check()
    except (SQLAlchemyError, OSError) as error:
        raise NotReady("数据库不可用") from error
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await services.storage.check()
    except (StorageError, OSError) as error:
        raise NotReady("存储不可用") from error
    return Envelope(data=Health(status="ok"))


@router.get("/metrics", include_in_schema=False)
async def metrics(services: ServicesDep) -> Response:
    """Prometheus' view."""
    backlog = await services.backlog.look()
    page = await to_thread.run_sync(lambda: render(services.storage.held(), backlog))
    return Response(page, media_type=CONTENT_TYPE)
