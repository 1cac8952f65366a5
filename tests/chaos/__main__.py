"""
The chaos suite with its scoreboard: `python -m tests.chaos [--scale 1] [--only TEXT] [--write docs/reliability.md]`.

Scale 1 is the full form (about an hour and a half), 0.1 the short one.  Exit code 1 when anything was lost or spent that a
scenario does not allow.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.scenarios import SCENARIOS, Scenario, play
from tests.chaos.score import HEADER, Score, complaints
from tests.chaos.server import ChaosServer
from tests.support.emulator import NoEmulatorError, emulator
from tests.support.rig import rig

BEGIN, END = "<!-- scoreboard -->", "<!-- end of scoreboard -->"


def _on_embedded(scenario: Scenario, scale: float, folder: Path) -> Score:
    with ChaosServer() as server, rig(server.address, folder) as built:
        return play(scenario, built, "embedded", scale, server)


def _on_emulator(scenario: Scenario, scale: float, folder: Path) -> Score:
    with emulator() as address, rig(address, folder) as built:
        return play(scenario, built, "emulator", scale, None)


def main() -> int:
    """Run the scenarios, print the board, return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--scale", type=float, default=1.0, help="1 is the full form, 0.1 the short one")
    parser.add_argument("--only", default="", help="scenarios whose name holds this text")
    parser.add_argument("--brokers", default="embedded,emulator")
    parser.add_argument("--write", type=Path, help="put the board into this document, between its marks")
    options = parser.parse_args()
    results: list[Score] = []
    bad = 0
    print(HEADER, flush=True)
    for scenario in (each for each in SCENARIOS if options.only in each.name):
        for broker in options.brokers.split(","):
            if broker == "emulator" and (scenario.needs_embedded or scenario.emulator_flaw):
                continue
            with tempfile.TemporaryDirectory() as folder:
                started = time.monotonic()
                try:
                    run = _on_embedded if broker == "embedded" else _on_emulator
                    result = run(scenario, options.scale, Path(folder))
                except NoEmulatorError as error:
                    print(f"skipped on {broker}: {error}", file=sys.stderr)
                    continue
            results.append(result)
            print(result.row(), flush=True)
            if found := complaints(scenario.limits, result):
                bad += 1
                print(f"  NOT ALLOWED: {', '.join(found)}", flush=True)
            print(f"  {time.monotonic() - started:.0f} s", file=sys.stderr)
    if options.write is not None:
        _write(options.write, results, options.scale)
    print(f"{len(results) - bad} passed, {bad} failed")
    return 1 if bad else 0


def _write(path: Path, results: list[Score], scale: float) -> None:
    text = path.read_text("utf-8")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    board = "\n".join([HEADER, *(result.row() for result in results)])
    command = f"`make chaos` (scale {scale:g})"
    path.write_text(f"{head}{BEGIN}\nMade by {command}.\n\n{board}\n{END}{tail}", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
