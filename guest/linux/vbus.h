/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The bus as its drivers and connectors see it.
 *
 *	drivers of devices	virtio_vbus
 *	the bus			vbus_proxy: discovery, hotplug, messages, events
 *	guest connector		vbus_ivshmem, which finds the shared area and rings doorbells
 *
 * A connector finds a shared area and makes a proxy of it, which lives as long as one session with
 * the device's side. The proxy discovers the devices and registers each on the bus type "vbus",
 * where drivers bind to it.
 */
#ifndef VBUS_H
#define VBUS_H

#include <linux/completion.h>
#include <linux/device.h>
#include <linux/mutex.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/uuid.h>

#include "vbus_wire.h"

struct vbus_device;
struct vbus_lane;
struct vbus_proxy;

/* Connectors. */

/**
 * struct vbus_connector - where a shared area and its doorbells come from
 * @ops: what it can do
 * @parent: the device that the bus's devices shall be children of
 * @area: the shared area, mapped
 * @size: bytes that may be looked at from @area on
 * @hello_flags: VBUS_HELLO_*
 * @where: the address of the area's first byte, by which programs are given pages of it
 */
struct vbus_connector {
	const struct vbus_connector_ops *ops;
	struct device *parent;
	void *area;
	size_t size;
	u32 hello_flags;
	phys_addr_t where;
};

/**
 * struct vbus_connector_ops - what the proxy asks of a connector
 * @ring_link: ring for the messages that were put into the link's ring; in any context
 * @ring_events: ring for events of a priority; in any context
 * @open_events: from now on vbus_proxy_events_interrupt() is called when events of a priority have
 *   come; may sleep
 * @close_events: not any more, and no such call is under way; may sleep
 * @use_memory: the bus said HELLO, and how it would reach buffers (VBUS_MEMORY_*); the kind that is
 *   used, or an error if it cannot be; may sleep, and ask the bus
 * @setup_dma: give a device the operations that make buffers visible to the device's side
 * @broken: the device's side does not keep to the protocol, or does not answer: the session shall
 *   end; in any context
 */
struct vbus_connector_ops {
	void (*ring_link)(struct vbus_connector *connector);
	void (*ring_events)(struct vbus_connector *connector, unsigned int priority);
	int (*open_events)(struct vbus_connector *connector, struct vbus_proxy *proxy,
			   unsigned int priority);
	void (*close_events)(struct vbus_connector *connector, unsigned int priority);
	int (*use_memory)(struct vbus_connector *connector, struct vbus_proxy *proxy, u8 kind);
	void (*setup_dma)(struct vbus_connector *connector, struct vbus_device *device);
	void (*broken)(struct vbus_connector *connector);
};

/*
 * What an area's header says: 0 when it is one of the only layout that this version has. -ENOENT:
 * there is no magic; -EPROTONOSUPPORT: another version, which is told in @version; -EPROTO: sizes
 * or offsets that this version cannot have.
 */
int vbus_area_check(const void *area, size_t size, u32 *version, size_t *total);

/*
 * A proxy's life, from the connector's hand:
 *
 *	create		checks the area; from now on the proxy may be told of interrupts
 *	start		says HELLO and discovers; may fail
 *	lost		the device's side is gone, and touches no buffers any more; optional, from
 *			any process context. In hard interrupt, before it: lost_interrupt, so that
 *			whoever waits for an answer in a loop lets go of the processor
 *	stop		unregisters devices and channels: orderly while the device's side answers
 *			(interrupts have to be told until here, and not any more from here on)
 *	destroy
 */
struct vbus_proxy *vbus_proxy_create(struct vbus_connector *connector);
int vbus_proxy_start(struct vbus_proxy *proxy);
void vbus_proxy_link_interrupt(struct vbus_proxy *proxy);
void vbus_proxy_events_interrupt(struct vbus_proxy *proxy, unsigned int priority);
void vbus_proxy_lost_interrupt(struct vbus_proxy *proxy);
void vbus_proxy_lost(struct vbus_proxy *proxy);
void vbus_proxy_stop(struct vbus_proxy *proxy);
void vbus_proxy_destroy(struct vbus_proxy *proxy);

/* Devices. */

/**
 * struct vbus_queue - a queue of a device, or a lane of channels, as far as events go
 * @proxy: the bus
 * @device: whose it is; NULL: a lane
 * @heard: called, in hard or soft interrupt, when the device's side used buffers; set by the driver
 * @lost: called, in hard interrupt, when the bus is gone: nobody may wait in a loop any more; NULL,
 *   or set by the driver
 * @data: the driver's
 * @source: the event source, the same both ways
 * @generation: of the source; changes with every reset
 * @priority: 0 is the most urgent
 * @before: what the device's side had counted for this source before the device was here
 * @lock: guards what follows up to @rung
 * @open: whether events may be signalled
 * @sent: events of this generation that went to the device
 * @signalled: how often the driver wanted to tell the device
 * @sent_total: how often that took an event
 * @rung: how often that took a doorbell
 * @taken: events of this generation that came from the device; guarded by the lock of the
 *   priority's ring
 * @taken_total: events that ever came
 */
struct vbus_queue {
	struct vbus_proxy *proxy;
	struct vbus_device *device;
	void (*heard)(struct vbus_queue *queue);
	void (*lost)(struct vbus_queue *queue);
	void *data;
	u32 source;
	u32 generation;
	u8 priority;
	u64 before[3];

	spinlock_t lock;		/* see above */
	bool open;
	u32 sent;
	u64 signalled;
	u64 sent_total;
	u64 rung;

	u32 taken;
	u64 taken_total;
};

/**
 * struct vbus_device_events - what a driver hears of a device; both may sleep a little
 * @config_changed: config space or the status changed
 * @gone: the device is gone: nothing comes from it any more, and nothing may wait for it. Must not
 *   wait for processors to get on, as synchronize_rcu() does: others may have to hear the same of
 *   their devices first, before they do
 */
struct vbus_device_events {
	void (*config_changed)(void *data, u32 status, u32 generation);
	void (*gone)(void *data);
};

/**
 * struct vbus_device - a device behind the bus
 * @dev: the kernel's device
 * @proxy: the bus
 * @number: its address on the bus
 * @device_id: section 5 of the virtio specification
 * @vendor_id: of whoever made it
 * @feature_bits: how many it has
 * @config_size: bytes of config space
 * @num_queues: queues it has at most
 * @uuid: the same for as long as the bus has it, whatever its address
 * @name: as @uuid
 * @queues: @num_queues of them
 * @known: how many of @queues were given a source and a priority
 * @dma_mask: for @dev
 * @gone: it was removed, or the bus is lost
 * @void_buffers: what it has not completed is not delivered: buffers that it should have written
 *   read as all ones
 * @lock: guards @events and @data, and is held while they are called
 * @events: what the driver wants to hear
 * @data: the driver's
 */
struct vbus_device {
	struct device dev;
	struct vbus_proxy *proxy;
	u16 number;
	u32 device_id;
	u32 vendor_id;
	u32 feature_bits;
	u32 config_size;
	u32 num_queues;
	uuid_t uuid;
	char name[VBUS_NAME_MAX + 1];
	struct vbus_queue *queues;
	unsigned int known;
	u64 dma_mask;
	bool gone;
	bool void_buffers;

	struct mutex lock;		/* see above */
	const struct vbus_device_events *events;
	void *data;
};

static inline struct vbus_device *to_vbus_device(struct device *dev)
{
	return container_of(dev, struct vbus_device, dev);
}

/**
 * struct vbus_driver - a driver of devices on the bus
 * @driver: the kernel's driver
 * @probe: bind to a device
 * @remove: let go of it
 */
struct vbus_driver {
	struct device_driver driver;
	int (*probe)(struct vbus_device *device);
	void (*remove)(struct vbus_device *device);
};

int vbus_register_driver(struct vbus_driver *driver, struct module *owner);
void vbus_unregister_driver(struct vbus_driver *driver);

void vbus_device_listen(struct vbus_device *device, const struct vbus_device_events *events,
			void *data);
void vbus_device_ignore(struct vbus_device *device);
void vbus_device_broken(struct vbus_device *device, const char *why);

void vbus_device_wait_gone(struct vbus_device *device);

struct vbus_connector *vbus_device_connector(struct vbus_device *device);
u8 vbus_device_memory(struct vbus_device *device);

/**
 * struct vbus_request - a question about a device, and room for the answer
 * @id: of the message
 * @bus: whether it is a message of the bus, or one of a device
 * @dev_num: the device; 0 where it is about none
 * @body: what is asked
 * @size: bytes of @body
 * @more: what follows @body
 * @more_size: bytes of @more
 * @lane: where it travels; NULL: on the link. Without @more
 * @answer: where the answer's body goes
 * @least: bytes of it that there must be; a shorter one is an error
 * @room: bytes of it that there may be; a longer one is an error
 */
struct vbus_request {
	u8 id;
	bool bus;
	u16 dev_num;
	const void *body;
	size_t size;
	const void *more;
	size_t more_size;
	struct vbus_lane *lane;
	void *answer;
	size_t least;
	size_t room;
};

int vbus_device_ask(struct vbus_device *device, struct vbus_request *request);
int vbus_proxy_ask(struct vbus_proxy *proxy, struct vbus_request *request);

int vbus_device_sources(struct vbus_device *device);
int vbus_queue_open(struct vbus_queue *queue);
void vbus_queue_close(struct vbus_queue *queue);
void vbus_queue_signal(struct vbus_queue *queue);

#endif
