/* SPDX-License-Identifier: Apache-2.0 */
/*
 * uffd_probe.c - what userfaultfd can do here, by trying.
 *
 * Threads, Errors, Ownership, Units, Source: see uffd.h.
 *
 * A feature counts only if the kernel grants it alone on a fresh fd: what UFFDIO_API lists is
 * what it was built with. Rejected: reading the kernel's version, which distributions belie.
 */
#include <godwit/uffd.h>

#include <errno.h>
#include <sys/mman.h>

#include <godwit/sys.h>

#define PROBE_LEN	 4096U
#define CONTINUE_IOCTLS	 (UINT64_C(1) << _UFFDIO_CONTINUE)
#define MISSING_IOCTLS	 (UINT64_C(1) << _UFFDIO_COPY)
#define FEATURE_BIT_LAST 16U

const char *gw_uffd_feature_name(uint64_t feature)
{
	static const char *const names[FEATURE_BIT_LAST + 1] = {
		"pagefault-flag-wp",
		"event-fork",
		"event-remap",
		"event-remove",
		"missing-hugetlbfs",
		"missing-shmem",
		"event-unmap",
		"sigbus",
		"thread-id",
		"minor-hugetlbfs",
		"minor-shmem",
		"exact-address",
		"wp-hugetlbfs-shmem",
		"wp-unpopulated",
		"poison",
		"wp-async",
		"move",
	};

	if (feature == 0 || (feature & (feature - 1)) != 0)
		return NULL;
	const uint32_t bit = (uint32_t)__builtin_ctzll(feature);

	return bit <= FEATURE_BIT_LAST ? names[bit] : NULL;
}

/* True if a memfd can be registered in `mode` and offers `ioctls` then. */
static bool memfd_registers(int uffd, uint64_t mode, uint64_t ioctls)
{
	void *address = NULL;
	uint64_t offered = 0;
	bool works = false;
	const int fd = gw_sys_memfd_create("godwit-probe", MFD_CLOEXEC);

	if (fd < 0)
		return false;
	if (gw_sys_ftruncate(fd, PROBE_LEN) == 0 &&
	    gw_sys_mmap(NULL, PROBE_LEN, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0, &address) ==
		    0) {
		works = gw_uffd_register(uffd, (uintptr_t)address, PROBE_LEN, mode, &offered) ==
				0 &&
			(offered & ioctls) == ioctls;
		(void)gw_sys_munmap(address, PROBE_LEN);
	}
	(void)gw_sys_close(fd);
	return works;
}

static bool feature_works(uint64_t feature)
{
	uint64_t granted = 0;
	bool works;
	const int uffd = gw_uffd_open(feature, &granted);

	if (uffd < 0)
		return false;
	works = (granted & feature) != 0;
	if (works && feature == GW_UFFD_FEATURE_MISSING_SHMEM)
		works = memfd_registers(uffd, UFFDIO_REGISTER_MODE_MISSING, MISSING_IOCTLS);
	if (works && feature == GW_UFFD_FEATURE_MINOR_SHMEM)
		works = memfd_registers(uffd, UFFDIO_REGISTER_MODE_MINOR, CONTINUE_IOCTLS);
	(void)gw_sys_close(uffd);
	return works;
}

int gw_uffd_probe(uint64_t *ret_features)
{
	uint64_t listed = 0;
	uint64_t features = 0;
	/* Asking for nothing lists what there is. */
	const int uffd = gw_uffd_open(0, &listed);

	if (uffd < 0)
		return uffd;
	(void)gw_sys_close(uffd);
	for (uint32_t bit = 0; bit <= FEATURE_BIT_LAST; bit++) {
		const uint64_t feature = UINT64_C(1) << bit;

		if ((listed & feature) != 0 && feature_works(feature))
			features |= feature;
	}
	*ret_features = features;
	return 0;
}
