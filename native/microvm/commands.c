/* SPDX-License-Identifier: Apache-2.0 */
/*
 * commands.c - what may be said on the control socket.
 *
 * Threads, Errors, Ownership, Units, Source: see control.h.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "blob.h"
#include "control.h"
#include "describe.h"

#define PAUSE_TIMEOUT_MS     10000u
#define PAUSE_TIMEOUT_MS_MAX 600000u
#define TRANSFER_TIMEOUT_MS  30000
#define CHUNK_LEN	     4096u /* PIPE_BUF: a pipe that says POLLOUT takes so much at once */
#define NS_PER_MS	     1000000ull

struct request {
	struct mv_control *control;
	struct mv_client *client;
	struct mv_json json;
	uint64_t start_ns;
};

/* --- state in and out ---------------------------------------------------------------------------- */

static int wait_for(int fd, short event, struct mv_error *error)
{
	struct pollfd poller = {.fd = fd, .events = event};
	int rc;

	do {
		rc = poll(&poller, 1, TRANSFER_TIMEOUT_MS);
	} while (rc < 0 && errno == EINTR);
	if (rc < 0)
		return mv_refuse_errno(error, -errno, "poll");
	return rc > 0 ? 0 : mv_refuse(error, -ETIMEDOUT, "the other side of the state hangs");
}

static int write_state(int fd, const uint8_t *bytes, size_t len, struct mv_error *error)
{
	for (size_t done = 0; done < len;) {
		const size_t more = len - done < CHUNK_LEN ? len - done : CHUNK_LEN;
		const int rc = wait_for(fd, POLLOUT, error);
		ssize_t written;

		if (rc < 0)
			return rc;
		written = write(fd, bytes + done, more);
		if (written >= 0)
			done += (size_t)written;
		else if (errno != EINTR && errno != EAGAIN)
			return mv_refuse_errno(error, -errno, "write the state");
	}
	return 0;
}

/* Until the end of the file, or one byte more than any state has: the loader then refuses it. */
static int read_state(int fd, uint8_t *bytes, size_t *ret_len, struct mv_error *error)
{
	size_t len = 0;

	while (len <= MV_BLOB_LEN_MAX) {
		const int rc = wait_for(fd, POLLIN, error);
		ssize_t got;

		if (rc < 0)
			return rc;
		got = read(fd, bytes + len, MV_BLOB_LEN_MAX + 1 - len);
		if (got == 0)
			break;
		if (got > 0)
			len += (size_t)got;
		else if (errno != EINTR && errno != EAGAIN)
			return mv_refuse_errno(error, -errno, "read the state");
	}
	*ret_len = len;
	return 0;
}

/* The descriptor that came with the line, or the file that it names: exactly one of them. */
static int open_state(struct request *request, int flags, struct mv_error *error)
{
	const char *path = NULL;
	const int rc = mv_json_take_string(&request->json, "path", &path, error);
	int fd = request->client->passed_fd;

	if (rc < 0)
		return rc;
	if ((path != NULL) == (fd >= 0))
		return mv_refuse(error, -EINVAL,
				 "a path, or a descriptor passed along, and not both");
	if (mv_json_end(&request->json, error) < 0)
		return -EINVAL;
	if (path) {
		/* O_NONBLOCK: a FIFO that nobody reads must not stop the control thread. */
		fd = open(path, flags | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW, 0600);
		return fd >= 0 ? fd : mv_refuse_errno(error, -errno, "%.128s", path);
	}
	request->client->passed_fd = -1; /* ours now */
	return fd;
}

static int command_save(struct request *request, struct mv_error *error)
{
	const int fd = open_state(request, O_WRONLY | O_CREAT | O_TRUNC, error);
	const uint64_t start_ns = mv_now_ns();
	uint8_t *bytes;
	size_t len;
	int rc;

	if (fd < 0)
		return fd;
	rc = mv_machine_save(request->control->machine, &bytes, &len, error);
	if (rc == 0) {
		mv_text_add(&request->control->reply, ",\"bytes\":%zu,\"gathered_ns\":%" PRIu64,
			    len, mv_now_ns() - start_ns);
		rc = write_state(fd, bytes, len, error);
		free(bytes);
	}
	close(fd);
	return rc;
}

static int command_load(struct request *request, struct mv_error *error)
{
	const int fd = open_state(request, O_RDONLY, error);
	uint8_t *bytes;
	size_t len = 0;
	int rc;

	if (fd < 0)
		return fd;
	bytes = malloc(MV_BLOB_LEN_MAX + 1);
	rc = bytes ? read_state(fd, bytes, &len, error)
		   : mv_refuse_errno(error, -ENOMEM, "read the state");
	if (rc == 0)
		rc = mv_machine_load(request->control->machine, bytes, len, error);
	if (rc == 0)
		mv_text_add(&request->control->reply, ",\"bytes\":%zu", len);
	free(bytes);
	close(fd);
	return rc;
}

/* --- the rest ------------------------------------------------------------------------------------ */

static int command_hello(struct request *request, struct mv_error *error)
{
	struct mv_control *control = request->control;

	if (mv_json_end(&request->json, error) < 0)
		return -EINVAL;
	mv_describe(control->machine, control->path, &control->reply);
	return 0;
}

static int command_stats(struct request *request, struct mv_error *error)
{
	struct mv_control *control = request->control;

	if (mv_json_end(&request->json, error) < 0)
		return -EINVAL;
	mv_describe_stats(control->machine, &control->reply);
	return 0;
}

static int command_pause(struct request *request, struct mv_error *error)
{
	uint64_t timeout_ms = PAUSE_TIMEOUT_MS;

	if (mv_json_take_number(&request->json, "timeout_ms", &timeout_ms, error) < 0 ||
	    mv_json_end(&request->json, error) < 0)
		return -EINVAL;
	if (timeout_ms > PAUSE_TIMEOUT_MS_MAX)
		return mv_refuse(error, -EINVAL, "timeout_ms is %u at most", PAUSE_TIMEOUT_MS_MAX);
	return mv_machine_pause(request->control->machine, timeout_ms * NS_PER_MS, error);
}

static int command_resume(struct request *request, struct mv_error *error)
{
	if (mv_json_end(&request->json, error) < 0)
		return -EINVAL;
	return mv_machine_resume(request->control->machine, error);
}

static int command_verify(struct request *request, struct mv_error *error)
{
	if (mv_json_end(&request->json, error) < 0)
		return -EINVAL;
	return mv_machine_ask_sweep(request->control->machine, &request->client->sweep, error);
}

static int command_power_off(struct request *request, struct mv_error *error)
{
	if (mv_json_end(&request->json, error) < 0)
		return -EINVAL;
	return mv_machine_power_off(request->control->machine, error);
}

static int command_quit(struct request *request, struct mv_error *error)
{
	if (mv_json_end(&request->json, error) < 0)
		return -EINVAL;
	request->control->quit = true;
	return 0;
}

static const struct {
	const char *name;
	int (*run)(struct request *request, struct mv_error *error);
	bool takes_fd;
} COMMANDS[] = {
	{"hello", command_hello, false},
	{"pause", command_pause, false},
	{"resume", command_resume, false},
	{"save", command_save, true},
	{"load", command_load, true},
	{"stats", command_stats, false},
	{"verify", command_verify, false},
	{"quit", command_quit, false},
	{"power-off", command_power_off, false},
};

static int run_named(struct request *request, struct mv_error *error)
{
	const char *name;
	const int rc = mv_json_take_string(&request->json, "cmd", &name, error);

	if (rc < 0)
		return rc;
	if (rc == 0)
		return mv_refuse(error, -EINVAL, "no cmd");
	for (size_t i = 0; i < sizeof(COMMANDS) / sizeof(COMMANDS[0]); i++) {
		if (strcmp(name, COMMANDS[i].name) != 0)
			continue;
		if (request->client->passed_fd >= 0 && !COMMANDS[i].takes_fd)
			return mv_refuse(error, -EINVAL, "%s takes no descriptor", name);
		return COMMANDS[i].run(request, error);
	}
	return mv_refuse(error, -ENOSYS, "no command %.64s", name);
}

static void begin_reply(struct mv_text *reply, bool okay, const struct mv_client *client)
{
	reply->len = 0;
	reply->cut = false;
	mv_text_add(reply, "{\"ok\":%s", okay ? "true" : "false");
	if (client->id_given)
		mv_text_add(reply, ",\"id\":%" PRIu64, client->id);
}

static void refuse_reply(struct mv_text *reply, const struct mv_client *client, int code,
			 const struct mv_error *error)
{
	const char *name = strerrorname_np(-code);

	begin_reply(reply, false, client);
	mv_text_add(reply, ",\"code\":\"%s\",\"error\":", name ? name : "EIO");
	mv_text_add_string(reply, error->text);
	mv_text_add(reply, "}");
}

static int parse(struct request *request, char *line, size_t len, struct mv_error *error)
{
	struct mv_client *client = request->client;
	int rc = mv_json_parse(line, len, &request->json, error);

	client->id_given = false;
	if (rc == 0) {
		rc = mv_json_take_number(&request->json, "id", &client->id, error);
		client->id_given = rc == 1;
	}
	return rc < 0 ? rc : 0;
}

bool mv_command_run(struct mv_control *control, struct mv_client *client, char *line, size_t len)
{
	struct request request = {
		.control = control,
		.client = client,
		.start_ns = mv_now_ns(),
	};
	struct mv_error error = {""};
	int rc = parse(&request, line, len, &error);

	client->sweep = 0;
	begin_reply(&control->reply, true, client);
	if (rc == 0)
		rc = run_named(&request, &error);
	if (client->passed_fd >= 0) { /* the line was refused before it was looked at */
		close(client->passed_fd);
		client->passed_fd = -1;
	}
	if (rc < 0) {
		client->sweep = 0;
		refuse_reply(&control->reply, client, rc, &error);
		return true;
	}
	if (client->sweep > 0)
		return mv_command_finish(control, client);
	mv_text_add(&control->reply, ",\"took_ns\":%" PRIu64 "}", mv_now_ns() - request.start_ns);
	return true;
}

bool mv_command_finish(struct mv_control *control, struct mv_client *client)
{
	struct mv_error error;

	if (!mv_machine_swept(control->machine, client->sweep)) {
		if (!mv_machine_failed(control->machine, &error))
			return false;
		refuse_reply(&control->reply, client, -EIO, &error);
		client->sweep = 0;
		return true;
	}
	begin_reply(&control->reply, true, client);
	mv_describe_sweep(control->machine, client->sweep, &control->reply);
	mv_text_add(&control->reply, "}");
	client->sweep = 0;
	return true;
}
