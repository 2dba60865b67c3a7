/*
 * What a program does with a disk, a terminal or a network interface in a guest, where the shell has no word for it:
 *
 *	device_steps read FILE OFFSET SIZE	what the device has there, in hexadecimal
 *	device_steps write FILE OFFSET HEX	give it these bytes, and wait until it has them
 *	device_steps flush FILE
 *	device_steps discard FILE OFFSET SIZE
 *	device_steps window FILE		columns and rows of a terminal
 *	device_steps exchange INTERFACE HEX...	send frames, and receive as many of type 0x88b5
 *
 * What fails says the error's name, and ends with 1.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#define TYPE	0x88b5
#define SECONDS	20

static void check(long result)
{
	if (result >= 0)
		return;
	printf("%s\n", strerrorname_np(errno));
	exit(1);
}

static void show(const unsigned char *data, size_t size)
{
	for (size_t i = 0; i < size; i++)
		printf("%02x", data[i]);
	putchar('\n');
}

static size_t bytes(const char *hex, unsigned char *data)
{
	size_t size = strlen(hex) / 2;

	for (size_t i = 0; i < size; i++)
		sscanf(hex + 2 * i, "%2hhx", &data[i]);
	return size;
}

static void read_disk(int file, off_t offset, size_t size)
{
	unsigned char *data = malloc(size);
	size_t done = 0;
	ssize_t part;

	/* Not what the kernel remembers of it. */
	check(ioctl(file, BLKFLSBUF));
	while (done < size) {
		part = pread(file, data + done, size - done, offset + done);
		check(part);
		if (!part)
			break;
		done += part;
	}
	show(data, done);
}

static void write_disk(int file, off_t offset, const char *hex)
{
	unsigned char data[8192];
	size_t size = bytes(hex, data);

	check(pwrite(file, data, size, offset));
	/* Written, and not flushed. */
	check(sync_file_range(file, offset, size, SYNC_FILE_RANGE_WAIT_BEFORE |
			      SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER));
}

static void discard(int file, off_t offset, size_t size)
{
	uint64_t range[2] = { offset, size };

	check(ioctl(file, BLKDISCARD, range));
}

static void window(int file)
{
	struct winsize size;

	check(ioctl(file, TIOCGWINSZ, &size));
	printf("%u %u\n", size.ws_col, size.ws_row);
}

static void exchange(const char *interface, int count, char **frames)
{
	struct sockaddr_ll place = {
		.sll_family = AF_PACKET,
		.sll_protocol = htons(TYPE),
		.sll_ifindex = if_nametoindex(interface),
	};
	struct timeval limit = { .tv_sec = SECONDS };
	int on = 1, sock = socket(AF_PACKET, SOCK_RAW, htons(TYPE));
	unsigned char data[65536];
	ssize_t size;

	check(sock);
	check(setsockopt(sock, SOL_PACKET, PACKET_IGNORE_OUTGOING, &on, sizeof(on)));
	check(setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)));
	check(bind(sock, (struct sockaddr *)&place, sizeof(place)));
	for (int i = 0; i < count; i++)
		check(send(sock, data, bytes(frames[i], data), 0));
	for (int i = 0; i < count; i++) {
		size = recv(sock, data, sizeof(data), 0);
		check(size);
		show(data, size);
	}
}

int main(int count, char **words)
{
	const char *step = count > 2 ? words[1] : "";
	int file;

	if (!strcmp(step, "exchange")) {
		exchange(words[2], count - 3, words + 3);
		return 0;
	}
	file = open(count > 2 ? words[2] : "", (strcmp(step, "read") ? O_RDWR : O_RDONLY) | O_NOCTTY);
	check(file);
	if (!strcmp(step, "read") && count == 5)
		read_disk(file, atoll(words[3]), atoll(words[4]));
	else if (!strcmp(step, "write") && count == 5)
		write_disk(file, atoll(words[3]), words[4]);
	else if (!strcmp(step, "flush"))
		check(fsync(file));
	else if (!strcmp(step, "window"))
		window(file);
	else if (!strcmp(step, "discard") && count == 5)
		discard(file, atoll(words[3]), atoll(words[4]));
	else
		return 2;
	return 0;
}
