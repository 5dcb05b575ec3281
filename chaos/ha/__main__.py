"""Shows what becomes of acknowledged mail when hosts die or are cut off: `.venv/bin/python -m chaos --ha`, as root.

Each run of a scene has hosts of its own, in network namespaces, and 100 mails a second. Its row says how many of the
acknowledged mails were lost, doubled or forgotten, and for how long nothing went. The exit code is 1 if the promise of
docs/guarantees.md was broken anywhere; what the processes logged is then kept. `--replicas 0` shows what is lost where
no replica confirms.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import product
from multiprocessing import active_children, get_context
from pathlib import Path

from bench.progress import Progress
from chaos.ha.account import HEADINGS, Row, account
from chaos.ha.network import NEEDED
from chaos.ha.scenes import SCENES
from chaos.ha.stage import TAIL, Choice, Scene, Stage
from chaos.stage import programs


def perform(scene: Scene, directory: Path, choice: Choice) -> Row:
    """Plays one scene, from the first host to its row. One that could not be played is a broken one. What was logged
    is kept only where the promise was broken."""
    stage = Stage(scene, directory, choice)
    try:
        with stage.set_up():
            stage.play()
            row = account(stage)
        if not (row.broken or row.late):
            shutil.rmtree(directory)
        return row
    except KeyboardInterrupt:
        os._exit(1)  # the pool of processes would take it for a result, and go on
    except Exception as error:
        return Row(scene.name, Path(choice.program).name, broken=[f"not played: {type(error).__name__}: {error}"])


def end_in_order() -> None:
    """Lets SIGTERM be an exception, so that hosts are taken away."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def perform_all(played: Sequence[tuple[Scene, Choice]], directory: Path, side_by_side: int) -> list[Row]:
    """Plays scenes, so many at a time, each in a process of its own."""
    progress, playing = Progress(len(played)), list[Future[Row]]()
    with ProcessPoolExecutor(side_by_side, get_context("spawn"), end_in_order) as stages:
        try:
            for number, (scene, choice) in enumerate(played):
                place = directory / str(number)
                place.mkdir()
                playing.append(stages.submit(perform, scene, place, choice))
                playing[-1].add_done_callback(lambda one: progress.step(str(one.cancelled() or one.result())))
            return [one.result() for one in playing]
        except BaseException:
            stages.shutdown(wait=False, cancel_futures=True)
            for child in active_children():
                child.terminate()
            raise


def table(rows: Sequence[Row]) -> str:
    return "\n".join([f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|", *map(str, rows)])


def lacking() -> str:
    """Returns what this machine lacks to be several; "" if nothing."""
    if os.geteuid():
        return "only root makes network namespaces"
    return ", ".join(f"there is no {name} on PATH" for name in NEEDED if not shutil.which(name))


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="chaos --ha", description="Lets hosts die and counts the mail.")
    parser.add_argument("--runs", type=int, default=1, help="of each scene (default 1)")
    parser.add_argument("--server", choices=["valkey", "redis", "both"], default="valkey")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=SCENES, default=list(SCENES))
    parser.add_argument("--side-by-side", type=int, default=1, metavar="N")
    parser.add_argument("--seconds", type=float, default=TAIL, help=f"of load after a fault (default {TAIL:.0f})")
    parser.add_argument("--rate", type=float, default=100, help="mails a second (default 100)")
    parser.add_argument("--replicas", type=int, default=1, help="that confirm (default 1)")
    parser.add_argument("--other", type=Path, metavar="TREE", help="a checkout of another version, for versions mixed")
    parser.add_argument("--list", action="store_true", help="name the scenes")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    if options.list:
        print("\n".join(f"{scene.name:<24} {scene.fault}" for scene in SCENES.values()))
        return 0
    if lack := lacking():
        raise SystemExit(lack)
    directory = Path(tempfile.mkdtemp(prefix="chaos-ha-"))
    names = [name for name in options.only if options.other or not SCENES[name].mixed]
    played = list(product(range(options.runs), programs(options.server).values(), names))
    end_in_order()
    rows = perform_all(
        [
            (SCENES[name], Choice(program, options.replicas, options.rate, options.seconds, options.other))
            for _, program, name in played
        ],
        directory,
        options.side_by_side,
    )
    print(table(sorted(rows, key=lambda row: (list(SCENES).index(row.scene), row.server))))
    if any(row.broken or row.late for row in rows):
        print(f"\nWhat the processes logged is in {directory}.", file=sys.stderr)
        return 1
    directory.rmdir()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
