// SPDX-License-Identifier: GPL-2.0-only
/*
 * Event channels: which ones there are, and a file in /dev/vbus for each.
 *
 *	/dev/vbus/alarm				see proxy_files.c
 *	/sys/class/vbus/alarm/
 *		name priority memory		what the bus says of the channel
 *		sent received waiting		events
 *
 * The bus says that channels came or went, and not which. One work item asks for all of their
 * names, in order, and compares them with what it knows, which is in the same order. A channel that
 * is announced is not open: that is what a program does.
 *
 * Names make files, so that they are held to what a name is. Where two buses of a guest have a
 * channel of the same name, that of the second is alarm@vbus1.
 */
#include <linux/ctype.h>
#include <linux/fs.h>
#include <linux/hashtable.h>
#include <linux/idr.h>
#include <linux/kdev_t.h>
#include <linux/slab.h>
#include <linux/stringhash.h>
#include <linux/version.h>

#include "proxy_channels.h"

/* Channels of one bus that have files here. */
#define MAX_CHANNELS	4096
/* Channels that a bus has at most: whoever names more does not mean to end. */
#define MAX_NAMES	65536
/* Of all buses, and those that are gone and still open. */
#define MAX_FILES	65536

static dev_t first_file;
static DEFINE_IDA(files);
static DEFINE_MUTEX(names_lock);
static DEFINE_HASHTABLE(names, 12);	/* guarded by names_lock */

static struct vbus_channel *to_channel(struct device *dev)
{
	return container_of(dev, struct vbus_channel, dev);
}

/* What sysfs shows. */

static ssize_t name_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%s\n", to_channel(dev)->name);
}
static DEVICE_ATTR_RO(name);

static ssize_t priority_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n", to_channel(dev)->priority);
}
static DEVICE_ATTR_RO(priority);

static ssize_t memory_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n", to_channel(dev)->memory);
}
static DEVICE_ATTR_RO(memory);

static ssize_t sent_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%lld\n", atomic64_read(&to_channel(dev)->sent));
}
static DEVICE_ATTR_RO(sent);

static ssize_t received_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%lld\n", atomic64_read(&to_channel(dev)->received));
}
static DEVICE_ATTR_RO(received);

static ssize_t waiting_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct vbus_channel *channel = to_channel(dev);
	unsigned int waiting;

	spin_lock(&channel->lock);
	waiting = channel->end ? READ_ONCE(channel->end->waiting) : 0;
	spin_unlock(&channel->lock);
	return sysfs_emit(buf, "%u\n", waiting);
}
static DEVICE_ATTR_RO(waiting);

static struct attribute *channel_attrs[] = {
	&dev_attr_name.attr,
	&dev_attr_priority.attr,
	&dev_attr_memory.attr,
	&dev_attr_sent.attr,
	&dev_attr_received.attr,
	&dev_attr_waiting.attr,
	NULL,
};
ATTRIBUTE_GROUPS(channel);

/* The class. */

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 2, 0)
static char *channel_devnode(const struct device *dev, umode_t *mode)
#else
static char *channel_devnode(struct device *dev, umode_t *mode)
#endif
{
	return kasprintf(GFP_KERNEL, "vbus/%s", dev_name(dev));
}

static void channel_release(struct device *dev)
{
	struct vbus_channel *channel = to_channel(dev);

	if (dev->devt)
		ida_free(&files, MINOR(dev->devt) - MINOR(first_file));
	kfree(channel);
	vbus_died();
}

static struct class channel_class = {
	.name = "vbus",
	.dev_groups = channel_groups,
	.devnode = channel_devnode,
	.dev_release = channel_release,
};

int vbus_channels_register(void)
{
	int err;

	err = class_register(&channel_class);
	if (err)
		return err;
	err = alloc_chrdev_region(&first_file, 0, MAX_FILES, "vbus");
	if (err)
		class_unregister(&channel_class);
	return err;
}

void vbus_channels_unregister(void)
{
	unregister_chrdev_region(first_file, MAX_FILES);
	class_unregister(&channel_class);
	ida_destroy(&files);
}

/* Names. */

static bool is_taken(const char *name, u32 hash)
{
	struct vbus_channel *other;

	hash_for_each_possible(names, other, name_list, hash)
		if (!strcmp(dev_name(&other->dev), name))
			return true;
	return false;
}

/* A name that no other file in /dev/vbus has. */
static int take_name(struct vbus_channel *channel)
{
	u32 hash = full_name_hash(NULL, channel->name, strlen(channel->name));
	int err;

	mutex_lock(&names_lock);
	if (is_taken(channel->name, hash))
		err = dev_set_name(&channel->dev, "%s@vbus%d", channel->name, channel->proxy->id);
	else
		err = dev_set_name(&channel->dev, "%s", channel->name);
	if (!err)
		hash_add(names, &channel->name_list, hash);
	mutex_unlock(&names_lock);
	return err;
}

static void give_name_back(struct vbus_channel *channel)
{
	mutex_lock(&names_lock);
	hash_del(&channel->name_list);
	mutex_unlock(&names_lock);
}

/* As on the bus: a letter or a digit, and up to 62 of a few characters more. */
static bool is_name(const u8 *name, unsigned int length)
{
	unsigned int i;

	for (i = 0; i < length; i++)
		if (!(islower(name[i]) && isascii(name[i])) && !isdigit(name[i]) &&
		    !(i && (name[i] == '.' || name[i] == '_' || name[i] == '-')))
			return false;
	return length > 0;
}

/* Channels that come and go. */

static struct vbus_channel *make(struct vbus_proxy *proxy,
				 const struct vbus_next_channel_answer *found)
{
	struct vbus_channel *channel;
	int file, err;

	channel = kzalloc(sizeof(*channel), GFP_KERNEL);
	if (!channel)
		return ERR_PTR(-ENOMEM);
	vbus_born();
	device_initialize(&channel->dev);
	channel->dev.class = &channel_class;
	channel->dev.parent = proxy->connector->parent;
	channel->proxy = proxy;
	channel->priority = found->priority;
	channel->memory = le32_to_cpu(found->memory);
	memcpy(channel->name, found->name.name, found->name.name_length);
	mutex_init(&channel->opening);
	spin_lock_init(&channel->lock);
	init_waitqueue_head(&channel->left);
	cdev_init(&channel->cdev, &vbus_channel_files);
	channel->cdev.owner = THIS_MODULE;
	file = ida_alloc_max(&files, MAX_FILES - 1, GFP_KERNEL);
	if (file < 0) {
		err = file;
		goto failed;
	}
	channel->dev.devt = MKDEV(MAJOR(first_file), MINOR(first_file) + file);
	err = take_name(channel);
	if (err)
		goto failed;
	err = cdev_device_add(&channel->cdev, &channel->dev);
	if (!err)
		return channel;
	give_name_back(channel);
failed:
	put_device(&channel->dev);
	return ERR_PTR(err);
}

/* Before @next in the list. */
static void add(struct vbus_proxy *proxy, const struct vbus_next_channel_answer *found,
		struct list_head *next)
{
	struct vbus_channels *channels = &proxy->channels;
	struct vbus_channel *channel = ERR_PTR(-ENOSPC);

	if (channels->count < MAX_CHANNELS)
		channel = make(proxy, found);
	if (!IS_ERR(channel)) {
		list_add_tail(&channel->list, next);
		channels->count++;
	} else if (!channels->told) {
		dev_err(proxy->connector->parent, "a channel of the bus cannot be used: %ld\n",
			PTR_ERR(channel));
		channels->told = true;
	}
}

/* Whoever has it open hears of its end from the bus, behind the events. */
static void withdraw(struct vbus_channels *channels, struct vbus_channel *channel)
{
	list_del(&channel->list);
	channels->count--;
	/* Nobody is opening it any more. */
	mutex_lock(&channel->opening);
	channel->gone = true;
	mutex_unlock(&channel->opening);
	cdev_device_del(&channel->cdev, &channel->dev);
	give_name_back(channel);
	put_device(&channel->dev);
}

/* Less than 0: the channel's name is before the other, in the order of bytes. */
static int order(const struct vbus_channel *channel, const struct vbus_next_channel *name)
{
	size_t length = strlen(channel->name);
	int differ = memcmp(channel->name, name->name, min_t(size_t, length, name->name_length));

	return differ ? differ : (int)length - name->name_length;
}

static bool is_unchanged(const struct vbus_channel *channel,
			 const struct vbus_next_channel_answer *found)
{
	return channel->priority == found->priority &&
	       channel->memory == le32_to_cpu(found->memory);
}

/*
 * The bus has @found, and nothing between that and the channel before @next. Gives what is behind
 * it.
 */
static struct list_head *compare(struct vbus_proxy *proxy, struct list_head *next,
				 const struct vbus_next_channel_answer *found)
{
	struct vbus_channels *channels = &proxy->channels;
	struct vbus_channel *channel;
	int differ;

	while (next != &channels->list) {
		channel = list_entry(next, struct vbus_channel, list);
		differ = order(channel, &found->name);
		if (differ > 0)
			break;
		next = next->next;
		if (!differ && is_unchanged(channel, found))
			return next;
		withdraw(channels, channel);
	}
	if (is_name(found->name.name, found->name.name_length))
		add(proxy, found, next);
	return next;
}

/* Ask for the channel behind @name: 1, 0 when there is none, an error. */
static int ask_for_next(struct vbus_proxy *proxy, const struct vbus_next_channel *name,
			struct vbus_next_channel_answer *answer)
{
	const size_t least = offsetof(struct vbus_next_channel_answer, name.name);
	struct vbus_request request = {
		.id = VBUS_NEXT_CHANNEL,
		.bus = true,
		.body = name,
		.size = 1 + name->name_length,
		.answer = answer,
		.least = least,
		.room = sizeof(*answer),
	};
	unsigned int length;
	int size, differ;

	size = vbus_ask(proxy, &request);
	if (size < 0)
		return size;
	length = answer->name.name_length;
	if (size != least + length || answer->priority >= VBUS_PRIORITIES ||
	    le32_to_cpu(answer->memory) > VBUS_REGIONS_BYTES)
		return -EPROTO;
	if (!length)
		return 0;
	differ = memcmp(answer->name.name, name->name, min_t(u8, length, name->name_length));
	return differ > 0 || (!differ && length > name->name_length) ? 1 : -EPROTO;
}

/* Make true what the bus says. */
static int scan(struct vbus_proxy *proxy)
{
	struct vbus_channels *channels = &proxy->channels;
	struct list_head *next = channels->list.next, *behind;
	struct vbus_next_channel_answer found;
	struct vbus_next_channel name = {};
	unsigned int count;
	int more;

	for (count = 0; ; count++) {
		more = ask_for_next(proxy, &name, &found);
		if (more <= 0 || READ_ONCE(channels->over))
			break;
		if (count == MAX_NAMES)
			return -EPROTO;
		next = compare(proxy, next, &found);
		name = found.name;
	}
	for (; !more && next != &channels->list; next = behind) {
		behind = next->next;
		withdraw(channels, list_entry(next, struct vbus_channel, list));
	}
	return more;
}

static void scan_work(struct work_struct *work)
{
	struct vbus_channels *channels = container_of(work, struct vbus_channels, scan);
	struct vbus_proxy *proxy = container_of(channels, struct vbus_proxy, channels);
	int err;

	if (READ_ONCE(channels->over))
		return;
	err = scan(proxy);
	if (err == -EPROTO)
		vbus_broken(proxy, "names of channels that cannot be");
	else if (err == -ETIMEDOUT)
		vbus_broken(proxy, "it does not say which channels there are");
}

/* Channels came or went. */
void vbus_channels_changed(struct vbus_proxy *proxy)
{
	queue_work(proxy->channels.queue, &proxy->channels.scan);
}

/* The beginning and the end. */

int vbus_channels_init(struct vbus_proxy *proxy, const struct vbus_layout *layout)
{
	struct vbus_channels *channels = &proxy->channels;

	proxy->regions = layout->regions;
	INIT_WORK(&channels->scan, scan_work);
	INIT_LIST_HEAD(&channels->list);
	xa_init_flags(&channels->ends, XA_FLAGS_ALLOC);
	/* Of channels that are left none waits for another. */
	channels->queue = alloc_workqueue("vbus%d-channels", WQ_UNBOUND, 0, proxy->id);
	return channels->queue ? 0 : -ENOMEM;
}

/* Take all channels away: orderly while the bus answers. Afterwards nobody says anything. */
void vbus_channels_stop(struct vbus_proxy *proxy)
{
	struct vbus_channels *channels = &proxy->channels;

	WRITE_ONCE(channels->over, true);
	/* The link still hears; what it queues finds that it is over. */
	flush_work(&channels->scan);
	while (!list_empty(&channels->list))
		withdraw(channels, list_first_entry(&channels->list, struct vbus_channel, list));
	vbus_ends_stop(proxy);
}

/* The link hears no more. */
void vbus_channels_free(struct vbus_proxy *proxy)
{
	destroy_workqueue(proxy->channels.queue);
	xa_destroy(&proxy->channels.ends);
}
