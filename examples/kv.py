"""A key-value service over one event channel: keys and values go through the region that each client shares with it.

    python examples/kv.py serve ./kv.sock
    python examples/kv.py put ./kv.sock colour green
    python examples/kv.py get ./kv.sock colour

A request is an event (what to do, and the lengths of key and value) about bytes that lie at the region's beginning; the
answer is an event too. A client may write anything into its region, at any time: the service reads it once, and checks.
"""

from __future__ import annotations

import struct
import sys
import threading

import vbus
from vbus.channel import Event

REGION = 64 << 10
MOST = 1000
REQUEST = struct.Struct("<cHI")
"""What to do (g: get, p: put), the key's length, the value's length."""


class Store:
    """What clients have put, up to so many keys."""

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}

    def answer(self, event: Event) -> None:
        """Do what an event asks for; whatever it says is answered."""
        try:
            event.reply(self._do(event))
        except (struct.error, ValueError) as error:
            event.reply(b"!" + str(error).encode())

    def _do(self, event: Event) -> bytes:
        verb, key_size, value_size = REQUEST.unpack(event.data)
        if key_size + value_size > REGION:
            raise ValueError("too long")
        data = bytes(event.end.memory[: key_size + value_size])
        key, value = data[:key_size], data[key_size:]
        if verb == b"p":
            if key not in self._values and len(self._values) >= MOST:
                raise ValueError("full")
            self._values[key] = value
            return b"+"
        if verb == b"g":
            found = self._values.get(key)
            if found is None:
                raise ValueError("no such key")
            event.end.memory[: len(found)] = found
            return b"=" + struct.pack("<I", len(found))
        raise ValueError("neither get nor put")


def serve(path: str, stop: threading.Event) -> None:
    """Serve until `stop` is set."""
    with vbus.Bus("kv") as bus:
        bus.open_channel("kv", memory=REGION).on_event(Store().answer)
        print(f"serving at {bus.connect(vbus.connectors.Process(path)).address}", flush=True)
        stop.wait()


def ask(path: str, verb: bytes, key: bytes, value: bytes = b"") -> bytes:
    """Get or put. LookupError when the service says no."""
    with vbus.attach(path) as remote, remote.open_channel("kv") as channel:
        channel.memory[: len(key) + len(value)] = key + value
        channel.send(REQUEST.pack(verb, len(key), len(value)))
        answer = channel.receive(timeout=10)
        if answer is None or answer.data[:1] == b"!":
            raise LookupError("no answer" if answer is None else answer.data[1:].decode())
        size = struct.unpack("<I", answer.data[1:])[0] if answer.data[:1] == b"=" else 0
        return bytes(channel.memory[:size])


def main(verb: str, path: str, *words: str) -> None:
    """What was typed."""
    if verb == "serve":
        serve(path, threading.Event())
    elif verb == "put":
        ask(path, b"p", *(word.encode() for word in words))
    else:
        print(ask(path, b"g", words[0].encode()).decode())


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        pass
    except LookupError as error:
        sys.exit(f"kv: {error}")
