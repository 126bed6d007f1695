"""Looking into the sandbox and switching faults on, under `/_sandbox`."""

from __future__ import annotations

import orjson
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app.sandbox.calls import CallLog
from app.sandbox.faults import Faults, read_faults
from app.sandbox.ledger import read_ledger
from app.sandbox.request_log import RequestLog
from app.sandbox.tasks import TaskBook


def observation_routes(calls: CallLog, requests: RequestLog, tasks: TaskBook, faults: Faults) -> list[Route]:
    """The routes that tests use; they are no part of DashScope."""

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok", "connections_opened": calls.connections_opened})

    async def show_calls(request: Request) -> Response:
        if request.method == "DELETE":
            calls.clear()
            return Response(status_code=204)
        body = orjson.dumps(calls.as_json(request.query_params.get("api_key")))
        headers = {"x-sandbox-connections": str(calls.connections_opened)}
        return Response(body, media_type="application/json", headers=headers)

    async def show_requests(request: Request) -> Response:
        if request.method == "DELETE":
            requests.clear()
            return Response(status_code=204)
        body = orjson.dumps(requests.as_json(request.query_params.get("api_key")))
        return Response(body, media_type="application/json")

    async def show_ledger(request: Request) -> Response:
        work = read_ledger(calls, requests, tasks, request.query_params.get("api_key"))
        return Response(orjson.dumps(work), media_type="application/json")

    async def switch_faults(request: Request) -> Response:
        if request.method == "PUT":
            try:
                wanted = read_faults(orjson.loads(await request.body()))
            except (ValueError, AttributeError) as error:
                return JSONResponse({"error": f"not understood: {error}"}, 400)
            faults.replace(wanted)
        elif request.method == "DELETE":
            faults.replace(Faults())
        return JSONResponse(faults.as_json())

    return [
        Route("/_sandbox/health", health),
        Route("/_sandbox/calls", show_calls, methods=["GET", "DELETE"]),
        Route("/_sandbox/requests", show_requests, methods=["GET", "DELETE"]),
        Route("/_sandbox/ledger", show_ledger),
        Route("/_sandbox/faults", switch_faults, methods=["GET", "PUT", "DELETE"]),
    ]
