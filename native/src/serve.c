/* SPDX-License-Identifier: Apache-2.0 */
/*
 * serve.c - the page server: its listener, its images, its connections.
 *
 * Threads, Errors, Ownership, Units, Source: see serve.h and serve_internal.h.
 */
#include "serve_internal.h"

#include "grpc_socket.h"

#include <godwit/sys.h>

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#define LISTEN_BACKLOG	       128
#define CONNECTION_COUNT_LIMIT 1024u
#define HEARTBEAT_DEFAULT_MS   1000u
#define ACCEPT_PAUSE_MS	       100
/* Bytes unacknowledged for so long mean that the peer's host is gone. */
#define SOCKET_TIMEOUT_MS 5000u
#define NS_PER_MS	  1000000u

/* --- slots ----------------------------------------------------------------------------------- */

static struct serve_slot *slot_create(const char *image_id)
{
	struct serve_slot *slot = calloc(1, sizeof(*slot));
	pthread_rwlockattr_t attr;
	int err;

	if (!slot)
		return NULL;
	if (pthread_rwlockattr_init(&attr)) {
		free(slot);
		return NULL;
	}
	pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	err = pthread_rwlock_init(&slot->lock, &attr);
	pthread_rwlockattr_destroy(&attr);
	if (err) {
		free(slot);
		return NULL;
	}
	atomic_init(&slot->ref_count, 1);
	atomic_init(&slot->stream_count, 0);
	strncpy(slot->image_id, image_id, sizeof(slot->image_id) - 1);
	return slot;
}

void serve_slot_unref(struct serve_slot *slot)
{
	/* acq_rel: what any owner did with the slot happens before its end. */
	if (!slot || atomic_fetch_sub_explicit(&slot->ref_count, 1, memory_order_acq_rel) != 1)
		return;
	gw_image_unref(slot->image);
	pthread_rwlock_destroy(&slot->lock);
	free(slot);
}

/* With serve->lock held. */
static struct serve_slot **slot_find(struct gw_serve *serve, const char *image_id, size_t len)
{
	struct serve_slot **at = &serve->slots;

	while (*at &&
	       !(strlen((*at)->image_id) == len && memcmp((*at)->image_id, image_id, len) == 0))
		at = &(*at)->next;
	return at;
}

struct serve_slot *serve_slot_get(struct gw_serve *serve, const char *image_id, size_t len)
{
	struct serve_slot *slot;

	pthread_mutex_lock(&serve->lock);
	slot = *slot_find(serve, image_id, len);
	if (slot)
		atomic_fetch_add_explicit(&slot->ref_count, 1, memory_order_relaxed);
	pthread_mutex_unlock(&serve->lock);
	return slot;
}

/* The record in force is now `image`; returns the one that was. */
static struct gw_image *slot_swap(struct serve_slot *slot, struct gw_image *image)
{
	struct gw_image *old;

	pthread_rwlock_wrlock(&slot->lock);
	old = slot->image;
	slot->image = image;
	pthread_rwlock_unlock(&slot->lock);
	return old;
}

int gw_serve_put_image(struct gw_serve *serve, const struct gw_serve_image *record)
{
	struct gw_image *image;
	struct serve_slot **at;
	struct gw_image *old;
	int err;

	if (!record)
		return -EINVAL;
	err = gw_image_create(record, &image);
	if (err)
		return err;
	/* Held throughout: a remove_image in between must find either all of it or nothing. */
	pthread_mutex_lock(&serve->lock);
	at = slot_find(serve, record->image_id, strlen(record->image_id));
	if (!*at)
		*at = slot_create(record->image_id);
	if (!*at) {
		pthread_mutex_unlock(&serve->lock);
		gw_image_unref(image);
		return -ENOMEM;
	}
	/* Before it is in force: of a frozen image every stream may have to be opened again. */
	err = serve_access_pin(serve, *at, image);
	GW_HOOK("serve.put");
	old = err ? image : slot_swap(*at, image);
	pthread_mutex_unlock(&serve->lock);
	gw_image_unref(old);
	return err;
}

/* With serve->lock held: every connection looks again at what it serves. */
static void wake_all(struct gw_serve *serve)
{
	for (struct serve_conn *conn = serve->conns; conn; conn = conn->next)
		serve_wake(conn->wake_fd);
}

int gw_serve_remove_image(struct gw_serve *serve, const char *image_id)
{
	struct serve_slot **at;
	struct serve_slot *slot;

	pthread_mutex_lock(&serve->lock);
	at = slot_find(serve, image_id, strlen(image_id));
	slot = *at;
	if (slot) {
		*at = slot->next;
		serve_access_unpin(serve, slot);
		gw_image_unref(slot_swap(slot, NULL));
		wake_all(serve);
	}
	pthread_mutex_unlock(&serve->lock);
	serve_slot_unref(slot);
	return slot ? 0 : -ENOENT;
}

int gw_serve_image_stream_count(const struct gw_serve *serve, const char *image_id)
{
	/* The lock is no part of what the caller sees as const. */
	struct gw_serve *mine = (struct gw_serve *)serve;
	struct serve_slot *slot = serve_slot_get(mine, image_id, strlen(image_id));
	int count;

	if (!slot)
		return -ENOENT;
	count = (int)atomic_load_explicit(&slot->stream_count, memory_order_relaxed);
	serve_slot_unref(slot);
	return count;
}

/* --- accepting ------------------------------------------------------------------------------- */

/* With serve->lock held: take those that are through out of the list, to be joined. */
static struct serve_conn *take_done(struct gw_serve *serve, bool all)
{
	struct serve_conn **at = &serve->conns;
	struct serve_conn *taken = NULL;

	while (*at) {
		struct serve_conn *conn = *at;

		if (!all && !atomic_load_explicit(&conn->done, memory_order_acquire)) {
			at = &conn->next;
			continue;
		}
		*at = conn->next;
		conn->next = taken;
		taken = conn;
		serve->conn_count--;
	}
	return taken;
}

static void reap(struct gw_serve *serve, bool all)
{
	struct serve_conn *taken;

	pthread_mutex_lock(&serve->lock);
	if (all)
		wake_all(serve);
	taken = take_done(serve, all);
	pthread_mutex_unlock(&serve->lock);
	while (taken) {
		struct serve_conn *next = taken->next;

		pthread_join(taken->thread, NULL);
		serve_conn_free(taken);
		serve_count(&serve->counters.connection_count, (uint64_t)-1);
		taken = next;
	}
}

/*
 * Close before a byte is said: to a gRPC client the connection then was never made, it answers
 * UNAVAILABLE and comes again with back-off. Rejected: SETTINGS and GOAWAY, after which grpc
 * 1.85's core tries the call again without end and without a pause on the dead connection
 * (test_sigterm_finishes_what_is_under_way). No thread and no memory for a peer not served.
 */
static void refuse(int fd)
{
	gw_sys_close(fd);
}

static void serve_one(struct gw_serve *serve, int fd)
{
	struct serve_conn *conn;
	bool refused;

	pthread_mutex_lock(&serve->lock);
	refused = serve->conn_count >= serve->connection_count_max ||
		  atomic_load_explicit(&serve->draining, memory_order_relaxed) ||
		  gw_grpc_tune_socket(fd, SOCKET_TIMEOUT_MS) != 0 ||
		  serve_conn_start(serve, fd, &conn) != 0;
	if (!refused) {
		conn->next = serve->conns;
		serve->conns = conn;
		serve->conn_count++;
		serve_count(&serve->counters.connection_count, 1);
		serve_count(&serve->counters.connection_total, 1);
	}
	pthread_mutex_unlock(&serve->lock);
	if (refused)
		refuse(fd);
}

/* Returns false if there is no fd or memory to accept with: asking again at once would spin. */
static bool accept_all(struct gw_serve *serve)
{
	for (;;) {
		const int fd =
			gw_sys_accept4(serve->listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

		if (fd >= 0) {
			serve_one(serve, fd);
			continue;
		}
		if (fd == -EMFILE || fd == -ENFILE || fd == -ENOBUFS || fd == -ENOMEM)
			return false;
		if (fd == -EAGAIN)
			return true;
		/* Everything else is the fate of one connection that died in the queue (accept(2)). */
	}
}

/* Listen, or look again after ACCEPT_PAUSE_MS. Returns what is so now: it is tried again. */
static bool pause_listening(struct gw_serve *serve, bool paused, bool pause)
{
	struct epoll_event listen = {.events = pause ? 0 : EPOLLIN, .data.fd = serve->listen_fd};

	if (pause != paused &&
	    gw_sys_epoll_ctl(serve->epoll_fd, EPOLL_CTL_MOD, serve->listen_fd, &listen) == 0)
		return pause;
	return paused;
}

static void drain_wakes(int wake_fd)
{
	uint64_t count;

	(void)gw_sys_read(wake_fd, &count, sizeof(count));
}

static void *accept_thread(void *argument)
{
	struct gw_serve *serve = argument;
	bool paused = false;

	pthread_setname_np(pthread_self(), "gw-accept");
	while (!atomic_load_explicit(&serve->stopping, memory_order_acquire)) {
		struct epoll_event event;
		const int got = gw_sys_epoll_wait(serve->epoll_fd, &event, 1,
						  paused ? ACCEPT_PAUSE_MS : -1);

		if (got > 0 && event.data.fd == serve->wake_fd)
			drain_wakes(serve->wake_fd);
		reap(serve, false);
		if (got == 0 || (got > 0 && event.data.fd == serve->listen_fd))
			paused = pause_listening(serve, paused, !accept_all(serve));
	}
	reap(serve, true);
	return NULL;
}

/* --- create, destroy ------------------------------------------------------------------------- */

static int open_listener(struct gw_serve *serve, const struct gw_serve_config *config)
{
	struct sockaddr_storage address = {0};
	struct sockaddr *at = (struct sockaddr *)&address;
	const int one = 1;
	socklen_t len;
	int err;

	err = socket_address(config->listen_host, config->listen_port, &address, &len);
	if (err)
		return err;
	serve->listen_fd =
		gw_sys_socket(address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (serve->listen_fd < 0)
		return serve->listen_fd;
	/* A server that was killed must be able to come back at its port at once. */
	err = gw_sys_setsockopt(serve->listen_fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (!err)
		err = gw_sys_bind(serve->listen_fd, at, len);
	if (!err)
		err = gw_sys_listen(serve->listen_fd, LISTEN_BACKLOG);
	len = sizeof(address);
	if (!err)
		err = gw_sys_getsockname(serve->listen_fd, at, &len);
	if (err)
		return err;
	/* At the same place in both families. */
	serve->port = ntohs(((struct sockaddr_in *)at)->sin_port);
	return 0;
}

static int open_epoll(struct gw_serve *serve)
{
	struct epoll_event event = {.events = EPOLLIN};
	int err;

	serve->wake_fd = gw_sys_eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (serve->wake_fd < 0)
		return serve->wake_fd;
	serve->epoll_fd = gw_sys_epoll_create();
	if (serve->epoll_fd < 0)
		return serve->epoll_fd;
	event.data.fd = serve->wake_fd;
	err = gw_sys_epoll_ctl(serve->epoll_fd, EPOLL_CTL_ADD, serve->wake_fd, &event);
	if (err)
		return err;
	event.data.fd = serve->listen_fd;
	return gw_sys_epoll_ctl(serve->epoll_fd, EPOLL_CTL_ADD, serve->listen_fd, &event);
}

/* Signals are the embedding program's: no thread of ours takes one. Threads inherit it. */
static int start_thread(struct gw_serve *serve)
{
	sigset_t all;
	sigset_t before;
	int err;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	err = pthread_create(&serve->thread, NULL, accept_thread, serve);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	serve->thread_started = err == 0;
	return -err;
}

int gw_serve_create(const struct gw_serve_config *config, struct gw_serve **ret_serve)
{
	struct gw_serve *serve;
	int err;

	if (!config || config->struct_size != sizeof(*config) ||
	    config->connection_count_max == 0 ||
	    config->connection_count_max > CONNECTION_COUNT_LIMIT)
		return -EINVAL;
	serve = calloc(1, sizeof(*serve));
	if (!serve)
		return -ENOMEM;
	serve->listen_fd = -1;
	serve->epoll_fd = -1;
	serve->wake_fd = -1;
	serve->connection_count_max = config->connection_count_max;
	serve->heartbeat_ns =
		(uint64_t)(config->heartbeat_ms ? config->heartbeat_ms : HEARTBEAT_DEFAULT_MS) *
		NS_PER_MS;
	serve->tls = gw_tls_identity_ref(config->tls);
	pthread_mutex_init(&serve->lock, NULL);
	err = open_listener(serve, config);
	if (!err)
		err = open_epoll(serve);
	if (err) {
		gw_serve_destroy(serve);
		return err;
	}
	*ret_serve = serve;
	return 0;
}

int gw_serve_start(struct gw_serve *serve)
{
	return serve->thread_started ? -EALREADY : start_thread(serve);
}

static void close_if_open(int fd)
{
	if (fd >= 0)
		gw_sys_close(fd);
}

void gw_serve_destroy(struct gw_serve *serve)
{
	if (!serve)
		return;
	if (serve->thread_started) {
		/* Release: a connection that sees it does so after its wake, and ends. */
		atomic_store_explicit(&serve->stopping, true, memory_order_release);
		serve_wake(serve->wake_fd);
		pthread_join(serve->thread, NULL);
	}
	while (serve->slots) {
		struct serve_slot *slot = serve->slots;

		serve->slots = slot->next;
		serve_access_unpin(serve, slot);
		serve_slot_unref(slot);
	}
	close_if_open(serve->listen_fd);
	close_if_open(serve->epoll_fd);
	close_if_open(serve->wake_fd);
	pthread_mutex_destroy(&serve->lock);
	gw_tls_identity_unref(serve->tls);
	free(serve);
}

int gw_serve_port(const struct gw_serve *serve)
{
	return (int)serve->port;
}

int gw_serve_drain(struct gw_serve *serve)
{
	atomic_store_explicit(&serve->draining, true, memory_order_relaxed);
	return 0;
}

static uint64_t load(const atomic_uint_fast64_t *counter)
{
	return atomic_load_explicit(counter, memory_order_relaxed);
}

int gw_serve_stats(const struct gw_serve *serve, struct gw_serve_stats *ret_stats)
{
	const struct serve_counters *counters = &serve->counters;

	*ret_stats = (struct gw_serve_stats){
		.connection_count = load(&counters->connection_count),
		.stream_count = load(&counters->stream_count),
		.connection_total = load(&counters->connection_total),
		.demand_page_total = load(&counters->demand_page_total),
		.bulk_page_total = load(&counters->bulk_page_total),
		.zero_page_total = load(&counters->zero_page_total),
		.sent_bytes_total = load(&counters->sent_bytes_total),
		.want_total = load(&counters->want_total),
		.refused_total = load(&counters->refused_total),
	};
	return 0;
}
