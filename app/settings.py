"""Settings from the environment or `.env`. Built by whoever starts the application, never at import."""

import os
import re
import secrets
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from limits import parse
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from app import hosts

# 32 characters of a random token carry more entropy than HMAC-SHA-256 or AES-256 can use.
MIN_SECRET_CHARS = 32
MIN_DIFFERENT_CHARS = 10
# Random secrets repeat next to none of their pieces.
REPEATED_CHARS, MIN_DIFFERENT_PIECES = 4, 0.75
_PLACEHOLDER = re.compile(
    r"change[-_ ]?(me|this|it)|replace[-_ ]?(me|this)|your[-_ ](own|secret|jwt|key)|do[-_ ]?not[-_ ]?use|password"
    r"|insecure|qwerty|example|default|placeholder|openssl|(jwt|my|super)[-_ ]?secret|secret[-_ ]?key|\s"
    r"|09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7",  # published with FastAPI's tutorial
    re.IGNORECASE,
)
_ONE_PROCESS = "several WORKERS, or a worker apart, need PostgreSQL in DATABASE_URL, not SQLite"


class Settings(BaseSettings):
    """Every setting with its default; `.env.example` explains each in words."""

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore", hide_input_in_errors=True)

    environment: Literal["development", "production"] = "development"
    data_dir: Path = Path("./data")
    database_url: str = Field(default="", repr=False)
    database_pool_size: int = Field(default=10, ge=2, le=500)
    auto_migrate: bool = True
    redis_url: str | None = Field(default=None, repr=False)
    workers: int = Field(default=1, ge=1)
    background_jobs: bool = True

    jwt_secret: SecretStr | None = None
    credential_keys: SecretStr | None = None
    token_ttl_seconds: int = Field(default=24 * 3600, ge=60, le=366 * 24 * 3600)
    refresh_ttl_seconds: int = Field(default=30 * 24 * 3600, ge=60, le=366 * 24 * 3600)
    refresh_overlap_seconds: int = Field(default=0, ge=0, le=300)
    login_tokens_in_urls: bool | None = None
    registration: Literal["open", "invite", "closed"] = "open"
    registration_limit: str | None = None
    login_limit: str = "10/minute"

    dashscope_ws_url: str | None = None
    dashscope_http_url: str | None = None
    upstream_rate: str = "3/second"
    upstream_timeout: float = Field(default=60.0, gt=0)
    handshake_timeout: float = Field(default=10.0, gt=0)
    long_text_max_chars: int = Field(default=500_000, ge=1, le=2_000_000)
    long_text_parallelism: int = Field(default=4, ge=1, le=64)
    long_text_bit_rate: int = Field(default=32, ge=6, le=320)
    stream_idle_seconds: float = Field(default=300.0, gt=0)
    asr_max_seconds: int = Field(default=60, ge=1, le=300)

    storage: Literal["local", "oss"] | None = None
    oss_endpoint: str | None = None
    oss_region: str | None = None
    oss_bucket: str | None = None
    oss_access_key_id: SecretStr | None = None
    oss_access_key_secret: SecretStr | None = None
    oss_public_base_url: str | None = None
    oss_url_mode: Literal["public", "signed"] = "public"
    held_audio_max_mb: int = Field(default=2048, ge=1)
    retention_days: int | None = Field(default=None, ge=1, le=36_500)

    public_base_url: str = "http://localhost:8000"
    timezone: str = "Asia/Shanghai"
    cors_origins: str | None = None
    allowed_hosts: str | None = None
    rate_limit: str = "120/minute"
    prices_file: Path | None = None
    drain_seconds: float = Field(default=25.0, ge=0)
    drain_delay_seconds: float = Field(default=0.0, ge=0, le=300)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    otel_exporter_otlp_endpoint: str | None = Field(default=None, repr=False)
    trace_sample_ratio: float = Field(default=1.0, ge=0, le=1)

    @field_validator("timezone")
    @classmethod
    def _known_timezone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise ValueError(f"TIMEZONE {value!r} is not a known IANA zone") from error
        return value

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, value: str) -> str:
        if value and not value.startswith(("sqlite+aiosqlite://", "postgresql+asyncpg://")):
            raise ValueError("must start with sqlite+aiosqlite:// or postgresql+asyncpg://")
        return value and _readable_url(value)

    @field_validator("rate_limit", "upstream_rate", "login_limit", "registration_limit")
    @classmethod
    def _known_limit(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                amount = parse(value).amount
            except ValueError as error:
                raise ValueError(f"{value!r} is not a limit such as 120/minute") from error
            if amount < 1:
                raise ValueError(f"{value!r} would let nothing through")
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis_address(cls, value: str | None) -> str | None:
        if value and not value.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must start with redis://, rediss:// or unix://")
        return value and _readable_url(value)

    @field_validator("oss_endpoint")
    @classmethod
    def _oss_address(cls, value: str | None) -> str | None:
        return value and _readable_url(value)

    @field_validator("dashscope_ws_url")
    @classmethod
    def _websocket_url(cls, value: str | None) -> str | None:
        return value and _checked_url(value, "ws", "wss")

    @field_validator("dashscope_http_url")
    @classmethod
    def _api_url(cls, value: str | None) -> str | None:
        if not value:
            return value
        checked = _checked_url(value, "http", "https")
        return checked if urlsplit(checked).path else f"{checked}/api/v1"

    @field_validator("public_base_url", "oss_public_base_url", "otel_exporter_otlp_endpoint")
    @classmethod
    def _http_url(cls, value: str | None) -> str | None:
        return value and _checked_url(value, "http", "https")

    @field_validator("cors_origins")
    @classmethod
    def _known_origins(cls, value: str | None) -> str | None:
        if value is None:
            return None
        origins = [given if given == hosts.EVERY else hosts.origin(given) for given in _listed(value)]
        if hosts.EVERY in origins and len(origins) > 1:
            raise ValueError("CORS_ORIGINS lists origins, or is * alone")
        return ",".join(origins)

    @field_validator("allowed_hosts")
    @classmethod
    def _known_hosts(cls, value: str | None) -> str | None:
        patterns = [] if value is None else [hosts.host_pattern(given) for given in _listed(value)]
        return ",".join(patterns) or None

    @model_validator(mode="after")
    def _derive(self) -> Self:
        if not self.database_url:
            self.database_url = f"sqlite+aiosqlite:///{self.data_dir / 'app.db'}"
        if self.storage is None:
            self.storage = "oss" if self.oss_bucket else "local"
        if self.registration_limit is None and self.environment == "production":
            self.registration_limit = "20/hour"
        if self.login_tokens_in_urls is None:
            self.login_tokens_in_urls = self.environment == "development"
        if self.storage == "oss":
            self._require_complete_oss()
        if self.environment == "production":
            self._refuse_unsafe_values()
        return self

    def _require_complete_oss(self) -> None:
        names = ("oss_endpoint", "oss_region", "oss_bucket", "oss_access_key_id", "oss_access_key_secret")
        missing = [name.upper() for name in names if not getattr(self, name)]
        if missing:
            raise ValueError(f"STORAGE=oss also needs {', '.join(missing)}")

    def _refuse_unsafe_values(self) -> None:
        problems = []
        for name in ("jwt_secret", "credential_keys"):
            given = getattr(self, name)
            if given is None:
                problems.append(f"{name.upper()} must be set: a generated one is lost with the machine")
            elif any(is_easy_to_guess(secret) for secret in split_secrets(given.get_secret_value())):
                problems.append(f"{name.upper()} is easy to guess: make one with `openssl rand -base64 48`")
        if "*" in self.allowed_origins:
            problems.append("CORS_ORIGINS must list the frontends, not *")
        if self.uses_sqlite and (self.workers > 1 or not self.background_jobs):
            problems.append(_ONE_PROCESS)
        if problems:
            raise ValueError("unsafe in production: " + "; ".join(problems))

    def require_shared_database(self) -> None:
        """Raise ValueError when the database is not one for several processes in production."""
        if self.environment == "production" and self.uses_sqlite:
            raise ValueError(f"unsafe in production: {_ONE_PROCESS}")

    @property
    def handshake_seconds(self) -> float:
        """How long a connection may take to come up: never longer than silence is borne."""
        return min(self.handshake_timeout, self.upstream_timeout)

    @property
    def uses_sqlite(self) -> bool:
        """Whether the database is an SQLite file."""
        return self.database_url.startswith("sqlite")

    @property
    def allowed_origins(self) -> list[str]:
        """Origins that browsers may call from: all in development, those listed in production."""
        if self.cors_origins is None:
            return ["*"] if self.environment == "development" else []
        return _listed(self.cors_origins)

    @property
    def trusted_hosts(self) -> list[str]:
        """Hosts that requests may be for, `*` for all.

        Unless listed: in production the public address and the loopback's names, once it is an address for the public.
        """
        if self.allowed_hosts is not None:
            return _listed(self.allowed_hosts)
        public = hosts.host_name(urlsplit(self.public_base_url).hostname or "")
        if self.environment == "development" or public in hosts.LOOPBACK:
            return [hosts.EVERY]
        return [public, *hosts.LOOPBACK]

    @property
    def password_guesses(self) -> int:
        """How many guesses a new password must withstand: the first hundred are tried within minutes."""
        return 1_000_000 if self.environment == "production" else 100

    @property
    def zone(self) -> ZoneInfo:
        """The time zone that clients are shown times in."""
        return ZoneInfo(self.timezone)


@dataclass(frozen=True, slots=True, repr=False)
class Secrets:
    """The keys that sign login tokens (the first signs, all are believed), and those that seal API keys (likewise)."""

    jwt_secrets: tuple[str, ...]
    credential_keys: tuple[str, ...]


def load_secrets(settings: Settings) -> Secrets:
    """Take the secrets from the settings, or from files under `DATA_DIR` that the first start makes.

    Raises ValueError when a secret is too short to be safe.
    """
    jwt_secrets = split_secrets(_secret(settings.jwt_secret, settings.data_dir / "jwt_secret"))
    keys = split_secrets(_secret(settings.credential_keys, settings.data_dir / "credential_keys"))
    if not jwt_secrets or not keys or any(len(secret) < MIN_SECRET_CHARS for secret in (*jwt_secrets, *keys)):
        raise ValueError(f"each of JWT_SECRET and CREDENTIAL_KEYS needs at least {MIN_SECRET_CHARS} characters")
    return Secrets(jwt_secrets, keys)


def split_secrets(content: str) -> tuple[str, ...]:
    """The secrets of a comma-separated list, in order."""
    return tuple(secret.strip() for secret in content.split(",") if secret.strip())


def is_easy_to_guess(secret: str) -> bool:
    """Whether a secret is no random one by its looks: few different characters, repetition, a sequence, a placeholder.

    None of a million random ones of 43 characters or more is refused.
    """
    pieces = [secret[start : start + REPEATED_CHARS] for start in range(len(secret) - REPEATED_CHARS + 1)]
    steps = [abs(ord(one) - ord(next_one)) <= 1 for one, next_one in pairwise(secret)]
    return (
        len(set(secret)) < MIN_DIFFERENT_CHARS
        or len(set(pieces)) < len(pieces) * MIN_DIFFERENT_PIECES
        or sum(steps) > len(steps) / 2
        or bool(_PLACEHOLDER.search(secret))
    )


def _listed(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


def _readable_url(value: str) -> str:
    """Raise ValueError, without the value, for a URL that programs read differently: it may hold a password."""
    try:
        parts = urlsplit(value)
        is_plain = "@" not in parts.netloc.rpartition("@")[0] and (parts.port is None or parts.port > 0)
    except ValueError:
        is_plain = False
    if not is_plain:
        raise ValueError("is no usable address; in a password, / is written %2F, : is %3A and @ is %40")
    return value


def _checked_url(value: str, *schemes: str) -> str:
    parts = urlsplit(_readable_url(value))
    if parts.scheme not in schemes or not parts.hostname:
        # Not shown: it may hold a password.
        raise ValueError(f"is not a URL that begins with {'://, '.join(schemes)}://")
    return value.rstrip("/")


def _secret(given: SecretStr | None, file: Path) -> str:
    return given.get_secret_value() if given is not None else read_or_create_secret(file)


def read_or_create_secret(file: Path, entropy_bytes: int = 48) -> str:
    """Read a generated secret of mode 0600; make it first when there is none. Two processes agree on one."""
    if not file.exists():
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_urlsafe(entropy_bytes))
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(draft, file)  # unlike a rename, never replaces what another process made first
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return file.read_text().strip()
