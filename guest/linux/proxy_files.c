// SPDX-License-Identifier: GPL-2.0-only
/*
 * Channels as programs have them: /dev/vbus/NAME.
 *
 *	open	the first file opens the channel, the last one leaves it; those that are open at the
 *		same time share its end
 *	read	one event; waits for one. A buffer that is too small: EMSGSIZE, and the event stays.
 *		0 bytes are an event without bytes, not the end: that is ENODEV, behind the last one
 *	write	one event; waits for room. ENODEV when the channel is gone, or was closed by the bus
 *	poll	HUP when the channel is gone
 *	mmap	the channel's region, shared
 *
 * Whose channel goes while it is mapped keeps a page of nobody's in place of the region, which will
 * be another channel's: it neither faults nor sees what is not its own.
 */
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/uio.h>
#include <linux/version.h>

#include "proxy_channels.h"

/* Opening and closing. */

/* The end that is open, for one file more; NULL when there is none. */
static struct vbus_end *share_end(struct vbus_channel *channel)
{
	struct vbus_end *end;

	spin_lock(&channel->lock);
	end = channel->end;
	if (end && !READ_ONCE(end->closed))
		end->users++;
	else
		end = NULL;
	spin_unlock(&channel->lock);
	return end;
}

static struct vbus_end *open_end(struct vbus_channel *channel)
{
	struct vbus_end *end = share_end(channel);
	int err;

	if (end)
		return end;
	/* The bus takes a name once: the end before is to be out of its way. */
	err = wait_event_interruptible(channel->left, !atomic_read(&channel->leaving));
	if (err)
		return ERR_PTR(err);
	end = vbus_end_open(channel);
	if (IS_ERR(end))
		return end;
	spin_lock(&channel->lock);
	end->users = 1;
	channel->end = end;
	spin_unlock(&channel->lock);
	return end;
}

static void close_end(struct vbus_end *end)
{
	struct vbus_channel *channel = end->channel;
	bool last;

	spin_lock(&channel->lock);
	last = !--end->users;
	if (last && channel->end == end)
		channel->end = NULL;
	spin_unlock(&channel->lock);
	if (last) {
		vbus_end_leave(end);
		vbus_end_put(end);
	}
}

static int channel_open(struct inode *inode, struct file *file)
{
	struct vbus_channel *channel = container_of(inode->i_cdev, struct vbus_channel, cdev);
	struct vbus_file *opened;
	struct vbus_end *end;

	opened = kzalloc(sizeof(*opened), GFP_KERNEL);
	if (!opened)
		return -ENOMEM;
	end = ERR_PTR(-ERESTARTSYS);
	if (!mutex_lock_interruptible(&channel->opening)) {
		end = channel->gone ? ERR_PTR(-ENODEV) : open_end(channel);
		mutex_unlock(&channel->opening);
	}
	if (IS_ERR(end)) {
		kfree(opened);
		return PTR_ERR(end);
	}
	opened->end = end;
	opened->pages = file->f_mapping;
	mutex_lock(&end->mapping);
	list_add(&opened->list, &end->files);
	mutex_unlock(&end->mapping);
	file->private_data = opened;
	return stream_open(inode, file);
}

static int channel_release(struct inode *inode, struct file *file)
{
	struct vbus_file *opened = file->private_data;

	mutex_lock(&opened->end->mapping);
	list_del(&opened->list);
	mutex_unlock(&opened->end->mapping);
	close_end(opened->end);
	kfree(opened);
	return 0;
}

static struct vbus_end *end_of(struct file *file)
{
	return ((struct vbus_file *)file->private_data)->end;
}

/* Reading and writing. */

static ssize_t channel_read(struct kiocb *iocb, struct iov_iter *to)
{
	struct vbus_end *end = end_of(iocb->ki_filp);
	struct vbus_said *said;
	ssize_t size;
	int err;

	while (!(said = vbus_end_take(end, iov_iter_count(to)))) {
		if (iocb->ki_filp->f_flags & O_NONBLOCK)
			return -EAGAIN;
		err = wait_event_interruptible(end->wait, vbus_end_is_readable(end));
		if (err)
			return err;
	}
	if (IS_ERR(said))
		return PTR_ERR(said);
	size = said->size;
	if (copy_to_iter(said->data, size, to) != size) {
		vbus_end_untake(end, said);
		return -EFAULT;
	}
	vbus_end_consumed(end, said);
	return size;
}

/* Say what is in @body, when there is room. */
static int say(struct file *file, const struct vbus_channel_number *body, size_t size)
{
	struct vbus_end *end = end_of(file);
	int err;

	while ((err = vbus_end_say(end, body, size)) == -EAGAIN) {
		if (file->f_flags & O_NONBLOCK)
			break;
		err = wait_event_interruptible(end->wait, vbus_end_is_writable(end));
		if (err)
			break;
	}
	return err;
}

static ssize_t channel_write(struct kiocb *iocb, struct iov_iter *from)
{
	struct vbus_end *end = end_of(iocb->ki_filp);
	size_t size = iov_iter_count(from);
	struct vbus_channel_number *body;
	int err = -EFAULT;

	if (size > end->most)
		return -EMSGSIZE;
	body = kmalloc(sizeof(*body) + size, GFP_KERNEL);
	if (!body)
		return -ENOMEM;
	body->channel = cpu_to_le32(end->number);
	if (copy_from_iter_full(body + 1, size, from))
		err = say(iocb->ki_filp, body, size);
	kfree(body);
	return err ? err : size;
}

static __poll_t channel_poll(struct file *file, poll_table *wait)
{
	struct vbus_end *end = end_of(file);
	__poll_t mask = 0;

	poll_wait(file, &end->wait, wait);
	if (vbus_end_is_readable(end))
		mask |= EPOLLIN | EPOLLRDNORM;
	if (READ_ONCE(end->closed))
		mask |= EPOLLHUP;
	else if (vbus_end_is_writable(end))
		mask |= EPOLLOUT | EPOLLWRNORM;
	return mask;
}

/* The region. */

static pgoff_t pages_of(const struct vbus_end *end)
{
	return PAGE_ALIGN(end->memory) >> PAGE_SHIFT;
}

static vm_fault_t region_fault(struct vm_fault *fault)
{
	struct vbus_end *end = end_of(fault->vma->vm_file);
	unsigned long page;
	vm_fault_t result;

	if (fault->pgoff >= pages_of(end))
		return VM_FAULT_SIGBUS;
	mutex_lock(&end->mapping);
	page = READ_ONCE(end->closed) ? page_to_pfn(end->remains) :
	       PHYS_PFN(end->where) + fault->pgoff;
	result = vmf_insert_pfn(fault->vma, fault->address, page);
	mutex_unlock(&end->mapping);
	return result;
}

static const struct vm_operations_struct region_operations = {
	.fault = region_fault,
};

/* The end is closed: what is mapped is looked up anew. */
void vbus_end_unmap(struct vbus_end *end)
{
	struct vbus_file *opened;

	mutex_lock(&end->mapping);
	list_for_each_entry(opened, &end->files, list)
		unmap_mapping_range(opened->pages, 0, 0, 1);
	mutex_unlock(&end->mapping);
}

static int prepare_remains(struct vbus_end *end)
{
	mutex_lock(&end->mapping);
	if (!end->remains)
		end->remains = alloc_page(GFP_KERNEL | __GFP_ZERO);
	mutex_unlock(&end->mapping);
	return end->remains ? 0 : -ENOMEM;
}

static void set_flags(struct vm_area_struct *vma)
{
	const unsigned long flags = VM_PFNMAP | VM_IO | VM_DONTEXPAND | VM_DONTDUMP;

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
	vm_flags_set(vma, flags);
#else
	vma->vm_flags |= flags;
#endif
}

static int channel_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct vbus_end *end = end_of(file);
	int err;

	if (!end->memory)
		return -ENODEV;
	/* A copy of one's own would not be the region. */
	if (!(vma->vm_flags & VM_MAYSHARE))
		return -EINVAL;
	if (vma->vm_pgoff >= pages_of(end) || vma_pages(vma) > pages_of(end) - vma->vm_pgoff)
		return -EINVAL;
	err = prepare_remains(end);
	if (err)
		return err;
	set_flags(vma);
	vma->vm_ops = &region_operations;
	return 0;
}

const struct file_operations vbus_channel_files = {
	.owner = THIS_MODULE,
	.open = channel_open,
	.release = channel_release,
	.read_iter = channel_read,
	.write_iter = channel_write,
	.poll = channel_poll,
	.mmap = channel_mmap,
};
