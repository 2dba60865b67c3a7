// SPDX-License-Identifier: GPL-2.0-only
/*
 * vbus_proxy: the bus type "vbus", its devices and what sysfs shows of them, and one bus's
 * beginning and end.
 *
 *	/sys/bus/vbus/devices/vbus0-3/
 *		name address uuid device_id vendor_id priority
 *		to_device/ to_driver/		signalled sent rung taken
 *
 * The parts of a proxy: the link (messages), the event rings, the discovery; and for channels the
 * lanes (messages again), the ends of those that are open, and their files. Whatever the other side
 * says is checked in the part that hears it; what cannot be ends the session (vbus_broken()).
 */
#include <linux/ctype.h>
#include <linux/idr.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/version.h>
#include <linux/wait_bit.h>

#include "proxy.h"

static DEFINE_IDA(ids);
/* Devices and channels that have not been freed yet: their release is code of this module. */
static atomic_t living = ATOMIC_INIT(0);

void vbus_born(void)
{
	atomic_inc(&living);
}

void vbus_died(void)
{
	if (atomic_dec_and_test(&living))
		wake_up_var(&living);
}

/* What sysfs shows. */

static ssize_t name_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%s\n", to_vbus_device(dev)->name);
}
static DEVICE_ATTR_RO(name);

static ssize_t address_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n", to_vbus_device(dev)->number);
}
static DEVICE_ATTR_RO(address);

static ssize_t uuid_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%pUb\n", &to_vbus_device(dev)->uuid);
}
static DEVICE_ATTR_RO(uuid);

static ssize_t device_id_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n", to_vbus_device(dev)->device_id);
}
static DEVICE_ATTR_RO(device_id);

static ssize_t vendor_id_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "0x%x\n", to_vbus_device(dev)->vendor_id);
}
static DEVICE_ATTR_RO(vendor_id);

/* Of each queue, once a driver has asked. */
static ssize_t priority_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct vbus_device *device = to_vbus_device(dev);
	unsigned int i, known = READ_ONCE(device->known);
	ssize_t size = 0;

	for (i = 0; i < known; i++)
		size += sysfs_emit_at(buf, size, "%s%u", i ? " " : "", device->queues[i].priority);
	return size + sysfs_emit_at(buf, size, "\n");
}
static DEVICE_ATTR_RO(priority);

static struct attribute *device_attrs[] = {
	&dev_attr_name.attr,
	&dev_attr_address.attr,
	&dev_attr_uuid.attr,
	&dev_attr_device_id.attr,
	&dev_attr_vendor_id.attr,
	&dev_attr_priority.attr,
	NULL,
};

static const struct attribute_group device_group = {
	.attrs = device_attrs,
};

/* Sums over the queues of a device. */
struct counters {
	u64 signalled;
	u64 sent;
	u64 rung;
	u64 taken;
};

static void to_device_counters(struct vbus_device *device, struct counters *sums)
{
	unsigned int i;

	for (i = 0; i < READ_ONCE(device->known); i++) {
		struct vbus_queue *queue = &device->queues[i];

		sums->signalled += READ_ONCE(queue->signalled);
		sums->sent += READ_ONCE(queue->sent_total);
		sums->rung += READ_ONCE(queue->rung);
		/*
		 * The device's side counts a generation's events; those of older ones were as good
		 * as taken.
		 */
		sums->taken += READ_ONCE(queue->sent_total) -
			       (READ_ONCE(queue->sent) != vbus_events_taken_out(queue));
	}
}

static void to_driver_counters(struct vbus_device *device, struct counters *sums)
{
	unsigned int i;

	for (i = 0; i < READ_ONCE(device->known); i++) {
		struct vbus_queue *queue = &device->queues[i];

		vbus_events_read_in(queue, &sums->signalled, &sums->sent, &sums->rung);
		sums->taken += READ_ONCE(queue->taken_total);
	}
}

#define COUNTER(_direction, _name)								\
static ssize_t _direction##_##_name##_show(struct device *dev, struct device_attribute *attr,	\
					   char *buf)						\
{												\
	struct counters sums = {};								\
												\
	_direction##_counters(to_vbus_device(dev), &sums);					\
	return sysfs_emit(buf, "%llu\n", sums._name);						\
}												\
static struct device_attribute _direction##_##_name =						\
	__ATTR(_name, 0444, _direction##_##_name##_show, NULL)

#define COUNTERS(_direction)									\
COUNTER(_direction, signalled);									\
COUNTER(_direction, sent);									\
COUNTER(_direction, rung);									\
COUNTER(_direction, taken);									\
static struct attribute *_direction##_attrs[] = {						\
	&_direction##_signalled.attr,								\
	&_direction##_sent.attr,								\
	&_direction##_rung.attr,								\
	&_direction##_taken.attr,								\
	NULL,											\
};												\
static const struct attribute_group _direction##_group = {					\
	.name = #_direction,									\
	.attrs = _direction##_attrs,								\
}

COUNTERS(to_device);
COUNTERS(to_driver);

static const struct attribute_group *device_groups[] = {
	&device_group,
	&to_device_group,
	&to_driver_group,
	NULL,
};

/* The bus type. */

/* Any driver drives any device: what the device is, the drivers behind the transport look at. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
static int vbus_match(struct device *dev, const struct device_driver *driver)
#else
static int vbus_match(struct device *dev, struct device_driver *driver)
#endif
{
	return 1;
}

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
static int vbus_uevent(const struct device *dev, struct kobj_uevent_env *env)
#else
static int vbus_uevent(struct device *dev, struct kobj_uevent_env *env)
#endif
{
	return add_uevent_var(env, "MODALIAS=vbus:d%08x",
			      container_of(dev, struct vbus_device, dev)->device_id);
}

static int vbus_probe(struct device *dev)
{
	return container_of(dev->driver, struct vbus_driver, driver)->probe(to_vbus_device(dev));
}

static void vbus_remove(struct device *dev)
{
	container_of(dev->driver, struct vbus_driver, driver)->remove(to_vbus_device(dev));
}

static struct bus_type vbus_type = {
	.name = "vbus",
	.match = vbus_match,
	.uevent = vbus_uevent,
	.probe = vbus_probe,
	.remove = vbus_remove,
	.dev_groups = device_groups,
};

int vbus_register_driver(struct vbus_driver *driver, struct module *owner)
{
	driver->driver.bus = &vbus_type;
	driver->driver.owner = owner;
	return driver_register(&driver->driver);
}
EXPORT_SYMBOL_GPL(vbus_register_driver);

void vbus_unregister_driver(struct vbus_driver *driver)
{
	driver_unregister(&driver->driver);
}
EXPORT_SYMBOL_GPL(vbus_unregister_driver);

/* Devices. */

static void vbus_device_release(struct device *dev)
{
	struct vbus_device *device = to_vbus_device(dev);

	kvfree(device->queues);
	kfree(device);
	vbus_died();
}

/* Names are shown to people and their tools: nothing in them that is not plain. */
void vbus_name_copy(char *to, const u8 *from, unsigned int length)
{
	unsigned int i;

	length = min_t(unsigned int, length, VBUS_NAME_MAX);
	for (i = 0; i < length; i++)
		to[i] = isascii(from[i]) && isgraph(from[i]) ? from[i] : '?';
	to[length] = 0;
}

/*
 * A device as the bus describes it, not yet registered. Errors: what it says cannot be, or there is
 * no memory.
 */
struct vbus_device *vbus_device_create(struct vbus_proxy *proxy, u16 number,
				       const struct vbus_device_info *info,
				       const struct vbus_name_answer *name)
{
	struct vbus_device *device;
	unsigned int i;
	int err;

	device = kzalloc(sizeof(*device), GFP_KERNEL);
	if (!device)
		return ERR_PTR(-ENOMEM);
	vbus_born();
	device_initialize(&device->dev);
	device->dev.parent = proxy->connector->parent;
	device->dev.bus = &vbus_type;
	device->dev.release = vbus_device_release;
	device->proxy = proxy;
	device->number = number;
	device->device_id = le32_to_cpu(info->device_id);
	device->vendor_id = le32_to_cpu(info->vendor_id);
	device->feature_bits = le32_to_cpu(info->num_feature_bits);
	device->config_size = le32_to_cpu(info->config_size);
	device->num_queues = le32_to_cpu(info->max_virtqueues);
	import_uuid(&device->uuid, name->uuid);
	vbus_name_copy(device->name, name->name, name->name_length);
	mutex_init(&device->lock);
	err = dev_set_name(&device->dev, "vbus%d-%u", proxy->id, number);
	if (err)
		goto fail;
	device->queues = kvcalloc(device->num_queues, sizeof(*device->queues), GFP_KERNEL);
	if (!device->queues && device->num_queues) {
		err = -ENOMEM;
		goto fail;
	}
	for (i = 0; i < device->num_queues; i++) {
		device->queues[i].proxy = proxy;
		device->queues[i].device = device;
		spin_lock_init(&device->queues[i].lock);
	}
	proxy->connector->ops->setup_dma(proxy->connector, device);
	return device;
fail:
	put_device(&device->dev);
	return ERR_PTR(err);
}

/**
 * vbus_device_listen() - hear of a device
 * @device: the device
 * @events: what to hear
 * @data: given to @events
 *
 * A device that is gone already is told of at once.
 */
void vbus_device_listen(struct vbus_device *device, const struct vbus_device_events *events,
			void *data)
{
	mutex_lock(&device->lock);
	device->events = events;
	device->data = data;
	if (device->gone)
		events->gone(data);
	mutex_unlock(&device->lock);
}
EXPORT_SYMBOL_GPL(vbus_device_listen);

/**
 * vbus_device_ignore() - hear of a device no more, and nothing is being heard
 * @device: the device
 */
void vbus_device_ignore(struct vbus_device *device)
{
	mutex_lock(&device->lock);
	device->events = NULL;
	mutex_unlock(&device->lock);
}
EXPORT_SYMBOL_GPL(vbus_device_ignore);

/* It was removed: whoever waits for it waits no more. Its buffers are this side's again. */
void vbus_device_gone(struct vbus_device *device)
{
	mutex_lock(&device->lock);
	if (!device->gone) {
		WRITE_ONCE(device->gone, true);
		WRITE_ONCE(device->void_buffers, true);
		vbus_link_forget(device->proxy, device->number);
		if (device->events)
			device->events->gone(device->data);
		wake_up_var(&device->gone);
	}
	mutex_unlock(&device->lock);
}

/**
 * vbus_device_wait_gone() - wait until the device is gone
 * @device: the device, which was not reset though it should have been
 *
 * It may still write into memory that it was given, until the bus says that it is removed, or the
 * session is over.
 */
void vbus_device_wait_gone(struct vbus_device *device)
{
	wait_var_event(&device->gone, READ_ONCE(device->gone));
}
EXPORT_SYMBOL_GPL(vbus_device_wait_gone);

/**
 * vbus_device_broken() - the bus does something with this device that it must not
 * @device: the device
 * @why: in a few words
 *
 * The session ends, since what the bus says cannot be relied upon any more.
 */
void vbus_device_broken(struct vbus_device *device, const char *why)
{
	vbus_broken(device->proxy, why);
}
EXPORT_SYMBOL_GPL(vbus_device_broken);

struct vbus_connector *vbus_device_connector(struct vbus_device *device)
{
	return device->proxy->connector;
}
EXPORT_SYMBOL_GPL(vbus_device_connector);

/* VBUS_MEMORY_*: how the device's side reaches buffers. */
u8 vbus_device_memory(struct vbus_device *device)
{
	return device->proxy->memory_kind;
}
EXPORT_SYMBOL_GPL(vbus_device_memory);

/* A bus. */

void vbus_broken(struct vbus_proxy *proxy, const char *why)
{
	if (xchg(&proxy->broken, true))
		return;
	dev_err_ratelimited(proxy->connector->parent, "the bus broke the protocol: %s\n", why);
	proxy->connector->ops->broken(proxy->connector);
}

static int introduce(struct vbus_proxy *proxy)
{
	const size_t least = offsetof(struct vbus_hello_answer, name);
	struct vbus_hello hello = {
		.revision = cpu_to_le32(VBUS_REVISION),
		.max_msg_size = cpu_to_le32(VBUS_MAX_MSG),
		.flags = cpu_to_le32(proxy->connector->hello_flags),
	};
	struct vbus_hello_answer answer;
	struct vbus_request request = {
		.id = VBUS_HELLO,
		.bus = true,
		.body = &hello,
		.size = sizeof(hello),
		.answer = &answer,
		.least = least,
		.room = sizeof(answer),
	};
	char name[VBUS_NAME_MAX + 1];
	int size, kind;

	size = vbus_ask(proxy, &request);
	if (size < 0)
		return size;
	if (size != least + answer.name_length || le32_to_cpu(answer.revision) != VBUS_REVISION ||
	    answer.priorities != VBUS_PRIORITIES || answer.shards != VBUS_SHARDS ||
	    le32_to_cpu(answer.max_sources) != proxy->events.max_sources ||
	    le32_to_cpu(answer.max_msg_size) < 128)
		return -EPROTO;
	if (answer.signal_kind != VBUS_SIGNAL_DIRECT && answer.signal_kind != VBUS_SIGNAL_TUNNELLED)
		return -EPROTO;
	proxy->events.direct = answer.signal_kind == VBUS_SIGNAL_DIRECT;
	WRITE_ONCE(proxy->max_msg, min_t(u32, le32_to_cpu(answer.max_msg_size), VBUS_MAX_MSG));
	kind = proxy->connector->ops->use_memory(proxy->connector, proxy, answer.memory_kind);
	if (kind < 0)
		return kind;
	proxy->memory_kind = kind;
	vbus_name_copy(name, answer.name, answer.name_length);
	dev_info(proxy->connector->parent, "vbus%d is bus %s\n", proxy->id, name);
	return 0;
}

/* A proxy for the bus behind a connector's area. See vbus.h for what follows. */
struct vbus_proxy *vbus_proxy_create(struct vbus_connector *connector)
{
	struct vbus_proxy *proxy;
	struct vbus_layout layout;
	u32 version;
	int err;

	err = vbus_area_read(connector->area, connector->size, &version, &layout);
	if (err)
		return ERR_PTR(err);
	proxy = kvzalloc(sizeof(*proxy), GFP_KERNEL);
	if (!proxy)
		return ERR_PTR(-ENOMEM);
	proxy->connector = connector;
	proxy->area = connector->area;
	/* What every link takes, until the bus has said what this one does. */
	proxy->max_msg = 128;
	proxy->id = ida_alloc(&ids, GFP_KERNEL);
	if (proxy->id < 0) {
		err = proxy->id;
		goto no_id;
	}
	err = vbus_link_init(proxy, &layout);
	if (err)
		goto no_link;
	err = vbus_discovery_init(proxy);
	if (err)
		goto no_discovery;
	err = vbus_events_init(proxy, &layout);
	if (err)
		goto no_events;
	err = vbus_lanes_init(proxy, &layout);
	if (err)
		goto no_lanes;
	err = vbus_channels_init(proxy, &layout);
	if (err)
		goto no_channels;
	return proxy;
no_channels:
	vbus_lanes_stop(proxy);
no_lanes:
	vbus_events_stop(proxy);
no_events:
	vbus_discovery_free(proxy);
no_discovery:
	vbus_link_stop(proxy);
no_link:
	ida_free(&ids, proxy->id);
no_id:
	kvfree(proxy);
	return ERR_PTR(err);
}
EXPORT_SYMBOL_GPL(vbus_proxy_create);

/* Say HELLO, and discover the devices and channels. */
int vbus_proxy_start(struct vbus_proxy *proxy)
{
	int err;

	err = vbus_lanes_open(proxy);
	if (!err)
		err = introduce(proxy);
	if (!err)
		err = vbus_discovery_scan(proxy);
	if (!err)
		vbus_channels_changed(proxy);
	return err;
}
EXPORT_SYMBOL_GPL(vbus_proxy_start);

/* There are messages in the link's ring, or there is room again. In any context. */
void vbus_proxy_link_interrupt(struct vbus_proxy *proxy)
{
	vbus_link_interrupt(proxy);
}
EXPORT_SYMBOL_GPL(vbus_proxy_link_interrupt);

/* There are events of a priority. In hard interrupt. */
void vbus_proxy_events_interrupt(struct vbus_proxy *proxy, unsigned int priority)
{
	vbus_events_interrupt(proxy, priority);
}
EXPORT_SYMBOL_GPL(vbus_proxy_events_interrupt);

/*
 * The device's side is gone. In hard interrupt: a driver may look for an answer again and again,
 * as virtio_net does for its control queue, on the only processor that there is.
 */
void vbus_proxy_lost_interrupt(struct vbus_proxy *proxy)
{
	vbus_events_lost(proxy);
}
EXPORT_SYMBOL_GPL(vbus_proxy_lost_interrupt);

/* The device's side is gone: nobody waits for it any more. */
void vbus_proxy_lost(struct vbus_proxy *proxy)
{
	vbus_link_lost(proxy);
	vbus_lanes_lost(proxy);
	vbus_ends_lost(proxy);
	vbus_discovery_lost(proxy);
}
EXPORT_SYMBOL_GPL(vbus_proxy_lost);

/* Unregister the channels and the devices. */
void vbus_proxy_stop(struct vbus_proxy *proxy)
{
	vbus_channels_stop(proxy);
	vbus_discovery_stop(proxy);
}
EXPORT_SYMBOL_GPL(vbus_proxy_stop);

void vbus_proxy_destroy(struct vbus_proxy *proxy)
{
	vbus_link_stop(proxy);
	vbus_discovery_free(proxy);
	vbus_channels_free(proxy);
	vbus_lanes_stop(proxy);
	vbus_events_stop(proxy);
	ida_free(&ids, proxy->id);
	kvfree(proxy);
}
EXPORT_SYMBOL_GPL(vbus_proxy_destroy);

static int __init proxy_init(void)
{
	int err;

	err = bus_register(&vbus_type);
	if (err)
		return err;
	err = vbus_channels_register();
	if (err)
		bus_unregister(&vbus_type);
	return err;
}

static void __exit proxy_exit(void)
{
	wait_var_event(&living, !atomic_read(&living));
	/* Ends are freed behind a grace period, by the kernel itself. */
	vbus_channels_unregister();
	bus_unregister(&vbus_type);
	ida_destroy(&ids);
}

module_init(proxy_init);
module_exit(proxy_exit);

MODULE_DESCRIPTION("vbus: a bus of virtio devices, as a guest sees it");
MODULE_AUTHOR("the vbus project");
MODULE_LICENSE("GPL");
