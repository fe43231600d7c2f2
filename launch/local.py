"""Runs training as several processes of this machine, and runs it again after preemptions, hangs and crashes.

    python launch/local.py --processes=2 --devices=4 --config=configs/quickstart.py --workdir=runs/two

  --processes=2     how many; one runs without jax.distributed
  --devices=K       each process gets K simulated CPU devices
  --gpus            each process gets one GPU of its own
  --port=0          port of the coordinator; 0: a free one, another for each attempt
  --max_crashes=3   gives up after so many crashes in a row without a new checkpoint
  --restarts=N      restarts at most so often, for whatever reason
  --grace=120       seconds that processes have to end by themselves when one of them has failed
  --pause=1         seconds before the restart after a first crash; doubles with each, up to 60
  --module=lmboost.train   what `python -m` runs
  --dry-run         prints the commands and runs none

All other flags go to training. Process 0 writes to this terminal; lines of the others begin with "[1] ", "[2] ", ...

The restart rule, the same for all launchers: 0 is the end. 2, a user error, is the end, too. 75 (preempted) and 76
(hung) start again at once. Anything else is a crash: it starts again after a pause, until --max_crashes crashes in a
row have brought no new checkpoint; then the status is the crash's (128 + n for signal n).

An attempt's status is 2 if a process ended with 2. Otherwise it is that of the first process that failed, since the
others fail because of it: the peers of a crashed process lose their connection and abort, the peers of a preempted one
save and end with 75, too. Of processes seen to fail in the same moment a preempted or hung one comes before a crashed
one.

SIGTERM, SIGINT or SIGHUP is passed on to all processes as SIGTERM, once; when they have saved and ended, the status is
75, or 0 if they were finished. A second SIGINT kills them.
"""

import argparse
import contextlib
import os
import pathlib
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from flags import USER_ERROR, Parser, number, value_of

PREEMPTED, HUNG = 75, 76  # as in lmboost/errors.py
AT_ONCE = {PREEMPTED: "preempted", HUNG: "hung"}
KILL_AFTER = 10.0  # seconds from SIGTERM to SIGKILL
LONGEST_PAUSE = 60.0
DEVICE_COUNT = "--xla_force_host_platform_device_count="
GIVEN_BY_US = ("--coordinator", "--num_processes", "--process_id", "--multihost")


def main(argv: list[str]) -> int:
    """Runs training until the restart rule ends it; returns the exit status."""
    options, flags = parse(argv)
    if options.dry_run:
        for command, environment in commands(options, flags):
            given = ["env", *(f"{k}={v}" for k, v in environment.items())] if environment else []
            print(shlex.join(given + command))
        return 0
    with Signals() as signals:
        return keep_running(options, flags, signals)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(this launcher's options, the flags of training). A wrong option ends the program with status 2."""
    parser = Parser()
    parser.add_argument("--processes", type=number(int, 1), default=2)
    parser.add_argument("--devices", type=number(int, 1))
    parser.add_argument("--gpus", action="store_true")
    parser.add_argument("--port", type=number(int, 0), default=0)
    parser.add_argument("--max_crashes", type=number(int, 1), default=3)
    parser.add_argument("--restarts", type=number(int, 0), default=float("inf"))
    parser.add_argument("--grace", type=number(float, 0), default=120.0)
    parser.add_argument("--pause", type=number(float, 0), default=1.0)
    parser.add_argument("--module", default="lmboost.train")
    parser.add_argument("--dry-run", action="store_true")
    options, flags = parser.split(argv)
    for flag in flags:
        if flag.partition("=")[0] in GIVEN_BY_US:
            parser.error(f"{flag}: the launcher gives this flag itself; leave it out")
    if options.gpus and options.devices:
        parser.error("--gpus and --devices exclude each other: real GPUs or simulated CPU devices")
    if options.gpus and len(_visible_gpus(options.processes)) < options.processes:
        parser.error(
            f"--processes={options.processes}: CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} has fewer "
            "GPUs, and each process needs one"
        )
    return options, flags


def _visible_gpus(processes: int) -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(processes)] if given is None else [name for name in given.split(",") if name]


def commands(options: argparse.Namespace, flags: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    """(command, what it gets in the environment) for each process of one attempt."""
    port, result = options.port or _free_port(), []
    for i in range(options.processes):
        environment = {}
        if options.devices:
            kept = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(DEVICE_COUNT)]
            environment["XLA_FLAGS"] = " ".join([*kept, f"{DEVICE_COUNT}{options.devices}"])
            environment["JAX_PLATFORMS"] = "cpu"
        if options.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = _visible_gpus(options.processes)[i]
        command = [sys.executable, "-m", options.module, *flags]
        if options.processes > 1:
            command += [f"--coordinator=localhost:{port}", f"--num_processes={options.processes}", f"--process_id={i}"]
        result.append((command, environment))
    return result


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def keep_running(options: argparse.Namespace, flags: list[str], signals: "Signals") -> int:
    """The restart rule."""
    workdir = value_of(flags, "workdir")
    best, crashes, restarts = newest_checkpoint(workdir), 0, 0
    while True:
        status = run_once(commands(options, flags), options.grace, signals)
        if signals.stop:
            return status if status in (0, USER_ERROR) else PREEMPTED
        if status in (0, USER_ERROR):
            return status
        newest = newest_checkpoint(workdir)
        if newest > best:
            best, crashes = newest, 0
        if status in AT_ONCE:
            why, pause = AT_ONCE[status], 0.0
        else:
            crashes += 1
            if crashes >= options.max_crashes:
                _say(f"{crashes} crashes in a row without a new checkpoint: giving up with status {status}")
                return status
            why = f"crashed with status {status}, {crashes} of {options.max_crashes}"
            pause = min(LONGEST_PAUSE, options.pause * 2 ** (crashes - 1))
        if restarts >= options.restarts:
            _say(f"{why}; no restart after {restarts} of them")
            return status
        restarts += 1
        _say(f"{why}; restart {restarts} in {pause:g} s, newest checkpoint: {best if best >= 0 else 'none'}")
        signals.sleep(pause)
        if signals.stop:
            return PREEMPTED


def newest_checkpoint(workdir: str | None) -> int:
    """The newest step in WORKDIR/checkpoints, -1 if there is none or it can't be seen.

    Unfinished checkpoints have other names. In a bucket they may look finished, but a save that never succeeds is seen
    as progress once at most, because its step does not grow.
    """
    if workdir is None:
        return -1
    if "://" not in workdir:
        directory = pathlib.Path(workdir, "checkpoints")  # as lmboost.checkpoint.Run has them
        names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    else:
        try:
            listing = ["gcloud", "storage", "ls", workdir.rstrip("/") + "/checkpoints/"]
            names = subprocess.run(listing, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout.split()
            names = [name.rstrip("/").rpartition("/")[2] for name in names]
        except FileNotFoundError:
            _say(f"checkpoints in {workdir} can't be listed without gcloud: each crash counts as one without progress")
            names = []
    return max((int(name) for name in names if name.isascii() and name.isdigit()), default=-1)


def _say(message: str) -> None:
    print(f"launch: {message}", file=sys.stderr, flush=True)


class Signals:
    """Counts the signals that ask the launcher to stop, and wakes what waits when one comes or a process ends."""

    def __init__(self):
        self.stop = False
        self.kill = False
        self._interrupts = 0

    def __enter__(self):
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._old = {signal.SIGCHLD: signal.signal(signal.SIGCHLD, lambda *_: None)}
        for which in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(which) != signal.SIG_IGN or which == signal.SIGTERM:  # nohup ignores SIGHUP
                self._old[which] = signal.signal(which, self._asked)
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_):
        signal.set_wakeup_fd(self._old_wakeup)
        for which, handler in self._old.items():
            signal.signal(which, handler)
        os.close(self._read)
        os.close(self._write)

    def _asked(self, which: int, _) -> None:
        self._interrupts += which == signal.SIGINT
        self.stop = True
        self.kill = self._interrupts >= 2

    def fileno(self) -> int:
        """Readable when a signal has come."""
        return self._read

    def clear(self) -> None:
        """Takes note of what has come."""
        while True:
            try:
                os.read(self._read, 4096)
            except BlockingIOError:
                return

    def sleep(self, seconds: float) -> None:
        """Sleeps, but not longer than until the launcher is asked to stop."""
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            while not self.stop and (left := end - time.monotonic()) > 0:
                selector.select(left)
                self.clear()


class Process:
    """One process of training, in a session of its own: signals reach it through the launcher only.

    Process 0 has the terminal, if there is one; otherwise its lines pass through here, too, so that none is cut by
    another process's.
    """

    def __init__(self, index: int, command: list[str], environment: dict[str, str]):
        self.index, self.status = index, None
        stdout, stderr = (subprocess.PIPE if index or not s.isatty() else None for s in (sys.stdout, sys.stderr))
        self._popen = subprocess.Popen(
            command, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
            start_new_session=True,
        )  # fmt: skip
        self.pipes = [pipe for pipe in (self._popen.stdout, self._popen.stderr) if pipe]
        self._begun = dict.fromkeys(self.pipes, b"")  # the beginning of a line that is not whole yet
        for pipe in self.pipes:
            os.set_blocking(pipe.fileno(), False)

    def forward(self, pipe) -> bytes | None:
        """Reads from a pipe and passes whole lines on; what it read, None if nothing has come, b"" at the end."""
        try:
            data = os.read(pipe.fileno(), 1 << 16)
        except BlockingIOError:
            return None
        if self.index:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")  # a progress bar ends its lines so
        *whole, self._begun[pipe] = (self._begun[pipe] + data).split(b"\n")
        self._write(pipe, [line + b"\n" for line in whole])
        return data

    def _write(self, pipe, lines: list[bytes]) -> None:
        target = sys.stdout if pipe is self._popen.stdout else sys.stderr
        prefix = b"[%d] " % self.index if self.index else b""
        target.buffer.write(b"".join(prefix + line for line in lines))
        target.flush()

    def poll(self) -> int | None:
        """The exit status, 128 + n for signal n; None while it runs. What it has left running is killed."""
        if self.status is None and self._popen.poll() is not None:
            self._end()
        return self.status

    def terminate(self) -> None:
        """SIGTERM to the process alone: its workers are its own to end."""
        if self.poll() is None:
            self._popen.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the process and all that it has started."""
        if self.poll() is None:
            self._end()

    def _end(self) -> None:
        # Where the process has ended there may be nothing left in its group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        code = self._popen.wait()
        self.status = 128 - code if code < 0 else code

    def close(self) -> None:
        """Kills it if it still runs, and passes on the rest of its output."""
        self.kill()
        for pipe in self.pipes:
            while self.forward(pipe):
                pass
            if self._begun[pipe]:
                self._write(pipe, [self._begun[pipe] + (b"\n" if self.index else b"")])
            pipe.close()


def run_once(to_start: list[tuple[list[str], dict[str, str]]], grace: float, signals: Signals) -> int:
    """Starts the processes and waits for all of them; returns the attempt's status.

    When one has failed the others get `grace` seconds, then SIGTERM, then KILL_AFTER seconds, then SIGKILL.
    """
    processes: list[Process] = []
    failed: list[Process] = []  # the first one first
    stages: list[tuple[float, Callable[[Process], None]]] = []  # when, what is done with those that still run
    asked = False
    with contextlib.ExitStack() as closing, selectors.DefaultSelector() as selector:
        selector.register(signals, selectors.EVENT_READ)
        for i, (command, environment) in enumerate(to_start):
            processes.append(Process(i, command, environment))
            closing.callback(processes[i].close)
            for pipe in processes[i].pipes:
                selector.register(pipe, selectors.EVENT_READ, processes[i])
        while True:
            running = [p for p in processes if p.poll() is None]
            new = sorted((p for p in processes if p.status and p not in failed), key=lambda p: p.status not in AT_ONCE)
            now = time.monotonic()
            if new and not failed and running:
                _say(f"process {new[0].index} ended with {new[0].status}; the others get {grace:g} s to end")
                stages = [(now + grace, Process.terminate), (now + grace + KILL_AFTER, Process.kill)]
            failed += new
            if not running:
                break
            if signals.stop and not asked:
                asked = True
                _say("asked to stop: waiting until all processes have saved")
                for process in running:
                    process.terminate()
            while stages and stages[0][0] <= now or signals.kill and running:
                act = Process.kill if signals.kill else stages.pop(0)[1]
                _say(f"{act.__name__} what still runs: {', '.join(str(p.index) for p in running)}")
                for process in running:
                    act(process)
                running = [p for p in running if p.poll() is None]
            for key, _ in selector.select(stages[0][0] - now if stages else None):
                if key.fileobj is signals:
                    signals.clear()
                elif key.data.forward(key.fileobj) == b"":
                    selector.unregister(key.fileobj)
    if any(p.status == USER_ERROR for p in failed):
        return USER_ERROR
    return failed[0].status if failed else 0


if __name__ == "__main__":
    if "--help" in sys.argv:
        sys.exit(print(__doc__))
    sys.exit(main(sys.argv[1:]))
