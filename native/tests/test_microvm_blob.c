/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_microvm_blob.c - a state blob that is not whole, not ours or not for this machine must be
 * refused before anything of it is used.
 */
#include "blob.h"
#include "check.h"

#include <errno.h>
#include <godwit/crc32c.h>

#define MEMORY_BYTES (64u << 20)

static const struct mv_blob_header IDENTITY = {
	.memory_bytes = MEMORY_BYTES, .accel = 2, .vcpu_count = 2, .guest_abi = 2};

static const struct mv_blob_rule RULES[] = {
	{MV_SECTION_MACHINE, 1, 16, 16, 8},
	{MV_SECTION_VCPU, 2, 3, 24, 1},
};

/* The sections of a well-formed blob; what a test changes before it is finished. */
struct part {
	enum mv_section type;
	uint32_t index;
	size_t len;
};

static const struct part GOOD[] = {
	{MV_SECTION_MACHINE, 0, 16},
	{MV_SECTION_VCPU, 0, 3},
	{MV_SECTION_VCPU, 1, 24},
};

static uint8_t *make(const struct part *parts, size_t count, size_t *ret_len)
{
	static const char content[64] = "what is saved of a machine that has stopped";
	struct mv_blob_writer writer = {0};
	uint8_t *bytes;

	for (size_t i = 0; i < count; i++)
		mv_blob_add(&writer, parts[i].type, parts[i].index, content, parts[i].len);
	CHECK_EQ(mv_blob_finish(&writer, &IDENTITY, &bytes, ret_len), 0);
	return bytes;
}

/* Opens and checks; returns what the loader would. */
static int outcome(const uint8_t *bytes, size_t len, struct mv_error *error)
{
	struct mv_blob_reader reader;
	int rc;

	error->text[0] = '\0';
	rc = mv_blob_open(bytes, len, &reader, error);
	if (rc == 0)
		rc = mv_blob_check(&reader, RULES, 2, error);
	return rc;
}

/* With a CRC that is right again: whoever makes a wrong blob can compute one. */
static void seal(uint8_t *bytes, size_t len)
{
	const uint32_t zero = 0;
	const size_t at = offsetof(struct mv_blob_header, crc32c);
	uint32_t crc;

	memcpy(bytes + at, &zero, sizeof(zero));
	crc = gw_crc32c(0, bytes, len);
	memcpy(bytes + at, &crc, sizeof(crc));
}

static void refused(const uint8_t *bytes, size_t len, const char *why)
{
	struct mv_error error;

	CHECK_EQ(outcome(bytes, len, &error), -EBADMSG);
	if (!strstr(error.text, why))
		fprintf(stderr, "said: %s\n", error.text);
	CHECK(strstr(error.text, why));
}

static void what_was_written_is_read(void)
{
	struct mv_blob_reader reader;
	struct mv_error error;
	size_t len, section_len;
	uint8_t *bytes = make(GOOD, 3, &len);

	CHECK_EQ(len, 64 + 16 * 3 + 16 + 8 + 24);
	CHECK_EQ(mv_blob_open(bytes, len, &reader, &error), 0);
	CHECK_EQ(mv_blob_check(&reader, RULES, 2, &error), 0);
	CHECK_EQ(reader.header.memory_bytes, MEMORY_BYTES);
	CHECK_EQ(memcmp(mv_blob_find(&reader, MV_SECTION_VCPU, 1, &section_len), "what is", 7), 0);
	CHECK_EQ(section_len, 24);
	CHECK(!mv_blob_find(&reader, MV_SECTION_VCPU, 2, &section_len));
	free(bytes);
}

static void every_changed_bit_is_refused(void)
{
	struct mv_error error;
	size_t len;
	uint8_t *bytes = make(GOOD, 3, &len);

	for (size_t bit = 0; bit < len * 8; bit++) {
		bytes[bit / 8] ^= (uint8_t)(1u << bit % 8);
		CHECK_EQ(outcome(bytes, len, &error), -EBADMSG);
		bytes[bit / 8] ^= (uint8_t)(1u << bit % 8);
	}
	CHECK_EQ(outcome(bytes, len, &error), 0);
	free(bytes);
}

static void every_other_length_is_refused(void)
{
	struct mv_error error;
	size_t len;
	uint8_t *bytes = make(GOOD, 3, &len);
	uint8_t *longer = calloc(1, len + 8);

	CHECK(longer);
	memcpy(longer, bytes, len);
	for (size_t cut = 0; cut < len; cut++)
		CHECK_EQ(outcome(bytes, cut, &error), -EBADMSG);
	CHECK_EQ(outcome(longer, len + 8, &error), -EBADMSG);
	free(longer);
	free(bytes);
}

/* A number in the header or in the first section's head, made wrong under a right CRC. */
static void wrong_numbers_are_refused(void)
{
	static const struct {
		size_t offset;
		uint32_t value;
		const char *why;
	} cases[] = {
		{offsetof(struct mv_blob_header, magic), 1, "magic"},
		{offsetof(struct mv_blob_header, version), 2, "version 2"},
		{offsetof(struct mv_blob_header, header_len), 72, "version"},
		{offsetof(struct mv_blob_header, reserved), 1, "reserved"},
		{offsetof(struct mv_blob_header, section_count), 2, "behind the last section"},
		{offsetof(struct mv_blob_header, section_count), 4, "does not fit"},
		{offsetof(struct mv_blob_header, section_count), UINT32_MAX, "does not fit"},
		{64 + offsetof(struct mv_blob_section, type), 3, "out of order"},
		{64 + offsetof(struct mv_blob_section, len), 1 << 20, "does not fit"},
		{64 + offsetof(struct mv_blob_section, len) + 4, UINT32_MAX, "does not fit"},
		{64 + offsetof(struct mv_blob_section, len), 24, ""},
		{64 + 16 + 16 + 16, 'x' << 24, "padded with data"},
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		size_t len;
		uint8_t *bytes = make(GOOD, 3, &len);

		memcpy(bytes + cases[i].offset, &cases[i].value, sizeof(cases[i].value));
		seal(bytes, len);
		refused(bytes, len, cases[i].why);
		free(bytes);
	}
}

static void other_sections_than_the_rules_say_are_refused(void)
{
	static const struct {
		struct part parts[4];
		size_t count;
		const char *why;
	} cases[] = {
		{{{MV_SECTION_MACHINE, 0, 16}, {MV_SECTION_VCPU, 0, 3}}, 2, "no section"},
		{{{MV_SECTION_VCPU, 0, 3}, {MV_SECTION_VCPU, 1, 3}}, 2, "belongs"},
		{{{MV_SECTION_MACHINE, 0, 8}, {MV_SECTION_VCPU, 0, 3}, {MV_SECTION_VCPU, 1, 3}},
		 3,
		 "bytes, not"},
		{{{MV_SECTION_MACHINE, 0, 16}, {MV_SECTION_VCPU, 0, 2}, {MV_SECTION_VCPU, 1, 3}},
		 3,
		 "bytes, not"},
		{{{MV_SECTION_MACHINE, 0, 16}, {MV_SECTION_VCPU, 0, 3}, {MV_SECTION_VCPU, 1, 25}},
		 3,
		 "bytes, not"},
		{{{MV_SECTION_MACHINE, 0, 16}, {MV_SECTION_VCPU, 0, 3}, {MV_SECTION_VCPU, 2, 3}},
		 3,
		 "belongs"},
		{{{MV_SECTION_MACHINE, 0, 16}, {MV_SECTION_VCPU, 1, 3}, {MV_SECTION_VCPU, 0, 3}},
		 3,
		 "out of order"},
		{{{MV_SECTION_MACHINE, 0, 16}, {MV_SECTION_VCPU, 0, 3}, {MV_SECTION_VCPU, 0, 3}},
		 3,
		 "out of order"},
		{{{MV_SECTION_MACHINE, 0, 16},
		  {MV_SECTION_VCPU, 0, 3},
		  {MV_SECTION_VCPU, 1, 3},
		  {MV_SECTION_VCPU, 2, 3}},
		 4,
		 "does not have"},
		{{{MV_SECTION_MACHINE, 0, 16},
		  {MV_SECTION_VCPU, 0, 3},
		  {MV_SECTION_VCPU, 1, 3},
		  {MV_SECTION_THREAD_CTX, 0, 8}},
		 4,
		 "does not have"},
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		size_t len;
		uint8_t *bytes = make(cases[i].parts, cases[i].count, &len);

		refused(bytes, len, cases[i].why);
		free(bytes);
	}
}

/* Whatever the bytes are, the reader stays inside of them: the sanitizers look on. */
static void random_damage_is_survived(void)
{
	uint64_t random = 88172645463325252ull;
	struct mv_error error;
	size_t len;
	uint8_t *good = make(GOOD, 3, &len);
	uint8_t *bytes = malloc(len);

	CHECK(bytes);
	for (int round = 0; round < 20000; round++) {
		memcpy(bytes, good, len);
		for (int i = 0; i < 4; i++) {
			random ^= random << 13;
			random ^= random >> 7;
			random ^= random << 17;
			bytes[random % len] = (uint8_t)(random >> 40);
		}
		seal(bytes, len);
		(void)outcome(bytes, len, &error);
	}
	free(bytes);
	free(good);
}

int main(void)
{
	RUN(what_was_written_is_read);
	RUN(every_changed_bit_is_refused);
	RUN(every_other_length_is_refused);
	RUN(wrong_numbers_are_refused);
	RUN(other_sections_than_the_rules_say_are_refused);
	RUN(random_damage_is_survived);
	return EXIT_SUCCESS;
}
