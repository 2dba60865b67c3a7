// SPDX-License-Identifier: GPL-2.0-only
/*
 * The window: the part of the function's memory behind the shared area, where the device's side
 * finds rings and buffers.
 *
 * The device's side sees nothing of this guest but this memory. Rings are allocated in it. Buffers
 * are copied: into a place of it when they are mapped, and back when they are unmapped or
 * synchronised. The addresses that drivers are given for that are offsets into the function's BAR.
 *
 *	dma_map	-----> a place, bytes copied in -----> the device reads and writes there
 *	buffer <------ bytes copied out <------------- dma_unmap, dma_sync
 *
 * Places are whole pages, or pieces of 64 to 2048 bytes of a page that has only pieces of one size.
 * Where a buffer came from is kept outside of the window: nothing that the device's side can write
 * is believed, neither addresses nor lengths.
 *
 * When there is no place, mapping fails with DMA_MAPPING_ERROR, which drivers know: block requests
 * wait and come again, network frames are dropped.
 */
#include <linux/bitmap.h>
#include <linux/dma-map-ops.h>
#include <linux/highmem.h>
#include <linux/list.h>
#include <linux/sizes.h>
#include <linux/slab.h>

#include "ivshmem.h"

/* Pages of the window, which are the same everywhere. */
#define WINDOW_SHIFT	12
#define WINDOW_PAGE	BIT(WINDOW_SHIFT)
/* Sizes of pieces: 64 << 0 to 64 << 5 bytes. */
#define PIECE_SHIFT	6
#define LEAST_PIECE	BIT(PIECE_SHIFT)
#define SIZES		ARRAY_SIZE(((struct window *)NULL)->partial)
/*
 * A buffer has at most so many bytes, or a sixteenth of the window: a larger one would seldom find
 * a place.
 */
#define MAX_BUFFER	SZ_256K

/* Where a buffer came from. */
struct origin {
	phys_addr_t memory;
	u32 size;
};

/**
 * struct window_page - what a page of the window is used for
 * @list: in @partial, when it has pieces of which some are free
 * @first: of several pages, the first
 * @count: of the first of several pages, how many; 0 for a page of pieces
 * @size: of a page of pieces, their size
 * @free: of a page of pieces, a bit for each that is free
 * @origin: of whole pages
 * @origins: of a page of pieces
 */
struct window_page {
	struct list_head list;
	u32 first;
	u32 count;
	u8 size;
	u64 free;
	struct origin origin;
	struct origin *origins;
};

/* Places. All of these with the lock held. */

static unsigned int pieces_of(unsigned int size)
{
	return WINDOW_PAGE >> (PIECE_SHIFT + size);
}

static u64 all_pieces(unsigned int size)
{
	return GENMASK_ULL(pieces_of(size) - 1, 0);
}

static size_t in_page(size_t offset)
{
	return offset % WINDOW_PAGE;
}

static long take_pages(struct window *window, unsigned int count)
{
	unsigned long at;
	unsigned int i;

	at = bitmap_find_next_zero_area(window->used, window->pages, window->hint, count, 0);
	if (at >= window->pages)
		at = bitmap_find_next_zero_area(window->used, window->pages, 0, count, 0);
	if (at >= window->pages) {
		window->full++;
		return -ENOSPC;
	}
	bitmap_set(window->used, at, count);
	window->in_use += count;
	window->hint = at + count;
	for (i = 0; i < count; i++)
		window->page[at + i].first = at;
	window->page[at].count = count;
	return at;
}

static void give_pages(struct window *window, unsigned long first)
{
	bitmap_clear(window->used, first, window->page[first].count);
	window->in_use -= window->page[first].count;
}

static struct window_page *new_page_of_pieces(struct window *window, unsigned int size)
{
	struct window_page *page;
	struct origin *origins;
	long at;

	origins = kmalloc_array(pieces_of(size), sizeof(*origins), GFP_ATOMIC | __GFP_NOWARN);
	if (!origins)
		return NULL;
	at = take_pages(window, 1);
	if (at < 0) {
		kfree(origins);
		return NULL;
	}
	page = &window->page[at];
	page->size = size;
	page->free = all_pieces(size);
	page->origins = origins;
	list_add(&page->list, &window->partial[size]);
	return page;
}

static struct origin *take_piece(struct window *window, unsigned int size, size_t *offset)
{
	struct window_page *page;
	unsigned int piece;

	page = list_first_entry_or_null(&window->partial[size], struct window_page, list);
	if (!page)
		page = new_page_of_pieces(window, size);
	if (!page)
		return NULL;
	piece = __ffs64(page->free);
	page->free &= ~BIT_ULL(piece);
	if (!page->free)
		list_del(&page->list);
	*offset = ((page - window->page) << WINDOW_SHIFT) + (piece << (PIECE_SHIFT + size));
	return &page->origins[piece];
}

static void give_piece(struct window *window, struct window_page *page, unsigned int piece)
{
	if (!page->free)
		list_add(&page->list, &window->partial[page->size]);
	page->free |= BIT_ULL(piece);
	/* The last page of its size stays: it will be wanted again. */
	if (page->free == all_pieces(page->size) &&
	    !list_is_singular(&window->partial[page->size])) {
		list_del(&page->list);
		kfree(page->origins);
		page->origins = NULL;
		give_pages(window, page - window->page);
	}
}

/* A place for so many bytes: where it is, and where its origin is kept. NULL when there is none. */
static struct origin *take_place(struct window *window, size_t size, size_t *offset)
{
	long at;

	if (size <= LEAST_PIECE)
		return take_piece(window, 0, offset);
	if (size <= WINDOW_PAGE / 2)
		return take_piece(window, fls(size - 1) - PIECE_SHIFT, offset);
	at = take_pages(window, DIV_ROUND_UP(size, WINDOW_PAGE));
	if (at < 0)
		return NULL;
	*offset = at << WINDOW_SHIFT;
	return &window->page[at].origin;
}

/*
 * The origin of the place at @offset, which may be in the middle of it: then @offset becomes where
 * it begins.
 */
static struct origin *find_place(struct window *window, size_t *offset)
{
	struct window_page *page = &window->page[*offset >> WINDOW_SHIFT];
	unsigned int piece;

	if (page->origins) {
		piece = in_page(*offset) >> (PIECE_SHIFT + page->size);
		*offset = round_down(*offset, 1UL << (PIECE_SHIFT + page->size));
		return &page->origins[piece];
	}
	*offset = (size_t)page->first << WINDOW_SHIFT;
	return &window->page[page->first].origin;
}

static void give_place(struct window *window, size_t offset)
{
	struct window_page *page = &window->page[offset >> WINDOW_SHIFT];

	if (page->origins)
		give_piece(window, page, in_page(offset) >> (PIECE_SHIFT + page->size));
	else
		give_pages(window, page->first);
}

/* Copying. */

/* A buffer's bytes are next to each other in memory, but not always in the kernel's addresses. */
static void copy(void *place, phys_addr_t memory, size_t size, bool in)
{
	size_t part;
	void *page;

	for (; size; size -= part, memory += part, place += part) {
		part = min_t(size_t, size, PAGE_SIZE - offset_in_page(memory));
		page = kmap_local_page(pfn_to_page(PHYS_PFN(memory)));
		if (in)
			memcpy(place, page + offset_in_page(memory), part);
		else
			memcpy(page + offset_in_page(memory), place, part);
		kunmap_local(page);
	}
}

/* What the device's side sees of a buffer, at first. */
static void copy_in(void *place, const struct origin *origin, enum dma_data_direction direction)
{
	/*
	 * A device may write less than the buffer holds. What it leaves shall be neither what
	 * others had in this place, nor this guest's own memory for the other side to read.
	 */
	if (direction == DMA_FROM_DEVICE)
		memset(place, 0, origin->size);
	else
		copy(place, origin->memory, origin->size, true);
}

static struct window *window_at(struct device *dev)
{
	return window_of(to_vbus_device(dev));
}

/* What the device's side wrote. @size bytes at @address, in a place that was mapped. */
static void copy_out(struct device *dev, dma_addr_t address, size_t size)
{
	struct window *window = window_at(dev);
	size_t offset = address - window->address, begin = offset;
	const struct origin *origin = find_place(window, &begin);
	void *place = window->memory + offset;

	size = min_t(size_t, size, origin->size - min_t(size_t, offset - begin, origin->size));
	/* Nothing was completed: it reads as from a PCI function that is gone. */
	if (READ_ONCE(to_vbus_device(dev)->void_buffers))
		memset(place, 0xff, size);
	copy(place, origin->memory + (offset - begin), size, false);
}

/* The operations. */

static dma_addr_t window_map_page(struct device *dev, struct page *page, unsigned long offset,
				  size_t size, enum dma_data_direction direction,
				  unsigned long attrs)
{
	struct window *window = window_at(dev);
	struct origin *origin;
	unsigned long flags;
	size_t place;

	if (!size || size > window->most)
		return DMA_MAPPING_ERROR;
	spin_lock_irqsave(&window->lock, flags);
	origin = take_place(window, size, &place);
	if (origin) {
		origin->memory = page_to_phys(page) + offset;
		origin->size = size;
	}
	spin_unlock_irqrestore(&window->lock, flags);
	if (!origin)
		return DMA_MAPPING_ERROR;
	if (!(attrs & DMA_ATTR_SKIP_CPU_SYNC) || direction == DMA_FROM_DEVICE)
		copy_in(window->memory + place, origin, direction);
	return window->address + place;
}

static void window_unmap_page(struct device *dev, dma_addr_t address, size_t size,
			      enum dma_data_direction direction, unsigned long attrs)
{
	struct window *window = window_at(dev);
	unsigned long flags;

	if (direction != DMA_TO_DEVICE && !(attrs & DMA_ATTR_SKIP_CPU_SYNC))
		copy_out(dev, address, size);
	spin_lock_irqsave(&window->lock, flags);
	give_place(window, address - window->address);
	spin_unlock_irqrestore(&window->lock, flags);
}

static void window_sync_for_cpu(struct device *dev, dma_addr_t address, size_t size,
				enum dma_data_direction direction)
{
	if (direction != DMA_TO_DEVICE)
		copy_out(dev, address, size);
}

static void window_sync_for_device(struct device *dev, dma_addr_t address, size_t size,
				   enum dma_data_direction direction)
{
	struct window *window = window_at(dev);
	size_t offset = address - window->address, begin = offset;
	const struct origin *origin = find_place(window, &begin);

	if (direction == DMA_FROM_DEVICE)
		return;
	size = min_t(size_t, size, origin->size - min_t(size_t, offset - begin, origin->size));
	copy(window->memory + offset, origin->memory + (offset - begin), size, true);
}

/* Rings: memory that both sides see all the time. */
static void *window_alloc(struct device *dev, size_t size, dma_addr_t *address, gfp_t gfp,
			  unsigned long attrs)
{
	struct window *window = window_at(dev);
	unsigned long flags;
	void *memory;
	long at;

	if (!size || size > window->pages << WINDOW_SHIFT)
		return NULL;
	spin_lock_irqsave(&window->lock, flags);
	at = take_pages(window, DIV_ROUND_UP(size, WINDOW_PAGE));
	spin_unlock_irqrestore(&window->lock, flags);
	if (at < 0)
		return NULL;
	memory = window->memory + (at << WINDOW_SHIFT);
	memset(memory, 0, size);
	*address = window->address + (at << WINDOW_SHIFT);
	return memory;
}

static void window_release(struct device *dev, size_t size, void *memory, dma_addr_t address,
			   unsigned long attrs)
{
	struct window *window = window_at(dev);
	unsigned long flags;

	spin_lock_irqsave(&window->lock, flags);
	give_pages(window, (address - window->address) >> WINDOW_SHIFT);
	spin_unlock_irqrestore(&window->lock, flags);
}

static size_t window_max_mapping_size(struct device *dev)
{
	return window_at(dev)->most;
}

static const struct dma_map_ops window_ops = {
	.alloc = window_alloc,
	.free = window_release,
	.map_page = window_map_page,
	.unmap_page = window_unmap_page,
	.map_sg = sg_map,
	.unmap_sg = sg_unmap,
	.sync_single_for_cpu = window_sync_for_cpu,
	.sync_single_for_device = window_sync_for_device,
	.sync_sg_for_cpu = sg_sync_for_cpu,
	.sync_sg_for_device = sg_sync_for_device,
	.max_mapping_size = window_max_mapping_size,
};

void window_setup_dma(struct vbus_device *device)
{
	device->dma_mask = DMA_BIT_MASK(64);
	device->dev.dma_mask = &device->dma_mask;
	device->dev.coherent_dma_mask = DMA_BIT_MASK(64);
	set_dma_ops(&device->dev, &window_ops);
}

/* What sysfs shows of the window: bytes, and how often a buffer found no place. */

static ssize_t size_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%lu\n", window_of_function(dev)->pages << WINDOW_SHIFT);
}
static DEVICE_ATTR_RO(size);

static ssize_t used_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct window *window = window_of_function(dev);

	return sysfs_emit(buf, "%lu\n", READ_ONCE(window->in_use) << WINDOW_SHIFT);
}
static DEVICE_ATTR_RO(used);

static ssize_t full_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%lu\n", READ_ONCE(window_of_function(dev)->full));
}
static DEVICE_ATTR_RO(full);

static struct attribute *window_attrs[] = {
	&dev_attr_size.attr,
	&dev_attr_used.attr,
	&dev_attr_full.attr,
	NULL,
};

const struct attribute_group window_group = {
	.name = "window",
	.attrs = window_attrs,
};

/* The beginning and the end. */

int window_init(struct window *window, void *memory, u64 address, size_t size)
{
	unsigned int i;

	window->memory = memory;
	window->address = address;
	window->pages = size >> WINDOW_SHIFT;
	window->in_use = 0;
	window->hint = 0;
	window->full = 0;
	window->most = min_t(size_t, MAX_BUFFER, size / 16);
	spin_lock_init(&window->lock);
	for (i = 0; i < SIZES; i++)
		INIT_LIST_HEAD(&window->partial[i]);
	window->page = kvcalloc(window->pages, sizeof(*window->page), GFP_KERNEL);
	window->used = bitmap_zalloc(window->pages, GFP_KERNEL);
	if (window->page && window->used)
		return 0;
	window_free(window);
	return -ENOMEM;
}

/* No device has anything in it any more. */
void window_free(struct window *window)
{
	unsigned long i;

	for (i = 0; window->page && i < window->pages; i++)
		kfree(window->page[i].origins);
	kvfree(window->page);
	bitmap_free(window->used);
	window->page = NULL;
	window->used = NULL;
}
