/*
 * A tree of many processes, of which the work is known: a parent, and children that execute this program
 * again, as services do, and make getppid calls at a rate that all of them share.
 *
 *     many CHILDREN PYTHONS PYTHON SCRIPT
 *
 * The parent says "ready" when all children have begun. Lines on stdin:
 *
 *     work SECONDS CALLS       each child makes its share of so many calls per second, two after each sleep;
 *                              answered by "CALLS ELAPSED_NS" as they were made
 *     storm COUNT RATE PROGRAM so many processes that execute PROGRAM with their number as the argument, RATE
 *                              per second (0: one after the other as fast as possible); answered by
 *                              "COUNT ELAPSED_NS" when all have ended
 *
 * Children wait without a call while there is no work. All end with the parent, which ends with stdin, with
 * whoever started it, and after 20 minutes in any case.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <linux/futex.h>
#include <unistd.h>

enum { AT = 3, PER_WAKE = 2, SECOND = 1000000000 };

extern char **environ;

/* What all share: a file in memory, at the descriptor AT. */
struct shared {
	_Atomic int round; /* a futex: each odd one is a round of work */
	_Atomic int ready;
	_Atomic int done;
	long begin_ns;
	long until_ns;
	long period_ns; /* between two wakes of a child */
	_Atomic long calls;
};

static struct shared *shared;

static long now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * (long)SECOND + time.tv_nsec;
}

static void sleep_until(long ns)
{
	struct timespec time = {ns / SECOND, ns % SECOND};

	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL) == EINTR)
		;
}

static void end_with_parent(void)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	alarm(1200);
}

static int map_shared(void)
{
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED, AT, 0);
	return shared == MAP_FAILED;
}

static int work(int number, int children)
{
	int round = 0;

	end_with_parent();
	if (map_shared())
		return 1;
	atomic_fetch_add(&shared->ready, 1);
	for (;;) {
		long calls = 0, at;

		while (atomic_load(&shared->round) == round)
			syscall(SYS_futex, &shared->round, FUTEX_WAIT, round, NULL, NULL, 0);
		round = atomic_load(&shared->round);
		if (round % 2 == 0)
			continue;
		/* spread evenly over the time */
		at = shared->begin_ns + shared->period_ns / children * number;
		for (; at < shared->until_ns; at += shared->period_ns) {
			sleep_until(at);
			/* it may be behind: then it makes fewer */
			if (now_ns() >= shared->until_ns)
				break;
			for (int i = 0; i < PER_WAKE; i++, calls++)
				syscall(SYS_getppid);
		}
		atomic_fetch_add(&shared->calls, calls);
		atomic_fetch_add(&shared->done, 1);
	}
}

static void let_work(int children, double seconds, double rate)
{
	long begun = now_ns();

	shared->calls = shared->done = 0;
	/* all are awake by then */
	shared->begin_ns = begun + SECOND / 2;
	shared->until_ns = shared->begin_ns + (long)(seconds * SECOND);
	shared->period_ns = (long)(children * PER_WAKE * (double)SECOND / rate);
	atomic_fetch_add(&shared->round, 1);
	syscall(SYS_futex, &shared->round, FUTEX_WAKE, children, NULL, NULL, 0);
	while (atomic_load(&shared->done) < children)
		sleep_until(now_ns() + SECOND / 100);
	atomic_fetch_add(&shared->round, 1);
	printf("%ld %ld\n", shared->calls, now_ns() - shared->begin_ns);
	fflush(stdout);
	/* back to their wait for the next round */
	syscall(SYS_futex, &shared->round, FUTEX_WAKE, children, NULL, NULL, 0);
}

static pid_t start(const char *program, char **arguments)
{
	pid_t pid;

	if (posix_spawn(&pid, program, NULL, NULL, arguments, environ)) {
		perror(program);
		exit(1);
	}
	return pid;
}

static void storm(long count, double rate, char *program)
{
	long begun = now_ns();

	for (long i = 0; i < count; i++) {
		char number[24];
		char *arguments[] = {program, number, NULL};

		snprintf(number, sizeof(number), "%ld", i);
		if (rate > 0)
			sleep_until(begun + (long)(i * SECOND / rate));
		waitpid(start(program, arguments), NULL, 0);
	}
	printf("%ld %ld\n", count, now_ns() - begun);
	fflush(stdout);
}

static int number_of(const char *text)
{
	return (int)strtol(text, NULL, 10);
}

int main(int count, char **arguments)
{
	int children, pythons, shared_file;
	char line[512], program[256];
	double seconds, rate;
	long processes;

	if (count == 4 && !strcmp(arguments[1], "child"))
		return work(number_of(arguments[2]), number_of(arguments[3]));
	if (count != 5)
		return 2;
	children = number_of(arguments[1]);
	pythons = number_of(arguments[2]);
	end_with_parent();
	shared_file = memfd_create("many", 0);
	if (shared_file < 0 || dup2(shared_file, AT) != AT || ftruncate(AT, sizeof(*shared)) || map_shared())
		return 1;
	for (int i = 0; i < children; i++) {
		char number[16];
		char *own[] = {"many", "child", number, arguments[1], NULL};

		snprintf(number, sizeof(number), "%d", i);
		start("/proc/self/exe", own);
	}
	for (int i = 0; i < pythons; i++) {
		char *own[] = {arguments[3], arguments[4], NULL};

		start(arguments[3], own);
	}
	while (atomic_load(&shared->ready) < children)
		sleep_until(now_ns() + SECOND / 100);
	printf("ready\n");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		if (sscanf(line, "work %lf %lf", &seconds, &rate) == 2 && children)
			let_work(children, seconds, rate);
		else if (sscanf(line, "storm %ld %lf %255s", &processes, &rate, program) == 3)
			storm(processes, rate, program);
		else
			return 2;
	}
	return 0;
}
