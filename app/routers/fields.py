"""Field types that several requests share."""

from typing import Annotated

from pydantic import AfterValidator

_ALLOWED_CONTROLS = "\t\n\r"


def _check_text(value: str) -> str:
    if any(character < " " and character not in _ALLOWED_CONTROLS for character in value):
        raise ValueError("不能含有控制字符")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("含有无法编码的字符")
    return value


Text = Annotated[str, AfterValidator(_check_text)]
"""A string that every database and every provider can take: no control characters, no lone surrogates."""
