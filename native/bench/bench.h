/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bench.h - what the files of bench_page_path share: three processes, as in earnest, and a line of
 * JSON for each measurement.
 *
 * Threads    Three processes: the server (raw TCP and the page server), the guest (touches absent
 *            pages and times each touch), and the caller, which is the agent. Functions here are
 *            for the agent's main thread unless they say otherwise.
 * Errors     A failing call ends the process (check.h): a benchmark that limps measures nothing.
 * Ownership  What _start gives, _stop takes back. Both children die with the agent.
 * Units      Bytes, nanoseconds, pages of 4 KiB.
 * Source     tests/bench; docs/bench.
 */
#ifndef GODWIT_BENCH_H
#define GODWIT_BENCH_H

#include "check.h"

#include <stdatomic.h>
#include <stdint.h>
#include <sys/types.h>

#include <godwit/arrival.h>

#define PAGE		   4096ul
#define MIB		   (1ul << 20)
#define NS_PER_US	   1000ul
#define BENCH_GENERATION   1ul
#define BENCH_THREAD_MAX   8u
#define BENCH_SAMPLE_MAX   131072u
#define BENCH_WINDOW_COUNT 4u /* wants of 1 MiB in flight */

/* What the memory of the source holds. */
enum bench_kind {
	BENCH_RAW = 0,	      /* no two words alike: nothing can be saved */
	BENCH_ZERO_HEAVY = 1, /* nine pages of ten are zero, half of those are holes */
	BENCH_TEXT = 2,	      /* a quarter random, the rest repeats: compresses 3 to 1 */
	BENCH_HOLE = 3,	      /* nothing at all */
};

/* Of every page in every process: its first word. 0 where the page is zero. */
uint64_t bench_page_word(enum bench_kind kind, uint64_t page);
/* Fill a page; false: it is a hole, leave it alone. */
bool bench_page_fill(enum bench_kind kind, uint64_t page, uint8_t *ret_page);

/* --- the server ------------------------------------------------------------------------------- */

struct bench_server {
	pid_t pid;
	int control_fd; /* closing it ends the server */
	uint32_t page_port, raw_port;
	int memory_fd; /* its number in the server, for /proc/PID/fd */
	enum bench_kind kind;
	uint64_t len;
	uint64_t block_count; /* allocated at the source, 512 bytes each */
};

void bench_server_start(struct bench_server *server, enum bench_kind kind, uint64_t len);
void bench_server_stop(struct bench_server *server);
/* Blocks that the source's memory has now, of 512 bytes. */
uint64_t bench_server_blocks(const struct bench_server *server);

/* With the certificates of DIR/a and DIR/b from the next server on; "": plaintext. */
void bench_tls(const char *directory);
/* Of the server ("a") or the agent ("b"); NULL: plaintext. The caller gives it back. */
struct gw_tls_identity *bench_identity(const char *node);

/* --- the guest -------------------------------------------------------------------------------- */

struct bench_touches {
	uint32_t thread_count;
	uint32_t count;	   /* samples a thread */
	uint64_t think_ns; /* sleep between touches; 0: none */
	bool skip_present; /* pages that are there already are no faults */
	bool in_order;	   /* ascending, each thread a part; else far jumps */
};

/* In memory that agent and guest share. */
struct bench_share {
	struct bench_touches touches;
	enum bench_kind kind;
	_Atomic uint32_t running; /* threads */
	_Atomic uint64_t error_count;
	uint64_t begin_ns, end_ns;
	uint32_t sample_count[BENCH_THREAD_MAX];
	uint64_t samples[BENCH_THREAD_MAX][BENCH_SAMPLE_MAX];
};

struct bench_guest {
	pid_t pid;
	int socket_fd;
	int ram_fd;
	int uffd;
	uint64_t address, len;
	struct bench_share *share;
};

/* Its memory is registered and absent; it touches nothing yet. */
void bench_guest_start(struct bench_guest *guest, enum bench_kind kind, uint64_t len);
/* Begin; bench_guest_wait returns when all threads have done. */
void bench_guest_touch(struct bench_guest *guest, const struct bench_touches *touches);
bool bench_guest_is_done(const struct bench_guest *guest);
void bench_guest_wait(const struct bench_guest *guest);
void bench_guest_stop(struct bench_guest *guest);

/* --- commands --------------------------------------------------------------------------------- */

/* The floor: what sockets and the kernel take. */
void bench_tcp(const struct bench_server *server, uint32_t count);
void bench_stream(const struct bench_server *server, uint64_t len);
void bench_uffd(uint32_t count);
void bench_copy(uint32_t batch_page_count, uint64_t len);
/* Ours on the wire, nothing installed. */
void bench_wire_demand(const struct bench_server *server, uint32_t count);
void bench_wire_bulk(const struct bench_server *server, uint64_t len);
/* Ours whole. bulk: bytes a second; 0 = no limit; UINT64_MAX = no bulk. */
void bench_demand(const struct bench_server *server, uint64_t bulk,
		  const struct bench_touches *touches);
void bench_bulk(const struct bench_server *server, uint32_t connection_count);
/* Make the host give this machine its memory, once: a first touch costs 25 us a page. */
void bench_warm(uint64_t len);

/* --- output ----------------------------------------------------------------------------------- */

/* {"ns":[...]} without the braces. */
void bench_print_samples(const uint64_t *samples, size_t count);
void bench_print_rate(uint64_t len, uint64_t elapsed_ns);

#endif
