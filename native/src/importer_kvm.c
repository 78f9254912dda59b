/* SPDX-License-Identifier: Apache-2.0 */
/*
 * importer_kvm.c - the steps of an import as system calls: the content by the type's ioctl or through
 * the guest_memfd's window, the attribute by KVM_SET_MEMORY_ATTRIBUTES, then the bit.
 *
 * Threads, Errors, Ownership, Units: see importer.h.
 * Source     linux/kvm.h of 6.8; docs/design/private-pages.md.
 */
#include <godwit/importer.h>

#include <errno.h>
#include <linux/kvm.h>
#include <unistd.h>

#include <godwit/sys.h>

/* linux/kvm.h of 6.8. The distribution's is of 6.1. */
#ifndef KVM_SET_MEMORY_ATTRIBUTES
struct kvm_memory_attributes {
	uint64_t address;
	uint64_t size;
	uint64_t attributes;
	uint64_t flags;
};
#define KVM_SET_MEMORY_ATTRIBUTES _IOW(KVMIO, 0xd2, struct kvm_memory_attributes)
#endif

_Static_assert(sizeof(struct kvm_memory_attributes) == 32, "part of the ABI");

/* The region of a page, and how many of count_max pages are in it. */
static const struct gw_kvm_import_region *region_of(const struct gw_kvm_importer *kvm,
						    uint64_t first, uint64_t count_max,
						    uint64_t *ret_count)
{
	for (uint32_t i = 0; i < kvm->region_count; i++) {
		const struct gw_kvm_import_region *const region = &kvm->regions[i];

		if (first < region->first_page || first - region->first_page >= region->page_count)
			continue;
		const uint64_t left = region->page_count - (first - region->first_page);

		*ret_count = count_max < left ? count_max : left;
		return region;
	}
	return NULL;
}

static uint64_t offset_in(const struct gw_kvm_importer *kvm,
			  const struct gw_kvm_import_region *region, uint64_t page)
{
	return (page - region->first_page) * kvm->page_size;
}

static int64_t import_by_call(const struct gw_import_call *call,
			      const struct gw_import_piece *piece)
{
	_Alignas(uint64_t) uint8_t argument[GW_IMPORT_ARGUMENT_LEN_MAX] = {0};

	call->fill(argument, piece);
	const int result = gw_sys_ioctl(call->fd, call->request, argument);
	const uint64_t left = call->left(argument);

	/* Nonsense about its progress: nobody knows what is in the first page. */
	if (left > piece->page_count || (result >= 0 && left == piece->page_count))
		return -EIO;
	/* Nothing was taken, and the error is the first page's; else what was taken comes first. */
	if (left == piece->page_count)
		return result;
	return (int64_t)(piece->page_count - left);
}

/*
 * process_vm_writev to ourselves, not memcpy: a page that the guest_memfd cannot give (no memory,
 * private already, poisoned) is an error here and would be a SIGBUS there.
 */
static int64_t import_by_window(uint8_t *window, const struct gw_import_piece *piece,
				uint32_t page_size)
{
	const struct iovec local = {.iov_base = (void *)(uintptr_t)piece->data,
				    .iov_len = piece->page_count * page_size};
	const struct iovec remote = {.iov_base = window, .iov_len = local.iov_len};
	const ssize_t written = gw_sys_process_vm_writev(getpid(), &local, &remote);

	/* Part of a page is none; writing it again harms nothing, nobody sees it before the flip. */
	return written < 0 ? written : written / (ssize_t)page_size;
}

static int64_t kvm_import(void *self, uint64_t first, uint64_t count, const uint8_t *data)
{
	const struct gw_kvm_importer *const kvm = self;
	uint64_t here;
	const struct gw_kvm_import_region *const region = region_of(kvm, first, count, &here);

	if (!region)
		return -EFAULT;
	const uint64_t offset = offset_in(kvm, region, first);
	const struct gw_import_piece piece = {
		.gpa = region->gpa + offset, .page_count = here, .data = data};

	if (kvm->call)
		return import_by_call(kvm->call, &piece);
	return import_by_window(region->window + offset, &piece, kvm->page_size);
}

static int kvm_set_attributes(void *self, uint64_t first, uint64_t count, uint64_t attributes)
{
	const struct gw_kvm_importer *const kvm = self;

	for (uint64_t done = 0, here; done < count; done += here) {
		const struct gw_kvm_import_region *const region =
			region_of(kvm, first + done, count - done, &here);

		if (!region)
			return -EFAULT;
		struct kvm_memory_attributes argument = {
			.address = region->gpa + offset_in(kvm, region, first + done),
			.size = here * kvm->page_size,
			.attributes = attributes,
		};
		const int result = gw_sys_ioctl(kvm->vm_fd, KVM_SET_MEMORY_ATTRIBUTES, &argument);

		if (result < 0)
			return result;
	}
	return 0;
}

static void kvm_publish(void *self, uint64_t first, uint64_t count)
{
	const struct gw_kvm_importer *const kvm = self;

	(void)gw_bitmap_publish(kvm->bitmap, first, count);
	if (kvm->on_published)
		kvm->on_published(kvm->opaque, first, count);
}

const struct gw_importer_ops gw_kvm_importer_ops = {
	.import = kvm_import,
	.set_attributes = kvm_set_attributes,
	.publish = kvm_publish,
};
