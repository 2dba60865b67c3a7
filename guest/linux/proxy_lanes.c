// SPDX-License-Identifier: GPL-2.0-only
/*
 * Lanes: what is said on channels travels apart from the link, in a ring each way for each of eight
 * priorities, so that what is urgent waits for no bulk.
 *
 *	write() --> ring of the priority --> event of its source --> the device's side reads
 *	read() <--- inbox of an end <------- work item <------------ event of its source
 *
 * An event of a lane's source says that there are messages, or that there is room again for a
 * sender that found none. One work item reads all lanes, a message at a time, each time from the
 * most urgent one that has any.
 */
#include <linux/slab.h>

#include "proxy.h"

/* The sources of channels live as long as the area: there is no reset. */
#define GENERATION	1
/* Messages that are read before others who want the processor have their turn. */
#define READ_BUDGET	64

static struct vbus_proxy *proxy_of(struct vbus_lane *lane)
{
	return lane->queue.proxy;
}

/* Sending. */

static int has_room(struct vbus_lane *lane, size_t size)
{
	int room = vbus_out_has_room(&lane->out, size);

	if (room)
		return room;
	WRITE_ONCE(lane->wanted, true);
	/*
	 * Either this look sees what was taken meanwhile, or whoever hears of that sees that room
	 * is wanted.
	 */
	virt_mb();
	return vbus_out_has_room(&lane->out, size);
}

/**
 * vbus_lane_send() - send a message on a lane
 * @lane: the lane
 * @header: the message
 * @body: what follows @header
 * @size: bytes of @body
 *
 * In process context, also where it must not sleep. Never waits.
 *
 * Return: 0; -EAGAIN when there is no room now: vbus_ends_room() is called when there is.
 */
int vbus_lane_send(struct vbus_lane *lane, const struct vbus_msg *header, const void *body,
		   size_t size)
{
	int room;

	spin_lock(&lane->lock);
	room = has_room(lane, sizeof(*header) + size);
	if (room > 0)
		vbus_out_put(&lane->out, header, body, size, NULL, 0);
	spin_unlock(&lane->lock);
	if (room < 0)
		vbus_broken(proxy_of(lane), "a head of a ring of channels that cannot be");
	if (room <= 0)
		return -EAGAIN;
	vbus_queue_signal(&lane->queue);
	return 0;
}

static bool is_sent(struct vbus_lane *lane, const struct vbus_msg *header, const void *body,
		    size_t size, int *err)
{
	*err = READ_ONCE(proxy_of(lane)->link.lost) ? -ENODEV :
	       vbus_lane_send(lane, header, body, size);
	return *err != -EAGAIN;
}

/* The same, and wait for room. -ETIMEDOUT, -ENODEV when the bus is gone. */
int vbus_lane_send_waiting(struct vbus_lane *lane, const struct vbus_msg *header, const void *body,
			   size_t size, long timeout)
{
	int err;

	if (!wait_event_timeout(lane->room, is_sent(lane, header, body, size, &err), timeout))
		return -ETIMEDOUT;
	return err;
}

/* Receiving. */

static void heard(struct vbus_queue *queue)
{
	struct vbus_lanes *lanes = &queue->proxy->lanes;

	set_bit(queue->priority, &lanes->due);
	queue_work(system_highpri_wq, &lanes->work);
}

/* Somebody may have waited for room: the device's side took something, or said something. */
static void made_room(struct vbus_lane *lane)
{
	wake_up_all(&lane->room);
	/* A full fence, as in has_room(). */
	if (xchg(&lane->wanted, false))
		vbus_ends_room(proxy_of(lane), lane->queue.priority);
}

/* Take one message of a lane; whether there was one. */
static bool take(struct vbus_lane *lane, struct vbus_msg *message)
{
	struct vbus_proxy *proxy = proxy_of(lane);
	const char *wrong = NULL;
	int found;

	found = vbus_in_next(&lane->in, message);
	if (found < 0)
		wrong = "a message on a channel that cannot be";
	else if (found && message->type != VBUS_MSG_BUS)
		wrong = "a message that does not belong on a channel";
	else if (found)
		wrong = vbus_ends_heard(proxy, message);
	if (wrong)
		vbus_broken(proxy, wrong);
	else if (found && vbus_in_made_room(&lane->in))
		vbus_queue_signal(&lane->queue);
	return found > 0 && !wrong;
}

static void lanes_work(struct work_struct *work)
{
	struct vbus_lanes *lanes = container_of(work, struct vbus_lanes, work);
	struct vbus_proxy *proxy = container_of(lanes, struct vbus_proxy, lanes);
	unsigned long fresh = 0, due;
	unsigned int priority;
	int count;

	for (count = 0; count < READ_BUDGET && !READ_ONCE(proxy->broken); count++) {
		/* The bits, before the look at the rings: whatever comes later sets them again. */
		due = xchg(&lanes->due, 0);
		for_each_set_bit(priority, &due, VBUS_PRIORITIES)
			made_room(&lanes->lane[priority]);
		fresh |= due;
		if (!fresh)
			return;
		priority = __ffs(fresh);
		if (!take(&lanes->lane[priority], lanes->message))
			__clear_bit(priority, &fresh);
	}
	if (READ_ONCE(proxy->broken))
		return;
	for_each_set_bit(priority, &fresh, VBUS_PRIORITIES)
		set_bit(priority, &lanes->due);
	queue_work(system_highpri_wq, &lanes->work);
}

/* The beginning and the end. */

int vbus_lanes_init(struct vbus_proxy *proxy, const struct vbus_layout *layout)
{
	struct vbus_lanes *lanes = &proxy->lanes;
	unsigned int i;

	INIT_WORK(&lanes->work, lanes_work);
	for (i = 0; i < VBUS_PRIORITIES; i++) {
		struct vbus_lane *lane = &lanes->lane[i];
		u64 ring = i * sizeof(struct vbus_link_ring);

		lane->queue.proxy = proxy;
		lane->queue.heard = heard;
		lane->queue.source = layout->max_sources - VBUS_CHANNEL_SOURCES + i;
		lane->queue.generation = GENERATION;
		lane->queue.priority = i;
		spin_lock_init(&lane->queue.lock);
		spin_lock_init(&lane->lock);
		lane->out.ring = proxy->area + layout->channels_to_device + ring;
		lane->in.ring = proxy->area + layout->channels_to_driver + ring;
		init_waitqueue_head(&lane->room);
	}
	lanes->message = kmalloc(VBUS_MAX_MSG, GFP_KERNEL);
	return lanes->message ? 0 : -ENOMEM;
}

/*
 * Before HELLO: what is signalled before anybody listens is lost. No vector is taken for that: see
 * vbus_end_open().
 */
int vbus_lanes_open(struct vbus_proxy *proxy)
{
	unsigned int i;
	int err = 0;

	for (i = 0; i < VBUS_PRIORITIES && !err; i++)
		err = vbus_queue_listen(&proxy->lanes.lane[i].queue);
	return err;
}

/* The bus is gone: nobody waits for room. */
void vbus_lanes_lost(struct vbus_proxy *proxy)
{
	unsigned int i;

	for (i = 0; i < VBUS_PRIORITIES; i++)
		wake_up_all(&proxy->lanes.lane[i].room);
}

/* Nobody sends any more. */
void vbus_lanes_stop(struct vbus_proxy *proxy)
{
	unsigned int i;

	for (i = 0; i < VBUS_PRIORITIES; i++)
		vbus_queue_close(&proxy->lanes.lane[i].queue);
	/* What was heard is over, and starts no work any more. */
	synchronize_rcu();
	cancel_work_sync(&proxy->lanes.work);
	kfree(proxy->lanes.message);
}
