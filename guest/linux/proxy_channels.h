/* SPDX-License-Identifier: GPL-2.0-only */
/* Event channels: those that there are, and those that are open. */
#ifndef VBUS_PROXY_CHANNELS_H
#define VBUS_PROXY_CHANNELS_H

#include <linux/cdev.h>

#include "proxy.h"

/**
 * struct vbus_channel - a channel that the bus has, and its file in /dev/vbus
 * @dev: the kernel's device
 * @cdev: its file
 * @list: in the channels of @proxy
 * @name_list: among all names in /dev/vbus
 * @proxy: the bus; to be used with @opening held, and not @gone
 * @id: what @name is prefixed by where it is not the only one
 * @name: as the bus has it
 * @priority: 0 is the most urgent
 * @memory: bytes of its region
 * @opening: one may open it at a time; guards @gone
 * @gone: the bus has it no more
 * @lock: guards @end, and how many files have that
 * @end: open
 * @leaving: ends that were left, and of which the bus has not said so
 * @left: woken when there are none
 * @sent: events of all ends
 * @received: the same
 */
struct vbus_channel {
	struct device dev;
	struct cdev cdev;
	struct list_head list;
	struct hlist_node name_list;
	struct vbus_proxy *proxy;
	char name[VBUS_NAME_MAX + 1];
	u8 priority;
	u32 memory;
	struct mutex opening;		/* see above */
	bool gone;
	spinlock_t lock;		/* see above */
	struct vbus_end *end;
	atomic_t leaving;
	wait_queue_head_t left;
	atomic64_t sent;
	atomic64_t received;
};

/* Something that was said. */
struct vbus_said {
	struct list_head list;
	u16 size;
	u8 data[];
};

/**
 * struct vbus_end - a channel that is open: this side's end of it
 * @channel: which
 * @proxy: the bus; to be used with @lock held, and not @closed, or by what the bus itself starts
 * @number: that the channel has on this link
 * @priority: of the lane where it speaks
 * @window: costs that may be outstanding before the last event, each way
 * @most: bytes of an event
 * @where: the address of the region
 * @memory: bytes of it; 0: there is none
 * @refs: one for all files, one while the bus knows @number
 * @rcu: frees it
 * @leave: tells the bus that it is closed
 * @users: files; guarded by the channel's lock
 * @lock: guards what follows up to @said
 * @closed: nothing more is said, nor heard
 * @refused: somebody found no room in the lane, and was not told since that there is some
 * @owing: so did a credit
 * @sent: costs, in all, modulo 2^32
 * @credited: how much of @sent the other side has consumed
 * @received: costs of what came
 * @consumed: how much of @received was read
 * @told: how much of @consumed the other side was told of
 * @said: what came and was not read
 * @waiting: how many these are
 * @wait: readers and writers
 * @mapping: guards what follows, and what pages show
 * @files: that have it open
 * @remains: what pages show when the region is another's
 */
struct vbus_end {
	struct vbus_channel *channel;
	struct vbus_proxy *proxy;
	u32 number;
	u8 priority;
	u32 window;
	u32 most;
	phys_addr_t where;
	u32 memory;
	refcount_t refs;
	struct rcu_head rcu;
	struct work_struct leave;
	unsigned int users;

	spinlock_t lock;		/* see above */
	bool closed;
	bool refused;
	bool owing;
	u32 sent;
	u32 credited;
	u32 received;
	u32 consumed;
	u32 told;
	struct list_head said;
	unsigned int waiting;

	wait_queue_head_t wait;
	struct mutex mapping;		/* see above */
	struct list_head files;
	struct page *remains;
};

/* A file that is open. */
struct vbus_file {
	struct list_head list;
	struct vbus_end *end;
	struct address_space *pages;
};

extern const struct file_operations vbus_channel_files;

struct vbus_end *vbus_end_open(struct vbus_channel *channel);
void vbus_end_leave(struct vbus_end *end);
void vbus_end_put(struct vbus_end *end);
int vbus_end_say(struct vbus_end *end, const struct vbus_channel_number *body, size_t size);
struct vbus_said *vbus_end_take(struct vbus_end *end, size_t room);
void vbus_end_untake(struct vbus_end *end, struct vbus_said *said);
void vbus_end_consumed(struct vbus_end *end, struct vbus_said *said);
bool vbus_end_is_readable(struct vbus_end *end);
bool vbus_end_is_writable(struct vbus_end *end);
void vbus_end_unmap(struct vbus_end *end);

#endif
