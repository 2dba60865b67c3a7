"""Peers that say anything at all, in any order: nothing of it may surprise the bus.

Every message of the protocol, with values that are often nearly right, from several peers at once over shared memory
and streams, while devices come and go. The bus must answer or part; an exception in a turn is a defect, and is logged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import random
import threading
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import vbus
from models import AsyncEcho, Echo, EchoDriver, Lamp
from test_hostile_peers import RawPeer, dial
from vbus import msg
from vbus.bus import Bus
from vbus.shmem.area import sealed_memfd
from vbus.shmem.channels import ChannelRings

ROUNDS = 60
MESSAGES = 60
NUMBERS = (0, 1, 2, 3, 4, 7, 8, 11, 15, 16, 64, 128, 255, 256, 4096, 0x10000, 0x11000, 2**31, 2**32 - 1)

FATAL = (msg.Hello, msg.MemoryAdd, msg.MemoryRemove, msg.Doorbell, msg.Data, msg.ChannelCredit, msg.ChannelMemory)
"""What a bus parts from a peer for when it is wrong: seldom said, so that conversations last."""


def value(chance: random.Random, kind: Any) -> Any:
    """A value for a field of this type."""
    if kind is int:
        return chance.choice(NUMBERS)
    if kind is bytes:
        return chance.randbytes(chance.choice((0, 1, 4, 16, 300)))
    if kind is str:
        return chance.choice(("", "x", "echo", "n" * 63))
    if kind is UUID:
        return UUID(int=chance.getrandbits(128))
    return tuple(chance.choice((0, 1, 3, 2**32 - 1)) for _ in range(chance.randrange(4)))


def some_message(chance: random.Random) -> bytes:
    """Any message of the protocol, as often as not one that makes sense."""
    while True:
        row = chance.choice(msg.TABLE)
        if row[2] in FATAL and chance.random() < 0.97:
            continue
        cls = chance.choice([c for c in (row[2], row[4]) if c is not None] + [row[2]] * 3)
        hints = typing.get_type_hints(cls)
        fields = {field.name: value(chance, hints[field.name]) for field in dataclasses.fields(cls)}
        if cls is msg.SetDeviceStatus:
            fields["status"] = chance.choice((0, 1, 3, 11, 15, 15, 255))
        if cls is msg.SetDriverFeatures:
            # VERSION_1; with RING_RESET, with packed rings, or with all that there is.
            high = chance.choice((1, 0x101, 0x105, 0x10D))
            fields |= {"block_index": 0, "num_blocks": 2, "features": (chance.choice((0, 3, 1 << 28, 1 << 29)), high)}
        for length in ("length", "num_blocks"):
            if length in fields and chance.random() < 0.9:
                fields[length] = len(fields.get("data", fields.get("features", b"")))
        try:
            frame = msg.Frame(cls(**fields), chance.choice((0, 1, 1, 2, 2, 3, 9)), chance.choice((0, 1, 1, 500)))
            return msg.encode(frame)
        except ValueError:
            continue


def over_shared_memory(path: Path, chance: random.Random) -> None:
    """One peer with an area, which shares memory, rings bells and talks."""
    peer = RawPeer(path)
    try:
        peer.sock.settimeout(1)
        rings = ChannelRings(peer.area, device_side=False)
        rings.speak(peer.area.sender(peer.bells[2:10], to_device=True))
        peer.link.send(msg.encode(msg.Frame(msg.Hello(1, 65535, 0), 0, 1)))
        fd = sealed_memfd("random", 1 << 16)
        with contextlib.suppress(OSError):
            for cookie in range(chance.randrange(5)):
                peer.send_fd(fd, cookie)
        os.close(fd)
        for _ in range(MESSAGES):
            data = some_message(chance)
            if chance.random() < 0.02:
                data = bytes(chance.choice((b ^ 1, b)) for b in data[:6]) + data[6:]
            if chance.random() < 0.3:
                # Where only channels should speak.
                rings.send(chance.randrange(8), data)
            else:
                peer.link.send(data)
            if chance.random() < 0.3:
                chance.choice(peer.bells).ring()
            list(peer.link.receive())
    finally:
        peer.close()


def over_a_stream(dial: Callable[[], Any], chance: random.Random) -> None:
    """One peer at the far end of a stream, which may leave in the middle of a word."""
    with dial() as sock:
        sock.settimeout(0.2)
        data = msg.encode(msg.Frame(msg.Hello(1, 65535, 0), 0, 1))
        data += b"".join(some_message(chance) for _ in range(MESSAGES))
        with contextlib.suppress(OSError):
            sock.sendall(data[: chance.choice((len(data), len(data), chance.randrange(len(data))))])
            while sock.recv(65536) and chance.random() < 0.5:
                pass


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_nothing_that_peers_say_surprises_the_bus(
    seed: int, make_bus: Callable[..., Bus], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bus = make_bus()
    for name, device in (("echo", Echo()), ("lamp", Lamp()), ("async", AsyncEcho())):
        bus.plug(device, name)
    for name in ("x", "echo"):
        bus.open_channel(name, memory=4096, relay=True)
    shared = bus.connect(vbus.connectors.Process(tmp_path / "a.sock"), "a")
    direct = bus.connect(vbus.connectors.Process(tmp_path / "b.sock", signal="direct"), "b")
    stream = bus.connect(vbus.connectors.Stream("tcp:127.0.0.1:0"), "c")
    paths = [Path(c.address.removeprefix("process:")) for c in (shared, direct)]
    failed: list[BaseException] = []

    def run(number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        for _ in range(ROUNDS):
            # What the bus does to such a peer is its right; what it must not do is seen at the end.
            with contextlib.suppress(OSError, vbus.Violation, vbus.DriverError):
                if number == 2:
                    over_a_stream(lambda: dial(stream), chance)
                else:
                    over_shared_memory(paths[number], chance)

    def guarded(number: int) -> None:
        try:
            run(number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(3)]
    with caplog.at_level(logging.ERROR):
        for thread in threads:
            thread.start()
        n = 0
        while any(thread.is_alive() for thread in threads):
            bus.plug(Echo(), f"guest{n}")
            bus.get("lamp", Lamp).level = n
            bus.unplug(f"guest{n}", surprise=n % 2 == 0, timeout=2)
            n += 1
        for thread in threads:
            thread.join()
        assert failed == []
        for address in (shared.address, direct.address, stream.address):
            with vbus.attach(address, timeout=20) as remote:
                for name in ("echo", "async"):
                    driver = remote.driver(name, EchoDriver)
                    assert driver.echo(b"still here") == b"still here"
                    driver.close()
    surprises = [record for record in caplog.records if record.name in ("vbus.pool", "vbus.proxy")]
    assert [record.getMessage() + str(record.exc_info) for record in surprises] == []
