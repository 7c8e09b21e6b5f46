/*
 * Threads that leave the CPU in known ways: waits MODE [ARGUMENTS]. Says `ready`, waits for a byte on
 * stdin, does the work, and tells in JSON what it knows of it.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void gate(void)
{
	char byte;

	printf("ready\n");
	fflush(stdout);
	if (read(0, &byte, 1) != 1)
		exit(2);
}

static long long now(clockid_t clock)
{
	struct timespec time;

	clock_gettime(clock, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void *sleeper(void *unused)
{
	for (int i = 0; i < 53; i++) {
		struct timespec time = { 0, 1000000L * (1 + i % 5) };

		syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &time, NULL);
	}
	return unused;
}

static void sleeps(void)
{
	pthread_t thread;

	gate();
	pthread_create(&thread, NULL, sleeper, NULL);
	pthread_join(thread, NULL);
	printf("{}\n");
}

/* How often this thread left the CPU, to wait or against its will, and between which moments. */
struct switches {
	long long began_ns, ended_ns;
	long waited, preempted;
};

static void begin(struct switches *switches)
{
	struct rusage use;

	/* once before, for the pages that this touches */
	getrusage(RUSAGE_THREAD, &use);
	switches->waited = now(CLOCK_MONOTONIC);
	switches->began_ns = now(CLOCK_MONOTONIC);
	getrusage(RUSAGE_THREAD, &use);
	switches->waited = use.ru_nvcsw;
	switches->preempted = use.ru_nivcsw;
}

static void end(struct switches *switches)
{
	struct rusage use;

	getrusage(RUSAGE_THREAD, &use);
	switches->ended_ns = now(CLOCK_MONOTONIC);
	switches->waited = use.ru_nvcsw - switches->waited;
	switches->preempted = use.ru_nivcsw - switches->preempted;
}

static void tell(struct switches *switches)
{
	printf("\"began_ns\": %lld, \"ended_ns\": %lld, \"waited\": %ld, \"preempted\": %ld",
	       switches->began_ns, switches->ended_ns, switches->waited, switches->preempted);
}

static void play(int in, int out, int rounds, int first)
{
	char ball = 1;

	for (int i = 0; i < rounds; i++) {
		if (first && write(out, &ball, 1) != 1)
			exit(3);
		if (read(in, &ball, 1) != 1)
			exit(3);
		if (!first && write(out, &ball, 1) != 1)
			exit(3);
	}
}

static void ping_pong(int rounds)
{
	struct switches *switches = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int there[2], back[2];
	pid_t child;

	if (switches == MAP_FAILED || pipe(there) || pipe(back))
		exit(2);
	child = fork();
	if (!child) {
		play(there[0], back[1], 1, 0);
		begin(&switches[1]);
		play(there[0], back[1], rounds, 0);
		end(&switches[1]);
		_exit(0);
	}
	gate();
	play(back[0], there[1], 1, 1);
	begin(&switches[0]);
	play(back[0], there[1], rounds, 1);
	end(&switches[0]);
	waitpid(child, NULL, 0);
	printf("[{\"pid\": %d, \"in\": %d, ", getpid(), back[0]);
	tell(&switches[0]);
	printf("}, {\"pid\": %d, \"in\": %d, ", child, there[0]);
	tell(&switches[1]);
	printf("}]\n");
}

/* Two processes want the same CPU, each for so many milliseconds of it. */
static void hogs(int milliseconds)
{
	cpu_set_t set;
	pid_t pids[2];

	CPU_ZERO(&set);
	CPU_SET(sysconf(_SC_NPROCESSORS_ONLN) - 1, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		exit(2);
	gate();
	for (int i = 0; i < 2; i++) {
		pids[i] = fork();
		if (!pids[i]) {
			/* no system calls: the thread's own clock is one */
			for (volatile long long j = 0; now(CLOCK_MONOTONIC) && j < milliseconds * 10000LL; j++)
				;
			_exit(0);
		}
	}
	for (int i = 0; i < 2; i++)
		waitpid(pids[i], NULL, 0);
	printf("[%d, %d]\n", pids[0], pids[1]);
}

/* Some of everything, and how long it took. */
static void mixed(void)
{
	struct timespec time = { 0, 7000000 };
	struct switches switches;
	long long cpu;

	gate();
	begin(&switches);
	cpu = now(CLOCK_THREAD_CPUTIME_ID);
	for (int i = 0; i < 30; i++) {
		for (volatile long j = 0; j < 3000000; j++)
			;
		nanosleep(&time, NULL);
		sched_yield();
	}
	cpu = now(CLOCK_THREAD_CPUTIME_ID) - cpu;
	end(&switches);
	printf("{\"cpu_ns\": %lld, ", cpu);
	tell(&switches);
	printf("}\n");
}

int main(int count, char **given)
{
	const char *mode = count > 1 ? given[1] : "";

	if (!strcmp(mode, "sleeps"))
		sleeps();
	else if (!strcmp(mode, "ping-pong"))
		ping_pong(atoi(given[2]));
	else if (!strcmp(mode, "hogs"))
		hogs(atoi(given[2]));
	else if (!strcmp(mode, "mixed"))
		mixed();
	else
		return 64;
	return 0;
}
