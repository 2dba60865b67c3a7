/* SPDX-License-Identifier: GPL-2.0-only */
/* The parts of virtio_vbus: virtio_main.c, and virtio_queues.c. */
#ifndef VIRTIO_VBUS_H
#define VIRTIO_VBUS_H

#include <linux/mutex.h>
#include <linux/version.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/workqueue.h>

#include "vbus.h"

struct virtio_vbus_device {
	struct virtio_device vdev;
	struct vbus_device *device;
	u32 generation;			/* of config space, as last read */
	u8 status;			/* what came of what was last set */
	bool registered;		/* config changes may be told; by the device's lock */
	bool missed;			/* there was one before; the same */
	struct mutex queues_lock;	/* guards the queues against who breaks them, and: */
	bool has_queues;		/* it has, or has had, some */
	struct work_struct failed;
	struct work_struct gone;
};

static inline struct virtio_vbus_device *to_vv(struct virtio_device *vdev)
{
	return container_of(vdev, struct virtio_vbus_device, vdev);
}

/* virtio_main.c: a question about the device, whose answer has @room bytes. 0, or an error. */
int vv_ask(struct virtio_vbus_device *vv, u8 id, const void *body, size_t size, void *answer,
	   size_t room);

/* virtio_queues.c: the operations for queues. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
int vv_find_vqs(struct virtio_device *vdev, unsigned int nvqs, struct virtqueue *vqs[],
		struct virtqueue_info infos[], struct irq_affinity *desc);
#else
int vv_find_vqs(struct virtio_device *vdev, unsigned int nvqs, struct virtqueue *vqs[],
		vq_callback_t *callbacks[], const char * const names[], const bool *ctx,
		struct irq_affinity *desc);
#endif
void vv_del_vqs(struct virtio_device *vdev);
void vv_synchronize_cbs(struct virtio_device *vdev);
int vv_disable_vq_and_reset(struct virtqueue *vq);
int vv_enable_vq_after_reset(struct virtqueue *vq);

/*
 * Nothing is put into the queues any more, and whoever looks for an answer looks no longer. Waits
 * for nobody. Whether there are queues.
 */
bool vv_break(struct virtio_vbus_device *vv);

/* The same, and end what was not answered: the device touches no buffers any more. May wait. */
void vv_end_requests(struct virtio_vbus_device *vv);

#endif
