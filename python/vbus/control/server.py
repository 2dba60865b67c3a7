"""Serving the control API: a thread of the bus's process, with an event loop of its own.

The socket's file keeps others out already; who is at the other end is asked of the kernel once more for every
connection, so that a socket whose permissions were changed lets in nobody else.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from types import TracebackType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vbus.bus import Bus, peer_credentials
from vbus.control.api import make_app
from vbus.errors import Error
from vbus.rundir import BusDirectory

MAX_CONNECTIONS = 64
STOP_SECONDS = 2
"""How long answers that are being written may take when the server stops."""
START_SECONDS = 30
STRANGER_SECONDS = 5
"""How long somebody who may not connect may keep the line."""


class Control:
    """The directory, the lock and the control API of a bus. A context manager."""

    def __init__(self, bus: Bus, directory: BusDirectory | None = None, *, owner: int | None = None) -> None:
        """UsageError when a bus of this name is running already. `owner` is who may connect, besides root."""
        self._bus = bus
        self._directory = directory if directory is not None else BusDirectory(bus.name)
        self._owner = os.geteuid() if owner is None else owner
        self._thread: threading.Thread | None = None
        self._server: uvicorn.Server | None = None

    def start(self) -> None:
        """Serve. When this returns, connections are answered."""
        try:
            sock = self._directory.listen()
        except BaseException:
            self._directory.release()
            raise
        server = uvicorn.Server(
            uvicorn.Config(
                make_app(self._bus),
                loop="asyncio",
                http=_protocol({0, self._owner}),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_graceful_shutdown=STOP_SECONDS,
            )
        )
        # In a thread that is not the main one, uvicorn leaves the signals alone.
        thread = threading.Thread(
            target=lambda: asyncio.run(server.serve(sockets=[sock])), name=f"control {self._bus.name}", daemon=True
        )
        thread.start()
        self._server, self._thread = server, thread
        deadline = time.monotonic() + START_SECONDS
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                self.stop()
                raise Error(f"the control API of bus {self._bus.name} does not start: see the log")
            time.sleep(0.005)

    def stop(self) -> None:
        """Stop serving, and give the directory back."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(STOP_SECONDS + 3)
        self._server = self._thread = None
        self._directory.release()

    def __enter__(self) -> Control:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _protocol(allowed: set[int]) -> type[asyncio.Protocol]:
    """The protocol of uvicorn, for those users only."""

    class OwnerProtocol(H11Protocol):
        """Answers others with 403, whatever they ask."""

        refusal = b""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            sock: Any = transport.get_extra_info("socket")
            who = peer_credentials(sock)
            if who is None or who.uid not in allowed:
                self.refusal = _refusal(str(who or "somebody unknown"))
                self.loop.call_later(STRANGER_SECONDS, transport.close)

        def data_received(self, data: bytes) -> None:
            if not self.refusal:
                super().data_received(data)
            elif not self.transport.is_closing():
                # Only now: who is still sending when the line is closed may never read the answer.
                self.transport.write(self.refusal)
                self.transport.close()

    return OwnerProtocol


def _refusal(who: str) -> bytes:
    problem = {"error": f"{who} may not control this bus: only its owner and root may", "kind": "not-allowed"}
    body = json.dumps(problem).encode()
    head = "HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
