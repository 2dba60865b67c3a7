"""The bus model and the device-model framework: what no environment should have to invent again.

`Bus` holds devices in slots; `Device`, `Queue` and `attribute` are what a device author writes; `Connector` and
`Attachment` are what a connector author fulfils. Nothing here knows any device or any connector.
"""

from vbus.bus.bus import Bus, check_name, identity
from vbus.bus.channel import Channel, ChannelExistsError, ChannelTakenError, NoSuchChannelError
from vbus.bus.connector import Connector
from vbus.bus.device import Device, attribute, attributes_of
from vbus.bus.limits import Account, reserve_all
from vbus.bus.members import Credentials, Members, peer_credentials
from vbus.bus.pool import Actor, Pool, shared_pool
from vbus.bus.queue import Queue, Request
from vbus.bus.slot import Attachment, InUseError, RefusedError, Ring, Slot
from vbus.bus.workers import Engine, Workers

__all__ = [
    "Account",
    "Actor",
    "Attachment",
    "Bus",
    "Channel",
    "ChannelExistsError",
    "ChannelTakenError",
    "Connector",
    "Credentials",
    "Device",
    "Engine",
    "InUseError",
    "Members",
    "NoSuchChannelError",
    "Pool",
    "Queue",
    "RefusedError",
    "Request",
    "Ring",
    "Slot",
    "Workers",
    "attribute",
    "attributes_of",
    "check_name",
    "identity",
    "peer_credentials",
    "reserve_all",
    "shared_pool",
]
