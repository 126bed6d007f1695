from __future__ import annotations

import datetime
import hashlib
from base64 import b64encode
from collections.abc import Callable, Iterator

import httpx
import oss2
import pytest
import time_machine

from app.sandbox import SandboxOptions

from .conftest import RunningSandbox

KEY = "audio/2025-12-30/你好 世界+1.mp3"
CONTENT = bytes(range(256)) * 40


def open_bucket(
    server: RunningSandbox, name: str, credentials: str = "sandbox-id:sandbox-secret", region: str = "cn-hangzhou"
) -> oss2.Bucket:
    return oss2.Bucket(oss2.AuthV4(*credentials.split(":")), server.http_url, name, region=region)


@pytest.fixture
def bucket(sandbox: RunningSandbox) -> oss2.Bucket:
    return open_bucket(sandbox, "media")


@pytest.fixture
def private(sandbox: RunningSandbox) -> oss2.Bucket:
    return open_bucket(sandbox, "media-private")


@pytest.fixture
def anonymous(sandbox: RunningSandbox) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=sandbox.http_url) as client:
        yield client


def error_code(response: httpx.Response) -> str:
    return response.text.partition("<Code>")[2].partition("</Code>")[0]


def test_an_object_comes_back_as_it_was_put(bucket: oss2.Bucket) -> None:
    put = bucket.put_object(KEY, CONTENT, headers={"Content-Type": "audio/mpeg", "x-oss-meta-owner": "7"})
    assert put.status == 200
    assert put.etag == hashlib.md5(CONTENT, usedforsecurity=False).hexdigest().upper()
    assert put.crc
    got = bucket.get_object(KEY)
    assert got.read() == CONTENT
    assert got.client_crc == got.server_crc
    assert got.content_type == "audio/mpeg"
    assert got.headers["x-oss-meta-owner"] == "7"
    head = bucket.head_object(KEY)
    assert head.content_length == len(CONTENT)
    assert head.etag == put.etag
    assert head.last_modified


def test_chunked_uploads_and_empty_objects(bucket: oss2.Bucket) -> None:
    assert bucket.put_object("chunked", iter([b"a" * 1000, b"b" * 1000])).status == 200
    assert bucket.get_object("chunked").read() == b"a" * 1000 + b"b" * 1000
    bucket.put_object("empty", b"")
    assert bucket.get_object("empty").read() == b""


def test_ranges(bucket: oss2.Bucket, anonymous: httpx.Client) -> None:
    bucket.put_object("ranges", CONTENT)
    part = bucket.get_object("ranges", byte_range=(10, 19))
    assert (part.status, part.read()) == (206, CONTENT[10:20])
    assert part.headers["Content-Range"] == f"bytes 10-19/{len(CONTENT)}"
    assert bucket.get_object("ranges", byte_range=(None, 5)).read() == CONTENT[-5:]
    assert bucket.get_object("ranges", byte_range=(10_000, None)).read() == CONTENT[10_000:]
    beyond = {"Range": f"bytes=100-{len(CONTENT)}"}
    assert anonymous.get("/media/ranges", headers=beyond).status_code == 200
    standard = anonymous.get("/media/ranges", headers={**beyond, "x-oss-range-behavior": "standard"})
    assert (standard.status_code, standard.content) == (206, CONTENT[100:])
    outside = {"Range": f"bytes={len(CONTENT)}-", "x-oss-range-behavior": "standard"}
    assert anonymous.get("/media/ranges", headers=outside).status_code == 416


def test_deleted_and_unknown_objects(bucket: oss2.Bucket) -> None:
    bucket.put_object("gone", b"x")
    assert bucket.object_exists("gone")
    assert bucket.delete_object("gone").status == 204
    assert bucket.delete_object("gone").status == 204
    assert not bucket.object_exists("gone")
    with pytest.raises(oss2.exceptions.NoSuchKey) as missing:
        bucket.get_object("gone")
    assert missing.value.request_id


def test_anybody_reads_a_public_bucket_and_nobody_a_private_one(
    bucket: oss2.Bucket, private: oss2.Bucket, anonymous: httpx.Client
) -> None:
    bucket.put_object("open", b"x")
    private.put_object("closed", b"x")
    assert anonymous.get("/media/open").content == b"x"
    assert error_code(anonymous.get("/media-private/closed")) == "AccessDenied"
    assert error_code(anonymous.get("/media-private/unknown")) == "AccessDenied"
    assert anonymous.put("/media/open", content=b"y").status_code == 403
    assert anonymous.delete("/media/open").status_code == 403
    assert error_code(anonymous.get("/never-used/x")) == "NoSuchBucket"


def test_an_object_acl_beats_the_bucket(bucket: oss2.Bucket, private: oss2.Bucket, anonymous: httpx.Client) -> None:
    bucket.put_object("secret", b"x", headers={"x-oss-object-acl": "private"})
    private.put_object("shared", b"x", headers={"x-oss-object-acl": "public-read"})
    assert anonymous.get("/media/secret").status_code == 403
    assert anonymous.get("/media-private/shared").status_code == 200


def test_content_md5_is_checked(bucket: oss2.Bucket) -> None:
    good = b64encode(hashlib.md5(b"x", usedforsecurity=False).digest()).decode()
    bucket.put_object("md5", b"x", headers={"Content-MD5": good})
    with pytest.raises(oss2.exceptions.ServerError) as refused:
        bucket.put_object("md5", b"y", headers={"Content-MD5": good})
    assert (refused.value.status, refused.value.code) == (400, "InvalidDigest")


def test_overwriting_can_be_forbidden(bucket: oss2.Bucket) -> None:
    bucket.put_object("once", b"x")
    with pytest.raises(oss2.exceptions.ServerError) as refused:
        bucket.put_object("once", b"y", headers={"x-oss-forbid-overwrite": "true"})
    assert refused.value.code == "FileAlreadyExists"


@pytest.mark.parametrize(
    ("credentials", "region", "code"),
    [
        ("sandbox-id:wrong", "cn-hangzhou", "SignatureDoesNotMatch"),
        ("nobody:sandbox-secret", "cn-hangzhou", "InvalidAccessKeyId"),
        ("sandbox-id:sandbox-secret", "cn-beijing", "InvalidArgument"),
    ],
)
def test_bad_signatures_are_refused(sandbox: RunningSandbox, credentials: str, region: str, code: str) -> None:
    with pytest.raises(oss2.exceptions.ServerError) as refused:
        open_bucket(sandbox, "media", credentials, region).put_object("x", b"x")
    assert refused.value.code == code


def test_old_signatures_are_refused(sandbox: RunningSandbox) -> None:
    bucket = oss2.Bucket(oss2.Auth("sandbox-id", "sandbox-secret"), sandbox.http_url, "media")
    with pytest.raises(oss2.exceptions.AccessDenied):
        bucket.put_object("x", b"x")


@pytest.mark.parametrize("minutes", [-16, 16])
def test_a_wrong_clock_is_refused(bucket: oss2.Bucket, minutes: int) -> None:
    request = oss2.http.Request("GET", bucket._make_url(bucket.bucket_name, "x"), region="cn-hangzhou", product="oss")
    signed_at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=minutes)
    with time_machine.travel(signed_at, tick=False):
        bucket.auth._sign_request(request, bucket.bucket_name, "x")
    response = httpx.get(request.url, headers={name: value for name, value in request.headers.items() if value})
    assert (response.status_code, error_code(response)) == (403, "RequestTimeTooSkewed")


def test_a_presigned_url_opens_a_private_object(private: oss2.Bucket) -> None:
    private.put_object(KEY, CONTENT)
    url = private.sign_url("GET", KEY, 60, slash_safe=True)
    assert httpx.get(url).content == CONTENT
    assert error_code(httpx.get(url.replace("x-oss-signature=", "x-oss-signature=0"))) == "SignatureDoesNotMatch"
    assert error_code(httpx.get(url.replace("x-oss-expires=60", "x-oss-expires=6000"))) == "SignatureDoesNotMatch"
    assert error_code(httpx.get(url.replace("2025-12-30", "2025-12-31"))) == "SignatureDoesNotMatch"
    assert httpx.put(url, content=b"x").status_code == 403
    named = private.sign_url(
        "GET", KEY, 60, slash_safe=True, params={"response-content-disposition": 'attachment; filename="a b.mp3"'}
    )
    assert httpx.get(named).headers["content-disposition"] == 'attachment; filename="a b.mp3"'


def test_a_presigned_upload_keeps_its_content_type(bucket: oss2.Bucket) -> None:
    headers = {"Content-Type": "audio/wav"}
    url = bucket.sign_url("PUT", "uploaded", 60, slash_safe=True, headers=headers)
    assert httpx.put(url, content=b"x", headers={"Content-Type": "text/plain"}).status_code == 403
    assert httpx.put(url, content=b"x", headers=headers).status_code == 200
    assert bucket.head_object("uploaded").content_type == "audio/wav"


def test_presigned_urls_expire(private: oss2.Bucket) -> None:
    private.put_object("short", b"x")
    with time_machine.travel(datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=61), tick=False):
        url = private.sign_url("GET", "short", 60, slash_safe=True)
    response = httpx.get(url)
    assert (response.status_code, error_code(response)) == (403, "AccessDenied")
    assert "expired" in response.text


def test_sizes_are_bounded(start_sandbox: Callable[[SandboxOptions], RunningSandbox]) -> None:
    server = start_sandbox(SandboxOptions(oss_max_object_bytes=1000, oss_max_total_bytes=1500))
    bucket = open_bucket(server, "small")
    with pytest.raises(oss2.exceptions.ServerError) as too_large:
        bucket.put_object("a", b"x" * 1001)
    assert too_large.value.code == "EntityTooLarge"
    bucket.put_object("a", b"x" * 1000)
    bucket.put_object("a", b"x" * 1000)
    with pytest.raises(oss2.exceptions.ServerError) as full:
        bucket.put_object("b", b"x" * 501)
    assert full.value.code == "StorageFull"
    bucket.delete_object("a")
    bucket.put_object("b", b"x" * 501)
