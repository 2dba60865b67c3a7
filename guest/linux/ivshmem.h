/* SPDX-License-Identifier: GPL-2.0-only */
/* The parts of vbus_ivshmem. */
#ifndef VBUS_IVSHMEM_H
#define VBUS_IVSHMEM_H

#include <linux/list.h>
#include <linux/spinlock.h>
#include <linux/types.h>

struct device;
struct vbus_device;
struct window_page;

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
unsigned long window_bytes(struct window *window);
unsigned long window_bytes_used(struct window *window);
void window_setup_dma(struct vbus_device *device);

/* Of the function that a device is behind. */
struct window *window_of(struct vbus_device *device);

#endif
