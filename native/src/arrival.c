/* SPDX-License-Identifier: Apache-2.0 */
/*
 * arrival.c - an arriving guest: made, started, told, asked, ended.
 *
 * Threads, Errors, Ownership, Units, Source: see arrival.h and arrival_internal.h.
 */
#include "arrival_internal.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#include <godwit/sandbox.h>
#include <godwit/sys.h>

/* --- shared by the threads -------------------------------------------------------------------- */

static void set_reason(struct gw_arrival *arrival, bool final, const char *format,
		       va_list arguments)
{
	char text[GW_ARRIVAL_REASON_LEN_MAX];

	/* NOLINTNEXTLINE(clang-analyzer-valist.Uninitialized): said when files are checked together. */
	(void)vsnprintf(text, sizeof(text), format, arguments);
	(void)pthread_mutex_lock(&arrival->text_lock);
	if (final || !arrival->reason_is_final)
		memcpy(arrival->reason, text, sizeof(text));
	arrival->reason_is_final = arrival->reason_is_final || final;
	(void)pthread_mutex_unlock(&arrival->text_lock);
}

void arrival_set_reason(struct gw_arrival *arrival, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	set_reason(arrival, false, format, arguments);
	va_end(arguments);
}

void arrival_set_final_reason(struct gw_arrival *arrival, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	set_reason(arrival, true, format, arguments);
	va_end(arguments);
}

static void ring(int fd)
{
	const uint64_t one = 1;

	/* EAGAIN: it rings already. */
	(void)gw_sys_write(fd, &one, sizeof(one));
}

void arrival_wake_demand(struct gw_arrival *arrival)
{
	ring(arrival->wake_fd);
}

void arrival_wake_bulk(struct gw_arrival *arrival)
{
	for (uint32_t i = 0; i < arrival->bulk_count; i++)
		ring(arrival->bulks[i].wake_fd);
}

int arrival_drain_fd(int fd)
{
	uint64_t count;
	const ssize_t got = gw_sys_read(fd, &count, sizeof(count));

	return got < 0 ? (int)got : 0;
}

bool arrival_is_fetching(const struct gw_arrival *arrival)
{
	return gw_page_map_generation(arrival->map) != 0 &&
	       !gw_page_map_is_violated(arrival->map) && !atomic_load(&arrival->gone);
}

bool arrival_is_over(const struct gw_arrival *arrival)
{
	return gw_page_map_is_violated(arrival->map) || atomic_load(&arrival->gone) ||
	       gw_bitmap_absent_count(gw_page_map_bitmap_const(arrival->map)) == 0;
}

void arrival_on_outcome(struct gw_arrival *arrival, int outcome)
{
	switch (outcome) {
	case GW_INSTALL_DONE:
	case GW_INSTALL_STOPPED:
		return;
	case GW_INSTALL_GONE:
		atomic_store(&arrival->gone, true);
		arrival_set_final_reason(arrival, "the guest's process is gone");
		break;
	case GW_INSTALL_VIOLATED:
		arrival_set_final_reason(arrival,
					 "a page was touched before it was installed, or the "
					 "memory is not registered any more: the guest is held");
		break;
	case GW_INSTALL_FULL:
		arrival_set_reason(arrival, "no room for a page: the guest waits, tried again");
		break;
	default:
		arrival_set_reason(arrival, "install: %s: tried again", strerror(-outcome));
		break;
	}
	if (outcome == GW_INSTALL_FULL || outcome < 0) {
		/* Whoever waits asks again; for pages that nobody waits for any more, bulk does. */
		atomic_store(&arrival->wake_all_ns, gw_sys_now_ns() + ARRIVAL_FULL_RETRY_NS);
		atomic_fetch_add(&arrival->returned_version, 1);
	}
	arrival_wake_demand(arrival);
}

/* --- create and destroy ----------------------------------------------------------------------- */

static bool copy_text(char *ret_text, size_t size, const char *text, bool may_be_empty)
{
	if (!text || strlen(text) >= size || (!may_be_empty && text[0] == '\0'))
		return false;
	(void)snprintf(ret_text, size, "%s", text);
	return true;
}

static bool copy_token(struct gw_arrival *arrival, const uint8_t *token, uint64_t len)
{
	if (len > sizeof(arrival->token) || (len > 0 && !token))
		return false;
	(void)pthread_mutex_lock(&arrival->text_lock);
	if (len > 0)
		memcpy(arrival->token, token, len);
	arrival->token_len = len;
	(void)pthread_mutex_unlock(&arrival->text_lock);
	return true;
}

static bool copy_config(struct gw_arrival *arrival, const struct gw_arrival_config *config)
{
	if (config->struct_size != sizeof(*config) || config->sandbox > GW_SANDBOX_ENFORCE ||
	    config->epoch == 0 || config->page_port == 0 || config->page_port > UINT16_MAX ||
	    config->adopt > 1 || config->bulk_connection_count == 0 ||
	    config->bulk_connection_count > GW_ARRIVAL_BULK_CONNECTION_COUNT_MAX ||
	    config->region_count == 0 || config->region_count > GW_ARRIVAL_REGION_COUNT_MAX ||
	    !config->regions || !config->page_map_path ||
	    (config->page_size != 4096 && config->page_size != UINT32_C(2) << 20) ||
	    config->uffd_count > GW_ARRIVAL_UFFD_COUNT_MAX ||
	    (config->uffd_count > 0 && !config->uffds) ||
	    (config->exit_channel_fd < 0) != (config->exit_doorbell_fd < 0) ||
	    /* A guest that nothing of ours can hold back would read zeros. */
	    (config->uffd_count == 0 && config->exit_channel_fd < 0))
		return false;
	arrival->page_size = config->page_size;
	arrival->sandbox = config->sandbox;
	arrival->epoch = config->epoch;
	arrival->port = config->page_port;
	arrival->bulk_count = config->bulk_connection_count;
	atomic_store(&arrival->rate, config->bulk_bytes_per_s_max);
	arrival->tls = gw_tls_identity_ref(config->tls);
	return copy_token(arrival, config->token, config->token_len) &&
	       copy_text(arrival->server_name, sizeof(arrival->server_name),
			 config->page_server_name ? config->page_server_name : "", !config->tls) &&
	       copy_text(arrival->image_id, sizeof(arrival->image_id), config->image_id, false) &&
	       copy_text(arrival->session_id, sizeof(arrival->session_id), config->session_id,
			 false) &&
	       copy_text(arrival->host, sizeof(arrival->host), config->page_host, false) &&
	       copy_text(arrival->traceparent, sizeof(arrival->traceparent),
			 config->traceparent ? config->traceparent : "", true);
}

/* Before there are threads: events are read so that installs go on; who faulted is woken later. */
static int adopt_again(void *user)
{
	struct gw_arrival *const arrival = user;

	demand_read_events(&arrival->demand);
	return 0;
}

static int open_uffd(int fd, int *ret_uffd)
{
	const int is_uffd = gw_uffd_is_uffd(fd);
	int uffd;
	int flags;

	if (is_uffd != 1)
		return is_uffd < 0 ? is_uffd : -EINVAL;
	uffd = gw_sys_dup(fd);
	if (uffd < 0)
		return uffd;
	/* A blocking one would hold the demand thread, and poll says EPOLLERR of it. */
	flags = gw_sys_fcntl(uffd, F_GETFL, 0);
	if (flags >= 0 && (flags & O_NONBLOCK) == 0)
		flags = gw_sys_fcntl(uffd, F_SETFL, flags | O_NONBLOCK);
	if (flags < 0) {
		(void)gw_sys_close(uffd);
		return flags;
	}
	*ret_uffd = uffd;
	return 0;
}

static int open_fds(struct gw_arrival *arrival, const struct gw_arrival_config *config)
{
	for (uint32_t i = 0; i < config->uffd_count; i++) {
		const int err = open_uffd(config->uffds[i], &arrival->uffds[i]);

		if (err < 0)
			return err;
		arrival->uffd_count++;
	}
	if (config->exit_channel_fd >= 0) {
		arrival->doorbell_fd = gw_sys_dup(config->exit_doorbell_fd);
		if (arrival->doorbell_fd < 0)
			return arrival->doorbell_fd;
	}
	arrival->ram_fd = gw_sys_dup(config->ram_fd);
	if (arrival->ram_fd < 0)
		return arrival->ram_fd;
	arrival->wait_fd = gw_sys_eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (arrival->wait_fd < 0)
		return arrival->wait_fd;
	arrival->wake_fd = gw_sys_eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return arrival->wake_fd < 0 ? arrival->wake_fd : 0;
}

static int open_map(struct gw_arrival *arrival, const struct gw_arrival_config *config)
{
	struct gw_page_map_identity identity = {
		.epoch = config->epoch,
		.page_size = config->page_size,
		.install_method = config->install_method,
		.image_id = arrival->image_id,
	};

	for (uint32_t i = 0; i < config->region_count; i++)
		identity.page_count += config->regions[i].len / config->page_size;
	arrival->page_count = identity.page_count;
	const int err = prefetch_init(&arrival->prefetch, arrival->page_count, config->page_size);

	if (err < 0)
		return err;
	return config->adopt ? gw_page_map_adopt(config->page_map_path, &identity, &arrival->map)
			     : gw_page_map_create(config->page_map_path, &identity, &arrival->map);
}

/* Empty, or as a predecessor left it. */
static int check_memory(struct gw_arrival *arrival, const struct gw_arrival_config *config)
{
	const struct gw_install_again again = {.on_again = adopt_again, .user = arrival};
	int err = gw_install_init(&arrival->install, arrival->uffds, arrival->uffd_count,
				  arrival->ram_fd, config->page_size, config->install_method,
				  arrival->map, config->regions, config->region_count);

	if (err < 0)
		return err;
	err = config->adopt ? gw_install_adopt(&arrival->install, &again)
			    : gw_install_check_empty(&arrival->install);
	/* After the adoption: the vCPUs' bitmap is made what ours then is. */
	if (err == 0 && config->exit_channel_fd >= 0)
		err = gw_exits_attach(config->exit_channel_fd, config->page_size,
				      gw_page_map_bitmap(arrival->map), &arrival->exits);
	arrival->install.exits = arrival->exits;
	if (err < 0 || !config->adopt)
		return err;
	/* Events that the dead one had read are nobody's now: everybody faults again. */
	return gw_install_wake_all(&arrival->install);
}

static int init_threads(struct gw_arrival *arrival)
{
	int err = demand_init(&arrival->demand, arrival);

	for (uint32_t i = 0; i < arrival->bulk_count && err == 0; i++)
		err = bulk_init(&arrival->bulks[i], arrival, i + 1);
	return err;
}

static struct gw_arrival *allocate(void)
{
	struct gw_arrival *const arrival = calloc(1, sizeof(*arrival));

	if (!arrival)
		return NULL;
	if (pthread_mutex_init(&arrival->text_lock, NULL) != 0) {
		free(arrival);
		return NULL;
	}
	arrival->doorbell_fd = -1;
	arrival->ram_fd = -1;
	arrival->wait_fd = -1;
	arrival->wake_fd = -1;
	arrival->demand.arrival = arrival;
	arrival->demand.epoll_fd = -1;
	for (uint32_t i = 0; i < GW_ARRIVAL_BULK_CONNECTION_COUNT_MAX; i++) {
		arrival->bulks[i].epoll_fd = -1;
		arrival->bulks[i].wake_fd = -1;
	}
	atomic_store(&arrival->phase, GW_ARRIVAL_CONNECTING);
	return arrival;
}

int gw_arrival_create(const struct gw_arrival_config *config, struct gw_arrival **ret_arrival)
{
	struct gw_arrival *const arrival = allocate();
	bool map_is_new = false;
	int err;

	if (!arrival)
		return -ENOMEM;
	err = copy_config(arrival, config) ? 0 : -EINVAL;
	if (err == 0)
		err = open_fds(arrival, config);
	if (err == 0) {
		err = open_map(arrival, config);
		map_is_new = err == 0 && !config->adopt;
	}
	if (err == 0)
		err = check_memory(arrival, config);
	if (err == 0)
		err = init_threads(arrival);
	if (err < 0) {
		gw_arrival_destroy(arrival);
		/* Nobody has asked for a page by it. */
		if (map_is_new)
			(void)gw_page_map_unlink(config->page_map_path);
		return err;
	}
	atomic_store(&arrival->demand_down_ns, gw_sys_now_ns());
	if (config->adopt)
		hold_adopt(arrival);
	if (gw_page_map_is_violated(arrival->map)) {
		arrival_set_final_reason(arrival,
					 "a predecessor saw a violation: the guest is held");
		atomic_store(&arrival->phase, GW_ARRIVAL_VIOLATION);
	} else if (arrival_is_over(arrival)) {
		atomic_store(&arrival->phase, GW_ARRIVAL_COMPLETE);
	}
	*ret_arrival = arrival;
	return 0;
}

static void stop_threads(struct gw_arrival *arrival, uint32_t started_count)
{
	atomic_store(&arrival->stopping, true);
	if (started_count > 0) {
		arrival_wake_demand(arrival);
		(void)pthread_join(arrival->demand.thread, NULL);
	}
	arrival_wake_bulk(arrival);
	for (uint32_t i = 1; i < started_count; i++)
		(void)pthread_join(arrival->bulks[i - 1].thread, NULL);
}

void gw_arrival_destroy(struct gw_arrival *arrival)
{
	if (!arrival)
		return;
	if (arrival->started)
		stop_threads(arrival, arrival->bulk_count + 1);
	rate_enter(arrival, false);
	gw_pacer_destroy(arrival->pacer);
	demand_fini(&arrival->demand);
	for (uint32_t i = 0; i < GW_ARRIVAL_BULK_CONNECTION_COUNT_MAX; i++)
		bulk_fini(&arrival->bulks[i]);
	prefetch_fini(&arrival->prefetch);
	gw_install_fini(&arrival->install);
	gw_exits_detach(arrival->exits);
	gw_page_map_destroy(arrival->map);
	for (uint32_t i = 0; i < arrival->uffd_count; i++)
		(void)gw_sys_close(arrival->uffds[i]);
	const int fds[] = {arrival->doorbell_fd, arrival->ram_fd, arrival->wait_fd,
			   arrival->wake_fd};

	for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++)
		if (fds[i] >= 0)
			(void)gw_sys_close(fds[i]);
	gw_tls_identity_unref(arrival->tls);
	(void)pthread_mutex_destroy(&arrival->text_lock);
	free(arrival);
}

int gw_arrival_start(struct gw_arrival *arrival)
{
	sigset_t all;
	sigset_t before;
	uint32_t started_count = 0;
	int err;

	if (arrival->started)
		return -EALREADY;
	/* Signals are the embedding program's: none is handled in our threads. */
	sigfillset(&all);
	(void)pthread_sigmask(SIG_SETMASK, &all, &before);
	err = pthread_create(&arrival->demand.thread, NULL, demand_main, &arrival->demand);
	while (err == 0 && ++started_count <= arrival->bulk_count) {
		struct arrival_bulk *const bulk = &arrival->bulks[started_count - 1];

		err = pthread_create(&bulk->thread, NULL, bulk_main, bulk);
	}
	(void)pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (err != 0) {
		stop_threads(arrival, started_count);
		atomic_store(&arrival->stopping, false);
		return -err;
	}
	arrival->started = true;
	(void)pthread_setname_np(arrival->demand.thread, "gw-demand");
	for (uint32_t i = 0; i < arrival->bulk_count; i++)
		(void)pthread_setname_np(arrival->bulks[i].thread, "gw-bulk");
	return 0;
}

/* --- told ------------------------------------------------------------------------------------- */

int gw_arrival_set_order(struct gw_arrival *arrival, const struct gw_page_run *runs, uint32_t count)
{
	return arrival->started ? -EALREADY : prefetch_set_order(&arrival->prefetch, runs, count);
}

int gw_arrival_order(const struct gw_arrival *arrival, struct gw_page_run *ret_runs,
		     uint32_t count_max)
{
	return (int)prefetch_faults(&arrival->prefetch, ret_runs, count_max);
}

int gw_arrival_open_gate(struct gw_arrival *arrival, uint64_t generation)
{
	const int err = gw_page_map_set_generation(arrival->map, generation);

	if (err < 0)
		return err;
	arrival_wake_demand(arrival);
	arrival_wake_bulk(arrival);
	return 0;
}

int gw_arrival_start_bulk(struct gw_arrival *arrival)
{
	if (gw_page_map_generation(arrival->map) == 0)
		return -EAGAIN;
	if (!atomic_load(&arrival->bulk_started))
		atomic_store(&arrival->bulk_full_ns, gw_sys_now_ns() + ARRIVAL_NEAR_NS);
	atomic_store(&arrival->bulk_started, true);
	arrival_wake_bulk(arrival);
	return 0;
}

int gw_arrival_set_bulk_rate(struct gw_arrival *arrival, uint64_t bytes_per_s_max)
{
	atomic_store(&arrival->rate, bytes_per_s_max);
	/* What was sent under the old limit is forgotten: a lane that waited an hour goes on now. */
	atomic_store(&arrival->rate_next_ns, 0);
	arrival_wake_bulk(arrival);
	return 0;
}

int gw_arrival_share(struct gw_arrival *arrival, struct gw_pacer *pacer, uint32_t weight)
{
	if (!pacer || weight == 0 || weight > GW_PACER_WEIGHT_MAX)
		return -EINVAL;
	if (arrival->started || arrival->pacer)
		return -EALREADY;
	gw_pacer_ref(pacer);
	arrival->pacer = pacer;
	arrival->weight = weight;
	return 0;
}

int gw_arrival_set_page_server(struct gw_arrival *arrival, const char *host, uint32_t port)
{
	char checked[ARRIVAL_HOST_LEN_MAX + 1];

	if (port == 0 || port > UINT16_MAX || !copy_text(checked, sizeof(checked), host, false))
		return -EINVAL;
	(void)pthread_mutex_lock(&arrival->text_lock);
	memcpy(arrival->host, checked, sizeof(checked));
	arrival->port = port;
	atomic_fetch_add(&arrival->server_version, 1);
	(void)pthread_mutex_unlock(&arrival->text_lock);
	arrival_wake_demand(arrival);
	arrival_wake_bulk(arrival);
	return 0;
}

int gw_arrival_set_token(struct gw_arrival *arrival, const uint8_t *token, uint64_t len)
{
	return copy_token(arrival, token, len) ? 0 : -EINVAL;
}

int gw_arrival_finish(struct gw_arrival *arrival)
{
	if (atomic_load(&arrival->phase) != GW_ARRIVAL_COMPLETE)
		return -EBUSY;
	/* Before: an event that is read now may be answered when there is no registration any more. */
	atomic_store(&arrival->install.released, true);
	for (uint32_t i = 0; i < arrival->install.region_count; i++) {
		const struct gw_install_region *const region = &arrival->install.regions[i];
		const int err =
			region->uffd < 0
				? 0
				: gw_uffd_unregister(region->uffd, region->host_addr,
						     region->page_count * arrival->page_size);

		if (err < 0)
			return err;
	}
	return 0;
}

/* --- asked ------------------------------------------------------------------------------------ */

int gw_arrival_page_server_key(const struct gw_arrival *arrival, uint8_t *ret_key)
{
	/* The lock is no part of what the caller sees as const. */
	struct gw_arrival *const mine = (struct gw_arrival *)arrival;
	bool known;

	(void)pthread_mutex_lock(&mine->text_lock);
	known = mine->has_server_key;
	if (known)
		memcpy(ret_key, mine->server_key, GW_TLS_KEY_LEN);
	(void)pthread_mutex_unlock(&mine->text_lock);
	return known ? 0 : -ENOENT;
}

int gw_arrival_wait_fd(const struct gw_arrival *arrival)
{
	return arrival->wait_fd;
}

static bool bulk_is_done(const struct gw_arrival *arrival)
{
	if (gw_bitmap_absent_count(gw_page_map_bitmap_const(arrival->map)) == 0)
		return true;
	if (!atomic_load(&arrival->bulk_started))
		return false;
	for (uint32_t i = 0; i < arrival->bulk_count; i++)
		if (!atomic_load(&arrival->bulks[i].idle))
			return false;
	return true;
}

int gw_arrival_status(const struct gw_arrival *arrival, struct gw_arrival_status *ret_status)
{
	const struct gw_page_map *const map = arrival->map;
	const uint64_t down_ns = atomic_load(&arrival->demand_down_ns);
	const uint64_t now_ns = gw_sys_now_ns();
	pthread_mutex_t *const text_lock = (pthread_mutex_t *)(uintptr_t)&arrival->text_lock;
	struct gw_arrival_status status = {
		.phase = atomic_load(&arrival->phase),
		.bulk_done = bulk_is_done(arrival),
		.grpc_status = atomic_load(&arrival->grpc_status),
		.page_count = arrival->page_count,
		.absent_count = gw_bitmap_absent_count(gw_page_map_bitmap_const(map)),
		.demand_page_count = gw_page_map_counter(map, GW_COUNT_DEMAND_PAGE),
		.bulk_page_count = gw_page_map_counter(map, GW_COUNT_BULK_PAGE),
		.zero_page_count = gw_page_map_counter(map, GW_COUNT_ZERO_PAGE),
		.removed_page_count = gw_page_map_counter(map, GW_COUNT_REMOVED_PAGE),
		.fault_count = gw_page_map_counter(map, GW_COUNT_FAULT),
		.held_fault_count = atomic_load(&arrival->demand.faults.count),
		.received_bytes = gw_page_map_counter(map, GW_COUNT_RECEIVED_BYTES),
		.checksum_error_count = gw_page_map_counter(map, GW_COUNT_CHECKSUM_ERROR),
		.reconnect_count = gw_page_map_counter(map, GW_COUNT_RECONNECT),
		.violation_count = gw_page_map_counter(map, GW_COUNT_VIOLATION),
		.link_lost_ns = down_ns != 0 && now_ns > down_ns && !arrival_is_over(arrival)
					? now_ns - down_ns
					: 0,
	};

	hold_status(arrival, &status);
	gw_histogram_summarise(&arrival->latency, &status.fault_latency);
	prefetch_summarise(&arrival->prefetch, &status.prefetch, &status.recorded);
	(void)pthread_mutex_lock(text_lock);
	memcpy(status.reason, arrival->reason, sizeof(status.reason));
	(void)pthread_mutex_unlock(text_lock);
	*ret_status = status;
	return 0;
}

int gw_arrival_bitmap(const struct gw_arrival *arrival, uint8_t *ret_bitmap, size_t len)
{
	const uint64_t wanted = (arrival->page_count + 7) / 8;

	if (len < wanted)
		return -ENOSPC;
	gw_bitmap_copy(gw_page_map_bitmap_const(arrival->map), ret_bitmap);
	return (int)wanted;
}

int gw_arrival_page_state(const struct gw_arrival *arrival, uint64_t offset)
{
	const uint64_t page = offset / arrival->page_size;

	return page < arrival->page_count ? gw_page_map_get(arrival->map, page) : -ENOENT;
}

uint64_t gw_arrival_generation(const struct gw_arrival *arrival)
{
	return gw_page_map_generation(arrival->map);
}
