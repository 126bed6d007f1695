"""The client of Alibaba DashScope, written from its protocol: frames, connections, tasks, failures."""

from app.dashscope.credential import HTTP_URLS, WS_URLS, Credential
from app.dashscope.enrollment import SERVICE as ENROLLMENT
from app.dashscope.enrollment import CloningOrder, EnrollmentClient, VoiceReport, VoiceStatus
from app.dashscope.failures import explain, may_have_worked, may_pass
from app.dashscope.frames import SpeechParameters, SpokenWord
from app.dashscope.http import HttpClient
from app.dashscope.pool import ConnectionPool
from app.dashscope.recognition import (
    MAX_DATA_URI_BYTES,
    InlineAudio,
    Recognition,
    RecognitionClient,
    RecognitionOrder,
)
from app.dashscope.result_file import digest_result, read_file_url
from app.dashscope.speech import Interruption, SpeechClient
from app.dashscope.speech_task import SpeechTask, Usage
from app.dashscope.timeline import SpokenSentence, Timeline
from app.dashscope.transcription import (
    ListedTask,
    Submission,
    TaskReport,
    TaskStatus,
    TranscriptionClient,
    TranscriptionOrder,
    is_same_file,
)
from app.dashscope.uploads import UploadClient

__all__ = [
    "ENROLLMENT",
    "HTTP_URLS",
    "MAX_DATA_URI_BYTES",
    "WS_URLS",
    "CloningOrder",
    "ConnectionPool",
    "Credential",
    "EnrollmentClient",
    "HttpClient",
    "InlineAudio",
    "Interruption",
    "ListedTask",
    "Recognition",
    "RecognitionClient",
    "RecognitionOrder",
    "SpeechClient",
    "SpeechParameters",
    "SpeechTask",
    "SpokenSentence",
    "SpokenWord",
    "Submission",
    "TaskReport",
    "TaskStatus",
    "Timeline",
    "TranscriptionClient",
    "TranscriptionOrder",
    "UploadClient",
    "Usage",
    "VoiceReport",
    "VoiceStatus",
    "digest_result",
    "explain",
    "is_same_file",
    "may_have_worked",
    "may_pass",
    "read_file_url",
]
