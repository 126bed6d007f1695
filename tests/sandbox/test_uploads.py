from __future__ import annotations

import base64
import datetime
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest
import time_machine

from app.sandbox import SandboxOptions

from .conftest import RunningSandbox, running
from .services import (
    ANYBODY,
    FILETRANS,
    FLASH,
    PARAFORMER,
    RESOLVE,
    STRANGE,
    Json,
    Services,
    calling,
    error,
    form,
    oss_error,
    post_form,
    tone,
)

Parts = list[tuple[str, tuple[str | None, str]]]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningSandbox]:
    with running(SandboxOptions(task_seconds=0.1, upload_max_megabytes=1)) as server:
        yield server


@pytest.fixture
def services(server: RunningSandbox) -> Iterator[Services]:
    with calling(server) as services:
        yield services


@pytest.fixture
def policy(services: Services) -> Json:
    return services.policy()


def test_a_policy_has_the_documented_shape(services: Services) -> None:
    response = services.http.get("/api/v1/uploads", params={"action": "getPolicy", "model": FLASH})
    body = response.json()
    assert body.keys() == {"request_id", "data"}
    data = body["data"]
    assert data.keys() == {
        "policy",
        "signature",
        "upload_dir",
        "upload_host",
        "expire_in_seconds",
        "max_file_size_mb",
        "capacity_limit_mb",
        "oss_access_key_id",
        "x_oss_object_acl",
        "x_oss_forbid_overwrite",
    }
    assert (data["expire_in_seconds"], data["max_file_size_mb"]) == (300, 1)
    assert data["upload_host"].startswith(services.server.http_url)
    assert orjson.loads(base64.b64decode(data["policy"])).keys() == {"expiration", "conditions"}


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, (400, "InvalidParameter")),
        ({"action": "getPolicy"}, (400, "InvalidParameter")),
        ({"action": "other", "model": FLASH}, (400, "InvalidParameter")),
        ({"action": "getPolicy", "model": "unknown"}, (404, "ModelNotFound")),
    ],
)
def test_other_policies_are_refused(services: Services, query: dict[str, str], expected: tuple[int, str]) -> None:
    assert error(services.http.get("/api/v1/uploads", params=query))[:2] == expected


def test_an_uploaded_file_is_heard(services: Services) -> None:
    url = services.upload(tone(1.5))
    response = services.recognise(url, headers=RESOLVE)
    assert response.json()["output"]["choices"][0]["message"]["content"] == [{"text": STRANGE}]
    noted = services.requests()[-1]
    assert (noted["audio_source"], noted["audio_bytes"]) == ("oss", len(tone(1.5)))
    assert noted["headers"] == {"x-dashscope-ossresourceresolve": "enable"}


def test_the_resolve_header_is_needed(services: Services) -> None:
    url = services.upload(tone(1.5))
    status, code, message = error(services.recognise(url))
    assert (status, code) == (400, "invalid_parameter_error")
    assert "The provided URL does not appear to be valid" in message
    assert error(services.submit(FILETRANS, url))[1] == "invalid_parameter_error"
    task = services.transcribe(PARAFORMER, services.upload(tone(1.5), PARAFORMER))
    assert task["output"]["code"] == "FILE_DOWNLOAD_FAILED"


def test_a_file_belongs_to_its_model_and_account(services: Services) -> None:
    url = services.upload(tone(1.5))
    with calling(services.server) as stranger:
        for caller, asked, model in [
            (stranger, url, FLASH),
            (services, url, f"{FLASH}-2026-02-10"),
            (services, f"{url}x", FLASH),
        ]:
            refused = caller.recognise(asked, model, headers=RESOLVE)
            assert error(refused)[:2] == (400, "InvalidParameter.DataInspection")
    task = services.transcribe(FILETRANS, url, headers=RESOLVE)
    assert (task["output"]["task_status"], task["output"]["code"]) == ("FAILED", "FILE_404_NOT_FOUND")
    task = services.transcribe(FILETRANS, services.upload(tone(1.5), FILETRANS), headers=RESOLVE)
    assert task["output"]["task_status"] == "SUCCEEDED"


def test_a_file_is_gone_after_two_days(services: Services) -> None:
    url = services.upload(tone(1.5))
    with time_machine.travel(datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=49)):
        assert error(services.recognise(url, headers=RESOLVE))[1] == "InvalidParameter.DataInspection"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"OSSAccessKeyId": "other"}, (403, "InvalidAccessKeyId")),
        ({"Signature": "AAAA"}, (403, "SignatureDoesNotMatch")),
        ({"policy": base64.b64encode(b"{}").decode()}, (403, "SignatureDoesNotMatch")),
        ({"policy": None}, (403, "AccessDenied")),
        ({"Signature": None}, (403, "AccessDenied")),
        ({"key": None}, (403, "AccessDenied")),
        ({"key": "elsewhere/a.wav"}, (403, "AccessDenied")),
        ({"x-oss-object-acl": "public-read"}, (403, "AccessDenied")),
        ({"x-oss-object-acl": None}, (403, "AccessDenied")),
        ({"x-oss-forbid-overwrite": "false"}, (403, "AccessDenied")),
        ({"success_action_status": None}, (400, "InvalidArgument")),
    ],
)
def test_every_field_is_checked(policy: Json, change: dict[str, Any], expected: tuple[int, str]) -> None:
    fields = {k: v for k, v in (form(policy, "a.wav") | change).items() if v is not None}
    assert oss_error(post_form(policy, fields, b"x")) == expected


def test_the_directory_alone_is_no_name(policy: Json) -> None:
    for name in ("", "../x"):
        fields = form(policy, name) | ({"key": policy["upload_dir"] + "x"} if name else {})
        assert oss_error(post_form(policy, fields, b"x")) == (403, "AccessDenied")


def test_the_file_comes_last_and_alone(policy: Json) -> None:
    fields: Parts = [(name, (None, value)) for name, value in form(policy, "a.wav").items()]
    file: Parts = [("file", ("a.wav", "x"))]
    misnamed: Parts = [("audio", ("a.wav", "x"))]
    for parts, code in [
        ([*file, *fields], "MalformedPOSTRequest"),
        ([*fields, *misnamed], "MalformedPOSTRequest"),
        (fields, "IncorrectNumberOfFilesInPOSTRequest"),
        ([*fields, *file, *file], "IncorrectNumberOfFilesInPOSTRequest"),
    ]:
        assert oss_error(ANYBODY.post(policy["upload_host"], files=parts)) == (400, code)
    assert oss_error(ANYBODY.post(policy["upload_host"], data={"key": "x"})) == (412, "PreconditionFailed")
    assert ANYBODY.post(policy["upload_host"], files=[*fields, *file]).status_code == 200


def test_a_name_is_used_once(policy: Json) -> None:
    fields = form(policy, "a.wav")
    assert post_form(policy, fields, b"x").status_code == 200
    assert oss_error(post_form(policy, fields, b"y")) == (409, "FileAlreadyExists")
    assert post_form(policy, form(policy, "b.wav"), b"y").status_code == 200


@pytest.mark.parametrize("size", [1024 * 1024 + 1, 2 * 1024 * 1024])
def test_sizes_are_bounded(policy: Json, size: int) -> None:
    assert post_form(policy, form(policy, "fits.wav"), b"x" * 1024 * 1024).status_code == 200
    assert oss_error(post_form(policy, form(policy, "large.wav"), b"x" * size)) == (400, "EntityTooLarge")


def test_the_storage_takes_no_authorization(policy: Json) -> None:
    refused = post_form(policy, form(policy, "a.wav"), b"x", headers={"Authorization": "Bearer sk-leaked"})
    assert oss_error(refused) == (400, "InvalidArgument")


def test_nobody_reads_from_the_storage(services: Services) -> None:
    key = services.upload(tone(1.5)).removeprefix("oss://")
    address = f"{services.server.http_url}/dashscope-file-sandbox/{key}"
    for refused in (ANYBODY.get(address), services.http.get(address), ANYBODY.put(address), ANYBODY.delete(address)):
        assert oss_error(refused) == (403, "AccessDenied")


def test_policies_expire(start_sandbox: Callable[[SandboxOptions], RunningSandbox]) -> None:
    with calling(start_sandbox(SandboxOptions(upload_policy_seconds=0))) as services:
        policy = services.policy()
        refused = post_form(policy, form(policy, "a.wav"), b"x")
        assert oss_error(refused) == (403, "AccessDenied")
        assert "Invalid according to Policy: Policy expired." in refused.text


def test_policies_can_be_limited(start_sandbox: Callable[[SandboxOptions], RunningSandbox]) -> None:
    with calling(start_sandbox(SandboxOptions(upload_policies_per_second=1))) as services:
        query = {"action": "getPolicy", "model": FLASH}
        answers = [services.http.get("/api/v1/uploads", params=query) for _ in range(2)]
        assert error(answers[1])[:2] == (429, "Throttling.RateQuota")
        assert services.policy(FILETRANS)


@pytest.mark.parametrize(("how", "words"), [("refused", "Access denied"), ("expired", "Policy expired")])
def test_uploads_can_be_made_to_fail(
    start_sandbox: Callable[[SandboxOptions], RunningSandbox], how: str, words: str
) -> None:
    with calling(start_sandbox(SandboxOptions())) as services:
        policy = services.policy()
        services.switch_on(uploads={"how": how, "count": 1})
        refused = post_form(policy, form(policy, "a.wav"), b"x")
        assert oss_error(refused) == (403, "AccessDenied")
        assert words in refused.text
        assert post_form(policy, form(policy, "a.wav"), b"x").status_code == 200
