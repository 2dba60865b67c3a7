"""The proxy: the bus as a driver sees it.

`attach` gives a `Remote`, which holds `RemoteDevice`s; drivers are in `vbus.proxy.drivers`. The proxy shares only the
specification's data, the messages and the shared-memory parts with the device side, never the bus itself.
"""

from vbus.proxy.attach import attach
from vbus.proxy.driver import Driver
from vbus.proxy.queue import RemoteQueue
from vbus.proxy.remote import Remote, RemoteDevice

__all__ = ["Driver", "Remote", "RemoteDevice", "RemoteQueue", "attach"]
