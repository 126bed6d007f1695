"""Cues against what people can read, and documents against the parsers of FFmpeg."""

import io
import re
import unicodedata
from html import unescape
from itertools import pairwise

import av
import pytest
from av.subtitles.subtitle import AssSubtitle
from hypothesis import given, settings
from hypothesis import strategies as st

from app.subtitles import Cue, Sentence, Track, Word, make_cues, write_srt, write_txt, write_vtt

SHORTEST_MS, LONGEST_MS = 833, 7000
CAPTURED_TEXT = "听好了，从今儿起，别再把自己当软柿子捏，学着用狠角色的路子火。"
CAPTURED_TIMES_MS = [
    *(40, 180, 330, 730, 970, 1100, 1170, 1460),  # the first clauses, up to a pause
    *(1640, 1930, 2070, 2230, 2390, 2510, 2660, 2860, 3090, 3200, 3560),
    *(3760, 4080, 4190, 4370, 4570, 4780, 4900, 5000, 5150, 5250, 5610),
]
CAPTURED_PAUSES_MS = {(1460, 1640), (3560, 3760)}


def captured() -> Track:
    """What paraformer-v2 really answered: one word a character, punctuation apart."""
    times = [each for each in pairwise(CAPTURED_TIMES_MS) if each not in CAPTURED_PAUSES_MS]
    spoken = re.findall(r"(\w)(\W?)", CAPTURED_TEXT)
    words = tuple(Word(*time_ms, *text) for time_ms, text in zip(times, spoken, strict=True))
    return Track(0, (Sentence(40, 5610, CAPTURED_TEXT, words),))


def track(*sentences: Sentence, channel_id: int = 0) -> Track:
    return Track(channel_id, sentences)


def layout(text: str) -> list[tuple[str, ...]]:
    """The cues of a text that is spoken quickly enough not to matter."""
    return [cue.lines for cue in make_cues(track(Sentence(0, 10 * len(text), text)))]


def times_ms(cues: list[Cue]) -> list[tuple[int, int]]:
    return [(cue.begin_ms, cue.end_ms) for cue in cues]


def squeeze(text: str) -> str:
    """A text without what no subtitle shows: blanks and control characters."""
    return "".join(char for char in text if not char.isspace() and unicodedata.category(char) not in {"Cc", "Cs"})


def columns(line: str) -> int:
    marks = {"Mn", "Mc", "Me", "Cf", "Sk"}
    return sum(
        2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in line
        if unicodedata.category(char) not in marks
    )


def demux(document: str, format: str) -> list[tuple[int, int, str]]:
    """Begin, end and text of each cue, as FFmpeg finds them."""
    with av.open(io.BytesIO(document.encode()), "r", format=format) as container:
        packets = [packet for packet in container.demux(container.streams.subtitles[0]) if packet.size]
        return [
            (packet.pts or 0, (packet.pts or 0) + (packet.duration or 0), bytes(packet).decode()) for packet in packets
        ]


def decode(document: str, format: str) -> str:
    """What FFmpeg shows of a single cue, with the codes for formatting in braces."""
    with av.open(io.BytesIO(document.encode()), "r", format=format) as container:
        packets = [packet for packet in container.demux(container.streams.subtitles[0]) if packet.size]
        (subtitle,) = [each for packet in packets for each in packet.decode()]
        assert isinstance(subtitle, AssSubtitle)
        return subtitle.ass.decode().removeprefix("0,0,Default,,0,0,0,,")


# ---- Layout


def test_captured_transcript() -> None:
    assert make_cues(captured()) == [
        Cue(40, 3560, ("听好了，从今儿起，", "别再把自己当软柿子捏，"), 0),
        Cue(3760, 5610, ("学着用狠角色的路子火。",), 0),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("好。", [("好。",)], id="short"),
        pytest.param(
            "一二三四五六七八九十一二三四五六七。", [("一二三四五六七八九十一二三四五六七。",)], id="full line"
        ),
        pytest.param(
            "The quick brown fox jumps over a lazy dog.",
            [("The quick brown fox jumps over a lazy dog.",)],
            id="full Latin line",
        ),
        pytest.param(
            "I never said that she stole the money from the old man who lived next door.",
            [("I never said that she stole the money", "from the old man who lived next door.")],
            id="balanced at a blank",
        ),
        pytest.param(
            "He was tired, so he went home and slept until noon.",
            [("He was tired,", "so he went home and slept until noon.")],
            id="at a comma first",
        ),
        pytest.param(
            "他说：“你好吗？”然后就走了（没有回头）。再也没有人见过他，直到今天。",
            [("他说：“你好吗？”", "然后就走了（没有回头）。"), ("再也没有人见过他，直到今天。",)],
            id="quotes and brackets",
        ),
        pytest.param(
            "今天我们来介绍DashScope的语音识别服务，价格是每小时3.14元，用户数超过1,000,000人。",
            [("今天我们来介绍", "DashScope的语音识别服务，"), ("价格是每小时3.14元，", "用户数超过1,000,000人。")],
            id="mixed",
        ),
        pytest.param(
            "안녕하세요 저는 오늘 여러분께 음성 인식 서비스에 대해서",
            [("안녕하세요 저는 오늘 여러분께", "음성 인식 서비스에 대해서")],
            id="Korean at blanks",
        ),
        pytest.param(
            "请看https://help.aliyun.com/zh/model-studio/paraformer-recorded-speech-recognition这一页",
            [
                ("请看", "https://help.aliyun.com/zh/model-studio/"),
                ("paraformer-recorded-speech-recognition", "这一页"),
            ],
            id="over-long address",
        ),
        pytest.param(
            "The quick brown fox jumps over a lazy dog. The dog was not amused.",
            [("The quick brown fox jumps over a lazy dog.", "The dog was not amused.")],
            id="full line and a blank",
        ),
        pytest.param(
            "今年我们公司总共招聘了员工300人左右都分配到了北京上海等地",
            [("今年我们公司总共招聘了员工", "300人左右都分配到了北京上海等地")],
            id="number with its unit",
        ),
        pytest.param("🇨🇳" * 20, [("🇨🇳" * 10, "🇨🇳" * 10)], id="flags are wide"),
        pytest.param("a\r\n\r\n b\x00c\u2028d\u3000e\ud800f", [("a b c d e f",)], id="blanks and control characters"),
        pytest.param("", [], id="empty"),
        pytest.param(" \n\t\x00", [], id="blank"),
    ],
)
def test_layout(text: str, expected: list[tuple[str, ...]]) -> None:
    assert layout(text) == expected


def test_chinese_words_stay_whole() -> None:
    text = ["我", "今天", "想", "一起", "去", "国家图书馆", "里面", "看书", "学习", "写", "作业"]
    words = tuple(Word(i * 300, i * 300 + 300, word) for i, word in enumerate(text))
    (cue,) = make_cues(track(Sentence(0, 3300, "".join(text), words)))
    assert cue.lines == ("我今天想一起去国家图书馆", "里面看书学习写作业")


WHOLE = [
    "好，",
    "好？！”",
    "“好",
    "《好",
    "( 好",
    "好 )",
    '"好"',
    "3.14",
    "1,000",
    "１０：３０",
    "ＡＢ１２",
    "don't",
    "￥100",
    "50％",
    "ちょっ",
]


@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("length", [36, 50])
def test_never_broken(whole: str, length: int) -> None:
    for before in range(length):
        text = "好" * before + whole + "好" * (length - before)
        assert any(whole in line for cue in layout(text) for line in cue), text


@pytest.mark.parametrize("whole", ["👨‍👩‍👧‍👦", "🇨🇳", "👍🏽", "❤️", "é", "葛󠄀", "か゚", "각"])
def test_visible_characters_stay_whole(whole: str) -> None:
    lines = [line for cue in layout(whole * 100) for line in cue]
    assert "".join(lines) == whole * 100
    assert all(line == whole * (len(line) // len(whole)) for line in lines)


@pytest.mark.parametrize("text", ["。" * 100, "（" * 100, "1" * 100, "好！" + "！" * 60, "“" * 50 + "好" + "”" * 50])
def test_what_cannot_be_broken_well_is_broken_still(text: str) -> None:
    lines = [line for cue in layout(text) for line in cue]
    assert "".join(lines) == text
    assert max(map(columns, lines)) <= 42


# ---- Times


def test_text_that_differs_from_the_words_takes_their_time() -> None:
    spoken = ["二", "零", "二", "五", "年", "hello", "WORLD", "三", "点", "一", "四"]
    words = tuple(Word(1000 * i + 500, 1000 * i + 1400, word) for i, word in enumerate(spoken))
    cues = make_cues(track(Sentence(0, 12000, "♪ 2025年。Hello, world！ 3.14", words)))
    assert cues == [Cue(500, 5400, ("♪ 2025年。",), 0), Cue(5500, 11400, ("Hello, world！ 3.14",), 0)]


def test_words_are_known_in_any_writing() -> None:
    words = (Word(0, 1000, "HELLO"), Word(5000, 9000, "ＷＯＲＬＤ"))
    assert times_ms(make_cues(track(Sentence(0, 9500, "Hello. World.", words)))) == [(0, 1000), (5000, 9000)]


def test_words_that_go_back_in_time_are_passed_over() -> None:
    words = (Word(0, 500, "一"), Word(9000, 9500, "二"), Word(2000, 2500, "三"), Word(9500, 9900, "四"))
    cues = make_cues(track(Sentence(0, 10000, "一。二。三。四。", words)))
    assert cues == [Cue(0, 833, ("一。",), 0), Cue(9000, 9900, ("二。三。四。",), 0)]


def test_text_without_words_takes_time_by_width() -> None:
    cues = make_cues(track(Sentence(1000, 11000, "一二三四五六七八九。一二三四五六七八九。")))
    assert times_ms(cues) == [(1000, 6000), (6000, 11000)]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param((Word(0, 900, "完全"), Word(900, 9000, "无关")), id="other words"),
        pytest.param((Word(1000, 1000, "一"), Word(1000, 1000, "二")), id="no times"),
        pytest.param((Word(9000, 1000, "一"), Word(-5, 10**9, "九")), id="impossible times"),
        pytest.param((Word(0, 9000, ""), Word(0, 9000, "，。")), id="no letters"),
    ],
)
def test_useless_words_are_passed_over(words: tuple[Word, ...]) -> None:
    text = "一二三四五六七八九。一二三四五六七八九。"
    assert make_cues(track(Sentence(1000, 11000, text, words))) == make_cues(track(Sentence(1000, 11000, text)))


def test_missing_words_are_said_between_their_neighbours() -> None:
    words = (Word(0, 500, "一"), Word(9000, 9500, "四"), Word(9500, 9900, "五"))
    cues = make_cues(track(Sentence(0, 10000, "一。二。三。四五。", words)))
    assert [(*cue.lines, cue.begin_ms, cue.end_ms) for cue in cues] == [
        ("一。二。", 0, 4750),
        ("三。四五。", 4750, 9900),
    ]


def test_words_tell_when_a_sentence_without_times_is_said() -> None:
    cues = make_cues(track(Sentence(0, 0, "你好。", (Word(2000, 2400, "你"), Word(2400, 3000, "好")))))
    assert times_ms(cues) == [(2000, 3000)]


@pytest.mark.parametrize(
    ("sentences", "expected"),
    [
        pytest.param([(0, 3000), (2000, 4000)], [(0, 2000), (2000, 4000)], id="overlap"),
        pytest.param([(5000, 6000), (0, 1000)], [(0, 1000), (5000, 6000)], id="out of order"),
        pytest.param([(0, 100), (500, 600)], [(0, 500), (500, 1333)], id="short"),
        pytest.param([(1000, 1000), (1000, 1000)], [(1000, 1833), (1833, 2666)], id="at once"),
        pytest.param([(-900, -100), (-50, 1000)], [(0, 833), (833, 1666)], id="before the beginning"),
        pytest.param([(3000, 1000)], [(3000, 3833)], id="backwards"),
        pytest.param([(0, 60_000)], [(0, 7000)], id="long"),
    ],
)
def test_odd_times(sentences: list[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
    cues = make_cues(track(*(Sentence(*time_ms, "嗯") for time_ms in sentences)))
    assert times_ms(cues) == expected


def test_slow_speech_is_cut_by_time() -> None:
    words = tuple(Word(i * 2000, i * 2000 + 1900, char) for i, char in enumerate("慢慢地说话的人"))
    cues = make_cues(track(Sentence(0, 14000, "慢慢地说话的人", words)))
    assert "".join(line for cue in cues for line in cue.lines) == "慢慢地说话的人"
    assert all(cue.end_ms - cue.begin_ms <= LONGEST_MS for cue in cues)
    assert len(cues) == 3


# ---- Documents

DIALOGUE = (
    Track(0, (Sentence(0, 1500, "你好！"), Sentence(359_999_000, 360_001_500, "再见。"))),
    Track(1, (Sentence(1000, 2500, "1 < 2 & 3 --> 4"),)),
)


def test_srt() -> None:
    assert write_srt(make_cues(DIALOGUE[0])) == (
        "1\n00:00:00,000 --> 00:00:01,500\n你好！\n\n2\n99:59:59,000 --> 100:00:01,500\n再见。\n"
    )
    assert write_srt(cue for track in DIALOGUE for cue in make_cues(track)) == (
        "1\n00:00:00,000 --> 00:00:01,500\n[声道 0] 你好！\n\n"
        "2\n00:00:01,000 --> 00:00:02,500\n[声道 1] 1 ＜ 2 & 3 --＞ 4\n\n"
        "3\n99:59:59,000 --> 100:00:01,500\n[声道 0] 再见。\n"
    )


def test_vtt() -> None:
    assert write_vtt(make_cues(DIALOGUE[1])) == ("WEBVTT\n\n00:00:01.000 --> 00:00:02.500\n1 &lt; 2 &amp; 3 --&gt; 4\n")
    assert write_vtt(cue for track in DIALOGUE for cue in make_cues(track)) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\n<v 声道 0>你好！\n\n"
        "00:00:01.000 --> 00:00:02.500\n<v 声道 1>1 &lt; 2 &amp; 3 --&gt; 4\n\n"
        "99:59:59.000 --> 100:00:01.500\n<v 声道 0>再见。\n"
    )


def test_txt() -> None:
    assert write_txt([captured()]) == CAPTURED_TEXT + "\n"
    assert write_txt(DIALOGUE) == "声道 0\n你好！\n再见。\n\n声道 1\n1 < 2 & 3 --> 4\n"
    assert write_txt([*DIALOGUE[:1], track(Sentence(0, 1, " \n"), channel_id=1)]) == "你好！\n再见。\n"


def test_empty_documents() -> None:
    assert (write_srt([]), write_vtt([]), write_txt([]), write_txt([Track(0, ())])) == ("", "WEBVTT\n", "", "")
    assert demux("", "srt") == demux("WEBVTT\n", "webvtt") == []


@pytest.mark.parametrize(
    "text",
    [
        r"{\an8}上",
        "<b>粗</b>",
        "{y:i}斜",
        "<i>斜",
        '<font color="red">红</font>',
        "{注}",
        "00:00:05,000 --> 00:00:06,000",
    ],
)
@pytest.mark.parametrize("format", ["srt", "webvtt"])
def test_nothing_said_turns_into_formatting(text: str, format: str) -> None:
    cues = make_cues(track(Sentence(0, 2000, text)))
    document = write_srt(cues) if format == "srt" else write_vtt(cues)
    shown = decode(document, format)
    for escaped, char in {"\\{{}": "{", "\\\u2060": "\\"}.items():  # how FFmpeg hands text on, where it knows better
        shown = shown.replace(escaped, char)
    assert unicodedata.normalize("NFKC", shown) == text


# ---- Anything that may be recognised

PIECES = [
    *"我们今天来看一下这个问题的了", *"，。！？、；：…”》）（《“", "——", "hello", "World", "don't", "3.14", "1,000", "https://a.cn/b?c=d",
    " ", "\n", ", ", ". ", "<b>", "{", "}", "-->", "&amp;", "é", "👍🏽", "ちょっと", "안녕", "ＡＢ１", "x" * 60,
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=40).map("".join) | st.text(max_size=80)
WEIRD_MS = st.integers(-1000, 30_000)
WORDS = st.builds(Word, WEIRD_MS, WEIRD_MS, st.sampled_from(PIECES) | st.text(max_size=3), st.sampled_from(["", "，"]))
WEIRD_TRACKS = st.builds(
    Track,
    st.integers(0, 2),
    st.lists(st.builds(Sentence, WEIRD_MS, WEIRD_MS, TEXTS, st.lists(WORDS, max_size=12).map(tuple)), max_size=4).map(
        tuple
    ),
)
CLAUSES = st.text("我们今天来看一下这个问题", min_size=1, max_size=15) | st.sampled_from(
    ["hello world", "3.14", "《红楼梦》", "“好”"]
)
PROSE = st.lists(st.tuples(CLAUSES, st.sampled_from("，。！？；：、")).map("".join), min_size=1, max_size=12).map(
    "".join
)
quickly = settings(max_examples=120, derandomize=True, deadline=None, database=None)


@quickly
@given(WEIRD_TRACKS)
def test_nothing_is_lost_and_cues_follow_one_another(track: Track) -> None:
    cues = make_cues(track)
    said = "".join(each.text for each in sorted(track.sentences, key=lambda each: each.begin_ms))
    assert squeeze("".join(line for cue in cues for line in cue.lines)) == squeeze(said)
    assert all(0 <= cue.begin_ms < cue.end_ms <= cue.begin_ms + LONGEST_MS for cue in cues)
    assert all(before.end_ms <= after.begin_ms for before, after in pairwise(cues))
    assert all(
        cue.end_ms - cue.begin_ms >= SHORTEST_MS or cue.end_ms == after.begin_ms for cue, after in pairwise(cues)
    )


@quickly
@given(WEIRD_TRACKS)
def test_lines_fit(track: Track) -> None:
    lines = [line for cue in make_cues(track) for line in cue.lines]
    assert all(1 <= len(cue.lines) <= 2 for cue in make_cues(track))
    assert all(line and line == " ".join(line.split()) for line in lines)
    assert all(columns(line) <= 42 for line in lines)


@quickly
@given(PROSE)
def test_lines_are_broken_where_people_break_them(text: str) -> None:
    lines = [line for cue in layout(text) for line in cue]
    assert not any(line[0] in "，。！？；：、”》" or line[-1] in "“《" for line in lines)
    for whole in ("hello", "world", "3.14"):
        assert sum(line.count(whole) for line in lines) == text.count(whole)
    assert len(lines) <= 2 + columns(text) // 10


@quickly
@given(WEIRD_TRACKS)
def test_ffmpeg_reads_what_was_written(track: Track) -> None:
    cues = make_cues(track)
    written = [(cue.begin_ms, cue.end_ms, "\n".join(cue.lines)) for cue in cues]
    assert [(begin, end, unescape(text)) for begin, end, text in demux(write_vtt(cues), "webvtt")] == written
    twins = str.maketrans("＜＞｛｝", "<>{}")
    read = [(begin, end, text.translate(twins)) for begin, end, text in demux(write_srt(cues), "srt")]
    assert read == [(begin, end, text.translate(twins)) for begin, end, text in written]
