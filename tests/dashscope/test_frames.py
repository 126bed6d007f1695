"""Whatever the provider sends is an event or malformed, and nothing else."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from app.dashscope.frames import Event, MalformedEvent, parse_event

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(["task-started", "result-generated", "task-finished", "task-failed"])
counts = st.integers(min_value=0, max_value=10**9)


def parse(text: str) -> Event | None:
    try:
        return parse_event(text)
    except MalformedEvent:
        return None


@given(st.text())
def test_any_text_is_an_event_or_malformed(text: str) -> None:
    parse(text)


@given(anything)
def test_any_json_is_an_event_or_malformed(value: Any) -> None:
    parse(json.dumps(value))


@given(
    header=st.fixed_dictionaries(
        {},
        optional={
            "event": names | anything,
            "task_id": anything,
            "attributes": st.fixed_dictionaries({}, optional={"request_uuid": anything}) | anything,
            "error_code": anything,
            "error_message": anything,
        },
    ),
    payload=st.fixed_dictionaries({}, optional={"usage": st.fixed_dictionaries({"characters": anything}) | anything}),
)
def test_an_event_has_only_the_types_that_it_promises(header: dict[str, Any], payload: dict[str, Any]) -> None:
    event = parse(json.dumps({"header": header, "payload": payload}))
    if event is None:
        return
    assert isinstance(event.name, str)
    assert event.task_id is None or event.task_id
    assert event.request_id is None or event.request_id
    assert event.characters is None or (type(event.characters) is int and event.characters >= 0)
    assert isinstance(event.error_code, str)
    assert isinstance(event.error_message, str)


@given(name=names, task_id=st.text(min_size=1), characters=counts, request_id=st.text(min_size=1))
def test_a_good_event_is_read_whole(name: str, task_id: str, characters: int, request_id: str) -> None:
    header = {"event": name, "task_id": task_id, "attributes": {"request_uuid": request_id}}
    text = json.dumps({"header": header, "payload": {"usage": {"characters": characters}}})
    assert parse_event(text) == Event(name, task_id, characters, request_id)


def test_deep_nesting_is_malformed() -> None:
    assert parse("[" * 100_000) is None
