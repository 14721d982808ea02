"""Runs deepspeed to its end: passes signals on to the ranks, and leaves none of them behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_PASSED_ON_AS = {
    signal.SIGINT: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
}
_CUT_SECONDS = 5.0


@dataclass(frozen=True)
class End:
    """How deepspeed came to its end.

    Attributes:
        code: its exit status; negative for the signal that killed it.
        asked: a signal has asked the training to stop.
        all_gone: every rank that had connected is known to have ended.
    """

    code: int
    asked: bool
    all_gone: bool


class Lifelines:
    """The ends that `launch` holds of the ranks' connections; see launcher/lifeline.py.

    Args:
        everywhere: other hosts may connect, not this one only.
    """

    def __init__(self, everywhere: bool) -> None:
        self._socket = _listen(everywhere)
        self.port: int = self._socket.getsockname()[1]
        self._held: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}
        self._passed_on: int | None = None

    async def open(self) -> None:
        """Lets ranks connect."""
        self._server = await asyncio.start_server(self._hold, sock=self._socket)

    def pass_on(self, number: int) -> None:
        """Gives all ranks a signal, those that connect later too."""
        self._passed_on = number
        for writer in self._held.values():
            writer.write(bytes([number]))

    async def cut(self) -> bool:
        """Ends all ranks.

        Returns:
            Whether all are known to have ended.
        """
        self._server.close()
        for writer in self._held.values():
            with contextlib.suppress(OSError):
                writer.write_eof()
        tasks = [*self._held]
        if tasks:
            await asyncio.wait(tasks, timeout=_CUT_SECONDS)
        all_gone = not self._held
        for writer in self._held.values():
            writer.transport.abort()
        if tasks:
            await asyncio.wait(tasks)
        return all_gone

    async def _hold(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._held[task] = writer
        if self._passed_on is not None:
            writer.write(bytes([self._passed_on]))
        with contextlib.suppress(OSError):
            # Ranks send nothing: this is the wait for the end of one.
            await reader.read()
        del self._held[task]
        writer.close()


def _listen(everywhere: bool) -> socket.socket:
    if not everywhere:
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def supervise(command: Sequence[str], environment: Mapping[str, str], lifelines: Lifelines) -> End:
    """Runs deepspeed to its end. Signals that ask to stop are passed on; a Ctrl-C after one ends all at once."""
    return asyncio.run(_supervise(command, environment, lifelines))


async def _supervise(command: Sequence[str], environment: Mapping[str, str], lifelines: Lifelines) -> End:
    await lifelines.open()
    asked = False
    leader: int | None = None

    def hear(number: signal.Signals) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            _kill_group(leader)
            return
        lifelines.pass_on(_PASSED_ON_AS[number])
        asked = True
        print("asked to stop: the ranks write a checkpoint first; Ctrl-C ends them at once", file=sys.stderr)

    loop = asyncio.get_running_loop()
    for number in _PASSED_ON_AS:
        # As nohup sets it.
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, hear, number)
    # In a session of its own, so that Ctrl-C reaches the ranks by their lifelines only.
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
    )
    leader = process.pid
    try:
        code = await process.wait()
    finally:
        all_gone = await lifelines.cut()
        _kill_group(leader)
    return End(code, asked, all_gone)


def _kill_group(leader: int | None) -> None:
    if leader is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)
