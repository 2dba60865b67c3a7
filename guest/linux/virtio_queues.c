// SPDX-License-Identifier: GPL-2.0-only
/*
 * The queues of virtio_vbus: making and deleting them, notifications both ways, and their end when
 * a device does not go on.
 *
 * Rings and buffers are made visible to the device by the DMA operations that the connector gave
 * the vbus device, which is the parent of the virtio device. Notifications are events: see
 * proxy_events.c.
 *
 * A device that is gone, or that needs a reset, must not leave anybody waiting: its queues are
 * broken, so that nothing more is put into them, and requests of a disk that it has not answered
 * are ended.
 */
#include <linux/blk-mq.h>
#include <linux/log2.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_ring.h>

#include "virtio_vbus.h"

/* Descriptors of a queue, at most: a larger one would take a large part of a window. */
#define MAX_QUEUE_SIZE	1024

static bool vv_notify(struct virtqueue *vq)
{
	vbus_queue_signal(vq->priv);
	return true;
}

static void heard(struct vbus_queue *queue)
{
	struct virtqueue *vq = queue->data;

	if (!READ_ONCE(vq->reset))
		vring_interrupt(0, vq);
}

/* The session is over; in hard interrupt. */
static void lost(struct vbus_queue *queue)
{
	__virtqueue_break(queue->data);
}

/*
 * Callbacks are called in interrupts, or behind rcu_read_lock(). Expedited: a bus may go with a
 * thousand devices, one after the other.
 */
void vv_synchronize_cbs(struct virtio_device *vdev)
{
	synchronize_rcu_expedited();
}

/* As large as it can be; with split rings a power of two. */
static int queue_size(struct virtio_vbus_device *vv, u32 index)
{
	struct vbus_index wanted = { .index = cpu_to_le32(index) };
	struct vbus_vqueue has;
	u32 size;
	int err;

	err = vv_ask(vv, VBUS_GET_VQUEUE, &wanted, sizeof(wanted), &has, sizeof(has));
	if (err)
		return err;
	size = min_t(u32, le32_to_cpu(has.max_size), MAX_QUEUE_SIZE);
	if (!size)
		return -ENOENT;
	if (__virtio_test_bit(&vv->vdev, VIRTIO_F_RING_PACKED))
		return size;
	return rounddown_pow_of_two(size);
}

static int tell_queue(struct virtio_vbus_device *vv, struct virtqueue *vq, u32 index)
{
	struct vbus_vqueue body = {
		.index = cpu_to_le32(index),
		.size = cpu_to_le32(virtqueue_get_vring_size(vq)),
		.desc = cpu_to_le64(virtqueue_get_desc_addr(vq)),
		.driver = cpu_to_le64(virtqueue_get_avail_addr(vq)),
		.device = cpu_to_le64(virtqueue_get_used_addr(vq)),
	};

	return vv_ask(vv, VBUS_SET_VQUEUE, &body, sizeof(body), NULL, 0);
}

static struct virtqueue *setup_queue(struct virtio_vbus_device *vv, u32 index,
				     vq_callback_t *callback, const char *name, bool ctx)
{
	struct vbus_queue *queue;
	struct virtqueue *vq;
	int size, err;

	if (index >= READ_ONCE(vv->device->known))
		return ERR_PTR(-ENOENT);
	queue = &vv->device->queues[index];
	size = queue_size(vv, index);
	if (size < 0)
		return ERR_PTR(size);
	mutex_lock(&vv->queues_lock);
	vv->has_queues = true;
	vq = vring_create_virtqueue(index, size, SMP_CACHE_BYTES, &vv->vdev, true, true, ctx,
				    vv_notify, callback, name);
	if (vq)
		vq->priv = queue;
	mutex_unlock(&vv->queues_lock);
	if (!vq)
		return ERR_PTR(-ENOMEM);
	queue->heard = heard;
	queue->lost = lost;
	queue->data = vq;
	err = vbus_queue_open(queue);
	if (!err)
		err = tell_queue(vv, vq, index);
	if (!err && READ_ONCE(vv->device->gone))
		err = -ENODEV;
	/* What was made is taken back by vv_del_vqs(). */
	return err ? ERR_PTR(err) : vq;
}

void vv_del_vqs(struct virtio_device *vdev)
{
	struct virtio_vbus_device *vv = to_vv(vdev);
	struct virtqueue *vq, *next;

	list_for_each_entry(vq, &vdev->vqs, list)
		vbus_queue_close(vq->priv);
	vv_synchronize_cbs(vdev);
	mutex_lock(&vv->queues_lock);
	list_for_each_entry_safe(vq, next, &vdev->vqs, list)
		vring_del_virtqueue(vq);
	mutex_unlock(&vv->queues_lock);
}

/* Before the queues are made: nothing is void of a new generation. */
static int begin_vqs(struct virtio_vbus_device *vv)
{
	if (!READ_ONCE(vv->device->gone))
		WRITE_ONCE(vv->device->void_buffers, false);
	return vbus_device_sources(vv->device);
}

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
int vv_find_vqs(struct virtio_device *vdev, unsigned int nvqs, struct virtqueue *vqs[],
		struct virtqueue_info infos[], struct irq_affinity *desc)
#define QUEUE_NAME(i)		(infos[i].name)
#define QUEUE_CALLBACK(i)	(infos[i].callback)
#define QUEUE_CTX(i)		(infos[i].ctx)
#else
int vv_find_vqs(struct virtio_device *vdev, unsigned int nvqs, struct virtqueue *vqs[],
		vq_callback_t *callbacks[], const char * const names[], const bool *ctx,
		struct irq_affinity *desc)
#define QUEUE_NAME(i)		(names[i])
#define QUEUE_CALLBACK(i)	(callbacks[i])
#define QUEUE_CTX(i)		(ctx ? ctx[i] : false)
#endif
{
	struct virtio_vbus_device *vv = to_vv(vdev);
	unsigned int i, index = 0;
	int err;

	err = begin_vqs(vv);
	for (i = 0; !err && i < nvqs; i++) {
		vqs[i] = NULL;
		/* A queue without a name is one that the driver does not use; it has no index. */
		if (!QUEUE_NAME(i))
			continue;
		vqs[i] = setup_queue(vv, index++, QUEUE_CALLBACK(i), QUEUE_NAME(i), QUEUE_CTX(i));
		err = PTR_ERR_OR_ZERO(vqs[i]);
	}
	if (err)
		vv_del_vqs(vdev);
	return err;
}

/* The driver wants to set up one queue anew: see RESET_VQUEUE. The queue's events go on. */
int vv_disable_vq_and_reset(struct virtqueue *vq)
{
	struct vbus_index wanted = { .index = cpu_to_le32(vq->index) };
	int err;

	if (!virtio_has_feature(vq->vdev, VIRTIO_F_RING_RESET))
		return -ENOENT;
	err = vv_ask(to_vv(vq->vdev), VBUS_RESET_VQUEUE, &wanted, sizeof(wanted), NULL, 0);
	if (err)
		return err;
	WRITE_ONCE(vq->reset, true);
	vv_synchronize_cbs(vq->vdev);
	return 0;
}

int vv_enable_vq_after_reset(struct virtqueue *vq)
{
	int err;

	if (!vq->reset)
		return -EBUSY;
	err = tell_queue(to_vv(vq->vdev), vq, vq->index);
	if (!err)
		WRITE_ONCE(vq->reset, false);
	return err;
}

/* Devices that do not go on. */

/*
 * Requests of a disk that will not be answered end with an error; else removing the disk would wait
 * for them for ever. The driver does that by itself only in newer kernels. What it gave the queue
 * with a request is the request's private data. The status, which the device should have written,
 * reads as all ones, which is an error: see @void_buffers.
 */
static void end_disk_requests(struct virtio_vbus_device *vv)
{
	struct request_queue *stopped = NULL;
	struct request *request;
	struct virtqueue *vq;
	void *data;

	list_for_each_entry(vq, &vv->vdev.vqs, list) {
		while ((data = virtqueue_detach_unused_buf(vq))) {
			request = blk_mq_rq_from_pdu(data);
			stopped = request->q;
			blk_mq_complete_request(request);
		}
	}
	/*
	 * The queue may have been full. The disk is still there: its driver deletes the queues
	 * before it lets go.
	 */
	if (stopped)
		blk_mq_start_stopped_hw_queues(stopped, true);
}

bool vv_break(struct virtio_vbus_device *vv)
{
	bool has_queues;

	mutex_lock(&vv->queues_lock);
	/* Before there is a queue, the list of queues may not be one yet. */
	has_queues = vv->has_queues;
	if (has_queues)
		virtio_break_device(&vv->vdev);
	mutex_unlock(&vv->queues_lock);
	return has_queues;
}

void vv_end_requests(struct virtio_vbus_device *vv)
{
	if (!vv_break(vv))
		return;
	/*
	 * Whoever uses a queue has its lock, and interrupts off: now nobody is in the middle of it.
	 * Not with the lock of the queues held: somebody may hold a processor until another device
	 * is broken, and whoever breaks that one may come here before.
	 */
	synchronize_rcu_expedited();
	if (!IS_ENABLED(CONFIG_BLOCK) || vv->vdev.id.device != VIRTIO_ID_BLOCK)
		return;
	mutex_lock(&vv->queues_lock);
	end_disk_requests(vv);
	mutex_unlock(&vv->queues_lock);
}
