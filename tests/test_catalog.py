"""The catalogue's data: whole, consistent, and found in every way in which it is asked for."""

from collections import Counter

import pytest

from app.catalog import (
    cloning_models,
    find_voice,
    looks_cloned,
    speech_models,
    system_voices,
)
from app.catalog.regions import regions

FLASH, PLUS, V2 = "cosyvoice-v3-flash", "cosyvoice-v3-plus", "cosyvoice-v2"
BEIJING = system_voices("beijing")
SINGAPORE = system_voices("singapore")


def ids(**filters: str) -> list[str]:
    """The ids of the voices in Beijing that pass."""
    return [voice.voice_id for voice in system_voices("beijing", **filters)]


def test_every_voice_is_there_once_for_models_that_exist() -> None:
    assert len({voice.voice_id for voice in BEIJING}) == len(BEIJING) == 194
    assert Counter(model for voice in BEIJING for model in voice.models) == {FLASH: 88, PLUS: 3, V2: 106}
    order = [model.model_id for model in speech_models()]
    for voice in BEIJING:
        assert list(voice.models) == sorted(voice.models, key=order.index)
        assert (voice.age is None) == (voice.models == (V2,))
        assert not looks_cloned(voice.voice_id)


def test_nothing_in_a_voice_is_empty_or_twice() -> None:
    for voice in BEIJING:
        for text in (voice.voice_id, voice.name, voice.trait, voice.category, *voice.languages):
            assert text == text.strip() != ""
        assert len(set(voice.languages)) == len(voice.languages) > 0


def test_only_voices_whose_model_takes_instructions_have_them() -> None:
    takes = {model.model_id for model in speech_models() if model.takes_instruction}
    instructed = [voice for voice in BEIJING if voice.features.instruct]
    assert {voice.voice_id for voice in instructed} == {"longanyang", "longanhuan", "longanhuan_v3", "longhuhu_v3"}
    assert all(takes >= set(voice.models) for voice in instructed)


def test_singapore_has_32_voices_and_two_of_them_for_plus() -> None:
    offered = regions()["singapore"].system_voices
    assert offered is not None
    assert {voice.voice_id for voice in SINGAPORE} == offered[FLASH]
    assert len(SINGAPORE) == 32
    assert [voice.voice_id for voice in SINGAPORE if PLUS in voice.models] == ["longanyang", "longanhuan"]
    assert {model for voice in SINGAPORE for model in voice.models} == {FLASH, PLUS}


def test_singapore_keeps_the_order_and_all_but_the_models() -> None:
    everywhere = {voice.voice_id: voice for voice in BEIJING}
    listed = [voice.voice_id for voice in SINGAPORE]
    assert listed == [voice_id for voice_id in everywhere if voice_id in listed]
    for voice in SINGAPORE:
        assert set(voice.models) <= set(everywhere[voice.voice_id].models)
        assert voice.model_copy(update={"models": ()}) == everywhere[voice.voice_id].model_copy(update={"models": ()})


@pytest.mark.parametrize(
    ("voice_id", "model", "beijing", "singapore"),
    [
        ("longanyang", FLASH, True, True),
        ("longanyang", PLUS, True, True),
        ("longanyang", V2, False, False),
        ("longhuhu_v3", FLASH, True, True),
        ("longanhuan_v3", FLASH, True, False),
        ("longyingjing_v3", PLUS, True, False),
        ("longxiaochun_v2", V2, True, False),
        ("longxiaochun_v2", FLASH, False, False),
        ("nobody", FLASH, False, False),
        ("longanyang", "no-model", False, False),
    ],
)
def test_who_speaks_where(voice_id: str, model: str, beijing: bool, singapore: bool) -> None:
    for region, expected in (("beijing", beijing), ("singapore", singapore)):
        voice = find_voice(voice_id, region)
        assert (voice is not None and model in voice.models) is expected


def test_a_voice_is_found_with_the_models_of_its_region() -> None:
    assert [find_voice(voice.voice_id) for voice in BEIJING] == list(BEIJING)
    assert [find_voice(voice.voice_id, "singapore") for voice in SINGAPORE] == list(SINGAPORE)
    assert find_voice("longyingjing_v3", "singapore") is None
    assert find_voice("") is find_voice("LONGANYANG") is None


def test_clones_speak_with_three_models_in_beijing_and_one_in_singapore() -> None:
    assert set(cloning_models("beijing")) == {model.model_id for model in speech_models()}
    assert cloning_models("singapore") == (PLUS,)


def test_a_region_that_does_not_exist_is_no_region() -> None:
    for ask in (system_voices, cloning_models):
        with pytest.raises(KeyError):
            ask("atlantis")


LANGUAGES = [
    (["zh", "ZH", " zh ", "中文"], 150),
    (["中文(普通话)", "中文（普通话）", "中文 (普通话)", "普通话"], 138),
    (["yue", "粤语", "广东话", "中文(粤语)", "中文（广东话）"], 7),
    (["en", "En", "英文", "英语", "ｅｎ"], 180),
    (["美式英语", "美式英文"], 20),
    (["英式英语", "英式英文"], 10),
    (["ja", "日语"], 9),
    (["ko", "韩语"], 4),
    (["id", "印尼语"], 1),
    (["中文(四川话)", "中文（四川话）", "四川话"], 1),
    (["中文(东北话)", "东北话"], 3),
    (["de", "fr", "ru", "es", "it", "pt", "ar", "th", "vi", "德语", "越南语"], 0),
    (["klingon", "文", "语", "话", "式", "中", "z", "(", ")", "()", "中文()", "中文(普通话)英文"], 0),
    ([".*", "%", "_", "\x00"], 0),
]


@pytest.mark.parametrize(("language", "count"), [(name, count) for names, count in LANGUAGES for name in names])
def test_languages_are_found_by_code_and_by_every_way_to_write_them(language: str, count: int) -> None:
    assert len(ids(language=language)) == count


def test_every_language_is_found_as_it_stands_and_under_one_code() -> None:
    by_code = {code: set(ids(language=code)) for code in ("zh", "en", "ja", "ko", "id")}
    for voice in BEIJING:
        for language in voice.languages:
            assert voice.voice_id in ids(language=language)
        assert any(voice.voice_id in found for found in by_code.values())
    assert set(ids(language="yue")) < by_code["zh"]


@pytest.mark.parametrize(
    ("q", "found"),
    [
        ("longanyang", ["longanyang"]),
        ("LongAnYang", ["longanyang"]),
        ("ｌｏｎｇａｎｙａｎｇ", ["longanyang"]),
        ("龙安洋", ["longanyang"]),
        ("阳光大男孩", ["longanyang"]),
        ("  龙安洋   社交\u3000英文\t", ["longanyang"]),
        ("V3） 元气", ["longanhuan_v3"]),
        ("(v3) 元气", ["longanhuan_v3"]),
        ("四川话", ["longanhuan_v3"]),
        ("20～30岁 龙应静", ["longyingjing_v3"]),
        ("longanyang 龙安欢", []),
        ("龙安洋阳光大男孩", []),
        (".*", []),
        ("%", []),
        ("\\", []),
        ("\x00", []),
        ("\ud800", []),
        ("None", []),
    ],
)
def test_every_word_of_a_search_is_found_somewhere_in_the_voice(q: str, found: list[str]) -> None:
    assert ids(q=q) == found


def test_an_underscore_is_a_letter_and_nothing_more() -> None:
    assert ids(q="_") == [voice.voice_id for voice in BEIJING if "_" in voice.voice_id]


@pytest.mark.parametrize("feature", ["ssml", "instruct", "timestamp"])
def test_features_are_found_by_name(feature: str) -> None:
    found = ids(feature=feature)
    assert found == ids(feature=feature.upper())
    assert found == [voice.voice_id for voice in BEIJING if getattr(voice.features, feature)]
    assert 0 < len(found) < len(BEIJING)


@pytest.mark.parametrize("feature", ["model_dump", "__class__", "sml", "ssml,instruct", "true"])
def test_what_is_no_feature_has_no_voice(feature: str) -> None:
    assert ids(feature=feature) == []


def test_empty_filters_are_none() -> None:
    assert ids(model="", category="", language="", feature="", q="") == ids()
    assert ids(language=" ", feature=" ", q=" \u3000") == ids()
