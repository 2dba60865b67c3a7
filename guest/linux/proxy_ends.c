// SPDX-License-Identifier: GPL-2.0-only
/*
 * Ends: channels that are open, each with what was said on it and was not read yet.
 *
 * An end begins with CHANNEL_OPEN, when the first program opens the channel's file, and has a
 * number, by which messages name it. Files that are opened meanwhile share it. It is over
 *
 *	when the last file is closed	CHANNEL_CLOSE, behind all that was said, by a work item
 *	when the bus closes the channel	CHANNEL_CLOSED, behind all that was said there
 *	with the session
 *
 * From then on it uses nothing of the bus (@closed), and lives as long as files have it.
 *
 * The window is the flow control. Each side counts what its events cost: what this side sent and
 * the other side has not consumed yet, and what came and this side has not told to be read. A
 * credit tells that, when it is half a window; whoever does not read hears no more, and costs one
 * window of memory.
 */
#include <linux/mm.h>
#include <linux/slab.h>

#include "proxy_channels.h"

/* The largest window that a bus may give: so much may be kept here for a channel. */
#define MAX_WINDOW	65536

/* An end under its number, or the next one from there on; with a reference. */
static struct vbus_end *next_end(struct vbus_proxy *proxy, unsigned long *number)
{
	struct vbus_end *end;

	rcu_read_lock();
	do {
		end = xa_find(&proxy->channels.ends, number, U32_MAX, XA_PRESENT);
	} while (end && !refcount_inc_not_zero(&end->refs));
	rcu_read_unlock();
	return end;
}

static struct vbus_end *end_of(struct vbus_proxy *proxy, u32 number)
{
	unsigned long at = number;
	struct vbus_end *end = next_end(proxy, &at);

	if (!end || at == number)
		return end;
	vbus_end_put(end);
	return NULL;
}

#define for_each_end(proxy, number, end)						\
	for ((number) = 0; ((end) = next_end(proxy, &(number)));			\
	     vbus_end_put(end), (number)++)

void vbus_end_put(struct vbus_end *end)
{
	struct vbus_said *said, *next;

	if (!refcount_dec_and_test(&end->refs))
		return;
	list_for_each_entry_safe(said, next, &end->said, list)
		kfree(said);
	if (end->remains)
		__free_page(end->remains);
	put_device(&end->channel->dev);
	kfree_rcu(end, rcu);
}

/* Speaking. All of it with the lock held, and the end not closed. */

static int speak(struct vbus_end *end, u8 id, const void *body, size_t size)
{
	struct vbus_msg header = {
		.type = VBUS_MSG_BUS,
		.id = id,
		.size = cpu_to_le16(sizeof(header) + size),
	};

	return vbus_lane_send(&end->proxy->lanes.lane[end->priority], &header, body, size);
}

static void give_credit(struct vbus_end *end)
{
	struct vbus_channel_credit body = {
		.channel = cpu_to_le32(end->number),
		.consumed = cpu_to_le32(end->consumed),
	};

	end->owing = speak(end, VBUS_CHANNEL_CREDIT, &body, sizeof(body)) < 0;
	if (!end->owing)
		end->told = end->consumed;
}

static u32 outstanding(const struct vbus_end *end)
{
	return end->sent - end->credited;
}

/*
 * Say something: the number, and @size bytes behind it. -EAGAIN when there is no room now, in the
 * window or in the lane.
 */
int vbus_end_say(struct vbus_end *end, const struct vbus_channel_number *body, size_t size)
{
	int err = -EAGAIN;

	spin_lock(&end->lock);
	if (end->closed) {
		err = -ENODEV;
	} else if (outstanding(end) < end->window) {
		err = speak(end, VBUS_CHANNEL_EVENT, body, sizeof(*body) + size);
		end->refused = err < 0;
		if (!err) {
			end->sent += size + VBUS_EVENT_COST;
			atomic64_inc(&end->channel->sent);
		}
	}
	spin_unlock(&end->lock);
	return err;
}

bool vbus_end_is_writable(struct vbus_end *end)
{
	bool writable;

	spin_lock(&end->lock);
	writable = end->closed || (!end->refused && outstanding(end) < end->window);
	spin_unlock(&end->lock);
	return writable;
}

/* There is room in a lane again: credits that are owed go first. */
void vbus_ends_room(struct vbus_proxy *proxy, unsigned int priority)
{
	struct vbus_end *end;
	unsigned long number;
	bool wake;

	for_each_end(proxy, number, end) {
		spin_lock(&end->lock);
		wake = !end->closed && end->priority == priority && end->refused;
		if (wake)
			end->refused = false;
		if (!end->closed && end->priority == priority && end->owing)
			give_credit(end);
		spin_unlock(&end->lock);
		if (wake)
			wake_up_interruptible(&end->wait);
	}
}

/* Reading. */

/*
 * The next event, which is the caller's. NULL: there is none yet. -EMSGSIZE: it has more than
 * @room bytes, and stays. -ENODEV: none comes any more.
 */
struct vbus_said *vbus_end_take(struct vbus_end *end, size_t room)
{
	struct vbus_said *said;

	spin_lock(&end->lock);
	said = list_first_entry_or_null(&end->said, struct vbus_said, list);
	if (said && said->size > room) {
		said = ERR_PTR(-EMSGSIZE);
	} else if (said) {
		list_del(&said->list);
		end->waiting--;
	} else if (end->closed) {
		said = ERR_PTR(-ENODEV);
	}
	spin_unlock(&end->lock);
	return said;
}

/* It could not be given to whoever reads. */
void vbus_end_untake(struct vbus_end *end, struct vbus_said *said)
{
	spin_lock(&end->lock);
	list_add(&said->list, &end->said);
	end->waiting++;
	spin_unlock(&end->lock);
	wake_up_interruptible(&end->wait);
}

void vbus_end_consumed(struct vbus_end *end, struct vbus_said *said)
{
	spin_lock(&end->lock);
	end->consumed += said->size + VBUS_EVENT_COST;
	if (!end->closed && !end->owing && end->consumed - end->told >= end->window / 2)
		give_credit(end);
	spin_unlock(&end->lock);
	kfree(said);
}

bool vbus_end_is_readable(struct vbus_end *end)
{
	bool readable;

	spin_lock(&end->lock);
	readable = end->closed || end->waiting;
	spin_unlock(&end->lock);
	return readable;
}

/* Closing. */

/* Whether the end was open. */
static bool mark_closed(struct vbus_end *end)
{
	bool was_open = !end->closed;

	WRITE_ONCE(end->closed, true);
	return was_open;
}

/* Nobody waits any more, and what is mapped is nobody's. */
static void settle_closed(struct vbus_end *end)
{
	wake_up_interruptible_all(&end->wait);
	vbus_end_unmap(end);
}

/* The bus does not know the number any more. */
static void forget(struct vbus_proxy *proxy, struct vbus_end *end)
{
	xa_erase(&proxy->channels.ends, end->number);
	vbus_end_put(end);
}

/* The other side, or the session, ended it. */
static void close_end(struct vbus_proxy *proxy, struct vbus_end *end)
{
	bool was_open;

	spin_lock(&end->lock);
	was_open = mark_closed(end);
	spin_unlock(&end->lock);
	if (was_open) {
		settle_closed(end);
		forget(proxy, end);
	}
}

/* This side ends it, unless it is over. */
void vbus_end_leave(struct vbus_end *end)
{
	bool was_open;

	spin_lock(&end->lock);
	was_open = mark_closed(end);
	if (was_open) {
		atomic_inc(&end->channel->leaving);
		/* The bus ends only when all ends are closed, and waits for this work then. */
		queue_work(end->proxy->channels.queue, &end->leave);
	}
	spin_unlock(&end->lock);
	if (was_open)
		settle_closed(end);
}

static void leave_work(struct work_struct *work)
{
	struct vbus_end *end = container_of(work, struct vbus_end, leave);
	struct vbus_channel *channel = end->channel;
	struct vbus_proxy *proxy = end->proxy;
	struct vbus_channel_number body = { .channel = cpu_to_le32(end->number) };
	struct vbus_request request = {
		.id = VBUS_CHANNEL_CLOSE,
		.bus = true,
		.body = &body,
		.size = sizeof(body),
		.lane = &proxy->lanes.lane[end->priority],
	};

	if (vbus_ask(proxy, &request) == -ETIMEDOUT)
		vbus_broken(proxy, "it does not let a channel be closed");
	if (atomic_dec_and_test(&channel->leaving))
		wake_up_interruptible_all(&channel->left);
	forget(proxy, end);
}

/* The session is over. */
void vbus_ends_lost(struct vbus_proxy *proxy)
{
	struct vbus_end *end;
	unsigned long number;

	for_each_end(proxy, number, end)
		close_end(proxy, end);
}

/* No channel is opened any more. Afterwards nothing of an end uses the bus. */
void vbus_ends_stop(struct vbus_proxy *proxy)
{
	struct vbus_end *end;
	unsigned long number;

	for_each_end(proxy, number, end)
		vbus_end_leave(end);
	flush_workqueue(proxy->channels.queue);
}

/* Hearing. */

static const char *arrived(struct vbus_end *end, const u8 *data, size_t size)
{
	struct vbus_said *said;
	bool fits;

	said = kmalloc(struct_size(said, data, size), GFP_KERNEL);
	if (!said) {
		/* Not a single event is lost in the middle of others. */
		vbus_end_leave(end);
		return NULL;
	}
	said->size = size;
	memcpy(said->data, data, size);
	spin_lock(&end->lock);
	fits = end->received - end->told < end->window;
	if (fits && !end->closed) {
		end->received += size + VBUS_EVENT_COST;
		list_add_tail(&said->list, &end->said);
		end->waiting++;
		atomic64_inc(&end->channel->received);
		said = NULL;
	}
	spin_unlock(&end->lock);
	kfree(said);
	wake_up_interruptible(&end->wait);
	return fits ? NULL : "more on a channel than its window takes";
}

static const char *credited(struct vbus_end *end, u32 consumed)
{
	bool possible;

	spin_lock(&end->lock);
	possible = consumed - end->credited <= outstanding(end);
	if (possible)
		end->credited = consumed;
	spin_unlock(&end->lock);
	wake_up_interruptible(&end->wait);
	return possible ? NULL : "more was consumed on a channel than was sent";
}

static const char *heard(struct vbus_proxy *proxy, struct vbus_end *end,
			 const struct vbus_msg *message, size_t size)
{
	const struct vbus_channel_number *number = (const void *)(message + 1);
	const struct vbus_channel_credit *credit = (const void *)(message + 1);

	switch (message->id) {
	case VBUS_CHANNEL_EVENT:
		return arrived(end, (const u8 *)(number + 1), size - sizeof(*number));
	case VBUS_CHANNEL_CREDIT:
		return credited(end, le32_to_cpu(credit->consumed));
	default:
		close_end(proxy, end);
		return NULL;
	}
}

/* Whether a message about a channel may have so many bytes behind its header. */
static bool is_size(const struct vbus_msg *message, size_t size)
{
	const size_t number = sizeof(struct vbus_channel_number);

	switch (message->id) {
	case VBUS_CHANNEL_EVENT:
		return size >= number && size <= number + VBUS_MAX_EVENT;
	case VBUS_CHANNEL_CREDIT:
		return size == sizeof(struct vbus_channel_credit);
	case VBUS_CHANNEL_CLOSED:
		return size >= number;
	default:
		return false;
	}
}

/* What is wrong with a message about a channel, if anything is. What names none is old. */
const char *vbus_ends_heard(struct vbus_proxy *proxy, const struct vbus_msg *message)
{
	const struct vbus_channel_number *number = (const void *)(message + 1);
	size_t size = le16_to_cpu(message->size) - sizeof(*message);
	const char *wrong = NULL;
	struct vbus_end *end;

	if (!is_size(message, size))
		return "a message on a channel that is none";
	end = end_of(proxy, le32_to_cpu(number->channel));
	if (end) {
		wrong = heard(proxy, end, message, size);
		vbus_end_put(end);
	}
	return wrong;
}

/* Opening. */

static int ask_to_open(struct vbus_end *end, struct vbus_channel_open_answer *answer)
{
	struct vbus_channel_open body = { .channel = cpu_to_le32(end->number) };
	struct vbus_next_channel name = { .name_length = strlen(end->channel->name) };
	struct vbus_request request = {
		.id = VBUS_CHANNEL_OPEN,
		.bus = true,
		.body = &body,
		.size = sizeof(body),
		.more = &name,
		.more_size = 1 + name.name_length,
		.answer = answer,
		.least = sizeof(*answer),
		.room = sizeof(*answer),
	};
	int size;

	memcpy(name.name, end->channel->name, name.name_length);
	size = vbus_ask(end->proxy, &request);
	if (size == -ETIMEDOUT)
		vbus_broken(end->proxy, "it does not let a channel be opened");
	return min(size, 0);
}

/* A region is somewhere among those of the area, and shows nothing of others before it. */
static int take_region(struct vbus_end *end, u64 offset, u64 size)
{
	u64 start = end->proxy->regions;

	if (!size)
		return 0;
	if (offset % VBUS_REGION_ALIGN || offset < start || size > VBUS_REGIONS_BYTES ||
	    offset - start > VBUS_REGIONS_BYTES - size)
		return -EPROTO;
	/* The bus has zeroed as much as there is; programs are given whole pages. */
	memset(end->proxy->area + offset + size, 0, PAGE_ALIGN(size) - size);
	end->where = end->proxy->connector->where + offset;
	end->memory = size;
	return 0;
}

/* The vector of its priority is taken when the first channel of it is opened. */
static int use_lane(struct vbus_end *end, u8 priority)
{
	return vbus_queue_use(&end->proxy->lanes.lane[priority].queue);
}

static int take_answer(struct vbus_end *end, const struct vbus_channel_open_answer *answer)
{
	u32 window = le32_to_cpu(answer->window);
	int err;

	BUILD_BUG_ON(VBUS_REGION_ALIGN % PAGE_SIZE);
	if (answer->priority >= VBUS_PRIORITIES || window < VBUS_EVENT_COST || window > MAX_WINDOW)
		return -EPROTO;
	err = take_region(end, le64_to_cpu(answer->memory_offset),
			  le64_to_cpu(answer->memory_size));
	/* Another channel may have that name by now. What was said on it waits in its lane. */
	if (!err)
		err = use_lane(end, answer->priority);
	spin_lock(&end->lock);
	end->priority = answer->priority;
	end->window = window;
	spin_unlock(&end->lock);
	return err;
}

static void init_end(struct vbus_end *end, struct vbus_channel *channel)
{
	const size_t head = sizeof(struct vbus_msg) + sizeof(struct vbus_channel_number);

	get_device(&channel->dev);
	end->channel = channel;
	end->proxy = channel->proxy;
	end->priority = channel->priority;
	/* What came before the answer is held to what a bus gives. */
	end->window = VBUS_WINDOW;
	end->most = min_t(u32, VBUS_MAX_EVENT, READ_ONCE(channel->proxy->max_msg) - head);
	refcount_set(&end->refs, 2);
	INIT_WORK(&end->leave, leave_work);
	spin_lock_init(&end->lock);
	INIT_LIST_HEAD(&end->said);
	init_waitqueue_head(&end->wait);
	mutex_init(&end->mapping);
	INIT_LIST_HEAD(&end->files);
}

/**
 * vbus_end_open() - open a channel
 * @channel: one that is not gone, and none of whose ends is open, or being left; @opening is held
 *
 * Return: an end, with a reference that is the caller's, or an error: what the bus refused with.
 */
struct vbus_end *vbus_end_open(struct vbus_channel *channel)
{
	struct vbus_channels *channels = &channel->proxy->channels;
	struct vbus_channel_open_answer answer;
	struct vbus_end *end;
	int err;

	end = kzalloc(sizeof(*end), GFP_KERNEL);
	if (!end)
		return ERR_PTR(-ENOMEM);
	init_end(end, channel);
	err = use_lane(end, end->priority);
	if (err) {
		vbus_end_put(end);
		goto failed;
	}
	/* Events may come before the answer. */
	err = xa_alloc_cyclic(&channels->ends, &end->number, end, XA_LIMIT(1, U32_MAX - 1),
			      &channels->next_number, GFP_KERNEL);
	if (err < 0) {
		vbus_end_put(end);
		goto failed;
	}
	err = ask_to_open(end, &answer);
	if (!err) {
		err = take_answer(end, &answer);
		/* Also without a vector: the bus has it open, and would not be heard there. */
		if (err)
			vbus_broken(end->proxy, err == -EPROTO ? "a channel that cannot be" :
				    "a channel of a priority that has no vector here");
	}
	if (!err)
		return end;
	close_end(channel->proxy, end);
failed:
	vbus_end_put(end);
	/* The bus may refuse with any number, some of which mean something else in this kernel. */
	return ERR_PTR(err > -512 ? err : -EPROTO);
}
