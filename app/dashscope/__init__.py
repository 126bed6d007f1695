"""The client of Alibaba DashScope, written from its protocol: frames, connections, tasks, failures."""

from app.dashscope.frames import SpeechParameters
from app.dashscope.pool import ENDPOINTS, ConnectionPool, Credential
from app.dashscope.speech import Interruption, SpeechClient
from app.dashscope.speech_task import SpeechTask, Usage

__all__ = [
    "ENDPOINTS",
    "ConnectionPool",
    "Credential",
    "Interruption",
    "SpeechClient",
    "SpeechParameters",
    "SpeechTask",
    "Usage",
]
