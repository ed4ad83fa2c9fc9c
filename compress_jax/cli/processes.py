"""Several processes, one command: join those of a cluster, or start some on this machine."""

import argparse
import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import IO

from compress_jax.cli.console import shown, stderr
from compress_jax.core.errors import ConfigError

FLAGS = (
    "processes", "devices", "distributed", "coordinator", "process", "profile", "peak_tflops",
    "share", "reuse",
)  # fmt: skip
PARENT = "COMPRESS_JAX_LAUNCHER"  # where processes find the number of the one that started them
HEARTBEAT = 30  # seconds without a sign of life after which a process counts as lost
LOST = 75  # exit code of a process that misses another
GRACE = 10  # seconds that the others get to end by themselves when one has failed


def split_flags(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Separate the flags on processes, measuring and shared stages from the words of a command.

    Args:
      words: the arguments after ``run``.

    Returns:
      ``(flags, other words)``.

    Example:
      >>> flags, rest = split_flags(["digits.py", "--processes", "2", "--seed", "1"])
      >>> flags.processes, flags.distributed, rest
      (2, False, ['digits.py', '--seed', '1'])
    """
    parser = argparse.ArgumentParser("compress-jax run", add_help=False, allow_abbrev=False)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--devices", type=int)
    parser.add_argument("--distributed", action="store_true")
    parser.add_argument("--coordinator", metavar="HOST:PORT")
    parser.add_argument("--process", type=int)
    parser.add_argument("--profile", type=int)
    parser.add_argument("--peak-tflops", type=float)
    parser.add_argument("--share", metavar="DIR")
    parser.add_argument("--reuse", action="store_true")
    flags, rest = parser.parse_known_args(list(words))
    for name in ("processes", "devices", "profile"):
        number = getattr(flags, name)
        if number is not None and number < 1:
            raise ConfigError(f"--{name} must be a whole number from 1; got {number}")
    if flags.peak_tflops is not None and not 0 < flags.peak_tflops < math.inf:
        raise ConfigError(f"--peak-tflops must be a number above 0; got {flags.peak_tflops}")
    if flags.coordinator and (flags.processes is None or flags.process is None):
        raise ConfigError(
            "--coordinator HOST:PORT needs --processes N and --process I, this one's number, "
            "counted from 0"
        )
    if flags.process is not None and not flags.coordinator:
        raise ConfigError("--process needs --coordinator HOST:PORT, the address of process 0")
    return flags, rest


def flag_words(flags: argparse.Namespace, *names: str) -> list[str]:
    """Return some flags with a value as words again.

    Args:
      flags: from `split_flags`.
      *names: which.

    Returns:
      The words.

    Example:
      >>> flag_words(split_flags(["--profile", "5", "--devices", "2"])[0], "profile", "share")
      ['--profile', '5']
    """
    words = []
    for name in names:
        value = getattr(flags, name)
        if value:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return words


def emulate(devices: int) -> None:
    """Let JAX see so many devices on a CPU; before it is asked for any."""
    # Of flags given twice XLA takes the last.
    flag = f"--xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def require_devices(devices: int) -> None:
    """Check that this process has so many devices.

    Raises:
      ConfigError: if not: JAX was asked before `emulate`, as in a notebook, or runs on no CPU.
    """
    import jax

    if jax.local_device_count() != devices:
        raise ConfigError(
            f"--devices {devices}: JAX has {jax.local_device_count()} in this process; emulated "
            "ones are for CPUs (JAX_PLATFORMS=cpu), and for a new process"
        )


def join(flags: argparse.Namespace) -> None:
    """Join the other processes of a run, before JAX is asked for devices.

    Args:
      flags: from `split_flags`; without ``--coordinator`` the cluster says what is missing: SLURM,
        Kubernetes (GKE), TPU pods and Open MPI as `jax.distributed` knows them.

    Raises:
      ConfigError: if the others cannot be found.
    """
    import jax

    # Gloo mixes up what CPUs send each other where two processes run programs in another order; see
    # `train._processes.settle`. This keeps the order of the calls for what does not train too.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            flags.coordinator,
            flags.processes,
            flags.process,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"cannot join the other processes: {str(error).splitlines()[0]}; where no cluster "
            "says so, give --coordinator HOST:PORT --processes N --process I"
        ) from error


def launch(words: Sequence[str], processes: int) -> int:
    """Start the processes of a run on this machine, and wait for them.

    A signal is handed on to each, once. If one fails, the others are stopped: they could not go on
    without it.

    Args:
      words: of the command, without the flags on processes.
      processes: how many.

    Returns:
      The exit code: that of the first process, or of the one that failed.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as said:
        children = [_start(words, number, processes, port, said) for number in range(processes)]
        try:
            with handed_on(children):
                failed = _first_failure(children)
                if failed is not None:
                    _wait_for_others(children)
        finally:
            codes = [child.poll() for child in children]
            for child in children:
                child.kill()  # does nothing to those that have ended
        said.seek(0)
        lines = said.read().decode(errors="replace").splitlines()
    if failed is None:
        return children[0].returncode
    # The first to end is to blame, unless it missed another. What all find wrong, process 0 said.
    if codes[failed] == LOST:
        others = [number for number, code in enumerate(codes) if code not in (None, 0, LOST)]
        failed = others[0] if others else failed
    if (codes[failed] or 0) > 0 and codes[0] in (1, 2):
        failed = 0
    code = codes[failed] or 0
    if failed > 0 and code > 0 and lines:
        stderr().print(f"process {failed}: {shown(lines[-1])}")
    if code in (-signal.SIGINT, -signal.SIGTERM):  # it came before they were ready for it
        return 128 - code
    if code < 0:
        stderr().print(
            f"[bold red]error:[/] process {failed} was ended by {signal.Signals(-code).name}; the "
            "others were stopped; run the same command to continue"
        )
        return 1
    return code


def _start(
    words: Sequence[str], number: int, processes: int, port: int, said: IO[bytes]
) -> "subprocess.Popen[bytes]":
    """Start one process; what others than the first say goes to a file."""
    join = ["--coordinator", f"localhost:{port}", "--processes", str(processes)]
    command = [sys.executable, "-m", "compress_jax.cli", "run", *words]
    return subprocess.Popen(
        [*command, *join, "--process", str(number)],
        env={**os.environ, PARENT: str(os.getpid())},
        stdout=None if number == 0 else subprocess.DEVNULL,
        stderr=None if number == 0 else said,
        # A terminal sends Ctrl-C to its whole group: these would then get it twice.
        start_new_session=True,
    )


@contextlib.contextmanager
def handed_on(children: "Sequence[subprocess.Popen[bytes]]") -> Iterator[list[int]]:
    """Send SIGINT and SIGTERM on to processes inside the ``with`` block.

    Yields:
      The signals that came, in order.
    """
    received: list[int] = []

    def hand_on(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for child in children:
            if child.poll() is None:
                child.send_signal(signum)

    previous = {
        signum: signal.signal(signum, hand_on) for signum in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _first_failure(children: "Sequence[subprocess.Popen[bytes]]") -> int | None:
    """Wait until all have ended well, or one has not; return its number."""
    while True:
        codes = [child.poll() for child in children]
        for number, code in enumerate(codes):
            if code:
                return number
        if None not in codes:
            return None
        time.sleep(0.05)


def _wait_for_others(children: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Wait until all have ended; where one failed, not for long, as the others miss it."""
    stopped = any(child.poll() in (130, 143) for child in children)  # they save what they have
    until = math.inf if stopped else time.monotonic() + GRACE
    while any(child.poll() is None for child in children) and time.monotonic() < until:
        time.sleep(0.05)


def end_with_parent() -> None:
    """End this process when the one that started it is gone, if that was `launch` or a sweep."""
    parent = os.environ.get(PARENT)
    # Not its child, but a child of its child: whoever started this one will see to it.
    if parent is None or parent != str(os.getppid()):
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
