"""Addresses of the media route: open to whoever knows them, or signed and ending like those of a private bucket."""

import hmac
import time
from urllib.parse import parse_qs, urlencode, urlsplit

from app.storage.keys import check_key, key_under

SIGNED_SECONDS = 3600
# What the signing key is made for: the secret that it comes from also signs login tokens.
_PURPOSE = b"media links"


class MediaLinks:
    """Makes and recognises addresses under `/media/`."""

    def __init__(self, public_base_url: str, secrets: tuple[str, ...] = ()) -> None:
        """With secrets, every address is signed by a key of the first; those of the others are believed too."""
        self._base_url = f"{public_base_url}/media"
        self._keys = [hmac.digest(secret.encode(), _PURPOSE, "sha256") for secret in secrets]

    def url(self, key: str) -> str:
        """Give the address of an object, for an hour where addresses are signed. Raises ValueError."""
        check_key(key)
        if not self._keys:
            return f"{self._base_url}/{key}"
        expires = str(int(time.time()) + SIGNED_SECONDS)
        query = urlencode({"expires": expires, "signature": _sign(self._keys[0], key, expires)})
        return f"{self._base_url}/{key}?{query}"

    def key_of(self, url: str) -> str | None:
        """Give the key that an address holds, with or without the right to it; None for every other URL."""
        return key_under(self._base_url, url)

    def admits(self, key: str, query: str) -> bool:
        """Whether an address of this key with this query gives the right to its object."""
        if not self._keys:
            return True
        given = parse_qs(query)
        expires, signature = given.get("expires", [""])[-1], given.get("signature", [""])[-1]
        ours = [_sign(each, key, expires) for each in self._keys]
        is_ours = any(hmac.compare_digest(signature.encode(), each.encode()) for each in ours)
        return is_ours and time.time() < int(expires)  # what we signed is a number

    def grants(self, url: str) -> bool:
        """Whether a URL is an address that gives the right to its object."""
        key = self.key_of(url)
        return key is not None and self.admits(key, urlsplit(url).query)


def _sign(signing_key: bytes, key: str, expires: str) -> str:
    return hmac.digest(signing_key, f"{key}\n{expires}".encode(), "sha256").hex()
