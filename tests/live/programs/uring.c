/*
 * A client and a server in one thread, the second of its process, whose messages go through io_uring alone:
 *
 *   uring KIND CALLS WAY RING ROUNDS
 *
 * KIND is tcp, tcp6, udp, unix, dgram or pipe. CALLS are send (and recv), sendmsg, write, writev, zc (a send
 * without a copy) or multishot (one recv for all, into a group of buffers). WAY is enter, sqpoll (a thread of
 * the kernel polls the queue) or async (workers do it all). RING is early, made before the gate; late, made
 * behind it and before a second gate; or used, likewise, and 50 bytes are sent before that gate.
 *
 * Round number n sends 100 + n bytes; with even n they are there before they are asked for. Before and behind
 * the rounds one byte goes by write() and read() themselves (multishot: before). What cannot be done here is
 * told as {"refused": ERRNO}. KIND may also be connect: then each round connects to a port, and every second
 * one of these does not listen.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/io_uring.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define ENTRIES 64
#define BUFFER 4096
#define GROUP 7
#define BEFORE 50

static void fail(const char *what, int number)
{
	fprintf(stderr, "%s: %s\n", what, strerror(number));
	exit(1);
}

static void refused(int number)
{
	printf("{\"refused\": %d}\n", number);
	fflush(stdout);
	exit(0);
}

static struct {
	int fd, polled;
	_Atomic uint32_t *sq_head, *sq_tail, *sq_flags, *cq_head, *cq_tail;
	uint32_t *sq_array, sq_mask, cq_mask, queued;
	struct io_uring_sqe *sqes;
	struct io_uring_cqe *cqes;
} ring;

static void *map(size_t length, off_t offset)
{
	void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring.fd, offset);

	if (memory == MAP_FAILED)
		fail("mmap", errno);
	return memory;
}

static void make_ring(int polled)
{
	struct io_uring_params params = { .flags = polled ? IORING_SETUP_SQPOLL : 0, .sq_thread_idle = 50 };
	char *sq, *cq;

	ring.fd = syscall(SYS_io_uring_setup, ENTRIES, &params);
	if (ring.fd < 0)
		refused(errno);
	ring.polled = polled;
	sq = map(params.sq_off.array + params.sq_entries * sizeof(uint32_t), IORING_OFF_SQ_RING);
	cq = map(params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe), IORING_OFF_CQ_RING);
	ring.sqes = map(params.sq_entries * sizeof(struct io_uring_sqe), IORING_OFF_SQES);
	ring.sq_head = (void *)(sq + params.sq_off.head);
	ring.sq_tail = (void *)(sq + params.sq_off.tail);
	ring.sq_flags = (void *)(sq + params.sq_off.flags);
	ring.sq_mask = *(uint32_t *)(sq + params.sq_off.ring_mask);
	ring.sq_array = (void *)(sq + params.sq_off.array);
	ring.cq_head = (void *)(cq + params.cq_off.head);
	ring.cq_tail = (void *)(cq + params.cq_off.tail);
	ring.cq_mask = *(uint32_t *)(cq + params.cq_off.ring_mask);
	ring.cqes = (void *)(cq + params.cq_off.cqes);
}

static struct io_uring_sqe *queue(int opcode, int fd, void *address, uint32_t length, uint64_t tag)
{
	uint32_t tail = atomic_load(ring.sq_tail), place = tail & ring.sq_mask;
	struct io_uring_sqe *sqe = &ring.sqes[place];

	memset(sqe, 0, sizeof(*sqe));
	sqe->opcode = opcode;
	sqe->fd = fd;
	sqe->addr = (uintptr_t)address;
	sqe->len = length;
	sqe->user_data = tag;
	ring.sq_array[place] = place;
	ring.queued++;
	return sqe;
}

static void publish(void)
{
	atomic_store(ring.sq_tail, atomic_load(ring.sq_tail) + 1);
}

static void enter(uint32_t wanted)
{
	uint32_t flags = wanted ? IORING_ENTER_GETEVENTS : 0, count = ring.queued;

	ring.queued = 0;
	if (ring.polled) {
		atomic_thread_fence(memory_order_seq_cst);
		if (atomic_load(ring.sq_flags) & IORING_SQ_NEED_WAKEUP)
			flags |= IORING_ENTER_SQ_WAKEUP;
	}
	while (syscall(SYS_io_uring_enter, ring.fd, count, wanted, flags, NULL, 0) < 0)
		if (errno != EINTR)
			fail("io_uring_enter", errno);
}

struct done {
	int result;
	uint32_t tag;
};

/* The next completion; those of buffers that a send without a copy gives back are passed over. */
static struct done reap(void)
{
	struct io_uring_cqe *cqe;
	struct done done;
	uint32_t head, flags;

	do {
		head = atomic_load(ring.cq_head);
		while (head == atomic_load(ring.cq_tail))
			enter(1);
		cqe = &ring.cqes[head & ring.cq_mask];
		done = (struct done){ cqe->res, cqe->user_data };
		flags = cqe->flags;
		atomic_store(ring.cq_head, head + 1);
	} while (flags & IORING_CQE_F_NOTIF);
	return done;
}

static void check(uint32_t expected)
{
	struct done done = reap();

	if (done.result == -EINVAL || done.result == -EOPNOTSUPP)
		refused(-done.result);
	if (done.result != (int)expected) {
		fprintf(stderr, "tag %u: %d, not %u\n", done.tag, done.result, expected);
		exit(1);
	}
}

static void connect_ends(const char *kind, int *ends)
{
	struct sockaddr_in6 six = { .sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT };
	struct sockaddr_in four = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct sockaddr *address = (void *)&four;
	socklen_t length = sizeof(four);
	int type = SOCK_STREAM, listener, bad;

	if (!strcmp(kind, "pipe")) {
		if (pipe((int[2]){}) || pipe(ends))
			fail("pipe", errno);
		bad = ends[0], ends[0] = ends[1], ends[1] = bad;
		return;
	}
	if (!strcmp(kind, "unix") || !strcmp(kind, "dgram")) {
		if (socketpair(AF_UNIX, *kind == 'u' ? SOCK_STREAM : SOCK_DGRAM, 0, ends))
			fail("socketpair", errno);
		return;
	}
	if (!strcmp(kind, "tcp6"))
		address = (void *)&six, length = sizeof(six);
	if (!strcmp(kind, "udp"))
		type = SOCK_DGRAM;
	listener = socket(address->sa_family, type, 0);
	ends[0] = socket(address->sa_family, type, 0);
	bad = bind(listener, address, length) || getsockname(listener, address, &length) ||
	      (type == SOCK_STREAM && listen(listener, 1)) || connect(ends[0], address, length);
	if (bad)
		fail("connect", errno);
	ends[1] = type == SOCK_STREAM ? accept(listener, NULL, NULL) : listener;
	if (ends[1] < 0)
		fail("accept", errno);
}

static char out[BUFFER], in[BUFFER];

static void queue_send(const char *calls, int fd, uint32_t length, int asynchronous)
{
	static struct iovec pieces[2];
	static struct msghdr header = { .msg_iov = pieces, .msg_iovlen = 2 };
	struct io_uring_sqe *sqe;

	pieces[0] = (struct iovec){ out, 10 };
	pieces[1] = (struct iovec){ out + 10, length - 10 };
	if (!strcmp(calls, "sendmsg"))
		sqe = queue(IORING_OP_SENDMSG, fd, &header, 1, 1);
	else if (!strcmp(calls, "writev"))
		sqe = queue(IORING_OP_WRITEV, fd, pieces, 2, 1);
	else if (!strcmp(calls, "write"))
		sqe = queue(IORING_OP_WRITE, fd, out, length, 1);
	else if (!strcmp(calls, "zc"))
		sqe = queue(IORING_OP_SEND_ZC, fd, out, length, 1);
	else
		sqe = queue(IORING_OP_SEND, fd, out, length, 1);
	if (asynchronous)
		sqe->flags |= IOSQE_ASYNC;
	publish();
}

static void queue_receive(const char *calls, int fd, int asynchronous)
{
	static struct iovec pieces[2] = { { in, 20 }, { in + 20, BUFFER - 20 } };
	static struct msghdr header = { .msg_iov = pieces, .msg_iovlen = 2 };
	struct io_uring_sqe *sqe;

	if (!strcmp(calls, "sendmsg"))
		sqe = queue(IORING_OP_RECVMSG, fd, &header, 1, 2);
	else if (!strcmp(calls, "writev"))
		sqe = queue(IORING_OP_READV, fd, pieces, 2, 2);
	else if (!strcmp(calls, "write"))
		sqe = queue(IORING_OP_READ, fd, in, BUFFER, 2);
	else
		sqe = queue(IORING_OP_RECV, fd, in, BUFFER, 2);
	if (asynchronous)
		sqe->flags |= IOSQE_ASYNC;
	publish();
}

static void receive_many(int *ends, uint32_t rounds, int asynchronous)
{
	static char buffers[ENTRIES][BUFFER];
	struct io_uring_sqe *sqe;
	uint32_t number, received = 0, sent = 0;

	sqe = queue(IORING_OP_PROVIDE_BUFFERS, ENTRIES, buffers, BUFFER, 3);
	sqe->buf_group = GROUP;
	publish();
	enter(1);
	reap();
	sqe = queue(IORING_OP_RECV, ends[1], NULL, 0, 2);
	sqe->ioprio = IORING_RECV_MULTISHOT;
	sqe->flags = IOSQE_BUFFER_SELECT;
	sqe->buf_group = GROUP;
	publish();
	enter(0);
	for (number = 0; number < rounds; number++) {
		queue_send("send", ends[0], 100 + number, asynchronous);
		enter(2);
		for (int both = 0; both < 2; both++) {
			struct done done = reap();

			if (done.result == -EINVAL)
				refused(EINVAL);
			if (done.result < 0)
				fail("multishot", -done.result);
			if (done.tag == 2)
				received += done.result;
			else
				sent += done.result;
		}
	}
	if (received != sent)
		fail("multishot: lengths", EIO);
}

/* To a port that listens and one that does not, in turns. */
static void connect_many(uint32_t rounds, int asynchronous)
{
	struct sockaddr_in ports[2];
	int sockets[2], fd, number;

	for (number = 0; number < 2; number++) {
		struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
		socklen_t length = sizeof(address);

		sockets[number] = socket(AF_INET, SOCK_STREAM, 0);
		if (bind(sockets[number], (void *)&address, length) ||
		    getsockname(sockets[number], (void *)&address, &length) ||
		    (!number && listen(sockets[number], rounds)))
			fail("listen", errno);
		ports[number] = address;
	}
	for (uint32_t round = 0; round < rounds; round++) {
		struct done done;

		fd = socket(AF_INET, SOCK_STREAM, 0);
		queue(IORING_OP_CONNECT, fd, &ports[round & 1], 0, 1)->off = sizeof(ports[0]);
		if (asynchronous)
			ring.sqes[atomic_load(ring.sq_tail) & ring.sq_mask].flags |= IOSQE_ASYNC;
		publish();
		enter(1);
		done = reap();
		if (done.result != (round & 1 ? -ECONNREFUSED : 0))
			fail("connect", -done.result);
		close(fd);
	}
	printf("{\"tid\": %d, \"ports\": [%d, %d]}\n", (int)gettid(), ntohs(ports[0].sin_port),
	       ntohs(ports[1].sin_port));
	exit(0);
}

static int work(char **arguments)
{
	const char *kind = arguments[1], *calls = arguments[2], *way = arguments[3];
	int ends[2], polled, asynchronous, early;
	uint32_t rounds, number;
	struct stat one, two;

	polled = !strcmp(way, "sqpoll");
	asynchronous = !strcmp(way, "async");
	early = !strcmp(arguments[4], "early");
	rounds = atoi(arguments[5]);
	for (number = 0; number < BUFFER; number++)
		out[number] = 'a' + number % 26;
	connect_ends(strcmp(kind, "connect") ? kind : "unix", ends);
	fstat(ends[0], &one);
	fstat(ends[1], &two);
	if (early)
		make_ring(polled);
	puts("ready");
	fflush(stdout);
	if (read(0, in, 1) != 1)
		return 1;
	if (!early) {
		make_ring(polled);
		if (!strcmp(arguments[4], "used")) {
			queue_send(calls, ends[0], BEFORE, asynchronous);
			enter(1);
			check(BEFORE);
			queue_receive(calls, ends[1], asynchronous);
			enter(1);
			check(BEFORE);
		}
		puts("made");
		fflush(stdout);
		if (read(0, in, 1) != 1)
			return 1;
	}
	if (!strcmp(kind, "connect"))
		connect_many(rounds, asynchronous);
	if (write(ends[0], "<", 1) != 1 || read(ends[1], in, 1) != 1)
		fail("write", errno);
	usleep(20000); /* what follows begins a turn */
	if (!strcmp(calls, "multishot"))
		receive_many(ends, rounds, asynchronous);
	else
		for (number = 0; number < rounds; number++) {
			uint32_t length = 100 + number;

			if (number & 1) {
				/* it waits: in a worker, or until the socket can be read */
				queue_receive(calls, ends[1], asynchronous);
				enter(0);
				queue_send(calls, ends[0], length, asynchronous);
				enter(2);
				check(length);
				check(length);
			} else {
				queue_send(calls, ends[0], length, asynchronous);
				enter(1);
				check(length);
				queue_receive(calls, ends[1], asynchronous);
				enter(1);
				check(length);
			}
			if (memcmp(in, out, length))
				fail("other bytes", EIO);
		}
	/* what asks for all there is would take it, too */
	if (strcmp(calls, "multishot") && (write(ends[0], ">", 1) != 1 || read(ends[1], in, 1) != 1))
		fail("write", errno);
	printf("{\"tid\": %d, \"inodes\": [%lu, %lu]}\n", (int)gettid(), one.st_ino, two.st_ino);
	return 0;
}

static void *run(void *arguments)
{
	exit(work(arguments));
}

int main(int count, char **arguments)
{
	pthread_t thread;

	if (count != 6)
		return 2;
	if (pthread_create(&thread, NULL, run, arguments))
		return 1;
	pthread_join(thread, NULL);
	return 0;
}
