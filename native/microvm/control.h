/* SPDX-License-Identifier: Apache-2.0 */
/*
 * control.h - the control socket: JSON lines in, one line out for each, in order.
 *
 * Threads: one thread runs it; it is the machine's control thread.
 * Errors: 0 or -errno. A client that breaks the rules gets an answer or is hung up on; nothing that
 *         a client does, or its death, touches the guest.
 * Ownership: owns the socket and its name in the file system.
 * Units: none.
 * Source: native/microvm/README.md, "The control socket".
 */
#ifndef MV_CONTROL_H
#define MV_CONTROL_H

#include <stdbool.h>
#include <stdint.h>

#include "json.h"
#include "machine.h"

#define MV_CLIENT_COUNT_MAX 8u
#define MV_LINE_LEN_MAX	    4096u

struct mv_client {
	int fd;	       /* -1: this place is free */
	int passed_fd; /* came with the line that is being read; -1 none */
	size_t len;
	char line[MV_LINE_LEN_MAX];
	uint64_t sweep; /* it waits for the end of this one; 0 = it does not wait */
	uint64_t id;	/* of the request that waits */
	bool id_given;
};

struct mv_control {
	struct mv_machine *machine;
	const char *path;
	int listen_fd;
	bool quit;
	struct mv_client clients[MV_CLIENT_COUNT_MAX];
	struct mv_text reply;
};

/* Returns 0; -EADDRINUSE somebody listens there; -ENAMETOOLONG; -errno. */
int mv_control_create(struct mv_machine *machine, const char *path, struct mv_control **ret_control,
		      struct mv_error *error);

/* Serves until a client says quit or `signal_fd` becomes readable. Returns 0 or -errno. */
int mv_control_run(struct mv_control *control, int signal_fd);

void mv_control_destroy(struct mv_control *control);

/*
 * commands.c: runs one line; the answer is in control->reply, without its newline. Returns false if
 * there is no answer yet: the client waits.
 */
bool mv_command_run(struct mv_control *control, struct mv_client *client, char *line, size_t len);

/* The answer that a client waits for, if it is there. */
bool mv_command_finish(struct mv_control *control, struct mv_client *client);

#endif
