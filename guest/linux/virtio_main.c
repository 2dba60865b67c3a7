// SPDX-License-Identifier: GPL-2.0-only
/*
 * virtio_vbus: a virtio transport over the bus. The kernel's own virtio drivers bind to what it
 * registers.
 *
 * Each of the transport's verbs is a question to the bus, so that they sleep; only notifications do
 * not, which are events: see virtio_queues.c.
 */
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_ring.h>
#include <linux/wait_bit.h>

#include "virtio_vbus.h"

/* Bytes of config space in one message. */
#define CONFIG_CHUNK	2048
#define CONFIG_TRIES	8
/* How often a device may take all the time that an answer may take. */
#define RESET_TRIES	10

/* Devices that have not been freed yet: their release is code of this module. */
static atomic_t living = ATOMIC_INIT(0);

int vv_ask(struct virtio_vbus_device *vv, u8 id, const void *body, size_t size, void *answer,
	   size_t room)
{
	struct vbus_request request = {
		.id = id,
		.body = body,
		.size = size,
		.answer = answer,
		.least = room,
		.room = room,
	};
	int err = vbus_device_ask(vv->device, &request);

	return min(err, 0);
}

/* Config space. */

struct config_answer {
	struct vbus_config head;
	u8 data[CONFIG_CHUNK];
};

static int read_chunk(struct virtio_vbus_device *vv, struct config_answer *answer, u32 offset,
		      u32 length)
{
	struct vbus_config_range range = {
		.offset = cpu_to_le32(offset),
		.length = cpu_to_le32(length),
	};
	struct vbus_request request = {
		.id = VBUS_GET_CONFIG,
		.body = &range,
		.size = sizeof(range),
		.answer = answer,
		.least = sizeof(answer->head),
		.room = sizeof(answer->head) + length,
	};
	int size;

	size = vbus_device_ask(vv->device, &request);
	if (size < 0)
		return size;
	if (size != sizeof(answer->head) + length || le32_to_cpu(answer->head.length) != length)
		return -EINVAL;
	WRITE_ONCE(vv->generation, le32_to_cpu(answer->head.generation));
	return 0;
}

/* What cannot be read reads as zeroes: there is no way to say so. */
static void vv_get(struct virtio_device *vdev, unsigned int offset, void *buf, unsigned int len)
{
	struct virtio_vbus_device *vv = to_vv(vdev);
	struct config_answer *answer;
	unsigned int chunk;

	memset(buf, 0, len);
	answer = kmalloc(sizeof(*answer), GFP_KERNEL);
	if (!answer)
		return;
	for (; len; offset += chunk, buf += chunk, len -= chunk) {
		chunk = min_t(unsigned int, len, CONFIG_CHUNK);
		if (read_chunk(vv, answer, offset, chunk))
			break;
		memcpy(buf, answer->data, chunk);
	}
	kfree(answer);
}

/*
 * A write is refused when config space has changed since it was last looked at; then it is written
 * all the same.
 */
static void vv_set(struct virtio_device *vdev, unsigned int offset, const void *buf,
		   unsigned int len)
{
	struct virtio_vbus_device *vv = to_vv(vdev);
	struct config_answer *answer;
	struct vbus_config head = {
		.offset = cpu_to_le32(offset),
		.length = cpu_to_le32(len),
	};
	struct vbus_request request = {
		.id = VBUS_SET_CONFIG,
		.body = &head,
		.size = sizeof(head),
		.more = buf,
		.more_size = len,
		.least = sizeof(answer->head),
	};
	int tries, size = 0;

	answer = kmalloc(sizeof(*answer), GFP_KERNEL);
	if (!answer || len > CONFIG_CHUNK)
		goto out;
	request.answer = answer;
	request.room = sizeof(answer->head) + len;
	for (tries = 0; tries < CONFIG_TRIES; tries++) {
		head.generation = cpu_to_le32(READ_ONCE(vv->generation));
		size = vbus_device_ask(vv->device, &request);
		if (size < 0 || le32_to_cpu(answer->head.length) == len)
			break;
		if (le32_to_cpu(answer->head.generation) == READ_ONCE(vv->generation)) {
			size = -EPERM;
			break;
		}
		WRITE_ONCE(vv->generation, le32_to_cpu(answer->head.generation));
	}
out:
	kfree(answer);
	if (size < 0 && size != -ENODEV)
		dev_dbg(&vdev->dev, "config space at %u was not written: %d\n", offset, size);
}

/*
 * Every read brings the generation with it; see the caller, who reads again when it is another
 * behind the reads.
 */
static u32 vv_generation(struct virtio_device *vdev)
{
	return READ_ONCE(to_vv(vdev)->generation);
}

/* Status. */

/*
 * What came of the last bits that were set. A device may refuse some; it cannot add any, nor can it
 * answer differently from one time to the next, which virtio would wonder about.
 */
static u8 vv_get_status(struct virtio_device *vdev)
{
	return READ_ONCE(to_vv(vdev)->status);
}

static int set_status(struct virtio_vbus_device *vv, u8 status)
{
	__le32 wanted = cpu_to_le32(status), got;
	int err;

	err = vv_ask(vv, VBUS_SET_STATUS, &wanted, sizeof(wanted), &got, sizeof(got));
	if (!err)
		WRITE_ONCE(vv->status, le32_to_cpu(got) & status);
	return err;
}

static void vv_set_status(struct virtio_device *vdev, u8 status)
{
	int err = set_status(to_vv(vdev), status);

	if (err == -EBUSY)
		dev_err(&vdev->dev, "%s is in use by another driver\n", to_vv(vdev)->device->name);
	else if (err && err != -ENODEV)
		dev_err(&vdev->dev, "status %#x was not set: %d\n", status, err);
}

/*
 * The answer comes when nothing of the device is under way any more: only then buffers may be used
 * for something else.
 */
static void reset_device(struct virtio_vbus_device *vv)
{
	int tries, err;

	for (tries = 0; tries < RESET_TRIES; tries++) {
		err = set_status(vv, 0);
		if (err != -ETIMEDOUT)
			break;
		/* Its disk may hang; other devices shall not suffer for that at once. */
		dev_warn(&vv->vdev.dev, "%s is still not reset\n", vv->device->name);
	}
	if (err && err != -ENODEV)
		vbus_device_broken(vv->device, "a device was not reset");
	/* In a window it does no harm. */
	if (err && vbus_device_memory(vv->device) == VBUS_MEMORY_SHARED)
		vbus_device_wait_gone(vv->device);
	/* Of what is gone as well. */
	WRITE_ONCE(vv->status, 0);
}

static void vv_reset(struct virtio_device *vdev)
{
	struct virtio_vbus_device *vv = to_vv(vdev);

	/* What failed before shall not be found failed after. */
	flush_work(&vv->failed);
	reset_device(vv);
}

/* Features. */

static u64 vv_get_features(struct virtio_device *vdev)
{
	struct vbus_features wanted = { .num_blocks = cpu_to_le32(2) }, offered;
	const size_t head = offsetof(struct vbus_features, features);

	if (vv_ask(to_vv(vdev), VBUS_GET_FEATURES, &wanted, head, &offered, sizeof(offered)) ||
	    le32_to_cpu(offered.block_index) || le32_to_cpu(offered.num_blocks) != 2)
		return 0;
	return le32_to_cpu(offered.features[0]) | (u64)le32_to_cpu(offered.features[1]) << 32;
}

static int vv_finalize_features(struct virtio_device *vdev)
{
	struct virtio_vbus_device *vv = to_vv(vdev);
	struct vbus_features taken = { .num_blocks = cpu_to_le32(2) };
	u64 offered = vdev->features;

	/* Drops what it does not know of, which is not the ring's alone. */
	vring_transport_features(vdev);
	if (offered & BIT_ULL(VIRTIO_F_RING_RESET))
		__virtio_set_bit(vdev, VIRTIO_F_RING_RESET);
	if (!__virtio_test_bit(vdev, VIRTIO_F_VERSION_1)) {
		dev_err(&vdev->dev, "%s does not offer VERSION_1\n", vv->device->name);
		return -EINVAL;
	}
	/*
	 * Without it the ring would be given the addresses of this side's memory, which mean
	 * nothing to the other.
	 */
	if (!__virtio_test_bit(vdev, VIRTIO_F_ACCESS_PLATFORM)) {
		dev_err(&vdev->dev, "%s does not offer ACCESS_PLATFORM\n", vv->device->name);
		return -EINVAL;
	}
	/*
	 * A packed ring of these kernels is not whole any more when a buffer finds no place: what
	 * was mapped before it stays available. In a window that happens.
	 */
	if (vbus_device_memory(vv->device) == VBUS_MEMORY_WINDOW)
		__virtio_clear_bit(vdev, VIRTIO_F_RING_PACKED);
	taken.features[0] = cpu_to_le32(lower_32_bits(vdev->features));
	taken.features[1] = cpu_to_le32(upper_32_bits(vdev->features));
	return vv_ask(vv, VBUS_SET_FEATURES, &taken, sizeof(taken), NULL, 0);
}

static const char *vv_bus_name(struct virtio_device *vdev)
{
	return dev_name(vdev->dev.parent);
}

static const struct virtio_config_ops vv_config_ops = {
	.get = vv_get,
	.set = vv_set,
	.generation = vv_generation,
	.get_status = vv_get_status,
	.set_status = vv_set_status,
	.reset = vv_reset,
	.find_vqs = vv_find_vqs,
	.del_vqs = vv_del_vqs,
	.synchronize_cbs = vv_synchronize_cbs,
	.get_features = vv_get_features,
	.finalize_features = vv_finalize_features,
	.bus_name = vv_bus_name,
	.disable_vq_and_reset = vv_disable_vq_and_reset,
	.enable_vq_after_reset = vv_enable_vq_after_reset,
};

static void gone_work(struct work_struct *work)
{
	vv_end_requests(container_of(work, struct virtio_vbus_device, gone));
}

static void gone(void *data)
{
	struct virtio_vbus_device *vv = data;

	vv_break(vv);
	queue_work(system_unbound_wq, &vv->gone);
}

/*
 * The device needs a reset, and gets it. Its driver has to be bound anew, since it does not know.
 */
static void failed_work(struct work_struct *work)
{
	struct virtio_vbus_device *vv = container_of(work, struct virtio_vbus_device, failed);

	dev_err(&vv->vdev.dev, "%s failed and needs a reset: its driver has to be bound again\n",
		vv->device->name);
	reset_device(vv);
	WRITE_ONCE(vv->device->void_buffers, true);
	vv_end_requests(vv);
}

static void config_changed(void *data, u32 status, u32 generation)
{
	struct virtio_vbus_device *vv = data;

	if (status & VIRTIO_CONFIG_S_NEEDS_RESET)
		queue_work(system_unbound_wq, &vv->failed);
	else if (vv->registered)
		virtio_config_changed(&vv->vdev);
	else
		vv->missed = true;
}

static const struct vbus_device_events vv_events = {
	.config_changed = config_changed,
	.gone = gone,
};

/* The beginning and the end. */

static void vv_release(struct device *dev)
{
	struct virtio_vbus_device *vv = to_vv(dev_to_virtio(dev));

	put_device(&vv->device->dev);
	kfree(vv);
	if (atomic_dec_and_test(&living))
		wake_up_var(&living);
}

/* Config changes are told from now on, and those from before. */
static void tell_changes(struct virtio_vbus_device *vv)
{
	mutex_lock(&vv->device->lock);
	vv->registered = true;
	if (vv->missed)
		virtio_config_changed(&vv->vdev);
	mutex_unlock(&vv->device->lock);
}

/* Nothing is heard of the device any more. Others may drive it: virtio has acknowledged it. */
static void end(struct virtio_vbus_device *vv)
{
	vbus_device_ignore(vv->device);
	set_status(vv, 0);
	cancel_work_sync(&vv->failed);
	cancel_work_sync(&vv->gone);
}

static int vv_probe(struct vbus_device *device)
{
	struct virtio_vbus_device *vv;
	int err;

	if (!device->device_id)
		return -ENODEV;
	vv = kzalloc(sizeof(*vv), GFP_KERNEL);
	if (!vv)
		return -ENOMEM;
	atomic_inc(&living);
	get_device(&device->dev);
	vv->device = device;
	vv->vdev.id.device = device->device_id;
	vv->vdev.id.vendor = device->vendor_id;
	vv->vdev.config = &vv_config_ops;
	vv->vdev.dev.parent = &device->dev;
	vv->vdev.dev.release = vv_release;
	mutex_init(&vv->queues_lock);
	INIT_WORK(&vv->failed, failed_work);
	INIT_WORK(&vv->gone, gone_work);
	dev_set_drvdata(&device->dev, vv);
	vbus_device_listen(device, &vv_events, vv);
	err = register_virtio_device(&vv->vdev);
	if (!err) {
		tell_changes(vv);
		return 0;
	}
	end(vv);
	put_device(&vv->vdev.dev);
	return err;
}

static void vv_remove(struct vbus_device *device)
{
	struct virtio_vbus_device *vv = dev_get_drvdata(&device->dev);

	get_device(&vv->vdev.dev);
	/* The driver may wait for the device: it has to hear when that is gone. */
	unregister_virtio_device(&vv->vdev);
	end(vv);
	put_device(&vv->vdev.dev);
}

static struct vbus_driver vv_driver = {
	.driver.name = "virtio_vbus",
	.probe = vv_probe,
	.remove = vv_remove,
};

static int __init vv_init(void)
{
	return vbus_register_driver(&vv_driver, THIS_MODULE);
}

static void __exit vv_exit(void)
{
	vbus_unregister_driver(&vv_driver);
	wait_var_event(&living, !atomic_read(&living));
}

module_init(vv_init);
module_exit(vv_exit);

MODULE_ALIAS("vbus:*");
MODULE_DESCRIPTION("vbus: virtio devices on the bus");
MODULE_AUTHOR("the vbus project");
MODULE_LICENSE("GPL");
