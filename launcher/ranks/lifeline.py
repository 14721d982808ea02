"""The lifeline: a rank that `moe-testbed launch` started ends when `launch` does, and gets the signals that it gets.

Ending a process ends neither the processes that it has started nor those on other hosts, and ssh forwards no signals.
Each rank therefore holds a TCP connection to `launch`. When the connection ends, the rank ends; each byte that comes
through it is the number of a signal.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading

from moe_testbed.launcher.errors import ConfigError

LIFELINE_VARIABLE = "MOE_TESTBED_LIFELINE"
"""ADDRESS:PORT of `launch`; without an address, `launch` is on the machine from which ssh came."""

_CONNECT_SECONDS = 20.0
# A machine that vanishes closes no connection; after a minute without a sign of life it counts as gone.
_IDLE_SECONDS, _PROBE_SECONDS, _PROBES = 30, 10, 3


def end_with_launch() -> None:
    """Ties this process to the `launch` that started it; does nothing where none did.

    Raises:
        ConfigError: `launch` cannot be reached.
    """
    place = os.environ.pop(LIFELINE_VARIABLE, None)
    if place is None:
        return
    address, _, port = place.rpartition(":")
    address = address or os.environ["SSH_CONNECTION"].split()[0]
    try:
        connection = socket.create_connection((address, int(port)), timeout=_CONNECT_SECONDS)
    except OSError as error:
        raise ConfigError(
            f"{socket.gethostname()} cannot reach `moe-testbed launch` at {address}, port {port} ({error}): if it "
            "still runs there, let the hosts open connections to it, or start it on one of the hosts"
        ) from None
    connection.settimeout(None)
    _notice_silence(connection)
    threading.Thread(target=_follow, args=(connection,), name="lifeline", daemon=True).start()


def _notice_silence(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)


def _follow(connection: socket.socket) -> None:
    try:
        while received := connection.recv(1):
            os.kill(os.getpid(), received[0])
    except OSError:
        pass
    os.kill(os.getpid(), signal.SIGKILL)
