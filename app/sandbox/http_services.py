"""Where the HTTP services of DashScope live: voices, recognition, tasks, uploads and files (PROTOCOL.md §3-§6)."""

from __future__ import annotations

from collections.abc import Callable

from starlette.routing import BaseRoute, Route

from app.sandbox.audio_sources import AudioSources
from app.sandbox.enrolled_voices import VoiceBook
from app.sandbox.enrollment_service import EnrollmentService
from app.sandbox.faults import Faults
from app.sandbox.hearing import Ear
from app.sandbox.options import SandboxOptions
from app.sandbox.oss_signature import OssRequest
from app.sandbox.recognition_service import RecognitionService
from app.sandbox.request_log import RequestLog
from app.sandbox.result_files import RESULT_BUCKET, ResultFiles
from app.sandbox.sample_files import SAMPLE_BUCKET, SampleFiles
from app.sandbox.service_door import Handler, ServiceDoor
from app.sandbox.spoken_audio import SpokenAudio
from app.sandbox.task_service import TaskService
from app.sandbox.tasks import TaskBook
from app.sandbox.temporary_files import UPLOAD_BUCKET, TemporaryFiles
from app.sandbox.transcription_work import TranscriptionWork
from app.sandbox.upload_service import UploadService


def http_routes(
    options: SandboxOptions,
    faults: Faults,
    log: RequestLog,
    spoken: SpokenAudio,
    voices: VoiceBook,
    tasks: TaskBook,
    read_object: Callable[[OssRequest], bytes],
) -> list[BaseRoute]:
    """The routes of all HTTP services, with a state of their own."""
    files = TemporaryFiles(options.oss_max_total_bytes)
    ear = Ear(spoken)
    sources = AudioSources(ear, files, read_object)
    results = ResultFiles(tasks, faults)
    recognition = RecognitionService(options, sources)
    tasking = TaskService(options, faults, TranscriptionWork(sources), tasks, results)
    uploads = UploadService(options, faults, files)
    samples = SampleFiles(voices, spoken)
    enrollment = EnrollmentService(options, voices, sources, ear, samples, spoken)

    def service(path: str, *, by_action: bool = False, **handlers: Handler) -> Route:
        return Route(path, ServiceDoor(handlers, faults, log, with_key=True, by_action=by_action))

    def storage(path: str, otherwise: Handler, **handlers: Handler) -> Route:
        methods = dict.fromkeys(("GET", "HEAD", "PUT", "POST", "DELETE"), otherwise)
        return Route(path, ServiceDoor({**methods, **handlers}, faults, log, with_key=False))

    return [
        service("/api/v1/services/audio/tts/customization", by_action=True, POST=enrollment.customize),
        service("/api/v1/services/aigc/multimodal-generation/generation", POST=recognition.recognise),
        service("/api/v1/services/audio/asr/transcription", POST=tasking.submit),
        service("/api/v1/tasks", GET=tasking.list),
        service("/api/v1/tasks/", GET=tasking.list),
        service("/api/v1/tasks/{task_id}", GET=tasking.query, POST=tasking.query),
        service("/api/v1/tasks/{task_id}/cancel", POST=tasking.cancel),
        service("/api/v1/uploads", GET=uploads.policy),
        storage(f"/{UPLOAD_BUCKET}", uploads.deny, POST=uploads.upload),
        storage(f"/{UPLOAD_BUCKET}/", uploads.deny, POST=uploads.upload),
        storage(f"/{UPLOAD_BUCKET}/{{key:path}}", uploads.deny),
        storage(f"/{RESULT_BUCKET}/{{key:path}}", uploads.deny, GET=results.read),
        storage(f"/{SAMPLE_BUCKET}/{{key:path}}", uploads.deny, GET=samples.read),
    ]
