"""Attaching to a bus: from an address to a `Remote` that knows its devices."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vbus import address as addresses
from vbus import msg
from vbus.errors import UsageError
from vbus.proxy.connector import GuestConnector
from vbus.proxy.loop import Loop
from vbus.proxy.remote import Remote

REVISION = 1
MAX_MESSAGE = 65528


def attach(
    address: str,
    *,
    timeout: float = 5.0,
    certificate: Path | str | None = None,
    key: Path | str | None = None,
    authority: Path | str | None = None,
    server_name: str | None = None,
    device_id: int | None = None,
    name: str | None = None,
    signal: Literal["direct", "in-band"] = "direct",
    queues: int | None = None,
    config_size: int | None = None,
    mac: bytes | None = None,
) -> Remote:
    """Attach to the bus at `address`, and discover: process:PATH or a bare path, unix:PATH, ivshmem:PATH,
    tcp:HOST:PORT, tls:HOST:PORT.

    Or be the front-end of the one device behind `vhost-user:PATH`, whose protocol does not tell everything: its class
    (`device_id`, which must be given); what to call it (`name`, else as the socket); how many of its queues, or of
    a network's pairs, to use at most (`queues`); how long config space is, in bytes up to 256, where its class does not
    say (`config_size`); a network's address (`mac`, 6 bytes, else one of chance). Queues are signalled by eventfds
    (`direct`) or by messages (`in-band`).

    `timeout` is how many seconds any answer may take. TLS takes files: the own `certificate` and `key`, and the
    `authority` that has signed the bus's, whose name must be HOST or `server_name`. UsageError for no address, or files
    that are none; DriverError when the bus is not there (ENOENT, ECONNREFUSED), does not let this process in or is not
    who it should be (EACCES), or does not answer (ETIMEDOUT).
    """
    where = addresses.parse(address)
    told = {"device_id": device_id, "name": name, "queues": queues, "config_size": config_size, "mac": mac}
    if where.kind != "vhost-user" and (signal != "direct" or any(value is not None for value in told.values())):
        raise UsageError(f"{address}: {', '.join(told)} and signal are for vhost-user:PATH")
    context = None
    if where.kind == "tls":
        from vbus.tls import client_context

        context = client_context(certificate, key, authority)
    elif any(value is not None for value in (certificate, key, authority, server_name)):
        raise UsageError(f"{address}: certificate, key, authority and server_name are for tls:HOST:PORT")
    loop = Loop("driver")
    connector: GuestConnector | None = None
    try:
        # Each environment's connector is imported when it is wanted.
        if where.kind == "process":
            from vbus.proxy.connectors.process import ProcessConnector

            connector = ProcessConnector(where.path, loop, timeout)
        elif where.kind == "ivshmem":
            from vbus.proxy.connectors.ivshmem import Function, IvshmemConnector

            connector = IvshmemConnector(Function(where.path, timeout), loop)
        elif where.kind == "vhost-user":
            from vbus.proxy.connectors.vhost_user import FrontEndOptions, VhostUserConnector

            if device_id is None:
                raise UsageError(f"{address}: say which class of device is there, as device_id=vbus.DeviceID.BLOCK")
            options = FrontEndOptions(device_id, name, signal, queues, config_size, mac)
            connector = VhostUserConnector(where.path, loop, timeout, options)
        else:
            from vbus.proxy.connectors.stream import StreamConnector

            connector = StreamConnector(where, loop, timeout, context, server_name)
        hello = connector.call(msg.Hello(REVISION, MAX_MESSAGE, 0), msg.HelloResponse)
        connector.max_message = min(MAX_MESSAGE, hello.max_msg_size)
        connector.accept(hello)
        remote = Remote(connector, hello)
        remote.discover()
    except BaseException:
        if connector is not None:
            connector.close()
        else:
            loop.close()
        raise
    return remote
