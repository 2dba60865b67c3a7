// SPDX-License-Identifier: GPL-2.0-only
/*
 * Lists of buffers for DMA: each is mapped by itself, with the operations that its device has.
 */
#include <linux/dma-map-ops.h>
#include <linux/scatterlist.h>

#include "ivshmem.h"

void sg_unmap(struct device *dev, struct scatterlist *list, int count,
	      enum dma_data_direction direction, unsigned long attrs)
{
	const struct dma_map_ops *ops = get_dma_ops(dev);
	struct scatterlist *part;
	int i;

	for_each_sg(list, part, count, i)
		ops->unmap_page(dev, sg_dma_address(part), sg_dma_len(part), direction, attrs);
}

/* All of them, or none. */
int sg_map(struct device *dev, struct scatterlist *list, int count,
	   enum dma_data_direction direction, unsigned long attrs)
{
	const struct dma_map_ops *ops = get_dma_ops(dev);
	struct scatterlist *part;
	int i;

	for_each_sg(list, part, count, i) {
		part->dma_address = ops->map_page(dev, sg_page(part), part->offset, part->length,
						  direction, attrs);
		if (part->dma_address == DMA_MAPPING_ERROR) {
			sg_unmap(dev, list, i, direction, attrs | DMA_ATTR_SKIP_CPU_SYNC);
			return -ENOMEM;
		}
		sg_dma_len(part) = part->length;
	}
	return count;
}

void sg_sync_for_cpu(struct device *dev, struct scatterlist *list, int count,
		     enum dma_data_direction direction)
{
	const struct dma_map_ops *ops = get_dma_ops(dev);
	struct scatterlist *part;
	int i;

	for_each_sg(list, part, count, i)
		ops->sync_single_for_cpu(dev, sg_dma_address(part), sg_dma_len(part), direction);
}

void sg_sync_for_device(struct device *dev, struct scatterlist *list, int count,
			enum dma_data_direction direction)
{
	const struct dma_map_ops *ops = get_dma_ops(dev);
	struct scatterlist *part;
	int i;

	for_each_sg(list, part, count, i)
		ops->sync_single_for_device(dev, sg_dma_address(part), sg_dma_len(part), direction);
}
