"""Whether the secrets are there, safe, and those that the database was written with."""

import stat
from pathlib import Path

from pydantic import SecretStr
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.doctor.case import Case
from app.doctor.finding import Finding, fail, ok, warn
from app.errors import SealBroken
from app.models import ApiKey, GeneratedSecret
from app.security import KeySealer, fingerprint_secret
from app.settings import MIN_SECRET_CHARS, Secrets, Settings, is_easy_to_guess, load_secrets, split_secrets

SAMPLED_KEYS = 200
_MAKE_ONE = "Make one with: openssl rand -base64 48"


def load_existing_secrets(settings: Settings) -> Secrets | None:
    """The secrets, if both are there: none is made. It reads files. Raises ValueError or OSError."""
    if all(given or (settings.data_dir / name).exists() for name, given in _secrets(settings)):
        return load_secrets(settings)
    return None


def examine_secrets(case: Case) -> list[Finding]:
    """Look at each secret without telling it. It reads files."""
    data_dir = case.settings.data_dir
    return [
        finding for name, given in _secrets(case.settings) for finding in _examine_secret(name, given, data_dir / name)
    ]


async def examine_sealed_keys(case: Case, session: AsyncSession) -> list[Finding]:
    """Try to open the users' API keys, those that were stored last."""
    check = "sealed keys"
    total = await session.scalar(select(func.count()).select_from(ApiKey)) or 0
    rows = select(ApiKey.sealed, ApiKey.user_id).order_by(ApiKey.updated_at.desc()).limit(SAMPLED_KEYS)
    sealed = [(row.sealed, row.user_id) for row in await session.execute(rows)]
    if not total:
        return [ok(check, "no user has stored an API key yet")]
    try:
        secrets = load_existing_secrets(case.settings)
    except (ValueError, OSError):
        secrets = None
    sealer = KeySealer(secrets.credential_keys) if secrets else None
    opened = former = 0
    for content, user_id in sealed:
        try:
            _, is_former = sealer.open(content, user_id) if sealer else (None, False)
        except SealBroken:
            continue
        opened += sealer is not None
        former += is_former
    found = f"{opened} of {len(sealed)} looked at can be opened ({total} in all)"
    if opened < len(sealed):
        advice = (
            "Put the CREDENTIAL_KEYS that sealed them (or the former DATA_DIR/credential_keys) back, behind the new "
            "ones; users whose key stays closed must store it again."
        )
        return [fail(check, found, advice)]
    if former:
        advice = "Run `python -m app reseal` before you take the former key out of CREDENTIAL_KEYS."
        return [warn(check, f"{found}, {former} of them by a former key only", advice)]
    return [ok(check, found)]


async def examine_agreement(case: Case, session: AsyncSession) -> list[Finding]:
    """Compare the secrets with those that the first machine of this database made, by their fingerprints."""
    check = "agreement"
    made = {row.name: row.fingerprint for row in await session.scalars(select(GeneratedSecret))}
    findings = []
    for name, given in _secrets(case.settings):
        file = case.settings.data_dir / name
        if name not in made:
            continue
        variable = name.upper()
        advice = (
            f"Set {variable} to the same value on every machine: that of the machine that made it, to lose nothing."
        )
        ours = given.get_secret_value() if given else file.read_text() if file.exists() else None
        if ours is None:
            findings.append(fail(check, f"{variable}: another machine made one; this one would make its own", advice))
        elif fingerprint_secret(",".join(split_secrets(ours))) != made[name]:
            if given:
                found = f"{variable} is not the one that a machine of this database made before it was set"
                findings.append(warn(check, found, advice))
            else:
                findings.append(fail(check, f"{file} is not the one that another machine made: no start", advice))
    if findings or not made:
        return findings
    return [ok(check, "the secrets are those that were made for this database")]


def _secrets(settings: Settings) -> tuple[tuple[str, SecretStr | None], ...]:
    return ("jwt_secret", settings.jwt_secret), ("credential_keys", settings.credential_keys)


def _examine_secret(name: str, given: SecretStr | None, file: Path) -> list[Finding]:
    findings = []
    name = name.upper()
    if given is not None:
        content, origin = given.get_secret_value(), "set"
    elif not file.exists():
        return [ok("secrets", f"{name} is not set: the first start makes {file}")]
    else:
        origin = f"generated, in {file}"
        try:
            content, mode = file.read_text().strip(), stat.S_IMODE(file.stat().st_mode)
        except OSError as error:
            return [fail("secrets", f"{file} cannot be read ({error.strerror})", "Give it to the user that serves.")]
        if mode & 0o077:
            advice = f"Run: chmod 600 {file}"
            findings.append(warn("secrets", f"{file} has mode {mode:04o}: others may read it", advice))
    parts = split_secrets(content)
    lengths = ", ".join(str(len(part)) for part in parts)
    if not parts or any(len(part) < MIN_SECRET_CHARS for part in parts):
        advice = f"At least {MIN_SECRET_CHARS} characters are needed. {_MAKE_ONE}"
        return [*findings, fail("secrets", f"{name} is too short ({lengths or 0} characters)", advice)]
    if any(is_easy_to_guess(part) for part in parts):
        return [*findings, warn("secrets", f"{name} is easy to guess: it does not look random", _MAKE_ONE)]
    return [*findings, ok("secrets", f"{name} is {origin}, {lengths} characters")]
