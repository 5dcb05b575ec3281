"""Shows whether the promise is kept when things die: `.venv/bin/python -m chaos` plays the scenes of chaos/scenes.py.

Each scene has its own Redis or Valkey, API, workers and relay, and a client that submits mail while one fault happens.
Then every accepted mail is held against the relay's log and the API: sent once, doubled (and whether that was allowed),
lost, in doubt, failed, and how long it took. Scenes run side by side, for they mostly wait. At the end stands a table;
the exit code is 1 if any scene broke the promise, and what its processes logged is then kept. A seed repeats the same
choices. With --ha as the first word the faults are those of several hosts (chaos/ha).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from bench.progress import Progress
from chaos.faults import play
from chaos.ha import __main__ as ha
from chaos.ledger import Row, account
from chaos.scenes import SCENES
from chaos.stage import Scene, Stage, programs

HEADINGS = ["scene", "server", "on doubt", "accepted", "sent once", "doubled", "of these allowed", "lost", "in doubt"]
HEADINGS += ["failed", "disagree", "recovery", "promise"]


def perform(
    scene: Scene, directory: Path, *, seed: int, mails: int, on_doubt: str = "retry", program: str | None = None
) -> Row:
    """Plays one scene, from an empty stage to its row. A scene that could not be played is a broken one."""
    stage = Stage(scene, directory, seed=seed, mails=mails, on_doubt=on_doubt, program=program)
    try:
        with stage.set_up():
            play(stage)
            return account(stage)
    except Exception as error:
        server = Path(stage.redis_server.program or "").name
        return Row(scene.name, server, on_doubt, broken=[f"not played: {type(error).__name__}: {error}"])


def table(rows: Sequence[Row]) -> str:
    return "\n".join([f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|", *map(str, rows)])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="chaos", description="Plays faults and counts the mail.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mails", type=int, default=40, help="per scene (default 40)")
    parser.add_argument("--server", choices=["valkey", "redis", "both"], default="valkey")
    parser.add_argument("--on-doubt", choices=["retry", "hold", "both"], default="retry")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=SCENES, default=list(SCENES))
    parser.add_argument("--side-by-side", type=int, default=6, metavar="N")
    parser.add_argument("--list", action="store_true", help="name the scenes")
    return parser.parse_args()


def main() -> int:
    if sys.argv[1:2] == ["--ha"]:
        return ha.main(sys.argv[2:])
    options = parse_arguments()
    if options.list:
        print("\n".join(f"{scene.name:<60} {scene.fault}" for scene in SCENES.values()))
        return 0
    modes = ["retry", "hold"] if options.on_doubt == "both" else [options.on_doubt]
    runs = [
        (SCENES[name], program, mode)
        for program, mode, name in product(programs(options.server).values(), modes, options.only)
        if SCENES[name].held or mode == "retry" or len(modes) == 1
    ]
    directory, progress = Path(tempfile.mkdtemp(prefix="chaos-")), Progress(len(runs))
    with ThreadPoolExecutor(options.side_by_side, thread_name_prefix="stage") as stages:
        playing = []
        for number, (scene, program, mode) in enumerate(runs):
            place = directory / f"{number}-{scene.name.replace(' ', '-').replace(',', '').replace(chr(39), '')}"
            place.mkdir()
            settings = {"seed": options.seed, "mails": options.mails, "on_doubt": mode, "program": program}
            playing.append(stages.submit(perform, scene, place, **settings))
            playing[-1].add_done_callback(lambda one: progress.step(str(one.result())))
    rows = [one.result() for one in playing]
    print(f"seed {options.seed}, {options.mails} mails per scene\n\n{table(rows)}")
    if any(row.broken for row in rows):
        print(f"\nWhat the processes logged is in {directory}.", file=sys.stderr)
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
