"""The documentation pages, with every asset from this server: CDNs do not load in China or offline."""

import re
from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib.resources import files

import orjson
from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import HTMLResponse, Response

TITLE = "AI 语音后端"

_ASSETS = "/static-offline-docs"  # where fastapi-offline has them
_LOGO = b"https://cdn.redoc.ly/redoc/logo-mini.svg"
_NOTHING = b"data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' width='0' height='0'/%3E"
_INLINE_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)

router = APIRouter(include_in_schema=False)


@router.get("/docs")
def docs() -> HTMLResponse:
    """Swagger."""
    return _Page(_swagger())


@router.get("/redoc")
def redoc() -> HTMLResponse:
    """Redoc."""
    return _Page(_redoc(), "worker-src blob:")


@router.get("/openapi.json")
def schema(request: Request) -> Response:
    """What the pages show: in a thread, because it is made when it is first asked for, which takes 0.2 s."""
    return Response(orjson.dumps(request.app.openapi()), media_type="application/json")


@router.get("/redoc.js")
def redoc_script() -> Response:
    """Redoc's script, without the logo that it would fetch from its maker."""
    return Response(_script(), media_type="text/javascript", headers={"Cache-Control": "max-age=3600"})


class _Page(HTMLResponse):
    """A page that runs the scripts it was made with and no other, and talks to this server only."""

    def __init__(self, content: bytes, *permissions: str) -> None:
        hashes = [b64encode(sha256(script).digest()).decode() for script in _INLINE_SCRIPT.findall(content)]
        policy = [
            "default-src 'none'",
            " ".join(["script-src 'self'", *(f"'sha256-{each}'" for each in hashes)]),
            "style-src 'self' 'unsafe-inline'",  # both pages make styles while they run
            "img-src 'self' data:",
            "media-src 'self' blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            *permissions,
        ]
        super().__init__(content, headers={"Content-Security-Policy": "; ".join(policy)})


@cache
def _swagger() -> bytes:
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=f"{TITLE} - Swagger UI",
        swagger_js_url=f"{_ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{_ASSETS}/swagger-ui.css",
        swagger_favicon_url=f"{_ASSETS}/favicon.png",
        swagger_ui_parameters={"displayRequestDuration": True},
    )
    return bytes(page.body)


@cache
def _redoc() -> bytes:
    page = get_redoc_html(
        openapi_url="/openapi.json",
        title=TITLE,
        redoc_js_url="/redoc.js",
        redoc_favicon_url=f"{_ASSETS}/favicon.png",
        with_google_fonts=False,
    )
    return bytes(page.body)


@cache
def _script() -> bytes:
    shipped = files("fastapi_offline").joinpath("static/redoc.standalone.js").read_bytes()
    return shipped.replace(_LOGO, _NOTHING)
