"""The client of Alibaba DashScope, written from its protocol: frames, connections, tasks, failures."""

from app.dashscope.frames import SpeechParameters
from app.dashscope.pool import ENDPOINTS, ConnectionPool, Credential
from app.dashscope.speech import SpeechClient, SpeechTask, Usage

__all__ = ["ENDPOINTS", "ConnectionPool", "Credential", "SpeechClient", "SpeechParameters", "SpeechTask", "Usage"]
