/* SPDX-License-Identifier: Apache-2.0 */
/*
 * serve.h - source half: serve the memory of images over gRPC, read-only.
 *
 * Threads    One server owns one epoll thread that accepts, and one thread a
 *            connection up to connection_count_max: a demand want is answered by
 *            the thread that read it and never waits for another connection.
 *            Every function may be called from any thread; none calls back.
 * Errors     A count or an outcome >= 0, or -errno; no logging.
 * Ownership  put_image duplicates `ram_fd`; the caller keeps its own. Memory is
 *            read by pread(2), and holes are found by SEEK_DATA before they are
 *            read, so that serving never inflates the source, and never dies of it.
 * Units      Bytes. Offsets are image offsets.
 * Source     protos/godwit/page/v1/page_service.proto; DESIGN 3.3.
 */
#ifndef GW_SERVE_H
#define GW_SERVE_H

#include <stddef.h>
#include <stdint.h>

#include <godwit/export.h>
#include <godwit/tls.h>

/* cdef:begin - extracted for cffi by tools/gen_ffi.py; keep it plain C. */

#define GW_SERVE_REGION_COUNT_MAX 64
#define GW_SERVE_TOKEN_KEY_LEN	  32 /* an Ed25519 public key */

/* Opaque. One per page-server process. */
struct gw_serve;

enum gw_image_state {
	GW_IMAGE_LIVE = 1,   /* the guest may run on this memory */
	GW_IMAGE_FROZEN = 2, /* paused: what is read is final */
};

struct gw_serve_config {
	uint32_t struct_size;	       /* sizeof(struct gw_serve_config) */
	uint32_t listen_port;	       /* 0 = any; see gw_serve_port */
	const char *listen_host;       /* numeric address */
	uint32_t connection_count_max; /* 1..1024; more are refused with UNAVAILABLE */
	uint32_t heartbeat_ms;	       /* silence after which a heartbeat is sent; 0 = 1000 */
	struct gw_tls_identity *tls;   /* NULL: plaintext; a reference is taken */
};

struct gw_serve_region {
	uint64_t gpa;	      /* guest-physical address of its first byte */
	uint64_t size;	      /* > 0 */
	uint64_t file_offset; /* of its first byte, in ram_fd */
	uint32_t page_size;   /* 4096 or 2097152 */
	uint32_t reserved;
};

struct gw_serve_image {
	uint32_t struct_size; /* sizeof(struct gw_serve_image) */
	int32_t ram_fd; /* tmpfs or hugetlbfs file, memfd, or /proc/PID/fd/N opened read-only */
	const char *image_id; /* 1..128 characters */
	const char *vm_id;
	const char *boot_id;
	uint64_t epoch;	     /* >= 1 */
	uint64_t inode;	     /* of ram_fd; 0 = unknown */
	uint64_t generation; /* >= 1 */
	uint32_t state;	     /* enum gw_image_state */
	uint32_t region_count;
	const struct gw_serve_region *regions; /* in image order */
	/*
	 * Who may read it, with TLS. Without, there is nobody to ask who he is.
	 */
	const char *destination;    /* a name of the peer's certificate; NULL or "": any node's */
	uint64_t destination_epoch; /* streams of an older one are refused; 0: see `epoch` */
	const uint8_t *destination_key; /* GW_TLS_KEY_LEN; pinned while FROZEN; NULL: none */
	const uint8_t *token_key;	/* GW_SERVE_TOKEN_KEY_LEN; NULL: no token is asked for */
};

struct gw_serve_stats {
	uint64_t connection_count; /* open now */
	uint64_t stream_count;	   /* Fetch streams open now */
	uint64_t connection_total; /* ever */
	uint64_t demand_page_total, bulk_page_total, zero_page_total;
	uint64_t sent_bytes_total; /* page bytes */
	uint64_t want_total;
	uint64_t refused_total; /* streams ended with an error status */
};

/*
 * Bind and listen: connections queue in the kernel and nobody is answered until
 * gw_serve_start, so that a server that comes back never says IMAGE_UNKNOWN of
 * an image that it has not been given yet.
 *
 * Returns 0; -EINVAL; -EADDRINUSE and other -errno of bind(2).
 */
int gw_serve_create(const struct gw_serve_config *config, struct gw_serve **ret_serve);

/* Accept and answer from now on. Returns 0; -EALREADY; -errno of a failing call. */
int gw_serve_start(struct gw_serve *serve);

/* The port bound. */
int gw_serve_port(const struct gw_serve *serve);

/*
 * Serve an image, or replace the record of the one of the same id. When it
 * returns, no message stamped with the old record will be started any more.
 *
 * Returns 0; -EINVAL; -EBADF; -EOVERFLOW a region leaves ram_fd; -ENOMEM; -ENOSPC as many keys
 * are pinned as there is room for.
 */
int gw_serve_put_image(struct gw_serve *serve, const struct gw_serve_image *image);

/* Stop serving an image; its streams end with NOT_FOUND. Returns 0; -ENOENT. */
int gw_serve_remove_image(struct gw_serve *serve, const char *image_id);

/* How many Fetch streams are open on an image, or -ENOENT. */
int gw_serve_image_stream_count(const struct gw_serve *serve, const char *image_id);

/* Copy out the counters. */
int gw_serve_stats(const struct gw_serve *serve, struct gw_serve_stats *ret_stats);

/* Refuse new connections and new streams with UNAVAILABLE; the open ones go on. */
int gw_serve_drain(struct gw_serve *serve);

/* Close everything, join. NULL is a no-op. */
void gw_serve_destroy(struct gw_serve *serve);

/* cdef:end */

#endif /* GW_SERVE_H */
