/* SPDX-License-Identifier: Apache-2.0 */
/*
 * main.c - godwit-microvm: one small virtual machine, steered over a unix socket.
 *
 * Threads: the main thread is the control thread.
 * Errors: words on stderr; exit status 2 what was asked for cannot be, 1 the machine has failed.
 * Ownership: everything goes with the process, but for a named memory file.
 * Units: see USAGE.
 * Source: native/microvm/README.md.
 */
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "control.h"
#include "describe.h"

#define STATUS_FAILED	1
#define STATUS_REFUSED	2
#define QUIT_TIMEOUT_NS 2000000000ull
#define TICK_US_DEFAULT 1000u
#define MEMORY_DEFAULT	(256ull << 20)

static const char USAGE[] =
	"usage: godwit-microvm --control PATH [option]...\n"
	"  --control PATH          unix socket for JSON lines\n"
	"  --accel auto|kvm|thread auto: kvm, or thread where KVM cannot be used\n"
	"  --memory SIZE           64M to 254G, a multiple of 2M (default 256M)\n"
	"  --memory-file PATH      guest memory in this file, for others to map; else a memfd\n"
	"  --huge-pages            pages of 2 MiB\n"
	"  --vcpus N               1 to 32 (default 1)\n"
	"  --incoming              wait for `load`; the memory file may be there already\n"
	"  --paused                make a new guest, but wait for `resume`\n"
	"  --workload NAME         verify, sequential, hot, idle, measure (default verify)\n"
	"  --workload-size SIZE    memory that the workload keeps (default half)\n"
	"  --workload-offset SIZE  where in memory it begins (default 4M, which is the least)\n"
	"  --ops-per-second N      limit of each vCPU's page touches (default none)\n"
	"  --tick-us N             period of each vCPU's timer and heartbeat (default 1000)\n"
	"  --seed N                of the workload's random order (default 1)\n"
	"  --fault-socket PATH     memory comes through the agent that listens there (--incoming)\n"
	"  --fault-backend NAME    auto, kvm-userfault, exit-emulation, exit-sigsegv, uffd\n"
	"                          (default auto: the best that is possible)\n"
	"  --uffd-count N          deal memory out among so many userfaultfds (default 1)\n"
	"  --fault-spin-us N       how long a vCPU looks for its page before it sleeps (default "
	"0)\n"
	"  --beat-log PATH         append every heartbeat, 24 bytes each; machine.h\n"
	"  --die-with-parent       SIGKILL when the thread that started this process ends\n";

struct options {
	struct mv_machine_config config;
	const char *control;
	const char *fault_option; /* one that means nothing without --fault-socket */
	bool die_with_parent;
};

enum option_name {
	OPTION_CONTROL = 1,
	OPTION_ACCEL,
	OPTION_MEMORY,
	OPTION_MEMORY_FILE,
	OPTION_HUGE_PAGES,
	OPTION_VCPUS,
	OPTION_INCOMING,
	OPTION_PAUSED,
	OPTION_WORKLOAD,
	OPTION_WORKLOAD_SIZE,
	OPTION_WORKLOAD_OFFSET,
	OPTION_OPS_PER_SECOND,
	OPTION_TICK_US,
	OPTION_SEED,
	OPTION_FAULT_SOCKET,
	OPTION_FAULT_BACKEND,
	OPTION_UFFD_COUNT,
	OPTION_FAULT_SPIN_US,
	OPTION_BEAT_LOG,
	OPTION_DIE_WITH_PARENT,
	OPTION_HELP,
};

static const struct option OPTIONS[] = {
	{"control", required_argument, NULL, OPTION_CONTROL},
	{"accel", required_argument, NULL, OPTION_ACCEL},
	{"memory", required_argument, NULL, OPTION_MEMORY},
	{"memory-file", required_argument, NULL, OPTION_MEMORY_FILE},
	{"huge-pages", no_argument, NULL, OPTION_HUGE_PAGES},
	{"vcpus", required_argument, NULL, OPTION_VCPUS},
	{"incoming", no_argument, NULL, OPTION_INCOMING},
	{"paused", no_argument, NULL, OPTION_PAUSED},
	{"workload", required_argument, NULL, OPTION_WORKLOAD},
	{"workload-size", required_argument, NULL, OPTION_WORKLOAD_SIZE},
	{"workload-offset", required_argument, NULL, OPTION_WORKLOAD_OFFSET},
	{"ops-per-second", required_argument, NULL, OPTION_OPS_PER_SECOND},
	{"tick-us", required_argument, NULL, OPTION_TICK_US},
	{"seed", required_argument, NULL, OPTION_SEED},
	{"fault-socket", required_argument, NULL, OPTION_FAULT_SOCKET},
	{"fault-backend", required_argument, NULL, OPTION_FAULT_BACKEND},
	{"uffd-count", required_argument, NULL, OPTION_UFFD_COUNT},
	{"fault-spin-us", required_argument, NULL, OPTION_FAULT_SPIN_US},
	{"beat-log", required_argument, NULL, OPTION_BEAT_LOG},
	{"die-with-parent", no_argument, NULL, OPTION_DIE_WITH_PARENT},
	{"help", no_argument, NULL, OPTION_HELP},
	{NULL, 0, NULL, 0},
};

/* --- options ------------------------------------------------------------------------------------- */

static _Noreturn void refuse(const char *what, const char *why)
{
	fprintf(stderr, "godwit-microvm: %s: %s\n", what, why);
	exit(STATUS_REFUSED);
}

/* A decimal number, with K, M, G or nothing behind it. */
static uint64_t parse_number(const char *name, const char *text, bool size, uint64_t max)
{
	static const char suffixes[] = "KMG";
	const char *suffix;
	unsigned long long number;
	char *end;

	errno = 0;
	number = strtoull(text, &end, 10);
	if (text[0] < '0' || text[0] > '9' || errno != 0)
		refuse(name, "not a number");
	suffix = size && *end != '\0' ? strchr(suffixes, *end) : NULL;
	for (long i = suffix ? suffix - suffixes : -1; i >= 0; i--)
		if (__builtin_mul_overflow(number, 1024ull, &number))
			refuse(name, "too large");
	if (end[suffix ? 1 : 0] != '\0')
		refuse(name, size ? "a number, or one with K, M or G" : "not a number");
	if (number > max)
		refuse(name, "too large");
	return number;
}

static uint32_t parse_name(const char *option, const char *text, const char *const *names)
{
	for (uint32_t i = 0; names[i]; i++)
		if (strcmp(text, names[i]) == 0)
			return i;
	refuse(option, "not one of those that --help names");
}

static void set_fault_option(struct options *options, enum option_name name)
{
	struct mv_faults_config *faults = &options->config.faults;

	switch (name) {
	case OPTION_FAULT_SOCKET:
		faults->socket_path = optarg;
		break;
	case OPTION_FAULT_BACKEND:
		options->fault_option = "--fault-backend";
		if (gw_vmm_backend_by_name(optarg, &faults->backend) < 0)
			refuse("--fault-backend", "not one of those that --help names");
		break;
	case OPTION_UFFD_COUNT:
		options->fault_option = "--uffd-count";
		faults->uffd_count = (uint32_t)parse_number("--uffd-count", optarg, false,
							    GW_VMM_UFFD_COUNT_MAX);
		if (faults->uffd_count == 0)
			refuse("--uffd-count", "1 at least");
		break;
	default:
		options->fault_option = "--fault-spin-us";
		faults->spin_us = (uint32_t)parse_number("--fault-spin-us", optarg, false,
							 MV_FAULT_SPIN_US_MAX);
		break;
	}
}

static void set_option(struct options *options, enum option_name name)
{
	static const char *const accels[] = {"auto", "kvm", "thread", NULL};
	static const char *const workloads[] = {"verify", "sequential", "hot",
						"idle",	  "measure",	NULL};
	struct mv_machine_config *config = &options->config;

	switch (name) {
	case OPTION_CONTROL:
		options->control = optarg;
		break;
	case OPTION_ACCEL:
		config->accel = (enum mv_accel)parse_name("--accel", optarg, accels);
		break;
	case OPTION_MEMORY:
		config->memory.size = parse_number("--memory", optarg, true, UINT64_MAX);
		break;
	case OPTION_MEMORY_FILE:
		config->memory.path = optarg;
		break;
	case OPTION_HUGE_PAGES:
		config->memory.huge = true;
		break;
	case OPTION_VCPUS:
		config->vcpu_count = (uint32_t)parse_number("--vcpus", optarg, false, UINT32_MAX);
		break;
	case OPTION_INCOMING:
		config->memory.incoming = true;
		break;
	case OPTION_PAUSED:
		config->paused = true;
		break;
	case OPTION_WORKLOAD:
		config->workload = GM_WORKLOAD_VERIFY + parse_name("--workload", optarg, workloads);
		break;
	case OPTION_WORKLOAD_SIZE:
		config->work_bytes = parse_number("--workload-size", optarg, true, UINT64_MAX);
		break;
	case OPTION_WORKLOAD_OFFSET:
		config->work_offset = parse_number("--workload-offset", optarg, true, UINT64_MAX);
		break;
	case OPTION_OPS_PER_SECOND:
		config->op_count_per_s =
			parse_number("--ops-per-second", optarg, false, UINT32_MAX);
		break;
	case OPTION_TICK_US:
		config->tick_us = (uint32_t)parse_number("--tick-us", optarg, false, UINT32_MAX);
		break;
	case OPTION_SEED:
		config->seed = parse_number("--seed", optarg, false, UINT64_MAX);
		break;
	case OPTION_FAULT_SOCKET:
	case OPTION_FAULT_BACKEND:
	case OPTION_UFFD_COUNT:
	case OPTION_FAULT_SPIN_US:
		set_fault_option(options, name);
		break;
	case OPTION_BEAT_LOG:
		config->beat_log = optarg;
		break;
	case OPTION_DIE_WITH_PARENT:
		options->die_with_parent = true;
		break;
	case OPTION_HELP:
		fputs(USAGE, stdout);
		exit(EXIT_SUCCESS);
	}
}

static struct options parse_options(int argc, char **argv)
{
	struct options options = {.config = {.memory.size = MEMORY_DEFAULT,
					     .vcpu_count = 1,
					     .workload = GM_WORKLOAD_VERIFY,
					     .tick_us = TICK_US_DEFAULT,
					     .faults.uffd_count = 1,
					     .seed = 1}};
	int name;

	while ((name = getopt_long(argc, argv, "", OPTIONS, NULL)) != -1) {
		if (name == '?')
			exit(STATUS_REFUSED); /* getopt has said why */
		set_option(&options, (enum option_name)name);
	}
	if (optind < argc)
		refuse(argv[optind], "what is that?");
	if (!options.control)
		refuse("--control", "is missing");
	if (options.fault_option && !options.config.faults.socket_path)
		refuse(options.fault_option, "is for --fault-socket");
	return options;
}

/* --- the process --------------------------------------------------------------------------------- */

/* Blocked before any thread starts, so that all of them inherit it. */
static int make_signal_fd(void)
{
	sigset_t signals;

	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&signals);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGINT);
	sigaddset(&signals, SIGHUP);
	if (sigprocmask(SIG_BLOCK, &signals, NULL) < 0)
		return -errno;
	return signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
}

static void say_ready(struct mv_control *control)
{
	struct mv_text *text = &control->reply;

	text->len = 0;
	mv_text_add(text, "{\"event\":\"ready\"");
	mv_describe(control->machine, control->path, text);
	mv_text_add(text, "}\n");
	(void)fwrite(text->bytes, 1, text->len, stdout);
	(void)fflush(stdout);
}

/*
 * A vCPU that sleeps in the kernel on absent memory cannot be joined, and of a failed machine there
 * may be such: then the process just ends.
 */
static void end(struct mv_machine *machine)
{
	struct mv_error error;

	if (mv_machine_failed(machine, &error))
		_exit(STATUS_FAILED);
	if (mv_machine_pause(machine, QUIT_TIMEOUT_NS, &error) == -ETIMEDOUT)
		_exit(EXIT_SUCCESS);
	mv_machine_destroy(machine);
}

static int run(const struct options *options, int signal_fd)
{
	struct mv_machine *machine;
	struct mv_control *control;
	struct mv_error error;
	int rc = mv_machine_create(&options->config, &machine, &error);

	if (rc < 0)
		refuse("the machine", error.text);
	rc = mv_control_create(machine, options->control, &control, &error);
	if (rc < 0) {
		mv_machine_destroy(machine);
		refuse("the control socket", error.text);
	}
	say_ready(control);
	rc = mv_control_run(control, signal_fd);
	mv_control_destroy(control);
	end(machine);
	return rc;
}

int main(int argc, char **argv)
{
	const struct options options = parse_options(argc, argv);
	int signal_fd;

	if (options.die_with_parent && prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
		refuse("--die-with-parent", strerror(errno));
	signal_fd = make_signal_fd();
	if (signal_fd < 0)
		refuse("signals", strerror(errno));
	return run(&options, signal_fd) < 0 ? STATUS_FAILED : EXIT_SUCCESS;
}
