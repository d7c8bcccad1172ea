"""Everything worth knowing on the device at hand, by one command: what it reaches, what steps cost, whether they learn.

    python benchmarks/accelerator.py                     at most 25 minutes on a GPU, several, or a TPU
    python benchmarks/accelerator.py --minutes 9         as much as these allow; the same command goes on
    python benchmarks/accelerator.py --only profile "steps XL/2"
    python benchmarks/accelerator.py --tiny              the smallest form of each part, minutes on 2 CPU cores

The parts are the other benchmarks, tests and short trainings, the most valuable first, each in a process of its own
that is stopped when its time is up. A part that has come to its end is not repeated; one that was stopped because the
minutes were over keeps its place; one that failed or used up its own limit is tried again after all others. A training
goes on from its checkpoints in DIRECTORY/parts/. After each part everything is in DIRECTORY: ledger.jsonl, from which
the same command goes on, results.md with the table of goals, and results.json; parts/NAME/log.txt has what a part
printed.

It needs jax, equinox, optax, jaxtyping and orbax-checkpoint; a part that needs more is skipped where that is missing,
and the table says so.
README.md beside this file has figures.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerator_goals import tabulate_goals
from accelerator_parts import FASHION, Machine, Part, parts, PYTEST, ROOT

from mf_eqx import run

PROBE = """
import importlib.metadata, json, jax
first, *others = jax.devices()
versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "equinox", "optax", "numpy")}
memory = (first.memory_stats() or {}).get("bytes_limit", 0)
print(json.dumps([first.platform, first.device_kind, 1 + len(others), memory, versions]))
"""
GRACE = 20
"""Seconds in which a process that is asked to stop may save what it has."""
SHOWN = 25
"""Lines of a part's results that are printed when it has ended."""
DONE, CUT_OFF, FAILED = "done", "stopped at its limit", "failed"
OUT_OF_TIME, INTERRUPTED = "stopped for lack of time", "interrupted"
NEW_ATTEMPT = "==== new attempt ====\n"
"""Begins what an attempt adds to a part's log."""
BOUND = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Turns into another program, which Linux ends when this process dies, however it dies."""
STATES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
OUTCOME = re.compile(rf"^(?P<test>\S+::.+?) (?P<outcome>{STATES})\b", re.MULTILINE)
OF_WORKER = re.compile(rf"^\[gw\d+\] \[ *\d+%\] (?P<outcome>{STATES}) (?P<test>\S+::.+?) *$", re.MULTILINE)
"""How pytest, alone and in several processes, prints what became of a test."""
NOT_IMPORTED = re.compile(r"^(?P<outcome>ERROR) (?P<test>\S+\.py)(?: - |$)", re.MULTILINE)
"""How it lists a file that it could not import."""


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "accelerator.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=25.0, help="after which no part runs any more (default 25)")
    parser.add_argument("--tiny", action="store_true", help="the smallest form of each part")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts by name, instead of all")
    parser.add_argument("--data", default=FASHION, help=f"folder of Fashion-MNIST (default {FASHION})")
    parser.add_argument("--directory", type=Path, help="where everything lands (default runs/accelerator)")
    found = parser.parse_args(arguments)
    if not (found.minutes > 0 and math.isfinite(found.minutes)):
        parser.error(f"--minutes must be a finite number > 0, got {found.minutes:g}")
    found.directory = found.directory or Path("runs", "accelerator_tiny" if found.tiny else "accelerator")
    found.data = str(Path(found.data).absolute())
    return found


def environment(part: Part | None = None) -> dict[str, str]:
    """What a part's process gets: the package of this checkout, and nearly all memory of a GPU if nothing else is set.

    A part runs in a folder of its own, so that relative folders of `PYTHONPATH` are made absolute.
    """
    places = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    path = os.pathsep.join([str(ROOT), *(str(Path(place).absolute()) for place in places)])
    defaults = {"PYTHONUNBUFFERED": "1"}
    if "XLA_CLIENT_MEM_FRACTION" not in os.environ:  # another name for the same
        defaults["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.92"
    if part is not None and part.script == PYTEST:
        defaults["XLA_FLAGS"] = ""  # tests would otherwise try flags for CPUs
    return {**defaults, **os.environ, "PYTHONPATH": path, **(part.environment if part else {})}


def probe() -> Machine:
    """The machine, as a process of its own sees it."""
    ended = subprocess.run([sys.executable, "-c", PROBE], env=environment(), capture_output=True, text=True)
    if ended.returncode:
        raise ValueError(f"JAX finds no device: {ended.stderr.strip().rpartition(chr(10))[2] or 'it says nothing'}")
    return Machine(*json.loads(ended.stdout.splitlines()[-1]))


@functools.cache
def driver() -> str:
    """What NVIDIA's tool says of the driver, if it is there."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return ""
    query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip().replace("\n", "; ")


def described(machine: Machine) -> str:
    """Devices, driver and versions in one line."""
    versions = (f"{name} {version}" for name, version in machine.versions.items())
    return ", ".join(filter(None, [machine.title, driver(), f"Python {platform.python_version()}", *versions]))


class Runner:
    """The parts of one machine, with what is known of each."""

    def __init__(self, machine: Machine, every: list[Part], directory: Path):
        self.machine, self.parts, self.directory = machine, every, directory
        self.ledger, self.skipped, self.has_run = run.Ledger(directory / "ledger.jsonl"), {}, False

    def key(self, part: Part) -> dict[str, Any]:
        return {"device": self.machine.title, "part": part.name, "config": part.config}

    def result(self, part: Part) -> dict[str, Any] | None:
        if self.key(part) not in self.ledger:
            return None
        return self.ledger[self.key(part)]

    def run_all(self, deadline: float, only: Collection[str] = ()) -> None:
        """Every part that is missing, or `only` some, as long as there is time for half of what it may take."""
        for part in self.missing():
            if only and part.name not in only:
                continue
            if why := part.lacks or self.lacking(part):
                self.skipped[part.name] = why
            elif (left := deadline - GRACE - time.monotonic()) < part.seconds / 2:
                self.skipped[part.name] = f"no time: {max(left, 0):.0f} s of {part.seconds} left"
            else:
                self.run(part, min(part.seconds, left))
            self.save()

    def missing(self) -> list[Part]:
        """Those that have not had their time yet, then those that failed or used up their limit."""
        states = {part.name: (self.result(part) or {}).get("state") for part in self.parts}
        before = (None, OUT_OF_TIME, INTERRUPTED)
        return sorted((p for p in self.parts if states[p.name] != DONE), key=lambda p: states[p.name] not in before)

    def lacking(self, part: Part) -> str:
        lacking = [package for package in part.needs if find_spec(package) is None]
        return f"needs {', '.join(lacking)}" if lacking else ""

    def folder(self, part: Part) -> Path:
        return self.directory.absolute() / "parts" / re.sub(r"\W+", "_", part.name)

    def run(self, part: Part, seconds: float) -> None:
        """One part to its end, or to that of its time; what it left is in the ledger when this returns."""
        print(f"== {part.name}: {part.answers} (at most {seconds:.0f} s)", flush=True)
        folder = self.folder(part)
        folder.mkdir(parents=True, exist_ok=True)
        began, state, stopped = time.monotonic(), INTERRUPTED, None
        try:
            state = call(part, folder, seconds)
        except (KeyboardInterrupt, SystemExit) as error:
            stopped = error
        text, records = collected(part, folder)
        if state == DONE and not records:
            state = f"{FAILED} (no results)"
        # What runs first gets all the time of a command: the next command would not give it more.
        if state == CUT_OFF and seconds < part.seconds and self.has_run:
            state = OUT_OF_TIME
        self.has_run, spent = True, round(time.monotonic() - began, 1)
        found, known = {"state": state, "seconds": spent, "text": text, "records": records}, self.result(part)
        if known and state != DONE and len(known["records"]) > len(records):
            found = {**known, "state": state}
        self.ledger.put(self.key(part), found)
        shown = "\n".join(text.splitlines()[:SHOWN])
        print(f"{shown}\n-- {part.name}: {state}, {spent:.0f} s", flush=True)
        if stopped is not None:
            self.save()
            raise stopped

    def save(self) -> None:
        """Everything that is known, for people and for programs."""
        known = {part.name: found for part in self.parts if (found := self.result(part)) is not None}
        texts = [described(self.machine), self.tabulate(known), tabulate_goals(records_of(known))]
        texts += [f"## {name}\n\n{found['text']}" for name, found in known.items()]
        place = run.RunDirectory(self.directory)
        place.save_results("\n\n".join(texts), [{"part": name, **found} for name, found in known.items()])

    def tabulate(self, known: Mapping[str, Mapping[str, Any]]) -> str:
        """What became of each part."""
        rows = []
        for part in self.parts:
            found = known.get(part.name)
            state = found["state"] if found else self.skipped.get(part.name, "not started")
            if found and found["state"] != DONE and part.name in self.skipped:
                state += f", then {self.skipped[part.name]}"
            commit = self.ledger.commit(self.key(part)) if found else None
            seconds = f"{found['seconds']:.0f}" if found else None
            rows.append((part.name, part.answers, state, seconds, commit and commit[:7] + commit[40:]))
        return run.table(rows, ("part", "question", "state", "seconds", "commit"))


def records_of(known: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The records of all parts, each with the name of its part."""
    return [{"part": name, **record} for name, found in known.items() for record in found["records"]]


def call(part: Part, folder: Path, seconds: float) -> str:
    """Run a part's process, and stop it when its time is up or this process is stopped."""
    with (folder / "log.txt").open("ab") as log:
        log.write(NEW_ATTEMPT.encode())
        log.flush()
        options: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        command = [sys.executable, "-S", "-c", BOUND, *part.command]
        process = subprocess.Popen(command, cwd=folder, env=environment(part), process_group=0, **options)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return CUT_OFF
        finally:
            stop(process)
    # Code 1 of pytest: some tests failed.
    return DONE if code == 0 or (part.script == PYTEST and code == 1) else f"{FAILED} (exit code {code})"


def stop(process: "subprocess.Popen[Any]") -> None:
    """Ask the process and its children to stop, and insist."""
    if process.poll() is None:
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
                return


def collected(part: Part, folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """What a part has left so far: text and records."""
    log = (folder / "log.txt").read_text(errors="replace").rpartition(NEW_ATTEMPT)[2]
    if part.script == PYTEST:
        found = [match for pattern in (OUTCOME, OF_WORKER, NOT_IMPORTED) for match in pattern.finditer(log)]
        outcomes = [{"test": m["test"].partition("tests/")[2], "outcome": m["outcome"]} for m in found]
        return (describe_tests(outcomes) if outcomes else last_lines(log)), outcomes
    files = sorted(folder.glob("runs/*/*/results.json"), key=lambda path: path.stat().st_mtime)
    texts = [(path.parent / "results.md").read_text().strip() for path in files[-1:]]
    texts += [described for path in sorted(folder.glob("runs/**/summary.json")) for described in speeds(path)]
    if not files:
        texts.append(last_lines(log))
    return "\n\n".join(texts), json.loads(files[-1].read_text()) if files else []


def last_lines(log: str) -> str:
    """Of a part without results: what it printed last, which may be why."""
    lines = [f"    {line[:200]}" for line in log.strip().splitlines()[-6:]]
    return "\n".join(["Nothing was saved. The log ends with", "", *(lines or ["    nothing"])])


def describe_tests(outcomes: list[dict[str, str]]) -> str:
    """How many there were of each outcome, and which were bad."""
    names = [o["outcome"] for o in outcomes]
    counts = [f"{names.count(name)} {name.lower()}" for name in dict.fromkeys(names)]
    bad = [f"- {o['outcome']} {o['test']}" for o in outcomes if o["outcome"] in ("FAILED", "ERROR")]
    return "\n".join([", ".join(counts), *bad])


def speeds(path: Path) -> Iterator[str]:
    """What a training's summary says of its time, and of its rows where its configuration is beside or above it."""
    summary = json.loads(path.read_text())
    configs = [file for folder in (path.parent, path.parent.parent) if (file := folder / "config.json").exists()]
    rows = json.loads(configs[0].read_text())["config"].get("batch", 0) if configs else 0
    if seconds := summary["seconds"].get("steps"):
        steps = sum(session["stop"] - session["start"] for session in summary["sessions"])
        yield f"{path.parent.name}: {steps} steps in {seconds:.1f} s, {steps * rows / seconds:,.0f} images per second"


def main(arguments: list[str] | None = None) -> None:
    asked, began = parsed(arguments), time.monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` has it
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    machine = probe()
    print(described(machine), flush=True)
    if machine.platform == "cpu" and not asked.tiny:
        raise ValueError("--tiny must be given on a CPU, where the full parts would take hours")
    every = parts(machine, asked.tiny, asked.data)
    if unknown := sorted(set(asked.only or ()) - {part.name for part in every}):
        raise ValueError(f"--only must be among {', '.join(part.name for part in every)}; got {', '.join(unknown)}")
    asked.directory.mkdir(parents=True, exist_ok=True)
    with run.locked(asked.directory):
        runner = Runner(machine, every, asked.directory)
        runner.save()
        runner.run_all(began + 60 * asked.minutes, asked.only or ())
    print((asked.directory / "results.md").read_text().partition("\n## ")[0])
    print(f"\n{time.monotonic() - began:.0f} seconds. Everything is in {asked.directory}.")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, run.InUse) as error:
        print(f"accelerator.py: error: {error}", file=sys.stderr)
        sys.exit(4 if isinstance(error, run.InUse) else 2)  # as of every script
    except KeyboardInterrupt:
        sys.exit(130)
