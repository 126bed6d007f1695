"""How this process is, looked at once a second: its event loop, and its connections to others."""

import asyncio

from sqlalchemy.pool import QueuePool

from app import metrics
from app.dashscope import ConnectionPool
from app.database import Database

ROUND_SECONDS = 1.0


async def watch_vitals(database: Database, pool: ConnectionPool) -> None:
    """Until cancelled: measure how late a timer rings, and count the connections."""
    loop = asyncio.get_running_loop()
    while True:
        _count_connections(database, pool)
        due_at = loop.time() + ROUND_SECONDS
        await asyncio.sleep(ROUND_SECONDS)
        metrics.EVENT_LOOP_LAG_SECONDS.observe(max(0.0, loop.time() - due_at))


def _count_connections(database: Database, pool: ConnectionPool) -> None:
    metrics.PROVIDER_CONNECTIONS.labels("busy").set(pool.busy)
    metrics.PROVIDER_CONNECTIONS.labels("idle").set(pool.idle)
    kept = database.engine.pool
    if isinstance(kept, QueuePool):
        metrics.DATABASE_CONNECTIONS.labels("in_use").set(kept.checkedout())
        metrics.DATABASE_CONNECTIONS.labels("idle").set(kept.checkedin())
        metrics.DATABASE_POOL_SIZE.set(kept.size())
