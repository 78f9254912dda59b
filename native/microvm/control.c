/* SPDX-License-Identifier: Apache-2.0 */
/*
 * control.c - see control.h.
 *
 * Threads, Errors, Ownership, Units, Source: see control.h.
 *
 * A client is never waited for: an answer that does not fit into its socket, a line without an end
 * or one that is longer than a line may be ends the connection.
 */
#include "control.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define BACKLOG		 8
#define PASSED_COUNT_MAX 4
#define POLLER_COUNT	 (3u + MV_CLIENT_COUNT_MAX)

enum { POLL_LISTEN, POLL_SIGNAL, POLL_NOTIFY, POLL_CLIENTS };

/* --- the socket ---------------------------------------------------------------------------------- */

static int make_socket(void)
{
	return socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
}

/* A name that is left over from a process that died: nobody answers there. */
static bool stale(const struct sockaddr_un *address)
{
	const int fd = make_socket();
	bool refused;

	if (fd < 0)
		return false;
	refused = connect(fd, (const struct sockaddr *)address, sizeof(*address)) < 0 &&
		  errno == ECONNREFUSED;
	close(fd);
	return refused;
}

static int bind_socket(int fd, const struct sockaddr_un *address, struct mv_error *error)
{
	const struct sockaddr *name = (const struct sockaddr *)address;

	/* Before there is a name: nobody else may say quit to this guest. */
	if (fchmod(fd, 0600) < 0)
		return mv_refuse_errno(error, -errno, "%s", address->sun_path);
	if (bind(fd, name, sizeof(*address)) == 0)
		return 0;
	if (errno != EADDRINUSE || !stale(address))
		return mv_refuse_errno(error, -errno, "%s", address->sun_path);
	if (unlink(address->sun_path) < 0 || bind(fd, name, sizeof(*address)) < 0)
		return mv_refuse_errno(error, -errno, "%s", address->sun_path);
	return 0;
}

static int listen_at(const char *path, struct mv_error *error)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd, rc;

	if (strlen(path) >= sizeof(address.sun_path))
		return mv_refuse(error, -ENAMETOOLONG, "%s: longer than %zu bytes", path,
				 sizeof(address.sun_path) - 1);
	memcpy(address.sun_path, path, strlen(path) + 1);
	fd = make_socket();
	if (fd < 0)
		return mv_refuse_errno(error, -errno, "socket");
	rc = bind_socket(fd, &address, error);
	if (rc == 0 && listen(fd, BACKLOG) < 0)
		rc = mv_refuse_errno(error, -errno, "%s", path);
	if (rc < 0) {
		close(fd);
		return rc;
	}
	return fd;
}

int mv_control_create(struct mv_machine *machine, const char *path, struct mv_control **ret_control,
		      struct mv_error *error)
{
	struct mv_control *control = calloc(1, sizeof(*control));

	if (!control)
		return mv_refuse_errno(error, -ENOMEM, "make the control socket");
	control->machine = machine;
	control->path = path;
	for (uint32_t i = 0; i < MV_CLIENT_COUNT_MAX; i++) {
		control->clients[i].fd = -1;
		control->clients[i].passed_fd = -1;
	}
	control->listen_fd = listen_at(path, error);
	if (control->listen_fd < 0) {
		const int rc = control->listen_fd;

		free(control);
		return rc;
	}
	*ret_control = control;
	return 0;
}

/* --- clients ------------------------------------------------------------------------------------- */

static void hang_up(struct mv_client *client)
{
	if (client->fd >= 0)
		close(client->fd);
	if (client->passed_fd >= 0)
		close(client->passed_fd);
	*client = (struct mv_client){.fd = -1, .passed_fd = -1};
}

static void accept_client(struct mv_control *control)
{
	const int fd = accept4(control->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	if (fd < 0)
		return;
	for (uint32_t i = 0; i < MV_CLIENT_COUNT_MAX; i++) {
		if (control->clients[i].fd < 0) {
			control->clients[i].fd = fd;
			return;
		}
	}
	close(fd);
}

static void answer(struct mv_control *control, struct mv_client *client)
{
	struct mv_text *reply = &control->reply;
	ssize_t sent;

	if (reply->cut) {
		reply->len = 0;
		reply->cut = false;
		mv_text_add(reply, "{\"ok\":false,\"code\":\"EMSGSIZE\",\"error\":\"too long\"}");
	}
	mv_text_add(reply, "\n");
	sent = send(client->fd, reply->bytes, reply->len, MSG_NOSIGNAL | MSG_DONTWAIT);
	if (sent < 0 || (size_t)sent != reply->len)
		hang_up(client);
}

/* Runs the complete lines that are there, up to one whose answer has to wait. */
static void run_lines(struct mv_control *control, struct mv_client *client)
{
	while (client->fd >= 0 && client->sweep == 0 && !control->quit) {
		char *end = memchr(client->line, '\n', client->len);
		size_t len;

		if (!end)
			return;
		len = (size_t)(end - client->line);
		if (mv_command_run(control, client, client->line, len))
			answer(control, client);
		if (client->fd < 0)
			return;
		client->len -= len + 1;
		memmove(client->line, end + 1, client->len);
	}
}

/* Keeps the one descriptor that a line may bring; more of them break the rules. */
static bool keep_passed(struct mv_client *client, struct msghdr *message)
{
	bool okay = !(message->msg_flags & MSG_CTRUNC);

	for (struct cmsghdr *control = CMSG_FIRSTHDR(message); control;
	     control = CMSG_NXTHDR(message, control)) {
		const size_t count = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int);

		if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t i = 0; i < count; i++) {
			int fd;

			memcpy(&fd, CMSG_DATA(control) + i * sizeof(fd), sizeof(fd));
			if (client->passed_fd < 0) {
				client->passed_fd = fd;
			} else {
				close(fd);
				okay = false;
			}
		}
	}
	return okay;
}

static void read_client(struct mv_control *control, struct mv_client *client)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(PASSED_COUNT_MAX * sizeof(int))];
	} passed;
	struct iovec iov = {
		.iov_base = client->line + client->len,
		.iov_len = sizeof(client->line) - client->len,
	};
	struct msghdr message = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = passed.bytes,
		.msg_controllen = sizeof(passed.bytes),
	};
	const ssize_t got = recvmsg(client->fd, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);

	if (got < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (got <= 0 || !keep_passed(client, &message)) {
		hang_up(client);
		return;
	}
	client->len += (size_t)got;
	run_lines(control, client);
	if (client->len == sizeof(client->line))
		hang_up(client); /* a line without an end */
}

/* --- events -------------------------------------------------------------------------------------- */

/* Lines on stdout. If nobody reads them they are dropped: a guest does not wait for its log. */
static void print_events(struct mv_machine *machine)
{
	char line[MV_EVENT_LEN_MAX];

	while (mv_machine_take_event(machine, line)) {
		struct pollfd poller = {.fd = STDOUT_FILENO, .events = POLLOUT};

		if (poll(&poller, 1, 0) == 1 && (poller.revents & POLLOUT))
			(void)dprintf(STDOUT_FILENO, "%s\n", line);
	}
}

static void notified(struct mv_control *control)
{
	uint64_t count;
	const ssize_t got = read(control->machine->notify_fd, &count, sizeof(count));

	(void)got; /* what it counts does not matter */
	print_events(control->machine);
	for (uint32_t i = 0; i < MV_CLIENT_COUNT_MAX; i++) {
		struct mv_client *client = &control->clients[i];

		if (client->fd < 0 || client->sweep == 0 || !mv_command_finish(control, client))
			continue;
		answer(control, client);
		run_lines(control, client);
	}
}

static void set_pollers(const struct mv_control *control, int signal_fd,
			struct pollfd pollers[POLLER_COUNT])
{
	pollers[POLL_LISTEN] = (struct pollfd){.fd = control->listen_fd, .events = POLLIN};
	pollers[POLL_SIGNAL] = (struct pollfd){.fd = signal_fd, .events = POLLIN};
	pollers[POLL_NOTIFY] = (struct pollfd){.fd = control->machine->notify_fd, .events = POLLIN};
	for (uint32_t i = 0; i < MV_CLIENT_COUNT_MAX; i++) {
		const struct mv_client *client = &control->clients[i];

		/* Of one that waits for an answer nothing is read, but its death is seen. */
		pollers[POLL_CLIENTS + i] =
			(struct pollfd){.fd = client->fd, .events = client->sweep > 0 ? 0 : POLLIN};
	}
}

static void serve_clients(struct mv_control *control, const struct pollfd *pollers)
{
	for (uint32_t i = 0; i < MV_CLIENT_COUNT_MAX && !control->quit; i++) {
		struct mv_client *client = &control->clients[i];

		/* The place may have changed hands since poll(): then it has another descriptor. */
		if (client->fd < 0 || client->fd != pollers[i].fd || pollers[i].revents == 0)
			continue;
		if (pollers[i].revents & POLLIN)
			read_client(control, client);
		else
			hang_up(client);
	}
}

int mv_control_run(struct mv_control *control, int signal_fd)
{
	while (!control->quit) {
		struct pollfd pollers[POLLER_COUNT];

		set_pollers(control, signal_fd, pollers);
		if (poll(pollers, POLLER_COUNT, -1) < 0) {
			if (errno == EINTR)
				continue;
			return -errno;
		}
		if (pollers[POLL_SIGNAL].revents != 0)
			break;
		serve_clients(control, pollers + POLL_CLIENTS);
		if (pollers[POLL_NOTIFY].revents != 0)
			notified(control);
		if (pollers[POLL_LISTEN].revents != 0)
			accept_client(control);
	}
	print_events(control->machine);
	return 0;
}

void mv_control_destroy(struct mv_control *control)
{
	if (!control)
		return;
	for (uint32_t i = 0; i < MV_CLIENT_COUNT_MAX; i++)
		hang_up(&control->clients[i]);
	close(control->listen_fd);
	(void)unlink(control->path);
	free(control);
}
