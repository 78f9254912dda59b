/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm_message.c - the text of the hand-off, made once: the same for every agent that comes.
 *
 * Threads, Errors, Ownership, Units: see vmm.h.
 * Source     docs/exit-channel.md, section 1.
 */
#include "vmm_internal.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct text {
	char *bytes;
	size_t len;
	bool is_cut;
};

__attribute__((format(printf, 2, 3))) static void add(struct text *text, const char *format, ...)
{
	const size_t room = GW_VMM_MESSAGE_LEN_MAX - text->len;
	va_list arguments;

	va_start(arguments, format);
	/* NOLINTNEXTLINE(clang-analyzer-valist.Uninitialized): said when files are checked together. */
	const int len = vsnprintf(text->bytes + text->len, room, format, arguments);

	va_end(arguments);
	if (len < 0 || (size_t)len >= room)
		text->is_cut = true;
	else
		text->len += (size_t)len;
}

/* With its quotes; cut at len_max; what is not printable ASCII is a question mark. */
static void add_string(struct text *text, const char *string, size_t len_max)
{
	add(text, "\"");
	for (size_t i = 0; string[i] != '\0' && i < len_max; i++) {
		const char byte = string[i] >= ' ' && string[i] <= '~' ? string[i] : '?';

		add(text, byte == '"' || byte == '\\' ? "\\%c" : "%c", byte);
	}
	add(text, "\"");
}

static void add_fds(struct text *text, const struct gw_vmm *vmm)
{
	add(text, "\"fds\": [\"memory\"");
	if (vmm->words)
		add(text, ", \"channel\", \"doorbell\"");
	for (uint32_t i = 0; i < vmm->uffd_count; i++)
		add(text, ", \"uffd\"");
	add(text, "]");
}

static void add_piece(struct text *text, const struct gw_vmm *vmm, const struct gw_vmm_piece *piece)
{
	add(text,
	    "{\"base_host_virt_addr\": %" PRIu64 ", \"size\": %" PRIu64 ", \"offset\": %" PRIu64
	    ", \"page_size\": %" PRIu32 ", \"page_size_kib\": %" PRIu32
	    ", \"guest_phys_addr\": %" PRIu64,
	    piece->address, piece->len, piece->offset, vmm->page_size, vmm->page_size, piece->gpa);
	if (vmm->uffd_count > 0)
		add(text, ", \"uffd\": %" PRIu32, piece->uffd);
	add(text, "}");
}

int gw_vmm_message_create(struct gw_vmm *vmm, const char *vmm_name, const char *why)
{
	struct text text = {.bytes = malloc(GW_VMM_MESSAGE_LEN_MAX)};

	if (!text.bytes)
		return -ENOMEM;
	add(&text,
	    "{\"protocol\": \"godwit-exit-channel\", \"version\": %u, \"vmm\": ", GW_EXIT_VERSION);
	add_string(&text, vmm_name, GW_VMM_NAME_LEN_MAX);
	add(&text, ", \"pid\": %ld, \"backend\": \"%s\", \"backend_reason\": ", (long)getpid(),
	    gw_vmm_backend_name(vmm->backend));
	add_string(&text, why ? why : "", GW_VMM_REASON_LEN_MAX);
	add(&text, ", \"vcpu_count\": %" PRIu32 ", ", vmm->vcpu_count);
	add_fds(&text, vmm);
	add(&text, ", \"mappings\": [");
	for (uint32_t i = 0; i < vmm->piece_count; i++) {
		if (i > 0)
			add(&text, ", ");
		add_piece(&text, vmm, &vmm->pieces[i]);
	}
	add(&text, "]}\n");
	/* Sixteen regions in sixteen parts are below half of it. */
	if (text.is_cut) {
		free(text.bytes);
		return -EMSGSIZE;
	}
	vmm->message = text.bytes;
	vmm->message_len = text.len;
	return 0;
}

uint32_t gw_vmm_message_fds(const struct gw_vmm *vmm, int ret_fds[GW_VMM_FD_COUNT_MAX])
{
	uint32_t count = 0;

	ret_fds[count++] = vmm->ram_fd;
	if (vmm->words) {
		ret_fds[count++] = vmm->channel_fd;
		ret_fds[count++] = vmm->doorbell_fd;
	}
	for (uint32_t i = 0; i < vmm->uffd_count; i++)
		ret_fds[count++] = vmm->uffds[i];
	return count;
}
