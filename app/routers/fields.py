"""Field types that several requests share."""

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

MAX_PASSWORD_CHARS = 128
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def _check_text(value: str) -> str:
    if _CONTROL.search(value):
        raise ValueError("不能含有控制字符")
    if _SURROGATE.search(value):
        raise ValueError("含有无法编码的字符")
    return value


class _Described:
    """Tells in the API's description what `_check_text` refuses."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"pattern": r"^[^\x00-\x08\x0b\x0c\x0e-\x1f]*$", **handler(schema)}


def _read_whole(value: object) -> object:
    """In JSON, 50.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, AfterValidator(_check_text), _Described()]
"""A string that every database and every provider can take: no control characters, no lone surrogates."""
WholeNumber = BeforeValidator(_read_whole)
"""Reads numbers of integer fields as JSON means them."""

NewPassword = Annotated[
    Text,
    Field(
        description="密码：8 到 128 个字符，不能太容易被猜到",
        min_length=8,
        max_length=MAX_PASSWORD_CHARS,
        repr=False,
        examples=["correct-horse-battery"],
    ),
]
