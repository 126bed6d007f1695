"""Logins from the password to the logout: refreshed, copied, ended, and shown in URLs."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from passlib.hash import pbkdf2_sha256
from sqlalchemy import select, update

from app.database import Database
from app.errors import AppError, InvalidCredentials, RateLimited, Unauthorized
from app.models import Login, UsedTicket, User
from app.ratelimit import RateLimiter
from app.routers import live
from app.security import TokenSigner
from app.services import logins as logins_module
from app.services.logins import LoginService
from app.services.passwords import Passwords
from app.settings import Settings
from tests.conftest import PASSWORD, Account, CreateAccount
from tests.databases import rows
from tests.logins import begin_login
from tests.servers import NO_AUTHORITIES, Sandbox, Server, run_backend
from tests.talking import SENTENCE, talking
from tests.traces import create_user

NEW_PASSWORD = "another-horse-battery"
ME = "/api/user/me"

Tokens = dict[str, Any]


async def log_in(account: Account, password: str = PASSWORD) -> Tokens:
    """The tokens of a new login."""
    login = {"username": account.username, "password": password}
    answer = await account.client.post("/api/auth/login", json=login)
    assert answer.status_code == 200, answer.text
    tokens: Tokens = answer.json()["data"]
    return tokens


async def refresh(account: Account, token: str) -> httpx.Response:
    """What a refresh token is answered with."""
    return await account.client.post("/api/auth/refresh", json={"refresh_token": token})


async def status_of(account: Account, token: str) -> int:
    """How a request with an access token is answered."""
    answer = await account.client.get(ME, headers={"Authorization": f"Bearer {token}"})
    return answer.status_code


async def ticket_of(account: Account) -> str:
    """A new ticket."""
    answer = await account.client.post("/api/auth/ticket")
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"]["expires_in"] == 60
    ticket: str = answer.json()["data"]["ticket"]
    return ticket


@pytest.fixture(scope="module")
def strict_backend(tmp_path_factory: pytest.TempPathFactory, sandbox: Sandbox) -> Iterator[Server]:
    """A server that takes only tickets in URLs, bears repeated refreshes for a while, and few failed logins."""
    settings = {
        **sandbox.settings,
        "LOGIN_TOKENS_IN_URLS": "false",
        "REFRESH_OVERLAP_SECONDS": "30",
        "LOGIN_LIMIT": "3/hour",
    }
    with run_backend(tmp_path_factory.mktemp("strict"), settings) as running:
        yield running


@pytest.fixture
async def stranger(backend: Server) -> AsyncIterator[httpx.AsyncClient]:
    """Somebody without any token."""
    async with httpx.AsyncClient(base_url=backend.url, trust_env=False, verify=NO_AUTHORITIES) as client:
        yield client


async def test_refreshing_gives_new_tokens_of_the_same_login(account: Account) -> None:
    first = await log_in(account)
    assert first["refresh_expires_in"] == 30 * 24 * 3600
    second = (await refresh(account, first["refresh_token"])).json()["data"]
    third = (await refresh(account, second["refresh_token"])).json()["data"]
    assert len({each["access_token"] for each in (first, second, third)}) == 3
    for each in (first, second, third):
        assert await status_of(account, each["access_token"]) == 200
    assert third["token_type"] == "bearer"


async def test_a_refresh_token_that_comes_twice_ends_its_login_and_no_other(account: Account) -> None:
    stolen, other = await log_in(account), await log_in(account)
    renewed = (await refresh(account, stolen["refresh_token"])).json()["data"]
    again = await refresh(account, stolen["refresh_token"])
    assert (again.status_code, again.json()["error"]) == (401, "UNAUTHORIZED")
    for token in (stolen["access_token"], renewed["access_token"]):
        assert await status_of(account, token) == 401
    assert (await refresh(account, renewed["refresh_token"])).status_code == 401
    assert await status_of(account, other["access_token"]) == 200
    assert (await refresh(account, other["refresh_token"])).status_code == 200


async def test_of_refreshes_at_once_one_wins_at_most(account: Account) -> None:
    tokens = await log_in(account)
    answers = await asyncio.gather(*(refresh(account, tokens["refresh_token"]) for _ in range(10)))
    assert [answer.status_code for answer in answers].count(200) == 1
    assert await status_of(account, tokens["access_token"]) == 401


@pytest.mark.parametrize("round_number", range(5))
async def test_without_an_overlap_both_of_two_at_once_never_win(schema_url: str, round_number: int) -> None:
    databases = [Database(schema_url) for _ in range(2)]
    signer = TokenSigner(("s" * 43,), 60)
    services = [LoginService(Settings(_env_file=None), each, signer, RateLimiter(), Passwords(0)) for each in databases]
    user_id = await create_user(databases[0])
    for _ in range(8):
        async with databases[0].transaction() as session:
            session.add(login := begin_login(user_id))
        token = signer.issue_refresh(user_id, login.id, 0, 60)
        outcomes = await asyncio.gather(*(each.refresh(token) for each in services), return_exceptions=True)
        assert [type(each) for each in outcomes].count(Unauthorized) == 1
    for database in databases:
        await database.close()


async def test_within_the_overlap_a_repeated_refresh_is_the_same_one(
    strict_backend: Server, create_account: CreateAccount
) -> None:
    account = await create_account(strict_backend)
    tokens = await log_in(account)
    answers = await asyncio.gather(*(refresh(account, tokens["refresh_token"]) for _ in range(5)))
    assert {answer.status_code for answer in answers} == {200}
    renewed = answers[0].json()["data"]
    assert (await refresh(account, renewed["refresh_token"])).status_code == 200
    # Two generations old: no lost answer explains that.
    assert (await refresh(account, tokens["refresh_token"])).status_code == 401
    assert await status_of(account, renewed["access_token"]) == 401


@pytest.mark.parametrize("kind", ["access_token", "ticket"])
async def test_nothing_but_a_refresh_token_refreshes(account: Account, kind: str) -> None:
    tokens = {**await log_in(account), "ticket": await ticket_of(account)}
    assert (await refresh(account, tokens[kind])).status_code == 401
    assert await status_of(account, tokens["refresh_token"]) == 401
    assert await status_of(account, tokens["ticket"]) == 401


async def test_logging_out_ends_this_login_and_no_other(account: Account) -> None:
    one, other = await log_in(account), await log_in(account)
    answer = await account.client.post("/api/auth/logout", headers={"Authorization": f"Bearer {one['access_token']}"})
    assert answer.json() == {"code": 200, "message": "success", "data": None}
    assert await status_of(account, one["access_token"]) == 401
    assert (await refresh(account, one["refresh_token"])).status_code == 401
    assert await status_of(account, other["access_token"]) == 200


async def test_logging_out_everywhere_ends_every_login_of_the_user(
    backend: Server, create_account: CreateAccount
) -> None:
    account, neighbour = await create_account(backend), await create_account(backend)
    one, other = await log_in(account), await log_in(account)
    answer = await account.client.post("/api/auth/logout", params={"everywhere": "true"})
    assert answer.status_code == 200
    for tokens in (one, other):
        assert await status_of(account, tokens["access_token"]) == 401
        assert (await refresh(account, tokens["refresh_token"])).status_code == 401
    assert (await neighbour.client.get(ME)).status_code == 200


async def test_the_database_holds_nothing_that_lets_in(account: Account, backend: Server) -> None:
    tokens = await log_in(account)
    [row] = rows(
        backend, "SELECT * FROM logins WHERE user_id = ? ORDER BY created_at DESC LIMIT 1", uuid.UUID(account.user_id)
    )
    stored = " ".join(map(str, row))
    for token in (tokens["access_token"], tokens["refresh_token"]):
        assert token not in stored
        assert token.rpartition(".")[2] not in stored


async def test_logins_that_are_over_and_the_oldest_of_too_many_are_removed(
    schema_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logins_module, "MAX_LOGINS", 3)
    database, passwords = Database(schema_url), Passwords(0)
    service = LoginService(Settings(_env_file=None), database, TokenSigner(("s" * 43,), 60), RateLimiter(), passwords)
    user_id = await create_user(database, "xiaoming")
    async with database.transaction() as session:
        await session.execute(update(User).values(password_hash=await passwords.hash(PASSWORD)))
        session.add(over := begin_login(user_id))
        over.expires_at = over.created_at
    tokens = [await service.login("XiaoMing", PASSWORD, "127.0.0.1") for _ in range(5)]
    async with database.snapshot() as session:
        left = set(await session.scalars(select(Login.id)))
    signer = service._signer
    assert left == {signer.read(each.access).login_id for each in tokens[2:]}
    await database.close()


# ---- Passwords


async def test_changing_the_password_ends_all_logins_and_begins_a_new_one(
    backend: Server, create_account: CreateAccount
) -> None:
    account = await create_account(backend)
    other = await log_in(account)
    form = {"current_password": PASSWORD, "new_password": NEW_PASSWORD}
    changed = await account.client.put("/api/user/password", json=form)
    assert changed.status_code == 200
    assert (await account.client.get(ME)).status_code == 401
    assert await status_of(account, other["access_token"]) == 401
    assert (await refresh(account, other["refresh_token"])).status_code == 401
    assert await status_of(account, changed.json()["data"]["access_token"]) == 200
    assert (await refresh(account, changed.json()["data"]["refresh_token"])).status_code == 200
    assert (await log_in(account, NEW_PASSWORD))["access_token"]
    old = {"username": account.username, "password": PASSWORD}
    assert (await account.client.post("/api/auth/login", json=old)).status_code == 401


async def test_passwords_are_changed_so_often_only(strict_backend: Server, create_account: CreateAccount) -> None:
    account = await create_account(strict_backend)
    form = {"current_password": PASSWORD, "new_password": "12345678"}
    answers = [await account.client.put("/api/user/password", json=form) for _ in range(4)]
    assert [answer.json()["error"] for answer in answers] == ["WEAK_PASSWORD"] * 3 + ["RATE_LIMITED"]


async def test_logins_at_once_bear_that_one_of_them_renews_the_hash(account: Account, backend: Server) -> None:
    user = uuid.UUID(account.user_id)
    rows(backend, "UPDATE users SET password_hash = ? WHERE id = ? RETURNING id", pbkdf2_sha256.hash(PASSWORD), user)
    all_in = await asyncio.gather(*(log_in(account) for _ in range(4)))
    assert len({each["access_token"] for each in all_in}) == 4


async def test_only_who_knows_the_password_changes_it_and_guesses_are_limited(
    strict_backend: Server, create_account: CreateAccount
) -> None:
    account = await create_account(strict_backend)
    form = {"current_password": "wrong-password", "new_password": NEW_PASSWORD}
    answers = [await account.client.put("/api/user/password", json=form) for _ in range(4)]
    assert [answer.json()["error"] for answer in answers] == ["WRONG_PASSWORD"] * 3 + ["RATE_LIMITED"]
    assert answers[0].status_code == 400
    right = {"username": account.username, "password": PASSWORD}
    assert (await account.client.post("/api/auth/login", json=right)).status_code == 429


@pytest.mark.parametrize("password", ["12345678", "qwertyuiop", "password", "11111111", "P@ssw0rd", "{name}"])
async def test_passwords_that_everybody_tries_first_are_refused(account: Account, password: str) -> None:
    wanted = password.format(name=account.username)
    form = {"current_password": PASSWORD, "new_password": wanted}
    changed = await account.client.put("/api/user/password", json=form)
    assert (changed.status_code, changed.json()["error"]) == (400, "WEAK_PASSWORD")
    name = f"weak-{uuid.uuid4().hex[:8]}"
    login = {"username": name, "password": password.format(name=name)}
    registered = await account.client.post("/api/auth/register", json=login)
    assert (registered.status_code, registered.json()["error"]) == (400, "WEAK_PASSWORD")


async def test_an_address_that_tries_many_names_is_limited(schema_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logins_module, "NAMES_PER_ADDRESS", 3)
    database, passwords = Database(schema_url), Passwords(0)
    settings, signer = Settings(_env_file=None, login_limit="2/hour"), TokenSigner(("s" * 43,), 60)
    service = LoginService(settings, database, signer, RateLimiter(), passwords)
    await create_user(database, "xiaoming")
    async with database.transaction() as session:
        await session.execute(update(User).values(password_hash=await passwords.hash(PASSWORD)))
    for number in range(6):
        with pytest.raises(InvalidCredentials):
            await service.login(f"nobody-{number}", "wrong-password", "192.0.2.1")
    with pytest.raises(RateLimited):
        await service.login("xiaoming", PASSWORD, "192.0.2.1")
    assert (await service.login("xiaoming", PASSWORD, "192.0.2.2")).access
    await database.close()


# ---- Tickets


async def test_a_ticket_opens_one_live_session(strict_backend: Server, create_account: CreateAccount) -> None:
    account = await create_account(strict_backend)
    ticket = await ticket_of(account)
    async with talking(strict_backend, None, token=ticket) as talk:
        assert (await talk.speak(SENTENCE)).message["type"] == "complete"
    async with talking(strict_backend, None, token=ticket) as talk:
        assert (await talk.refusal()).brief == (401, "UNAUTHORIZED", 1008)
    assert ticket not in strict_backend.log


async def test_where_urls_take_tickets_only_an_access_token_is_refused_there(
    strict_backend: Server, create_account: CreateAccount
) -> None:
    account = await create_account(strict_backend)
    token = account.client.headers["Authorization"].removeprefix("Bearer ")
    async with talking(strict_backend, None, token=token) as talk:
        refusal = await talk.refusal()
    assert refusal.brief == (401, "UNAUTHORIZED", 1008)
    assert "/api/auth/ticket" in refusal.message["message"]


async def test_of_uses_of_a_ticket_at_once_one_is_let_in(backend: Server, create_account: CreateAccount) -> None:
    account = await create_account(backend)
    assert (await account.synthesize("你好")).status_code == 200
    record_id = (await account.history())["items"][0]["id"]
    ticket = await ticket_of(account)
    url = f"/api/audio/records/{record_id}/events"
    async with httpx.AsyncClient(base_url=backend.url, trust_env=False, verify=NO_AUTHORITIES) as browser:
        answers = await asyncio.gather(*(browser.get(url, params={"token": ticket}) for _ in range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] + [401] * 7


async def test_a_used_ticket_is_remembered_longer_than_it_is_good(schema_url: str) -> None:
    database, signer = Database(schema_url), TokenSigner(("s" * 43,), 60)
    logins = LoginService(Settings(_env_file=None), database, signer, RateLimiter(), Passwords(0))
    user_id = await create_user(database)
    async with database.transaction() as session:
        session.add(login := begin_login(user_id))
        session.add(UsedTicket(id=(recent := uuid.uuid4()), expires_at=datetime.now(UTC) - timedelta(seconds=30)))
        session.add(UsedTicket(id=(old := uuid.uuid4()), expires_at=datetime.now(UTC) - timedelta(hours=1)))
    await logins.authenticate_by_url(signer.issue_ticket(user_id, login.id))
    async with database.snapshot() as session:
        known = set(await session.scalars(select(UsedTicket.id)))
    assert recent in known
    assert old not in known
    await database.close()


async def test_a_ticket_of_a_login_that_is_over_lets_nobody_in(backend: Server, create_account: CreateAccount) -> None:
    account = await create_account(backend)
    ticket = await ticket_of(account)
    await account.client.post("/api/auth/logout")
    async with talking(backend, None, token=ticket) as talk:
        assert (await talk.refusal()).brief == (401, "UNAUTHORIZED", 1008)


async def test_a_live_session_ends_soon_after_its_login(schema_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LOGIN_CHECK_SECONDS", 0.01)
    database, left = Database(schema_url), asyncio.Queue[AppError | None]()
    signer, passwords = TokenSigner(("s" * 43,), 60), Passwords(0)
    logins = LoginService(Settings(_env_file=None), database, signer, RateLimiter(), passwords)
    user_id = await create_user(database)
    async with database.transaction() as session:
        session.add(login := begin_login(user_id))
    visitor = await logins.authenticate(signer.issue(user_id, login.id))
    open_session: Any = SimpleNamespace(leave=left.put_nowait)
    watching = asyncio.create_task(live._watch_login(logins, open_session, visitor))
    await asyncio.sleep(0.1)
    assert left.empty()
    await logins.logout(visitor, everywhere=False)
    assert isinstance(await asyncio.wait_for(left.get(), 5), Unauthorized)
    await watching
    await database.close()


@pytest.mark.parametrize("route", ["logout", "ticket"])
async def test_strangers_have_nothing_to_end_or_to_show(stranger: httpx.AsyncClient, route: str) -> None:
    answer = await stranger.post(f"/api/auth/{route}")
    assert (answer.status_code, answer.json()["error"]) == (401, "UNAUTHORIZED")
