/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm_handoff.c - the library's own thread: connect to the agent, hand off, hear its lines; again
 * whenever the connection breaks, until the release has been told.
 *
 * Threads    The thread runs handoff_main; others reach it by stop and release_wanted, each stored
 *            (release) before stop_fd is written, and loaded (acquire) after it was read.
 * Errors     None leave the thread: whatever a call says, it tries again RETRY_MS after it began the
 *            last attempt. A VMM cannot do better, its guest waits.
 * Ownership, Units: see vmm.h.
 * Source     docs/exit-channel.md, section 1.
 */
#include "vmm_internal.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>

#include <godwit/sys.h>

/* An agent that was killed is there again in 50 ms, and the guest waits for this connection. */
#define RETRY_MS 20
/* A poke that was lost is made up for so soon; no poke is lost by the kernel. */
#define LOOK_MS	     1000
#define LINE_LEN_MAX 256U

static const char COMPLETE[] = "{\"event\":\"complete\"}";
static const char RELEASED[] = "{\"event\": \"released\"}\n";

/* How a connection went on. */
enum talk {
	TALK_ON = 0,
	TALK_BROKEN = 1,
	TALK_OVER = 2, /* told to stop, or the release is told */
};

static bool should_stop(const struct gw_vmm *vmm)
{
	return atomic_load_explicit(&vmm->stop, memory_order_acquire);
}

/* Until fd (-1: none) has one of `events`, a poke, or the timeout. */
static void wait_on(const struct gw_vmm *vmm, int fd, short events, int timeout_ms)
{
	struct pollfd fds[2] = {
		{.fd = vmm->stop_fd, .events = POLLIN},
		{.fd = fd, .events = events},
	};
	uint64_t pokes;

	if (gw_sys_poll(fds, 2, timeout_ms) > 0 && fds[0].revents != 0)
		(void)gw_sys_read(vmm->stop_fd, &pokes, sizeof(pokes));
}

/* --- out -------------------------------------------------------------------------------------- */

/* With descriptors if there are any. The number of bytes that went out, or -errno. */
static ssize_t send_some(int fd, const char *bytes, size_t len, const int *fds, uint32_t fd_count)
{
	struct iovec iov = {.iov_base = (void *)(uintptr_t)bytes, .iov_len = len};
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(GW_VMM_FD_COUNT_MAX * sizeof(int))];
	} control = {0};
	struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};

	if (fd_count > 0) {
		message.msg_control = &control;
		message.msg_controllen = CMSG_SPACE(fd_count * sizeof(int));
		control.header.cmsg_level = SOL_SOCKET;
		control.header.cmsg_type = SCM_RIGHTS;
		control.header.cmsg_len = CMSG_LEN(fd_count * sizeof(int));
		memcpy(CMSG_DATA(&control.header), fds, fd_count * sizeof(int));
	}
	return gw_sys_sendmsg(fd, &message, MSG_NOSIGNAL);
}

/* The descriptors go with the first byte. A socket buffer takes it all at once, as a rule. */
static enum talk send_all(const struct gw_vmm *vmm, int fd, const char *bytes, size_t len,
			  const int *fds, uint32_t fd_count)
{
	while (len > 0) {
		const ssize_t sent = send_some(fd, bytes, len, fds, fd_count);

		if (sent == -EAGAIN) {
			wait_on(vmm, fd, POLLOUT, RETRY_MS);
			if (should_stop(vmm))
				return TALK_OVER;
			continue;
		}
		if (sent == -EINTR)
			continue;
		if (sent < 0)
			return TALK_BROKEN;
		bytes += sent;
		len -= (size_t)sent;
		fd_count = 0;
	}
	return TALK_ON;
}

static enum talk hand_off(const struct gw_vmm *vmm, int fd)
{
	int fds[GW_VMM_FD_COUNT_MAX];
	const uint32_t count = gw_vmm_message_fds(vmm, fds);

	return send_all(vmm, fd, vmm->message, vmm->message_len, fds, count);
}

static enum talk tell_release(struct gw_vmm *vmm, int fd)
{
	if (!atomic_load_explicit(&vmm->release_wanted, memory_order_acquire))
		return TALK_ON;
	const enum talk talk = send_all(vmm, fd, RELEASED, sizeof(RELEASED) - 1, NULL, 0);

	if (talk != TALK_ON)
		return talk;
	atomic_store_explicit(&vmm->released, true, memory_order_release);
	return TALK_OVER;
}

/* --- in --------------------------------------------------------------------------------------- */

static bool is_complete(const char *line, size_t len)
{
	size_t at = 0;

	for (size_t i = 0; i < len; i++) {
		if (line[i] == ' ' || line[i] == '\t' || line[i] == '\r')
			continue;
		if (at == sizeof(COMPLETE) - 1 || line[i] != COMPLETE[at++])
			return false;
	}
	return at == sizeof(COMPLETE) - 1;
}

static enum talk take_line(struct gw_vmm *vmm, const char *line, size_t len)
{
	if (!is_complete(line, len))
		return TALK_ON; /* of a later version */
	if (atomic_load_explicit(&vmm->complete, memory_order_relaxed))
		return TALK_ON; /* a new agent says it again */
	/* What it says is checked: to let go of a page that is still to come is to lose the guest. */
	if (vmm->words && gw_vmm_absent_count(vmm) > 0)
		return TALK_BROKEN;
	atomic_store_explicit(&vmm->complete, true, memory_order_release);
	vmm->on_complete(vmm->opaque);
	return TALK_ON;
}

/* Takes the whole lines out of the first *len bytes. */
static enum talk take_lines(struct gw_vmm *vmm, char *bytes, size_t *len)
{
	for (;;) {
		const char *const end = memchr(bytes, '\n', *len);

		if (!end)
			return *len == LINE_LEN_MAX ? TALK_BROKEN : TALK_ON;
		const size_t line_len = (size_t)(end - bytes);
		const enum talk talk = take_line(vmm, bytes, line_len);

		if (talk != TALK_ON)
			return talk;
		*len -= line_len + 1;
		memmove(bytes, end + 1, *len);
	}
}

static enum talk converse(struct gw_vmm *vmm, int fd)
{
	char bytes[LINE_LEN_MAX];
	size_t len = 0;
	enum talk talk = hand_off(vmm, fd);

	while (talk == TALK_ON) {
		if (should_stop(vmm))
			return TALK_OVER;
		talk = tell_release(vmm, fd);
		if (talk != TALK_ON)
			break;
		wait_on(vmm, fd, POLLIN, LOOK_MS);
		const ssize_t got = gw_sys_recv(fd, bytes + len, sizeof(bytes) - len, MSG_DONTWAIT);

		if (got == -EAGAIN || got == -EINTR)
			continue;
		if (got <= 0)
			return TALK_BROKEN;
		len += (size_t)got;
		talk = take_lines(vmm, bytes, &len);
	}
	return talk;
}

/* --- the thread ------------------------------------------------------------------------------- */

static enum talk attempt(struct gw_vmm *vmm)
{
	enum talk talk = TALK_BROKEN;
	/* Never blocks: an agent whose queue is full is tried again. */
	const int fd = gw_sys_socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	if (fd < 0)
		return TALK_BROKEN;
	if (gw_sys_connect(fd, (const struct sockaddr *)&vmm->address, sizeof(vmm->address)) == 0)
		talk = converse(vmm, fd);
	(void)gw_sys_close(fd);
	return talk;
}

static void *handoff_main(void *argument)
{
	struct gw_vmm *const vmm = argument;

	while (!should_stop(vmm)) {
		const uint64_t next_ns = gw_sys_now_ns() + (uint64_t)RETRY_MS * 1000000U;

		if (attempt(vmm) == TALK_OVER)
			break;
		GW_HOOK("vmm.disconnected");
		for (uint64_t now_ns = gw_sys_now_ns(); now_ns < next_ns && !should_stop(vmm);
		     now_ns = gw_sys_now_ns())
			wait_on(vmm, -1, 0, (int)((next_ns - now_ns) / 1000000U) + 1);
	}
	return NULL;
}

/* The VMM's signals are for its own threads: its kicks above all. */
static int start_thread(struct gw_vmm *vmm)
{
	sigset_t all;
	sigset_t old;

	(void)sigfillset(&all);
	(void)pthread_sigmask(SIG_SETMASK, &all, &old);
	const int err = pthread_create(&vmm->thread, NULL, handoff_main, vmm);

	(void)pthread_sigmask(SIG_SETMASK, &old, NULL);
	return -err;
}

int gw_vmm_connect(struct gw_vmm *vmm, const char *socket_path)
{
	const size_t len = strlen(socket_path);

	if (vmm->thread_runs)
		return -EALREADY;
	if (len == 0 || len >= sizeof(vmm->address.sun_path))
		return -EINVAL;
	if (vmm->stop_fd < 0) {
		const int fd = gw_sys_eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

		if (fd < 0)
			return fd;
		vmm->stop_fd = fd;
	}
	vmm->address.sun_family = AF_UNIX;
	memcpy(vmm->address.sun_path, socket_path, len + 1);
	const int err = start_thread(vmm);

	vmm->thread_runs = err == 0;
	return err;
}

void gw_vmm_handoff_poke(struct gw_vmm *vmm)
{
	const uint64_t one = 1;

	/* Fails only where it has been poked 2^64 times. */
	(void)gw_sys_write(vmm->stop_fd, &one, sizeof(one));
}

void gw_vmm_handoff_stop(struct gw_vmm *vmm)
{
	if (vmm->thread_runs) {
		atomic_store_explicit(&vmm->stop, true, memory_order_release);
		gw_vmm_handoff_poke(vmm);
		(void)pthread_join(vmm->thread, NULL);
	}
	if (vmm->stop_fd >= 0)
		(void)gw_sys_close(vmm->stop_fd);
}
