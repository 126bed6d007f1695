"""Field types that several requests share."""

import re
from typing import Annotated

from pydantic import AfterValidator

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def _check_text(value: str) -> str:
    if _CONTROL.search(value):
        raise ValueError("不能含有控制字符")
    if _SURROGATE.search(value):
        raise ValueError("含有无法编码的字符")
    return value


Text = Annotated[str, AfterValidator(_check_text)]
"""A string that every database and every provider can take: no control characters, no lone surrogates."""
