"""vbus: a virtual bus for virtio."""
