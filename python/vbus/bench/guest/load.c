/*
 * Load for measurements of a guest: reads of disks, and TCP over networks. It runs in the guest,
 * and, as the other end of TCP, on the host. Nothing here knows what the devices are behind.
 *
 *	load [-c NAME=GLOB]... read COUNT DEPTH SEED DISK...	COUNT reads of 4 KiB of each disk
 *	load [-c NAME=GLOB]... ask COUNT DEPTH ADDRESS...	COUNT requests of 64 bytes a connection,
 *								DEPTH connections to each address
 *	load [-c NAME=GLOB]... stream COUNT DEPTH ADDRESS...	COUNT times 64 KiB a connection
 *	load [-c NAME=GLOB]... tell COUNT 1 FILE...		COUNT events of 64 bytes to a channel, one
 *								at a time, that it sends back
 *	load serve						the other end of TCP
 *
 * A thread for each disk or connection. What was done, how long it took and how many interrupts
 * came meanwhile is said in a line of JSON; with -c, too, by how much the numbers in the files have
 * grown that match. With -u, before all else, its threads go before those of other programs; of
 * the other end's, those that answer, where that is permitted. With
 * -w TERMINAL=WORD behind that, it says "WORD begins" and "WORD ends" on a terminal around the load,
 * and goes on when it is typed something: for whoever watches from outside, and only wants the load.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <glob.h>
#include <linux/aio_abi.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define BLOCK		4096
#define CHUNK		65536
#define QUESTION	64
#define PORT		7000
#define MAX_DEPTH	256
#define MAX_COUNTED	16
#define MAX_LINES	512

/* Whoever answers questions goes before whoever takes streams. */
static int answers_first;

/* From linux/fs.h, which does not go together with the C library's headers everywhere. */
#define BLOCK_DEVICE_BYTES	_IOR(0x12, 114, size_t)

static void fail(const char *format, ...)
{
	va_list words;

	va_start(words, format);
	fprintf(stderr, "load: ");
	vfprintf(stderr, format, words);
	fprintf(stderr, ": %m\n");
	va_end(words);
	exit(1);
}

static void *room(size_t bytes)
{
	void *made;

	if (posix_memalign(&made, BLOCK, bytes))
		fail("no memory");
	/* Each page is there before it is timed. */
	return memset(made, 0, bytes);
}

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ull + time.tv_nsec;
}

/* One disk or connection. */
struct job {
	const char *where;
	uint64_t count, depth, seed;
	uint64_t bytes, wrong;
	uint32_t *took;			/* nanoseconds, of each of @count */
	pthread_t thread;
};

static pthread_barrier_t all_are_there;

static uint64_t next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

/* Reads of a disk whose blocks begin with their number. */

static void *read_disk(void *data)
{
	struct job *job = data;
	struct iocb blocks[MAX_DEPTH], *given[MAX_DEPTH];
	struct io_event events[MAX_DEPTH];
	uint64_t began[MAX_DEPTH], state = job->seed, begun = 0, done = 0, size;
	aio_context_t context = 0;
	char *buffers = room(job->depth * BLOCK);
	int fd = open(job->where, O_RDONLY | O_DIRECT);
	long found, i, ready = job->depth;

	if (fd < 0 || ioctl(fd, BLOCK_DEVICE_BYTES, &size) || syscall(SYS_io_setup, job->depth, &context))
		fail("%s", job->where);
	memset(blocks, 0, sizeof(blocks));
	for (i = 0; i < ready; i++) {
		blocks[i].aio_lio_opcode = IOCB_CMD_PREAD;
		blocks[i].aio_fildes = fd;
		blocks[i].aio_buf = (uintptr_t)(buffers + i * BLOCK);
		blocks[i].aio_nbytes = BLOCK;
		blocks[i].aio_data = i;
		events[i].data = i;
	}
	pthread_barrier_wait(&all_are_there);
	while (done < job->count) {
		long submitted = 0;

		for (i = 0; i < ready && begun < job->count; i++, begun++) {
			struct iocb *block = &blocks[events[i].data];

			block->aio_offset = next(&state) % (size / BLOCK) * BLOCK;
			began[block->aio_data] = now();
			given[submitted++] = block;
		}
		for (i = 0; i < submitted; i += found) {
			found = syscall(SYS_io_submit, context, submitted - i, given + i);
			if (found <= 0)
				fail("%s: submit", job->where);
		}
		ready = syscall(SYS_io_getevents, context, 1, job->depth, events, NULL);
		if (ready < 0)
			fail("%s: wait", job->where);
		for (i = 0; i < ready; i++) {
			struct iocb *block = &blocks[events[i].data];
			uint64_t *words = (uint64_t *)(uintptr_t)block->aio_buf;

			job->took[done++] = now() - began[block->aio_data];
			job->wrong += events[i].res != BLOCK || words[0] != (uint64_t)block->aio_offset / BLOCK;
			job->bytes += events[i].res;
		}
	}
	return NULL;
}

/* An event channel, which answers what it is told. */

static void *tell(void *data)
{
	struct job *job = data;
	uint64_t event[QUESTION / 8], answer[QUESTION / 8], began;
	int fd = open(job->where, O_RDWR);

	if (fd < 0)
		fail("%s", job->where);
	memset(event, 0, sizeof(event));
	pthread_barrier_wait(&all_are_there);
	for (uint64_t done = 0; done < job->count; done++) {
		event[0] = job->seed + done;
		began = now();
		if (write(fd, event, sizeof(event)) != sizeof(event))
			fail("%s", job->where);
		if (read(fd, answer, sizeof(answer)) != sizeof(answer))
			fail("%s: no answer", job->where);
		job->took[done] = now() - began;
		job->wrong += memcmp(event, answer, sizeof(answer)) != 0;
		job->bytes += sizeof(answer);
	}
	close(fd);
	return NULL;
}

/* TCP: a connection begins with a word that says what it is for. */

static int connected(struct job *job, uint64_t what)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(PORT) };
	int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;

	inet_pton(AF_INET, job->where, &address.sin_addr);
	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)))
		fail("%s", job->where);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	if (write(fd, &what, sizeof(what)) != sizeof(what))
		fail("%s", job->where);
	return fd;
}

static int read_all(int fd, void *into, size_t size)
{
	return recv(fd, into, size, MSG_WAITALL) == (ssize_t)size;
}

static void write_all(int fd, const void *from, size_t size)
{
	ssize_t written;

	for (; size; from = (const char *)from + written, size -= written) {
		written = write(fd, from, size);
		if (written <= 0)
			fail("write");
	}
}

static void *ask(void *data)
{
	struct job *job = data;
	uint64_t question[QUESTION / 8], answer[QUESTION / 8], done, began;
	int fd = connected(job, 0);

	memset(question, 0, sizeof(question));
	pthread_barrier_wait(&all_are_there);
	for (done = 0; done < job->count; done++) {
		question[0] = job->seed + done;
		began = now();
		write_all(fd, question, sizeof(question));
		if (!read_all(fd, answer, sizeof(answer)))
			fail("%s: no answer", job->where);
		job->took[done] = now() - began;
		job->wrong += memcmp(question, answer, sizeof(answer)) != 0;
		job->bytes += sizeof(answer);
	}
	close(fd);
	return NULL;
}

static void *stream(void *data)
{
	struct job *job = data;
	char *chunk = room(CHUNK);
	uint64_t done, began, came;
	int fd = connected(job, job->count * CHUNK);

	pthread_barrier_wait(&all_are_there);
	for (done = 0; done < job->count; done++) {
		began = now();
		write_all(fd, chunk, CHUNK);
		job->took[done] = now() - began;
		job->bytes += CHUNK;
	}
	/* It ends when all of it has come. */
	job->wrong = !read_all(fd, &came, sizeof(came)) || came != job->bytes;
	close(fd);
	return NULL;
}

/* This thread goes before those of other programs. */
static int go_first(void)
{
	struct sched_param urgent = { .sched_priority = 50 };

	return sched_setscheduler(0, SCHED_FIFO, &urgent);
}

static void *answer(void *data)
{
	char *chunk = room(CHUNK);
	int fd = (intptr_t)data, on = 1;
	uint64_t total, left;
	ssize_t came = 1;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	if (read_all(fd, &total, sizeof(total))) {
		for (left = total; left && came > 0; left -= came)
			came = read(fd, chunk, left < CHUNK ? left : CHUNK);
		if (total && came > 0)
			write_all(fd, &total, sizeof(total));
		if (!total && answers_first)
			go_first();
		while (!total && read_all(fd, chunk, QUESTION))
			write_all(fd, chunk, QUESTION);
	}
	close(fd);
	free(chunk);
	return NULL;
}

static void serve(void)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(PORT) };
	int listening = socket(AF_INET, SOCK_STREAM, 0), on = 1, fd;
	pthread_t thread;

	setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(listening, (struct sockaddr *)&address, sizeof(address)) || listen(listening, 64))
		fail("port %d", PORT);
	puts("ready");
	fflush(stdout);
	while ((fd = accept(listening, NULL, NULL)) >= 0) {
		if (pthread_create(&thread, NULL, answer, (void *)(intptr_t)fd))
			fail("no thread");
		pthread_detach(thread);
	}
}

/* What is counted elsewhere. */

struct line {
	char name[48];
	uint64_t count;
};

/* Interrupts of all processors by the name of their vector, or by what the kernel calls their kind. */
static int read_interrupts(struct line *lines)
{
	FILE *file = fopen("/proc/interrupts", "r");
	char text[4096];
	int count = 0;

	while (file && fgets(text, sizeof(text), file) && count < MAX_LINES) {
		char *word = strtok(text, " \n"), *end, *last = word;
		struct line *line = &lines[count];
		int numbered;

		if (!word || !strchr(word, ':'))
			continue;
		*strchr(word, ':') = 0;
		numbered = *word >= '0' && *word <= '9';
		line->count = 0;
		while ((word = strtok(NULL, " \n"))) {
			uint64_t number = strtoull(word, &end, 10);

			if (*end)
				break;
			line->count += number;
		}
		for (; numbered && word; word = strtok(NULL, " \n"))
			last = word;
		snprintf(line->name, sizeof(line->name), "%s", last);
		count++;
	}
	if (file)
		fclose(file);
	return count;
}

static uint64_t read_numbers(const char *pattern)
{
	uint64_t sum = 0, number;
	glob_t found;
	size_t i;

	if (glob(pattern, 0, NULL, &found))
		return 0;
	for (i = 0; i < found.gl_pathc; i++) {
		FILE *file = fopen(found.gl_pathv[i], "r");

		while (file && fscanf(file, "%lu", &number) == 1)
			sum += number;
		if (file)
			fclose(file);
	}
	globfree(&found);
	return sum;
}

static int by_size(const void *one, const void *other)
{
	uint32_t a = *(const uint32_t *)one, b = *(const uint32_t *)other;

	return (a > b) - (a < b);
}

static double percentile(const uint32_t *ordered, uint64_t count, double percent)
{
	uint64_t rank = (uint64_t)(count * percent / 100 + 0.999999);

	return count ? ordered[rank ? rank - 1 : 0] / 1000.0 : 0;
}

/* What was counted before a load and after it. */
struct counts {
	struct line lines[MAX_LINES];
	int lines_count;
	uint64_t numbers[MAX_COUNTED];
};

static void count_all(struct counts *counts, char **counted, int countings)
{
	int i;

	counts->lines_count = read_interrupts(counts->lines);
	for (i = 0; i < countings; i++)
		counts->numbers[i] = read_numbers(strchr(counted[i], '=') + 1);
}

static void say_counts(const struct counts *before, const struct counts *after, char **counted, int countings)
{
	int i, j, said = 0;

	printf("\"counted\": {");
	for (i = 0; i < countings; i++)
		printf("%s\"%.*s\": %lu", i ? ", " : "", (int)(strchr(counted[i], '=') - counted[i]), counted[i],
		       after->numbers[i] - before->numbers[i]);
	printf("}, \"interrupts\": {");
	for (i = 0; i < after->lines_count; i++) {
		const struct line *line = &after->lines[i];
		uint64_t was = 0;

		for (j = 0; j < before->lines_count; j++)
			if (!strcmp(before->lines[j].name, line->name))
				was = before->lines[j].count;
		if (line->count > was)
			printf("%s\"%s\": %lu", said++ ? ", " : "", line->name, line->count - was);
	}
	printf("}");
}

/* Whoever watches from outside. */
struct watch {
	int terminal;
	const char *word;
};

static void say(const struct watch *watch, const char *what)
{
	char typed;

	if (!watch->word)
		return;
	dprintf(watch->terminal, "%s %s\n", watch->word, what);
	tcdrain(watch->terminal);
	if (read(watch->terminal, &typed, 1) != 1)
		fail("the terminal");
}

/* Do a load and say what came of it. */
static void run(void *(*what)(void *), struct job *jobs, int jobs_count, char **counted, int countings,
		const struct watch *watch)
{
	static struct counts before, after;
	uint64_t count = jobs->count * jobs_count, bytes = 0, wrong = 0, time;
	uint32_t *took = room(count * sizeof(*took));
	int i;

	pthread_barrier_init(&all_are_there, NULL, jobs_count + 1);
	for (i = 0; i < jobs_count; i++) {
		jobs[i].took = took + i * jobs->count;
		if (pthread_create(&jobs[i].thread, NULL, what, &jobs[i]))
			fail("no thread");
	}
	/* They are all there soon: the making of connections shall not be counted. */
	usleep(50000);
	count_all(&before, counted, countings);
	say(watch, "begins");
	time = now();
	pthread_barrier_wait(&all_are_there);
	for (i = 0; i < jobs_count; i++) {
		pthread_join(jobs[i].thread, NULL);
		bytes += jobs[i].bytes;
		wrong += jobs[i].wrong;
	}
	time = now() - time;
	say(watch, "ends");
	count_all(&after, counted, countings);
	qsort(took, count, sizeof(*took), by_size);
	printf("{\"requests\": %lu, \"bytes\": %lu, \"wrong\": %lu, \"seconds\": %.6f, ", count, bytes, wrong, time / 1e9);
	printf("\"p50_us\": %.1f, \"p99_us\": %.1f, ", percentile(took, count, 50), percentile(took, count, 99));
	say_counts(&before, &after, counted, countings);
	printf("}\n");
}

int main(int argc, char **argv)
{
	void *(*what)(void *) = NULL;
	char *counted[MAX_COUNTED];
	uint64_t count, depth, seed = 0;
	int i, each, countings = 0;
	struct watch watch = {};
	struct job *jobs;

	if (argc > 2 && !strcmp(argv[1], "-u")) {
		answers_first = 1;
		argc--;
		argv++;
	}
	if (argc == 2 && !strcmp(argv[1], "serve")) {
		serve();
		return 1;
	}
	if (answers_first && go_first())
		fail("a real-time priority");
	if (argc > 3 && !strcmp(argv[1], "-w") && strchr(argv[2], '=')) {
		char *word = strchr(argv[2], '=');

		*word++ = 0;
		watch.word = word;
		watch.terminal = open(argv[2], O_RDWR | O_NOCTTY);
		if (watch.terminal < 0)
			fail("%s", argv[2]);
		argc -= 2;
		argv += 2;
	}
	for (; argc > 3 && !strcmp(argv[1], "-c") && countings < MAX_COUNTED; argc -= 2, argv += 2)
		counted[countings++] = argv[2];
	if (argc < 5) {
		fprintf(stderr, "load: what, how often, how many at once, and where?\n");
		return 2;
	}
	if (!strcmp(argv[1], "read"))
		what = read_disk;
	else if (!strcmp(argv[1], "ask"))
		what = ask;
	else if (!strcmp(argv[1], "stream"))
		what = stream;
	else if (!strcmp(argv[1], "tell"))
		what = tell;
	count = strtoull(argv[2], NULL, 10);
	depth = strtoull(argv[3], NULL, 10);
	if (!what || !count || !depth || depth > MAX_DEPTH) {
		fprintf(stderr, "load: read, ask, stream or tell, and 1 to %d at once\n", MAX_DEPTH);
		return 2;
	}
	argv += 4;
	argc -= 4;
	if (what == read_disk) {
		seed = strtoull(*argv++, NULL, 10);
		argc--;
	}
	if (!argc) {
		fprintf(stderr, "load: where?\n");
		return 2;
	}
	each = what == read_disk ? 1 : depth;
	jobs = room(argc * each * sizeof(*jobs));
	for (i = 0; i < argc * each; i++) {
		jobs[i].where = argv[i / each];
		jobs[i].count = count;
		jobs[i].depth = depth;
		jobs[i].seed = (seed + i + 1) * 0x9e3779b97f4a7c15ull;
	}
	run(what, jobs, argc * each, counted, countings, &watch);
	return 0;
}
