"""Command line: `python -m app demo | serve | worker | sandbox | migrate | admin | reseal | doctor`."""

import argparse
import asyncio
import math
import os
import socket
import sys
from contextlib import nullcontext

from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from app.serving import SERVER
from app.settings import Settings

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
WORKER_PORT = 8001
SANDBOX_PORT = 8100
# A server process that does not answer its parent for so long is killed: on a busy machine that must not come soon.
UNHEALTHY_SECONDS = 30


def main(arguments: list[str] | None = None) -> int:
    """Run one command and give the exit code."""
    options = _parser().parse_args(arguments)
    try:
        result: int = options.run(options)
    except KeyboardInterrupt:
        return 130
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, each['loc'])).upper() or 'settings'}: {each['msg'].removeprefix('Value error, ')}"
            for each in error.errors()
        )
        print(f"Cannot start, the settings are not usable: {reasons}", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError, SQLAlchemyError) as error:
        print(f"Cannot start: {error}", file=sys.stderr)
        return 2
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app", description="A self-hosted AI voice backend on DashScope.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="sandbox and backend together: speak a first sentence without an account")
    _add_address(demo, DEFAULT_PORT)
    demo.add_argument(
        "--sandbox-port", type=_port, default=SANDBOX_PORT, help="port of the sandbox (default %(default)s)"
    )
    demo.set_defaults(run=_demo)

    serve = commands.add_parser("serve", help="the backend, configured by environment and .env")
    _add_address(serve, DEFAULT_PORT)
    serve.add_argument("--workers", type=int, metavar="N", help="server processes (default: WORKERS, which is 1)")
    serve.set_defaults(run=_serve)

    worker = commands.add_parser("worker", help="background jobs apart from the web processes; answers health checks")
    _add_address(worker, WORKER_PORT)
    worker.set_defaults(run=_worker)

    sandbox = commands.add_parser("sandbox", help="a local stand-in of DashScope and OSS")
    _add_address(sandbox, SANDBOX_PORT)
    pace = sandbox.add_mutually_exclusive_group()
    pace.add_argument("--speed", type=float, metavar="X", help="send audio X times as fast as it plays")
    pace.add_argument(
        "--realtime", dest="speed", action="store_const", const=1.0, help="send audio as fast as it plays: speed 1"
    )
    sandbox.add_argument(
        "--first-audio-seconds",
        type=float,
        default=0.0,
        metavar="S",
        help="how long a task's first audio takes from its first text on (default %(default)s, DashScope: 0.2-0.8)",
    )
    sandbox.add_argument(
        "--rate-limit", type=int, metavar="N", help="refuse more than N tasks per second, key and model (DashScope: 3)"
    )
    sandbox.add_argument(
        "--task-seconds",
        type=float,
        default=1.0,
        metavar="S",
        help="how long a transcription takes (default %(default)s)",
    )
    sandbox.add_argument(
        "--voice-seconds",
        type=float,
        default=1.0,
        metavar="S",
        help="how long a cloned voice is being made (default %(default)s)",
    )
    sandbox.set_defaults(run=_sandbox)

    migrate = commands.add_parser("migrate", help="bring the database of DATABASE_URL to a revision")
    migrate.add_argument(
        "revision", nargs="?", default="head", help="head (the default), a later revision, -1 for one back, or base"
    )
    migrate.set_defaults(run=_migrate)

    admin = commands.add_parser(
        "admin",
        help="make a user an administrator",
        description="Make a user an administrator; one who does not exist is made, with a password that is asked for.",
    )
    admin.add_argument("name", metavar="NAME", help="the user's name")
    admin.add_argument(
        "--password-stdin", action="store_true", help="read the user's password, or his new one, from standard input"
    )
    admin.set_defaults(run=_admin)

    reseal = commands.add_parser(
        "reseal", help="seal all API keys by the first of CREDENTIAL_KEYS, so that the others can be taken away"
    )
    reseal.set_defaults(run=_reseal)

    doctor = commands.add_parser(
        "doctor",
        help="examine settings, database, storage and provider, and change nothing",
        description="Examine everything that the program needs, and say what to do where something is wrong.",
        epilog="An API key is best given in DASHSCOPE_API_KEY or by --api-key-stdin: arguments show in process lists.",
    )
    key = doctor.add_mutually_exclusive_group()
    key.add_argument("--api-key-stdin", action="store_true", help="read a DashScope key to try from standard input")
    key.add_argument("--api-key", metavar="KEY", help="a DashScope key to try; trying costs nothing")
    doctor.add_argument("--region", choices=("beijing", "singapore"), help="the region of the key (default beijing)")
    doctor.add_argument("--workspace", metavar="W", help="the workspace of the key, if it is not the default one")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_address(parser: argparse.ArgumentParser, port: int) -> None:
    parser.add_argument("--host", default=DEFAULT_HOST, help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=_port, default=port, help="port to listen on (default %(default)s)")


def _port(given: str) -> int:
    """A port's number, 0 for any that is free. Raises ArgumentTypeError."""
    if not given.isdecimal() or int(given) > 65_535:
        raise argparse.ArgumentTypeError(f"{given} is no port: 0 to 65535")
    return int(given)


def _require_free(host: str, port: int) -> None:
    """Raise OSError when nobody can listen there, before anything is started."""
    socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()


def _serve(options: argparse.Namespace) -> int:
    if options.workers is not None:
        os.environ["WORKERS"] = str(options.workers)
    settings = Settings()
    if "public_base_url" not in settings.model_fields_set:
        os.environ["PUBLIC_BASE_URL"] = f"http://localhost:{options.port}"
    return _run_server("app.main:create_app", settings, options, settings.workers)


def _worker(options: argparse.Namespace) -> int:
    settings = Settings()
    settings.require_shared_database()
    return _run_server("app.main:create_worker", settings, options)


def _run_server(factory: str, settings: Settings, options: argparse.Namespace, processes: int = 1) -> int:
    """Serve until told to stop. Everything that could keep it from that is found out first, and raised."""
    import uvicorn

    from app.metrics import gathered_from_processes
    from app.observability import configure_logs
    from app.preparation import prepare

    _require_free(options.host, options.port)
    configure_logs(settings.log_level)
    asyncio.run(prepare(settings))
    os.environ["AUTO_MIGRATE"] = "false"  # done
    with gathered_from_processes() if processes > 1 else nullcontext():
        uvicorn.run(
            factory,
            factory=True,
            host=options.host,
            port=options.port,
            workers=processes,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(settings.drain_seconds),
            timeout_worker_healthcheck=UNHEALTHY_SECONDS,
            **SERVER,
        )
    return 0


def _sandbox(options: argparse.Namespace) -> int:
    from app.sandbox import SandboxOptions, serve

    _require_free(options.host, options.port)
    sandbox = SandboxOptions(
        speed=options.speed,
        first_audio_seconds=options.first_audio_seconds,
        rate_limit_per_second=options.rate_limit,
        task_seconds=options.task_seconds,
        voice_seconds=options.voice_seconds,
    )
    serve(sandbox, options.host, options.port)
    return 0


def _demo(options: argparse.Namespace) -> int:
    from app.demo import run_demo

    _require_free(options.host, options.port)
    _require_free("127.0.0.1", options.sandbox_port)
    return asyncio.run(run_demo(options.host, options.port, options.sandbox_port))


def _migrate(options: argparse.Namespace) -> int:
    from alembic.util.exc import CommandError

    from app.database import migrate

    try:
        asyncio.run(migrate(Settings().database_url, options.revision))
    except CommandError as error:
        raise RuntimeError(str(error)) from error
    return 0


def _admin(options: argparse.Namespace) -> int:
    from app.access import appoint_admin

    return asyncio.run(appoint_admin(Settings(), options.name, password_stdin=options.password_stdin))


def _reseal(_: argparse.Namespace) -> int:
    from app.access import reseal

    return asyncio.run(reseal(Settings()))


def _doctor(options: argparse.Namespace) -> int:
    from app.doctor import run

    settings = Settings()
    given = sys.stdin.readline().strip() if options.api_key_stdin else options.api_key
    return run(
        settings,
        api_key=given or os.environ.get("DASHSCOPE_API_KEY"),
        region=options.region,
        workspace=options.workspace,
        as_json=options.json,
    )


if __name__ == "__main__":
    sys.exit(main())
