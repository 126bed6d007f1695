"""The documentation pages, with every asset from this server: CDNs do not load in China or offline."""

from functools import cache
from importlib.resources import files

from fastapi import APIRouter
from fastapi.openapi.docs import get_redoc_html
from fastapi.responses import HTMLResponse, Response

_LOGO = b"https://cdn.redoc.ly/redoc/logo-mini.svg"
_NOTHING = b"data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' width='0' height='0'/%3E"

router = APIRouter(include_in_schema=False)


@router.get("/redoc")
async def redoc() -> HTMLResponse:
    """Redoc."""
    return get_redoc_html(
        openapi_url="/openapi.json",
        title="AI 语音后端",
        redoc_js_url="/redoc.js",
        redoc_favicon_url="/static-offline-docs/favicon.png",
        with_google_fonts=False,
    )


@router.get("/redoc.js")
def redoc_script() -> Response:
    """Redoc's script, without the logo that it would fetch from its maker."""
    return Response(_script(), media_type="text/javascript", headers={"Cache-Control": "max-age=3600"})


@cache
def _script() -> bytes:
    shipped = files("fastapi_offline").joinpath("static/redoc.standalone.js").read_bytes()
    return shipped.replace(_LOGO, _NOTHING)
