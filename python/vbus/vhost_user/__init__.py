"""The vhost-user protocol as data: what its two ends say to each other, and how that is carried.

`messages` has the requests, their payloads and feature bits; `codec` makes bytes of them and back; `wire` reads whole
messages with their descriptors off a socket. The front-end (a hypervisor) has the driver and its memory; the back-end
serves the device.
"""
