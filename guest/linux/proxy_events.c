// SPDX-License-Identifier: GPL-2.0-only
/*
 * Event rings: how one side tells the other "look at this queue", with few doorbells.
 *
 * There is a ring for each of eight priorities and both directions. A queue has at most one event
 * outstanding, and a ring has a slot for every queue of the bus: it never overflows, and nobody
 * waits. A doorbell rings only for a consumer that sleeps, which its sleep word says by being odd.
 *
 *	producer					consumer
 *	buffers are in the queue			an event is in the ring: count it in taken[]
 *	FENCE A						FENCE B
 *	taken[] says that none is outstanding:		look at the queue
 *	  put one into the ring				...
 *	  FENCE C					sleep word := odd
 *	  the sleep word is odd: ring			FENCE D
 *							look at the ring once more, then sleep
 *
 * A meets B: either the producer sees that its last event was taken, or the consumer's look at the
 * queue sees the buffers. C meets D: either the producer sees the consumer asleep, or the
 * consumer's last look sees the event. Each fence is between a store and a load of another word.
 * They are virt_mb(), which is a fence even where this kernel has only one processor: the other
 * side always has another. No shared word is the target of a read-modify-write, since those are no
 * longer atomic on such a kernel; what processors of this side compete for is private.
 *
 * The consumer here works as NAPI does. The interrupt takes a few events at once, which is as early
 * as can be, and leaves the consumer awake; the poll in softirq goes on, and comes back until it
 * finds nothing. In between the softirqs run that the events started, so that all that becomes due
 * meanwhile costs no interrupt. Only then it sleeps.
 *
 * A producer rings itself, at once, and leaves that to no poll or other softirq. Drivers may spin
 * until the device answers, as virtio_net does for its control queue, even where no softirq can
 * run: the doorbell would never ring.
 */
#include <linux/export.h>
#include <linux/slab.h>

#include "proxy.h"

/*
 * Events that are taken before their queues are looked at: their count is told to the other side by
 * one fence.
 */
#define BATCH		16
/* Events of one interrupt, and of one poll. */
#define IRQ_BUDGET	32
#define POLL_BUDGET	64

/* Towards the device. */

static void count(u64 *counter, __le64 *shown)
{
	*counter += 1;
	WRITE_ONCE(*shown, cpu_to_le64(*counter));
}

static void publish(struct vbus_events *events, struct vbus_ring *ring,
		    const struct vbus_queue *queue)
{
	/*
	 * Full ordering: whatever earlier producers of this ring knew, this one knows. In the lap
	 * since this slot was last written some queue came twice, so the consumer had taken its
	 * first event, and those before it.
	 */
	u32 position = atomic_fetch_inc(&ring->tail);
	struct vbus_slot *slot = &ring->slots_out[position & (events->max_sources - 1)];

	WRITE_ONCE(slot->source, cpu_to_le32(queue->source));
	WRITE_ONCE(slot->generation, cpu_to_le32(queue->generation));
	/* Whoever sees this number sees the two words. */
	virt_store_release(&slot->sequence, cpu_to_le32(position + 1));
}

/*
 * Whether an event was sent: not when one is outstanding, or when the device's side lies, which is
 * its own loss.
 */
static bool send(struct vbus_events *events, struct vbus_ring *ring, struct vbus_queue *queue)
{
	/* The consumer has read the slot when this is seen: it is written again a lap later. */
	u32 taken = le32_to_cpu(virt_load_acquire(&events->taken_out[queue->source]));

	if (taken != queue->sent)
		return false;
	queue->sent++;
	count(&queue->sent_total, &events->stats_out[queue->source].sent);
	publish(events, ring, queue);
	return true;
}

/* Whether the consumer sleeps, and nobody has rung for this sleep yet. */
static bool is_due(struct vbus_ring *ring)
{
	u32 sleep = le32_to_cpu(READ_ONCE(*ring->sleep_out));

	return sleep & 1 && atomic_xchg(&ring->rung, sleep) != sleep;
}

/**
 * vbus_queue_signal() - tell the device that there are buffers in a queue
 * @queue: an open queue; nothing happens when it is closed
 *
 * In any context. Never waits.
 */
void vbus_queue_signal(struct vbus_queue *queue)
{
	struct vbus_proxy *proxy = queue->proxy;
	struct vbus_events *events = &proxy->events;
	struct vbus_ring *ring;
	bool rings = false;
	unsigned long flags;

	spin_lock_irqsave(&queue->lock, flags);
	if (queue->open) {
		ring = &events->rings[queue->priority];
		count(&queue->signalled, &events->stats_out[queue->source].signalled);
		virt_mb();	/* A: the buffers, before the look at taken[] */
		if (send(events, ring, queue)) {
			virt_mb();	/* C: the event, before the look at the sleep word */
			rings = is_due(ring);
		}
		/* One notification, one doorbell. */
		rings |= events->direct;
		if (rings)
			count(&queue->rung, &events->stats_out[queue->source].rung);
	}
	spin_unlock_irqrestore(&queue->lock, flags);
	/* Outside of the lock: it takes the time of an exit to the hypervisor. */
	if (rings)
		proxy->connector->ops->ring_events(proxy->connector, queue->priority);
}
EXPORT_SYMBOL_GPL(vbus_queue_signal);

/* Towards the driver. */

/*
 * Whether there is an event at the head of a ring: 1, 0, or an error when events were overwritten
 * before they were taken.
 */
static int look(const struct vbus_events *events, const struct vbus_ring *ring)
{
	const struct vbus_slot *slot = &ring->slots_in[ring->head & (events->max_sources - 1)];
	/* The words of the slot are those that this number stands for. */
	u32 sequence = le32_to_cpu(virt_load_acquire(&slot->sequence));
	s32 ahead = sequence - (ring->head + 1);

	if (!ahead)
		return 1;
	/* Behind: of the last lap. 0: of a ring that is new. */
	return ahead < 0 || !sequence ? 0 : -EPROTO;
}

/*
 * The queue of the next event, which is counted as taken; NULL when the event is of an old
 * generation, or of a queue that nobody listens to; an error when it cannot be. The caller holds
 * the ring's lock, and has looked.
 */
static struct vbus_queue *take(struct vbus_events *events, struct vbus_ring *ring)
{
	const struct vbus_slot *slot = &ring->slots_in[ring->head & (events->max_sources - 1)];
	/* Read once, and checked as read. */
	u32 source = le32_to_cpu(READ_ONCE(slot->source));
	u32 generation = le32_to_cpu(READ_ONCE(slot->generation));
	struct vbus_queue *queue;

	if (source >= events->max_sources)
		return ERR_PTR(-EPROTO);
	ring->head++;
	queue = rcu_dereference(events->listeners[source]);
	if (!queue || queue->generation != generation || queue->priority != ring->priority)
		return NULL;
	queue->taken++;
	queue->taken_total++;
	/* The slot was read: it may be written over once this is seen. */
	virt_store_release(&events->taken_in[source], cpu_to_le32(queue->taken));
	return queue;
}

/* Take up to a batch of events, at most @budget; how many slots were looked at. */
static unsigned int take_batch(struct vbus_events *events, struct vbus_ring *ring,
			       struct vbus_queue **batch, unsigned int *found, unsigned int budget)
{
	struct vbus_queue *queue;
	unsigned int seen = 0;
	unsigned long flags;
	int state = 0;

	*found = 0;
	spin_lock_irqsave(&ring->lock, flags);
	while (seen < budget && *found < BATCH) {
		state = look(events, ring);
		if (state <= 0)
			break;
		queue = take(events, ring);
		if (IS_ERR(queue)) {
			state = PTR_ERR(queue);
			break;
		}
		seen++;
		if (queue)
			batch[(*found)++] = queue;
	}
	spin_unlock_irqrestore(&ring->lock, flags);
	if (state < 0)
		vbus_broken(ring->proxy, "an event that cannot be");
	return seen;
}

/*
 * Take events of a priority and of those that are more urgent, the most urgent first, and look at
 * their queues.
 */
static unsigned int drain(struct vbus_proxy *proxy, unsigned int least_urgent, unsigned int budget)
{
	struct vbus_events *events = &proxy->events;
	struct vbus_queue *batch[BATCH];
	unsigned int priority = 0, total = 0, seen, found, i;

	rcu_read_lock();
	while (priority <= least_urgent && total < budget && !READ_ONCE(proxy->broken)) {
		seen = take_batch(events, &events->rings[priority], batch, &found, budget - total);
		if (!seen) {
			priority++;
			continue;
		}
		virt_mb();	/* B: taken[], before the look at the queues */
		for (i = 0; i < found; i++)
			batch[i]->heard(batch[i]);
		total += seen;
		/* Something more urgent may have come. */
		priority = 0;
	}
	rcu_read_unlock();
	return total;
}

static void set_sleep(struct vbus_ring *ring, bool asleep)
{
	unsigned long flags;

	spin_lock_irqsave(&ring->lock, flags);
	if ((ring->sleep & 1) != asleep) {
		ring->sleep++;
		WRITE_ONCE(*ring->sleep_in, cpu_to_le32(ring->sleep));
	}
	spin_unlock_irqrestore(&ring->lock, flags);
}

static bool has_event(struct vbus_ring *ring)
{
	unsigned long flags;
	int state;

	spin_lock_irqsave(&ring->lock, flags);
	state = look(&ring->proxy->events, ring);
	spin_unlock_irqrestore(&ring->lock, flags);
	return state != 0;
}

static void poll(struct tasklet_struct *tasklet)
{
	struct vbus_ring *ring = from_tasklet(ring, tasklet, poll);

	if (READ_ONCE(ring->proxy->broken))
		return;
	if (!drain(ring->proxy, ring->priority, POLL_BUDGET)) {
		set_sleep(ring, true);
		virt_mb();	/* D: asleep, before the last look */
		if (!has_event(ring))
			return;
		set_sleep(ring, false);
	}
	/* Awake: after what the events have started. */
	tasklet_schedule(tasklet);
}

void vbus_events_interrupt(struct vbus_proxy *proxy, unsigned int priority)
{
	struct vbus_ring *ring = &proxy->events.rings[priority];

	set_sleep(ring, false);
	drain(proxy, priority, IRQ_BUDGET);
	tasklet_schedule(&ring->poll);
}

/* The bus is gone; in hard interrupt. */
void vbus_events_lost(struct vbus_proxy *proxy)
{
	struct vbus_events *events = &proxy->events;
	struct vbus_queue *queue;
	unsigned int i;

	rcu_read_lock();
	for (i = 0; i < events->max_sources; i++) {
		queue = rcu_dereference(events->listeners[i]);
		if (queue && queue->lost)
			queue->lost(queue);
	}
	rcu_read_unlock();
}

/* Opening and closing. */

/* The first queue of a priority: from now on its doorbell is listened to. */
static int use_ring(struct vbus_proxy *proxy, struct vbus_ring *ring)
{
	int err = 0;

	mutex_lock(&proxy->events.open_lock);
	if (!ring->used) {
		err = proxy->connector->ops->open_events(proxy->connector, proxy, ring->priority);
		if (!err) {
			ring->used = true;
			/* It goes to sleep, so that the other side rings. */
			tasklet_schedule(&ring->poll);
		}
	}
	mutex_unlock(&proxy->events.open_lock);
	return err;
}

/* What the device's side counted: for people, since it may say anything. */
void vbus_events_read_in(struct vbus_queue *queue, u64 *signalled, u64 *sent, u64 *rung)
{
	const struct vbus_stats *stats = &queue->proxy->events.stats_in[queue->source];

	*signalled += le64_to_cpu(READ_ONCE(stats->signalled)) - queue->before[0];
	*sent += le64_to_cpu(READ_ONCE(stats->sent)) - queue->before[1];
	*rung += le64_to_cpu(READ_ONCE(stats->rung)) - queue->before[2];
}

/* What was counted for others that had this source before. */
static void set_source(struct vbus_queue *queue, u32 source)
{
	queue->source = source;
	memset(queue->before, 0, sizeof(queue->before));
	vbus_events_read_in(queue, &queue->before[0], &queue->before[1], &queue->before[2]);
}

/**
 * vbus_device_sources() - ask where the events of a device's queues are in this generation
 * @device: a device that this side drives; to be asked after each reset
 *
 * Return: 0, or an error.
 */
int vbus_device_sources(struct vbus_device *device)
{
	struct {
		struct vbus_sources head;
		u8 priorities[VBUS_MAX_MSG - sizeof(struct vbus_msg) - sizeof(struct vbus_sources)];
	} *answer;
	u32 end = device->proxy->events.max_sources - VBUS_CHANNEL_SOURCES;
	struct vbus_request request = {
		.id = VBUS_SOURCES,
		.bus = true,
		.least = sizeof(answer->head),
		.room = sizeof(*answer),
	};
	u32 first, generation;
	unsigned int i;
	int size;

	answer = kmalloc(sizeof(*answer), GFP_KERNEL);
	if (!answer)
		return -ENOMEM;
	request.answer = answer;
	size = vbus_device_ask(device, &request);
	if (size < 0)
		goto out;
	first = le32_to_cpu(answer->head.first_source);
	generation = le32_to_cpu(answer->head.generation);
	size = min_t(int, size - sizeof(answer->head), device->num_queues);
	if (first > end || size > end - first) {
		size = -EPROTO;
		goto out;
	}
	for (i = 0; i < size; i++) {
		struct vbus_queue *queue = &device->queues[i];

		if (queue->source != first + i || i >= device->known)
			set_source(queue, first + i);
		queue->generation = generation;
		queue->priority = min_t(u8, answer->priorities[i], VBUS_PRIORITIES - 1);
	}
	device->known = size;
	size = 0;
out:
	kfree(answer);
	return size;
}
EXPORT_SYMBOL_GPL(vbus_device_sources);

/**
 * vbus_queue_open() - hear events of a queue, and be able to signal some
 * @queue: one whose source is known, with @queue->heard set
 *
 * To be called before DRIVER_OK. May sleep.
 *
 * Return: 0, or an error.
 */
int vbus_queue_open(struct vbus_queue *queue)
{
	int err;

	err = vbus_queue_use(queue);
	if (err)
		return err;
	return vbus_queue_listen(queue);
}
EXPORT_SYMBOL_GPL(vbus_queue_open);

/* From now on doorbells of a queue's priority are listened to. May sleep. */
int vbus_queue_use(struct vbus_queue *queue)
{
	return use_ring(queue->proxy, &queue->proxy->events.rings[queue->priority]);
}

/* As vbus_queue_open(); but until its priority is used, events wait in the ring. */
int vbus_queue_listen(struct vbus_queue *queue)
{
	struct vbus_events *events = &queue->proxy->events;
	struct vbus_ring *ring = &events->rings[queue->priority];

	spin_lock_irq(&ring->lock);
	if (rcu_access_pointer(events->listeners[queue->source])) {
		/* The bus gave a source twice. */
		spin_unlock_irq(&ring->lock);
		return -EPROTO;
	}
	queue->taken = 0;
	WRITE_ONCE(events->taken_in[queue->source], 0);
	rcu_assign_pointer(events->listeners[queue->source], queue);
	spin_unlock_irq(&ring->lock);

	spin_lock_irq(&queue->lock);
	queue->sent = 0;
	queue->open = true;
	spin_unlock_irq(&queue->lock);
	return 0;
}

/**
 * vbus_queue_close() - hear and signal no more
 * @queue: any queue
 *
 * What was heard is over only after synchronize_rcu().
 */
void vbus_queue_close(struct vbus_queue *queue)
{
	struct vbus_events *events = &queue->proxy->events;
	struct vbus_ring *ring = &events->rings[queue->priority];
	bool open;

	spin_lock_irq(&queue->lock);
	open = queue->open;
	queue->open = false;
	spin_unlock_irq(&queue->lock);
	if (!open)
		return;
	spin_lock_irq(&ring->lock);
	RCU_INIT_POINTER(events->listeners[queue->source], NULL);
	spin_unlock_irq(&ring->lock);
}
EXPORT_SYMBOL_GPL(vbus_queue_close);

/* Events of this generation that the device's side took. */
u32 vbus_events_taken_out(struct vbus_queue *queue)
{
	return le32_to_cpu(READ_ONCE(queue->proxy->events.taken_out[queue->source]));
}

/* The beginning and the end. */

int vbus_events_init(struct vbus_proxy *proxy, const struct vbus_layout *layout)
{
	struct vbus_events *events = &proxy->events;
	unsigned int i;

	events->max_sources = layout->max_sources;
	events->stats_out = proxy->area + layout->to_device.stats;
	events->taken_out = proxy->area + layout->to_device.taken;
	events->stats_in = proxy->area + layout->to_driver.stats;
	events->taken_in = proxy->area + layout->to_driver.taken;
	mutex_init(&events->open_lock);
	for (i = 0; i < VBUS_PRIORITIES; i++) {
		struct vbus_ring *ring = &events->rings[i];
		u64 slots = (u64)i * layout->max_sources * sizeof(struct vbus_slot);
		u64 sleep = i * sizeof(struct vbus_sleep);

		ring->proxy = proxy;
		ring->priority = i;
		ring->slots_out = proxy->area + layout->to_device.slots + slots;
		ring->sleep_out = proxy->area + layout->to_device.sleep + sleep;
		ring->slots_in = proxy->area + layout->to_driver.slots + slots;
		ring->sleep_in = proxy->area + layout->to_driver.sleep + sleep;
		spin_lock_init(&ring->lock);
		tasklet_setup(&ring->poll, poll);
	}
	events->listeners = kvcalloc(layout->max_sources, sizeof(*events->listeners), GFP_KERNEL);
	return events->listeners ? 0 : -ENOMEM;
}

/* No queue is open any more. */
void vbus_events_stop(struct vbus_proxy *proxy)
{
	struct vbus_events *events = &proxy->events;
	unsigned int i;

	for (i = 0; i < VBUS_PRIORITIES; i++)
		if (events->rings[i].used)
			proxy->connector->ops->close_events(proxy->connector, i);
	/* Whoever polls finds that it shall not go on. */
	WRITE_ONCE(proxy->broken, true);
	for (i = 0; i < VBUS_PRIORITIES; i++)
		tasklet_kill(&events->rings[i].poll);
	kvfree(events->listeners);
}
