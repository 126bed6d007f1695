from __future__ import annotations

import pytest

from app.sandbox.characters import count_characters, is_speakable
from app.sandbox.languages import split_by_language
from app.sandbox.sentences import LONGEST_SENTENCE, SentenceCutter
from app.sandbox.ssml import read_ssml


@pytest.mark.parametrize(
    ("text", "characters"),
    [
        ("你好", 4),
        ("中A文123", 8),
        ("中文。", 5),
        ("中 文。", 6),
        ("床前明月光，", 11),
        ("今天天气怎么样？", 15),
        ("漢字かなカナ한글", 10),
        ("", 0),
    ],
)
def test_characters_are_counted_as_billed(text: str, characters: int) -> None:
    assert count_characters(text) == characters


def test_ssml_tags_are_not_counted() -> None:
    (line,) = read_ssml("<speak>你好</speak>")
    assert count_characters(line.text) == 4


def cut(*texts: str, finish: bool = True) -> list[str]:
    cutter = SentenceCutter()
    sentences: list[str] = []
    for text in texts:
        cutter.add(text)
        sentences += iter(cutter.take, None)
    if finish:
        cutter.flush()
        sentences += iter(cutter.take, None)
    return sentences


@pytest.mark.parametrize(
    ("texts", "sentences"),
    [
        (["床前明月光，疑是地上霜。"], ["床前明月光，", "疑是地上霜。"]),
        (["今天", "天气", "不错。明天", "呢"], ["今天天气不错。", "明天呢"]),
        (["It costs 3.14 at example.com. Really? Yes."], ["It costs 3.14 at example.com. ", "Really? ", "Yes."]),
        (["他说：“走吧！”然后走了。"], ["他说：“走吧！”", "然后走了。"]),
        (["真的吗？！……好。"], ["真的吗？！……", "好。"]),
        (["一行\n二行"], ["一行\n", "二行"]),
        (["……嗯。"], ["……嗯。"]),
    ],
)
def test_text_is_cut_at_the_end_of_sentences(texts: list[str], sentences: list[str]) -> None:
    assert cut(*texts) == sentences


def test_an_unfinished_tail_is_held() -> None:
    assert cut("第一句。第二", finish=False) == ["第一句。"]
    assert cut("Version 2.", finish=False) == []


def test_a_flush_covers_what_had_come_and_no_more() -> None:
    cutter = SentenceCutter()
    cutter.add("未完")
    cutter.flush()
    cutter.add("还有。")
    assert [cutter.take(), cutter.take(), cutter.take()] == ["未完", "还有。", None]


def test_a_flush_is_over_once_its_text_was_taken() -> None:
    cutter = SentenceCutter()
    cutter.add("好。未完")
    cutter.flush()
    assert cutter.take() == "好。"
    cutter.add("还有")
    assert [cutter.take(), cutter.take()] == ["未完", None]


def test_endless_text_is_cut_without_losing_a_character() -> None:
    text = "字" * 500 + "word, " * 100
    sentences = cut(text)
    assert "".join(sentences) == text
    assert max(map(len, sentences)) <= LONGEST_SENTENCE


@pytest.mark.parametrize(("text", "speakable"), [("。！ ", False), ("", False), ("a", True), ("5", True), ("你", True)])
def test_punctuation_alone_cannot_be_spoken(text: str, speakable: bool) -> None:
    assert is_speakable(text) is speakable


@pytest.mark.parametrize(
    ("text", "languages", "hint", "runs"),
    [
        ("我用 iPhone。", ("zh", "en"), None, [("cmn", "我用 iPhone。")]),
        ("Good morning.", ("zh", "en"), None, [("en-us", "Good morning.")]),
        ("Good morning.", ("en-gb",), None, [("en", "Good morning.")]),
        ("Guten Morgen", ("zh", "en"), "de", [("de", "Guten Morgen")]),
        ("你好", ("yue", "en"), None, [("yue", "你好")]),
        ("東京へ", ("ja",), None, [("cmn", "東京"), ("ja", "へ")]),
        ("2025", ("zh", "en"), None, [("cmn", "2025")]),
    ],
)
def test_a_language_is_chosen_by_script_then_hint_then_voice(
    text: str, languages: tuple[str, ...], hint: str | None, runs: list[tuple[str, str]]
) -> None:
    assert split_by_language(text, languages, hint) == runs
