"""Prices, and the counting of characters that they are applied to."""

import re
from decimal import Decimal
from html import unescape
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from app.catalog.data import read_data

CHARACTERS_PER_PRICE = 10_000
MAX_PRICE_DECIMALS = 8  # so that the price of one character has at most 12

# Unified Han with its extensions and compatibility forms, and the iteration and zero marks written with them.
_HAN = re.compile("[\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f\U00030000-\U000323af]")
# What of SSML is not text: comments, tags, blanks around the documents. CDATA is text as it stands.
_MARKUP = re.compile(
    r"""<!--.*?-->|<!\[CDATA\[(?P<text>.*?)\]\]>|\A\s+(?=<speak\b)|</speak\s*>\s*(?=<speak\b|\Z)"""
    r"""|<[^<>"']*+(?:(?:"[^"<]*"|'[^'<]*')[^<>"']*+)*+>""",
    re.DOTALL,
)


class PriceList(BaseModel):
    """What the operator's users pay: speech models by characters spoken, recognition models by seconds heard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    currency: str = Field(pattern="^[A-Z]{3}$")
    per_10k_characters: dict[str, Decimal]
    per_second: dict[str, Decimal] = Field(default_factory=dict)

    @field_validator("per_10k_characters", "per_second")
    @classmethod
    def _exact_prices(cls, prices: dict[str, Decimal]) -> dict[str, Decimal]:
        for model, price in prices.items():
            exponent = price.as_tuple().exponent
            if not isinstance(exponent, int) or price < 0 or exponent < -MAX_PRICE_DECIMALS:
                raise ValueError(f"the price of {model} must be ≥ 0 with at most {MAX_PRICE_DECIMALS} decimals")
        return prices

    def per_character(self, model_id: str) -> Decimal:
        """The exact price of one character. Raises KeyError for a model without price."""
        return self.per_10k_characters[model_id] / CHARACTERS_PER_PRICE


def load_prices(replacement: Path | None = None) -> PriceList:
    """Read the price list, or the operator's replacement for it. Raises ValueError or OSError with the reason."""
    shipped = PriceList.model_validate_json(read_data("prices.json"))
    if replacement is None:
        return shipped
    prices = PriceList.model_validate_json(replacement.read_bytes())
    missing = (shipped.per_10k_characters.keys() - prices.per_10k_characters.keys()) | (
        shipped.per_second.keys() - prices.per_second.keys()
    )
    if missing:
        raise ValueError(f"no price for {', '.join(sorted(missing))}")
    return prices


def count_characters(text: str, *, ssml: bool = False) -> int:
    """Count as the provider bills: a Han character is 2, everything else 1, SSML tags nothing (PROTOCOL §1.8)."""
    spoken = _text_of(text) if ssml else text
    return len(spoken) + len(_HAN.findall(spoken))


def _text_of(document: str) -> str:
    """The text of SSML, with each reference as the character that it stands for."""
    escaped = _MARKUP.sub(lambda markup: (markup["text"] or "").replace("&", "&amp;"), document)
    return unescape(escaped.replace("\r\n", "\n"))
