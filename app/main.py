"""The application: resources, routes, failure answers and documentation pages."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi_offline import FastAPIOffline

from app.memory import keep_what_is_loaded, return_large_blocks
from app.observability import RequestContext, configure_logs
from app.routers import (
    admin,
    auth,
    budget,
    estimate,
    health,
    history,
    history_csv,
    live,
    long_text,
    media,
    pages,
    progress,
    recognition,
    speech,
    subtitles,
    system_voices,
    transcription,
    usage,
    users,
    voices,
)
from app.routers.body_limit import BodyLimit
from app.routers.envelope import describe_errors_as_answered
from app.routers.failures import AnswerUnexpected, add_failure_handlers
from app.routers.protection import ProtectiveHeaders, TrustedHosts
from app.services import open_services
from app.settings import Settings
from app.stopping import ending_with_parent, hearing_stop
from app.tracing import Traces

# Of routes that take neither audio nor long texts; the longest text of a short synthesis is far below this.
MAX_BODY_BYTES = 1024 * 1024
LONGEST_CHARACTER_BYTES = 12  # two escapes of JSON

_DESCRIPTION = """\
自托管的 AI 语音后端：用每个用户自己的百炼 API Key 合成与识别语音、复刻声音，保存结果，并记录每次调用的费用。

1. `POST /api/auth/register` 注册；
2. 点击右上角 **Authorize**，填写用户名与密码登录；
3. `PUT /api/user/apikey` 保存百炼 API Key；
4. `POST /api/audio/tts/synthesize` 合成语音，用返回的 `audio_url` 播放；`POST /api/audio/tts/synthesize-long`
   合成长文本；WebSocket `/api/audio/tts/stream` 边写边播（见 README）；
5. `POST /api/audio/asr/recognize` 识别短音频，`POST /api/audio/asr/transcribe` 转写长音频；
6. `POST /api/audio/voice/create` 用一段录音复刻声音，`GET /api/audio/voice/system` 查看系统音色。

所有 JSON 响应的格式都是 `{"code", "message", "data"}`；出错时另有 `error` 错误码。
每个响应都带 `X-Request-Id`，反馈问题时请附上。
"""


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the application; without settings, from the environment and `.env`."""
    settings = settings or Settings()
    configure_logs(settings.log_level)
    traces = Traces(settings.otel_exporter_otlp_endpoint, settings.trace_sample_ratio)
    app = FastAPIOffline(
        title=pages.TITLE,
        version="0.1",
        description=_DESCRIPTION,
        lifespan=_serving(settings, traces),
        telemetry=traces.telemetry,
        docs_url=None,  # see pages
        redoc_url=None,
        redirect_slashes=False,
    )
    speaking = (speech, long_text, estimate, live)
    hearing = (recognition, transcription, subtitles)
    calls = (history, history_csv, usage, progress)
    audio = (*speaking, *hearing, system_voices, voices, *calls)
    routers = [routes.router for routes in (auth, users, budget, *audio, admin, health, pages, media)]
    # Including them would build all routes a second time, while the first request waits. In front of the framework's,
    # because one of pages is in place of one of those.
    app.router.routes[:0] = [route for router in routers for route in router.routes]
    add_failure_handlers(app)
    describe_errors_as_answered(app)
    uploads = {recognition.PATH: recognition.MAX_BODY_BYTES, f"{voices.PREFIX}/": voices.MAX_BODY_BYTES}
    text_bytes = MAX_BODY_BYTES + LONGEST_CHARACTER_BYTES * settings.long_text_max_chars
    texts = {long_text.PATH: text_bytes, estimate.PATH: text_bytes}
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES, uploads=uploads, texts=texts)
    app.add_middleware(AnswerUnexpected)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.allowed_origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["X-Request-Id", "X-Record-Id", "Retry-After", "Idempotency-Replayed", "Server-Timing"],
    )
    _protect(app, settings)
    app.add_middleware(RequestContext)
    return app


def create_worker(settings: Settings | None = None) -> FastAPI:
    """Build what runs background jobs, whatever `serve` does, and answers nobody but monitors."""
    settings = (settings or Settings()).model_copy(update={"background_jobs": True})
    configure_logs(settings.log_level)
    traces = Traces(settings.otel_exporter_otlp_endpoint, settings.trace_sample_ratio)
    app = FastAPI(
        lifespan=_serving(settings, traces), telemetry=traces.telemetry, openapi_url=None, redirect_slashes=False
    )
    app.router.routes.extend(health.router.routes)
    add_failure_handlers(app)
    app.add_middleware(AnswerUnexpected)
    _protect(app, settings)
    app.add_middleware(RequestContext)
    return app


def _protect(app: FastAPI, settings: Settings) -> None:
    """Put around everything so far what keeps strangers' hosts out and browsers in bounds."""
    app.add_middleware(TrustedHosts, hosts=settings.trusted_hosts)
    app.add_middleware(ProtectiveHeaders, is_https=urlsplit(settings.public_base_url).scheme == "https")


def _serving(settings: Settings, traces: Traces) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """What an application holds open from its first request to its last."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        return_large_blocks()
        keep_what_is_loaded()  # the program: what is opened now need not make anybody look through it
        async with traces, open_services(settings) as services:
            app.state.services = services
            with hearing_stop(services.in_flight, settings.drain_delay_seconds), ending_with_parent():
                keep_what_is_loaded()
                yield

    return lifespan
