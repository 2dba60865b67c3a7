/* SPDX-License-Identifier: GPL-2.0-only */
/* The parts of vbus_proxy, and what they ask of each other. */
#ifndef VBUS_PROXY_H
#define VBUS_PROXY_H

#include <linux/async.h>
#include <linux/atomic.h>
#include <linux/interrupt.h>
#include <linux/list.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

#include "vbus.h"

/* proxy_area.c: where everything is in a shared area. */

struct vbus_events_places {
	u64 slots;
	u64 stats;
	u64 taken;
	u64 sleep;
};

struct vbus_layout {
	u64 total;
	u32 max_sources;
	u64 link_to_device;
	u64 link_to_driver;
	struct vbus_events_places to_device;
	struct vbus_events_places to_driver;
	u64 channels_to_device;
	u64 channels_to_driver;
	u64 regions;
};

int vbus_area_read(const void *area, size_t size, u32 *version, struct vbus_layout *layout);

/* proxy_messages.c: rings of messages. */

struct vbus_out {
	struct vbus_link_ring *ring;
	u32 tail;
};

struct vbus_in {
	struct vbus_link_ring *ring;
	u32 head;
	u32 taken;			/* bytes since the sender was told */
};

int vbus_out_has_room(const struct vbus_out *out, size_t size);
void vbus_out_put(struct vbus_out *out, const struct vbus_msg *header, const void *body,
		  size_t size, const void *more, size_t more_size);
int vbus_in_next(struct vbus_in *in, struct vbus_msg *message);
bool vbus_in_made_room(struct vbus_in *in);

/* proxy_link.c: questions, answers, and what the bus says by itself. */

struct vbus_link {
	struct mutex send_lock;		/* guards @out */
	struct vbus_out out;
	struct vbus_in in;		/* @work's alone, as is @message */
	struct vbus_msg *message;
	wait_queue_head_t room;
	struct workqueue_struct *queue;
	struct work_struct work;
	spinlock_t calls_lock;		/* guards @calls and @token */
	struct list_head calls;
	u16 token;
	bool lost;
};

int vbus_link_init(struct vbus_proxy *proxy, const struct vbus_layout *layout);
void vbus_link_stop(struct vbus_proxy *proxy);
void vbus_link_interrupt(struct vbus_proxy *proxy);
void vbus_link_lost(struct vbus_proxy *proxy);
void vbus_link_forget(struct vbus_proxy *proxy, u16 dev_num);
int vbus_ask(struct vbus_proxy *proxy, struct vbus_request *request);

/* proxy_events.c: events. */

struct vbus_ring {
	struct vbus_proxy *proxy;
	u8 priority;
	bool used;			/* guarded by the events' @open_lock */

	/* Towards the device. */
	struct vbus_slot *slots_out;
	const __le32 *sleep_out;
	atomic_t tail;			/* slots that were given out */
	atomic_t rung;			/* the sleep word that was rung for last */

	/* Towards the driver. */
	const struct vbus_slot *slots_in;
	__le32 *sleep_in;
	spinlock_t lock;		/* guards what follows */
	u32 head;
	u32 sleep;
	struct tasklet_struct poll;
};

struct vbus_events {
	u32 max_sources;
	bool direct;
	struct vbus_stats *stats_out;
	const __le32 *taken_out;
	const struct vbus_stats *stats_in;
	__le32 *taken_in;
	struct vbus_queue __rcu **listeners;
	struct mutex open_lock;		/* guards which rings are used */
	struct vbus_ring rings[VBUS_PRIORITIES];
};

int vbus_events_init(struct vbus_proxy *proxy, const struct vbus_layout *layout);
void vbus_events_stop(struct vbus_proxy *proxy);
void vbus_events_interrupt(struct vbus_proxy *proxy, unsigned int priority);
void vbus_events_lost(struct vbus_proxy *proxy);
int vbus_queue_use(struct vbus_queue *queue);
int vbus_queue_listen(struct vbus_queue *queue);
void vbus_events_read_in(struct vbus_queue *queue, u64 *signalled, u64 *sent, u64 *rung);
u32 vbus_events_taken_out(struct vbus_queue *queue);

/* proxy_lanes.c: what is said on channels. */

struct vbus_lane {
	struct vbus_queue queue;	/* the event source */
	spinlock_t lock;		/* guards @out */
	struct vbus_out out;
	bool wanted;			/* room, by an end that found none */
	struct vbus_in in;		/* the work's alone */
	wait_queue_head_t room;
};

struct vbus_lanes {
	struct vbus_lane lane[VBUS_PRIORITIES];
	unsigned long due;		/* lanes of which an event came */
	struct work_struct work;
	struct vbus_msg *message;	/* @work's alone */
};

int vbus_lanes_init(struct vbus_proxy *proxy, const struct vbus_layout *layout);
int vbus_lanes_open(struct vbus_proxy *proxy);
void vbus_lanes_lost(struct vbus_proxy *proxy);
void vbus_lanes_stop(struct vbus_proxy *proxy);
int vbus_lane_send(struct vbus_lane *lane, const struct vbus_msg *header, const void *body,
		   size_t size);
int vbus_lane_send_waiting(struct vbus_lane *lane, const struct vbus_msg *header, const void *body,
			   size_t size, long timeout);

/* proxy_channels.c: channels that come and go. */

struct vbus_channels {
	struct workqueue_struct *queue;
	struct work_struct scan;
	struct list_head list;		/* @scan's alone: of channels, by name */
	unsigned int count;
	struct xarray ends;		/* by number: those that the bus knows */
	u32 next_number;
	bool over;
	bool told;			/* of channels that find no place */
};

int vbus_channels_register(void);
void vbus_channels_unregister(void);
int vbus_channels_init(struct vbus_proxy *proxy, const struct vbus_layout *layout);
void vbus_channels_changed(struct vbus_proxy *proxy);
void vbus_channels_stop(struct vbus_proxy *proxy);
void vbus_channels_free(struct vbus_proxy *proxy);

/* proxy_ends.c: channels that are open. */

const char *vbus_ends_heard(struct vbus_proxy *proxy, const struct vbus_msg *message);
void vbus_ends_room(struct vbus_proxy *proxy, unsigned int priority);
void vbus_ends_lost(struct vbus_proxy *proxy);
void vbus_ends_stop(struct vbus_proxy *proxy);

/* proxy_discovery.c: devices that come and go. */

struct vbus_discovery {
	struct workqueue_struct *queue;
	struct work_struct work;
	unsigned long *ready;		/* numbers that were announced */
	unsigned long *removed;		/* numbers whose device was removed */
	struct xarray devices;		/* by number */
	struct async_domain removals;	/* that are under way */
	struct mutex lock;		/* guards @devices against removal, and @over */
	unsigned int count;		/* of devices */
	unsigned int queues;		/* that these have */
	bool over;
};

int vbus_discovery_init(struct vbus_proxy *proxy);
int vbus_discovery_scan(struct vbus_proxy *proxy);
void vbus_discovery_stop(struct vbus_proxy *proxy);
void vbus_discovery_free(struct vbus_proxy *proxy);
void vbus_discovery_lost(struct vbus_proxy *proxy);
void vbus_discovery_event(struct vbus_proxy *proxy, u16 number, u16 state);
void vbus_discovery_config(struct vbus_proxy *proxy, u16 number, u32 status, u32 generation);

/* proxy_main.c: the bus type, and its devices. */

struct vbus_proxy {
	struct vbus_connector *connector;
	int id;
	void *area;
	u32 max_msg;
	u8 memory_kind;
	u64 regions;			/* of channels: where in the area */
	bool broken;			/* by the other side, or over: look at nothing of its */
	struct vbus_link link;
	struct vbus_events events;
	struct vbus_lanes lanes;
	struct vbus_channels channels;
	struct vbus_discovery discovery;
};

void vbus_born(void);
void vbus_died(void);
void vbus_broken(struct vbus_proxy *proxy, const char *why);
struct vbus_device *vbus_device_create(struct vbus_proxy *proxy, u16 number,
				       const struct vbus_device_info *info,
				       const struct vbus_name_answer *name);
void vbus_device_gone(struct vbus_device *device);
void vbus_name_copy(char *to, const u8 *from, unsigned int length);

#endif
