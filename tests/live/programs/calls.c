/*
 * Makes known numbers of known system calls: calls MODE [ARGUMENTS]. Says `ready`, waits for a byte on
 * stdin, does the work, writes one line of JSON.
 *
 * The calls that count are getppid with arguments of our own, which the kernel ignores but the registers
 * hold: (tag, number, complement of number).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static void counted(long tag, long number)
{
	for (long i = 0; i < number; i++)
		syscall(SYS_getppid, tag, i, ~i);
}

static void gate(void)
{
	char byte;

	if (write(1, "ready\n", 6) != 6 || read(0, &byte, 1) != 1)
		exit(2);
}

static void tell(const char *text)
{
	if (write(1, text, strlen(text)) != (long)strlen(text))
		exit(2);
}

static void reap(int number)
{
	while (number--) {
		int status;

		if (wait(&status) < 0 || status)
			exit(3);
	}
}

/* Failing calls of several kinds, with what they return. */
static void counts(void)
{
	gate();
	counted(1, 1009);
	for (long i = 0; i < 503; i++)
		if (syscall(SYS_openat, -100 - i, "/nonexistent/scope-ebpf", O_RDONLY) != -1 || errno != ENOENT)
			exit(3);
	for (long i = 0; i < 307; i++)
		if (syscall(SYS_dup3, i, i, 0x7eadbeef) != -1 || errno != EINVAL)
			exit(3);
	for (long i = 0; i < 211; i++)
		if (syscall(SYS_close, 0xfffffff0 + (i & 7)) != -1 || errno != EBADF)
			exit(3);
	for (long i = 0; i < 101; i++)
		if (syscall(SYS_mprotect, 0x8000000000000001, ~0L, -1L) != -1)
			exit(3);
	for (long i = 0; i < 53; i++)
		if (syscall(4095, 0x1234567890abcdef, 2, 3) != -1 || errno != ENOSYS)
			exit(3);
	tell("{}\n");
}

static void *in_thread(void *tag)
{
	counted((long)tag, 211);
	return NULL;
}

static void threads(void)
{
	pthread_t made[7];

	gate();
	for (long i = 0; i < 7; i++)
		pthread_create(&made[i], NULL, in_thread, (void *)(10 + i));
	for (int i = 0; i < 7; i++)
		pthread_join(made[i], NULL);
	tell("{}\n");
}

static void children(void)
{
	gate();
	for (long i = 0; i < 13; i++) {
		if (syscall(SYS_fork) == 0) {
			counted(100 + i, 101);
			syscall(SYS_exit_group, 0);
		}
	}
	reap(13);
	counted(1, 307);
	tell("{}\n");
}

/* Five children that exist before the gate, each with a child of its own. */
static void older(void)
{
	int opened[2];
	char byte;

	if (pipe(opened))
		exit(2);
	for (long i = 0; i < 5; i++) {
		if (fork() == 0) {
			pid_t grandchild = fork();

			close(opened[1]);
			if (read(opened[0], &byte, 1))
				exit(3);
			counted((grandchild ? 100 : 200) + i, 101);
			if (grandchild)
				reap(1);
			exit(0);
		}
	}
	close(opened[0]);
	gate();
	close(opened[1]);
	reap(5);
	counted(1, 307);
	tell("{}\n");
}

static void *executes(void *program)
{
	counted(2, 101);
	execl(program, program, "go-on", NULL);
	exit(3);
}

/* Another thread executes, so that the process goes on as that one under its own id. */
static void exec_from_thread(char *program)
{
	pthread_t thread;

	gate();
	counted(1, 211);
	pthread_create(&thread, NULL, executes, program);
	pause();
}

static void exec_self(char *program)
{
	gate();
	counted(1, 211);
	execl(program, program, "go-on", NULL);
}

#ifdef __x86_64__
/* The 32-bit table from a 64-bit program: getppid is 64 there, and epoll_ctl 255. */
static void compat(void)
{
	long result;

	gate();
	for (int i = 0; i < 307; i++)
		asm volatile("int $0x80"
			     : "=a"(result)
			     : "a"(64), "b"(0xfffffff0u), "c"(i), "d"(~i)
			     : "r8", "r9", "r10", "r11", "memory");
	for (int i = 0; i < 101; i++)
		asm volatile("int $0x80"
			     : "=a"(result)
			     : "a"(255), "b"(-1), "c"(i), "d"(5)
			     : "r8", "r9", "r10", "r11", "memory");
	if (result != -EINVAL && result != -EBADF && result != -EFAULT)
		exit(3);
	tell("{}\n");
}
#endif

/* getppid is refused with errno 77, getpgrp with success and without being done. */
static void refused(void)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 77),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_syncfs, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { sizeof(filter) / sizeof(*filter), filter };

	gate();
	counted(1, 101);
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program))
		exit(3);
	counted(2, 211);
	for (long i = 0; i < 53; i++)
		if (syscall(SYS_syncfs, i, ~i, 5))
			exit(3);
	for (long i = 0; i < 307; i++)
		syscall(SYS_getpgid, 0, i, ~i);
	tell("{}\n");
}

/* Forks of every kind; each child makes 11 calls and ends. */
static int born(void *tag)
{
	for (long i = 0; i < 11; i++)
		syscall(SYS_getppid, tag, i, ~i);
	syscall(SYS_exit_group, 0);
	return 0;
}

static void births(char *program)
{
	static char stack[65536];
	char *spawned[] = { program, "at-once", NULL };
	pid_t pid;

	gate();
	for (long i = 0; i < 23; i++) {
		struct clone_args arguments = { .exit_signal = SIGCHLD };

		if (syscall(SYS_clone3, &arguments, sizeof(arguments)) == 0)
			born((void *)100);
		if (syscall(SYS_fork) == 0)
			born((void *)101);
		if (vfork() == 0)
			born((void *)102);
		clone(born, stack + sizeof(stack), CLONE_VM | CLONE_VFORK | SIGCHLD, (void *)103);
		if (posix_spawn(&pid, program, NULL, NULL, spawned, environ))
			exit(3);
		reap(5);
	}
	tell("{}\n");
}

static volatile sig_atomic_t signals;

static void on_signal(int number)
{
	(void)number;
	signals++;
}

static void handle(int number, int flags)
{
	struct sigaction action = { .sa_handler = on_signal, .sa_flags = flags };

	sigaction(number, &action, NULL);
}

/* 211 signals that are handled between calls. */
static void signalled(void)
{
	handle(SIGUSR1, 0);
	gate();
	for (long i = 0; i < 211; i++) {
		syscall(SYS_getppid, 1, i, ~i);
		syscall(SYS_tgkill, getpid(), getpid(), SIGUSR1);
	}
	if (signals != 211)
		exit(3);
	tell("{}\n");
}

/* Reads and sleeps that signals of a child interrupt. */
static void interrupted(void)
{
	struct timespec long_time = { 1000, 0 };
	pid_t parent = getpid(), child;
	int opened[2];
	char byte;

	handle(SIGUSR1, SA_RESTART);
	handle(SIGUSR2, 0);
	if (pipe(opened))
		exit(2);
	gate();
	child = fork();
	if (!child) {
		const int numbers[] = { SIGUSR1, SIGUSR1, SIGUSR1, SIGUSR2, SIGUSR2 };
		char path[64], text[64];

		snprintf(path, sizeof(path), "/proc/%d/syscall", parent);
		for (int i = 0; i < 5; i++) {
			/* until it is in read(opened[0]) or in clock_nanosleep, asleep */
			for (;;) {
				int file = open(path, O_RDONLY);
				long got = read(file, text, sizeof(text) - 1);

				close(file);
				text[got > 0 ? got : 0] = 0;
				if (!strncmp(text, i < 4 ? "0 " : "230 ", i < 4 ? 2 : 4))
					break;
				usleep(1000);
			}
			usleep(20000);
			kill(parent, numbers[i]);
			usleep(20000);
		}
		exit(0);
	}
	/* three restarts, then EINTR */
	if (read(opened[0], &byte, 1) != -1 || errno != EINTR)
		exit(3);
	if (syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &long_time, NULL) != -1 || errno != EINTR)
		exit(3);
	reap(1);
	tell("{}\n");
}

static void *waits(void *unused)
{
	(void)unused;
	syscall(SYS_pause, 1, 2, 3);
	return NULL;
}

/* One thread is in pause before the gate, another one from behind it on; then the end is awaited. */
static void stays(void)
{
	pthread_t made[2];
	char byte;

	pthread_create(&made[0], NULL, waits, NULL);
	usleep(50000);
	gate();
	pthread_create(&made[1], NULL, waits, NULL);
	usleep(50000);
	tell("{}\n");
	if (read(0, &byte, 1) < 0)
		exit(3);
	_exit(0);
}

/* Calls from before the gate to after it, numbered without a gap. */
static volatile int ended;

static void *counts_on(void *tag)
{
	long number = 0;

	while (!ended) {
		syscall(SYS_getppid, tag, number, ~number);
		number++;
	}
	return (void *)number;
}

static void busy(void)
{
	pthread_t made[3];
	void *number;
	char text[128];
	long counted[3];

	for (long i = 0; i < 3; i++)
		pthread_create(&made[i], NULL, counts_on, (void *)(50 + i));
	gate();
	usleep(50000);
	ended = 1;
	for (int i = 0; i < 3; i++) {
		pthread_join(made[i], &number);
		counted[i] = (long)number;
	}
	snprintf(text, sizeof(text), "[%ld, %ld, %ld]\n", counted[0], counted[1], counted[2]);
	tell(text);
}

/* Events of every kind, so many of each in two threads: calls, messages that are turns, sleeps, children. */
static void *bursts(void *number)
{
	int ends[2];
	char byte = 1;

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
		exit(2);
	for (long i = 0; i < (long)number; i++) {
		syscall(SYS_getppid, 60, i, ~i);
		for (int end = 0; end < 2; end++)
			if (write(ends[end], &byte, 1) != 1 || read(ends[!end], &byte, 1) != 1)
				exit(3);
		if (i % 10 == 0)
			usleep(10);
		if (i % 20 == 0) {
			pid_t child = fork();

			if (!child)
				_exit(0);
			waitpid(child, NULL, 0);
		}
	}
	return NULL;
}

static void burst(long number)
{
	pthread_t made[2];

	gate();
	for (int i = 0; i < 2; i++)
		pthread_create(&made[i], NULL, bursts, (void *)number);
	for (int i = 0; i < 2; i++)
		pthread_join(made[i], NULL);
	tell("{}\n");
	gate();
	for (int i = 0; i < 2; i++)
		pthread_create(&made[i], NULL, bursts, (void *)100L);
	for (int i = 0; i < 2; i++)
		pthread_join(made[i], NULL);
	tell("{}\n");
}

int main(int count, char **arguments)
{
	const char *mode = count > 1 ? arguments[1] : "";

	if (!strcmp(mode, "counts"))
		counts();
	else if (!strcmp(mode, "threads"))
		threads();
	else if (!strcmp(mode, "children"))
		children();
	else if (!strcmp(mode, "older"))
		older();
	else if (!strcmp(mode, "exec"))
		exec_self(arguments[0]);
	else if (!strcmp(mode, "exec-from-thread"))
		exec_from_thread(arguments[0]);
	else if (!strcmp(mode, "go-on")) {
		counted(3, 307);
		tell("{}\n");
	} else if (!strcmp(mode, "at-once"))
		born((void *)104);
#ifdef __x86_64__
	else if (!strcmp(mode, "compat"))
		compat();
#endif
	else if (!strcmp(mode, "refused"))
		refused();
	else if (!strcmp(mode, "births"))
		births(arguments[0]);
	else if (!strcmp(mode, "signalled"))
		signalled();
	else if (!strcmp(mode, "interrupted"))
		interrupted();
	else if (!strcmp(mode, "stays"))
		stays();
	else if (!strcmp(mode, "busy"))
		busy();
	else if (!strcmp(mode, "burst"))
		burst(atol(arguments[2]));
	else
		return 64;
	return 0;
}
