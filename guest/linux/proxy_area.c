// SPDX-License-Identifier: GPL-2.0-only
/*
 * Where everything is in a shared area.
 *
 * A version of the area has one layout for a number of sources, so that the header is compared with
 * what it must be instead of being believed. Of what the device's side wrote nothing is used but
 * the number of sources.
 */
#include <linux/align.h>
#include <linux/export.h>
#include <linux/log2.h>
#include <linux/string.h>

#include "proxy.h"

static u64 take(u64 *at, u64 size, u64 align)
{
	u64 start = ALIGN(*at, align);

	*at = start + size;
	return start;
}

static void plan_events(struct vbus_events_places *places, u64 *at, u32 max_sources)
{
	const u64 sources = max_sources;

	places->slots = take(at, VBUS_PRIORITIES * sources * sizeof(struct vbus_slot),
			     VBUS_AREA_PAGE);
	places->stats = take(at, sources * sizeof(struct vbus_stats), 64);
	places->taken = take(at, sources * sizeof(__le32), VBUS_AREA_PAGE);
	places->sleep = take(at, VBUS_PRIORITIES * sizeof(struct vbus_sleep), 64);
}

static void plan(struct vbus_layout *layout, u32 max_sources)
{
	const u64 ring = sizeof(struct vbus_link_ring);
	u64 at = VBUS_AREA_PAGE;

	layout->max_sources = max_sources;
	layout->link_to_device = take(&at, ring, VBUS_AREA_PAGE);
	layout->link_to_driver = take(&at, ring, VBUS_AREA_PAGE);
	plan_events(&layout->to_device, &at, max_sources);
	plan_events(&layout->to_driver, &at, max_sources);
	layout->channels_to_device = take(&at, VBUS_PRIORITIES * ring, VBUS_AREA_PAGE);
	layout->channels_to_driver = take(&at, VBUS_PRIORITIES * ring, VBUS_AREA_PAGE);
	layout->regions = take(&at, VBUS_REGIONS_BYTES, VBUS_REGION_ALIGN);
	layout->total = at;
}

static void write_events(struct vbus_area_events *to, const struct vbus_events_places *from)
{
	to->slots = cpu_to_le64(from->slots);
	to->stats = cpu_to_le64(from->stats);
	to->taken = cpu_to_le64(from->taken);
	to->sleep = cpu_to_le64(from->sleep);
}

static void write_header(struct vbus_area_header *header, const struct vbus_layout *layout)
{
	*header = (struct vbus_area_header) {
		.magic = cpu_to_le64(VBUS_AREA_MAGIC),
		.version = cpu_to_le32(VBUS_AREA_VERSION),
		.header_bytes = cpu_to_le32(sizeof(*header)),
		.total = cpu_to_le64(layout->total),
		.priorities = cpu_to_le32(VBUS_PRIORITIES),
		.shards = cpu_to_le32(VBUS_SHARDS),
		.max_sources = cpu_to_le32(layout->max_sources),
		.link_bytes = cpu_to_le32(VBUS_LINK_BYTES),
		.link_to_device = cpu_to_le64(layout->link_to_device),
		.link_to_driver = cpu_to_le64(layout->link_to_driver),
		.channels_to_device = cpu_to_le64(layout->channels_to_device),
		.channels_to_driver = cpu_to_le64(layout->channels_to_driver),
		.regions = cpu_to_le64(layout->regions),
		.regions_bytes = cpu_to_le64(VBUS_REGIONS_BYTES),
	};
	write_events(&header->to_device, &layout->to_device);
	write_events(&header->to_driver, &layout->to_driver);
}

int vbus_area_read(const void *area, size_t size, u32 *version, struct vbus_layout *layout)
{
	const struct vbus_area_header *header = area;
	struct vbus_area_header found, wanted;
	u32 max_sources;

	BUILD_BUG_ON(sizeof(found) != 0x98);
	if (size < VBUS_AREA_PAGE)
		return -ENOENT;
	if (READ_ONCE(header->magic) != cpu_to_le64(VBUS_AREA_MAGIC))
		return -ENOENT;
	/* The magic was written last: what was written before is there when it is. */
	virt_rmb();
	memcpy(&found, area, sizeof(found));
	/* What is checked is the copy. */
	barrier();
	*version = le32_to_cpu(found.version);
	if (*version != VBUS_AREA_VERSION)
		return -EPROTONOSUPPORT;
	max_sources = le32_to_cpu(found.max_sources);
	if (!is_power_of_2(max_sources) || max_sources < 2 * VBUS_CHANNEL_SOURCES ||
	    max_sources > VBUS_MAX_SOURCES)
		return -EPROTO;
	plan(layout, max_sources);
	write_header(&wanted, layout);
	if (memcmp(&found, &wanted, sizeof(found)))
		return -EPROTO;
	if (layout->total > size || layout->total > VBUS_AREA_MAX)
		return -EPROTO;
	return 0;
}

int vbus_area_check(const void *area, size_t size, u32 *version, size_t *total)
{
	struct vbus_layout layout;
	int err;

	err = vbus_area_read(area, size, version, &layout);
	if (!err)
		*total = layout.total;
	return err;
}
EXPORT_SYMBOL_GPL(vbus_area_check);
