"""The API's description: whole, in Chinese, and true to the contracts that every route keeps."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from app.main import create_app
from app.settings import Settings

CHINESE = re.compile(r"[\u4e00-\u9fff]")
# What real keys and tokens look like; `sk-test-…` and `sk-****…` are plain inventions.
REAL_LOOKING = re.compile(r"sk-(?!test-|\*)[\w.-]{8,}|LTAI[A-Za-z0-9]{12,}|eyJ[\w-]{10,}\.")
# The plain OAuth2 answer, audio files, event streams and files for spreadsheets have no envelope.
WITHOUT_ENVELOPE = {
    "/api/auth/token",
    "/media/{key}",
    "/api/audio/records/{record_id}/events",
    "/api/audio/history.csv",
}
# Its fields are OAuth2's and FastAPI's, not ours.
OAUTH2_FORM = "Body_token_api_auth_token_post"
JSON = "application/json"

Json = dict[str, Any]


def describe() -> Json:
    """The schema of the application with every route in it."""
    return create_app(Settings(environment="development", storage="local")).openapi()


SCHEMA = describe()
OPERATIONS: dict[str, Json] = {
    f"{method.upper()} {path}": operation
    for path, operations in SCHEMA["paths"].items()
    for method, operation in operations.items()
}
WITH_INPUT = [name for name, operation in OPERATIONS.items() if {"parameters", "requestBody"} & operation.keys()]
ENVELOPED = [name for name in OPERATIONS if name.split()[1] not in WITHOUT_ENVELOPE]
WITH_TOKEN = [name for name, operation in OPERATIONS.items() if operation.get("security")]
WITH_JSON_BODY = [
    name for name, operation in OPERATIONS.items() if JSON in operation.get("requestBody", {}).get("content", {})
]


def resolve(schema: Json) -> Json:
    """The schema itself, wherever it is kept. Raises KeyError for a reference that leads nowhere."""
    while "$ref" in schema:
        target: Any = SCHEMA
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        schema = target
    return schema


def walk(node: Any) -> Iterator[Any]:
    """Every value inside a JSON document, itself included."""
    yield node
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        yield from walk(child)


def examples(operation: Json) -> list[Any]:
    """The bodies that the documentation pages offer to send."""
    content = operation["requestBody"]["content"][JSON]
    if "examples" in content:
        return [example["value"] for example in content["examples"].values()]
    properties = resolve(content["schema"])["properties"]
    return [{name: schema["examples"][0] for name, schema in properties.items() if "examples" in schema}]


def test_describes_something() -> None:
    assert SCHEMA["openapi"].startswith("3.1")
    assert CHINESE.search(SCHEMA["info"]["title"])
    assert {"POST /api/audio/tts/synthesize", "GET /api/audio/history", "PUT /api/user/apikey"} <= OPERATIONS.keys()


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_explained_in_chinese(name: str) -> None:
    operation = OPERATIONS[name]
    texts = [operation["summary"], operation["description"], *operation["tags"]]
    texts += [each["description"] for each in operation.get("parameters", []) if each["in"] == "query"]
    for text in texts:
        assert CHINESE.search(text), text
    assert len(operation["tags"]) == 1


@pytest.mark.parametrize("name", [name for name in SCHEMA["components"]["schemas"] if name != OAUTH2_FORM])
def test_every_field_is_explained_in_chinese(name: str) -> None:
    for field, schema in SCHEMA["components"]["schemas"][name]["properties"].items():
        assert CHINESE.search(schema.get("description", "")), field


@pytest.mark.parametrize("name", ENVELOPED)
def test_success_is_an_envelope_around_typed_data(name: str) -> None:
    envelope = resolve(OPERATIONS[name]["responses"]["200"]["content"][JSON]["schema"])
    assert envelope["properties"].keys() == {"code", "message", "data"}
    data = resolve(envelope["properties"]["data"])
    assert data.get("properties") or data.get("items") or data.get("type") == "null"


@pytest.mark.parametrize("name", OPERATIONS)
def test_error_answers_are_documented_with_an_example(name: str) -> None:
    answers = OPERATIONS[name]["responses"]
    assert "422" not in answers
    for status, answer in answers.items():
        if int(status) < 400 or JSON not in answer.get("content", {}):
            continue
        content = answer["content"][JSON]
        assert content["schema"] == {"$ref": "#/components/schemas/ErrorEnvelope"}
        assert content["example"]["code"] == int(status)
        assert content["example"].keys() == {"code", "message", "data", "error"}
        assert CHINESE.search(content["example"]["message"])


@pytest.mark.parametrize("name", WITH_TOKEN)
def test_routes_with_login_say_what_happens_without_it(name: str) -> None:
    assert "401" in OPERATIONS[name]["responses"]


@pytest.mark.parametrize("name", [name for name in OPERATIONS if " /api/" in name and " /api/auth/" not in name])
def test_every_route_of_the_product_needs_a_login(name: str) -> None:
    assert name in WITH_TOKEN


@pytest.mark.parametrize("name", WITH_INPUT)
def test_routes_with_input_say_what_happens_when_it_is_wrong(name: str) -> None:
    assert {"400", "404"} & OPERATIONS[name]["responses"].keys()


@pytest.mark.parametrize("name", WITH_JSON_BODY)
def test_bodies_come_with_an_example_that_has_every_required_field(name: str) -> None:
    body = resolve(OPERATIONS[name]["requestBody"]["content"][JSON]["schema"])
    for example in examples(OPERATIONS[name]):
        assert set(body.get("required", [])) <= example.keys() <= body["properties"].keys()


def test_every_reference_leads_somewhere_and_no_schema_is_left_over() -> None:
    references = {node["$ref"] for node in walk(SCHEMA) if isinstance(node, dict) and "$ref" in node}
    for reference in references:
        resolve({"$ref": reference})
    assert {f"#/components/schemas/{name}" for name in SCHEMA["components"]["schemas"]} == references


def test_operation_ids_are_unique() -> None:
    names = [operation["operationId"] for operation in OPERATIONS.values()]
    assert sorted(set(names)) == sorted(names)


def test_nothing_looks_like_a_real_key() -> None:
    texts = [node for node in walk(SCHEMA) if isinstance(node, str)]
    assert [text for text in texts if REAL_LOOKING.search(text)] == []
