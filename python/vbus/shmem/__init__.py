"""virtio-shmem: the part that every connector with shared memory uses, from both of its sides.

`area` lays the shared bytes out, `link` carries messages through them, `handshake` passes descriptors over a socket.
The event rings themselves run once per event and are native: `vbus._core.EventSender` and `EventReceiver`.
"""
