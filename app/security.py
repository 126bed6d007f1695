"""Password hashing, tokens and the sealing of API keys. Pure: no I/O, no settings."""

import hashlib
import hmac
import os
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from jose import JWTError, jwt

from app.errors import SealBroken, Unauthorized

if TYPE_CHECKING:
    from passlib.context import CryptContext

TOKEN_ALGORITHM = "HS256"
MAX_TOKEN_CHARS = 2048
TICKET_SECONDS = 60
TOKENS_REMEMBERED = 4096  # what one says does not change: it need not be proven at each request
# What python-jose, and odd headers and claims, let escape (LIBRARIES trap 6).
_ODD = (ValueError, TypeError, AttributeError, LookupError, RecursionError, ArithmeticError, OSError)
Use = Literal["access", "refresh", "ticket"]
NONCE_BYTES = 12
JUDGED_CHARS = 20  # of a password: more make it no easier to guess, and twice as many take seconds to judge
MAX_GENERATION = 2**31 - 1


@cache
def _passwords() -> "CryptContext":
    """OWASP's argon2id parameters; pbkdf2 is read only, and replaced at the next login."""
    from passlib.context import CryptContext  # here, so that it is loaded in a thread, when nobody waits for a start

    return CryptContext(
        schemes=["argon2", "pbkdf2_sha256"],
        deprecated="auto",
        argon2__type="ID",
        argon2__memory_cost=19_456,
        argon2__time_cost=2,
        argon2__parallelism=1,
    )


def hash_password(password: str) -> str:
    """Hash a password with argon2id. Takes about 20 ms and 19 MiB: call it in a thread."""
    return _passwords().hash(password)


def count_guesses(password: str, *known: str) -> int:
    """How many guesses somebody needs who tries common passwords and patterns first; `known` is what he knows anyway.

    Takes up to 0.1 s: call it in a thread. Loading the list of passwords costs 14 MB, once.
    """
    from zxcvbn import zxcvbn  # here, so that who registers nobody does not pay for it

    return int(zxcvbn(password[:JUDGED_CHARS], user_inputs=[name[:JUDGED_CHARS] for name in known])["guesses"])


def verify_password(password: str, password_hash: str | None) -> tuple[bool, str | None]:
    """Say whether the password fits, and give a new hash when the stored one has outdated parameters.

    Without a hash (an unknown user) it takes the same time and answers False. Call it in a thread.
    """
    from passlib.exc import UnknownHashError

    if password_hash is None:
        _passwords().dummy_verify()
        return False, None
    try:
        return _passwords().verify_and_update(password, password_hash)
    except UnknownHashError:
        _passwords().dummy_verify()
        return False, None


@dataclass(frozen=True, slots=True)
class Claims:
    """What a token says: whose it is, to which login it belongs, and how often that was refreshed before."""

    user_id: uuid.UUID
    login_id: uuid.UUID
    token_id: uuid.UUID
    expires_at: datetime
    generation: int


class TokenSigner:
    """Issues and reads what a login consists of: JWTs of a pinned algorithm, each good for one use only.

    The first secret signs. All of them are believed, each by the id in the token's header, so a new secret is put in
    front and the old one taken away once the tokens that it signed have expired.
    """

    def __init__(self, secrets: tuple[str, ...], ttl_seconds: int) -> None:
        self._secrets = {_secret_id(secret): secret for secret in secrets}
        self._signing = _secret_id(secrets[0])
        self.ttl_seconds = ttl_seconds
        self._read: dict[bytes, Claims] = {}  # by digest: a token itself is kept nowhere

    def issue(self, user_id: uuid.UUID, login_id: uuid.UUID) -> str:
        """Sign an access token that says who the user is, for `ttl_seconds`."""
        return self._sign("access", user_id, login_id, self.ttl_seconds)

    def issue_ticket(self, user_id: uuid.UUID, login_id: uuid.UUID) -> str:
        """Sign what stands in for an access token in a URL: for `TICKET_SECONDS`, and for one time."""
        return self._sign("ticket", user_id, login_id, TICKET_SECONDS)

    def issue_refresh(self, user_id: uuid.UUID, login_id: uuid.UUID, generation: int, ttl_seconds: int) -> str:
        """Sign what new tokens of a login are had for."""
        return self._sign("refresh", user_id, login_id, ttl_seconds, gen=generation)

    def read(self, token: str, use: Use = "access") -> Claims:
        """Give what a valid token for that use says. Raises Unauthorized for every other input, however odd."""
        if len(token) > MAX_TOKEN_CHARS:
            raise Unauthorized
        name = hashlib.sha256(f"{use} {token}".encode("utf-8", "surrogatepass")).digest()
        known = self._read.get(name)
        if known is None:
            known = self._read_new(token, use)
            self._read[name] = known
            if len(self._read) > TOKENS_REMEMBERED:
                self._read.pop(next(iter(self._read)), None)
        elif known.expires_at < datetime.now(UTC).replace(microsecond=0):
            raise Unauthorized
        return known

    def _read_new(self, token: str, use: Use) -> Claims:
        try:
            claims = jwt.decode(
                token,
                self._secrets[jwt.get_unverified_header(token)["kid"]],
                algorithms=[TOKEN_ALGORITHM],
                options={f"require_{claim}": True for claim in ("exp", "iat", "sub", "jti")},
            )
            generation = claims.get("gen", 0)
            if claims["use"] != use or type(generation) is not int or not 0 <= generation < MAX_GENERATION:
                raise Unauthorized
            return Claims(
                uuid.UUID(claims["sub"]),
                uuid.UUID(claims["sid"]),
                uuid.UUID(claims["jti"]),
                datetime.fromtimestamp(claims["exp"], UTC),
                generation,
            )
        except (JWTError, *_ODD) as error:
            raise Unauthorized from error

    def _sign(self, use: Use, user_id: uuid.UUID, login_id: uuid.UUID, ttl_seconds: int, **more: int) -> str:
        now = int(time.time())
        claims = {"use": use, "sub": str(user_id), "sid": login_id.hex, "jti": uuid.uuid4().hex, **more}
        claims |= {"iat": now, "exp": now + ttl_seconds}
        return jwt.encode(
            claims, self._secrets[self._signing], algorithm=TOKEN_ALGORITHM, headers={"kid": self._signing}
        )


def _secret_id(secret: str) -> str:
    return hashlib.sha256(b"token key id " + secret.encode()).hexdigest()[:8]


class KeySealer:
    """Seals API keys with AES-256-GCM, bound to the user they belong to.

    Sealed form: 1 byte that names the sealing key, 12 bytes nonce, ciphertext with tag. The first key seals, all
    of them open, so a new key is put behind the others until every process knows it, then in front, and the
    old one removed once everything is sealed anew.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._ciphers = [(_key_id(key), AESGCM(_derive(key))) for key in keys]

    def seal(self, api_key: str, user_id: uuid.UUID) -> bytes:
        """Seal a key for a user."""
        key_id, cipher = self._ciphers[0]
        nonce = os.urandom(NONCE_BYTES)
        return key_id + nonce + cipher.encrypt(nonce, api_key.encode(), _binding(user_id))

    def open(self, sealed: bytes, user_id: uuid.UUID) -> tuple[str, bool]:
        """Open a key of this user, and say whether another than the first key had sealed it.

        Raises SealBroken when it was sealed for another user, is damaged, or its sealing key is gone.
        """
        nonce, ciphertext = sealed[1 : 1 + NONCE_BYTES], sealed[1 + NONCE_BYTES :]
        for position, (key_id, cipher) in enumerate(self._ciphers):
            if key_id == sealed[:1]:
                try:
                    return cipher.decrypt(nonce, ciphertext, _binding(user_id)).decode(), position > 0
                except (InvalidTag, ValueError):
                    continue
        raise SealBroken


def _derive(key: str) -> bytes:
    return HKDF(hashes.SHA256(), 32, salt=None, info=b"ai-voice-backend api key").derive(key.encode())


def _key_id(key: str) -> bytes:
    return hashlib.sha256(b"key id " + key.encode()).digest()[:1]


def _binding(user_id: uuid.UUID) -> bytes:
    return b"api_keys.user_id=" + user_id.bytes


def mask_api_key(api_key: str) -> str:
    """All of a key that may be shown: its last four characters, and only when enough stay hidden."""
    hidden = api_key.removeprefix("sk-")
    return "sk-****" + (hidden[-4:] if len(hidden) >= 12 else "")


def fingerprint_secret(secret: str) -> str:
    """Tell two secrets apart without telling either: 64 hexadecimal digits."""
    return hmac.digest(secret.encode(), b"fingerprint of a generated secret", "sha256").hex()
