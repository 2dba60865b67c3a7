/* SPDX-License-Identifier: GPL-2.0-only */
/* The parts of vbus_ivshmem. */
#ifndef VBUS_IVSHMEM_H
#define VBUS_IVSHMEM_H

#include <linux/dma-direction.h>
#include <linux/interrupt.h>
#include <linux/list.h>
#include <linux/notifier.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "vbus.h"

struct pci_dev;
struct scatterlist;
struct window_page;

/* ivshmem_window.c: memory of the function, into which buffers are copied. */

/**
 * struct window - the memory behind the area, into which buffers are copied
 * @memory: its first byte, mapped
 * @address: what the device's side calls that byte: its offset in the BAR, never 0
 * @pages: how many it has
 * @most: bytes of a buffer, at most
 * @lock: guards what follows
 * @page: of each page, what it is used for
 * @used: a bit a page
 * @in_use: how many of them are set
 * @hint: where to look for free pages first
 * @full: how often there was no place
 * @partial: for each size of pieces, pages that have free ones
 */
struct window {
	void *memory;
	u64 address;
	unsigned long pages;
	size_t most;
	spinlock_t lock;		/* see above */
	struct window_page *page;
	unsigned long *used;
	unsigned long in_use;
	unsigned long hint;
	unsigned long full;
	struct list_head partial[6];
};

int window_init(struct window *window, void *memory, u64 address, size_t size);
void window_free(struct window *window);
void window_setup_dma(struct vbus_device *device);

/* What sysfs shows of the window, in the directory of the function. */
extern const struct attribute_group window_group;

/* ivshmem_ram.c: this guest's own memory, where the bus's side reaches it. */

#define RAM_RANGES		64

/**
 * struct ram_range - a part of this guest's memory
 * @begin: its first physical address
 * @end: the first one behind it
 * @proven: the device's side has found there what this side wrote
 */
struct ram_range {
	u64 begin;
	u64 end;
	bool proven;
};

/**
 * struct ram - this guest's own memory, as the device's side knows it
 * @ranges: what it has told of
 * @count: how many of them
 */
struct ram {
	struct ram_range ranges[RAM_RANGES];
	u32 count;
};

int ram_share(struct ram *ram, struct vbus_proxy *proxy, struct device *dev);
void ram_setup_dma(struct vbus_device *device);

/* ivshmem_sg.c: lists of buffers, as operations for DMA. */

int sg_map(struct device *dev, struct scatterlist *list, int count,
	   enum dma_data_direction direction, unsigned long attrs);
void sg_unmap(struct device *dev, struct scatterlist *list, int count,
	      enum dma_data_direction direction, unsigned long attrs);
void sg_sync_for_cpu(struct device *dev, struct scatterlist *list, int count,
		     enum dma_data_direction direction);
void sg_sync_for_device(struct device *dev, struct scatterlist *list, int count,
			enum dma_data_direction direction);

/* ivshmem_session.c: sessions with the bus, and the words and interrupts that make them. */

#define VECTOR_LINK		0
#define VECTOR_EVENTS		1	/* and so many priorities more */
#define VECTORS			(VECTOR_EVENTS + VBUS_PRIORITIES)
#define VECTOR_SESSION		VECTORS	/* the host's alone */

/* In the area's first page. */
#define SESSION_REQUEST		0xf00
#define SESSION			0xf40

/* One vector of events, of the session that there is. */
struct events_vector {
	struct vbus_proxy *proxy;
	unsigned int priority;
	char name[32];
};

/**
 * struct ivshmem - a function
 * @connector: what the proxy knows of it
 * @pdev: the function
 * @registers: BAR0
 * @memory: BAR2
 * @size: bytes of @memory
 * @window: the part of it behind the area
 * @ram: this guest's own memory, where @shares
 * @shares: devices reach that, and use no window
 * @closing: the kernel ends, and there shall be no more sessions
 * @panic: hears when it ends badly
 * @session: what was asked for
 * @told_version: of an area's layout that this side does not know, and that was told of already
 * @vectors: of events
 * @thread: makes sessions
 * @changed: woken when the host's word may have changed, or @over
 * @over: the session is
 * @broken: because the host does not keep to the protocol
 * @watch: looks whether the session is over
 * @lock: guards @proxy, against interrupts
 * @proxy: of the present session, while it may be told of interrupts; else NULL
 */
struct ivshmem {
	struct vbus_connector connector;
	struct pci_dev *pdev;
	void __iomem *registers;
	void *memory;
	size_t size;
	struct window window;
	struct ram ram;
	bool shares;
	bool closing;
	struct notifier_block panic;
	u32 session;
	u32 told_version;
	struct events_vector vectors[VBUS_PRIORITIES];
	struct task_struct *thread;
	wait_queue_head_t changed;
	bool over;
	bool broken;
	struct delayed_work watch;
	spinlock_t lock;		/* see above */
	struct vbus_proxy *proxy;
};

extern unsigned int ivshmem_session_seconds;
extern const struct vbus_connector_ops ivshmem_ops;

u32 ivshmem_host_session(struct ivshmem *iv);
void ivshmem_ask_session(struct ivshmem *iv, u32 session);
void ivshmem_end_session(struct ivshmem *iv);
bool ivshmem_may_be_ours(struct ivshmem *iv);
int ivshmem_begin_session(struct ivshmem *iv);
int ivshmem_check_area(struct ivshmem *iv, size_t *total);
irqreturn_t ivshmem_link_interrupt(int irq, void *data);
void ivshmem_watch(struct work_struct *work);
int ivshmem_sessions(void *data);

/* Of the function that a device is behind. */
struct window *window_of(struct vbus_device *device);
const struct ram *ram_of(struct vbus_device *device);

/* Of a function. */
struct window *window_of_function(struct device *dev);

#endif
