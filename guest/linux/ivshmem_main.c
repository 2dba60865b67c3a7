// SPDX-License-Identifier: GPL-2.0-only
/*
 * vbus_ivshmem: the bus behind QEMU's ivshmem-doorbell, a PCI function with memory that somebody
 * else has mapped too.
 *
 *	BAR0	registers: which peer we are, and the doorbell
 *	BAR2	the shared area, then the window (ivshmem_window.c)
 *	MSI-X	vector 0: the link; 1 + p: events of priority p
 *
 * The host is peer 0, and has the same vectors, and vector 9: "make a session". Two words in the
 * area's first page, each written by one side, say which session there is:
 *
 *	guest					host
 *	session_request := another number
 *	vector 9			----->	parts from what was before, makes the area anew
 *						session := session_request
 *	HELLO, devices, ...		<-----	vector 0
 *
 * When the host's word is another one day, the host is gone, or a new one: then so are all devices,
 * and it begins again. One thread a function does that, from the first session to the last, in the
 * order in which it can be read there.
 *
 * The id of the function says nothing: all users of ivshmem have it. Only a function whose memory
 * has the bus's magic, or is still empty and then gets it, is ours; others are left alone, without
 * a word.
 */
#include <linux/bitfield.h>
#include <linux/delay.h>
#include <linux/interrupt.h>
#include <linux/io.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/random.h>
#include <linux/sizes.h>
#include <linux/slab.h>

#include "ivshmem.h"
#include "vbus.h"

#define PCI_VENDOR_ID_IVSHMEM	0x1af4
#define PCI_DEVICE_ID_IVSHMEM	0x1110

/* BAR0 */
#define REG_IV_POSITION		8
#define REG_DOORBELL		12
#define DOORBELL_PEER		GENMASK(31, 16)
#define DOORBELL_VECTOR		GENMASK(15, 0)

#define HOST			0
#define VECTOR_LINK		0
#define VECTOR_EVENTS		1	/* and so many priorities more */
#define VECTORS			(VECTOR_EVENTS + VBUS_PRIORITIES)
#define VECTOR_SESSION		VECTORS	/* the host's alone */

/* In the area's first page. */
#define SESSION_REQUEST		0xf00
#define SESSION			0xf40

/* A window smaller than this serves nobody. */
#define MIN_WINDOW		SZ_1M
/* Between two looks at the session, in case an interrupt was lost or was not for us. */
#define LOOK_MS			1000
/* Between the end of a session and the beginning of the next; longer where sessions are short. */
#define FIRST_PAUSE_MS		100
#define LAST_PAUSE_MS		10000
#define SHORT_MS		10000

static unsigned int session_seconds = 5;
module_param(session_seconds, uint, 0644);
MODULE_PARM_DESC(session_seconds, "Seconds that the host may take to make a session");

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

static struct ivshmem *to_ivshmem(struct vbus_connector *connector)
{
	return container_of(connector, struct ivshmem, connector);
}

struct window *window_of(struct vbus_device *device)
{
	return &to_ivshmem(vbus_device_connector(device))->window;
}

/* The words of the session. */

static u32 host_session(struct ivshmem *iv)
{
	return le32_to_cpu(READ_ONCE(*(__le32 *)(iv->memory + SESSION)));
}

static u32 asked_session(struct ivshmem *iv)
{
	return le32_to_cpu(READ_ONCE(*(__le32 *)(iv->memory + SESSION_REQUEST)));
}

static void ask_session(struct ivshmem *iv, u32 session)
{
	WRITE_ONCE(*(__le32 *)(iv->memory + SESSION_REQUEST), cpu_to_le32(session));
}

/* Doorbells and interrupts. */

/*
 * Whoever is rung sees what was written before: to write a register is to have written all of that.
 */
static void ring(struct ivshmem *iv, unsigned int vector)
{
	virt_mb();	/* also where the register is the hypervisor's to hear */
	writel(FIELD_PREP(DOORBELL_PEER, HOST) | FIELD_PREP(DOORBELL_VECTOR, vector),
	       iv->registers + REG_DOORBELL);
}

/* Look whether the session is over, if there is one. In any context. */
static void look(struct ivshmem *iv, unsigned int ms)
{
	unsigned long flags;

	spin_lock_irqsave(&iv->lock, flags);
	if (iv->proxy)
		mod_delayed_work(system_wq, &iv->watch, msecs_to_jiffies(ms));
	spin_unlock_irqrestore(&iv->lock, flags);
}

static irqreturn_t link_interrupt(int irq, void *data)
{
	struct ivshmem *iv = data;
	bool over;

	wake_up(&iv->changed);
	over = host_session(iv) != READ_ONCE(iv->session);
	spin_lock(&iv->lock);
	if (iv->proxy && !over)
		vbus_proxy_link_interrupt(iv->proxy);
	spin_unlock(&iv->lock);
	if (over)
		look(iv, 0);
	return IRQ_HANDLED;
}

static irqreturn_t events_interrupt(int irq, void *data)
{
	struct events_vector *vector = data;

	vbus_proxy_events_interrupt(vector->proxy, vector->priority);
	return IRQ_HANDLED;
}

/* What the proxy asks of a connector. */

static void iv_ring_link(struct vbus_connector *connector)
{
	ring(to_ivshmem(connector), VECTOR_LINK);
}

static void iv_ring_events(struct vbus_connector *connector, unsigned int priority)
{
	ring(to_ivshmem(connector), VECTOR_EVENTS + priority);
}

static int iv_open_events(struct vbus_connector *connector, struct vbus_proxy *proxy,
			  unsigned int priority)
{
	struct ivshmem *iv = to_ivshmem(connector);
	struct events_vector *vector = &iv->vectors[priority];

	vector->proxy = proxy;
	vector->priority = priority;
	snprintf(vector->name, sizeof(vector->name), "vbus-%s-%u", pci_name(iv->pdev), priority);
	return request_irq(pci_irq_vector(iv->pdev, VECTOR_EVENTS + priority), events_interrupt, 0,
			   vector->name, vector);
}

static void iv_close_events(struct vbus_connector *connector, unsigned int priority)
{
	struct ivshmem *iv = to_ivshmem(connector);

	free_irq(pci_irq_vector(iv->pdev, VECTOR_EVENTS + priority), &iv->vectors[priority]);
}

/* The one place that knows how the host reaches buffers. */
static int iv_use_memory(struct vbus_connector *connector, u8 kind)
{
	return kind == VBUS_MEMORY_WINDOW ? 0 : -EOPNOTSUPP;
}

static void iv_setup_dma(struct vbus_connector *connector, struct vbus_device *device)
{
	window_setup_dma(device);
}

static void iv_broken(struct vbus_connector *connector)
{
	struct ivshmem *iv = to_ivshmem(connector);

	WRITE_ONCE(iv->broken, true);
	look(iv, 0);
}

static const struct vbus_connector_ops iv_ops = {
	.ring_link = iv_ring_link,
	.ring_events = iv_ring_events,
	.open_events = iv_open_events,
	.close_events = iv_close_events,
	.use_memory = iv_use_memory,
	.setup_dma = iv_setup_dma,
	.broken = iv_broken,
};

/* Sessions. */

/*
 * Whether the memory is a bus's, or could become one: the last thing that is known before anything
 * is written to it.
 */
static bool may_be_ours(struct ivshmem *iv)
{
	const struct vbus_area_header *header = iv->memory;

	if (READ_ONCE(header->magic))
		return header->magic == cpu_to_le64(VBUS_AREA_MAGIC);
	/* A host takes the magic away while it makes the area anew, and when it goes. */
	if (header->version == cpu_to_le32(VBUS_AREA_VERSION) &&
	    header->header_bytes == cpu_to_le32(sizeof(*header)))
		return true;
	return !memchr_inv(iv->memory, 0, SESSION_REQUEST);
}

/* Whether the host has made the session, within @seconds. */
static bool session_comes(struct ivshmem *iv, unsigned int seconds)
{
	unsigned long end = jiffies + seconds * HZ;

	do {
		if (wait_event_idle_timeout(iv->changed, host_session(iv) == iv->session ||
					    (iv->thread && kthread_should_stop()), HZ / 20))
			break;
	} while (time_before(jiffies, end));
	return host_session(iv) == iv->session;
}

/* Ask for a session, and wait for it. */
static int begin_session(struct ivshmem *iv)
{
	u32 session;

	do {
		session = get_random_u32();
	} while (!session || session == host_session(iv) || session == asked_session(iv));
	WRITE_ONCE(iv->session, session);
	ask_session(iv, session);
	ring(iv, VECTOR_SESSION);
	return session_comes(iv, session_seconds) ? 0 : -ETIMEDOUT;
}

/*
 * What there is in a session: an area of the layout that this side knows, and a window. Says what
 * is wrong with it.
 */
static int check_area(struct ivshmem *iv, size_t *total)
{
	struct device *dev = &iv->pdev->dev;
	u32 version;
	int err;

	err = vbus_area_check(iv->memory, iv->size, &version, total);
	if (err == -EPROTONOSUPPORT && version != iv->told_version) {
		dev_err(dev, "the bus has an area of version %u, these modules know version %u\n",
			version, VBUS_AREA_VERSION);
		iv->told_version = version;
	} else if (err == -EPROTO) {
		dev_err_ratelimited(dev, "the bus has an area that cannot be\n");
	} else if (!err && iv->size - *total < MIN_WINDOW) {
		dev_err_ratelimited(dev, "the area leaves only %zu bytes of window\n",
				    iv->size - *total);
		err = -ENOSPC;
	}
	return err;
}

static void watch(struct work_struct *work)
{
	struct ivshmem *iv = container_of(to_delayed_work(work), struct ivshmem, watch);
	struct vbus_proxy *proxy;

	spin_lock_irq(&iv->lock);
	proxy = iv->proxy;
	spin_unlock_irq(&iv->lock);
	/* It is not destroyed before this work is over. */
	if (!proxy || READ_ONCE(iv->over))
		return;
	if (READ_ONCE(iv->broken) || host_session(iv) != iv->session) {
		vbus_proxy_lost(proxy);
		WRITE_ONCE(iv->over, true);
		wake_up(&iv->changed);
	} else {
		look(iv, LOOK_MS);
	}
}

static void set_proxy(struct ivshmem *iv, struct vbus_proxy *proxy)
{
	spin_lock_irq(&iv->lock);
	iv->proxy = proxy;
	spin_unlock_irq(&iv->lock);
}

/* From HELLO to the end of the session; an error when it did not come to be one. */
static int attach(struct ivshmem *iv)
{
	struct vbus_proxy *proxy;
	int err;

	proxy = vbus_proxy_create(&iv->connector);
	if (IS_ERR(proxy))
		return PTR_ERR(proxy);
	iv->over = false;
	iv->broken = false;
	set_proxy(iv, proxy);
	look(iv, LOOK_MS);
	/* There may be messages that came before the proxy. */
	vbus_proxy_link_interrupt(proxy);
	err = vbus_proxy_start(proxy);
	if (err)
		vbus_proxy_lost(proxy);
	else
		wait_event_idle(iv->changed, READ_ONCE(iv->over) || kthread_should_stop());
	vbus_proxy_stop(proxy);
	set_proxy(iv, NULL);
	cancel_delayed_work_sync(&iv->watch);
	vbus_proxy_destroy(proxy);
	if (err && err != -ENODEV)
		dev_err_ratelimited(&iv->pdev->dev, "the bus cannot be attached to: %d\n", err);
	return err;
}

static int serve(struct ivshmem *iv)
{
	size_t total;
	int err;

	err = check_area(iv, &total);
	if (err)
		return err;
	err = window_init(&iv->window, iv->memory + total, total, iv->size - total);
	if (err)
		return err;
	err = attach(iv);
	window_free(&iv->window);
	return err;
}

/* One session after the other. The first was begun when the function was probed. */
static int sessions(void *data)
{
	struct ivshmem *iv = data;
	unsigned int pause = FIRST_PAUSE_MS;
	unsigned long began;
	int err;

	while (!kthread_should_stop()) {
		began = jiffies;
		err = 0;
		if (!iv->session || host_session(iv) != iv->session)
			err = begin_session(iv);
		if (!err)
			err = serve(iv);
		if (!err && time_after(jiffies, began + msecs_to_jiffies(SHORT_MS)))
			pause = FIRST_PAUSE_MS;
		/* Whatever became of it, the session is spent. */
		WRITE_ONCE(iv->session, 0);
		wait_event_idle_timeout(iv->changed, kthread_should_stop(),
					msecs_to_jiffies(pause));
		pause = min(2 * pause, LAST_PAUSE_MS);
	}
	return 0;
}

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
	err = request_irq(pci_irq_vector(pdev, VECTOR_LINK), link_interrupt, 0, "vbus-link", iv);
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
		return check_area(iv, &total);
	err = begin_session(iv);
	if (err && known)
		return 0;
	if (err) {
		ask_session(iv, 0);
		return err;
	}
	return check_area(iv, &total);
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
	iv->connector.ops = &iv_ops;
	iv->connector.parent = &pdev->dev;
	init_waitqueue_head(&iv->changed);
	INIT_DELAYED_WORK(&iv->watch, watch);
	spin_lock_init(&iv->lock);
	pci_set_drvdata(pdev, iv);
	err = pcim_enable_device(pdev);
	if (!err)
		err = map(iv);
	if (err)
		return err;
	if (!may_be_ours(iv))
		goto not_ours;
	err = listen(iv);
	if (err)
		return err;
	err = knock(iv);
	if (err)
		goto unlisten;
	iv->thread = kthread_run(sessions, iv, "vbus-%s", pci_name(pdev));
	if (!IS_ERR(iv->thread))
		return 0;
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

	kthread_stop(iv->thread);
	unlisten(iv);
}

/* What sysfs shows of the window: bytes, and how often a buffer found no place. */

static ssize_t size_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct ivshmem *iv = dev_get_drvdata(dev);

	return sysfs_emit(buf, "%lu\n", window_bytes(&iv->window));
}
static DEVICE_ATTR_RO(size);

static ssize_t used_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct ivshmem *iv = dev_get_drvdata(dev);

	return sysfs_emit(buf, "%lu\n", window_bytes_used(&iv->window));
}
static DEVICE_ATTR_RO(used);

static ssize_t full_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct ivshmem *iv = dev_get_drvdata(dev);

	return sysfs_emit(buf, "%lu\n", READ_ONCE(iv->window.full));
}
static DEVICE_ATTR_RO(full);

static struct attribute *window_attrs[] = {
	&dev_attr_size.attr,
	&dev_attr_used.attr,
	&dev_attr_full.attr,
	NULL,
};

static const struct attribute_group window_group = {
	.name = "window",
	.attrs = window_attrs,
};

static const struct attribute_group *iv_groups[] = {
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
	.dev_groups = iv_groups,
};
module_pci_driver(iv_driver);

MODULE_DESCRIPTION("vbus: the bus behind an ivshmem-doorbell function");
MODULE_AUTHOR("the vbus project");
MODULE_LICENSE("GPL");
MODULE_SOFTDEP("post: virtio_vbus");
