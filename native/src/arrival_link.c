/* SPDX-License-Identifier: Apache-2.0 */
/*
 * arrival_link.c - one lane's connection: opened by itself, kept alive, opened again.
 *
 * Threads, Errors, Ownership, Units: see arrival_internal.h: a link belongs to one thread.
 * Source     page_service.proto: hello, ready, wants, heartbeats, statuses.
 *
 * A connection cannot be destroyed inside its own callbacks: they call link_fail, and the
 * event that brought them closes it when they are over.
 */
#include "arrival_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <godwit/sys.h>

#define DEMAND_WINDOW_LEN   (UINT32_C(4) << 20)
#define BULK_WINDOW_LEN	    (UINT32_C(16) << 20)
#define PAGE_SIZE_HUGE	    (UINT32_C(2) << 20)
#define BULK_WANT_COUNT_MAX 64U

static const char *lane_name(const struct arrival_link *link)
{
	return link->lane == GW_PAGE_LANE_DEMAND ? "demand" : "bulk";
}

int link_init(struct arrival_link *link, struct gw_arrival *arrival, uint32_t index, int32_t lane,
	      int epoll_fd, uint32_t epoll_tag, const struct link_handler *handler, void *owner)
{
	memset(link, 0, sizeof(*link));
	link->arrival = arrival;
	link->handler = handler;
	link->owner = owner;
	link->index = index;
	link->lane = lane;
	link->epoll_fd = epoll_fd;
	link->epoll_tag = epoll_tag;
	link->good = true;
	/* On the demand lane somebody waits behind each answer: none is longer than its want. */
	link->zero_run_max = lane == GW_PAGE_LANE_BULK ? arrival->page_count * arrival->page_size
						       : 0;
	link->want_cap = lane == GW_PAGE_LANE_DEMAND ? ARRIVAL_WANT_COUNT_MAX : BULK_WANT_COUNT_MAX;
	link->wants = calloc(link->want_cap, sizeof(*link->wants));
	if (!link->wants)
		return -ENOMEM;
	if (lane == GW_PAGE_LANE_BULK) {
		/* Not touched before a server packs something. */
		link->plain = malloc(GW_PAGE_WANT_LEN_MAX);
		if (!link->plain)
			return -ENOMEM;
	}
	if (arrival->page_size == PAGE_SIZE_HUGE) {
		link->page = malloc(arrival->page_size);
		if (!link->page)
			return -ENOMEM;
	}
	return 0;
}

void link_fini(struct arrival_link *link)
{
	dial_stop(&link->dial);
	gw_grpc_destroy(link->conn);
	link->conn = NULL;
	free(link->wants);
	free(link->page);
	free(link->plain);
	link->wants = NULL;
	link->plain = NULL;
	link->page = NULL;
}

void link_fail(struct arrival_link *link, enum link_cause cause)
{
	/* The first is why. */
	if (link->cause == LINK_UP)
		link->cause = cause;
}

/* --- the connection's callbacks --------------------------------------------------------------- */

static void on_message(void *user, struct gw_grpc_call *call, const uint8_t *data, size_t len)
{
	struct arrival_link *const link = user;

	/* One that failed says nothing more: what is behind a damaged message is not looked at. */
	if (call == link->call && link->cause == LINK_UP)
		link_on_message(link, data, len);
}

static enum link_cause cause_of_status(int status)
{
	switch (status) {
	case GW_GRPC_NOT_FOUND:
		return LINK_UNKNOWN;
	case GW_GRPC_FAILED_PRECONDITION:
	case GW_GRPC_OUT_OF_RANGE:
	case GW_GRPC_DATA_LOSS:
	case GW_GRPC_INVALID_ARGUMENT:
	case GW_GRPC_UNIMPLEMENTED:
	case GW_GRPC_PERMISSION_DENIED:
	case GW_GRPC_UNAUTHENTICATED:
		return LINK_REFUSED;
	default:
		return LINK_BROKEN;
	}
}

static void on_end(void *user, struct gw_grpc_call *call, int status, const char *message)
{
	struct arrival_link *const link = user;

	if (call != link->call)
		return;
	link->call = NULL;
	if (link->cause != LINK_UP)
		return;
	link_fail(link, cause_of_status(status));
	if (status != GW_GRPC_OK)
		atomic_store(&link->arrival->grpc_status, status);
	arrival_set_reason(link->arrival, "%s lane: the server ended the stream: status %d %s",
			   lane_name(link), status, message);
}

static const struct gw_grpc_handler grpc_handler = {
	.on_message = on_message,
	.on_end = on_end,
};

/* --- open and close --------------------------------------------------------------------------- */

static void set_up(struct arrival_link *link, bool up)
{
	struct gw_arrival *const arrival = link->arrival;
	const uint32_t bit = UINT32_C(1) << link->index;

	link->up = up;
	if (up) {
		atomic_fetch_or(&arrival->up_mask, bit);
		atomic_fetch_and(&arrival->refused_mask, ~bit);
	} else {
		atomic_fetch_and(&arrival->up_mask, ~bit);
	}
	if (up)
		atomic_store(&arrival->nobody_listens, false);
	if (link->lane == GW_PAGE_LANE_DEMAND) {
		if (up)
			atomic_store(&arrival->demand_was_up, true);
		atomic_store(&arrival->demand_down_ns, up ? 0 : gw_sys_now_ns());
	}
	/* The phase is the demand thread's to tell. */
	arrival_wake_demand(arrival);
}

/* By which key the server is known, for whoever pins it. */
static void note_server_key(struct arrival_link *link)
{
	struct gw_arrival *const arrival = link->arrival;
	const struct gw_tls *const tls = gw_grpc_tls(link->conn);
	uint8_t key[GW_TLS_KEY_LEN];

	if (!tls || gw_tls_peer_key(tls, key) != 0)
		return;
	(void)pthread_mutex_lock(&arrival->text_lock);
	arrival->has_server_key = true;
	memcpy(arrival->server_key, key, sizeof(key));
	(void)pthread_mutex_unlock(&arrival->text_lock);
}

void link_set_up(struct arrival_link *link)
{
	note_server_key(link);
	/* A lane that only ever sent rubbish is not healthy because it says ready. */
	if (link->good)
		link->failure_count = 0;
	if (link->was_up)
		gw_page_map_count(link->arrival->map, GW_COUNT_RECONNECT, 1);
	link->was_up = true;
	set_up(link, true);
	link->handler->on_up(link->owner);
}

static uint64_t backoff_ns(const struct arrival_link *link)
{
	const uint32_t doublings = link->failure_count < 8 ? link->failure_count : 8;
	const uint64_t wait_ns = ARRIVAL_BACKOFF_NS_MIN << doublings;

	if (link->cause == LINK_REFUSED)
		return UINT64_MAX / 2;
	if (link->cause == LINK_UNKNOWN)
		return ARRIVAL_BACKOFF_NS_MAX;
	return wait_ns < ARRIVAL_BACKOFF_NS_MAX ? wait_ns : ARRIVAL_BACKOFF_NS_MAX;
}

void link_close(struct arrival_link *link, enum link_cause cause, uint64_t now_ns)
{
	link_fail(link, cause);
	link->call = NULL; /* so that on_end of the destruction is nobody's */
	dial_stop(&link->dial);
	gw_grpc_destroy(link->conn);
	link->conn = NULL;
	link->epoll_events = 0;
	link->retry_ns = now_ns + backoff_ns(link);
	link->failure_count++;
	if (link->cause == LINK_DAMAGED)
		link->good = false;
	if (link->cause == LINK_REFUSED || link->cause == LINK_UNKNOWN)
		atomic_fetch_or(&link->arrival->refused_mask, UINT32_C(1) << link->index);
	if (link->up)
		set_up(link, false);
	else
		arrival_wake_demand(link->arrival);
	link->handler->on_down(link->owner);
	link->want_first = 0;
	link->want_count = 0;
	link->in_flight_bytes = 0;
	link->page_len = 0;
}

/* After a call into the connection: register what it waits for, or close what has failed. */
static void settle(struct arrival_link *link, int err, uint64_t now_ns)
{
	if (err < 0)
		atomic_store(&link->arrival->nobody_listens, err == -ECONNREFUSED);
	if (err < 0 && link->cause == LINK_UP) {
		arrival_set_reason(link->arrival, "%s lane: %s", lane_name(link), strerror(-err));
		link_fail(link, LINK_BROKEN);
	}
	if (link->cause != LINK_UP) {
		link_close(link, link->cause, now_ns);
		return;
	}
	struct epoll_event event = {
		.events = EPOLLIN | (gw_grpc_wants_write(link->conn) ? EPOLLOUT : 0U),
		.data.u32 = link->epoll_tag,
	};

	if (event.events == link->epoll_events)
		return;
	err = gw_sys_epoll_ctl(link->epoll_fd, link->epoll_events ? EPOLL_CTL_MOD : EPOLL_CTL_ADD,
			       gw_grpc_fd(link->conn), &event);
	if (err < 0) {
		arrival_set_reason(link->arrival, "%s lane: epoll_ctl: %s", lane_name(link),
				   strerror(-err));
		link_close(link, LINK_BROKEN, now_ns);
		return;
	}
	link->epoll_events = event.events;
}

static int send_request(struct arrival_link *link, const struct gw_fetch_request *request,
			uint64_t now_ns)
{
	uint8_t data[GW_GRPC_HEAD_LEN_MAX];
	const ssize_t len = gw_fetch_request_encode(request, data, sizeof(data));
	int err = len < 0 ? (int)len : 0;

	if (err == 0)
		err = gw_grpc_call_send(link->call, data, (size_t)len, NULL, 0, NULL);
	if (err == 0)
		link->sent_ns = now_ns;
	return err;
}

static struct gw_wire_string string_of(const char *text)
{
	return (struct gw_wire_string){.data = text, .len = strlen(text)};
}

static struct gw_wire_bytes token_of(struct arrival_link *link)
{
	struct gw_arrival *const arrival = link->arrival;
	size_t len;

	(void)pthread_mutex_lock(&arrival->text_lock);
	len = arrival->token_len;
	memcpy(link->token, arrival->token, len);
	(void)pthread_mutex_unlock(&arrival->text_lock);
	return (struct gw_wire_bytes){.data = link->token, .len = len};
}

static int send_hello(struct arrival_link *link, uint64_t now_ns)
{
	const struct gw_arrival *const arrival = link->arrival;
	const struct gw_fetch_request request = {
		.kind = GW_FETCH_REQUEST_HELLO,
		.hello = {.session_id = string_of(arrival->session_id),
			  .image_id = string_of(arrival->image_id),
			  .traceparent = string_of(arrival->traceparent),
			  .epoch = arrival->epoch,
			  .zero_run_max = link->zero_run_max,
			  .accepts_lz4 = link->plain != NULL,
			  .token = token_of(link),
			  .lane = link->lane},
	};
	const ssize_t len = gw_fetch_request_encode(&request, link->hello, sizeof(link->hello));

	if (len < 0)
		return (int)len;
	link->sent_ns = now_ns;
	/* Longer than a head may be; the buffer is the link's and outlives the connection. */
	return gw_grpc_call_send(link->call, NULL, 0, link->hello, (size_t)len, link);
}

static int open_stream(struct arrival_link *link, uint64_t now_ns)
{
	const struct gw_grpc_call_options options = {
		.path = GW_PAGE_PATH_FETCH,
		.authority = link->authority,
		.now_ns = now_ns,
	};
	const int err = gw_grpc_call_open(link->conn, &options, &link->call);

	return err < 0 ? err : send_hello(link, now_ns);
}

/* Connected: speak. Takes fd. */
static void link_open(struct arrival_link *link, int fd, uint64_t now_ns)
{
	const struct gw_grpc_config config = {
		.handler = &grpc_handler,
		.user = link,
		.message_len_max = GW_PAGE_RESPONSE_LEN_MAX,
		.window_len = link->lane == GW_PAGE_LANE_DEMAND ? DEMAND_WINDOW_LEN
								: BULK_WINDOW_LEN,
		.call_count_max = 1,
		/* Every want that may be outstanding, and heartbeats and the hello beside them. */
		.send_queue_count = link->want_cap + 16,
		.tls = link->arrival->tls,
		.tls_server_name = link->arrival->server_name,
	};
	int err = gw_grpc_client_create(&config, fd, &link->conn);

	if (err < 0)
		(void)gw_sys_close(fd);
	link->opened_ns = now_ns;
	link->epoll_events = EPOLLOUT; /* as the dial has registered it */
	if (err == 0)
		err = open_stream(link, now_ns);
	if (err == 0)
		err = gw_grpc_flush(link->conn);
	settle(link, err, now_ns);
}

/* One of the attempts may be there, or all may have failed. */
static void link_take(struct arrival_link *link, uint64_t now_ns)
{
	int fd = -1;
	const int got = dial_take(&link->dial, &fd);

	if (got > 0)
		link_open(link, fd, now_ns);
	else if (got < 0)
		settle(link, got, now_ns);
}

static void link_dial(struct arrival_link *link, uint64_t now_ns)
{
	struct gw_arrival *const arrival = link->arrival;
	char host[ARRIVAL_HOST_LEN_MAX + 1];
	uint32_t port;
	uint32_t version;

	(void)pthread_mutex_lock(&arrival->text_lock);
	memcpy(host, arrival->host, sizeof(host));
	port = arrival->port;
	version = atomic_load(&arrival->server_version);
	(void)pthread_mutex_unlock(&arrival->text_lock);
	if (version != link->server_version)
		dial_stop(&link->dial);
	link->server_version = version;
	(void)snprintf(link->authority, sizeof(link->authority),
		       strchr(host, ':') ? "[%s]:%u" : "%s:%u", host, port);
	link->cause = LINK_UP;
	link->opened_ns = now_ns;
	if (link->dial.count == 0)
		link->dial_ns = now_ns;
	else
		arrival_set_reason(arrival, "%s lane: %s has not answered for %u ms",
				   lane_name(link), link->authority,
				   (unsigned int)((now_ns - link->dial_ns) / 1000000));
	const int err = dial_more(&link->dial, host, port, link->epoll_fd, link->epoll_tag);

	link->retry_ns = now_ns + ARRIVAL_DIAL_NS;
	/* On this host it is there at once. */
	if (link->dial.count > 0)
		link_take(link, now_ns);
	else
		settle(link, err, now_ns);
}

/* --- driven by the owner's loop --------------------------------------------------------------- */

void link_on_event(struct arrival_link *link, uint32_t events, uint64_t now_ns)
{
	int err = 0;

	if (!link->conn) {
		link_take(link, now_ns);
		return;
	}
	if (events & (EPOLLOUT | EPOLLERR | EPOLLHUP))
		err = gw_grpc_on_writable(link->conn, now_ns);
	if (err == 0 && link->cause == LINK_UP && events & EPOLLIN)
		err = gw_grpc_on_readable(link->conn, now_ns);
	settle(link, err, now_ns);
}

static uint64_t earlier(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static void send_heartbeat(struct arrival_link *link, uint64_t now_ns)
{
	const struct gw_fetch_request request = {
		.kind = GW_FETCH_REQUEST_HEARTBEAT,
		.heartbeat = {.sequence = link->heartbeat_sequence + 1},
	};
	int err = send_request(link, &request, now_ns);

	/* A full queue is no silence of ours, but the socket's; the peer's window will tell. */
	if (err == -EAGAIN)
		return;
	link->heartbeat_sequence++;
	if (err == 0)
		err = gw_grpc_flush(link->conn);
	settle(link, err, now_ns);
}

/*
 * How long wants have been due and none was answered. Signs of life do not count: heartbeats may come
 * from a server that is stuck behind them, and bytes one by one. Looked at once a heartbeat.
 */
static uint64_t stalled_ns(const struct arrival_link *link, uint64_t now_ns)
{
	return link->up && link->want_count > 0 && now_ns > link->progress_ns
		       ? now_ns - link->progress_ns
		       : 0;
}

static uint64_t stall_ns_max(const struct arrival_link *link)
{
	return link->lane == GW_PAGE_LANE_DEMAND ? ARRIVAL_STALL_NS_DEMAND : ARRIVAL_STALL_NS_BULK;
}

uint64_t link_on_time(struct arrival_link *link, uint64_t now_ns)
{
	if (link->server_version != atomic_load(&link->arrival->server_version) &&
	    link->opened_ns > 0) {
		/* Another server: what the old one said counts no more. */
		if (link->conn || link->dial.count > 0)
			link_close(link, LINK_BROKEN, now_ns);
		link->failure_count = 1;
		link->retry_ns = now_ns;
		atomic_fetch_and(&link->arrival->refused_mask, ~(UINT32_C(1) << link->index));
		arrival_wake_demand(link->arrival);
	}
	if (!link->conn) {
		if (now_ns < link->retry_ns)
			return link->retry_ns;
		link_dial(link, now_ns);
		if (!link->conn)
			return link->retry_ns;
	}
	const uint64_t heard_ns = gw_grpc_received_ns(link->conn);
	const uint64_t life_ns = heard_ns > link->opened_ns ? heard_ns : link->opened_ns;

	if (now_ns - life_ns >= ARRIVAL_SILENCE_NS_MAX && now_ns > life_ns) {
		arrival_set_reason(link->arrival,
				   "%s lane: the page server has been silent for %u ms",
				   lane_name(link), (unsigned int)((now_ns - life_ns) / 1000000));
		atomic_store(&link->arrival->grpc_status, GW_GRPC_UNAVAILABLE);
		link_close(link, LINK_BROKEN, now_ns);
		return link->retry_ns;
	}
	if (stalled_ns(link, now_ns) >= stall_ns_max(link)) {
		arrival_set_reason(link->arrival,
				   "%s lane: the page server has answered no want for %u ms",
				   lane_name(link),
				   (unsigned int)(stalled_ns(link, now_ns) / 1000000));
		atomic_store(&link->arrival->grpc_status, GW_GRPC_UNAVAILABLE);
		link_close(link, LINK_DAMAGED, now_ns);
		return link->retry_ns;
	}
	/* A fault is stamped when it is read, which may be after this turn's now. */
	if (link->up && now_ns >= link->sent_ns + ARRIVAL_HEARTBEAT_NS)
		send_heartbeat(link, now_ns);
	if (!link->conn)
		return link->retry_ns;
	return earlier(life_ns + ARRIVAL_SILENCE_NS_MAX,
		       link->up ? link->sent_ns + ARRIVAL_HEARTBEAT_NS : UINT64_MAX);
}

int link_want(struct arrival_link *link, uint64_t first, uint64_t count, uint64_t now_ns)
{
	const uint64_t page_size = link->arrival->page_size;
	uint64_t offset = first * page_size;
	uint64_t left = count * page_size;
	const uint64_t part_count = (left + link->want_len_max - 1) / link->want_len_max;

	if (!link->up || link->cause != LINK_UP)
		return -ENOTCONN;
	if (link->want_count + part_count > link->want_cap)
		return -EAGAIN;
	if (link->want_count == 0)
		link->progress_ns = now_ns;
	while (left > 0) {
		const uint64_t len = earlier(left, link->want_len_max);
		const struct gw_fetch_request request = {
			.kind = GW_FETCH_REQUEST_WANT,
			.want = {.offset = offset,
				 .len = len,
				 .generation = gw_page_map_generation(link->arrival->map)},
		};
		const int err = send_request(link, &request, now_ns);

		/* The queue holds more than all wants together: only a dying call refuses. */
		if (err < 0) {
			link_fail(link, LINK_BROKEN);
			return -ENOTCONN;
		}
		link->wants[(link->want_first + link->want_count++) % link->want_cap] =
			(struct link_want){.offset = offset, .len = len};
		link->in_flight_bytes += len;
		offset += len;
		left -= len;
	}
	return 0;
}

void link_flush(struct arrival_link *link, uint64_t now_ns)
{
	if (link->conn)
		settle(link, link->cause == LINK_UP ? gw_grpc_flush(link->conn) : 0, now_ns);
}
