"""Who may register, who administers, and what an admin may do about users."""

import asyncio
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select, update

from app import __main__ as command_line
from app.database import Database
from app.errors import AdminOnly, InvalidInvite, LastAdmin, UsernameTaken
from app.models import Invite, User
from app.ratelimit import RateLimiter
from app.services.administration import AdministrationService
from app.services.logins import comparable
from app.services.passwords import Passwords
from app.services.registration import RegistrationService
from app.settings import Settings
from tests.conftest import PASSWORD, Account, CreateAccount
from tests.databases import rows, sqlite_schema
from tests.servers import NO_AUTHORITIES, Sandbox, Server, run_backend
from tests.traces import create_user

ADDRESS = "127.0.0.1"
ME = "/api/user/me"
USERS, INVITES = "/api/admin/users", "/api/admin/invites"


async def register(server: Server, name: str, **fields: Any) -> httpx.Response:
    """Ask for a new user."""
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, verify=NO_AUTHORITIES) as client:
        return await client.post("/api/auth/register", json={"username": name, "password": PASSWORD, **fields})


@pytest.fixture(scope="module")
def invited_backend(tmp_path_factory: pytest.TempPathFactory, sandbox: Sandbox) -> Iterator[Server]:
    """A server where only who is invited can register."""
    settings = {**sandbox.settings, "REGISTRATION": "invite"}
    with run_backend(tmp_path_factory.mktemp("invited"), settings) as running:
        yield running


@pytest.fixture
async def admin(invited_backend: Server, create_account: CreateAccount) -> Account:
    """An admin of that server."""
    account = await create_account(invited_backend)
    rows(invited_backend, "UPDATE users SET is_admin = TRUE WHERE id = ? RETURNING id", uuid.UUID(account.user_id))
    return account


def registration_on(database: Database, **settings: Any) -> RegistrationService:
    """Registration without a server around it."""
    return RegistrationService(Settings(_env_file=None, **settings), database, RateLimiter(), Passwords(0))


# ---- The first admin


async def test_the_first_user_is_an_admin_and_the_second_is_not(tmp_path: Path, sandbox: Sandbox) -> None:
    with run_backend(tmp_path, sandbox.settings) as fresh:
        async with httpx.AsyncClient(base_url=fresh.url, trust_env=False, verify=NO_AUTHORITIES) as client:
            for name, is_admin in (("first", True), ("second", False)):
                assert (await register(fresh, name)).status_code == 200
                login = {"username": name, "password": PASSWORD}
                token = (await client.post("/api/auth/login", json=login)).json()["data"]["access_token"]
                me = await client.get(ME, headers={"Authorization": f"Bearer {token}"})
                assert me.json()["data"]["is_admin"] is is_admin


async def test_of_users_who_register_at_once_one_is_the_first(schema_url: str) -> None:
    databases = [Database(schema_url) for _ in range(4)]
    services = [registration_on(database) for database in databases]
    made = await asyncio.gather(*(each.register(f"user-{n}", PASSWORD, ADDRESS) for n, each in enumerate(services)))
    assert [user.is_admin for user in made].count(True) == 1
    async with databases[0].snapshot() as session:
        assert len(list(await session.scalars(select(User.id).where(User.is_admin)))) == 1
    for database in databases:
        await database.close()


async def test_in_production_nobody_becomes_an_admin_by_being_first(schema_url: str) -> None:
    database = Database(schema_url)
    secret = "Zq3vN8rT1kXw6LpY0sHd4JmB7cFgUe2AoViR9tKbQxS"
    safe = {"environment": "production", "jwt_secret": secret, "credential_keys": secret}
    assert not (await registration_on(database, **safe).register("first", PASSWORD, ADDRESS)).is_admin
    await database.close()


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str, given: str = "") -> int:
    """Run a command as the operator does."""
    monkeypatch.setattr("sys.stdin", StringIO(given))
    return command_line.main(list(arguments))


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The database of an installation that commands are run in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/app.db").write_bytes(sqlite_schema())
    return f"sqlite+aiosqlite:///{tmp_path / 'data/app.db'}"


def test_a_command_makes_an_admin(
    installation: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "admin", "boss") == 2
    assert "--password-stdin" in capsys.readouterr().err
    for given, reason in (
        ("12345678\n", "first that somebody would try"),
        ("short\n", "password: "),
        ("\n", "password: "),
    ):
        assert run_command(monkeypatch, "admin", "boss", "--password-stdin", given=given) == 2
        assert reason in capsys.readouterr().err
    assert run_command(monkeypatch, "admin", "no name", "--password-stdin", given=f"{PASSWORD}\n") == 2
    assert "username: " in capsys.readouterr().err
    assert run_command(monkeypatch, "admin", "boss", "--password-stdin", given=f"{PASSWORD}\n") == 0
    assert run_command(monkeypatch, "admin", "Boss") == 0
    assert capsys.readouterr().out == "boss is made, as an administrator.\nBoss is an administrator now.\n"


async def create_admin(database: Database, name: str = "") -> uuid.UUID:
    """Somebody who may invite others."""
    user_id = await create_user(database, name)
    async with database.transaction() as session:
        await session.execute(update(User).where(User.id == user_id).values(is_admin=True))
    return user_id


# ---- Invites


async def test_an_invite_lets_one_person_register(admin: Account, invited_backend: Server) -> None:
    made = (await admin.client.post(INVITES, json={"note": "给小明"})).json()["data"]
    name = f"guest-{uuid.uuid4().hex[:8]}"
    for code in ({}, {"invite_code": ""}, {"invite_code": "invite-guessed"}, {"invite_code": None}):
        refused = await register(invited_backend, name, **code)
        assert (refused.status_code, refused.json()["error"]) == (403, "INVALID_INVITE")
    let_in = await register(invited_backend, name, invite_code=made["invite_code"])
    assert let_in.status_code == 200
    again = await register(invited_backend, f"{name}-too", invite_code=made["invite_code"])
    assert (again.status_code, again.json()["error"]) == (403, "INVALID_INVITE")
    listed = (await admin.client.get(INVITES)).json()["data"]["items"]
    [shown] = [each for each in listed if each["invite_id"] == made["invite_id"]]
    assert shown["used_by"] == let_in.json()["data"]["user_id"]
    assert shown["note"] == "给小明"
    assert "invite_code" not in shown
    assert made["invite_code"] not in str(rows(invited_backend, "SELECT * FROM invites"))
    assert made["invite_code"] not in invited_backend.log


async def test_an_invite_that_is_withdrawn_is_void(admin: Account, invited_backend: Server) -> None:
    made = (await admin.client.post(INVITES, json={})).json()["data"]
    for status in (200, 404):
        assert (await admin.client.delete(f"{INVITES}/{made['invite_id']}")).status_code == status
    refused = await register(invited_backend, "nobody-invited", invite_code=made["invite_code"])
    assert refused.json()["error"] == "INVALID_INVITE"


async def test_of_those_who_share_an_invite_one_gets_in(schema_url: str) -> None:
    database = Database(schema_url)
    service = registration_on(database, registration="invite")
    made = await service.invite(await create_admin(database), timedelta(days=1), None)
    asked = (service.register(f"guest-{n}", PASSWORD, ADDRESS, made.code) for n in range(5))
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert sorted(type(each).__name__ for each in outcomes) == ["InvalidInvite"] * 4 + ["User"]
    await database.close()


async def test_an_invite_outlives_a_name_that_is_taken_but_not_its_own_end(schema_url: str) -> None:
    database = Database(schema_url)
    service = registration_on(database, registration="invite")
    admin_id = await create_admin(database, "taken")
    made = await service.invite(admin_id, timedelta(days=1), None)
    with pytest.raises(UsernameTaken):
        await service.register("taken", PASSWORD, ADDRESS, made.code)
    assert (await service.register("guest", PASSWORD, ADDRESS, made.code)).username == "guest"
    expired = await service.invite(admin_id, timedelta(seconds=-1), None)
    with pytest.raises(InvalidInvite):
        await service.register("late", PASSWORD, ADDRESS, expired.code)
    async with database.snapshot() as session:
        assert len(list(await session.scalars(select(Invite)))) == 2
    await database.close()


# ---- What admins do


async def test_an_admin_shuts_a_user_out_and_lets_him_back_in(
    admin: Account, invited_backend: Server, create_account: CreateAccount
) -> None:
    user = await create_account(invited_backend)
    place = f"{USERS}/{user.user_id}"
    changed = await admin.client.patch(place, json={"is_active": False})
    assert changed.json()["data"]["is_active"] is False
    login = {"username": user.username, "password": PASSWORD}
    assert (await user.client.get(ME)).status_code == 401
    assert (await user.client.post("/api/auth/login", json=login)).status_code == 401
    assert (await admin.client.patch(place, json={"is_active": True})).status_code == 200
    assert (await user.client.get(ME)).status_code == 401  # the login of then is over
    assert (await user.client.post("/api/auth/login", json=login)).status_code == 200


async def test_an_admin_gives_a_user_a_new_password(
    admin: Account, invited_backend: Server, create_account: CreateAccount
) -> None:
    user = await create_account(invited_backend)
    reset = (await admin.client.post(f"{USERS}/{user.user_id}/reset-password")).json()["data"]
    assert (await user.client.get(ME)).status_code == 401
    for password, status in ((PASSWORD, 401), (reset["password"], 200)):
        login = {"username": user.username, "password": password}
        assert (await user.client.post("/api/auth/login", json=login)).status_code == status
    assert reset["password"] not in invited_backend.log


async def test_users_are_listed_by_a_part_of_their_names_taken_literally(
    admin: Account, invited_backend: Server
) -> None:
    mark = uuid.uuid4().hex[:8]
    plain, other, wide = f"a_b-{mark}", f"axb-{mark}", f"Ａ_Ｂ2-{mark}"
    for name in (plain, other, wide):
        add_user(invited_backend, name)
    for part, expected in (
        (mark, {plain, other, wide}),
        (f"A_B-{mark}", {plain}),
        (f"Ａ_ｂ2-{mark}", {wide}),
        (f"%{mark}", set()),
        ("\\", set()),
    ):
        found = (await admin.client.get(USERS, params={"q": part})).json()["data"]
        assert {each["username"] for each in found["items"]} == expected
        assert found["total"] == len(expected)
    page = (await admin.client.get(USERS, params={"q": mark, "page": 2, "page_size": 2})).json()["data"]
    assert (page["total"], len(page["items"])) == (3, 1)


def add_user(server: Server, name: str) -> None:
    """Somebody who never logs in."""
    rows(
        server,
        "INSERT INTO users (id, username, username_key, password_hash, is_active, created_at)"
        " VALUES (?, ?, ?, '-', TRUE, ?) RETURNING id",
        *(uuid.uuid4(), name, comparable(name), datetime.now(UTC)),
    )


async def test_who_is_no_admin_learns_nothing(invited_backend: Server, create_account: CreateAccount) -> None:
    user, other = await create_account(invited_backend), await create_account(invited_backend)
    asked = [
        ("GET", USERS, None),
        ("GET", INVITES, None),
        ("POST", INVITES, {}),
        ("DELETE", f"{INVITES}/{uuid.uuid4()}", None),
        *(("PATCH", f"{USERS}/{each}", {"is_admin": True}) for each in (user.user_id, other.user_id, uuid.uuid4())),
        *(("POST", f"{USERS}/{each}/reset-password", None) for each in (other.user_id, uuid.uuid4())),
    ]
    answers = [await user.client.request(method, path, json=body) for method, path, body in asked]
    assert {(answer.status_code, answer.json()["error"]) for answer in answers} == {(403, "ADMIN_ONLY")}
    assert (await user.client.get(ME)).json()["data"]["is_admin"] is False


@pytest.mark.parametrize("change", [{"is_active": False}, {"is_admin": False}])
async def test_the_last_admin_stays(schema_url: str, change: dict[str, bool]) -> None:
    databases = [Database(schema_url) for _ in range(2)]
    services = [AdministrationService(each, registration_on(each), Passwords(0)) for each in databases]
    admins = [await create_user(databases[0], name) for name in ("one", "two")]
    for name in ("one", "two"):
        assert await services[0].appoint(name, None) == "appointed"
    wanted: dict[str, bool | None] = {"is_active": None, "is_admin": None, **change}
    asked = (each.change(user, user, **wanted) for each, user in zip(services, admins, strict=True))
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(each) for each in outcomes].count(LastAdmin) == 1
    async with databases[0].snapshot() as session:
        assert len(list(await session.scalars(select(User.id).where(User.is_admin, User.is_active)))) == 1
    for database in databases:
        await database.close()


async def test_who_was_shut_out_meanwhile_administers_nothing(schema_url: str) -> None:
    database = Database(schema_url)
    registration = registration_on(database)
    service = AdministrationService(database, registration, Passwords(0))
    boss, fired = [await create_user(database, name) for name in ("boss", "fired")]
    for name in ("boss", "fired"):
        await service.appoint(name, None)
    await service.change(boss, fired, is_active=False, is_admin=None)
    for attempt in (
        service.change(fired, fired, is_active=True, is_admin=True),
        service.reset_password(fired, boss),
        registration.invite(fired, timedelta(days=1), None),
    ):
        with pytest.raises(AdminOnly):
            await attempt
    await database.close()


@pytest.mark.parametrize("path", ["", "/reset-password"])
async def test_users_who_do_not_exist_are_not_found(admin: Account, path: str) -> None:
    method = "POST" if path else "PATCH"
    answer = await admin.client.request(method, f"{USERS}/{uuid.uuid4()}{path}", json={"is_active": True})
    assert (answer.status_code, answer.json()["error"]) == (404, "NOT_FOUND")
