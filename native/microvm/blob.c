/* SPDX-License-Identifier: Apache-2.0 */
/*
 * blob.c - see blob.h.
 *
 * Threads, Errors, Ownership, Units, Source: see blob.h.
 */
#include "blob.h"

#include <errno.h>
#include <godwit/crc32c.h>
#include <stdlib.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "blobs are copied as they are");

#define CRC_OFFSET offsetof(struct mv_blob_header, crc32c)

static size_t padded(size_t len)
{
	return (len + 7) & ~(size_t)7;
}

/* The CRC of a whole blob, whatever its CRC field holds. */
static uint32_t crc_of(const uint8_t *bytes, size_t len)
{
	static const uint8_t zeros[sizeof(uint32_t)];
	uint32_t crc = gw_crc32c(0, bytes, CRC_OFFSET);

	crc = gw_crc32c(crc, zeros, sizeof(zeros));
	return gw_crc32c(crc, bytes + CRC_OFFSET + sizeof(zeros), len - CRC_OFFSET - sizeof(zeros));
}

static bool reserve(struct mv_blob_writer *writer, size_t more)
{
	size_t capacity = writer->capacity > 0 ? writer->capacity : 64u << 10;
	uint8_t *bytes;

	while (capacity < writer->len + more)
		capacity *= 2;
	if (capacity == writer->capacity)
		return true;
	bytes = realloc(writer->bytes, capacity);
	if (!bytes) {
		writer->failed = true;
		return false;
	}
	writer->bytes = bytes;
	writer->capacity = capacity;
	return true;
}

void mv_blob_add(struct mv_blob_writer *writer, enum mv_section type, uint32_t index,
		 const void *data, size_t len)
{
	const struct mv_blob_section section = {.type = type, .index = index, .len = len};
	const size_t head = writer->len > 0 ? 0 : sizeof(struct mv_blob_header);
	const size_t more = head + sizeof(section) + padded(len);

	if (writer->failed || !reserve(writer, more))
		return;
	memset(writer->bytes + writer->len, 0, more);
	writer->len += head;
	memcpy(writer->bytes + writer->len, &section, sizeof(section));
	memcpy(writer->bytes + writer->len + sizeof(section), data, len);
	writer->len += sizeof(section) + padded(len);
	writer->section_count++;
}

int mv_blob_finish(struct mv_blob_writer *writer, const struct mv_blob_header *identity,
		   uint8_t **ret_bytes, size_t *ret_len)
{
	struct mv_blob_header header = {
		.magic = MV_BLOB_MAGIC,
		.version = MV_BLOB_VERSION,
		.header_len = sizeof(header),
		.total_len = writer->len,
		.memory_bytes = identity->memory_bytes,
		.section_count = writer->section_count,
		.accel = identity->accel,
		.vcpu_count = identity->vcpu_count,
		.guest_abi = identity->guest_abi,
	};
	uint8_t *bytes = writer->bytes;
	const size_t len = writer->len;
	const bool failed = writer->failed || len == 0;

	*writer = (struct mv_blob_writer){0};
	if (failed) {
		free(bytes);
		return -ENOMEM;
	}
	memcpy(bytes, &header, sizeof(header));
	header.crc32c = crc_of(bytes, len);
	memcpy(bytes, &header, sizeof(header));
	*ret_bytes = bytes;
	*ret_len = len;
	return 0;
}

/* Reads the section at *offset and steps over it; false if it does not fit or is out of order. */
static bool next_section(const struct mv_blob_reader *reader, size_t *offset,
			 struct mv_blob_section *ret_section, const uint8_t **ret_data)
{
	const size_t total = reader->header.total_len;
	struct mv_blob_section section;

	if (total - *offset < sizeof(section))
		return false;
	memcpy(&section, reader->bytes + *offset, sizeof(section));
	if (section.len > total || padded(section.len) > total - *offset - sizeof(section))
		return false;
	*ret_data = reader->bytes + *offset + sizeof(section);
	*offset += sizeof(section) + padded(section.len);
	*ret_section = section;
	return true;
}

static bool ascends(const struct mv_blob_section *last, const struct mv_blob_section *section)
{
	return last->type < section->type ||
	       (last->type == section->type && last->index < section->index);
}

static bool zeros(const uint8_t *bytes, size_t len)
{
	for (size_t i = 0; i < len; i++)
		if (bytes[i] != 0)
			return false;
	return true;
}

static int check_sections(const struct mv_blob_reader *reader, struct mv_error *error)
{
	struct mv_blob_section last = {0}, section;
	size_t offset = sizeof(struct mv_blob_header);
	const uint8_t *data;

	for (uint32_t i = 0; i < reader->header.section_count; i++) {
		if (!next_section(reader, &offset, &section, &data))
			return mv_refuse(error, -EBADMSG, "section %u does not fit in the blob", i);
		if (!ascends(&last, &section))
			return mv_refuse(error, -EBADMSG,
					 "section %u (type %u, index %u) is out of order", i,
					 section.type, section.index);
		if (!zeros(data + section.len, padded(section.len) - section.len))
			return mv_refuse(error, -EBADMSG, "section %u is padded with data", i);
		last = section;
	}
	if (offset != reader->header.total_len)
		return mv_refuse(error, -EBADMSG, "%zu bytes behind the last section",
				 (size_t)reader->header.total_len - offset);
	return 0;
}

int mv_blob_open(const uint8_t *bytes, size_t len, struct mv_blob_reader *ret_reader,
		 struct mv_error *error)
{
	struct mv_blob_reader reader = {.bytes = bytes};
	const struct mv_blob_header *header = &reader.header;
	int rc;

	if (len < sizeof(*header) || len > MV_BLOB_LEN_MAX)
		return mv_refuse(error, -EBADMSG, "a state blob is %zu to %u bytes, not %zu",
				 sizeof(*header), MV_BLOB_LEN_MAX, len);
	memcpy(&reader.header, bytes, sizeof(reader.header));
	if (header->magic != MV_BLOB_MAGIC)
		return mv_refuse(error, -EBADMSG, "not a state blob: wrong magic");
	if (header->version != MV_BLOB_VERSION || header->header_len != sizeof(*header))
		return mv_refuse(error, -EBADMSG, "state blob of version %u, this program reads %u",
				 header->version, MV_BLOB_VERSION);
	if (header->total_len != len)
		return mv_refuse(error, -EBADMSG, "state blob of %zu bytes, %zu came",
				 (size_t)header->total_len, len);
	if (header->crc32c != crc_of(bytes, len))
		return mv_refuse(error, -EBADMSG, "state blob is damaged: wrong CRC-32C");
	if (!zeros((const uint8_t *)header->reserved, sizeof(header->reserved)))
		return mv_refuse(error, -EBADMSG, "reserved fields of the header are not zero");
	rc = check_sections(&reader, error);
	if (rc == 0)
		*ret_reader = reader;
	return rc;
}

static int check_section(const struct mv_blob_section *section, const struct mv_blob_rule *rule,
			 uint32_t index, struct mv_error *error)
{
	if (section->type != rule->type || section->index != index)
		return mv_refuse(error, -EBADMSG,
				 "section of type %u, index %u where type %u, index %u belongs",
				 section->type, section->index, rule->type, index);
	if (section->len < rule->len_min || section->len > rule->len_max ||
	    section->len % rule->unit != 0)
		return mv_refuse(error, -EBADMSG,
				 "section of type %u, index %u has %llu bytes, not %u to %u",
				 section->type, section->index, (unsigned long long)section->len,
				 rule->len_min, rule->len_max);
	return 0;
}

int mv_blob_check(const struct mv_blob_reader *reader, const struct mv_blob_rule *rules,
		  size_t rule_count, struct mv_error *error)
{
	struct mv_blob_section section = {0};
	size_t offset = sizeof(struct mv_blob_header);
	const uint8_t *data;
	uint32_t seen = 0;

	for (size_t r = 0; r < rule_count; r++) {
		for (uint32_t i = 0; i < rules[r].count; i++, seen++) {
			int rc;

			if (seen == reader->header.section_count ||
			    !next_section(reader, &offset, &section, &data))
				return mv_refuse(error, -EBADMSG, "no section of type %u, index %u",
						 rules[r].type, i);
			rc = check_section(&section, &rules[r], i, error);
			if (rc < 0)
				return rc;
		}
	}
	if (seen != reader->header.section_count)
		return mv_refuse(error, -EBADMSG, "%u sections that this machine does not have",
				 reader->header.section_count - seen);
	return 0;
}

const void *mv_blob_find(const struct mv_blob_reader *reader, enum mv_section type, uint32_t index,
			 size_t *ret_len)
{
	struct mv_blob_section section;
	size_t offset = sizeof(struct mv_blob_header);
	const uint8_t *data;

	while (next_section(reader, &offset, &section, &data)) {
		if (section.type == (uint32_t)type && section.index == index) {
			*ret_len = section.len;
			return data;
		}
	}
	return NULL;
}
