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

_ASK_TO_STOP = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
# Ranks get SIGTERM from deepspeed as well, when one of them has died.
_PASSED_ON_AS = signal.SIGUSR1
_CUT_SECONDS = 5.0


@dataclass(frozen=True)
class End:
    """Says how deepspeed came to its end.

    Attributes:
        code: its exit status; negative for the signal that killed it.
        asked: a signal has asked the training to stop.
        all_gone: every rank that had connected is known to have ended.
        first_gone: address of the rank that ended first, if the others had to be ended for not following it.
    """

    code: int
    asked: bool
    all_gone: bool
    first_gone: str | None


class Lifelines:
    """Holds the ends of the ranks' connections that are `launch`'s; see launcher/ranks/lifeline.py.

    Args:
        everywhere: other hosts may connect, not this one only.
        num_ranks: how many are to connect.
    """

    def __init__(self, everywhere: bool, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._socket = _listen(everywhere)
        self.port: int = self._socket.getsockname()[1]
        self._held: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}
        self._passed_on: int | None = None
        self._num_seen = 0
        self._first_gone: str | None = None
        self._incomplete = asyncio.Event()

    async def open(self) -> None:
        """Lets ranks connect."""
        self._server = await asyncio.start_server(self._hold, sock=self._socket)

    def pass_on(self, number: int) -> None:
        """Gives all ranks a signal, those that connect later too."""
        self._passed_on = number
        for writer in self._held.values():
            writer.write(bytes([number]))

    async def outlived(self, seconds: float) -> str | None:
        """Waits until a rank has ended, and then so long for the others to follow.

        Returns:
            Address of the rank that ended first.
        """
        while True:
            await self._incomplete.wait()
            await asyncio.sleep(seconds)
            if self._incomplete.is_set():
                return self._first_gone

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
        self._num_seen += 1
        self._count()
        if self._passed_on is not None:
            writer.write(bytes([self._passed_on]))
        with contextlib.suppress(OSError):
            # Ranks send nothing: this is the wait for the end of one.
            await reader.read()
        del self._held[task]
        if self._first_gone is None:
            peer = writer.get_extra_info("peername")
            # An IPv4 address that came by an IPv6 socket is a longer one there.
            self._first_gone = peer[0].removeprefix("::ffff:") if peer else None
        self._count()
        writer.close()

    def _count(self) -> None:
        # Others than ranks may come and go, such as who looks for open ports.
        if len(self._held) < self._num_ranks <= self._num_seen:
            self._incomplete.set()
        else:
            self._incomplete.clear()


def _listen(everywhere: bool) -> socket.socket:
    if not everywhere:
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def supervise(
    command: Sequence[str], environment: Mapping[str, str], lifelines: Lifelines, patience_seconds: float
) -> End:
    """Runs deepspeed to its end. Signals that ask to stop are passed on; a Ctrl-C after one ends all at once.

    Args:
        patience_seconds: how long ranks may outlive the first of them. Over ssh deepspeed ends those of the same host
            only, and the others could wait for it until they give up joining.
    """
    return asyncio.run(_supervise(command, environment, lifelines, patience_seconds))


async def _supervise(
    command: Sequence[str], environment: Mapping[str, str], lifelines: Lifelines, patience_seconds: float
) -> End:
    await lifelines.open()
    asked = False
    leader: int | None = None

    def hear(number: signal.Signals) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            _kill_group(leader)
            return
        lifelines.pass_on(_PASSED_ON_AS)
        asked = True
        print("asked to stop: the ranks write a checkpoint first; Ctrl-C ends them at once", file=sys.stderr)

    loop = asyncio.get_running_loop()
    for number in _ASK_TO_STOP:
        # As nohup sets it.
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, hear, number)
    # In a session of its own, so that Ctrl-C reaches the ranks by their lifelines only.
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
    )
    leader = process.pid
    ended = asyncio.create_task(process.wait())
    outlived = asyncio.create_task(lifelines.outlived(patience_seconds))
    try:
        await asyncio.wait((ended, outlived), return_when=asyncio.FIRST_COMPLETED)
        first_gone = None if ended.done() else outlived.result()
    finally:
        outlived.cancel()
        all_gone = await lifelines.cut()
        _kill_group(leader)
    return End(await ended, asked, all_gone, first_gone)


def _kill_group(leader: int | None) -> None:
    if leader is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)
