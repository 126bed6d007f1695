"""The voices that the provider ships: spec 4.1."""

import time
from collections import Counter
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.conftest import Account, CreateAccount
from tests.servers import Server

PATH = "/api/audio/voice/system"
FLASH, PLUS, V2 = "cosyvoice-v3-flash", "cosyvoice-v3-plus", "cosyvoice-v2"
Voices = list[dict[str, Any]]


def spec_example(
    voice_id: str, name: str, trait: str, category: str, *, instruct: bool, timestamp: bool
) -> dict[str, Any]:
    """A voice as the spec prints it; what its three examples share is here."""
    return {
        "voice_id": voice_id,
        "name": name,
        "trait": trait,
        "age": "20~30岁",
        "category": category,
        "languages": ["中文(普通话)", "英文"],
        "models": [FLASH, PLUS],
        "features": {"ssml": True, "instruct": instruct, "timestamp": timestamp},
    }


SPEC_EXAMPLES = [
    spec_example("longanyang", "龙安洋", "阳光大男孩", "社交陪伴", instruct=True, timestamp=False),
    spec_example("longanhuan", "龙安欢", "欢脱元气女", "社交陪伴", instruct=True, timestamp=False),
    spec_example("longyingjing_v3", "龙应静", "低调冷静女", "客服", instruct=False, timestamp=True),
]
# Of all voices, and by model (VOICES.md).
CATEGORIES = {
    "社交陪伴": (42, 21, 2, 21),
    "童声": (6, 1, 0, 5),
    "智能玩具/儿童故事机": (4, 4, 0, 0),
    "消费电子-儿童有声书": (4, 2, 0, 2),
    "消费电子-儿童陪伴": (2, 0, 0, 2),
    "消费电子-教育培训": (1, 0, 0, 1),
    "方言": (9, 6, 0, 3),
    "出海营销": (44, 22, 0, 22),
    "诗词朗诵": (4, 1, 0, 3),
    "电话销售": (2, 1, 0, 1),
    "客服": (14, 4, 1, 10),
    "语音助手": (15, 8, 0, 7),
    "有声书": (21, 10, 0, 11),
    "短视频配音": (11, 3, 0, 8),
    "直播带货": (6, 2, 0, 4),
    "新闻播报": (9, 3, 0, 6),
}


async def listed(account: Account, **query: str) -> Voices:
    """The voices that a user is shown."""
    answer = await account.client.get(PATH, params=query)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["code"], answer.json()["message"]) == (200, "success")
    voices: Voices = answer.json()["data"]
    return voices


def ids(voices: Voices) -> list[str]:
    """Who is in a list."""
    return [voice["voice_id"] for voice in voices]


@pytest.fixture
async def overseas(account: Account) -> Account:
    """A user with a key of Singapore."""
    key = {"api_key": account.api_key, "region": "singapore"}
    assert (await account.client.put("/api/user/apikey", json=key)).status_code == 200
    return account


# ---- What is listed


async def test_every_voice_is_listed_as_the_spec_says(account: Account) -> None:
    voices = await listed(account)
    assert len(set(ids(voices))) == len(voices) == 194
    for voice in voices:
        assert list(voice) == list(SPEC_EXAMPLES[0])
        assert list(voice["features"]) == ["ssml", "instruct", "timestamp"]
        assert {type(flag) for flag in voice["features"].values()} == {bool}
    assert Counter(model for voice in voices for model in voice["models"]) == {FLASH: 88, PLUS: 3, V2: 106}


async def test_the_examples_of_the_spec_are_listed_word_for_word(account: Account) -> None:
    assert await listed(account, model=PLUS) == SPEC_EXAMPLES
    assert (await listed(account))[0] == SPEC_EXAMPLES[0]


async def test_an_age_that_nobody_knows_is_null(account: Account) -> None:
    assert {voice["age"] for voice in await listed(account, model=V2)} == {None}
    assert None not in {voice["age"] for voice in await listed(account, model=FLASH)}


async def test_categories_have_the_voices_that_they_should(account: Account) -> None:
    assert Counter(voice["category"] for voice in await listed(account)) == {
        category: counts[0] for category, counts in CATEGORIES.items()
    }
    for category, (total, *by_model) in CATEGORIES.items():
        assert len(await listed(account, category=category)) == total
        for model, count in zip((FLASH, PLUS, V2), by_model, strict=True):
            assert len(await listed(account, category=category, model=model)) == count


# ---- Filters


async def test_filters_narrow_the_list_together(account: Account) -> None:
    everyone = await listed(account)
    filters = {"model": FLASH, "category": "方言", "language": "yue", "feature": "ssml", "q": "女"}
    assert ids(await listed(account, **filters)) == ["longjiaxin_v3", "longjiayi_v3"]
    for name, value in filters.items():
        some = ids(await listed(account, **{name: value}))
        assert 2 < len(some) < 194
        assert some == [voice_id for voice_id in ids(everyone) if voice_id in some]
    assert await listed(account, **{**filters, "model": V2, "q": "不存在"}) == []


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ({"language": "zh"}, 150),
        ({"language": "中文（四川话）"}, 1),
        ({"language": "en", "model": V2, "category": "出海营销"}, 16),
        ({"feature": "instruct"}, 4),
        ({"feature": "timestamp", "model": PLUS}, 1),
        ({"q": "粤语 男"}, 2),
        ({"q": "LOONG 美式"}, 20),
    ],
)
async def test_voices_are_found_by_what_they_are(account: Account, query: dict[str, str], count: int) -> None:
    assert len(await listed(account, **query)) == count


@pytest.mark.parametrize(
    "query",
    [
        {"model": "cosyvoice-v1"},
        {"model": "COSYVOICE-V2"},
        {"model": "cosyvoice"},
        {"category": "社交"},
        {"category": "社交陪伴（标杆音色）"},
        {"language": "klingon"},
        {"feature": "model_dump"},
        {"q": "龙安洋 龙安欢"},
    ],
)
async def test_what_is_unknown_has_no_voices(account: Account, query: dict[str, str]) -> None:
    assert await listed(account, **query) == []


async def test_empty_filters_are_as_if_not_given(account: Account) -> None:
    empty = dict.fromkeys(("model", "category", "language", "feature", "q"), "")
    assert len(await listed(account, **empty)) == 194
    assert await listed(account, **{**empty, "model": PLUS}) == SPEC_EXAMPLES


# ---- Regions


async def test_without_a_key_the_voices_of_beijing_are_listed(backend: Server, create_account: CreateAccount) -> None:
    account = await create_account(backend, api_key=None)
    assert len(await listed(account)) == 194


async def test_singapore_lists_its_own_voices_with_its_own_models(overseas: Account) -> None:
    voices = await listed(overseas)
    assert len(voices) == 32
    assert Counter(model for voice in voices for model in voice["models"]) == {FLASH: 32, PLUS: 2}
    assert voices[0] == SPEC_EXAMPLES[0]
    assert await listed(overseas, model=PLUS) == SPEC_EXAMPLES[:2]
    assert await listed(overseas, model=V2) == []
    assert ids(await listed(overseas, language="yue")) == ["longanyue_v3"]
    assert await listed(overseas, q="longyingjing_v3") == []


async def test_the_list_follows_the_key(overseas: Account) -> None:
    assert len(await listed(overseas)) == 32
    assert (await overseas.client.put("/api/user/apikey", json={"api_key": overseas.api_key})).status_code == 200
    assert len(await listed(overseas)) == 194


async def test_a_removed_key_leaves_the_voices_of_beijing(overseas: Account) -> None:
    assert (await overseas.client.delete("/api/user/apikey")).status_code == 200
    assert len(await listed(overseas)) == 194


# ---- Who may ask, and strange questions


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer nonsense"}])
async def test_a_login_is_needed(backend: Server, headers: dict[str, str]) -> None:
    async with httpx.AsyncClient(base_url=backend.url, headers=headers, trust_env=False) as stranger:
        answer = await stranger.get(PATH)
    assert (answer.status_code, answer.json()["error"]) == (401, "UNAUTHORIZED")


STRANGE = [
    ".*",
    "[",
    "(?:a+)+$",
    "%",
    "\\",
    "' OR 1=1 --",
    "<script>",
    "{0}",
    "\x00",
    "\r\n\x1b",
    "🐉",
    "\u202e",
    "ﷺ" * 60,
]


@pytest.mark.parametrize("name", ["model", "category", "language", "feature", "q"])
async def test_strange_characters_find_nothing_and_break_nothing(account: Account, name: str) -> None:
    for encoded in [*map(quote, STRANGE), "%ED%A0%80", "%FF%FE", "%C0%80", "%u4E2D", "%"]:
        answer = await account.client.get(f"{PATH}?{name}={encoded}")
        assert (answer.status_code, answer.json()["data"]) == (200, []), encoded


@pytest.mark.parametrize("name", ["language", "feature", "q"])
async def test_absurd_lengths_are_refused(account: Account, name: str) -> None:
    for length in (101, 30_000):
        answer = await account.client.get(PATH, params={name: "龙" * (length // 9) + "a" * length})
        assert (answer.status_code, answer.json()["error"]) == (400, "INVALID_REQUEST")
        assert name in answer.json()["message"]


async def test_repeated_and_unknown_parameters_do_no_harm(account: Account) -> None:
    repeated = await account.client.get(f"{PATH}?model={V2}&model={PLUS}&{'q=x&' * 500}q=")
    assert repeated.json()["data"] == SPEC_EXAMPLES
    unknown = await account.client.get(f"{PATH}?region=singapore&page=-1&model[]={PLUS}&Model={PLUS}&=&&")
    assert len(unknown.json()["data"]) == 194


async def test_the_list_is_answered_at_once(account: Account) -> None:
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        await listed(account)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.1


# ---- Description


async def test_the_description_tells_every_filter_and_that_an_age_may_be_null(backend: Server) -> None:
    schema = httpx.get(f"{backend.url}/openapi.json", trust_env=False).json()
    operation = schema["paths"][PATH]["get"]
    assert [each["name"] for each in operation["parameters"]] == ["model", "category", "language", "feature", "q"]
    assert not any(each["required"] for each in operation["parameters"])
    voice = schema["components"]["schemas"]["SystemVoiceInfo"]
    assert voice["required"] == list(voice["properties"]) == list(SPEC_EXAMPLES[0])
    assert {each["type"] for each in voice["properties"]["age"]["anyOf"]} == {"string", "null"}
