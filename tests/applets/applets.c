/*
 * What the images of the tests need beyond busybox, as one static program that looks at its own name.
 *
 * critest looks for the programs of well-known images: pgrep and ipcs (Debian's busybox lacks both), a web server that
 * passes for nginx or httpd, a setuid program that shows its effective uid, a pause. The chaos suite has containers that
 * count without a process per number, as a shell's sleep would be. A system call can be tried by its number. Linked with
 * libc only.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static int die(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	return 1;
}

/* pgrep [-x] NAME: pids whose comm contains NAME, or is NAME. */
static int pgrep(int argc, char **argv)
{
	int exact = 0, found = 0, i = 1;
	char path[300], comm[64];
	struct dirent *entry;
	DIR *proc;

	for (; i < argc && argv[i][0] == '-'; i++)
		if (!strcmp(argv[i], "-x"))
			exact = 1;
	if (i >= argc) {
		fprintf(stderr, "usage: pgrep [-x] NAME\n");
		return 2;
	}
	proc = opendir("/proc");
	if (!proc)
		return die("/proc");
	while ((entry = readdir(proc))) {
		FILE *file;

		if (!isdigit((unsigned char)entry->d_name[0]) || atoi(entry->d_name) == getpid())
			continue;
		snprintf(path, sizeof(path), "/proc/%s/comm", entry->d_name);
		file = fopen(path, "r");
		if (!file)
			continue;
		if (fgets(comm, sizeof(comm), file)) {
			comm[strcspn(comm, "\n")] = 0;
			if (exact ? !strcmp(comm, argv[i]) : !!strstr(comm, argv[i])) {
				puts(entry->d_name);
				found = 1;
			}
		}
		fclose(file);
	}
	closedir(proc);
	return found ? 0 : 1;
}

/* ipcs -m: the shared memory segments of this IPC namespace, as /proc tells them. */
static int ipcs(void)
{
	char line[512];
	FILE *file = fopen("/proc/sysvipc/shm", "r");

	if (!file)
		return die("/proc/sysvipc/shm");
	puts("\n------ Shared Memory Segments --------");
	puts("key        shmid      owner      perms      bytes      nattch     status");
	if (fgets(line, sizeof(line), file)) {
		long key, shmid, perms, size, cpid, lpid, nattch, uid;

		while (fgets(line, sizeof(line), file))
			if (sscanf(line, "%ld %ld %lo %ld %ld %ld %ld %ld", &key, &shmid, &perms, &size, &cpid, &lpid,
				   &nattch, &uid) == 8)
				printf("0x%08lx %-10ld %-10ld %-10lo %-10ld %-10ld\n", key, shmid, uid, perms & 0777, size,
				       nattch);
	}
	fclose(file);
	return 0;
}

static int show_uid(void)
{
	printf("Effective uid: %d\n", (int)geteuid());
	return 0;
}

static void on_term(int sig)
{
	(void)sig;
	_exit(0);
}

__attribute__((noreturn)) static void pause_forever(void)
{
	signal(SIGINT, on_term);
	signal(SIGTERM, on_term);
	/* As PID 1 of a pod it has the children of others to reap. */
	signal(SIGCHLD, SIG_IGN);
	for (;;)
		pause();
}

/* Listens on both families with one socket where there is IPv6, on IPv4 otherwise. */
static int listen_on(int port)
{
	struct sockaddr_in6 six = { .sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_addr = IN6ADDR_ANY_INIT };
	struct sockaddr_in four = { .sin_family = AF_INET, .sin_port = htons(port) };
	int on = 1, off = 0;
	int fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd >= 0) {
		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
		setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
		if (!bind(fd, (struct sockaddr *)&six, sizeof(six)) && !listen(fd, 64))
			return fd;
		close(fd);
	}
	fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -1;
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(fd, (struct sockaddr *)&four, sizeof(four)) || listen(fd, 64))
		return -1;
	return fd;
}

static int serve(const char *name, int port)
{
	static const char reply[] =
		"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n";
	char request[4096];
	int listener, fd;
	FILE *file;

	/* Running /proc/self/exe has made the name "exe". */
	prctl(PR_SET_NAME, name);
	signal(SIGPIPE, SIG_IGN);
	signal(SIGTERM, on_term);
	signal(SIGQUIT, on_term);
	listener = listen_on(port);
	if (listener < 0)
		return die("listen");
	mkdir("/var/run", 0755);
	file = fopen("/var/run/nginx.pid", "w");
	if (file) {
		fprintf(file, "%d\n", (int)getpid());
		fclose(file);
	}
	fprintf(stderr, "%s: serving on port %d\n", name, port);
	for (;;) {
		fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
		if (fd < 0)
			continue;
		/* One request, of which only the end matters; the reply does not depend on it. */
		if (read(fd, request, sizeof(request)) > 0) {
			printf("%s: GET\n", name);
			fflush(stdout);
			if (write(fd, reply, sizeof(reply) - 1) < 0)
				perror("write");
			shutdown(fd, SHUT_WR);
			while (read(fd, request, sizeof(request)) > 0)
				;
		}
		close(fd);
	}
}

/* nginx shows itself as "nginx: master process ...": the name is replaced by running itself once more. */
static int nginx(int argc, char **argv)
{
	const char *port = getenv("PORT");
	char *title[] = { "nginx: master process nginx -g daemon off;", NULL };

	(void)argc;
	if (strchr(argv[0], ':'))
		return serve("nginx", port ? atoi(port) : 80);
	execv("/proc/self/exe", title);
	return die("/proc/self/exe");
}

/* count MILLISECONDS: the numbers from 1 on, a line each and so far apart, until nobody can read them any more. */
static int count(int argc, char **argv)
{
	long ms = argc > 1 ? atol(argv[1]) : 1000;
	struct timespec apart = { .tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000 };
	unsigned long number = 0;
	char line[32];

	for (;;) {
		int left = snprintf(line, sizeof(line), "%lu\n", ++number), done = 0;

		while (done < left) {
			ssize_t wrote = write(STDOUT_FILENO, line + done, left - done);

			if (wrote < 0 && errno != EINTR)
				return die("write");
			done += wrote > 0 ? wrote : 0;
		}
		nanosleep(&apart, NULL);
	}
}

/* syscall NUMBER: makes the call with arguments that no call accepts, and says what it is answered with. */
static int try_syscall(int argc, char **argv)
{
	if (syscall(argc > 1 ? atol(argv[1]) : -1, -1, -1, -1, -1, -1, -1) == -1)
		puts(strerrorname_np(errno));
	return 0;
}

int main(int argc, char **argv)
{
	const char *slash = strrchr(argv[0], '/');
	const char *name = slash ? slash + 1 : argv[0];
	const char *port = getenv("PORT");

	if (!strcmp(name, "pgrep"))
		return pgrep(argc, argv);
	if (!strcmp(name, "ipcs"))
		return ipcs();
	if (!strcmp(name, "count"))
		return count(argc, argv);
	if (!strcmp(name, "syscall"))
		return try_syscall(argc, argv);
	if (!strcmp(name, "nnp"))
		return show_uid();
	if (!strcmp(name, "pause"))
		pause_forever();
	if (!strncmp(name, "nginx", 5))
		return nginx(argc, argv);
	if (!strcmp(name, "httpd"))
		return serve("httpd", port ? atoi(port) : 80);
	fprintf(stderr, "%s: not an applet\n", name);
	return 127;
}
