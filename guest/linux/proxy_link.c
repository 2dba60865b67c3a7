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
 * A message is copied before anybody looks at it, and lengths are those of the copy. Both counters
 * are kept here too, and the own one is never read back.
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
/* A reader that has taken so much rings back: a sender may wait for room. */
#define RING_BACK	(VBUS_LINK_BYTES / 4)

/* A question that waits, on the stack of whoever asks. */
struct call {
	struct list_head list;
	struct completion done;
	struct vbus_request *request;
	u16 token;
	int result;
};

static u32 aligned(size_t size)
{
	return ALIGN(size, 8);
}

/* Sending. */

static void put(struct vbus_link_ring *ring, u32 *tail, const void *data, size_t size)
{
	u32 at = *tail % VBUS_LINK_BYTES;
	size_t first = min_t(size_t, size, VBUS_LINK_BYTES - at);

	memcpy(ring->data + at, data, first);
	memcpy(ring->data, data + first, size - first);
	*tail += size;
}

/* Bytes that find room now; an error when the head cannot be true. */
static int room(struct vbus_link *link)
{
	/* What the reader read before it moved its head is not written over before that is seen. */
	u32 head = le32_to_cpu(virt_load_acquire(&link->out->head));
	u32 used = link->tail - head;

	if (used > VBUS_LINK_BYTES || used % 8)
		return -EPROTO;
	return VBUS_LINK_BYTES - used;
}

/* Put one message into the ring, which has room. */
static void put_message(struct vbus_proxy *proxy, const struct vbus_msg *header, const void *body,
			size_t size, const void *more, size_t more_size)
{
	struct vbus_link *link = &proxy->link;
	u32 start = link->tail, tail = start;

	put(link->out, &tail, header, sizeof(*header));
	put(link->out, &tail, body, size);
	put(link->out, &tail, more, more_size);
	link->tail = start + aligned(tail - start);
	/* Whoever sees the new tail sees the message. */
	virt_store_release(&link->out->tail, cpu_to_le32(link->tail));
	proxy->connector->ops->ring_link(proxy->connector);
}

static bool has_room(struct vbus_link *link, u32 size, int *err)
{
	int free = room(link);

	*err = READ_ONCE(link->lost) ? -ENODEV : min(free, 0);
	return *err || free >= size;
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
	mutex_lock(&link->send_lock);
	if (!wait_event_timeout(link->room, has_room(link, aligned(size), &err),
				answer_seconds * HZ))
		err = -ETIMEDOUT;
	if (!err)
		put_message(proxy, &header, request->body, request->size, request->more,
			    request->more_size);
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
	if (room(link) >= (int)aligned(sizeof(header) + size))
		put_message(proxy, &header, message + 1, size, NULL, 0);
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

static void get(const struct vbus_link_ring *ring, u32 head, void *data, size_t size)
{
	u32 at = head % VBUS_LINK_BYTES;
	size_t first = min_t(size_t, size, VBUS_LINK_BYTES - at);

	memcpy(data, ring->data + at, first);
	memcpy(data + first, ring->data, size - first);
}

/* The next message, copied; NULL when there is none, an error when what is there cannot be. */
static const struct vbus_msg *next_message(struct vbus_link *link)
{
	/* The bytes below it are those of messages. */
	u32 tail = le32_to_cpu(virt_load_acquire(&link->in->tail));
	u32 available = tail - link->head;
	struct vbus_msg *message = (void *)link->message;
	u16 size;

	if (available > VBUS_LINK_BYTES || available % 8)
		return ERR_PTR(-EPROTO);
	if (!available)
		return NULL;
	get(link->in, link->head, message, sizeof(*message));
	/* From here on the length is the copy's, whatever the ring says meanwhile. */
	barrier();
	size = le16_to_cpu(message->size);
	if (size < sizeof(*message) || size > VBUS_MAX_MSG || aligned(size) > available)
		return ERR_PTR(-EPROTO);
	get(link->in, link->head + sizeof(*message), message + 1, size - sizeof(*message));
	barrier();
	link->head += aligned(size);
	link->taken_since_ring += aligned(size);
	/* The copy is complete before the bus may write over it. */
	virt_store_release(&link->in->head, cpu_to_le32(link->head));
	return message;
}

static void link_work(struct work_struct *work)
{
	struct vbus_link *link = container_of(work, struct vbus_link, work);
	struct vbus_proxy *proxy = container_of(link, struct vbus_proxy, link);
	const struct vbus_msg *message;
	const char *wrong;
	int count;

	for (count = 0; !READ_ONCE(link->lost) && !READ_ONCE(proxy->broken); count++) {
		if (count == READ_BUDGET) {
			queue_work(system_highpri_wq, &link->work);
			break;
		}
		message = next_message(link);
		if (!message)
			break;
		wrong = IS_ERR(message) ? "a message that cannot be" : heard(proxy, message);
		if (wrong) {
			vbus_broken(proxy, wrong);
			return;
		}
	}
	if (link->taken_since_ring >= RING_BACK) {
		link->taken_since_ring = 0;
		proxy->connector->ops->ring_link(proxy->connector);
	}
}

void vbus_link_interrupt(struct vbus_proxy *proxy)
{
	wake_up(&proxy->link.room);
	queue_work(system_highpri_wq, &proxy->link.work);
}

/* The beginning and the end. */

int vbus_link_init(struct vbus_proxy *proxy, const struct vbus_layout *layout)
{
	struct vbus_link *link = &proxy->link;

	link->out = proxy->area + layout->link_to_device;
	link->in = proxy->area + layout->link_to_driver;
	mutex_init(&link->send_lock);
	init_waitqueue_head(&link->room);
	INIT_WORK(&link->work, link_work);
	spin_lock_init(&link->calls_lock);
	INIT_LIST_HEAD(&link->calls);
	link->message = kmalloc(VBUS_MAX_MSG, GFP_KERNEL);
	return link->message ? 0 : -ENOMEM;
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
	kfree(proxy->link.message);
}
