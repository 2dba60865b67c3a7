"""Attaching to a bus: from an address to a `Remote` that knows its devices."""

from __future__ import annotations

from vbus import address as addresses
from vbus import msg
from vbus.proxy.connector import GuestConnector
from vbus.proxy.loop import Loop
from vbus.proxy.remote import Remote

REVISION = 1
MAX_MESSAGE = 65528


def attach(address: str, *, timeout: float = 5.0) -> Remote:
    """Attach to the bus at `address` (process:PATH, a bare path, unix:PATH, tcp:HOST:PORT) and discover its devices.

    `timeout` is how many seconds any answer may take. UsageError for no address; DriverError when the bus is not there
    (ENOENT, ECONNREFUSED), does not let this process in (EACCES), or does not answer (ETIMEDOUT).
    """
    where = addresses.parse(address)
    loop = Loop("driver")
    connector: GuestConnector | None = None
    try:
        # Each environment's connector is imported when it is wanted.
        if where.kind == "process":
            from vbus.proxy.connectors.process import ProcessConnector

            connector = ProcessConnector(where.path, loop, timeout)
        else:
            from vbus.proxy.connectors.stream import StreamConnector

            connector = StreamConnector(where, loop, timeout)
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
