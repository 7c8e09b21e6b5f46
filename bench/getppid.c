/*
 * The synthetic target: getppid calls in a known number and at a known rate, and nothing else.
 *
 *     getppid CPU
 *
 * Runs on that CPU only. Each line "CALLS BATCH RATE" on stdin makes so many calls in batches, RATE
 * of them per second (0: as fast as possible; between batches it watches the clock, which is no
 * system call), and is answered by "CALLS ELAPSED_NS FIRST_NS" and the duration of each batch in ns.
 * Ends with stdin, with its parent, and after 20 minutes in any case.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static long now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000L + time.tv_nsec;
}

static void make_calls(long calls, long batch, double rate)
{
	long batches = calls / batch;
	int *durations = malloc(batches * sizeof(*durations) + 1);
	long begun = now_ns(), before = begun, done, i;

	if (!durations)
		exit(1);
	for (done = 0; done < batches; done++) {
		if (rate > 0) {
			long due = begun + (long)(done * batch * 1e9 / rate);

			while ((before = now_ns()) < due)
				;
		}
		for (i = 0; i < batch; i++)
			syscall(SYS_getppid);
		long after = now_ns();

		durations[done] = after - before;
		before = after;
	}
	printf("%ld %ld %ld", batches * batch, now_ns() - begun, begun);
	/* at most 1000 of them: a long paced run has too many to tell */
	for (done = 0; done < batches; done += batches / 1000 + 1)
		printf(" %d", durations[done]);
	printf("\n");
	fflush(stdout);
	free(durations);
}

int main(int count, char **arguments)
{
	cpu_set_t cpus;
	long calls, batch;
	double rate;

	if (count != 2)
		return 2;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	alarm(1200);
	CPU_ZERO(&cpus);
	CPU_SET(atoi(arguments[1]), &cpus);
	if (sched_setaffinity(0, sizeof(cpus), &cpus))
		return 1;
	printf("ready\n");
	fflush(stdout);
	while (scanf("%ld %ld %lf", &calls, &batch, &rate) == 3 && batch > 0)
		make_calls(calls, batch, rate);
	return 0;
}
