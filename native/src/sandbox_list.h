/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sandbox_list.h - which system calls are let through, and which are refused by name.
 *
 * Threads, Errors, Ownership, Units: none, these are constants.
 * Source     `strace -f` of every test of the page server and of arrivals, and what glibc may use in their
 *            place: the list says families, not what was seen on one day.
 *
 * Calls that only some architectures have stand behind #ifdef: the newer form stands beside them.
 */
#ifndef GW_SANDBOX_LIST_H
#define GW_SANDBOX_LIST_H

#include <sys/syscall.h>

/* Transfer through descriptors that are there; memory; waiting; threads that end. */
static const unsigned int allowed_everywhere[] = {
	/* The page path, in the order of how often. */
	SYS_epoll_pwait,
	SYS_read,
	SYS_write,
	SYS_readv,
	SYS_writev,
	SYS_pread64,
	SYS_pwrite64,
	SYS_preadv,
	SYS_pwritev,
	SYS_preadv2,
	SYS_pwritev2,
	SYS_recvfrom,
	SYS_sendto,
	SYS_recvmsg,
	SYS_sendmsg,
	SYS_recvmmsg,
	SYS_sendmmsg,
	SYS_lseek,
	SYS_futex,
	/* Waiting. */
	SYS_epoll_create1,
	SYS_epoll_ctl,
	SYS_ppoll,
	SYS_pselect6,
	SYS_eventfd2,
	SYS_timerfd_create,
	SYS_timerfd_settime,
	SYS_timerfd_gettime,
	SYS_nanosleep,
	SYS_clock_nanosleep,
	SYS_clock_gettime,
	SYS_clock_getres,
	SYS_gettimeofday,
	SYS_restart_syscall,
	/* Sockets that are there. */
	SYS_connect,
	SYS_shutdown,
	SYS_setsockopt,
	SYS_getsockopt,
	SYS_getsockname,
	SYS_getpeername,
	/* Memory of our own. */
	SYS_mmap,
	SYS_munmap,
	SYS_mremap,
	SYS_madvise,
	SYS_mprotect,
	SYS_mincore,
	SYS_msync,
	SYS_brk,
	SYS_membarrier,
	/* Descriptors. */
	SYS_close,
	SYS_close_range,
	SYS_dup,
	SYS_dup3,
	SYS_fcntl,
	SYS_fstat,
	SYS_statx,
	SYS_fstatfs,
	SYS_fsync,
	SYS_fdatasync,
	/* Threads, signals and what a C library asks by itself. */
	SYS_gettid,
	SYS_getpid,
	SYS_getppid,
	SYS_getuid,
	SYS_geteuid,
	SYS_getgid,
	SYS_getegid,
	SYS_getrusage,
	SYS_getrandom,
	SYS_getcpu,
	SYS_sysinfo,
	SYS_uname,
	SYS_sched_yield,
	SYS_sched_getaffinity,
	/* A lock of gRPC's that is contended: TLS does more under it. */
	SYS_sched_getparam,
	SYS_sched_getscheduler,
	SYS_set_robust_list,
	SYS_get_robust_list,
	SYS_set_tid_address,
	SYS_rseq,
	SYS_rt_sigaction,
	SYS_rt_sigprocmask,
	SYS_rt_sigreturn,
	SYS_rt_sigpending,
	SYS_rt_sigtimedwait,
	SYS_sigaltstack,
	SYS_exit,
	SYS_exit_group,
#ifdef SYS_epoll_wait
	SYS_epoll_wait,
#endif
#ifdef SYS_epoll_pwait2
	SYS_epoll_pwait2,
#endif
#ifdef SYS_poll
	SYS_poll,
#endif
#ifdef SYS_select
	SYS_select,
#endif
#ifdef SYS_time
	SYS_time,
#endif
#ifdef SYS_dup2
	SYS_dup2,
#endif
#ifdef SYS_futex_waitv
	SYS_futex_waitv,
#endif
#ifdef SYS_newfstatat
	SYS_newfstatat,
#endif
#ifdef SYS_fstatat
	SYS_fstatat,
#endif
};

/* An arrival's own: the page cache of the guest's memory, and its page map. */
static const unsigned int allowed_page_thread[] = {
	SYS_fallocate,
	SYS_ftruncate,
};

/* A page server reads files beneath what landlock lets it, listens, and starts threads. */
static const unsigned int allowed_page_server[] = {
	SYS_openat,
	SYS_openat2,
	SYS_accept,
	SYS_accept4,
	SYS_bind,
	SYS_listen,
	SYS_socketpair,
	SYS_pipe2,
	SYS_faccessat,
	SYS_readlinkat,
	SYS_getdents64,
	SYS_getcwd,
	SYS_statfs,
	SYS_fadvise64,
	SYS_memfd_create,
	SYS_getresuid,
	SYS_getresgid,
	SYS_getgroups,
	SYS_capget,
	SYS_times,
	SYS_landlock_create_ruleset,
	SYS_landlock_add_rule,
	SYS_landlock_restrict_self,
	SYS_seccomp,
#ifdef SYS_faccessat2
	SYS_faccessat2,
#endif
#ifdef SYS_open
	SYS_open,
#endif
#ifdef SYS_access
	SYS_access,
#endif
#ifdef SYS_readlink
	SYS_readlink,
#endif
#ifdef SYS_stat
	SYS_stat,
#endif
#ifdef SYS_lstat
	SYS_lstat,
#endif
#ifdef SYS_pipe
	SYS_pipe,
#endif
};

/* What an intruder would begin with. Not needed for safety, as what is on no list is ENOSYS: said clearly. */
static const unsigned int refused[] = {
	SYS_execve,
	SYS_execveat,
	SYS_ptrace,
	SYS_process_vm_readv,
	SYS_process_vm_writev,
	SYS_kill,
	SYS_tkill,
	SYS_mount,
	SYS_umount2,
	SYS_pivot_root,
	SYS_chroot,
	SYS_unshare,
	SYS_setns,
	SYS_init_module,
	SYS_finit_module,
	SYS_delete_module,
	SYS_kexec_load,
	SYS_bpf,
	SYS_perf_event_open,
	SYS_keyctl,
	SYS_add_key,
	SYS_request_key,
	SYS_userfaultfd,
	SYS_io_uring_setup,
	SYS_pidfd_open,
	SYS_pidfd_getfd,
	SYS_pidfd_send_signal,
	SYS_open_by_handle_at,
	SYS_reboot,
	SYS_swapon,
	SYS_swapoff,
	SYS_settimeofday,
	SYS_clock_settime,
	SYS_setuid,
	SYS_setgid,
	SYS_setresuid,
	SYS_setresgid,
	SYS_capset,
	SYS_acct,
	SYS_syslog,
	SYS_quotactl,
#ifdef SYS_fork
	SYS_fork,
#endif
#ifdef SYS_vfork
	SYS_vfork,
#endif
#ifdef SYS_kexec_file_load
	SYS_kexec_file_load,
#endif
#ifdef SYS_iopl
	SYS_iopl,
#endif
#ifdef SYS_ioperm
	SYS_ioperm,
#endif
#ifdef SYS_modify_ldt
	SYS_modify_ldt,
#endif
};

#endif
