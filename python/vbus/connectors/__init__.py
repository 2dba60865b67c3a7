"""The host connectors: each lets the drivers of one environment reach a bus.

A connector is a Link (control messages), a Memory (the driver's buffers) and a Signal ("look at this queue"), put
together from the parts in `vbus.msg` and `vbus.shmem`. `CONNECTORS` names them for files and commands.
"""

from vbus.bus import Connector
from vbus.connectors.ivshmem import Ivshmem
from vbus.connectors.process import Process
from vbus.connectors.stream import Stream
from vbus.connectors.vhost_user import VhostUser

CONNECTORS: dict[str, type[Connector]] = {cls.type_name: cls for cls in (Process, Stream, VhostUser, Ivshmem)}

__all__ = ["CONNECTORS", "Ivshmem", "Process", "Stream", "VhostUser"]
