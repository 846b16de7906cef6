/* A program whose use of everything is known: known BURN_MS HOLD_MIB WRITE_MIB SEND_MIB [FILE [HOLD_MS [WHILE]]]
 *
 * Two threads burn CPU time, one of them half as much as the other; then it says how much it has really used, in
 * microseconds, and the time of day, all of it on one line. It holds what it holds for HOLD_MS, and then for as long as
 * there is a file WHILE.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MIB (1l << 20)

static long now_us(clockid_t clock)
{
	struct timespec now;
	clock_gettime(clock, &now);
	return now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static void burn(long ms)
{
	while (now_us(CLOCK_THREAD_CPUTIME_ID) < ms * 1000)
		for (volatile int i = 0; i < 10000; i++)
			continue;
}

static void *burn_half(void *ms)
{
	burn(*(long *)ms / 2);
	return NULL;
}

static void *take(void *listener)
{
	char buffer[65536];
	int from = accept(*(int *)listener, NULL, NULL);
	while (read(from, buffer, sizeof buffer) > 0)
		continue;
	close(from);
	return NULL;
}

static void send_mib(long mib)
{
	struct sockaddr_in where = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t size = sizeof where;
	int listener = socket(AF_INET, SOCK_STREAM, 0), to = socket(AF_INET, SOCK_STREAM, 0);
	if (bind(listener, (struct sockaddr *)&where, size) || listen(listener, 1) ||
	    getsockname(listener, (struct sockaddr *)&where, &size))
		exit(2);
	pthread_t taker;
	pthread_create(&taker, NULL, take, &listener);
	if (connect(to, (struct sockaddr *)&where, size))
		exit(3);
	static char block[65536];
	for (long left = mib * MIB; left > 0; left -= (long)sizeof block)
		for (size_t at = 0; at < sizeof block;)
			at += (size_t)write(to, block + at, sizeof block - at);
	close(to);
	pthread_join(taker, NULL);
}

static void write_mib(const char *path, long mib)
{
	static char block[MIB];
	memset(block, 7, sizeof block);
	int file = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
	for (long done = 0; done < mib; done++)
		if (write(file, block, sizeof block) != (ssize_t)sizeof block)
			exit(4);
	if (fsync(file))
		exit(5);
	close(file);
	unlink(path);
}

int main(int argc, char **argv)
{
	long burn_ms = atol(argv[1]), hold = atol(argv[2]) * MIB;
	char *held = malloc((size_t)hold + 1);
	memset(held, 1, (size_t)hold + 1);
	if (atol(argv[4]))
		send_mib(atol(argv[4]));
	if (argc > 5 && atol(argv[3]))
		write_mib(argv[5], atol(argv[3]));
	pthread_t other;
	pthread_create(&other, NULL, burn_half, &burn_ms);
	burn(burn_ms);
	pthread_join(other, NULL);
	usleep(argc > 6 ? (useconds_t)atol(argv[6]) * 1000 : 0);
	while (argc > 7 && !access(argv[7], F_OK))
		usleep(100000);
	int held_it = held[hold] == 1;
	free(held); /* that takes CPU time too, most of all in an emulated guest */
	struct rusage used;
	getrusage(RUSAGE_SELF, &used);
	printf("%ld %ld\n", (used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1000000 + used.ru_utime.tv_usec +
	       used.ru_stime.tv_usec, now_us(CLOCK_REALTIME));
	return !held_it;
}
