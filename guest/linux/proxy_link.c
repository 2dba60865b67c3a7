// SPDX-License-Identifier: GPL-2.0-only
/*
 * Messages: the two rings of the link, questions and their answers.
 *
 * Whoever asks puts a message into the ring towards the device and sleeps. A work item, which the
 * link's interrupt starts, takes the messages out of the other ring, wakes whoever asked, and
 * passes on what the bus says by itself.
 *
 *	vbus_ask()  --> ring to device --> doorbell            the device's side answers
 *	    sleeps <--- complete() <------ link_work() <------ interrupt
 *
 * A question that is asked on a channel travels in the ring of the channel's priority instead
 * (proxy_lanes.c); its answer comes here.
 */
#include <linux/jiffies.h>
#include <linux/module.h>
#include <linux/slab.h>

#include "proxy.h"

static unsigned int answer_seconds = 60;
module_param(answer_seconds, uint, 0644);
MODULE_PARM_DESC(answer_seconds, "Seconds that the bus may take for an answer");

/* Messages that are handled before others who want the processor have their turn. */
#define READ_BUDGET	64

/* A question that waits, on the stack of whoever asks. */
struct call {
	struct list_head list;
	struct completion done;
	struct vbus_request *request;
	u16 token;
	int result;
};

/* Sending. */

/* Whether there is nothing to wait for: room, or an error. */
static bool has_room(struct vbus_link *link, size_t size, int *err)
{
	int room = vbus_out_has_room(&link->out, size);

	*err = READ_ONCE(link->lost) ? -ENODEV : min(room, 0);
	return *err || room;
}

static int send(struct vbus_proxy *proxy, struct vbus_request *request, u16 token)
{
	struct vbus_link *link = &proxy->link;
	size_t size = sizeof(struct vbus_msg) + request->size + request->more_size;
	struct vbus_msg header = {
		.type = request->bus ? VBUS_MSG_BUS : 0,
		.id = request->id,
		.dev_num = cpu_to_le16(request->dev_num),
		.token = cpu_to_le16(token),
		.size = cpu_to_le16(size),
	};
	int err;

	if (size > READ_ONCE(proxy->max_msg))
		return -EMSGSIZE;
	if (request->lane)
		return vbus_lane_send_waiting(request->lane, &header, request->body, request->size,
					      answer_seconds * HZ);
	mutex_lock(&link->send_lock);
	if (!wait_event_timeout(link->room, has_room(link, size, &err), answer_seconds * HZ))
		err = -ETIMEDOUT;
	if (!err) {
		vbus_out_put(&link->out, &header, request->body, request->size, request->more,
			     request->more_size);
		proxy->connector->ops->ring_link(proxy->connector);
	}
	mutex_unlock(&link->send_lock);
	return err;
}

/* Asking. */

static bool token_is_free(struct vbus_link *link, u16 token)
{
	struct call *call;

	list_for_each_entry(call, &link->calls, list)
		if (call->token == token)
			return false;
	return token != 0;
}

static int begin(struct vbus_link *link, struct call *call)
{
	int err = 0;

	init_completion(&call->done);
	spin_lock(&link->calls_lock);
	if (link->lost) {
		err = -ENODEV;
	} else {
		do {
			link->token++;
		} while (!token_is_free(link, link->token));
		call->token = link->token;
		list_add_tail(&call->list, &link->calls);
	}
	spin_unlock(&link->calls_lock);
	return err;
}

/*
 * The result, if there is one yet. With the lock held: whoever completes a call takes it off the
 * list.
 */
static void finish(struct call *call, int result)
{
	list_del_init(&call->list);
	call->result = result;
	complete(&call->done);
}

/**
 * vbus_ask() - ask the bus, and wait for the answer
 * @proxy: the bus
 * @request: the question, and room for the answer
 *
 * Return: bytes of the answer's body, or an error: what the bus refused with, -ENODEV when it or
 * the device is gone, -ETIMEDOUT, -EPROTO for an answer that cannot be.
 */
int vbus_ask(struct vbus_proxy *proxy, struct vbus_request *request)
{
	struct vbus_link *link = &proxy->link;
	struct call call = { .request = request, .result = -ETIMEDOUT };
	int err;

	err = begin(link, &call);
	if (err)
		return err;
	err = send(proxy, request, call.token);
	if (!err && !wait_for_completion_timeout(&call.done, answer_seconds * HZ))
		err = -ETIMEDOUT;
	spin_lock(&link->calls_lock);
	/* Still there: the answer has not come, and shall find nobody from now on. */
	if (!list_empty(&call.list))
		list_del(&call.list);
	else
		err = call.result;
	spin_unlock(&link->calls_lock);
	return err;
}

int vbus_device_ask(struct vbus_device *device, struct vbus_request *request)
{
	if (READ_ONCE(device->gone))
		return -ENODEV;
	request->dev_num = device->number;
	return vbus_ask(device->proxy, request);
}
EXPORT_SYMBOL_GPL(vbus_device_ask);

/* For connectors, about the bus itself. */
int vbus_proxy_ask(struct vbus_proxy *proxy, struct vbus_request *request)
{
	return vbus_ask(proxy, request);
}
EXPORT_SYMBOL_GPL(vbus_proxy_ask);

/* Hearing. */

static struct call *call_of(struct vbus_link *link, u16 token)
{
	struct call *call;

	list_for_each_entry(call, &link->calls, list)
		if (call->token == token)
			return call;
	return NULL;
}

static int answer(const struct vbus_request *request, const struct vbus_msg *message, size_t size)
{
	bool bus = message->type & VBUS_MSG_BUS;

	if (message->id != request->id || bus != request->bus ||
	    le16_to_cpu(message->dev_num) != request->dev_num)
		return -EPROTO;
	if (size < request->least || size > request->room)
		return -EPROTO;
	memcpy(request->answer, message + 1, size);
	return size;
}

static int refusal(const struct vbus_msg *message, size_t size)
{
	const struct vbus_error *error = (const void *)(message + 1);
	u32 number;

	if (size < sizeof(*error))
		return -EPROTO;
	number = le32_to_cpu(error->errno_);
	return number && number <= MAX_ERRNO ? -(int)number : -EPROTO;
}

/* Nobody waits any more when the question took too long; that is no mistake of the bus. */
static void answered(struct vbus_link *link, const struct vbus_msg *message, size_t size,
		     bool refused)
{
	struct call *call;

	spin_lock(&link->calls_lock);
	call = call_of(link, le16_to_cpu(message->token));
	if (call && refused)
		finish(call, refusal(message, size));
	else if (call)
		finish(call, answer(call->request, message, size));
	spin_unlock(&link->calls_lock);
}

/*
 * Without waiting for room: whoever waited here would keep the answers from those who wait for
 * them.
 */
static void pong(struct vbus_proxy *proxy, const struct vbus_msg *message, size_t size)
{
	struct vbus_link *link = &proxy->link;
	struct vbus_msg header = *message;

	header.type |= VBUS_MSG_RESPONSE;
	if (!mutex_trylock(&link->send_lock))
		return;
	if (vbus_out_has_room(&link->out, sizeof(header) + size) > 0) {
		vbus_out_put(&link->out, &header, message + 1, size, NULL, 0);
		proxy->connector->ops->ring_link(proxy->connector);
	}
	mutex_unlock(&link->send_lock);
}

static const char *heard_of_bus(struct vbus_proxy *proxy, const struct vbus_msg *message,
				size_t size)
{
	const struct vbus_event_device *event = (const void *)(message + 1);

	switch (message->id) {
	case VBUS_PING:
		if (size != sizeof(__le32))
			return "a malformed PING";
		pong(proxy, message, size);
		return NULL;
	case VBUS_EVENT_DEVICE:
		if (size != sizeof(*event))
			return "a malformed EVENT_DEVICE";
		vbus_discovery_event(proxy, le16_to_cpu(event->dev_num), le16_to_cpu(event->state));
		return NULL;
	case VBUS_EVENT_CHANNELS:
		if (size)
			return "a malformed EVENT_CHANNELS";
		vbus_channels_changed(proxy);
		return NULL;
	case VBUS_CHANNEL_CLOSED:
		/* Where the ring of its priority had no room for it. */
		return vbus_ends_heard(proxy, message);
	case VBUS_ERROR:
		if (!message->token)
			return "the bus does not let this side in";
		answered(&proxy->link, message, size, true);
		return NULL;
	default:
		return NULL;
	}
}

static const char *heard_of_device(struct vbus_proxy *proxy, const struct vbus_msg *message,
				   size_t size)
{
	const struct vbus_event_config *event = (const void *)(message + 1);

	if (message->id != VBUS_EVENT_CONFIG)
		return NULL;
	if (size < sizeof(*event))
		return "a malformed EVENT_CONFIG";
	vbus_discovery_config(proxy, le16_to_cpu(message->dev_num), le32_to_cpu(event->status),
			      le32_to_cpu(event->generation));
	return NULL;
}

/*
 * What is wrong with a message, if anything is. Events of kinds that are not known here are not
 * looked at.
 */
static const char *heard(struct vbus_proxy *proxy, const struct vbus_msg *message)
{
	size_t size = le16_to_cpu(message->size) - sizeof(*message);

	if (message->type & ~(VBUS_MSG_RESPONSE | VBUS_MSG_BUS))
		return "a message of a kind that is not known";
	if (message->type & VBUS_MSG_RESPONSE) {
		answered(&proxy->link, message, size, false);
		return NULL;
	}
	if (message->type & VBUS_MSG_BUS)
		return heard_of_bus(proxy, message, size);
	return heard_of_device(proxy, message, size);
}

static void link_work(struct work_struct *work)
{
	struct vbus_link *link = container_of(work, struct vbus_link, work);
	struct vbus_proxy *proxy = container_of(link, struct vbus_proxy, link);
	const char *wrong;
	int count, found;

	for (count = 0; !READ_ONCE(link->lost) && !READ_ONCE(proxy->broken); count++) {
		if (count == READ_BUDGET) {
			queue_work(link->queue, &link->work);
			break;
		}
		found = vbus_in_next(&link->in, link->message);
		if (!found)
			break;
		wrong = found < 0 ? "a message that cannot be" : heard(proxy, link->message);
		if (wrong) {
			vbus_broken(proxy, wrong);
			return;
		}
	}
	if (vbus_in_made_room(&link->in))
		proxy->connector->ops->ring_link(proxy->connector);
}

void vbus_link_interrupt(struct vbus_proxy *proxy)
{
	wake_up(&proxy->link.room);
	queue_work(proxy->link.queue, &proxy->link.work);
}

/* The beginning and the end. */

static void free_link(struct vbus_link *link)
{
	if (link->queue)
		destroy_workqueue(link->queue);
	kfree(link->message);
}

int vbus_link_init(struct vbus_proxy *proxy, const struct vbus_layout *layout)
{
	struct vbus_link *link = &proxy->link;

	link->out.ring = proxy->area + layout->link_to_device;
	link->in.ring = proxy->area + layout->link_to_driver;
	mutex_init(&link->send_lock);
	init_waitqueue_head(&link->room);
	INIT_WORK(&link->work, link_work);
	spin_lock_init(&link->calls_lock);
	INIT_LIST_HEAD(&link->calls);
	link->message = kmalloc(VBUS_MAX_MSG, GFP_KERNEL);
	/*
	 * Not of this processor: it may be held by a driver that looks for an answer again and
	 * again, whose device is said to be gone here.
	 */
	link->queue = alloc_workqueue("vbus%d-link", WQ_UNBOUND | WQ_HIGHPRI, 1, proxy->id);
	if (link->message && link->queue)
		return 0;
	free_link(link);
	return -ENOMEM;
}

/* The bus is gone: whoever waits for an answer, or for room, waits no more. */
void vbus_link_lost(struct vbus_proxy *proxy)
{
	struct vbus_link *link = &proxy->link;
	struct call *call, *next;

	spin_lock(&link->calls_lock);
	WRITE_ONCE(link->lost, true);
	list_for_each_entry_safe(call, next, &link->calls, list)
		finish(call, -ENODEV);
	spin_unlock(&link->calls_lock);
	wake_up_all(&link->room);
}

/* A device is gone: what was asked about it will not be answered. */
void vbus_link_forget(struct vbus_proxy *proxy, u16 dev_num)
{
	struct vbus_link *link = &proxy->link;
	struct call *call, *next;

	spin_lock(&link->calls_lock);
	list_for_each_entry_safe(call, next, &link->calls, list)
		if (call->request->dev_num == dev_num)
			finish(call, -ENODEV);
	spin_unlock(&link->calls_lock);
}

/* No interrupt comes any more, and nobody asks. */
void vbus_link_stop(struct vbus_proxy *proxy)
{
	vbus_link_lost(proxy);
	cancel_work_sync(&proxy->link.work);
	free_link(&proxy->link);
}
