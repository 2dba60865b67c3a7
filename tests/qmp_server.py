"""A QMP socket without QEMU: it answers what it is told to, or does not."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

GREETING = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}, "capabilities": []}}


def backend(size: int, **more: Any) -> dict[str, Any]:
    """A row of `query-memdev`: shared memory `mem`."""
    return {"id": "mem", "size": size, "share": True, "host-nodes": [], "merge": True, "policy": "default", **more}


def tree(*ranges: tuple[int, int, int]) -> str:
    """What `info mtree -f -o` says of `mem` at (address, size, offset)."""
    lines = [
        f"  {address:016x}-{address + size - 1:016x} (prio 0, ram): mem{f' @{offset:016x}' if offset else ''} "
        "owner:{obj path=/objects/mem}"
        for address, size, offset in ranges
    ]
    head = ["FlatView #0", ' AS "memory", root: system', " Root memory region: system"]
    return "".join(f"{line}\n" for line in [*head, *lines, ""])


class QmpServer:
    """Serves one client after the other, for a `with` block.

    `answers` by command; by `COMMAND PROPERTY` for `qom-get`. What has no answer is an error; None is never answered.
    """

    def __init__(self, path: Path, answers: Mapping[str, Any]) -> None:
        self.answers = dict(answers)
        self.asked: list[str] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._client: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, name="is no QEMU", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sock in (self._listener, self._client):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()

    def tell(self, event: Mapping[str, Any]) -> None:
        """Tell the client of now, who has shaken hands, an event."""
        assert self._client is not None
        stamp = {"timestamp": {"seconds": 1, "microseconds": 0}}
        self._client.sendall(json.dumps(dict(event) | stamp).encode() + b"\n")

    @property
    def is_free(self) -> bool:
        """Whether nobody is connected."""
        return self._client is None

    def _serve(self) -> None:
        while True:
            try:
                self._client, _ = self._listener.accept()
            except OSError:
                return
            with self._client, contextlib.suppress(OSError, ValueError):
                self._talk(self._client)
            self._client = None

    def _talk(self, client: socket.socket) -> None:
        def say(message: dict[str, Any], asked: Mapping[str, Any]) -> None:
            token = {"id": asked["id"]} if "id" in asked else {}
            client.sendall(json.dumps(message | token).encode() + b"\n")

        say(self.answers.get("greeting", GREETING), {})
        for asked in _messages(client):
            command, arguments = asked["execute"], asked.get("arguments", {})
            self.asked.append(command)
            key = f"{command} {arguments['property']}" if command == "qom-get" else command
            if command == "qmp_capabilities":
                say({"return": {}}, asked)
            elif key not in self.answers:
                say({"error": {"class": "GenericError", "desc": f"no {key}"}}, asked)
            elif self.answers[key] is not None:
                say({"return": self.answers[key]}, asked)


def _messages(client: socket.socket) -> Iterator[dict[str, Any]]:
    """What a client says, until it is gone: JSON, with or without an end of the line behind it."""
    said, decoder = "", json.JSONDecoder()
    while data := client.recv(1 << 16):
        said = (said + data.decode()).lstrip()
        while said:
            try:
                message, end = decoder.raw_decode(said)
            except json.JSONDecodeError:
                break
            said = said[end:].lstrip()
            yield message
