"""Long text cut where nobody hears it, and SSML cut without touching a byte of it."""

import time
import unicodedata
from itertools import accumulate, pairwise
from xml.parsers import expat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.catalog import count_characters
from app.errors import InvalidRequest
from app.splitting import LAST_SEGMENT_CHARACTERS, MAX_SEGMENT_CHARACTERS, is_speakable, split_text
from app.ssml import split_ssml

LIMIT = 2000
SSML_LIMIT = 20_000
CRUMB = 100
HOSTILE_CHARACTERS = 100_000
HOSTILE_SECONDS = 3.0

FRAGMENTS = [
    *("中文", "你好。", "走吧，", "“真的？！”", "……", "（注）", "\n", "\r\n\r\n", "  ", "「是」。", "2025年", "——"),
    *("word ", "The end. ", "Mr. Li ", "3.14%", "1,000,000 ", "12:30:45", "a@b.com", "https://example.com/a.b?c=d "),
    *("e\u0301", "👨‍👩‍👧", "👍🏽", "🇨🇳", "1️⃣", "한", "ไทย", "한국어 ", "かな", '"', "'", ".", "...", "!", "\x00"),
    "\u200b",
]


def assert_cut_well(text: str, segments: list[str]) -> None:
    assert "".join(segments) == text
    assert all(segments)
    assert max(map(count_characters, segments), default=0) <= LIMIT
    for left, right in pairwise(segments):
        crumb = min(count_characters(left), count_characters(right)) < CRUMB or not (
            is_speakable(left) and is_speakable(right)
        )
        assert not crumb or count_characters(left + right) > LIMIT


def seams(text: str) -> set[int]:
    return set(accumulate(map(len, split_text(text)[:-1])))


# ---- Plain text


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.sampled_from(FRAGMENTS), st.integers(1, 700)), max_size=7))
def test_segments_are_the_text(runs: list[tuple[str, int]]) -> None:
    text = "".join(fragment * times for fragment, times in runs)
    assert_cut_well(text, split_text(text))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.text(min_size=1, max_size=40), st.integers(1, 120)), max_size=4))
def test_segments_of_any_characters_are_the_text(runs: list[tuple[str, int]]) -> None:
    text = "".join(some * times for some, times in runs)
    assert_cut_well(text, split_text(text))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(FRAGMENTS), min_size=40, max_size=60), st.integers(20, 40))
def test_mixed_fragments(fragments: list[str], times: int) -> None:
    text = "".join(fragments) * times
    assert_cut_well(text, split_text(text))


def test_nothing_has_no_segments() -> None:
    assert split_text("") == []


@pytest.mark.parametrize("text", ["中" * 1000, "a" * 2000, "。", " ", "好。" * 666])
def test_what_fits_is_one_segment(text: str) -> None:
    assert split_text(text) == [text]


def test_limit_counts_as_the_provider_bills() -> None:
    assert MAX_SEGMENT_CHARACTERS == LIMIT
    assert [len(segment) for segment in split_text("中" * 2500)] == [1000, 1000, 500]
    assert [len(segment) for segment in split_text("ア" * 4500)] == [2000, 2000, 500]


def test_segments_are_as_long_as_fits() -> None:
    sentence = "今天天气很好，我们一起去公园散步吧。"
    segments = split_text(sentence * 1000)
    assert all(segment.endswith("。") for segment in segments)
    assert all(count_characters(segment) > LIMIT - count_characters(sentence) for segment in segments[:-2])


@pytest.mark.parametrize(
    "sample",
    [
        *("好。|好，好", "好！|好", "好？！|好", "好；|好，", "好……|好", "好…|好，好 好", "wait...|what, else"),
        "好\n\n|好，好",
        *("好。”|好", "好。』」|好", "（好。）|好，", '"好。"|好', '"好！" |"好', '好。"好？"|"好', "Yes!' |'No, no"),
        "好。  \n|好，",
        *("好\r\n|——好", "好\n|……好", "Done. |Next, please", "Done.”|好，好", "结束.|好，好", "in 2025. |Next, please"),
        *("Is it No. 5? |No, no", "He said no. |He did, really", "Oh no. |Is it Mr. Li, or Dr. Wu", "一。\n|2. 好，好"),
        *("Yes. |It is 3.14, see example.com or v1.2.3 or fig. 5", "Ok. |So J. K. Rowling met the U.S. team e.g. now"),
        *('"好\n好。|"好"好', "结束.|ｳ，好"),
        # no sentence ends in these
        "that is |.5",
        *("好，|好 好", "好、|好", "好：|“好", "好——|好", "well -- |he is a man", "Yes, |it is 1,000 or 12:30"),
        "that is |Smith",
    ],
)
def test_best_cut_within_reach(sample: str) -> None:
    head, tail = sample.split("|")
    assert split_text("字" * 900 + head + tail + "字" * 900)[0] == "字" * 900 + head


@pytest.mark.parametrize(
    "whole",
    [
        *("1,234,567.89", "3.14%", "２０２５", "2025年", "2025年12月31日", "138-1234-5678", "+86-10-12345678"),
        "$1,000",
        *("12:30:45", "１２：３０", "2025-12-31", "2025-12-31T12:30:45+08:00", "2025/12/31", "1.2.3-beta", "25℃", ".5"),
        *("１，０００", "supercalifragilistic", "état", "e\u0301tat", "don't", "don’t", "mother-in-law", "слово"),
        "한국어",
        *("https://example.com/a/b.html?x=1,2&y=(3)#z!w", "http://localhost:8080/;a", "a.b+c@mail.example.com"),
        *("example.com", "www.example.com/a?b=c;d", "192.168.0.1", "👨‍👩‍👧‍👦", "👍🏽", "🇨🇳", "1️⃣", "❤️‍🔥"),
        "🏴\U000e0067\U000e007f",
        *(
            "e\u0301\u0302\u0303",
            "\u1112\u1161\u11ab",
            "……",
            "...",
            "——",
            "？！",
            "\r\n",
            "尔·马",
            "3👨‍👩‍👧",
            "き\u3099",
        ),
    ],
)
def test_never_inside(whole: str) -> None:
    for shift in range(len(whole) + 1):
        begin = LIMIT - shift
        text = "ア" * begin + whole + "ア" * 500
        assert not seams(text) & set(range(begin + 1, begin + len(whole))), shift


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.sampled_from(
            ["e\u0301", "👨‍👩‍👧", "👍🏽", "🇨🇳", "1️⃣", "\u1112\u1161\u11ab", "\r\n", "中\ufe00", "क\u093f", "x"]
        ),
        min_size=100,
    ),
    st.integers(5, 30),
)
def test_never_inside_a_visible_character(characters: list[str], times: int) -> None:
    characters *= times
    offsets = {0, *accumulate(map(len, characters))}
    assert seams("".join(characters)) <= offsets


def test_what_is_too_long_is_cut_by_length() -> None:
    assert [len(segment) for segment in split_text("x" * 4500)] == [2000, 2000, 500]
    assert [len(segment) for segment in split_text("e\u0301" * 2250 + "x")] == [2000, 2000, 501]
    assert [len(segment) for segment in split_text("e" + "\u0301" * 4499)] == [2000, 2000, 500]
    for syllable in ("\u1112\u1161\u11ab", "\ua960\ud7b0\ud7cb"):
        assert [len(segment) for segment in split_text(syllable * 1000)] == [1998, 1002]
    long_address = "https://example.com/" + "a" * 3000
    assert split_text("去" + long_address + "好")[0] == "去" + long_address[:1998]


def test_long_blanks_do_not_cut_a_word() -> None:
    word = "x" * 1990
    assert split_text(word + " " * 20 + "好")[0] == word


@pytest.mark.parametrize("sign", ["，", " "])
def test_a_short_sentence_before_a_long_one_is_no_segment(sign: str) -> None:
    text = "好。" + "字" * 700 + sign + "字" * 900 + "，" + "字" * 900
    assert split_text(text)[0] == "好。" + "字" * 700 + sign


def test_last_two_are_balanced() -> None:
    sentences = ["字" * 199 + "。"] * 5
    text = "".join(sentences)[:-1] + "字" * 2 + "。" + "好。"
    assert split_text(text)[-1].endswith("好。")
    assert [count_characters(segment) for segment in split_text(text)] == [1197, count_characters(text) - 1197]


def test_last_two_are_balanced_at_a_comma_in_need() -> None:
    text = "字" * 300 + "，" + "字" * 300 + "，" + "字" * 398 + "。" + "好。"
    assert [len(segment) for segment in split_text(text)] == [602, len(text) - 602]


def test_a_short_end_stays_where_there_is_no_comma() -> None:
    assert split_text("字" * 999 + "。好。") == ["字" * 999 + "。", "好。"]


def test_silent_parts_join_a_neighbour() -> None:
    text = "字" * 499 + "。" + "字" * 498 + "。" + "！" * 150 + "\n"
    assert split_text(text) == ["字" * 499 + "。", "字" * 498 + "。" + "！" * 150 + "\n"]


def test_silent_beginnings_join_a_neighbour() -> None:
    head, tail = "＊" * 150 + "。" + "字" * 300 + "，", "字" * 650 + "。"
    assert split_text(head + tail) == [head, tail]
    head, tail = "＊" * 150 + "。" + "字" * 700 + "，", "字" * 900
    assert split_text(head + tail) == [head, tail]


def test_no_more_segments_than_needed_after_balancing() -> None:
    assert len(split_text("字" * 50 + "。" + "字" * 1001)) == 2


def test_silent_parts_stay_apart_where_they_do_not_fit() -> None:
    assert [len(segment) for segment in split_text("好" + "-" * 4500)] == [1999, 2000, 502]


@pytest.mark.parametrize("text", ["a", "中", "9", "½", "Ⅳ", "ア", "ด", "…ß…", "\U00020000"])
def test_speakable(text: str) -> None:
    assert is_speakable(text)


@pytest.mark.parametrize("text", ["", " \n\t", "。！？……", "——", "😀", "+", "\u0301", "_", "\u200d", "€"])
def test_not_speakable(text: str) -> None:
    assert not is_speakable(text)


def test_speakable_is_a_letter_or_a_digit() -> None:
    for char in map(chr, range(0x3000)):
        assert is_speakable(f" {char}") == (unicodedata.category(char)[0] in {"L", "N"})


HOSTILE = [
    *(" ", "1", ",", "，", "a", "中", "\u0301", "\"'", '"', "'", "“", "(", ")", "([", "。", ".", "!", "\r\n", "\n"),
    "\r",
    *("1,", "1:", "1，", "1中", "1.", "a.", "a-", "a.-", "a.-.-", "a'", "-", "$", "a+b.", "a@", "http://"),
    *("http://.", "www."),
    *("😀", "\u200d", "😀\u200d", "🇨", " \u0301", "Mr. ", "1. ", "\n. ", "。.", "x" * 63 + ".", "a. "),
    *("x" * 1999 + " ", "\ud800"),
    *("好。" + "y" * 1999, "&amp;", "<", "e\u0301 "),
]


@pytest.mark.parametrize("pattern", HOSTILE, ids=lambda pattern: ascii(pattern[:12]))
def test_hostile_text_takes_no_longer(pattern: str) -> None:
    text = (pattern * HOSTILE_CHARACTERS)[:HOSTILE_CHARACTERS]
    began = time.perf_counter()
    segments = split_text(text)
    assert time.perf_counter() - began < HOSTILE_SECONDS
    assert "".join(segments) == text
    assert max(map(count_characters, segments)) <= LIMIT


# ---- SSML


def spoken(*children: str, tag: str = "<speak>") -> str:
    return f"{tag}{''.join(children)}</speak>"


def inside(segments: list[str], tag: str = "<speak>") -> list[str]:
    """What stands in the speak elements, each of them well-formed and short enough."""
    for segment in segments:
        expat.ParserCreate().Parse(f"<_>{segment}</_>", True)
        assert count_characters(segment, ssml=True) <= LIMIT
        assert len(segment) <= SSML_LIMIT
        assert segment.startswith(tag)
        assert segment.endswith("</speak>")
    return [segment.removeprefix(tag).removesuffix("</speak>") for segment in segments]


def refusal(text: str) -> str:
    with pytest.raises(InvalidRequest) as refused:
        split_ssml(text)
    return refused.value.message


CHILDREN = [
    *("你好。", "走吧，", "word ", "a > b", "&amp;", "&#x4e2d;", "&#10;", "&lt;好&gt;。", "\r\n", "  ", "1,000"),
    *("👨‍👩‍👧", "é"),
    *('<break time="1s"/>', "<break></break >", '<sub alias="a>b">好</sub>'),
    "<say-as\n  interpret-as='digits'>12</say-as>",
    *("<!-- <speak> & > -->", "<![CDATA[<speak>好&]]>", "<![CDATA[]]>", "<a><b>好。<!-- --></b><c/>。</a>"),
    '<soundEvent src="x"/>',
]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(CHILDREN), st.integers(1, 300)), min_size=2, max_size=7),
    st.sampled_from(["<speak>", "<speak\n voice='中' rate=\"1.5\" >"]),
)
def test_ssml_is_kept_byte_for_byte(runs: list[tuple[str, int]], tag: str) -> None:
    content = "".join(child * times for child, times in runs)
    text = spoken(content, tag=tag)
    segments = split_ssml(text)
    assert "".join(inside(segments, tag)) == content
    if count_characters(text, ssml=True) <= LIMIT and len(text) <= SSML_LIMIT:
        assert segments == [text]


@pytest.mark.parametrize("text", [" <speak>好</speak>\n", "<speak/>", "<speak>a</speak> <speak bgm='x'>b</speak >\n"])
def test_ssml_that_fits_is_unchanged(text: str) -> None:
    assert split_ssml(text) == [text]


def test_ssml_text_is_cut_at_sentence_ends() -> None:
    text = "字" * 700 + "。" + "字" * 200 + "&lt;1，000&gt;" + "字" * 200 + "。"
    assert inside(split_ssml(spoken(text))) == ["字" * 700 + "。", text[701:]]


@pytest.mark.parametrize(
    "whole",
    [
        "&amp;",
        "&#x4e2d;",
        "<sub alias='好'>好</sub>",
        "<![CDATA[好。好]]>",
        "<!-- 好。 -->",
        "<a>好。<b>好，</b>好</a>",
    ],
)
def test_ssml_is_never_cut_inside(whole: str) -> None:
    for before in range(LIMIT - 10, LIMIT + 1):
        parts = inside(split_ssml(spoken("ア" * before, whole, "ア" * 500)))
        assert sum(whole in part for part in parts) == 1


def test_references_and_pauses_are_cut_as_what_they_are() -> None:
    head, tail = "字" * 900 + "&#x201c;好。&#8221;", "字" * 300
    assert inside(split_ssml(spoken(head, tail))) == [head, tail]
    head = "字" * 900 + "<break/><break/>"
    assert inside(split_ssml(spoken(head, tail))) == [head, tail]
    assert inside(split_ssml(spoken("字" * 500, "。", "字" * 499, "<break/>", tail)))[0] == "字" * 500 + "。"


def test_tags_count_by_length() -> None:
    element = f"<sub alias='{'a' * 3000}'>好</sub>"
    assert inside(split_ssml(spoken(element * 10))) == [element * 6, element * 4]


def test_speak_elements_share_segments() -> None:
    short, full = spoken("好。", tag="<speak rate='2'>"), spoken("字" * 1000)
    assert split_ssml(f"{short}\n{short} {full}{short}") == [short * 2, full, short]
    assert split_ssml(f"{full}{full}<speak/>") == [full, full + "<speak/>"]
    assert split_ssml(full + spoken("<break/>") + short) == [full + spoken("<break/>"), short]


def test_only_what_must_be_is_split_beside_music() -> None:
    music = spoken("好。", tag="<speak bgm='x'>")
    assert split_ssml(music + spoken("字" * 1500)) == [music, spoken("字" * 1000), spoken("字" * 500)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<speak>\n好<b></speak>", "第 2 行第 7 列"),
        ("<speak>好 & 好</speak>", "第 1 行第 11 列"),
        ("<speak>好", "语法错误"),
        ("<speak>好&nbsp;</speak>", "语法错误"),
        ("<speak>\ud800</speak>", "语法错误"),
        ("<speak>好</speak></_><_><speak>好</speak>", "语法错误"),
        ("<speak>好</speak></_>", "语法错误"),
        ("", "没有 <speak>"),
        ("<p>好</p>", "<p> 必须放在 <speak>"),
        ("<speak>好</speak>好<speak>好</speak>", "第 1 行第 17 列的文字"),
        ("<speak><a><speak>好</speak></a></speak>", "不能嵌套"),
        ("<!DOCTYPE speak [<!ENTITY a 'b'>]><speak>&a;</speak>", "DOCTYPE"),
        ("<speak><!ENTITY a 'b'></speak>", "实体声明"),
        ("<?xml version='1.0'?><speak>好</speak>", "XML 声明"),
        ("<speak><?php?></speak>", "处理指令"),
        ("<speak>\n\n" + spoken("字" * 1001, tag="<a>").replace("speak", "a") + "</speak>", "第 3 行的元素过长"),
        ("<speak>" + f"<!--{'a' * SSML_LIMIT}--></speak>", "元素过长"),
        (f"<speak a='{'a' * SSML_LIMIT}'/>", "元素过长"),
        ("\n" + spoken("字" * 1001, tag="<speak bgm='x'>"), "第 2 行的 <speak> 有背景音乐"),
        ("<speak>" + "<a>" * 50 + "</a>" * 50 + "</speak>", "嵌套过深"),
    ],
)
def test_refused_ssml(text: str, reason: str) -> None:
    assert reason in refusal(text)


def test_nesting_and_elements_up_to_the_limit_are_taken() -> None:
    deep = "<speak>" + "<a>" * 49 + "</a>" * 49 + "</speak>"
    assert split_ssml(deep) == [deep]
    element = f"<a>{'字' * 1000}</a>"
    assert inside(split_ssml(spoken(element * 2))) == [element, element]


@pytest.mark.parametrize(
    "child", ["好。", "\n", "&amp;", "<a/>", "<!---->", "<![CDATA[a]]>", "</speak><speak>", "<a>", "&", "<"]
)
def test_hostile_ssml_takes_no_longer(child: str) -> None:
    text = spoken(child * (HOSTILE_CHARACTERS // len(child)))
    began = time.perf_counter()
    try:
        assert "".join(inside(split_ssml(text))).count(child) > 0.9 * HOSTILE_CHARACTERS // len(child)
    except InvalidRequest:
        assert child in {"<a>", "&", "<"}
    assert time.perf_counter() - began < HOSTILE_SECONDS


# ---- Spoken at once


@pytest.mark.parametrize("at_once", [2, 4, 8])
def test_the_last_segments_are_short_where_several_are_spoken_at_once(at_once: int) -> None:
    text = "今天天气很好，我们去公园散步吧。" * 500 * at_once
    segments = split_text(text, at_once)
    counts = [count_characters(segment) for segment in segments]
    assert "".join(segments) == text
    assert counts[0] > 0.9 * MAX_SEGMENT_CHARACTERS
    assert max(counts[-at_once:]) <= LAST_SEGMENT_CHARACTERS
    assert counts[:-1] == sorted(counts[:-1], reverse=True)
    assert len(segments) <= 1.25 * len(split_text(text)) + 1


def test_few_segments_are_as_long_as_they_may_be() -> None:
    text = "今天天气很好。" * 1000
    assert split_text(text, 4) == split_text(text)


def test_what_cannot_be_spoken_is_put_with_what_can() -> None:
    segments = split_text("a" * MAX_SEGMENT_CHARACTERS + ".")
    assert len(segments) == 2
    assert all(is_speakable(segment) for segment in segments)
