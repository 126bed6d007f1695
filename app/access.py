"""The operator's commands about who gets in: appointing an admin, and the rotation of sealing keys."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from getpass import getpass

from pydantic import ValidationError

from app.database import Database, require_current_schema
from app.errors import UserNotFound, WeakPassword
from app.ratelimit import RateLimiter
from app.routers.auth import Registration
from app.security import KeySealer
from app.services.administration import AdministrationService
from app.services.passwords import Passwords
from app.services.registration import RegistrationService
from app.services.resealing import Resealer
from app.settings import Settings, load_secrets

SHOWN = 20
_DONE = {"created": "made, as an administrator", "appointed": "an administrator now"}


async def appoint_admin(settings: Settings, name: str, *, password_stdin: bool) -> int:
    """Make an admin of a user, and a user of nobody; 2 if the name or the password cannot be."""
    given = sys.stdin.readline().rstrip("\r\n") if password_stdin else None
    async with _opened(settings) as database:
        passwords = Passwords(settings.password_guesses)
        registration = RegistrationService(settings, database, RateLimiter(), passwords)
        administration = AdministrationService(database, registration, passwords)
        try:
            done = await _appoint(administration, name, given)
        except WeakPassword:
            reason = "password: it is among the first that somebody would try, take a longer one"
        except ValidationError as error:
            reason = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        except ValueError as error:
            reason = str(error)
        else:
            print(f"{name} is {_DONE[done]}.")
            return 0
    print(reason, file=sys.stderr)
    return 2


async def _appoint(administration: AdministrationService, name: str, given: str | None) -> str:
    """Raises ValidationError, WeakPassword, or ValueError where a password is needed and nobody can be asked."""
    if given is None:
        try:
            return await administration.appoint(name, None)
        except UserNotFound:
            if not sys.stdin.isatty():
                raise ValueError(f"there is no user {name}: --password-stdin makes one") from None
        given = await asyncio.to_thread(_ask_password, name)
    asked = Registration(username=name, password=given)
    return await administration.appoint(asked.username, asked.password)


async def reseal(settings: Settings) -> int:
    """Seal all API keys by the first sealing key; 1 if some cannot be opened by any."""
    async with _opened(settings) as database:
        done = await Resealer(database, KeySealer(load_secrets(settings).credential_keys)).renew_all()
    print(f"{done.anew} API keys were sealed anew, {done.before} were sealed by the first of CREDENTIAL_KEYS before.")
    if not done.closed:
        print("The others of CREDENTIAL_KEYS are not needed any more, once every process runs with the new first one.")
        return 0
    print(
        f"{len(done.closed)} cannot be opened by any of CREDENTIAL_KEYS: put the key that sealed them behind the "
        "others, or have these users store them again:",
        *done.closed[:SHOWN],
        *(["…"] if len(done.closed) > SHOWN else []),
        sep="\n",
        file=sys.stderr,
    )
    return 1


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[Database]:
    database = Database(settings.database_url)
    try:
        await require_current_schema(database)
        yield database
    finally:
        await database.close()


def _ask_password(name: str) -> str:
    password = getpass(f"There is no user {name}. Password for a new one: ")
    if getpass("Once more: ") != password:
        raise ValueError("the two passwords differ")
    return password
