/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_sandbox.c - what a filtered process and a filtered thread can still do, and what they cannot.
 *
 * Each case is a child of its own: there is no way out of a filter.
 */
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <godwit/sandbox.h>
#include <godwit/sys.h>

#define FILTERED 2 /* Seccomp: of proc_pid_status(5) */

static void in_child(void (*act)(void))
{
	const pid_t child = fork();
	int status;

	if (child == 0) {
		act();
		_exit(EXIT_SUCCESS);
	}
	CHECK(child > 0);
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK_EQ(status, 0);
}

#define RUN_IN_CHILD(act)                        \
	do {                                     \
		fprintf(stderr, "- %s\n", #act); \
		in_child(act);                   \
	} while (0)

static int filter_of(const char *status_path)
{
	FILE *const file = fopen(status_path, "re");
	char line[256];
	int mode = -1;

	CHECK(file);
	while (fgets(line, sizeof(line), file))
		if (strncmp(line, "Seccomp:", 8) == 0)
			mode = atoi(line + 8);
	(void)fclose(file);
	return mode;
}

/* -errno, or what the call gave. */
static long ask(long result)
{
	return result == -1 ? -errno : result;
}

static void forbidden_everywhere(void)
{
	char *const none[] = {NULL};

	CHECK_EQ(ask(execve("/bin/true", none, none)), -EPERM);
	CHECK_EQ(ask(ptrace(PTRACE_TRACEME, 0, NULL, NULL)), -EPERM);
	CHECK_EQ(ask(mount("none", "/", "tmpfs", 0, NULL)), -EPERM);
	CHECK_EQ(ask(syscall(SYS_bpf, 0, NULL, 0)), -EPERM);
	CHECK_EQ(ask(syscall(SYS_init_module, NULL, 0, "")), -EPERM);
	CHECK_EQ(ask(syscall(SYS_setns, -1, 0)), -EPERM);
	CHECK_EQ(ask(syscall(SYS_unshare, CLONE_NEWUSER)), -EPERM);
	CHECK_EQ(ask(syscall(SYS_kill, getppid(), 0)), -EPERM);
	CHECK_EQ(ask(syscall(SYS_tgkill, getppid(), getppid(), 0)), -EPERM);
	CHECK_EQ(ask(syscall(SYS_process_vm_readv, getppid(), NULL, 0, NULL, 0, 0)), -EPERM);
	CHECK_EQ(ask(syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL)) < 0, 1);
	CHECK_EQ(ask(socket(AF_PACKET, SOCK_RAW, 0)), -EAFNOSUPPORT);
	CHECK_EQ(ask(socket(AF_NETLINK, SOCK_RAW, 0)), -EAFNOSUPPORT);
	CHECK_EQ(ask(prctl(PR_SET_DUMPABLE, 0)), -EINVAL);
	/* Neither ours nor known to us. */
	CHECK_EQ(ask(syscall(SYS_swapon, "/", 0)), -EPERM);
	CHECK_EQ(ask(syscall(SYS_sethostname, "a", 1)), -ENOSYS);
	CHECK_EQ(ask(syscall(4000)), -ENOSYS);
}

static void work_everywhere(void)
{
	const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	void *const memory = malloc(1 << 20);
	char byte = 0;

	CHECK(fd >= 0);
	CHECK_EQ(close(fd), 0);
	CHECK(memory);
	free(memory);
	CHECK_EQ(syscall(SYS_getrandom, &byte, 1, 0), 1);
	CHECK_EQ(prctl(PR_SET_NAME, "filtered"), 0);
	CHECK_EQ(syscall(SYS_tgkill, getpid(), gettid(), 0), 0);
}

static void *a_thread(void *ran)
{
	*(bool *)ran = filter_of("/proc/thread-self/status") == FILTERED;
	return NULL;
}

static void page_server(void)
{
	bool ran = false;
	pthread_t thread;

	CHECK_EQ(gw_sandbox_enter(GW_SANDBOX_PAGE_SERVER, GW_SANDBOX_ENFORCE), 0);
	forbidden_everywhere();
	work_everywhere();
	CHECK_EQ(ask(fork()), -EPERM);
	CHECK_EQ(ask(ioctl(0, TIOCSTI, "x")), -ENOTTY);
	CHECK_EQ(pthread_create(&thread, NULL, a_thread, &ran), 0);
	CHECK_EQ(pthread_join(thread, NULL), 0);
	CHECK(ran);
}

static void page_thread(void)
{
	struct uffdio_range range = {0};

	CHECK_EQ(gw_sandbox_enter(GW_SANDBOX_PAGE_THREAD, GW_SANDBOX_ENFORCE), 0);
	forbidden_everywhere();
	work_everywhere();
	/* Past the filter: the kernel says what is wrong with them. */
	CHECK_EQ(ask(ioctl(-1, UFFDIO_WAKE, &range)), -EBADF);
	CHECK_EQ(ask(ioctl(-1, TCGETS, &range)), -EPERM);
	CHECK_EQ(ask(open("/etc/passwd", O_RDONLY | O_CLOEXEC)), -ENOSYS);
	CHECK_EQ(ask(syscall(SYS_accept4, -1, NULL, NULL, 0)), -ENOSYS);
}

static _Atomic bool leave;

static void *bystander(void *ret_mode)
{
	while (!leave)
		(void)sched_yield();
	*(int *)ret_mode = filter_of("/proc/thread-self/status");
	return NULL;
}

static int mode_of_another_after(uint32_t kind)
{
	int mode = -1;
	pthread_t thread;

	CHECK_EQ(pthread_create(&thread, NULL, bystander, &mode), 0);
	CHECK_EQ(gw_sandbox_enter(kind, GW_SANDBOX_ENFORCE), 0);
	leave = true;
	CHECK_EQ(pthread_join(thread, NULL), 0);
	return mode;
}

static void a_page_server_filters_all_its_threads(void)
{
	CHECK_EQ(mode_of_another_after(GW_SANDBOX_PAGE_SERVER), FILTERED);
}

static void a_page_thread_filters_itself(void)
{
	/* Looked at before: a page thread opens nothing. */
	const int own = open("/proc/thread-self/status", O_RDONLY | O_CLOEXEC);
	char text[4096] = {0};

	CHECK(own >= 0);
	CHECK_EQ(mode_of_another_after(GW_SANDBOX_PAGE_THREAD), 0);
	CHECK(pread(own, text, sizeof(text) - 1, 0) > 0);
	CHECK(strstr(text, "Seccomp:\t2"));
}

static void only_logged(void)
{
	CHECK_EQ(gw_sandbox_enter(GW_SANDBOX_PAGE_SERVER, GW_SANDBOX_LOG), 0);
	CHECK_EQ(ask(ioctl(-1, TIOCSTI, "x")), -EBADF);
	CHECK_EQ(ask(prctl(PR_SET_DUMPABLE, 1)), 0);
}

static void off_is_off(void)
{
	CHECK_EQ(gw_sandbox_enter(GW_SANDBOX_PAGE_SERVER, GW_SANDBOX_OFF), 0);
	CHECK_EQ(filter_of("/proc/self/status"), 0);
	CHECK_EQ(gw_sandbox_enter(GW_SANDBOX_PAGE_SERVER, 3), -EINVAL);
	CHECK_EQ(gw_sandbox_enter(3, GW_SANDBOX_ENFORCE), -EINVAL);
}

static void a_kernel_that_refuses_leaves_all_as_it_was(void)
{
	static const struct {
		enum gw_sys_call call;
		int err;
	} failures[] = {{GW_SYS_PRCTL, EINVAL},
			{GW_SYS_SECCOMP, EINVAL},
			{GW_SYS_SECCOMP, ENOSYS},
			{GW_SYS_SECCOMP, ENOMEM},
			{GW_SYS_SECCOMP, EACCES}};

	for (size_t i = 0; i < sizeof(failures) / sizeof(failures[0]); i++) {
		gw_sys_fail_nth(failures[i].call, 1, failures[i].err);
		CHECK_EQ(gw_sandbox_enter(GW_SANDBOX_PAGE_THREAD, GW_SANDBOX_ENFORCE),
			 -failures[i].err);
		CHECK_EQ(filter_of("/proc/self/status"), 0);
	}
	gw_sys_fail_none();
}

static void is_there(void)
{
	_exit(gw_sandbox_enter(GW_SANDBOX_PAGE_THREAD, GW_SANDBOX_ENFORCE) == 0 ? 0 : 1);
}

int main(void)
{
	const pid_t child = fork();
	int status;

	if (child == 0)
		is_there();
	CHECK_EQ(waitpid(child, &status, 0), child);
	RUN_IN_CHILD(off_is_off);
	check_need(status == 0, "seccomp", "a kernel with CONFIG_SECCOMP_FILTER, and no sanitizer");
	RUN_IN_CHILD(page_server);
	RUN_IN_CHILD(page_thread);
	RUN_IN_CHILD(a_page_server_filters_all_its_threads);
	RUN_IN_CHILD(a_page_thread_filters_itself);
	RUN_IN_CHILD(only_logged);
	RUN_IN_CHILD(a_kernel_that_refuses_leaves_all_as_it_was);
	return EXIT_SUCCESS;
}
