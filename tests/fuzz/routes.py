"""Every operation of the API's description, with data that fits it and data that does not (schemathesis)."""

import base64
import json
import re
import uuid
from collections.abc import Callable
from typing import Any

import httpx
import schemathesis
from jose import jwt
from schemathesis import Case
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import Status, from_schema
from schemathesis.engine.events import FatalError, NonFatalError, ScenarioFinished

from tests.fuzz.tally import Tally

# What changes accounts is tried by admins whom nobody else needs: whoever is logged out, sees nothing more.
OWN_ACCOUNT = r"^/api/(auth|user|admin)/"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
    "well_formed_is_understood",
    "every_answer_has_an_id",
)
# The provider may find fault with what it is given, and our own faults are never answered with 502.
ALLOWING = {"not_a_server_error": {"enabled": True, "expected-statuses": ["2xx", "3xx", "4xx", "502"]}}
# What no schema says: how fields go together, where an address leads, what a task has, how many digits a number has;
# and what an OAuth2 form is, which has no null and of which an empty field counts as none.
UNTOLD = re.compile(
    "^from 不能晚于 to$|^context 不能与 |^from 与 to 之间最多|必须且只能提供一个$|^(audio|file)_url "
    "|^channel_id 必须是以下之一：|不支持 instruction，|最多 8 位小数$|^缺少必填字段 (username|password)"
    "|^grant_type 必须是"
)
# Without a model that there is, nothing behind it would be reached.
PLAUSIBLE = {
    "body.model": (
        "cosyvoice-v3-flash", "cosyvoice-v3-plus", "cosyvoice-v2", "qwen3-asr-flash", "qwen-audio-asr",
        "qwen3-asr-flash-filetrans", "paraformer-v2",
    ),
    "body.target_model": ("cosyvoice-v3-flash", "cosyvoice-v3-plus", "cosyvoice-v2"),
    "body.voice": ("longanyang", "longxiaochun_v2"),
}  # fmt: skip
ANSWER_SECONDS = 30

_NOBODY = {"sub": str(uuid.uuid4()), "iat": 1, "exp": 4_000_000_000, "jti": uuid.uuid4().hex}
_FORGED = jwt.encode(_NOBODY, "not the secret", algorithm="HS256")
_UNSIGNED = ".".join(
    base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in ({"alg": "none"}, _NOBODY)
)
STRANGERS = [
    {},
    *(
        {"Authorization": told}
        for told in ("", "Bearer", f"Bearer {_FORGED}", f"Bearer {_UNSIGNED}.", "Bearer a.b.c", "Basic YTpi")
    ),
]

TakeToken = Callable[[], str]


@schemathesis.check
def well_formed_is_understood(ctx: Any, response: schemathesis.Response, case: Case[Any]) -> bool | None:
    """What the description allows is never refused as ill-formed; by its meaning it may be."""
    assert ctx is not None
    if case.meta is None or not case.meta.generation.mode.is_positive or response.status_code != 400:
        return None
    told = response.json()
    assert told["error"] != "INVALID_REQUEST" or UNTOLD.search(told["message"]), told["message"]
    return None


@schemathesis.check
def every_answer_has_an_id(ctx: Any, response: schemathesis.Response, case: Case[Any]) -> bool | None:
    """Whatever is answered can be found in the log."""
    assert ctx is not None
    assert "x-request-id" in response.headers, case.operation.label
    return None


def fuzz_routes(
    url: str, token: str, take_token: TakeToken, *, examples: int, phases: tuple[str, ...], seed: int = 1
) -> Tally:
    """Try every operation of a server with `examples` random cases, besides those at the bounds of each field.

    `token` is of a user with a key, `take_token` gives that of another one who may be lost.
    """
    tally = Tally("routes")
    for is_own_account in (False, True):
        described = schemathesis.openapi.from_url(
            f"{url}/openapi.json",
            config=_config("" if is_own_account else token, examples, phases, seed),
            timeout=ANSWER_SECONDS,
        )
        if is_own_account:
            schema = described.include(path_regex=OWN_ACCOUNT)
            schema.auth(refresh_interval=None)(_somebody_else(take_token))
        else:
            schema = described.exclude(path_regex=OWN_ACCOUNT)
        for event in from_schema(schema).execute():
            _note(event, tally)
    return tally


def _somebody_else(take_token: TakeToken) -> type[Any]:
    class SomebodyElse:
        """A user of his own for each case after which the last is one no more."""

        def get(self, case: Case[Any], context: Any) -> str:
            return take_token()

        def set(self, case: Case[Any], token: str, context: Any) -> None:
            case.headers["Authorization"] = f"Bearer {token}"

    return SomebodyElse


def refuse_strangers(url: str) -> Tally:
    """Ask for everything that needs a login without one, and with forged ones."""
    tally = Tally("strangers")
    schema = httpx.get(f"{url}/openapi.json", timeout=ANSWER_SECONDS).json()
    with httpx.Client(base_url=url, timeout=ANSWER_SECONDS) as client:
        for path, operations in schema["paths"].items():
            for method, operation in operations.items():
                if not operation.get("security"):
                    continue
                subject = f"{method.upper()} {path}"
                for headers in STRANGERS:
                    answer = client.request(method, re.sub(r"{\w+}", "1", path), headers=headers)
                    tally.cases[subject] += 1
                    tally.checks["refused"] += 1
                    tally.answers[subject, answer.status_code] += 1
                    if answer.status_code != 401 or answer.json()["error"] != "UNAUTHORIZED":
                        tally.fail(subject, "refused", f"{headers}: {answer.status_code} {answer.text[:200]}")
    return tally


def _config(token: str, examples: int, phases: tuple[str, ...], seed: int) -> SchemathesisConfig:
    return SchemathesisConfig.from_dict(
        {
            "seed": seed,
            "request-timeout": ANSWER_SECONDS,
            "continue-on-failure": True,
            "max-redirects": 0,
            "headers": {"Authorization": f"Bearer {token}"} if token else {},
            "suppress-health-check": ["all"],
            "generation": {
                "max-examples": examples,
                "deterministic": True,
                "no-shrink": True,
                "database": "none",
                "mode": "all",
                "with-security-parameters": False,
            },
            "parameters": {field: {"dictionary": field.rpartition(".")[2], "probability": 0.7} for field in PLAUSIBLE},
            "dictionaries": {field.rpartition(".")[2]: {"values": list(values)} for field, values in PLAUSIBLE.items()},
            "phases": {name: {"enabled": name in phases} for name in ("examples", "coverage", "fuzzing", "stateful")},
            "checks": {"enabled": False, **{name: {"enabled": True} for name in CHECKS}, **ALLOWING},
            "output": {"sanitization": {"enabled": False}},
        }
    )


def _note(event: object, tally: Tally) -> None:
    if isinstance(event, FatalError):
        raise event.exception
    if isinstance(event, NonFatalError):
        tally.fail(event.label, "could be tried", str(event.value))
    if not isinstance(event, ScenarioFinished):
        return
    labels = {case_id: node.value.operation.label for case_id, node in event.recorder.cases.items()}
    for case_id, tried in event.recorder.interactions.items():
        tally.cases[labels[case_id]] += 1
        tally.answers[labels[case_id], tried.response.status_code if tried.response else 0] += 1
    for case_id, checks in event.recorder.checks.items():
        for check in checks:
            tally.checks[check.name] += 1
            if check.status is Status.SUCCESS:
                continue
            assert check.failure_info is not None, check
            failure = " ".join(f"{check.failure_info.failure}".split())[:600]
            tally.fail(labels[case_id], check.name, f"{failure}: {check.failure_info.code_sample[:1500]}")
