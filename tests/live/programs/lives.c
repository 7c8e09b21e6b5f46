/*
 * Processes and threads that begin and end in known ways: lives MODE. Says `ready`, waits for a byte on
 * stdin, does the work, and tells in JSON what it knows of it.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void gate(void)
{
	char byte;

	printf("ready\n");
	fflush(stdout);
	if (read(0, &byte, 1) != 1)
		exit(2);
}

static pthread_barrier_t barrier;

static void *meets(void *unused)
{
	(void)unused;
	pthread_barrier_wait(&barrier);
	pause();
	return NULL;
}

static void *exits_thread(void *unused)
{
	(void)unused;
	usleep(20000);
	/* the last thread, but not the first: its code is the process's */
	syscall(SYS_exit, 5);
	return NULL;
}

static void *exits_group(void *unused)
{
	(void)unused;
	usleep(20000);
	exit(11);
}

static void *executes(void *program)
{
	execl(program, "renamed", "quits", "9", NULL);
	return NULL;
}

static void start(int number, void *(*body)(void *), void *argument)
{
	pthread_t thread;

	while (number--)
		if (pthread_create(&thread, NULL, body, argument))
			exit(2);
}

enum {
	NORMAL, SEVEN, KILLED, TERMINATED, ABORTED, MANY_THREADS, LAST_THREAD, AFTER_LEADER, EXEC, EXEC_THREAD,
	ORPHAN, ENDS,
};
static const char *names[] = {
	"normal", "seven", "killed", "terminated", "aborted", "many-threads", "last-thread", "after-leader",
	"exec", "exec-thread", "orphan",
};

static void live(int kind, char *program)
{
	char name[16];

	snprintf(name, sizeof(name), "l-%s", names[kind]);
	prctl(PR_SET_NAME, name);
	switch (kind) {
	case SEVEN:
		_exit(7);
	case KILLED:
		kill(getpid(), SIGKILL);
		break;
	case TERMINATED:
		kill(getpid(), SIGTERM);
		break;
	case ABORTED:
		abort();
	case MANY_THREADS:
		pthread_barrier_init(&barrier, NULL, 24);
		start(23, meets, NULL);
		pthread_barrier_wait(&barrier);
		_exit(3);
	case LAST_THREAD:
		start(1, exits_thread, NULL);
		syscall(SYS_exit, 0);
		break;
	case AFTER_LEADER:
		start(1, exits_group, NULL);
		syscall(SYS_exit, 4);
		break;
	case EXEC:
		execl(program, "renamed", "quits", "8", NULL);
		break;
	case EXEC_THREAD:
		start(1, executes, program);
		pause();
		break;
	case ORPHAN:
		if (fork() == 0) {
			usleep(50000);
			_exit(13);
		}
		_exit(0);
	}
	_exit(0);
}

static void ends(char *program)
{
	struct rlimit none = { 0, 0 };

	setrlimit(RLIMIT_CORE, &none);
	gate();
	printf("[");
	for (int round = 0; round < 3; round++) {
		for (int kind = 0; kind < ENDS; kind++) {
			pid_t child;
			int status;

			fflush(stdout);
			child = fork();
			if (!child)
				live(kind, program);
			waitpid(child, &status, 0);
			printf("%s{\"kind\": \"%s\", \"pid\": %d, \"status\": %d}", round + kind ? ", " : "",
			       names[kind], child, status);
		}
	}
	usleep(100000); /* the orphans end */
	printf("]\n");
	fflush(stdout);
}

static void *spins(void *unused)
{
	(void)unused;
	for (;;)
		;
	return NULL;
}

/* Processes whose threads all run when they end, so that several end in the same instant. */
static void storm(void)
{
	gate();
	for (int i = 0; i < 199; i++) {
		pid_t child = fork();

		if (!child) {
			start(6, spins, NULL);
			usleep(1000);
			_exit(i & 127);
		}
		waitpid(child, NULL, 0);
	}
	printf("{}\n");
	fflush(stdout);
}

static void *named(void *name)
{
	pthread_setname_np(pthread_self(), name);
	pthread_barrier_wait(&barrier);
	pause();
	return NULL;
}

/* Five threads with names, and a child with two threads, all before the gate. */
static void alive(void)
{
	static char thread_names[5][16];
	int opened[2];
	char byte;

	if (pipe(opened))
		exit(2);
	if (fork() == 0) {
		close(opened[0]);
		prctl(PR_SET_NAME, "the child");
		pthread_barrier_init(&barrier, NULL, 2);
		start(1, named, "its thread");
		pthread_barrier_wait(&barrier);
		close(opened[1]);
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		pause();
	}
	close(opened[1]);
	if (read(opened[0], &byte, 1))
		exit(2);
	pthread_barrier_init(&barrier, NULL, 6);
	for (int i = 0; i < 5; i++) {
		snprintf(thread_names[i], 16, "thread %d", i);
		start(1, named, thread_names[i]);
	}
	pthread_barrier_wait(&barrier);
	prctl(PR_SET_NAME, "fifteen letters and more");
	gate();
	printf("{}\n");
	fflush(stdout);
}

/* Executes itself with arguments of all kinds, once each. */
static void arguments(char *program)
{
	static char longest[5000], just[400];
	char *lists[][6] = {
		{ program, "quits", "0", "two words", "", "it's" },
		{ program, "quits", "0", "\xff\xfe\tb", "$HOME;", NULL },
		{ program, "quits", "0", longest, "end", NULL },
		{ program, "quits", "0", just, NULL, NULL },
		{ program, "quits", "0", NULL, NULL, NULL },
	};
	long before = strlen(program) + 1 + strlen("quits") + 1 + strlen("0") + 1;

	memset(longest, 'x', sizeof(longest) - 1);
	memset(just, 'y', 384 - before - 1); /* with its end exactly what is kept */
	gate();
	printf("[");
	for (int i = 0; i < 5; i++) {
		char *list[7] = {};
		pid_t child;

		memcpy(list, lists[i], sizeof(lists[i]));
		fflush(stdout);
		child = fork();
		if (!child) {
			execv(program, list);
			_exit(3);
		}
		waitpid(child, NULL, 0);
		printf("%s%d", i ? ", " : "", child);
	}
	printf("]\n");
	fflush(stdout);
}

enum { CROWD = 797 };

/* More processes than the kernel tells user space of in one read. */
static void crowd(void)
{
	pid_t children[CROWD];

	for (int i = 0; i < CROWD; i++) {
		children[i] = fork();
		if (!children[i]) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			pause();
			_exit(0);
		}
	}
	gate();
	printf("[");
	for (int i = 0; i < CROWD; i++) {
		kill(children[i], SIGKILL);
		waitpid(children[i], NULL, 0);
		printf("%s%d", i ? ", " : "", children[i]);
	}
	printf("]\n");
}

int main(int count, char **given)
{
	const char *mode = count > 1 ? given[1] : "";

	if (!strcmp(mode, "ends"))
		ends(given[0]);
	else if (!strcmp(mode, "alive"))
		alive();
	else if (!strcmp(mode, "storm"))
		storm();
	else if (!strcmp(mode, "crowd"))
		crowd();
	else if (!strcmp(mode, "arguments"))
		arguments(given[0]);
	else if (!strcmp(mode, "quits"))
		return atoi(given[2]);
	else
		return 64;
	return 0;
}
