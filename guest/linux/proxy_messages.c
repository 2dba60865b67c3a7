// SPDX-License-Identifier: GPL-2.0-only
/*
 * Rings of messages: the link has one each way, and so have the channels of each priority.
 *
 * A message lies whole in its ring, at a multiple of 8 bytes, and may wrap around the end. Both
 * counters are kept here too, and the own one is never read back. A message is copied before
 * anybody looks at it, and lengths are those of the copy.
 */
#include "proxy.h"

static u32 aligned(size_t size)
{
	return ALIGN(size, 8);
}

static void put(struct vbus_link_ring *ring, u32 *tail, const void *data, size_t size)
{
	u32 at = *tail % VBUS_LINK_BYTES;
	size_t first = min_t(size_t, size, VBUS_LINK_BYTES - at);

	memcpy(ring->data + at, data, first);
	memcpy(ring->data, data + first, size - first);
	*tail += size;
}

static void get(const struct vbus_link_ring *ring, u32 head, void *data, size_t size)
{
	u32 at = head % VBUS_LINK_BYTES;
	size_t first = min_t(size_t, size, VBUS_LINK_BYTES - at);

	memcpy(data, ring->data + at, first);
	memcpy(data + first, ring->data, size - first);
}

/* Whether a message of @size bytes finds room now; an error when the head cannot be true. */
int vbus_out_has_room(const struct vbus_out *out, size_t size)
{
	/* What the reader read before it moved its head is not written over before that is seen. */
	u32 head = le32_to_cpu(virt_load_acquire(&out->ring->head));
	u32 used = out->tail - head;

	if (used > VBUS_LINK_BYTES || used % 8)
		return -EPROTO;
	return aligned(size) <= VBUS_LINK_BYTES - used;
}

/* Put one message into a ring that has room: a header, and what follows it in two parts. */
void vbus_out_put(struct vbus_out *out, const struct vbus_msg *header, const void *body,
		  size_t size, const void *more, size_t more_size)
{
	u32 start = out->tail, tail = start;

	put(out->ring, &tail, header, sizeof(*header));
	put(out->ring, &tail, body, size);
	put(out->ring, &tail, more, more_size);
	out->tail = start + aligned(tail - start);
	/* Whoever sees the new tail sees the message. */
	virt_store_release(&out->ring->tail, cpu_to_le32(out->tail));
}

/**
 * vbus_in_next() - take the next message out of a ring
 * @in: the ring
 * @message: room for VBUS_MAX_MSG bytes
 *
 * Return: 1, 0 when there is none, an error when what is there cannot be.
 */
int vbus_in_next(struct vbus_in *in, struct vbus_msg *message)
{
	/* The bytes below it are those of messages. */
	u32 tail = le32_to_cpu(virt_load_acquire(&in->ring->tail));
	u32 available = tail - in->head;
	u16 size;

	if (available > VBUS_LINK_BYTES || available % 8)
		return -EPROTO;
	if (!available)
		return 0;
	get(in->ring, in->head, message, sizeof(*message));
	/* From here on the length is the copy's, whatever the ring says meanwhile. */
	barrier();
	size = le16_to_cpu(message->size);
	if (size < sizeof(*message) || size > VBUS_MAX_MSG || aligned(size) > available)
		return -EPROTO;
	get(in->ring, in->head + sizeof(*message), message + 1, size - sizeof(*message));
	barrier();
	in->head += aligned(size);
	in->taken += aligned(size);
	/* The copy is complete before the bus may write over it. */
	virt_store_release(&in->ring->head, cpu_to_le32(in->head));
	return 1;
}

/* Whether so much was taken that the sender, who may wait for room, is to be told. */
bool vbus_in_made_room(struct vbus_in *in)
{
	if (in->taken < VBUS_LINK_BYTES / 4)
		return false;
	in->taken = 0;
	return true;
}
