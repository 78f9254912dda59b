/* SPDX-License-Identifier: Apache-2.0 */
/*
 * grpc_text.c - the texts in gRPC's headers, and which status other failures mean.
 *
 * Threads, Errors, Ownership, Units: see grpc_internal.h.
 * Source: grpc/doc/PROTOCOL-HTTP2.md, http-grpc-status-mapping.md.
 */
#include "grpc_internal.h"

#include <stdio.h>
#include <string.h>

static const char hex_digits[] = "0123456789ABCDEF";

size_t text_encode_message(const char *message, char *ret_text, size_t cap)
{
	size_t len = 0;

	for (const char *at = message; *at; at++) {
		const unsigned char byte = (unsigned char)*at;

		if (byte >= 0x20 && byte <= 0x7e && byte != '%') {
			if (len + 2 > cap)
				break;
			ret_text[len++] = *at;
			continue;
		}
		if (len + 4 > cap)
			break;
		ret_text[len++] = '%';
		ret_text[len++] = hex_digits[byte >> 4];
		ret_text[len++] = hex_digits[byte & 0xf];
	}
	ret_text[len] = '\0';
	return len;
}

static int hex_value(uint8_t digit)
{
	if (digit >= '0' && digit <= '9')
		return digit - '0';
	if (digit >= 'a' && digit <= 'f')
		return digit - 'a' + 10;
	if (digit >= 'A' && digit <= 'F')
		return digit - 'A' + 10;
	return -1;
}

void text_decode_message(const uint8_t *value, size_t len, char *ret_text, size_t cap)
{
	size_t out = 0;

	for (size_t i = 0; i < len && out + 1 < cap; i++) {
		uint8_t byte = value[i];

		if (byte == '%' && len - i > 2) {
			const int high = hex_value(value[i + 1]);
			const int low = hex_value(value[i + 2]);

			if (high >= 0 && low >= 0) {
				byte = (uint8_t)(high << 4 | low);
				i += 2;
			}
		}
		/* It goes into logs and fixed buffers: a NUL or a line feed would lie there. */
		ret_text[out++] = byte < 0x20 || byte == 0x7f ? '?' : (char)byte;
	}
	ret_text[out] = '\0';
}

int text_decode_number(const uint8_t *value, size_t len)
{
	int number = 0;

	if (len == 0 || len > 4)
		return -1;
	for (size_t i = 0; i < len; i++) {
		if (value[i] < '0' || value[i] > '9')
			return -1;
		number = number * 10 + (value[i] - '0');
	}
	return number;
}

#define TIMEOUT_DIGIT_COUNT_MAX 8

static const struct {
	char unit;
	uint64_t ns;
} timeout_units[] = {
	{'n', 1},	    {'u', 1000},	{'m', 1000000},
	{'S', 1000000000u}, {'M', 60000000000}, {'H', 3600000000000},
};

#define TIMEOUT_UNIT_COUNT (sizeof(timeout_units) / sizeof(timeout_units[0]))

bool text_decode_timeout(const uint8_t *value, size_t len, uint64_t *ret_timeout_ns)
{
	uint64_t number = 0;

	if (len < 2 || len > TIMEOUT_DIGIT_COUNT_MAX + 1)
		return false;
	for (size_t i = 0; i < len - 1; i++) {
		if (value[i] < '0' || value[i] > '9')
			return false;
		number = number * 10 + (uint64_t)(value[i] - '0');
	}
	for (size_t i = 0; i < TIMEOUT_UNIT_COUNT; i++) {
		if ((char)value[len - 1] == timeout_units[i].unit) {
			/* 99999999 h is 3.6e20 ns: more than an uint64 holds, less than for ever. */
			if (number > UINT64_MAX / 2 / timeout_units[i].ns)
				*ret_timeout_ns = UINT64_MAX / 2;
			else
				*ret_timeout_ns = number * timeout_units[i].ns;
			return true;
		}
	}
	return false;
}

size_t text_encode_timeout(uint64_t timeout_ns, char ret_text[16])
{
	size_t i = 0;

	/* The finest unit in which it fits eight digits, rounded up: never less than asked. */
	while (i + 1 < TIMEOUT_UNIT_COUNT && timeout_ns / timeout_units[i].ns >= 99999999)
		i++;
	const uint64_t number =
		timeout_ns / timeout_units[i].ns + (timeout_ns % timeout_units[i].ns ? 1 : 0);

	return (size_t)snprintf(ret_text, 16, "%u%c",
				(unsigned int)(number > 99999999 ? 99999999 : number),
				timeout_units[i].unit);
}

bool text_is_grpc_content_type(const uint8_t *value, size_t len)
{
	static const char grpc[] = "application/grpc";
	const size_t grpc_len = sizeof(grpc) - 1;

	if (len < grpc_len || memcmp(value, grpc, grpc_len) != 0)
		return false;
	return len == grpc_len || value[grpc_len] == '+' || value[grpc_len] == ';' ||
	       value[grpc_len] == ' ';
}

int status_of_http(int http_status)
{
	switch (http_status) {
	case 400:
		return GW_GRPC_INTERNAL;
	case 401:
		return GW_GRPC_UNAUTHENTICATED;
	case 403:
		return GW_GRPC_PERMISSION_DENIED;
	case 404:
		return GW_GRPC_UNIMPLEMENTED;
	case 429:
	case 502:
	case 503:
	case 504:
		return GW_GRPC_UNAVAILABLE;
	default:
		return GW_GRPC_UNKNOWN;
	}
}

int status_of_reset(uint32_t error_code)
{
	switch (error_code) {
	case NGHTTP2_REFUSED_STREAM:
		return GW_GRPC_UNAVAILABLE;
	case NGHTTP2_CANCEL:
		return GW_GRPC_CANCELLED;
	case NGHTTP2_ENHANCE_YOUR_CALM:
		return GW_GRPC_RESOURCE_EXHAUSTED;
	case NGHTTP2_INADEQUATE_SECURITY:
		return GW_GRPC_PERMISSION_DENIED;
	default:
		return GW_GRPC_INTERNAL;
	}
}
