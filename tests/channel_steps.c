/*
 * What a program does with a channel in a guest, step by step:
 *
 *	channel_steps FILE STEP...
 *
 * The file is opened, and each step says a line of what came of it.
 *
 *	say=TEXT	write an event		its size
 *	two=TEXT	the same, in two parts	its size
 *	bytes=HEX	the same, of any bytes	its size
 *	hear		read an event		its bytes
 *	heard		the same		in hexadecimal
 *	hear=N		with so many bytes of room
 *	poll=MS		wait so long at most	of IN, OUT, HUP those that are so
 *	pollin=MS	the same, and OUT does not matter
 *	nonblock	from now on nothing waits
 *	block		from now on everything does
 *	fill=N		write events of N bytes until there is no room; how many
 *	drain=N		read N events; how many
 *	count=N		write N events that are the numbers from 0 on
 *	counted=N	read them; how many came as they should
 *	map=N		map the first N bytes, shared
 *	put=AT,TEXT	write into what is mapped
 *	get=AT,N	read from it; bytes of zero are shown as '.'
 *	private		try to map a copy
 *	beyond=N	try to map N bytes behind what is mapped
 *	made=FILE	make a file
 *	until=FILE	wait until there is that file
 *	input		further steps, a line each; the last is "end"
 *
 * What fails says the error's name.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

static int file;
static char *mapped = MAP_FAILED;
static size_t mapped_size;

static void number(long result)
{
	if (result < 0)
		printf("%s\n", strerrorname_np(errno));
	else
		printf("%ld\n", result);
}

static void bytes(const char *data, long size)
{
	if (size < 0) {
		number(size);
		return;
	}
	for (long i = 0; i < size; i++)
		putchar(data[i] ? data[i] : '.');
	putchar('\n');
}

static void say_bytes(const char *hex)
{
	unsigned char data[8192];
	size_t size = strlen(hex) / 2;

	for (size_t i = 0; i < size; i++)
		sscanf(hex + 2 * i, "%2hhx", &data[i]);
	number(write(file, data, size));
}

static void hear_bytes(void)
{
	unsigned char data[4096];
	long size = read(file, data, sizeof(data));

	if (size < 0) {
		number(size);
		return;
	}
	for (long i = 0; i < size; i++)
		printf("%02x", data[i]);
	putchar('\n');
}

static void hear(const char *room)
{
	static char data[8192];

	bytes(data, read(file, data, room ? strtoul(room, NULL, 0) : sizeof(data)));
}

static void say_two(const char *text)
{
	size_t half = strlen(text) / 2;
	struct iovec parts[2] = {
		{ (char *)text, half }, { (char *)text + half, strlen(text) - half },
	};

	number(writev(file, parts, 2));
}

static void do_poll(short events, const char *ms)
{
	struct pollfd look = { .fd = file, .events = events };

	poll(&look, 1, atoi(ms));
	printf("%s%s%s\n", look.revents & POLLIN ? "IN " : "", look.revents & POLLOUT ? "OUT " : "",
	       look.revents & POLLHUP ? "HUP " : "");
}

static void fill(const char *size)
{
	char data[4096] = { 0 };
	long count = 0;

	while (write(file, data, atoi(size)) >= 0)
		count++;
	printf("%ld %s\n", count, strerrorname_np(errno));
}

static void drain(const char *wanted)
{
	char data[4096];
	long count = 0;

	while (count < atoi(wanted) && read(file, data, sizeof(data)) >= 0)
		count++;
	printf("%ld\n", count);
}

static void say_numbers(long wanted)
{
	unsigned int next = 0;

	while (next < wanted && write(file, &next, sizeof(next)) == sizeof(next))
		next++;
	printf("%u\n", next);
}

static void hear_numbers(long wanted)
{
	unsigned int next = 0, said;

	while (next < wanted && read(file, &said, sizeof(said)) == sizeof(said) && said == next)
		next++;
	printf("%u\n", next);
}

static void map(const char *size)
{
	mapped_size = strtoul(size, NULL, 0);
	mapped = mmap(NULL, mapped_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	number(mapped == MAP_FAILED ? -1 : 0);
}

static void try_map(int flags, size_t size, off_t offset)
{
	char *place = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, file, offset);

	number(place == MAP_FAILED ? -1 : 0);
	if (place != MAP_FAILED)
		munmap(place, size);
}

static void put(char *words)
{
	char *text = strchr(words, ',') + 1;

	memcpy(mapped + strtoul(words, NULL, 0), text, strlen(text));
	number(strlen(text));
}

static void get(const char *words)
{
	bytes(mapped + strtoul(words, NULL, 0), atoi(strchr(words, ',') + 1));
}

static void until(const char *path)
{
	while (access(path, F_OK))
		usleep(5000);
	number(0);
}

static void step(char *word)
{
	char *text = strchr(word, '=');

	if (text)
		*text++ = 0;
	if (!strcmp(word, "say"))
		number(write(file, text, strlen(text)));
	else if (!strcmp(word, "two"))
		say_two(text);
	else if (!strcmp(word, "bytes"))
		say_bytes(text);
	else if (!strcmp(word, "heard"))
		hear_bytes();
	else if (!strcmp(word, "hear"))
		hear(text);
	else if (!strcmp(word, "poll"))
		do_poll(POLLIN | POLLOUT, text);
	else if (!strcmp(word, "pollin"))
		do_poll(POLLIN, text);
	else if (!strcmp(word, "nonblock"))
		number(fcntl(file, F_SETFL, O_NONBLOCK));
	else if (!strcmp(word, "block"))
		number(fcntl(file, F_SETFL, 0));
	else if (!strcmp(word, "fill"))
		fill(text);
	else if (!strcmp(word, "drain"))
		drain(text);
	else if (!strcmp(word, "count"))
		say_numbers(atol(text));
	else if (!strcmp(word, "counted"))
		hear_numbers(atol(text));
	else if (!strcmp(word, "map"))
		map(text);
	else if (!strcmp(word, "put"))
		put(text);
	else if (!strcmp(word, "get"))
		get(text);
	else if (!strcmp(word, "private"))
		try_map(MAP_PRIVATE, 4096, 0);
	else if (!strcmp(word, "beyond"))
		try_map(MAP_SHARED, strtoul(text, NULL, 0), mapped_size);
	else if (!strcmp(word, "made"))
		number(close(creat(text, 0600)));
	else if (!strcmp(word, "until"))
		until(text);
	else
		printf("%s?\n", word);
	fflush(stdout);
}

static void more_steps(void)
{
	char *line = NULL;
	size_t room = 0;

	while (getline(&line, &room, stdin) > 0) {
		line[strcspn(line, "\n")] = 0;
		if (!strcmp(line, "end"))
			break;
		step(line);
	}
}

int main(int count, char **words)
{
	file = count > 1 ? open(words[1], O_RDWR) : -1;
	if (file < 0) {
		printf("open: %s\n", strerrorname_np(errno));
		return 1;
	}
	for (int i = 2; i < count; i++)
		if (!strcmp(words[i], "input"))
			more_steps();
		else
			step(words[i]);
	return 0;
}
