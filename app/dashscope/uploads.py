"""The provider's temporary storage: for audio that it cannot fetch from us (PROTOCOL §6)."""

import re
from collections.abc import AsyncIterator
from typing import BinaryIO, cast

import httpx
import structlog
from anyio import to_thread
from pydantic import BaseModel, Field, ValidationError

from app.dashscope.credential import Credential
from app.dashscope.hosts import require_provider_url
from app.dashscope.http import HttpClient
from app.errors import AudioTooLarge, UpstreamError
from app.probes import provider_call

log = structlog.get_logger(__name__)

MEGABYTE = 1024 * 1024
RESOLVE_UPLOADS = {"X-DashScope-OssResourceResolve": "enable"}  # for calls with an oss:// address
MAX_STORE_ANSWER_BYTES = 64 * 1024
_ERROR_CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,64})</Code>")


class _Policy(BaseModel):
    """The right to upload one file for a few minutes."""

    upload_host: str
    upload_dir: str = Field(min_length=1)
    max_file_size_mb: float = Field(gt=0)
    oss_access_key_id: str
    signature: str
    policy: str
    x_oss_object_acl: str
    x_oss_forbid_overwrite: str

    @property
    def form(self) -> dict[str, str]:
        """The fields that prove it."""
        return {
            "OSSAccessKeyId": self.oss_access_key_id,
            "Signature": self.signature,
            "policy": self.policy,
            "x-oss-object-acl": self.x_oss_object_acl,
            "x-oss-forbid-overwrite": self.x_oss_forbid_overwrite,
        }


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
        with provider_call("upload", model):
            return await self._upload(credential, model, source, size, name, content_type)

    async def _upload(
        self, credential: Credential, model: str, source: BinaryIO, size: int, name: str, content_type: str
    ) -> str:
        policy = await self._permit(credential, model)
        host = require_provider_url(policy.upload_host, credential, any_port=True)
        if size > policy.max_file_size_mb * MEGABYTE:
            raise AudioTooLarge(f"音频文件过大，百炼平台最多接收 {policy.max_file_size_mb:g} MB")
        key = f"{policy.upload_dir}/{name}"
        request = self._http.build_request(
            "POST",
            host,
            data={**policy.form, "key": key, "success_action_status": "200", "x-oss-content-type": content_type},
            files={"file": (name, source, content_type)},
        )
        form = cast(httpx.SyncByteStream, request.stream)
        headers = {**request.headers, "Content-Length": request.headers["Content-Length"]}
        sent = self._http.build_request("POST", host, headers=headers, content=_read_in_thread(form))
        status, answer = await self._http.send(sent, MAX_STORE_ANSWER_BYTES)
        if status not in {200, 201, 204}:
            code = match[1].decode() if (match := _ERROR_CODE.search(answer)) else f"HTTP {status}"
            log.warning("provider_upload_refused", status=status, provider_code=code)
            raise UpstreamError(f"音频上传到百炼临时存储失败，请稍后重试（{code}）")
        return f"oss://{key}"

    async def _permit(self, credential: Credential, model: str) -> _Policy:
        answer = await self._http.get(credential, "/uploads", {"action": "getPolicy", "model": model})
        try:
            return _Policy.model_validate(answer.get("data") or answer.get("output"))
        except ValidationError:
            raise UpstreamError("百炼平台没有给出上传凭证，请稍后重试") from None


async def _read_in_thread(form: httpx.SyncByteStream) -> AsyncIterator[bytes]:
    chunks = iter(form)
    while (chunk := await to_thread.run_sync(next, chunks, None)) is not None:
        yield chunk
