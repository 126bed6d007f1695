"""Who calls: the API key of a request or of a handshake (PROTOCOL.md §0.2, §15)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from app.sandbox.envelope import ServiceError

REFUSED_KEY_PREFIX: Final = "sk-bad"
"""Keys that begin so are refused like a revoked key (§15)."""


def presented_key(headers: Mapping[str, str]) -> str:
    """What stands behind `Bearer`, in any case; empty if nothing does."""
    scheme, _, api_key = headers.get("authorization", "").strip().partition(" ")
    return api_key.strip() if scheme.lower() == "bearer" else ""


def accepted_key(headers: Mapping[str, str]) -> str:
    """The key of a caller who may come in; a `ServiceError` 401 for everybody else."""
    api_key = presented_key(headers)
    if not api_key:
        raise ServiceError(401, "InvalidApiKey", "No API-key provided.")
    if api_key.startswith(REFUSED_KEY_PREFIX):
        raise ServiceError(401, "InvalidApiKey", "Invalid API-key provided.")
    return api_key
