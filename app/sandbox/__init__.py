"""A local stand-in of DashScope and of OSS, for development without an account and for tests.

Of DashScope it has CosyVoice and its voice enrollment, speech recognition, its tasks and temporary uploads.

It is written from the protocol reference alone and shares no code with the client that talks to it.
"""

from app.sandbox.options import SandboxOptions
from app.sandbox.server import UVICORN_ARGUMENTS, create_sandbox, serve

__all__ = ["UVICORN_ARGUMENTS", "SandboxOptions", "create_sandbox", "serve"]
