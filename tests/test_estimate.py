"""What a text will cost, told before it is spoken: what the provider counts then."""

import asyncio
from decimal import Decimal
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.catalog import DEFAULT_REGION, count_characters, system_voices
from app.sandbox.characters import count_characters as count_at_provider
from app.sandbox.ssml import read_ssml
from app.services.longtext import _split
from tests.conftest import Account, CreateAccount
from tests.narrating import narrate, padded, prose
from tests.servers import Sandbox, Server

PATH = "/api/audio/tts/estimate"
PRICE = Decimal("0.000014335")


async def ask(account: Account, text: str, **fields: Any) -> httpx.Response:
    """Ask what a text will cost."""
    return await account.client.post(PATH, json={"model": "cosyvoice-v3-flash", "text": text, **fields})


async def estimate(account: Account, text: str, **fields: Any) -> dict[str, Any]:
    """What a text will cost."""
    answer = await ask(account, text, **fields)
    assert answer.status_code == 200, answer.text
    data: dict[str, Any] = answer.json()["data"]
    return data


# ---- The count


letters = st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufffe\uffff")
odd_letters = st.sampled_from("你好，。！a1 \n\t〇々〻㐀龥豈\U00020000\U0002f800\U00030000あ가🙂\u200d")
texts = st.text(st.one_of(letters, odd_letters))
passages = st.text(letters, min_size=1).map(lambda text: "字" + text)
escapes = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "字": "&#23383;"})


@given(st.lists(texts, min_size=1), st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_a_text_counts_what_the_provider_counts_however_it_is_cut(pieces: list[str], times: int) -> None:
    text = "字" + "".join(pieces) * min(times, 1 + 20_000 // (1 + sum(map(len, pieces))))
    segments, characters = _split(text, False, 4)
    assert "".join(segments) == text
    assert characters == sum(map(count_at_provider, segments)) or any(not segment.strip() for segment in segments)
    assert count_characters(text) == count_at_provider(text)


@given(st.lists(st.tuples(passages, st.sampled_from(["", " ", "\n"])), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_markup_counts_what_the_provider_reads_in_it(written: list[tuple[str, str]]) -> None:
    documents = (
        f"<speak rate='1.2'>{text.translate(escapes)}<break time=\"50ms\"/><s>好</s><!-- > 注 --></speak >{gap}"
        for text, gap in written
    )
    document = "".join(documents)
    heard = "".join(line.text for line in read_ssml(document))
    assert count_characters(document, ssml=True) == count_at_provider(heard)


# ---- Against what is billed


ODD_TEXTS = [
    "你好",
    "a",
    "中A文123",
    "中 文。",
    "  前后有空白\n\n",
    "床前明月光，疑是地上霜。",
    "全角：ＡＢＣ１２３，！？",
    "かなとカナと漢字",
    "한국어 텍스트",
    "emoji 🙂👩‍👩‍👧‍👦🇨🇳 done",
    "e\u0301 combining",
    "〇一二三〇々",
    "生僻字𠮷𡃁𪚥",
    "兼容豈更車",
    "注音ㄅㄆㄇ",
    "价格：￥3.14，约$0.45。",
    "https://example.com/a?b=c&d=e#f",
    "tab\there",
    "行一\r\n行二\r行三",
    "……省略……",
    "1",
    "。你。",
    "<不是标签>你好",
    "1 < 2 & 3 > 2",
    "&amp;不是实体",
    "阿拉伯 مرحبا بالعالم",
    "ไทยสวัสดี",
    "\u3000全角空格\u3000",
    "“引号”‘单’「角」『双』",
    "零\u200b宽\ufeff字符",
    "<speak>你好</speak>",
    "<speak>你好<break time='500ms'/>世界</speak>",
    "<speak>A&amp;B &lt;标签&gt; &#20013;&#x6587;</speak>",
    "  <speak rate='1.1' volume=\"60\">首尾空白</speak>\n",
    "<speak>一。</speak>\n\n<speak>二。</speak> <speak>三。</speak>",
    "<speak><s>句一。</s><p>段落。</p><!-- 注释不计 --></speak>",
    "<speak><![CDATA[原样 & <文字>]]></speak>",
    "<speak>行一\r\n行二</speak>",
]


@pytest.mark.parametrize("begin", range(0, len(ODD_TEXTS), 10))
async def test_what_is_billed_is_what_was_estimated(
    backend: Server, sandbox: Sandbox, create_account: CreateAccount, begin: int
) -> None:
    account = await create_account(backend)
    some = ODD_TEXTS[begin : begin + 10]
    expected = [await estimate(account, text) for text in some]
    assert sandbox.ledger(account.api_key) == []
    answers = await asyncio.gather(*(account.synthesize(text, format="pcm", sample_rate=8000) for text in some))
    for text, told, answer in zip(some, expected, answers, strict=True):
        assert answer.status_code == 200, (text, answer.text)
        spoken = answer.json()["data"]
        assert (told["segments"], told["characters"], told["bill"]) == (1, spoken["characters"], spoken["bill"]), text
        assert Decimal(told["amount"]) == spoken["characters"] * PRICE


@pytest.mark.parametrize(
    "text",
    [padded(2) + "。\n" * 1500 + padded(1, 9), prose(40), f"<speak>{prose(20)}</speak>\n<speak>{prose(8)}</speak>"],
    ids=["silence", "prose", "markup"],
)
async def test_a_long_text_is_bought_as_it_was_estimated(account: Account, sandbox: Sandbox, text: str) -> None:
    told = await estimate(account, text)
    spoken = await narrate(account, text, sample_rate=8000)
    assert told["segments"] == spoken["segments"] > 1
    assert told["characters"] == spoken["total_characters"]
    assert told["characters"] == sum(call["counted"] for call in sandbox.ledger(account.api_key))
    assert told["bill"] == spoken["bill"]


# ---- As clients see it


async def test_the_answer_tells_the_price_without_a_key_or_a_record(
    backend: Server, create_account: CreateAccount
) -> None:
    account = await create_account(backend, api_key=None)
    assert await estimate(account, "你好，欢迎使用语音合成服务！") == {
        "characters": 26,
        "segments": 1,
        "bill": "0.0004",
        "amount": "0.00037271",
        "price_per_10k_chars": "0.14335",
        "currency": "CNY",
        "model": "cosyvoice-v3-flash",
    }
    assert (await account.history())["total"] == 0


async def test_every_field_of_a_synthesis_is_taken(account: Account) -> None:
    fields = {"voice": "longanyang", "format": "opus", "sample_rate": 48000, "volume": 80, "speech_rate": 1.5}
    more = {"pitch_rate": 0.8, "stream": True, "async": True, "subtitle": "srt"}
    told = await estimate(account, "你好", **fields, **more, instruction="你说话的情感是happy。")
    assert told["characters"] == 4
    assert (await estimate(account, "好" * 30_000))["characters"] == 60_000


SILENT_VOICE = next(
    voice.voice_id
    for voice in system_voices(DEFAULT_REGION)
    if "cosyvoice-v3-flash" in voice.models and not voice.features.ssml
)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "cosyvoice-v9"}, "INVALID_MODEL"),
        ({"voice": "nobody"}, "INVALID_VOICE"),
        ({"voice": ""}, "INVALID_VOICE"),
        ({"voice": None}, "INVALID_REQUEST"),
        ({"voice": "longxiaochun_v2"}, "MODEL_VOICE_MISMATCH"),
        ({"text": ""}, "INVALID_REQUEST"),
        ({"text": " \n"}, "INVALID_REQUEST"),
        ({"text": "。" * 5000}, "INVALID_REQUEST"),
        ({"text": "好" * 500_001}, "TEXT_TOO_LONG"),
        ({"text": "<speak>你好"}, "INVALID_REQUEST"),
        ({"text": "<speak>你好<b></speak>"}, "INVALID_REQUEST"),
        ({"text": "<speak>好</speak>", "voice": SILENT_VOICE}, "INVALID_VOICE"),
        ({"text": None}, "INVALID_REQUEST"),
        ({"volume": 101}, "INVALID_REQUEST"),
        ({"stream": "yes"}, "INVALID_REQUEST"),
        ({"instruction": "好" * 60}, "INVALID_REQUEST"),
    ],
)
async def test_what_could_not_be_spoken_has_no_price(account: Account, fields: dict[str, Any], error: str) -> None:
    answer = await ask(account, **{"text": "你好", **fields})
    assert (answer.status_code, answer.json()["error"]) == (400, error), answer.text
