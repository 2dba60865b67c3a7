"""The command's end of the control API, with the standard library alone."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from vbus import rundir
from vbus.errors import Error, NoSuchNameError, UsageError

TIMEOUT = 30.0
Row = dict[str, Any]


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fspath(self._path))


class BusClient:
    """A running bus. It raises what the bus raises: NoSuchNameError, UsageError; and Error when it does not answer."""

    def __init__(self, name: str, path: Path, timeout: float = TIMEOUT) -> None:
        self.name = name
        self.path = path
        self.timeout = timeout

    def __repr__(self) -> str:
        return f"<BusClient {self.name}>"

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """One call; the answer's JSON."""
        connection = _Connection(self.path, self.timeout)
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            data = response.read()
            answer = json.loads(data)
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise Error(f"bus {self.name} does not answer: {why}") from error
        finally:
            connection.close()
        if response.status < 400:
            return answer
        raise self._problem(response, answer)

    def _problem(self, response: http.client.HTTPResponse, answer: Any) -> Error:
        problem = answer if isinstance(answer, dict) else {}
        text = str(problem.get("error", f"bus {self.name} answers {response.status} {response.reason}"))
        match problem.get("kind"):
            case "no-such-name":
                return NoSuchNameError(text)
            case "usage" | "too-large":
                return UsageError(text)
        return Error(text)

    def stream(self, path: str, begun: Callable[[], None]) -> Iterator[Row]:
        """A call whose answer goes on, a line of JSON each, until the bus ends it. `begun` is called at the first."""
        connection = _Connection(self.path, self.timeout)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            if response.status >= 400:
                raise self._problem(response, json.loads(response.read()))
            # From now on nobody says when something comes.
            connection.sock.settimeout(None)
            for line in response:
                if line.strip():
                    yield json.loads(line)
                else:
                    begun()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Error(f"bus {self.name} is gone: {getattr(error, 'strerror', None) or error}") from error
        finally:
            connection.close()

    def info(self) -> Row:
        """The bus and its process."""
        row: Row = self.request("GET", "/v1/bus")
        return row

    def devices(self) -> list[Row]:
        """One row a device."""
        rows: list[Row] = self.request("GET", "/v1/devices")
        return rows

    def show(self, device: str) -> Row:
        """Everything about a device."""
        row: Row = self.request("GET", f"/v1/devices/{quote(device, safe='')}")
        return row

    def stat(self, device: str | None = None) -> list[Row]:
        """One row a queue."""
        query = f"?{urlencode({'device': device})}" if device is not None else ""
        rows: list[Row] = self.request("GET", f"/v1/stat{query}")
        return rows

    def connectors(self) -> list[Row]:
        """One row a connector."""
        rows: list[Row] = self.request("GET", "/v1/connectors")
        return rows

    def connect(self, kind: str, name: str | None = None, **rest: Any) -> Row:
        """Make a connector; its row. `rest`: options, directory."""
        row: Row = self.request("POST", "/v1/connectors", {"type": kind, "name": name, **rest})
        return row

    def disconnect(self, connector: str) -> None:
        """Take a connector away."""
        self.request("DELETE", f"/v1/connectors/{quote(connector, safe='')}")

    def channels(self) -> list[Row]:
        """One row a channel."""
        rows: list[Row] = self.request("GET", "/v1/channels")
        return rows

    def say(self, channel: str, data: bytes) -> int:
        """Say something on a channel; how many drivers took it."""
        row: Row = self.request("POST", f"/v1/channels/{quote(channel, safe='')}/events", {"hex": data.hex()})
        return int(row["drivers"])

    def watch(self, channel: str, begun: Callable[[], None] = lambda: None) -> Iterator[Row]:
        """What is said on a channel, until it is closed; nothing is missed from the call of `begun` on."""
        return self.stream(f"/v1/channels/{quote(channel, safe='')}/events", begun)

    def members(self) -> list[Row]:
        """One row a member."""
        rows: list[Row] = self.request("GET", "/v1/members")
        return rows

    def set_member(self, member: str, values: Mapping[str, str]) -> Row:
        """Set limits of a member; their new values."""
        row: Row = self.request("PATCH", f"/v1/members/{quote(member, safe='')}/limits", dict(values))
        return row

    def plug(self, kind: str, name: str | None = None, **rest: Any) -> Row:
        """Plug a device; its row. `rest`: options, directory, priority, uuid, mask."""
        row: Row = self.request("POST", "/v1/devices", {"type": kind, "name": name, **rest})
        return row

    def unplug(self, device: str, *, surprise: bool = False) -> Row:
        """Unplug a device."""
        query = "?surprise=true" if surprise else ""
        row: Row = self.request("DELETE", f"/v1/devices/{quote(device, safe='')}{query}")
        return row

    def set(self, device: str, values: Mapping[str, str]) -> Row:
        """Set attributes; their new values."""
        row: Row = self.request("PATCH", f"/v1/devices/{quote(device, safe='')}/attributes", dict(values))
        return row


def running() -> list[BusClient]:
    """The buses of this user that run, by name."""
    return [BusClient(name, path) for name, path in rundir.running()]
