"""Parse the command line, call the library, print. No logic lives here.

| file | commands |
|---|---|
| `experiments` | `run`, `train`, `compare`, `show`, `list`, `publish` |
| `attacks` | `evaluate`, `museum` |
| `bench` | `bench` |
| `certify` | `certify` |
| `insight` | `plane`, `detect`, `report` |
| `machine` | `doctor`, `benchmark`, `data list`, `data get` |
"""

import errno
import signal
import sys
import warnings

from rich.markup import escape

from bitquorum.allocator import keep_freed_memory
from bitquorum.cli import attacks, bench, certify, experiments, insight, machine  # noqa: F401  # they register their commands
from bitquorum.cli.printing import print_warning
from bitquorum.cli.shared import app, err


def main() -> None:
    """Run the command line; a failure that the user can mend is one message and exit code 2."""
    warnings.showwarning = print_warning
    keep_freed_memory()
    _end_by_interrupt()
    try:
        app()
    except Exception as error:
        message = _advice(error)
        if message is None:
            raise
        err.print(f"[bold red]error:[/bold red] {escape(message)}", soft_wrap=True)
        sys.exit(2)


def _end_by_interrupt() -> None:
    """Take a request to end, as a cluster sends it or a terminal that closes, for an interrupt from the keyboard."""
    for name in ("SIGTERM", "SIGHUP"):  # the second is not everywhere, and `nohup` ignores it
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def _advice(error: Exception) -> str | None:
    """Return what to tell the user of a failure that they can mend; `None` for one that they cannot."""
    from bitquorum.interface import BitquorumError  # imports torch, which `--help` does without

    if isinstance(error, BitquorumError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"expected room for what is written, got: {error.strerror}; make some, the same command goes on"
    if isinstance(error, OSError) and error.filename:
        path = error.filename2 or error.filename  # of a file that takes the place of another, that one
        return f"expected {path} to be readable or writable, got: {error.strerror}; choose another path"
    return None
