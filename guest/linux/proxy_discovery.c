// SPDX-License-Identifier: GPL-2.0-only
/*
 * Discovery and hotplug: which devices there are.
 *
 * The bus may announce and remove devices at any time and in any order, and as often as it likes.
 * What it said is kept as a bit a number, so that it costs nothing to hear; one work item, which
 * may sleep, makes it true:
 *
 *	announced, not known	ask what it is, register it; if it is gone, let go of the number
 *	removed			unregister it, let go of the number
 *
 * Before a device that was removed is unregistered, its driver is told (vbus_device_gone()), by the
 * work item of the link: the driver may be waiting for the device, in the middle of being bound or
 * unbound, and must not.
 */
#include <linux/bitmap.h>
#include <linux/module.h>
#include <linux/slab.h>

#include "proxy.h"

#define NUMBERS		65536
#define MAX_DEVICES	4096
/* Numbers that are asked for at once. */
#define SCAN		8192

static struct vbus_proxy *proxy_of(struct vbus_discovery *discovery)
{
	return container_of(discovery, struct vbus_proxy, discovery);
}

/* Nothing is kept here under this number. */
static void release(struct vbus_proxy *proxy, u16 number)
{
	struct vbus_request request = {
		.id = VBUS_RELEASE,
		.bus = true,
		.dev_num = number,
	};
	int err = vbus_ask(proxy, &request);

	if (err && err != -ENODEV)
		dev_dbg(proxy->connector->parent, "device %u: not released: %d\n", number, err);
}

static int ask_about(struct vbus_proxy *proxy, u16 number, struct vbus_device_info *info,
		     struct vbus_name_answer *name)
{
	struct vbus_request request = {
		.id = VBUS_GET_DEVICE_INFO,
		.dev_num = number,
		.answer = info,
		.least = sizeof(*info),
		.room = sizeof(*info),
	};
	int size;

	size = vbus_ask(proxy, &request);
	if (size < 0)
		return size;
	request = (struct vbus_request) {
		.id = VBUS_NAME,
		.bus = true,
		.dev_num = number,
		.answer = name,
		.least = offsetof(struct vbus_name_answer, name),
		.room = sizeof(*name),
	};
	size = vbus_ask(proxy, &request);
	if (size < 0)
		return size;
	if (size != offsetof(struct vbus_name_answer, name) + name->name_length)
		return -EPROTO;
	return 0;
}

static struct vbus_device *make(struct vbus_proxy *proxy, u16 number)
{
	struct vbus_name_answer name;
	struct vbus_device_info info;
	int err;

	if (proxy->discovery.count >= MAX_DEVICES)
		return ERR_PTR(-ENOSPC);
	err = ask_about(proxy, number, &info, &name);
	if (err)
		return ERR_PTR(err);
	/* Each queue has an event source, of which there are so many. */
	if (le32_to_cpu(info.max_virtqueues) > proxy->events.max_sources - proxy->discovery.queues)
		return ERR_PTR(-EPROTO);
	return vbus_device_create(proxy, number, &info, &name);
}

static void add(struct vbus_proxy *proxy, u16 number)
{
	struct vbus_discovery *discovery = &proxy->discovery;
	struct vbus_device *device;
	int err;

	device = make(proxy, number);
	if (IS_ERR(device)) {
		err = PTR_ERR(device);
		if (err != -ENODEV)
			dev_err(proxy->connector->parent, "device %u of the bus cannot be used: %d\n",
				number, err);
		release(proxy, number);
		return;
	}
	mutex_lock(&discovery->lock);
	err = discovery->over ? -ENODEV :
	      xa_err(xa_store(&discovery->devices, number, device, GFP_KERNEL));
	mutex_unlock(&discovery->lock);
	if (!err) {
		discovery->count++;
		discovery->queues += device->num_queues;
		/* It was removed before anybody could have found it to be told so. */
		if (test_bit(number, discovery->removed))
			vbus_device_gone(device);
		/* Drivers bind here, and use the device. */
		err = device_add(&device->dev);
		if (!err)
			return;
		mutex_lock(&discovery->lock);
		xa_erase(&discovery->devices, number);
		mutex_unlock(&discovery->lock);
		discovery->count--;
		discovery->queues -= device->num_queues;
	}
	put_device(&device->dev);
	release(proxy, number);
}

/*
 * To remove a device is to wait for the kernel, mostly: many are removed at the same time. To add
 * them one after the other keeps their names in order.
 */
static void drop(void *data, async_cookie_t cookie)
{
	struct vbus_device *device = data;
	struct vbus_proxy *proxy = device->proxy;
	struct vbus_discovery *discovery = &proxy->discovery;
	u16 number = device->number;

	device_del(&device->dev);
	/* Only now: whoever tells devices that they are gone looks for them here. */
	mutex_lock(&discovery->lock);
	xa_erase(&discovery->devices, number);
	discovery->count--;
	discovery->queues -= device->num_queues;
	mutex_unlock(&discovery->lock);
	put_device(&device->dev);
	if (!READ_ONCE(discovery->over))
		release(proxy, number);
}

static void settle_removed(struct vbus_proxy *proxy, u16 number)
{
	struct vbus_discovery *discovery = &proxy->discovery;
	struct vbus_device *device = xa_load(&discovery->devices, number);

	/* One that is only announced will be found to be gone. */
	if (!device && test_bit(number, discovery->ready))
		return;
	clear_bit(number, discovery->removed);
	if (!device) {
		release(proxy, number);
		return;
	}
	clear_bit(number, discovery->ready);
	vbus_device_gone(device);
	async_schedule_domain(drop, device, &discovery->removals);
}

static void settle_ready(struct vbus_proxy *proxy, u16 number)
{
	struct vbus_discovery *discovery = &proxy->discovery;

	clear_bit(number, discovery->ready);
	if (!xa_load(&discovery->devices, number))
		add(proxy, number);
}

static void work(struct work_struct *item)
{
	struct vbus_discovery *discovery = container_of(item, struct vbus_discovery, work);
	struct vbus_proxy *proxy = proxy_of(discovery);
	unsigned int number;

	for_each_set_bit(number, discovery->removed, NUMBERS)
		if (!READ_ONCE(discovery->over))
			settle_removed(proxy, number);
	async_synchronize_full_domain(&discovery->removals);
	for_each_set_bit(number, discovery->ready, NUMBERS)
		if (!READ_ONCE(discovery->over))
			settle_ready(proxy, number);
	/* Of those that were announced and removed since. */
	if (!READ_ONCE(discovery->over) && !bitmap_empty(discovery->removed, NUMBERS))
		queue_work(discovery->queue, &discovery->work);
}

/* What the bus says; called by the link's work item, or by the scan. */
void vbus_discovery_event(struct vbus_proxy *proxy, u16 number, u16 state)
{
	struct vbus_discovery *discovery = &proxy->discovery;
	struct vbus_device *device;

	if (state == VBUS_DEVICE_READY) {
		set_bit(number, discovery->ready);
	} else if (state == VBUS_DEVICE_REMOVED) {
		set_bit(number, discovery->removed);
		/* The bit, before the look for the device: see add(). */
		smp_mb__after_atomic();
		mutex_lock(&discovery->lock);
		device = xa_load(&discovery->devices, number);
		if (device)
			vbus_device_gone(device);
		mutex_unlock(&discovery->lock);
	} else {
		return;
	}
	queue_work(discovery->queue, &discovery->work);
}

void vbus_discovery_config(struct vbus_proxy *proxy, u16 number, u32 status, u32 generation)
{
	struct vbus_discovery *discovery = &proxy->discovery;
	struct vbus_device *device;

	mutex_lock(&discovery->lock);
	device = xa_load(&discovery->devices, number);
	if (device) {
		mutex_lock(&device->lock);
		if (device->events && !device->gone)
			device->events->config_changed(device->data, status, generation);
		mutex_unlock(&device->lock);
	}
	mutex_unlock(&discovery->lock);
}

/* Which devices there are now; from then on the bus says what changes. */
int vbus_discovery_scan(struct vbus_proxy *proxy)
{
	struct {
		struct vbus_devices_found head;
		u8 bitmap[SCAN / 8];
	} *found;
	struct vbus_devices from = { .count = cpu_to_le16(SCAN) };
	struct vbus_request request = {
		.id = VBUS_GET_DEVICES,
		.bus = true,
		.body = &from,
		.size = sizeof(from),
		.least = sizeof(found->head),
		.room = sizeof(*found),
	};
	unsigned int offset = 0, count, next, bit;
	int size;

	found = kmalloc(sizeof(*found), GFP_KERNEL);
	if (!found)
		return -ENOMEM;
	request.answer = found;
	do {
		from.offset = cpu_to_le16(offset);
		size = vbus_ask(proxy, &request);
		if (size < 0)
			break;
		count = le16_to_cpu(found->head.count);
		next = le16_to_cpu(found->head.next_offset);
		size = size == sizeof(found->head) + count / 8 && count % 8 == 0 &&
		       le16_to_cpu(found->head.offset) == offset && (!next || next > offset) ?
		       0 : -EPROTO;
		for (bit = 0; !size && bit < count; bit++)
			if (found->bitmap[bit / 8] & BIT(bit % 8) && offset + bit < NUMBERS)
				vbus_discovery_event(proxy, offset + bit, VBUS_DEVICE_READY);
		offset = next;
	} while (!size && offset);
	kfree(found);
	return size;
}

int vbus_discovery_init(struct vbus_proxy *proxy)
{
	struct vbus_discovery *discovery = &proxy->discovery;

	INIT_WORK(&discovery->work, work);
	xa_init(&discovery->devices);
	INIT_LIST_HEAD(&discovery->removals.pending);
	mutex_init(&discovery->lock);
	discovery->ready = bitmap_zalloc(NUMBERS, GFP_KERNEL);
	discovery->removed = bitmap_zalloc(NUMBERS, GFP_KERNEL);
	discovery->queue = alloc_ordered_workqueue("vbus%d", 0, proxy->id);
	if (discovery->ready && discovery->removed && discovery->queue)
		return 0;
	vbus_discovery_free(proxy);
	return -ENOMEM;
}

/* All devices are gone. */
void vbus_discovery_lost(struct vbus_proxy *proxy)
{
	struct vbus_discovery *discovery = &proxy->discovery;
	struct vbus_device *device;
	unsigned long number;

	mutex_lock(&discovery->lock);
	WRITE_ONCE(discovery->over, true);
	xa_for_each(&discovery->devices, number, device)
		vbus_device_gone(device);
	mutex_unlock(&discovery->lock);
}

/* Unregister all devices: orderly while the bus answers. */
void vbus_discovery_stop(struct vbus_proxy *proxy)
{
	struct vbus_discovery *discovery = &proxy->discovery;
	struct vbus_device *device;
	unsigned long number;

	WRITE_ONCE(discovery->over, true);
	/* The link still hears; what it queues finds that it is over. */
	flush_workqueue(discovery->queue);
	xa_for_each(&discovery->devices, number, device)
		async_schedule_domain(drop, device, &discovery->removals);
	async_synchronize_full_domain(&discovery->removals);
}

/* The link hears no more. */
void vbus_discovery_free(struct vbus_proxy *proxy)
{
	struct vbus_discovery *discovery = &proxy->discovery;

	if (discovery->queue)
		destroy_workqueue(discovery->queue);
	xa_destroy(&discovery->devices);
	bitmap_free(discovery->ready);
	bitmap_free(discovery->removed);
}
