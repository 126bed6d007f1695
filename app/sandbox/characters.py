"""Counting characters as CosyVoice bills them (PROTOCOL.md §1.8), and telling scripts apart."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

# The ideographs of every CJK block, with the iteration mark and the ideographic zero, which Unicode files as Han.
_HAN_RANGES: Final = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f\U00030000-\U000323af"
HAN: Final = re.compile(f"[{_HAN_RANGES}]")


def count_characters(text: str) -> int:
    """The billed length of `text`: Han characters count 2, everything else 1 (§1.8)."""
    return len(text) + len(HAN.findall(text))


def is_speakable(text: str) -> bool:
    """Whether any character is a letter, a digit or a symbol; punctuation and blanks alone can't be spoken."""
    return any(unicodedata.category(character)[0] in "LNS" for character in text)
