// SPDX-License-Identifier: GPL-2.0-only
/*
 * Sessions with the bus behind a function, one after the other: their words, their doorbells and
 * interrupts, and what the proxy asks of the function.
 *
 * Two words in the area's first page, each written by one side, say which session there is:
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
 * In a session, devices reach buffers in the window (ivshmem_window.c), or this guest's own memory
 * (ivshmem_ram.c). That is not given to anybody else before the host's word says that the session
 * is over: until then the host may write there.
 */
#include <linux/bitfield.h>
#include <linux/io.h>
#include <linux/kthread.h>
#include <linux/pci.h>
#include <linux/random.h>
#include <linux/sizes.h>

#include "ivshmem.h"

/* BAR0 */
#define REG_IV_POSITION		8
#define REG_DOORBELL		12
#define DOORBELL_PEER		GENMASK(31, 16)
#define DOORBELL_VECTOR		GENMASK(15, 0)

#define HOST			0

/* A window smaller than this serves nobody. */
#define MIN_WINDOW		SZ_1M
/* Between two looks at the session, in case an interrupt was lost or was not for us. */
#define LOOK_MS			1000
/* Between the end of a session and the beginning of the next; longer where sessions are short. */
#define FIRST_PAUSE_MS		100
#define LAST_PAUSE_MS		10000
#define SHORT_MS		10000

static struct ivshmem *to_ivshmem(struct vbus_connector *connector)
{
	return container_of(connector, struct ivshmem, connector);
}

struct window *window_of(struct vbus_device *device)
{
	return &to_ivshmem(vbus_device_connector(device))->window;
}

struct window *window_of_function(struct device *dev)
{
	return &((struct ivshmem *)dev_get_drvdata(dev))->window;
}

const struct ram *ram_of(struct vbus_device *device)
{
	return &to_ivshmem(vbus_device_connector(device))->ram;
}

/* The words of the session. */

u32 ivshmem_host_session(struct ivshmem *iv)
{
	return le32_to_cpu(READ_ONCE(*(__le32 *)(iv->memory + SESSION)));
}

static u32 asked_session(struct ivshmem *iv)
{
	return le32_to_cpu(READ_ONCE(*(__le32 *)(iv->memory + SESSION_REQUEST)));
}

void ivshmem_ask_session(struct ivshmem *iv, u32 session)
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

/*
 * Look whether the session is over, if there is one. In any context; and on any processor, since
 * this one may be held by whoever waits for what does not come any more.
 */
static void look(struct ivshmem *iv, unsigned int ms)
{
	unsigned long flags;

	spin_lock_irqsave(&iv->lock, flags);
	if (iv->proxy)
		mod_delayed_work(system_unbound_wq, &iv->watch, msecs_to_jiffies(ms));
	spin_unlock_irqrestore(&iv->lock, flags);
}

irqreturn_t ivshmem_link_interrupt(int irq, void *data)
{
	struct ivshmem *iv = data;
	bool over;

	wake_up(&iv->changed);
	over = ivshmem_host_session(iv) != READ_ONCE(iv->session);
	spin_lock(&iv->lock);
	if (iv->proxy && over)
		vbus_proxy_lost_interrupt(iv->proxy);
	else if (iv->proxy)
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

/* How the host reaches buffers, for all of a session. */
static int iv_use_memory(struct vbus_connector *connector, struct vbus_proxy *proxy, u8 kind)
{
	struct ivshmem *iv = to_ivshmem(connector);
	int used = kind == VBUS_MEMORY_WINDOW ? kind : -EOPNOTSUPP;

	if (kind == VBUS_MEMORY_SHARED)
		used = ram_share(&iv->ram, proxy, &iv->pdev->dev);
	/* A kernel that ends looks the other way round: one of the two sees the other. */
	smp_store_mb(iv->shares, used == VBUS_MEMORY_SHARED);
	return READ_ONCE(iv->closing) ? -ESHUTDOWN : used;
}

static void iv_setup_dma(struct vbus_connector *connector, struct vbus_device *device)
{
	if (to_ivshmem(connector)->shares)
		ram_setup_dma(device);
	else
		window_setup_dma(device);
}

static void iv_broken(struct vbus_connector *connector)
{
	struct ivshmem *iv = to_ivshmem(connector);

	WRITE_ONCE(iv->broken, true);
	look(iv, 0);
}

const struct vbus_connector_ops ivshmem_ops = {
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
bool ivshmem_may_be_ours(struct ivshmem *iv)
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
		if (wait_event_idle_timeout(iv->changed, ivshmem_host_session(iv) == iv->session ||
					    (iv->thread && kthread_should_stop()), HZ / 20))
			break;
	} while (time_before(jiffies, end));
	return ivshmem_host_session(iv) == iv->session;
}

/*
 * Ask that there be no session. When the host's word is another, it touches no buffers any more.
 */
void ivshmem_end_session(struct ivshmem *iv)
{
	ivshmem_ask_session(iv, 0);
	ring(iv, VECTOR_SESSION);
}

/* Ask for a session, and wait for it. */
int ivshmem_begin_session(struct ivshmem *iv)
{
	u32 session;

	do {
		session = get_random_u32();
	} while (!session || session == ivshmem_host_session(iv) || session == asked_session(iv));
	WRITE_ONCE(iv->session, session);
	ivshmem_ask_session(iv, session);
	ring(iv, VECTOR_SESSION);
	return session_comes(iv, ivshmem_session_seconds) ? 0 : -ETIMEDOUT;
}

/*
 * What there is in a session: an area of the layout that this side knows, and a window. Says what
 * is wrong with it.
 */
int ivshmem_check_area(struct ivshmem *iv, size_t *total)
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

void ivshmem_watch(struct work_struct *work)
{
	struct ivshmem *iv = container_of(to_delayed_work(work), struct ivshmem, watch);
	struct vbus_proxy *proxy;

	spin_lock_irq(&iv->lock);
	proxy = iv->proxy;
	spin_unlock_irq(&iv->lock);
	/* It is not destroyed before this work is over. */
	if (!proxy || READ_ONCE(iv->over))
		return;
	if (ivshmem_host_session(iv) != iv->session || (READ_ONCE(iv->broken) && !iv->shares)) {
		vbus_proxy_lost(proxy);
		WRITE_ONCE(iv->over, true);
		wake_up(&iv->changed);
		return;
	}
	/*
	 * A window can be left to the host. This guest's own memory is not given to anybody else
	 * before the host has heard that it is over, however long that takes.
	 */
	if (READ_ONCE(iv->broken))
		ivshmem_end_session(iv);
	look(iv, LOOK_MS);
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
	WRITE_ONCE(iv->shares, false);
	set_proxy(iv, proxy);
	look(iv, LOOK_MS);
	/* There may be messages that came before the proxy. */
	vbus_proxy_link_interrupt(proxy);
	err = vbus_proxy_start(proxy);
	if (err)
		iv_broken(&iv->connector);
	wait_event_idle(iv->changed, READ_ONCE(iv->over) || (!err && kthread_should_stop()));
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

	err = ivshmem_check_area(iv, &total);
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
int ivshmem_sessions(void *data)
{
	struct ivshmem *iv = data;
	unsigned int pause = FIRST_PAUSE_MS;
	unsigned long began;
	int err;

	while (!kthread_should_stop()) {
		began = jiffies;
		err = 0;
		if (READ_ONCE(iv->closing))
			err = -ESHUTDOWN;
		else if (!iv->session || ivshmem_host_session(iv) != iv->session)
			err = ivshmem_begin_session(iv);
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
