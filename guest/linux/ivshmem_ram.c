// SPDX-License-Identifier: GPL-2.0-only
/*
 * This guest's own memory, where the device's side shares it: devices find rings and buffers where
 * they are, and nothing is copied.
 *
 *	RAM_RANGE	where the device's side thinks that memory of this guest is, with nonces
 *	RAM_PROOF	a page of the range is taken, the nonce written there: is it seen?
 *	USE_MEMORY	these ranges, and no window
 *
 * Ranges where the kernel has no page to give to anybody are not proven, nor needed. If there are
 * pages elsewhere, the memory is not shared: a buffer there would be out of the devices' reach.
 *
 * The operations for DMA give physical addresses, whatever the architecture does for functions of
 * its own buses. They are not the kernel's direct ones, for two reasons: a buffer outside of the
 * ranges (memory that was plugged in later) is refused, as one is that finds no place in a window;
 * and what a device that is gone has not written reads as all ones: see @void_buffers.
 */
#include <linux/dma-map-ops.h>
#include <linux/gfp.h>
#include <linux/highmem.h>
#include <linux/ioport.h>
#include <linux/memory_hotplug.h>
#include <linux/mm.h>
#include <linux/pfn.h>
#include <linux/sizes.h>
#include <linux/version.h>

#include "ivshmem.h"

/* How many pages of a range are looked at, and how many are asked for, until one is had. */
#define LOOKS		4096
#define TRIES		256

/* What there is. */

/* The range that these bytes are in, if they are in one that was proven. */
static const struct ram_range *range_of(const struct ram *ram, u64 begin, size_t size)
{
	const struct ram_range *range;

	for (range = ram->ranges; range < ram->ranges + ram->count; range++)
		if (range->proven && begin >= range->begin && begin < range->end &&
		    size <= range->end - begin)
			return range;
	return NULL;
}

/* Whether a page is one that the kernel gives to whoever wants memory. */
static bool is_given(unsigned long pfn)
{
	struct page *page = pfn_to_online_page(pfn);

	return page && !PageReserved(page);
}

/* A part of this guest's memory: an error where pages of it are in no range. */
static int look_for_others(struct resource *part, void *data)
{
	const struct ram *ram = data;
	unsigned long pfn = PFN_UP(part->start), end = PFN_DOWN(part->end + 1);
	const struct ram_range *range;

	while (pfn < end) {
		range = range_of(ram, PFN_PHYS(pfn), PAGE_SIZE);
		if (!range && is_given(pfn))
			return -ENXIO;
		pfn = range ? max(pfn + 1, (unsigned long)PFN_DOWN(range->end)) : pfn + 1;
		cond_resched();
	}
	return 0;
}

/* Proving. */

#if !IS_ENABLED(CONFIG_CONTIG_ALLOC)
static int take_page(unsigned long pfn)
{
	return -EOPNOTSUPP;
}

static void give_page(unsigned long pfn)
{
}
#else
static int take_page(unsigned long pfn)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 17, 0)
	return alloc_contig_range(pfn, pfn + 1, ACR_FLAGS_NONE, GFP_KERNEL | __GFP_NOWARN);
#else
	return alloc_contig_range(pfn, pfn + 1, MIGRATE_MOVABLE, GFP_KERNEL | __GFP_NOWARN);
#endif
}

static void give_page(unsigned long pfn)
{
	free_contig_range(pfn, 1);
}
#endif

/*
 * Take some page of a range that is nobody else's, the last ones first, which are seldom used. 0
 * when there is none.
 */
static unsigned long take_some_page(const struct ram_range *range)
{
	unsigned long first = PFN_UP(range->begin), end = PFN_DOWN(range->end), pfn;
	unsigned long step, look;
	unsigned int tries = 0;

	if (first >= end)
		return 0;
	step = DIV_ROUND_UP(end - first, LOOKS);
	for (look = 0; look < DIV_ROUND_UP(end - first, step) && tries < TRIES; look++) {
		pfn = end - 1 - look * step;
		if (!is_given(pfn))
			continue;
		if (!take_page(pfn))
			return pfn;
		tries++;
		cond_resched();
	}
	return 0;
}

static void write_page(unsigned long pfn, u64 nonce)
{
	__le64 *page = kmap_local_page(pfn_to_page(pfn));

	WRITE_ONCE(*page, cpu_to_le64(nonce));
	kunmap_local(page);
}

static int ask(struct vbus_proxy *proxy, u8 id, const void *body, size_t size, void *answer,
	       size_t room)
{
	struct vbus_request request = {
		.id = id,
		.bus = true,
		.body = body,
		.size = size,
		.answer = answer,
		.least = room,
		.room = room,
	};
	int err = vbus_proxy_ask(proxy, &request);

	return min(err, 0);
}

/* Where the device's side thinks that memory is. */
static int ask_range(struct vbus_proxy *proxy, struct ram *ram, u32 index, u64 *nonce)
{
	struct ram_range *range = &ram->ranges[index];
	struct vbus_index wanted = { .index = cpu_to_le32(index) };
	struct vbus_ram_range answer;
	u32 count;
	u64 size;
	int err;

	err = ask(proxy, VBUS_RAM_RANGE, &wanted, sizeof(wanted), &answer, sizeof(answer));
	if (err)
		return err;
	count = le32_to_cpu(answer.count);
	range->begin = le64_to_cpu(answer.address);
	size = le64_to_cpu(answer.size);
	range->end = range->begin + size;
	range->proven = false;
	*nonce = le64_to_cpu(answer.nonce);
	if (le32_to_cpu(answer.index) != index || !count || count > RAM_RANGES ||
	    (index && count != ram->count) || !size || range->end <= range->begin ||
	    range->end > PHYS_ADDR_MAX)
		return -EPROTO;
	ram->count = count;
	return 0;
}

static int prove(struct vbus_proxy *proxy, struct ram *ram, u32 index)
{
	struct ram_range *range = &ram->ranges[index];
	struct vbus_ram_proof proof = { .index = cpu_to_le32(index) };
	unsigned long pfn;
	u64 nonce;
	int err;

	err = ask_range(proxy, ram, index, &nonce);
	if (err)
		return err;
	pfn = take_some_page(range);
	if (!pfn)
		return 0;
	write_page(pfn, nonce);
	proof.address = cpu_to_le64(PFN_PHYS(pfn));
	err = ask(proxy, VBUS_RAM_PROOF, &proof, sizeof(proof), NULL, 0);
	write_page(pfn, 0);
	give_page(pfn);
	range->proven = !err;
	return err;
}

static int prove_all(struct vbus_proxy *proxy, struct ram *ram)
{
	u32 index = 0;
	int err;

	do {
		err = prove(proxy, ram, index);
	} while (!err && ++index < ram->count);
	return err;
}

static int use(struct vbus_proxy *proxy, u32 kind)
{
	struct vbus_use_memory body = { .memory_kind = cpu_to_le32(kind) };

	return ask(proxy, VBUS_USE_MEMORY, &body, sizeof(body), NULL, 0);
}

/* What of the ranges was proven, in MiB. */
static u64 proven_mib(const struct ram *ram)
{
	u64 bytes = 0;
	u32 i;

	for (i = 0; i < ram->count; i++)
		if (ram->ranges[i].proven)
			bytes += ram->ranges[i].end - ram->ranges[i].begin;
	return bytes / SZ_1M;
}

/**
 * ram_share() - have this guest's memory shared with the device's side, which offers it
 * @ram: becomes what is shared
 * @proxy: the bus, which was said HELLO to
 * @dev: for whom messages are
 *
 * Return: VBUS_MEMORY_SHARED, or VBUS_MEMORY_WINDOW when that cannot be: then it was said why. An
 * error when the bus does not answer.
 */
int ram_share(struct ram *ram, struct vbus_proxy *proxy, struct device *dev)
{
	const char *why = "the bus does not find it";
	int err;

	ram->count = 0;
	err = prove_all(proxy, ram);
	if (!err) {
		why = "some of it is not the bus's to reach";
		err = walk_iomem_res_desc(IORES_DESC_NONE, IORESOURCE_SYSTEM_RAM | IORESOURCE_BUSY,
					  0, -1, ram, look_for_others);
	}
	if (!err) {
		why = "the bus refuses it";
		err = use(proxy, VBUS_MEMORY_SHARED);
	}
	if (!err) {
		dev_info(dev, "memory is shared with the bus: %llu MiB\n", proven_mib(ram));
		return VBUS_MEMORY_SHARED;
	}
	ram->count = 0;
	if (err == -ENODEV || err == -ETIMEDOUT || err == -EPROTO)
		return err;
	dev_warn(dev, "memory is not shared, a window is used: %s (%d)\n", why, err);
	err = use(proxy, VBUS_MEMORY_WINDOW);
	return err ? err : VBUS_MEMORY_WINDOW;
}

/* The operations. */

static const struct ram *ram_at(struct device *dev)
{
	return ram_of(to_vbus_device(dev));
}

/* The device is gone, or failed: it reads as from a PCI function that is gone. */
static void void_buffer(struct device *dev, phys_addr_t memory, size_t size)
{
	size_t part;

	if (!READ_ONCE(to_vbus_device(dev)->void_buffers))
		return;
	for (; size; size -= part, memory += part) {
		part = min_t(size_t, size, PAGE_SIZE - offset_in_page(memory));
		memset_page(pfn_to_page(PHYS_PFN(memory)), offset_in_page(memory), 0xff, part);
	}
}

static dma_addr_t ram_map_page(struct device *dev, struct page *page, unsigned long offset,
			       size_t size, enum dma_data_direction direction,
			       unsigned long attrs)
{
	phys_addr_t memory = page_to_phys(page) + offset;

	return range_of(ram_at(dev), memory, size) ? memory : DMA_MAPPING_ERROR;
}

static void ram_unmap_page(struct device *dev, dma_addr_t address, size_t size,
			   enum dma_data_direction direction, unsigned long attrs)
{
	if (direction != DMA_TO_DEVICE && !(attrs & DMA_ATTR_SKIP_CPU_SYNC))
		void_buffer(dev, address, size);
}

static void ram_sync_for_cpu(struct device *dev, dma_addr_t address, size_t size,
			     enum dma_data_direction direction)
{
	if (direction != DMA_TO_DEVICE)
		void_buffer(dev, address, size);
}

static void *ram_alloc(struct device *dev, size_t size, dma_addr_t *address, gfp_t gfp,
		       unsigned long attrs)
{
	void *memory = alloc_pages_exact(size, gfp | __GFP_ZERO);

	if (memory && !range_of(ram_at(dev), virt_to_phys(memory), size)) {
		free_pages_exact(memory, size);
		return NULL;
	}
	if (memory)
		*address = virt_to_phys(memory);
	return memory;
}

static void ram_release(struct device *dev, size_t size, void *memory, dma_addr_t address,
			unsigned long attrs)
{
	free_pages_exact(memory, size);
}

static const struct dma_map_ops ram_ops = {
	.alloc = ram_alloc,
	.free = ram_release,
	.map_page = ram_map_page,
	.unmap_page = ram_unmap_page,
	.map_sg = sg_map,
	.unmap_sg = sg_unmap,
	.sync_single_for_cpu = ram_sync_for_cpu,
	.sync_sg_for_cpu = sg_sync_for_cpu,
};

void ram_setup_dma(struct vbus_device *device)
{
	device->dma_mask = DMA_BIT_MASK(64);
	device->dev.dma_mask = &device->dma_mask;
	device->dev.coherent_dma_mask = DMA_BIT_MASK(64);
	set_dma_ops(&device->dev, &ram_ops);
}
