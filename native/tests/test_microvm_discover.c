/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_microvm_discover.c - instructions of every kind, run for real on memory that is absent. Each
 * runs twice on KVM from one state: on present memory, and with every page of it behind the exit channel
 * (exit-emulation), served by an agent thread. Registers, flags and memory must come out the same, and
 * no page may have been fetched that the instruction does not touch.
 */
#include "test_microvm.h"

#if defined(__x86_64__)

#include <godwit/bitmap.h>
#include <godwit/exits.h>
#include <godwit/uffd.h>
#include <linux/kvm.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "decode.h"
#include "kvm.h"

#define CODE_START    0x201000ull /* where a form's code begins, if it says nothing else */
#define CODE_EPILOGUE 0x20e000ull
#define CODE_STUB     0x20f000ull
#define DATA	      0x800000ull /* what %rsi is */
#define DATA_PAGES    16u
#define HOLE_PAGE     8u	  /* the pages from here on are zero */
#define RESULT	      0x900000ull /* where the epilogue leaves all registers */
#define FD_COUNT_MAX  8u
#define REQUEST_COUNT 16u

#define STRING_(x) #x
#define STRING(x)  STRING_(x)

/* --- the forms ----------------------------------------------------------------------------------- */

#define FORM(name, code)                                                                       \
	extern const uint8_t form_##name[], form_##name##_end[];                               \
	__asm__(".pushsection .rodata\n.code64\n.globl form_" #name ", form_" #name "_end\n"   \
		"form_" #name ":\n" code "\n movabs $0x20e000, %r14\n jmp *%r14\n form_" #name \
		"_end:\n.popsection\n")

FORM(load_8, "movb 5(%rsi), %al");
FORM(load_16, "movw 6(%rsi), %ax");
FORM(load_32, "movl 0x1004(%rsi), %eax");
FORM(load_64, "movq 0x1008(%rsi), %rax");
FORM(load_cross, "movq 0xffc(%rsi), %rax");
FORM(load_extend,
     "movzbl 0xfff(%rsi), %eax\n movswq 0x1ffe(%rsi), %rcx\n movslq 0x2ffc(%rsi), %rdx");
FORM(load_rip, "movq 0x5feff9(%rip), %rax");
FORM(store_rip, "movl $0x12345678, 0x5feff6(%rip)");
FORM(load_sib, "mov $5, %ecx\n movq 0x10(%rsi,%rcx,8), %rax");
FORM(load_sib_rex, "mov $-512, %r12\n lea 0x2000(%rsi), %r13\n movq (%r13,%r12,8), %r9");
FORM(load_sib_no_base, "mov $2, %ecx\n movq 0x800ff8(,%rcx,8), %rax");
FORM(load_disp8, "lea 0x1010(%rsi), %rbp\n movq -0x20(%rbp), %rax");
FORM(load_address32, "movabs $0x700000000, %rax\n add %rsi, %rax\n movl 8(%eax), %eax");
FORM(load_segment, "movq %fs:0x2008(%rsi), %rax");
FORM(load_absolute, "movabs 0x803010, %rax");
FORM(store_8, "movb %bl, 0x3001(%rsi)");
FORM(store_16, "movw $0x1234, 0x3002(%rsi)");
FORM(store_32, "movl $0x12345678, 0x800(%rsi)");
FORM(store_64, "movq %rbx, 0x7f8(%rsi)");
FORM(store_cross, "movl %ebx, 0x2ffe(%rsi)");
FORM(alu, "addq 0x100(%rsi), %rax\n subl $5, 0x1100(%rsi)\n cmpb $9, 0x2100(%rsi)");
FORM(shift,
     "mov $3, %cl\n shlq %cl, (%rsi)\n sarl $2, 0x1000(%rsi)\n shldq $9, %rbx, 0x2000(%rsi)");
FORM(unary,
     "notq (%rsi)\n incl 0x1000(%rsi)\n testl $0x55aa, 0x2000(%rsi)\n testb $1, 0x3000(%rsi)");
FORM(multiply,
     "mov $7, %eax\n mulq (%rsi)\n imulq $3, 0x1000(%rsi), %rcx\n imulq 0x2000(%rsi), %rbx");
FORM(conditional, "cmp %rax, %rax\n cmoveq (%rsi), %rax\n sete 0x1000(%rsi)");
FORM(exchange, "xchgq %rbx, 0x2000(%rsi)");
FORM(lock_xadd, "mov $1, %eax\n lock xaddq %rax, (%rsi)");
FORM(lock_inc, "lock incq 0x1000(%rsi)");
FORM(lock_cmpxchg,
     "movq $9, %rdx\n lock cmpxchgq %rdx, 0x1000(%rsi)\n lock cmpxchgq %rdx, 0x1000(%rsi)");
FORM(cmpxchg8b, "lock cmpxchg8b 0x20(%rsi)");
FORM(cmpxchg16b, "lock cmpxchg16b 0x1020(%rsi)\n lock cmpxchg16b 0x1020(%rsi)");
FORM(bit_register,
     "mov $0x8005, %eax\n btq %rax, (%rsi)\n mov $-8, %rcx\n btsq %rcx, 0x3000(%rsi)");
FORM(bit_immediate, "lock btsq $63, 0x1000(%rsi)");
FORM(rep_movs, "mov $1024, %ecx\n lea 0x4000(%rsi), %rdi\n rep movsq");
FORM(rep_movs_back, "std\n mov $1000, %ecx\n lea 0x1ff0(%rsi), %rsi\n lea 0x4000(%rsi), %rdi\n"
		    " rep movsb\n cld");
FORM(rep_stos, "mov $0x5a, %eax\n mov $8192, %ecx\n mov %rsi, %rdi\n rep stosb");
FORM(scan, "mov %rsi, %rdi\n xor %eax, %eax\n mov $600, %ecx\n repne scasq");
FORM(compare, "mov $600, %ecx\n lea 0x3000(%rsi), %rdi\n mov %rdi, %rsi\n repe cmpsq");
FORM(load_string, "lodsq\n lea 0x1000(%rsi), %rsi\n lodsb");
FORM(push_pop, "lea 0x3000(%rsi), %rsp\n push %rbx\n push $-5\n pop %rax\n pop %rcx");
FORM(push_cross, "lea 0x3004(%rsi), %rsp\n push %rbx");
FORM(push_flags, "lea 0x2008(%rsi), %rsp\n pushf\n popf\n pushw $7");
FORM(push_memory, "lea 0x4000(%rsi), %rsp\n pushq 0x2008(%rsi)\n popq 0x5000(%rsi)");
FORM(pop_to_stack, "lea 0x2ff8(%rsi), %rsp\n popq (%rsp)");
FORM(call_register, "lea 0x4000(%rsi), %rsp\n mov $0x20f000, %eax\n call *%rax");
FORM(call_memory, "lea 0x4000(%rsi), %rsp\n call *0x1000(%rsi)");
FORM(call_near, "lea 0x4000(%rsi), %rsp\n call 1f\n 1: nop");
FORM(jump_memory, "jmp *0x2000(%rsi)");
FORM(ret, "lea 0x2000(%rsi), %rsp\n ret");
FORM(ret_pops, "lea 0x2000(%rsi), %rsp\n ret $0x10");
FORM(enter_leave, "lea 0x3010(%rsi), %rsp\n enter $0x1000, $0\n leave");
FORM(enter_levels, "lea 0x5010(%rsi), %rsp\n lea 0x2004(%rsi), %rbp\n enter $0x20, $3");
FORM(leave, "lea 0x3ff8(%rsi), %rbp\n leave");
FORM(translate, "lea 0x1000(%rsi), %rbx\n mov $9, %al\n xlat");
FORM(movups, "movups 0x1ff8(%rsi), %xmm0\n movups %xmm0, 0x3ff8(%rsi)");
FORM(movaps, "movaps 0x1ff0(%rsi), %xmm0\n movdqa %xmm0, 0x2ff0(%rsi)");
FORM(scalars, "movss 0xffc(%rsi), %xmm0\n movsd 0x1ff8(%rsi), %xmm1\n movq 0x2ff8(%rsi), %xmm0");
FORM(movd, "movd 0xffc(%rsi), %xmm0\n movq %xmm0, 0x1ff8(%rsi)\n movnti %rbx, 0x2ff8(%rsi)");
FORM(packed, "paddq 0x1000(%rsi), %xmm0\n pshufd $0x1b, 0x2000(%rsi), %xmm1");
FORM(fxsave, "fxsave 0xf00(%rsi)");
FORM(x87, "fldt 0xff8(%rsi)\n fstpl 0x2ff8(%rsi)");
FORM(prefetch, "prefetcht0 0x1000(%rsi)\n nopl 0x2000(%rsi)\n lea 0x3000(%rsi), %rax");
FORM(hole_load, "movq 0x8000(%rsi), %rax");
FORM(hole_store, "movq %rbx, 0x8ffc(%rsi)");
FORM(hole_lock, "lock incq 0xa008(%rsi)");
FORM(hole_and_page, "mov $512, %ecx\n lea 0x8000(%rsi), %rdi\n rep movsq");
FORM(unknown, "verr (%rsi)");

struct form {
	const char *name;
	const uint8_t *code;
	const uint8_t *end;
	uint32_t page_count; /* of DATA, that it touches */
	uint32_t lead;	     /* so many bytes of it are in the page before; 0: all are in one */
};

#define ENTRY(name, pages)                                      \
	{                                                       \
#name, form_##name, form_##name##_end, pages, 0 \
	}
#define SPLIT(name, pages, lead)                                   \
	{                                                          \
#name, form_##name, form_##name##_end, pages, lead \
	}

static const struct form FORMS[] = {
	ENTRY(load_8, 1),
	ENTRY(load_16, 1),
	ENTRY(load_32, 1),
	ENTRY(load_64, 1),
	ENTRY(load_cross, 2),
	ENTRY(load_extend, 3),
	ENTRY(load_rip, 1),
	ENTRY(store_rip, 1),
	ENTRY(load_sib, 1),
	ENTRY(load_sib_rex, 1),
	ENTRY(load_sib_no_base, 1),
	ENTRY(load_disp8, 1),
	ENTRY(load_address32, 1),
	ENTRY(load_segment, 1),
	ENTRY(load_absolute, 1),
	ENTRY(store_8, 1),
	ENTRY(store_16, 1),
	ENTRY(store_32, 1),
	ENTRY(store_64, 1),
	ENTRY(store_cross, 2),
	ENTRY(alu, 3),
	ENTRY(shift, 3),
	ENTRY(unary, 4),
	ENTRY(multiply, 3),
	ENTRY(conditional, 2),
	ENTRY(exchange, 1),
	ENTRY(lock_xadd, 1),
	ENTRY(lock_inc, 1),
	ENTRY(lock_cmpxchg, 1),
	ENTRY(cmpxchg8b, 1),
	ENTRY(cmpxchg16b, 1),
	ENTRY(bit_register, 2),
	ENTRY(bit_immediate, 1),
	ENTRY(rep_movs, 4),
	ENTRY(rep_movs_back, 2),
	ENTRY(rep_stos, 2),
	ENTRY(scan, 2),
	ENTRY(compare, 2),
	ENTRY(load_string, 2),
	ENTRY(push_pop, 1),
	ENTRY(push_cross, 2),
	ENTRY(push_flags, 1),
	ENTRY(push_memory, 3),
	ENTRY(pop_to_stack, 2),
	ENTRY(call_register, 1),
	ENTRY(call_memory, 2),
	ENTRY(call_near, 1),
	ENTRY(jump_memory, 1),
	ENTRY(ret, 1),
	ENTRY(ret_pops, 1),
	ENTRY(enter_leave, 2),
	ENTRY(enter_levels, 4),
	ENTRY(leave, 1),
	ENTRY(translate, 1),
	ENTRY(movups, 4),
	ENTRY(movaps, 2),
	ENTRY(scalars, 3),
	ENTRY(movd, 3),
	ENTRY(packed, 2),
	ENTRY(fxsave, 2),
	ENTRY(x87, 3),
	ENTRY(prefetch, 0),
	ENTRY(hole_load, 1),
	ENTRY(hole_store, 2),
	ENTRY(hole_lock, 1),
	ENTRY(hole_and_page, 2),
	SPLIT(load_64, 1, 3),
	SPLIT(store_32, 1, 9),
	SPLIT(lock_xadd, 1, 6),
};

extern const uint8_t epilogue[], epilogue_end[], stub[], stub_end[];
__asm__(".pushsection .rodata\n.code64\n"
	".globl epilogue, epilogue_end, stub, stub_end\n"
	"epilogue:\n"
	"	mov %rax, (%r15)\n"
	"	lahf\n"
	"	mov %rax, 0x08(%r15)\n"
	"	mov %rcx, 0x10(%r15)\n"
	"	mov %rdx, 0x18(%r15)\n"
	"	mov %rbx, 0x20(%r15)\n"
	"	mov %rsp, 0x28(%r15)\n"
	"	mov %rbp, 0x30(%r15)\n"
	"	mov %rsi, 0x38(%r15)\n"
	"	mov %rdi, 0x40(%r15)\n"
	"	mov %r9, 0x48(%r15)\n"
	"	mov %r12, 0x50(%r15)\n"
	"	mov %r13, 0x58(%r15)\n"
	"	movups %xmm0, 0x60(%r15)\n"
	"	movups %xmm1, 0x70(%r15)\n"
	"	in $0x15, %eax\n" /* GM_CALL_VERIFIED wakes the test */
	"1:	mov $1000000, %ebx\n"
	"	in $0x12, %eax\n" /* GM_CALL_IDLE */
	"	jmp 1b\n"
	"epilogue_end:\n"
	"stub:	inc %rdx\n"
	"	ret\n"
	"stub_end:\n"
	".popsection\n");
_Static_assert(GM_PORT_BASE + GM_CALL_VERIFIED == 0x15 && GM_PORT_BASE + GM_CALL_IDLE == 0x12,
	       "epilogue");

/* --- the machine that a form starts in ------------------------------------------------------------ */

static void write_at(struct mv_machine *machine, uint64_t gpa, const uint8_t *from,
		     const uint8_t *end)
{
	memcpy(machine->memory.base + gpa, from, (size_t)(end - from));
}

static void fill_data(struct mv_machine *machine)
{
	uint64_t *words = (uint64_t *)(machine->memory.base + DATA);

	for (uint64_t i = 0; i < HOLE_PAGE * GM_PAGE_SIZE / 8; i++)
		words[i] = (i + 1) * 0x9E3779B97F4A7C15ull;
	words[0x1000 / 8] = CODE_STUB;
	words[0x2000 / 8] = CODE_EPILOGUE;
}

static void set_registers(struct mv_machine *machine, uint64_t rip)
{
	const int fd = mv_kvm_vcpu_of(&machine->vcpus[0])->fd;
	struct kvm_regs regs;

	CHECK_EQ(mv_kvm_ioctl(fd, KVM_GET_REGS, &regs), 0);
	regs.rip = rip;
	regs.rsi = DATA;
	regs.r15 = RESULT;
	regs.rbx = 0x1122334455667788;
	regs.rcx = 0;
	regs.rdx = 0;
	CHECK_EQ(mv_kvm_ioctl(fd, KVM_SET_REGS, &regs), 0);
}

static struct mv_machine *make_source(const struct form *form)
{
	const uint64_t start = form->lead > 0 ? CODE_START + GM_PAGE_SIZE - form->lead : CODE_START;
	struct mv_machine_config config = test_config(MV_ACCEL_KVM, 1);
	struct mv_machine *machine;

	config.paused = true;
	machine = test_machine(&config);
	write_at(machine, start, form->code, form->end);
	write_at(machine, CODE_EPILOGUE, epilogue, epilogue_end);
	write_at(machine, CODE_STUB, stub, stub_end);
	fill_data(machine);
	set_registers(machine, start);
	return machine;
}

/* --- the agent ------------------------------------------------------------------------------------ */

struct agent {
	const struct mv_memory *source;
	char directory[32];
	char path[64];
	int listen_fd;
	int stop_fd;
	pthread_t thread;
	/* after the hand-off */
	struct mv_machine *machine;
	struct gw_exits *exits;
	int fds[FD_COUNT_MAX]; /* memory, channel, doorbell, uffd */
	uint8_t fetched[MEMORY_BYTES / GM_PAGE_SIZE];
};

static void agent_listen(struct agent *agent)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};

	(void)snprintf(agent->directory, sizeof(agent->directory), "/tmp/godwit-discover-XXXXXX");
	CHECK(mkdtemp(agent->directory));
	(void)snprintf(agent->path, sizeof(agent->path), "%s/agent", agent->directory);
	memcpy(address.sun_path, agent->path, strlen(agent->path) + 1);
	agent->listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK_EQ(bind(agent->listen_fd, (const struct sockaddr *)&address, sizeof(address)), 0);
	CHECK_EQ(listen(agent->listen_fd, 1), 0);
	agent->stop_fd = eventfd(0, EFD_CLOEXEC);
}

static void take_hand_off(struct agent *agent, int connection)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(FD_COUNT_MAX * sizeof(int))];
	} passed;
	char text[16384];
	struct iovec iov = {.iov_base = text, .iov_len = sizeof(text)};
	struct msghdr message = {.msg_iov = &iov,
				 .msg_iovlen = 1,
				 .msg_control = passed.bytes,
				 .msg_controllen = sizeof(passed.bytes)};
	static uint64_t words[MEMORY_BYTES / GM_PAGE_SIZE / 64];
	struct gw_bitmap own;
	struct cmsghdr *rights;

	CHECK(recvmsg(connection, &message, MSG_CMSG_CLOEXEC) > 0);
	rights = CMSG_FIRSTHDR(&message);
	CHECK(rights && rights->cmsg_len == CMSG_LEN(4 * sizeof(int)));
	memcpy(agent->fds, CMSG_DATA(rights), 4 * sizeof(int));
	memset(words, 0, sizeof(words));
	gw_bitmap_init(&own, words, MEMORY_BYTES / GM_PAGE_SIZE);
	gw_bitmap_mark_absent(&own, 0, MEMORY_BYTES / GM_PAGE_SIZE);
	CHECK_EQ(gw_exits_attach(agent->fds[1], GM_PAGE_SIZE, &own, &agent->exits), 0);
}

/* A page that is zero at the source stays a hole: its bit alone says that the guest may have it. */
static void agent_install(struct agent *agent, uint64_t page)
{
	static const uint8_t zeros[GM_PAGE_SIZE];
	const uint64_t address = (uintptr_t)agent->machine->memory.base + page * GM_PAGE_SIZE;
	uint8_t content[GM_PAGE_SIZE];
	uint64_t done;

	CHECK_EQ(pread(agent->source->fd, content, sizeof(content), (off_t)(page * GM_PAGE_SIZE)),
		 sizeof(content));
	if (memcmp(content, zeros, sizeof(content)) != 0 || page * GM_PAGE_SIZE < GM_SYSTEM_SIZE) {
		const int outcome =
			gw_uffd_copy(agent->fds[3], address, content, sizeof(content), &done);

		CHECK(outcome == GW_UFFD_DONE || outcome == GW_UFFD_EXISTS);
	}
	agent->fetched[page] = 1;
	gw_exits_publish(agent->exits, page, 1);
	CHECK(gw_uffd_wake(agent->fds[3], address, GM_PAGE_SIZE) >= 0);
}

static void agent_serve(struct agent *agent)
{
	struct gw_exit_request requests[REQUEST_COUNT];
	struct uffd_msg message;
	uint32_t count;

	while ((count = gw_exits_take(agent->exits, requests, REQUEST_COUNT)) > 0)
		for (uint32_t i = 0; i < count; i++)
			agent_install(agent, requests[i].page);
	while (read(agent->fds[3], &message, sizeof(message)) == sizeof(message)) {
		CHECK_EQ(message.event, UFFD_EVENT_PAGEFAULT);
		agent_install(agent, (message.arg.pagefault.address -
				      (uintptr_t)agent->machine->memory.base) /
					     GM_PAGE_SIZE);
	}
}

static void *agent_main(void *argument)
{
	struct agent *agent = argument;
	const int connection = accept(agent->listen_fd, NULL, NULL);

	CHECK(connection >= 0);
	take_hand_off(agent, connection);
	for (;;) {
		struct pollfd pollers[] = {{.fd = agent->fds[2], .events = POLLIN},
					   {.fd = agent->fds[3], .events = POLLIN},
					   {.fd = agent->stop_fd, .events = POLLIN}};
		uint64_t rung;

		agent_serve(agent);
		if (!gw_exits_sleep(agent->exits))
			continue;
		CHECK(poll(pollers, 3, -1) > 0);
		gw_exits_awake(agent->exits);
		if (pollers[0].revents != 0)
			CHECK_EQ(read(agent->fds[2], &rung, sizeof(rung)), sizeof(rung));
		if (pollers[2].revents != 0)
			break;
	}
	close(connection);
	return NULL;
}

static void agent_end(struct agent *agent)
{
	const uint64_t one = 1;

	CHECK_EQ(write(agent->stop_fd, &one, sizeof(one)), sizeof(one));
	pthread_join(agent->thread, NULL);
	gw_exits_detach(agent->exits);
	for (uint32_t i = 0; i < 4; i++)
		close(agent->fds[i]);
	close(agent->listen_fd);
	close(agent->stop_fd);
	unlink(agent->path);
	rmdir(agent->directory);
}

/* --- twice ---------------------------------------------------------------------------------------- */

static void load_and_run(struct mv_machine *machine, const uint8_t *state, size_t len)
{
	load_machine(machine, state, len);
	resume_machine(machine);
}

static void await_end(struct mv_machine *machine)
{
	struct watch watch = {0};

	while (atomic_load(&machine->vcpus[0].counters.hypercall_count) == 0) {
		await_notice(machine);
		watch_events(machine, &watch);
		CHECK_EQ(watch.failed, 0);
	}
	pause_machine(machine);
}

static struct mv_machine *make_absent(struct agent *agent, const struct mv_machine *source)
{
	struct mv_machine_config config = source->config;

	*agent = (struct agent){.source = &source->memory};
	agent_listen(agent);
	config.paused = false;
	config.memory.incoming = true;
	config.faults = (struct mv_faults_config){
		.socket_path = agent->path,
		.backend = GW_VMM_EXIT_EMULATION,
		.uffd_count = 1,
	};
	agent->machine = test_machine(&config);
	CHECK_EQ(pthread_create(&agent->thread, NULL, agent_main, agent), 0);
	return agent->machine;
}

static void compare(const struct form *form, const struct agent *agent,
		    const struct mv_machine *reference, const struct mv_machine *absent)
{
	uint32_t data_pages = 0;

	/* The system area has ticks in it, which are as many as there was time. */
	for (uint64_t page = GM_SYSTEM_SIZE / GM_PAGE_SIZE; page < MEMORY_BYTES / GM_PAGE_SIZE;
	     page++) {
		const struct mv_memory *where = agent->fetched[page] ? &absent->memory
								     : agent->source;
		uint64_t got[GM_PAGE_SIZE / 8], want[GM_PAGE_SIZE / 8];

		CHECK_EQ(pread(reference->memory.fd, want, sizeof(want),
			       (off_t)(page * GM_PAGE_SIZE)),
			 sizeof(want));
		CHECK_EQ(pread(where->fd, got, sizeof(got), (off_t)(page * GM_PAGE_SIZE)),
			 sizeof(got));
		for (size_t i = 0; i < GM_PAGE_SIZE / 8; i++) {
			if (got[i] == want[i])
				continue;
			fprintf(stderr, "%s: page %#llx word %zu: %#llx, not %#llx\n", form->name,
				(unsigned long long)page, i, (unsigned long long)got[i],
				(unsigned long long)want[i]);
			abort();
		}
	}
	for (uint64_t page = DATA / GM_PAGE_SIZE; page < DATA / GM_PAGE_SIZE + DATA_PAGES; page++)
		data_pages += agent->fetched[page];
	if (data_pages != form->page_count)
		fprintf(stderr, "%s: %u pages, not %u\n", form->name, data_pages, form->page_count);
	CHECK_EQ(data_pages, form->page_count);
}

static void run_form(const struct form *form)
{
	static struct agent agent;
	struct mv_machine *source = make_source(form);
	struct mv_machine *reference = incoming_for(source);
	struct mv_machine *absent = make_absent(&agent, source);
	size_t len;
	uint8_t *state = save_machine(source, &len);

	copy_memory(&source->memory, &reference->memory);
	load_and_run(reference, state, len);
	await_end(reference);
	load_and_run(absent, state, len);
	await_end(absent);
	compare(form, &agent, reference, absent);
	/* Code, result and data, if there is any: each was asked for by an exit. */
	CHECK(atomic_load(&absent->vcpus[0].counters.fault_count) >=
	      (form->page_count > 0 ? 3u : 2u));
	mv_machine_destroy(reference);
	mv_machine_destroy(absent);
	agent_end(&agent);
	mv_machine_destroy(source);
	free(state);
}

static void every_form_comes_out_the_same(void)
{
	for (size_t i = 0; i < sizeof(FORMS) / sizeof(FORMS[0]); i++) {
		fprintf(stderr, "  %s%s\n", FORMS[i].name, FORMS[i].lead > 0 ? ", split" : "");
		run_form(&FORMS[i]);
	}
}

/* Not a guess: the machine fails, the guest is held, and the message has the bytes. */
static void an_unknown_instruction_fails_closed(void)
{
	static const struct form form = ENTRY(unknown, 0);
	static struct agent agent;
	struct mv_machine *source = make_source(&form);
	struct mv_machine *absent = make_absent(&agent, source);
	struct watch watch = {0};
	struct mv_error why;
	size_t len;
	uint8_t *state = save_machine(source, &len);

	load_and_run(absent, state, len);
	await_failed(absent, &watch);
	CHECK(mv_machine_failed(absent, &why));
	CHECK(strstr(why.text, "not known: 0f 00 26"));
	CHECK_EQ(agent.fetched[DATA / GM_PAGE_SIZE], 0);
	mv_machine_destroy(absent);
	agent_end(&agent);
	mv_machine_destroy(source);
	free(state);
}

/* --- the table alone: what this guest cannot run, and what is refused ------------------------------ */

static int decode(const char *bytes, size_t len, struct mv_access *ret_accesses)
{
	const struct mv_registers registers = {
		.gpr = {0x10, 0x20, 0x30, 0x40, 0x5000, 0x6000, 0x7000, 0x8000, 0x9000},
		.rip = 0x100000,
		.fs_base = 0x70000000,
		.gs_base = 0x80000000,
	};

	return mv_decode((const uint8_t *)bytes, len, &registers, ret_accesses);
}

#define DECODE(bytes) decode(bytes, sizeof(bytes) - 1, accesses)

static void the_table_knows_what_the_guest_cannot_run(void)
{
	struct mv_access accesses[MV_ACCESS_COUNT_MAX];

	/* vmovdqu (%rsi), %ymm0; vmovups (%r8), %xmm9; vpinsrb with its immediate, rip-relative */
	CHECK_EQ(DECODE("\xc5\xfe\x6f\x06"), 1);
	CHECK(accesses[0].addr == 0x7000 && accesses[0].len == 32);
	CHECK_EQ(DECODE("\xc4\x41\x78\x10\x08"), 1);
	CHECK(accesses[0].addr == 0x9000 && accesses[0].len == 16);
	CHECK_EQ(DECODE("\xc4\xe3\x79\x20\x05\x10\x00\x00\x00\x05"), 1);
	CHECK(accesses[0].addr == 0x10001a && accesses[0].len == 1);
	/* mov %fs:(%rsi), %rax; mov %gs:8, %rax */
	CHECK_EQ(DECODE("\x64\x48\x8b\x06"), 1);
	CHECK_EQ(accesses[0].addr, 0x70007000);
	CHECK_EQ(DECODE("\x65\x48\x8b\x04\x25\x08\x00\x00\x00"), 1);
	CHECK_EQ(accesses[0].addr, 0x80000008);
}

static void the_table_refuses_what_it_does_not_know(void)
{
	struct mv_access accesses[MV_ACCESS_COUNT_MAX];

	CHECK_EQ(DECODE("\x62\xf1\x7c\x48\x10\x06"), -ENOSYS); /* EVEX */
	CHECK_EQ(DECODE("\x8f\xe8\x78\xc0\x06\x01"), -ENOSYS); /* XOP */
	CHECK_EQ(DECODE("\xc4\xe2\x69\x90\x04\x0e"), -ENOSYS); /* VPGATHERDD */
	CHECK_EQ(DECODE("\x0f\xae\x26"), -ENOSYS);	       /* XSAVE */
	CHECK_EQ(DECODE("\xf3\x6c"), -ENOSYS);		       /* REP INSB */
	CHECK_EQ(DECODE("\xff\x1e"), -ENOSYS);		       /* far CALL */
	CHECK_EQ(DECODE("\x0f\x01\x06"), -ENOSYS);	       /* SGDT */
	CHECK_EQ(DECODE("\x66\x66\x66\x66\x66\x66\x66\x66"
			"\x66\x66\x66\x66\x66\x66\x66"),
		 -ENOSYS); /* longer than an instruction */
	for (size_t len = 0; len < 10; len++)
		CHECK_EQ(decode("\x48\xc7\x84\x8e\x00\x10\x00\x00\x05\x00\x00\x00", len, accesses),
			 -EAGAIN);
	CHECK_EQ(DECODE("\x48\xc7\x84\x8e\x00\x10\x00\x00\x05\x00\x00\x00"), 1);
	CHECK_EQ(accesses[0].addr, 0x7000 + 4 * 0x20 + 0x1000);
}

static bool kvm_is_there(void)
{
	const struct mv_machine_config config = test_config(MV_ACCEL_KVM, 1);
	struct mv_machine *machine;
	struct mv_error error;

	if (mv_machine_create(&config, &machine, &error) < 0)
		return false;
	mv_machine_destroy(machine);
	return true;
}

int main(void)
{
	char why[GW_VMM_REASON_LEN_MAX];

	RUN(the_table_knows_what_the_guest_cannot_run);
	RUN(the_table_refuses_what_it_does_not_know);
	check_need(kvm_is_there(), "kvm", "load the kvm module, or be allowed to use /dev/kvm");
	check_need(gw_vmm_try(GW_VMM_UFFD, -1, why) == 0, "uffd", why);
	RUN(every_form_comes_out_the_same);
	RUN(an_unknown_instruction_fails_closed);
	return EXIT_SUCCESS;
}

#else

int main(void)
{
	fprintf(stderr, "needs x86-64\n");
	return CHECK_SKIPPED;
}

#endif
