"""When the sentences of a long text are heard: from the provider's events to the subtitles of the whole."""

import io
import json
import re
from itertools import pairwise
from typing import Any

import av
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.dashscope import SpokenWord, Timeline
from app.dashscope.frames import Event, parse_event
from app.dashscope.timeline import SpokenSentence
from app.services.captions import EARLY_MS, CaptionFormat, lay_out, time_sentences, write_captions

RATE = 1000
"""Samples per second: a sample lasts a millisecond."""
SAMPLE_BYTES = 2

Shown = list[tuple[int, int, str]]
Words = tuple[SpokenWord, ...]
Said = tuple[str, int, Words]


def said(text: str, lasts_ms: int, *words: SpokenWord) -> Said:
    return text, lasts_ms, words


def word(text: str, begin_ms: int, end_ms: int) -> SpokenWord:
    return SpokenWord(text, begin_ms, end_ms)


def begin(text: str = "") -> Event:
    return Event("result-generated", "task", output="sentence-begin", text=text)


def end(text: str = "", words: Words = ()) -> Event:
    return Event("result-generated", "task", output="sentence-end", text=text, words=words)


def heard(*sentences: Said, words: Words = ()) -> Timeline:
    """A task of some sentences, one right after the other; `words` come with its end."""
    timeline = Timeline()
    for text, lasts_ms, its_words in sentences:
        timeline.note(begin(text))
        timeline.hear(bytes(lasts_ms * SAMPLE_BYTES))
        timeline.note(end(text, its_words))
    timeline.note(Event("task-finished", "task", words=words))
    return timeline


def timed(text: str, *sentences: Said, words: Words = ()) -> list[dict[str, Any]]:
    """The sentences of a segment."""
    samples = sum(lasts_ms for _, lasts_ms, _ in sentences)
    timed: list[dict[str, Any]] = json.loads(time_sentences(heard(*sentences, words=words), text, samples, RATE))
    return timed


def shown(sentences: list[dict[str, Any]]) -> Shown:
    return [(each["begin_time"], each["end_time"], each["text"]) for each in sentences]


def words_of(sentences: list[dict[str, Any]]) -> list[Shown]:
    return [shown(each.get("words", [])) for each in sentences]


# ---- Following a task


def test_sentences_lie_between_their_events() -> None:
    timeline = Timeline()
    steps: list[int | Event] = [
        *(7, begin("一。"), 10, Event("result-generated", "task", output="sentence-synthesis"), 20, end("一。")),
        *(3, begin("二。"), 40, end()),  # named at its begin only
        *(50, end()),  # without begin: from the end of the one before
        *(begin("三"), begin(), 1, end("四。")),
        *(begin(), end(), 9),
    ]
    for step in steps:
        if isinstance(step, Event):
            timeline.note(step)
        else:
            timeline.hear(bytes(step))
    assert timeline.sentences == [
        SpokenSentence("一。", 7, 37),
        SpokenSentence("二。", 40, 80),
        SpokenSentence("", 80, 130),
        SpokenSentence("四。", 130, 131),
        SpokenSentence("", 131, 131),
    ]
    assert timeline.words == ()


def test_words_are_taken_from_both_places() -> None:
    timeline = Timeline()
    listed = [
        {"text": "你", "begin_index": 0, "end_index": 1, "begin_time": 40, "end_time": 180.4},
        {"text": "好", "begin_time": None, "end_time": 330},
        "好",
        {"text": "吗", "begin_time": 180, "end_time": 330},
    ]
    outputs: list[tuple[str, dict[str, Any]]] = [
        ("result-generated", {"type": "sentence-begin", "original_text": "你好吗", "sentence": {"index": 0}}),
        ("result-generated", {"type": "sentence-end", "sentence": {"index": 0, "words": listed}}),
        ("result-generated", {"type": "sentence-synthesis", "sentence": {"index": 0, "words": listed}}),
        ("task-finished", {"sentence": {"words": listed[3:]}}),
    ]
    for name, output in outputs:
        assert timeline.words == ()
        message = {"header": {"event": name, "task_id": "task"}, "payload": {"output": output}}
        timeline.note(parse_event(json.dumps(message)))
        timeline.hear(bytes(100))
    words = (word("你", 40, 180), word("吗", 180, 330))
    assert timeline.sentences == [SpokenSentence("你好吗", 0, 100, words)]
    assert timeline.words == words[1:]


# ---- Texts


WHOLE = "你好。\n今天天气真好，好。再见！"
NAMES = ["你好。", "今天天气真好，好。", "再见！"]


@pytest.mark.parametrize("missing", [(), (0,), (1,), (2,), (0, 2)], ids=str)
def test_what_the_provider_does_not_name_is_filled_in(missing: tuple[int, ...]) -> None:
    names = ["" if index in missing else name for index, name in enumerate(NAMES)]
    sentences = timed(WHOLE, said(names[0], 500), said(names[1], 1300), said(names[2], 700))
    assert shown(sentences) == [(0, 500, NAMES[0]), (500, 1800, NAMES[1]), (1800, 2500, NAMES[2])]
    assert all(each.keys() == {"begin_time", "end_time", "text"} for each in sentences)


@pytest.mark.parametrize("missing", [(0, 1, 2), (0, 1), (1, 2)], ids=str)
def test_neighbours_that_are_not_named_are_timed_together(missing: tuple[int, ...]) -> None:
    names = ["" if index in missing else name for index, name in enumerate(NAMES)]
    sentences = shown(timed(WHOLE, said(names[0], 500), said(names[1], 1300), said(names[2], 700)))
    assert re.sub(r"\s", "", "".join(text for _, _, text in sentences)) == "".join(NAMES)
    assert (sentences[0][0], sentences[-1][1]) == (0, 2500)
    assert all(one[1] == other[0] for one, other in pairwise(sentences))


def test_words_of_sentences_that_are_not_named_are_kept() -> None:
    sentences = timed("你我他", said("", 500, word("你", 0, 500)), said("", 500, word("我", 500, 1000)))
    assert [each for words in words_of(sentences) for each in words] == [(0, 500, "你"), (500, 1000, "我")]


def test_a_text_that_tells_nothing_of_its_sentences_is_one() -> None:
    assert shown(timed(WHOLE, said("", 2500))) == [(0, 2500, WHOLE)]
    silent = json.loads(time_sentences(Timeline(), f" {WHOLE}\n", 2500, RATE))
    assert shown(silent) == [(0, 2500, WHOLE)]


def test_names_that_come_twice_are_told_apart() -> None:
    whole = "好。好。坏。好。坏。"
    names = [said(name, 100) for name in ("好。", "好。", "", "好。", "")]
    assert [text for _, _, text in shown(timed(whole, *names))] == ["好。", "好。", "坏。", "好。", "坏。"]


def test_names_that_are_not_in_the_text_are_shown_as_they_are() -> None:
    sentences = shown(timed("甲。乙。丙。", said("甲。", 100), said("", 100), said("丁。", 100)))
    assert [each for each in sentences if each[0] != 100] == [(0, 100, "甲。"), (200, 300, "丁。")]
    assert all(text in "乙。丙。" for begin_ms, _, text in sentences if begin_ms == 100)


def test_markup_fills_in_for_nothing() -> None:
    assert shown(timed("", said("你好。", 100), said("", 100), said("再见。", 50))) == [
        (0, 100, "你好。"),
        (200, 250, "再见。"),
    ]
    assert timed("", said("", 100)) == timed("", said("", 100), said("", 100)) == []
    assert json.loads(time_sentences(Timeline(), "", 500, RATE)) == []


def test_what_is_not_heard_is_not_shown() -> None:
    assert timed(WHOLE) == timed(WHOLE, said("", 0)) == timed("你好。", said("你好。", 0)) == []
    sentences = timed("你好。再见。", said("你好。", 0), said("再见。", 100))
    assert shown(sentences) == [(0, 100, "再见。")]


def test_what_no_database_takes_is_replaced() -> None:
    strange = "a\0b\ud800c。"
    kept = "a\ufffdb\ufffdc。"
    for sentences in (
        timed("", said(strange, 100, word("a\0", 0, 50))),
        timed(strange, said("", 100, word("a\0", 0, 50))),
    ):
        assert shown(sentences) == [(0, 100, kept)]
        assert words_of(sentences) == [[(0, 50, "a\ufffd")]]
    unheard = time_sentences(Timeline(), strange, 100, RATE)
    assert shown(json.loads(unheard.encode())) == [(0, 100, kept)]


def test_times_are_counted_in_samples() -> None:
    timeline = Timeline()
    for index in range(3):
        timeline.hear(bytes(22051 * SAMPLE_BYTES))
        timeline.note(end(f"{index}。"))
    sentences = shown(json.loads(time_sentences(timeline, "", 3 * 22051, 22050)))
    assert sentences == [(0, 1000, "0。"), (1000, 2000, "1。"), (2000, 3000, "2。")]


# ---- Words


FIRST = said("你好。", 1000, word("你", 100, 400), word("好", 400, 900))
SPOKEN = [[(100, 400, "你"), (400, 900, "好")], [(1100, 1500, "再"), (1500, 1900, "见")]]


@pytest.mark.parametrize("offset_ms", [0, 1000], ids=["from the sentence", "from the task"])
def test_words_are_timed_from_the_task_or_from_their_sentence(offset_ms: int) -> None:
    words = word("再", 100 + offset_ms, 500 + offset_ms), word("见", 500 + offset_ms, 900 + offset_ms)
    sentences = timed("你好。再见。", FIRST, said("再见。", 1000, *words))
    assert words_of(sentences) == SPOKEN
    assert shown(sentences) == [(0, 1000, "你好。"), (1000, 2000, "再见。")]


def test_words_that_come_with_the_end_are_spread_over_the_sentences() -> None:
    words = tuple(word(text, begin_ms, end_ms) for each in SPOKEN for begin_ms, end_ms, text in each)
    assert words_of(timed("你好。再见。", said("你好。", 1000), said("再见。", 1000), words=words)) == SPOKEN
    assert words_of(timed("你好。再见。", said("你好。", 1000), said("", 1000), words=words)) == SPOKEN


def test_words_that_come_in_both_places_are_shown_once() -> None:
    late = (word("旧", 100, 400),)
    sentences = timed("你好。再见。", FIRST, said("再见。", 1000, word("再", 1100, 1500)), words=late)
    assert words_of(sentences) == [SPOKEN[0], SPOKEN[1][:1]]


def test_a_word_may_begin_a_little_before_its_sentence() -> None:
    early = word("再", 1000 - EARLY_MS, 1000 + EARLY_MS), word("见", 1500, 1900)
    sentences = timed("你好。再见。", said("你好。", 1000), said("再见。", 1000, *early))
    assert words_of(sentences) == [[], [(1000, 1000 + EARLY_MS, "再"), (1500, 1900, "见")]]
    earlier = word("再", 1000 - EARLY_MS - 1, 1000)
    sentences = timed("你好。再见。", said("你好。", 1000), said("再见。", 1000, earlier))
    assert words_of(sentences) == [[], [(2000 - EARLY_MS - 1, 2000, "再")]]


def test_words_beyond_a_sentence_are_cut_or_left_out() -> None:
    first = said("你好。", 1000, word("你", 0, 400), word("好", 800, 1100), word("。", 1000, 5000))
    sentences = timed("你好。再见。", first, said("再见。", 1000, word("见", 1900, 2099), word("了", 1900, 2100)))
    assert words_of(sentences) == [[(0, 400, "你"), (800, 1000, "好")], [(1900, 2000, "见")]]
    assert "words" not in timed("你好。", said("你好。", 100, word("你", 200, 300)))[0]


# ---- Whatever comes


TEXTS = st.sampled_from(["", " ", "好。", "你好。", "再见！", "abc. ", "<b>", "a\0"])
WORDS = st.builds(SpokenWord, TEXTS, st.integers(0, 4000), st.integers(0, 4000))
SAID = st.tuples(TEXTS, st.integers(0, 1500), st.lists(WORDS, max_size=3).map(tuple))


@settings(max_examples=100, deadline=None)
@given(st.lists(SAID, max_size=4), st.lists(TEXTS, max_size=5).map("".join), st.lists(WORDS, max_size=4).map(tuple))
def test_whatever_is_told_gives_sentences_in_order(told: list[Said], whole: str, words: Words) -> None:
    lasts_ms = sum(each[1] for each in told)
    sentences = timed(whole, *told, words=words)
    times = [time for begin_ms, end_ms, _ in shown(sentences) for time in (begin_ms, end_ms)]
    assert times == sorted(times)
    assert all(0 <= time <= lasts_ms for time in times)
    assert all(begin_ms < end_ms and text == text.strip() != "" for begin_ms, end_ms, text in shown(sentences))
    for each in sentences:
        for listed in each.get("words", []):
            assert each["begin_time"] <= listed["begin_time"]
            assert listed["end_time"] <= each["end_time"]


# ---- The whole


def subtitled(*segments: tuple[str | None, int]) -> dict[CaptionFormat, str]:
    formats: tuple[CaptionFormat, ...] = ("srt", "vtt")
    return {format: write_captions(iter(segments), RATE, format) for format in formats}


def segment(text: str, *sentences: Said) -> tuple[str, int]:
    """A segment as it is kept: its cues, and its length."""
    samples = sum(lasts_ms for _, lasts_ms, _ in sentences)
    return lay_out(time_sentences(heard(*sentences), text, samples, RATE), samples), samples


def read(subtitle: str, format: str) -> Shown:
    """What FFmpeg takes from a subtitle file: when its cues begin and end, and what they say."""
    name = {"srt": "srt", "vtt": "webvtt"}[format]
    with av.open(io.BytesIO(subtitle.encode()), "r", format=name) as container:
        packets = [packet for packet in container.demux(container.streams.subtitles[0]) if packet.size]
        return [
            (packet.pts or 0, (packet.pts or 0) + (packet.duration or 0), bytes(packet).decode()) for packet in packets
        ]


def test_segments_follow_each_other() -> None:
    files = subtitled(
        segment("你好。再见。", said("你好。", 1000), said("", 2000)),
        (None, 250),  # it was not asked for subtitles
        ("[]", 0),
        segment("……", said("", 0)),
        segment("晴天。", said("晴天。", 1500, word("晴", 0, 700), word("天", 700, 1400))),
    )
    for format, subtitle in files.items():
        cues = read(subtitle, format)
        assert [text for _, _, text in cues] == ["你好。", "再见。", "晴天。"]
        assert [begin_ms for begin_ms, _, _ in cues] == [0, 1000, 3250]
        assert cues[-1][1] <= 4750


def test_cues_are_timed_by_their_words() -> None:
    spoken = said("晴天。", 1500, word("晴", 100, 700), word("天", 700, 1400))
    assert read(subtitled((None, 250), segment("晴天。", spoken))["srt"], "srt") == [(350, 1650, "晴天。")]


def test_a_cue_does_not_last_longer_than_its_segment() -> None:
    [(begin_ms, end_ms, text)] = read(subtitled(segment("好。", said("好。", 300)))["srt"], "srt")
    assert (begin_ms, end_ms, text) == (0, 300, "好。")


def test_no_time_is_lost_between_many_segments() -> None:
    cues = read(write_captions([('[[0,900,["好。"]]]', 100)] * 1000, 22050, "srt"), "srt")
    assert len(cues) == 1000
    assert [begin_ms for begin_ms, _, _ in cues] == [round(number * 100 * 1000 / 22050) for number in range(1000)]


def test_nothing_said_makes_an_empty_file() -> None:
    assert subtitled() == subtitled((None, 100), ("[]", 100)) == {"srt": "", "vtt": "WEBVTT\n"}


def test_subtitles_of_the_whole_move_forward() -> None:
    text = "今天天气真好，我们一起去公园散步吧！"
    lasts_ms = 200 * len(text)
    words = [word(char, 200 * index, 200 * index + 200) for index, char in enumerate(text)]
    files = subtitled(
        segment(text, said(text, lasts_ms, *words)),
        (None, 1234),
        segment(f"{text}<b>5 > 3</b> & more.", said("", lasts_ms), said("<b>5 > 3</b> & more.", 2000)),
        segment(f"{text}再见。", said(text, lasts_ms, *words), said("", 900)),
    )
    begins = [0, lasts_ms + 1234, 2 * lasts_ms + 1234, 2 * lasts_ms + 3234, 3 * lasts_ms + 3234]
    for format, file in files.items():
        cues = read(file, format)
        assert {begin_ms for begin_ms, _, _ in cues} >= set(begins)
        assert cues[-1][1] == begins[-1] + 900
        assert all(begin_ms < end_ms for begin_ms, end_ms, _ in cues)
        assert all(one[1] <= other[0] for one, other in pairwise(cues))
        plain = re.sub(r"\s", "", "".join(said for _, _, said in cues))
        assert plain.count(text) == 3
        assert plain.endswith("再见。")
    numbers = [int(number) for number in re.findall(r"^(\d+)\n\d\d:\d\d:\d\d,\d{3} --> ", files["srt"], re.MULTILINE)]
    assert numbers == list(range(1, len(read(files["srt"], "srt")) + 1))
    assert files["vtt"].startswith("WEBVTT\n\n00:00:00.000 --> ")
    assert "&amp; more" in files["vtt"]
