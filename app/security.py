"""Password hashing, access tokens and the sealing of API keys. Pure: no I/O, no settings."""

import hashlib
import hmac
import os
import time
import uuid

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from jose import JWTError, jwt
from passlib.context import CryptContext
from passlib.exc import UnknownHashError

from app.errors import SealBroken, Unauthorized

TOKEN_ALGORITHM = "HS256"
MAX_TOKEN_CHARS = 2048
NONCE_BYTES = 12

# OWASP's argon2id parameters; pbkdf2 is read only, and replaced at the next login.
_passwords = CryptContext(
    schemes=["argon2", "pbkdf2_sha256"],
    deprecated="auto",
    argon2__type="ID",
    argon2__memory_cost=19_456,
    argon2__time_cost=2,
    argon2__parallelism=1,
)


def hash_password(password: str) -> str:
    """Hash a password with argon2id. Takes about 20 ms and 19 MiB: call it in a thread."""
    return _passwords.hash(password)


def verify_password(password: str, password_hash: str | None) -> tuple[bool, str | None]:
    """Say whether the password fits, and give a new hash when the stored one has outdated parameters.

    Without a hash (an unknown user) it takes the same time and answers False. Call it in a thread.
    """
    if password_hash is None:
        _passwords.dummy_verify()
        return False, None
    try:
        return _passwords.verify_and_update(password, password_hash)
    except UnknownHashError:
        _passwords.dummy_verify()
        return False, None


class TokenSigner:
    """Issues and reads login tokens: JWT with a pinned algorithm, `sub`, `iat`, `exp` and `jti`."""

    def __init__(self, secret: str, ttl_seconds: int) -> None:
        self._secret = secret
        self.ttl_seconds = ttl_seconds

    def issue(self, user_id: uuid.UUID) -> str:
        """Sign a token that says who the user is, for `ttl_seconds`."""
        now = int(time.time())
        claims = {"sub": str(user_id), "iat": now, "exp": now + self.ttl_seconds, "jti": uuid.uuid4().hex}
        return jwt.encode(claims, self._secret, algorithm=TOKEN_ALGORITHM)

    def read(self, token: str) -> uuid.UUID:
        """Give the user id of a valid token. Raises Unauthorized for every other input, however odd."""
        if len(token) > MAX_TOKEN_CHARS:
            raise Unauthorized
        try:
            claims = jwt.decode(
                token,
                self._secret,
                algorithms=[TOKEN_ALGORITHM],
                options={f"require_{claim}": True for claim in ("exp", "iat", "sub", "jti")},
            )
            return uuid.UUID(claims["sub"])
        # python-jose lets odd headers and claims escape as these (LIBRARIES trap 6).
        except (JWTError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise Unauthorized from error


class KeySealer:
    """Seals API keys with AES-256-GCM, bound to the user they belong to.

    Sealed form: 1 byte that names the sealing key, 12 bytes nonce, ciphertext with tag. The first key seals, all
    of them open, so a new key is put in front and the old one removed once everything is sealed anew.
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
