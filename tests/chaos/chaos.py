"""Trainings to which bad things happen, and a tally of what came of them.

Every training is interrupted again and again, and resumed; it must end to the bit like one that was left alone.
`events.jsonl` has a line for each event and for each end, with the commit that it was seen at: a later call adds to it.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from data.digits import make_digits
from tests.e2e import children
from tests.e2e.conftest import TOY_CFG
from tests.e2e.test_ranks import start_two
from utils.checkpoint import Checkpoint
from utils.errors import UserError

PATIENCE_S = 200  # a child that takes longer hangs
TORCHRUN_S = 20  # in which ranks end by themselves, once one has failed
MOST_EVENTS_OF_A_RUN = 8
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What is trained."""

    norm: str
    optimizer: str
    workers: int
    cache: str
    ranks: int = 1

    @property
    def name(self) -> str:
        words = (self.norm.replace(":", "-").replace("=", "-"), self.optimizer, f"workers{self.workers}", self.cache)
        return "-".join((*words, f"ranks{self.ranks}"))


SETUPS = (
    Setup(norm="cmbn:carry", optimizer="adamw", workers=0, cache="disk"),
    Setup(norm="bn", optimizer="sgd", workers=1, cache="ram"),
    Setup(norm="cbn:burn_in_steps=2", optimizer="sgd", workers=0, cache="ram", ranks=2),
    Setup(norm="cbn:burn_in_steps=2", optimizer="adamw", workers=2, cache="disk"),
    Setup(norm="cmbn:carry", optimizer="sgd", workers=3, cache="ram"),
    Setup(norm="bn", optimizer="adamw", workers=0, cache="off"),
    Setup(norm="cmbn:carry", optimizer="adamw", workers=1, cache="disk", ranks=2),
    Setup(norm="bn", optimizer="sgd", workers=0, cache="disk", ranks=2),
)


class Chaos:
    """A folder with trainings, and `events.jsonl`, from which a later call goes on."""

    def __init__(self, folder: Path, *, seed: int = 0, say: Callable[[str], None] = print) -> None:
        self.folder, self.seed, self.say = folder, seed, say
        folder.mkdir(parents=True, exist_ok=True)
        self.data = make_digits(folder / "scenes", counts={"train": 16, "val": 8}, hw=(64, 64))
        self.cfg = folder / "toy.cfg"
        self.cfg.write_text(TOY_CFG)
        self.events = folder / "events.jsonl"
        self.rows = [json.loads(line) for line in self.events.read_text().splitlines()] if self.events.exists() else []
        self.commit = commit()

    @property
    def tally(self) -> Counter[str]:
        """How many events there were, and trainings that ended, with each outcome; those that must not be are shown."""
        counts = Counter(events=0, finished=0, tracebacks=0, hangs=0, wrong=0, unequal=0)
        for row in self.rows:
            counts.update(["finished" if row["event"] == "end" else "events", row["outcome"]])
            counts["tracebacks"] += row["tracebacks"]
        return counts

    def table(self) -> list[str]:
        """A row for each kind of event, a column for each outcome."""
        cells = Counter((row["event"], row["outcome"]) for row in self.rows)
        outcomes = ["survived", "refused", "bit-equal", "hangs", "wrong", "unequal"]
        lines = ["".join(f"{word:>10}" for word in ("event", *outcomes))]
        for kind in sorted({row["event"] for row in self.rows}):
            lines.append("".join(f"{word:>10}" for word in (kind, *(cells[kind, outcome] for outcome in outcomes))))
        commits = Counter(row["commit"] for row in self.rows if row["event"] != "end")
        lines += [f"{count} events at commit {name}" for name, count in commits.items()]
        return [*lines, "  ".join(f"{name} {count}" for name, count in self.tally.items())]

    def add(self, **row: Any) -> None:
        self.rows.append({**row, "commit": self.commit})
        with self.events.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")

    def run(self, events: int, *, setups: tuple[Setup, ...] = SETUPS, kinds: tuple[str, ...] = ()) -> Counter[str]:
        """Go on until so many events have been, in trainings of one setup after the other. kinds: these, in order."""
        number = max((row["training"] for row in self.rows), default=-1)
        while self.tally["events"] < events:
            number += 1
            _Training(self, setups[number % len(setups)], number).live(events, list(kinds))
        for line in self.table():
            self.say(line)
        return self.tally

    def whole(self, setup: Setup) -> Path:
        """The training that nothing happens to."""
        run = self.folder / f"whole-{setup.name}"
        if not (run / "finished").exists():
            shutil.rmtree(run, ignore_errors=True)
            log = self.folder / f"whole-{setup.name}.txt"
            for child in self.start(setup, self.new(setup, run), log):
                assert children.ended(child) == 0, log.read_text()[-3000:]
            (run / "finished").touch()
        return run

    def new(self, setup: Setup, run: Path) -> list[str]:
        what = ["--data", str(self.data), "--cfg", str(self.cfg), "--norm", setup.norm, "--optimizer", setup.optimizer]
        what += ["--cache", setup.cache, "--epochs", "4", "--evals", "2", "--device", "cpu", "--out", str(run)]
        return [*what, *self.common(setup)]

    def common(self, setup: Setup) -> list[str]:
        return ["--workers", str(setup.workers), "--save-minutes", "0"]

    def start(
        self, setup: Setup, command: list[str], log: Path, before: Callable[[], None] | None = None
    ) -> list[BaseProcess]:
        first = partial(prepare, str(self.folder / "cache"), before)
        if setup.ranks == 1:
            return [children.start(command, log=log, before=first)]
        return start_two(command, log, before=first)


def commit() -> str:
    """The one that is checked out, with a + for changes since; "" where there is no repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ""


def prepare(cache: str, before: Callable[[], None] | None) -> None:
    os.environ["XDG_CACHE_HOME"] = cache
    if before is not None:
        before()


def limit_files(most_bytes: int) -> None:
    """Let no file grow beyond that, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))


def lose_reader(log: str, after_bytes: int) -> None:
    """Send the output through a pipe to the log, and close it after so many bytes."""
    read, write = os.pipe()
    for stream in (1, 2):
        os.dup2(write, stream)
    os.close(write)
    sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115

    def copy() -> None:
        left = after_bytes
        with open(log, "ab") as file:
            while left > 0 and (some := os.read(read, min(left, 512))):
                left -= len(some)
                file.write(some)
        os.close(read)

    threading.Thread(target=copy, daemon=True).start()


class _Training:
    """One training of a setup: interrupted, resumed, and at its end compared."""

    def __init__(self, chaos: Chaos, setup: Setup, number: int) -> None:
        self.chaos, self.setup, self.number = chaos, setup, number
        self.whole = chaos.whole(setup)
        self.run = chaos.folder / f"run{number}"
        self.rng = random.Random(f"{chaos.seed} {number}")
        self.segment, self.tracebacks = 0, 0

    def live(self, events: int, kinds: list[str]) -> None:
        done = 0
        possible = {
            "kill": self.kill,
            "signal": self.signal,
            "reader": self.reader,
            "damage": self.damage,
            "second": self.second,
        }
        if not self.setup.workers:  # whose shared memory is files, too
            possible["disk"] = self.disk
        while self.chaos.tally["events"] < events and done < MOST_EVENTS_OF_A_RUN:
            if done and not kinds and self.is_trained():
                break
            kind = kinds.pop(0) if kinds else self.rng.choice(sorted(possible))
            begun = time.monotonic()
            outcome = possible[kind]()
            if outcome == "missed":
                continue
            done += 1
            self.note(kind, outcome, time.monotonic() - begun)
            if outcome in ("hangs", "wrong"):
                shutil.rmtree(self.run, ignore_errors=True)
                return
        self.finish()

    def note(self, event: str, outcome: str, took_s: float) -> None:
        what = {"training": self.number, "setup": self.setup.name, "event": event, "outcome": outcome}
        self.chaos.add(**what, seconds=round(took_s, 1), tracebacks=self.tracebacks)
        self.chaos.say(f"{self.chaos.tally['events']:>4} {self.setup.name} {event}: {outcome} ({took_s:.1f} s)")
        self.tracebacks = 0

    def is_trained(self) -> bool:
        last = self.run / "last.pt"
        return last.exists() and Checkpoint.from_file(last).epochs_done == 4

    def finish(self) -> None:
        """Train to the end, and compare."""
        begun, outcome = time.monotonic(), "bit-equal"
        codes, log = self.await_end(self.go_on())
        try:
            assert codes == [0] * self.setup.ranks, log[-3000:]
            children.assert_same_training(self.whole, self.run)
            shutil.rmtree(self.run)
        except (AssertionError, UserError) as error:
            outcome = "unequal"
            self.chaos.say(f"{self.run}: {error}")
        self.note("end", outcome, time.monotonic() - begun)

    # --- what happens -----------------------------------------------------------------------------------------------

    def kill(self) -> str:
        pair = self.go_on()
        victim = self.rng.choice(pair)
        if not self.wait_a_while(victim):
            return self.judge(pair, {0}, on_time="missed")
        victim.kill()
        return self.judge(pair, {0, 2, -signal.SIGKILL})

    def signal(self) -> str:
        pair, number = self.go_on(), self.rng.choice(_SIGNALS)
        victim = self.rng.choice(pair)
        if not self.wait_a_while(victim):
            return self.judge(pair, {0}, on_time="missed")
        os.kill(victim.pid or 0, number)
        return self.judge(pair, {0, 2, 128 + signal.SIGINT, -number})  # minus it: before the training began

    def reader(self) -> str:
        lose = partial(lose_reader, str(self.log_path()), self.rng.randrange(1, 2500))
        return self.judge(self.go_on(lose), {0, 2, 141})

    def disk(self) -> str:
        """One that is full for everything above some size: for no checkpoint, or not for best.pt, or all but images."""
        return self.judge(self.go_on(partial(limit_files, self.rng.choice((300, 5_000, 40_000)))), {0, 2})

    def second(self) -> str:
        """Another process in the same folder."""
        pair, lock = self.go_on(), self.run / ".lock"
        until = time.monotonic() + PATIENCE_S
        while not ((self.run / "last.pt").exists() and lock.exists() and lock.read_text() == self.owner(pair)):
            if pair[0].exitcode is not None or time.monotonic() > until:
                return self.judge(pair, {0}, on_time="missed")
            time.sleep(0.02)
        self.segment += 1
        other = self.chaos.start(self.setup, self.resumed(), self.log_path())
        codes, log = self.await_end(other)
        is_refused = f"is in use by {self.owner(pair)}" in log and 2 in codes
        was_alone = pair[0].exitcode is not None  # the first one ended before the second one looked
        for process in pair:
            process.kill()
        outcome = self.judge(pair, {0, -signal.SIGKILL}, on_time="refused")
        return outcome if is_refused else "missed" if was_alone else "wrong"

    @staticmethod
    def owner(pair: list[BaseProcess]) -> str:
        return f"process {pair[0].pid} on {os.uname().nodename}"

    def damage(self) -> str:
        """A bit or the end of a file; whether that is refused or harmless, the training ends as it should."""
        there = [path for name in ("last.pt", "best.pt", "settings.json") if (path := self.run / name).exists()]
        if not (self.run / "last.pt").exists():
            return "missed"
        path = self.rng.choice(there)
        intact = path.read_bytes()
        broken = bytearray(intact)
        if self.rng.random() < 0.5:
            broken[self.rng.randrange(len(intact))] ^= 1 << self.rng.randrange(8)
        else:
            del broken[self.rng.randrange(len(intact)) :]
        path.write_bytes(broken)
        pair = self.go_on()
        outcome = self.judge(pair, {0, 2})
        if any(process.exitcode for process in pair):
            path.write_bytes(intact)
            outcome = "refused" if outcome == "survived" else outcome
        return outcome

    # --- children ---------------------------------------------------------------------------------------------------

    def wait_a_while(self, victim: BaseProcess) -> bool:
        """Wait for some checkpoints, or for none, and some moments more. Returns whether the process still runs."""
        last, until, saved_at = self.run / "last.pt", time.monotonic() + PATIENCE_S, 0
        for _ in range(self.rng.randrange(7)):
            while victim.exitcode is None and time.monotonic() < until:
                now = last.stat().st_mtime_ns if last.exists() else 0
                if now != saved_at:
                    saved_at = now
                    break
                time.sleep(0.003)
        victim.join(self.rng.uniform(0, 0.3) if saved_at else self.rng.uniform(0, 3))
        return victim.exitcode is None

    def log_path(self) -> Path:
        return self.chaos.folder / f"run{self.number}-{self.segment}.txt"

    def resumed(self) -> list[str]:
        return ["--resume", str(self.run), *self.chaos.common(self.setup)]

    def go_on(self, before: Callable[[], None] | None = None) -> list[BaseProcess]:
        is_begun = (self.run / "last.pt").exists()
        if not is_begun:
            shutil.rmtree(self.run, ignore_errors=True)
        command = self.resumed() if is_begun else self.chaos.new(self.setup, self.run)
        return self.chaos.start(self.setup, command, self.log_path(), before)

    def await_end(self, pair: list[BaseProcess]) -> tuple[list[int | None], str]:
        """Their exit codes, None for one that hung, and what they printed."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until and any(process.exitcode is None for process in pair):
            if any(process.exitcode for process in pair):
                until = min(until, time.monotonic() + TORCHRUN_S)
            time.sleep(0.02)
        failed = next((process.exitcode for process in pair if process.exitcode), None)
        if failed is not None:  # torchrun ends the others, such as one that waits for the first in order to begin
            for process in pair:
                process.terminate()
                process.join(TORCHRUN_S)
            codes = [failed if process.exitcode == -signal.SIGTERM else process.exitcode for process in pair]
        else:
            codes = [process.exitcode for process in pair]
        for process in pair:
            process.kill()
            process.join()
        log = self.log_path().read_text(errors="replace") if self.log_path().exists() else ""
        if "Traceback" in log:
            self.tracebacks += 1
            self.chaos.say(f"{self.log_path()}:\n{log[-3000:]}")
        elif None not in codes:
            self.log_path().unlink(missing_ok=True)
        self.segment += 1
        return codes, log

    def judge(self, pair: list[BaseProcess], allowed: set[int], *, on_time: str = "survived") -> str:
        """What came of it: they ended as they may, and last.pt is whole, if there is one."""
        codes, log = self.await_end(pair)
        if None in codes:
            return "hangs"
        if not set(codes) <= allowed:
            self.chaos.say(f"{codes}: {log[-3000:]}")
            return "wrong"
        return on_time
