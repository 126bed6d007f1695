"""The provider's temporary storage: for audio that it cannot fetch from us (PROTOCOL §6)."""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import httpx
import structlog
from anyio import to_thread

from app.dashscope.credential import Credential
from app.dashscope.hosts import require_provider_url
from app.dashscope.http import HttpClient
from app.errors import AudioTooLarge, UpstreamError

log = structlog.get_logger(__name__)

MEGABYTE = 1024 * 1024
MAX_STORE_ANSWER_BYTES = 64 * 1024
_ERROR_CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,64})</Code>")


@dataclass(frozen=True, slots=True)
class _Policy:
    """The right to upload one file for a few minutes."""

    host: str
    folder: str
    max_bytes: int
    form: dict[str, str]


class UploadClient:
    """Uploads files under a user's account, each for one model, where only the provider reads them, for 48 hours."""

    def __init__(self, http: HttpClient) -> None:
        self._http = http

    async def upload(
        self, credential: Credential, model: str, source: BinaryIO, size: int, name: str, content_type: str
    ) -> str:
        """Upload a seekable file of `size` bytes; gives its `oss://` address.

        Raises AudioTooLarge beyond what the provider takes for this model, or the AppError of a failure.
        """
        policy = await self._permit(credential, model)
        if size > policy.max_bytes:
            raise AudioTooLarge(f"音频文件过大，百炼平台最多接收 {policy.max_bytes // MEGABYTE} MB")
        key = f"{policy.folder}/{name}"
        request = self._http.build_request(
            "POST",
            policy.host,
            data={**policy.form, "key": key, "success_action_status": "200", "x-oss-content-type": content_type},
            files={"file": (name, source, content_type)},
        )
        form = cast(httpx.SyncByteStream, request.stream)
        headers = {**request.headers, "Content-Length": request.headers["Content-Length"]}
        sent = self._http.build_request("POST", policy.host, headers=headers, content=_read_in_thread(form))
        status, answer = await self._http.send(sent, MAX_STORE_ANSWER_BYTES)
        if status not in {200, 201, 204}:
            code = match[1].decode() if (match := _ERROR_CODE.search(answer)) else f"HTTP {status}"
            log.warning("provider_upload_refused", status=status, provider_code=code)
            raise UpstreamError(f"音频上传到百炼临时存储失败，请稍后重试（{code}）")
        return f"oss://{key}"

    async def _permit(self, credential: Credential, model: str) -> _Policy:
        answer = await self._http.get(credential, "/uploads", {"action": "getPolicy", "model": model})
        data: Any = answer.get("data") or answer.get("output")
        try:
            return _Policy(
                host=require_provider_url(data["upload_host"], credential, any_port=True),
                folder=data["upload_dir"],
                max_bytes=int(data["max_file_size_mb"]) * MEGABYTE,
                form={
                    "OSSAccessKeyId": data["oss_access_key_id"],
                    "Signature": data["signature"],
                    "policy": data["policy"],
                    "x-oss-object-acl": data["x_oss_object_acl"],
                    "x-oss-forbid-overwrite": data["x_oss_forbid_overwrite"],
                },
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UpstreamError("百炼平台没有给出上传凭证，请稍后重试") from error


async def _read_in_thread(form: httpx.SyncByteStream) -> AsyncIterator[bytes]:
    chunks = iter(form)
    while (chunk := await to_thread.run_sync(next, chunks, None)) is not None:
        yield chunk
