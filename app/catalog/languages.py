"""The languages of system voices, as the voice list writes them and as clients ask for them (spec: Language)."""

import re
import unicodedata

# 印尼语 is not in the spec's table, but a voice speaks it.
_CODES = {
    "zh": "中文", "yue": "粤语", "en": "英语", "ja": "日语", "ko": "韩语", "de": "德语", "fr": "法语", "ru": "俄语",
    "es": "西班牙语", "it": "意大利语", "pt": "葡萄牙语", "ar": "阿拉伯语", "th": "泰语", "vi": "越南语",
    "id": "印尼语",
}  # fmt: skip
# 中文(四川话), 美式英语.
_PARTS = re.compile(r"(?:[美英]式)?(?P<language>[^()]+)(?:\((?P<dialect>[^()]+)\))?")


def language_names(language: str) -> frozenset[str]:
    """Everything that `wanted_language` can give for a language of the voice list: itself, its family, its dialect."""
    name = _unify(language)
    parts = _PARTS.fullmatch(name)
    return frozenset({name, *(parts.groups("") if parts else ())} - {""})


def wanted_language(asked: str) -> str:
    """The one name for a code such as `zh`, or for a name in any of the ways in which it is written.

    The voice list itself says both 英文 and 英语, 粤语 and 广东话. Chinese has every dialect, English every accent.
    """
    name = _unify(asked)
    return _CODES.get(name, name)


def _unify(name: str) -> str:
    folded = "".join(unicodedata.normalize("NFKC", name).casefold().split())
    return folded.replace("英文", "英语").replace("广东话", "粤语")
