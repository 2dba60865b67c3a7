// SPDX-License-Identifier: GPL-2.0-only
/*
 * vbus_ivshmem: the bus behind QEMU's ivshmem-doorbell, a PCI function with memory that somebody
 * else has mapped too. Here the function is found, and let go of.
 *
 *	BAR0	registers: which peer we are, and the doorbell
 *	BAR2	the shared area, then the window (ivshmem_window.c)
 *	MSI-X	vector 0: the link; 1 + p: events of priority p
 *
 * The host is peer 0, and has the same vectors, and vector 9: "make a session"
 * (ivshmem_session.c).
 *
 * The id of the function says nothing: all users of ivshmem have it. Only a function whose memory
 * has the bus's magic, or is still empty and then gets it, is ours; others are left alone, without
 * a word.
 */
#include <linux/delay.h>
#include <linux/io.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/panic_notifier.h>
#include <linux/pci.h>
#include <linux/slab.h>

#include "ivshmem.h"

#define PCI_VENDOR_ID_IVSHMEM	0x1af4
#define PCI_DEVICE_ID_IVSHMEM	0x1110

/* How long a kernel that panics waits for the host. */
#define PANIC_MS		1000

unsigned int ivshmem_session_seconds = 5;
module_param_named(session_seconds, ivshmem_session_seconds, uint, 0644);
MODULE_PARM_DESC(session_seconds, "Seconds that the host may take to make a session");

/* The function. */

/* Before anything is written to it: whether it has what a bus's function has. */
static bool has_the_form(struct pci_dev *pdev)
{
	return pci_resource_flags(pdev, 0) & IORESOURCE_MEM &&
	       pci_resource_flags(pdev, 2) & IORESOURCE_MEM &&
	       pci_resource_len(pdev, 2) > VBUS_AREA_PAGE &&
	       pci_msix_vec_count(pdev) > VECTORS;
}

static int map(struct ivshmem *iv)
{
	struct pci_dev *pdev = iv->pdev;

	iv->registers = pcim_iomap(pdev, 0, 0);
	iv->size = pci_resource_len(pdev, 2);
	/*
	 * Write-back, as RAM: it is RAM of the host, which both sides' processors reach through
	 * their caches. (Where the processor's own tables make it something slower, it is still as
	 * coherent.)
	 */
	iv->memory = devm_memremap(&pdev->dev, pci_resource_start(pdev, 2), iv->size, MEMREMAP_WB);
	if (!iv->registers || IS_ERR_OR_NULL(iv->memory))
		return -ENOMEM;
	iv->connector.area = iv->memory;
	iv->connector.size = iv->size;
	iv->connector.where = pci_resource_start(pdev, 2);
	return 0;
}

/*
 * Vectors of the link and of events; those of events are used when there are queues of their
 * priorities.
 */
static int listen(struct ivshmem *iv)
{
	struct pci_dev *pdev = iv->pdev;
	int err;

	pci_set_master(pdev);
	err = pci_alloc_irq_vectors(pdev, VECTORS, VECTORS, PCI_IRQ_MSIX);
	if (err < 0)
		return err;
	err = request_irq(pci_irq_vector(pdev, VECTOR_LINK), ivshmem_link_interrupt, 0,
			  "vbus-link", iv);
	if (err)
		pci_free_irq_vectors(pdev);
	return err;
}

static void unlisten(struct ivshmem *iv)
{
	free_irq(pci_irq_vector(iv->pdev, VECTOR_LINK), iv);
	pci_free_irq_vectors(iv->pdev);
	pci_clear_master(iv->pdev);
}

/*
 * The first session. A bus that is known to be there may be late; who says nothing at all is none.
 */
static int knock(struct ivshmem *iv)
{
	const struct vbus_area_header *header = iv->memory;
	bool known = header->magic;
	size_t total;
	int err;

	err = known ? vbus_area_check(iv->memory, iv->size, &iv->told_version, &total) : 0;
	iv->told_version = 0;
	if (err == -EPROTONOSUPPORT)
		return ivshmem_check_area(iv, &total);
	err = ivshmem_begin_session(iv);
	if (err && known)
		return 0;
	if (err) {
		ivshmem_ask_session(iv, 0);
		return err;
	}
	return ivshmem_check_area(iv, &total);
}

/* The same, with nothing left that works. */
static int panicked(struct notifier_block *panic, unsigned long event, void *data)
{
	struct ivshmem *iv = container_of(panic, struct ivshmem, panic);
	unsigned int ms;

	if (!READ_ONCE(iv->shares))
		return NOTIFY_DONE;
	ivshmem_end_session(iv);
	for (ms = 0; ms < PANIC_MS && ivshmem_host_session(iv); ms++)
		mdelay(1);
	return NOTIFY_DONE;
}

static int iv_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct ivshmem *iv;
	int err;

	if (!has_the_form(pdev))
		return -ENODEV;
	iv = devm_kzalloc(&pdev->dev, sizeof(*iv), GFP_KERNEL);
	if (!iv)
		return -ENOMEM;
	iv->pdev = pdev;
	iv->connector.ops = &ivshmem_ops;
	iv->connector.parent = &pdev->dev;
	iv->connector.hello_flags = VBUS_HELLO_RAM;
	init_waitqueue_head(&iv->changed);
	INIT_DELAYED_WORK(&iv->watch, ivshmem_watch);
	spin_lock_init(&iv->lock);
	pci_set_drvdata(pdev, iv);
	err = pcim_enable_device(pdev);
	if (!err)
		err = map(iv);
	if (err)
		return err;
	if (!ivshmem_may_be_ours(iv))
		goto not_ours;
	err = listen(iv);
	if (err)
		return err;
	err = knock(iv);
	if (err)
		goto unlisten;
	iv->thread = kthread_run(ivshmem_sessions, iv, "vbus-%s", pci_name(pdev));
	if (!IS_ERR(iv->thread)) {
		iv->panic.notifier_call = panicked;
		atomic_notifier_chain_register(&panic_notifier_list, &iv->panic);
		return 0;
	}
	err = PTR_ERR(iv->thread);
	unlisten(iv);
	return err;
unlisten:
	unlisten(iv);
not_ours:
	dev_dbg(&pdev->dev, "no bus of this version here\n");
	return -ENODEV;
}

static void iv_remove(struct pci_dev *pdev)
{
	struct ivshmem *iv = pci_get_drvdata(pdev);

	atomic_notifier_chain_unregister(&panic_notifier_list, &iv->panic);
	kthread_stop(iv->thread);
	unlisten(iv);
}

/*
 * The kernel ends, and another may begin in the same memory: devices must be through with it. They
 * are not waited for without a limit, as the host may be gone.
 */
static void iv_shutdown(struct pci_dev *pdev)
{
	struct ivshmem *iv = pci_get_drvdata(pdev);
	unsigned long end = jiffies + ivshmem_session_seconds * HZ;

	/* Before the look at @shares; see iv_use_memory(). */
	smp_store_mb(iv->closing, true);
	if (!READ_ONCE(iv->shares))
		return;
	do {
		ivshmem_end_session(iv);
		if (wait_event_idle_timeout(iv->changed, !ivshmem_host_session(iv), HZ / 20))
			return;
	} while (time_before(jiffies, end));
	dev_warn(&pdev->dev, "the bus does not let go of this guest's memory\n");
}

/* What sysfs shows of the function itself. */

static ssize_t memory_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct ivshmem *iv = dev_get_drvdata(dev);

	return sysfs_emit(buf, "%s\n", READ_ONCE(iv->shares) ? "shared" : "window");
}
static DEVICE_ATTR_RO(memory);

static struct attribute *function_attrs[] = {
	&dev_attr_memory.attr,
	NULL,
};

static const struct attribute_group function_group = {
	.attrs = function_attrs,
};

static const struct attribute_group *iv_groups[] = {
	&function_group,
	&window_group,
	NULL,
};

static const struct pci_device_id iv_ids[] = {
	{ PCI_DEVICE(PCI_VENDOR_ID_IVSHMEM, PCI_DEVICE_ID_IVSHMEM) },
	{ }
};
MODULE_DEVICE_TABLE(pci, iv_ids);

static struct pci_driver iv_driver = {
	.name = "vbus_ivshmem",
	.id_table = iv_ids,
	.probe = iv_probe,
	.remove = iv_remove,
	.shutdown = iv_shutdown,
	.dev_groups = iv_groups,
};
module_pci_driver(iv_driver);

MODULE_DESCRIPTION("vbus: the bus behind an ivshmem-doorbell function");
MODULE_AUTHOR("the vbus project");
MODULE_LICENSE("GPL");
MODULE_SOFTDEP("post: virtio_vbus");
