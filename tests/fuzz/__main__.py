"""Command line: `python -m tests.fuzz --examples 200`."""

import argparse
import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.databases import provider
from tests.fuzz.callers import call_hostile, meeting_hostile
from tests.fuzz.clients import visit
from tests.fuzz.house import House, note_log, open_house, take_token
from tests.fuzz.orders import meeting_gateway, order_anything
from tests.fuzz.routes import fuzz_routes, refuse_strangers
from tests.fuzz.tally import Tally

PHASES = ("examples", "coverage", "fuzzing", "stateful")
Part = Callable[[House, argparse.Namespace], Tally]


def _routes(house: House, options: argparse.Namespace) -> Tally:
    token = take_token(house.server, "sk-test-fuzz-of-routes")
    return fuzz_routes(
        house.server.url, token, house.take_token, examples=options.examples, phases=PHASES, seed=options.seed
    )


def _strangers(house: House, _: argparse.Namespace) -> Tally:
    return refuse_strangers(house.server.url)


def _clients(house: House, options: argparse.Namespace) -> Tally:
    return asyncio.run(visit(house, visits=options.examples * 10, at_once=AT_ONCE, seed=options.seed))


def _provider(house: House, options: argparse.Namespace) -> Tally:
    return asyncio.run(_meet(house.server.folder, options))


async def _meet(folder: Path, options: argparse.Namespace) -> Tally:
    async with meeting_hostile(folder / "hostile", options.seed) as (server, provider):
        return await call_hostile(server, provider, calls=options.examples * 5, at_once=AT_ONCE, seed=options.seed)


def _services(house: House, options: argparse.Namespace) -> Tally:
    return asyncio.run(_order(house.server.folder, options))


async def _order(folder: Path, options: argparse.Namespace) -> Tally:
    async with meeting_gateway(folder / "hostile", options.seed) as met:
        return await order_anything(*met, calls=options.examples * 5, at_once=AT_ONCE, seed=options.seed)


PARTS: dict[str, Part] = {
    "routes": _routes,
    "strangers": _strangers,
    "clients": _clients,
    "provider": _provider,
    "services": _services,
}
AT_ONCE = 8


def main() -> int:
    """Run the parts that were asked for, print what was found, and give the exit code: 0 when nothing was wrong."""
    options = _parser().parse_args()
    provider.kind = options.database
    failed = 0
    try:
        for part in options.parts or PARTS:
            with TemporaryDirectory() as scratch, open_house(options.keep or Path(scratch)) as house:
                tally = PARTS[part](house, options)
                if part in {"routes", "strangers"}:  # the others look themselves
                    note_log(house.server, tally)
            print(tally.describe(), flush=True)  # noqa: T201 - a script's output
            failed += tally.failed
    finally:
        provider.close()
    print(f"{failed} things wrong" if failed else "nothing wrong")  # noqa: T201
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all unless told otherwise")
    parser.add_argument(
        "--examples", type=int, default=200, help="random cases of each operation (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="another one gives other cases (default %(default)s)")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where logs are kept")
    return parser


if __name__ == "__main__":
    sys.exit(main())
