/* SPDX-License-Identifier: Apache-2.0 */
/*
 * serve_main.c - a page server driven by lines on stdin, for tests/native. Each is answered by one line:
 *   start HEARTBEAT_MS CONNECTION_COUNT_MAX   -> port N
 *   put ID EPOCH GENERATION STATE PATH GPA:SIZE:FILE_OFFSET:PAGE_SIZE ...   -> ok | error N
 *   remove ID | drain                         -> ok | error N
 *   streams ID                                -> count N | error N
 *   stats                                     -> name=value ...
 * The end of stdin ends it.
 */
#include "check.h"

#include <godwit/serve.h>

#include <fcntl.h>
#include <inttypes.h>
#include <stdint.h>
#include <unistd.h>

#define WORD_COUNT_MAX 80

static void say(const char *what, int result)
{
	if (result < 0)
		printf("error %d\n", -result);
	else if (what)
		printf("%s %d\n", what, result);
	else
		printf("ok\n");
}

static int start(struct gw_serve **ret_serve, char **words)
{
	const struct gw_serve_config config = {
		.struct_size = sizeof(config),
		.listen_host = "127.0.0.1",
		.heartbeat_ms = (uint32_t)strtoul(words[1], NULL, 10),
		.connection_count_max = (uint32_t)strtoul(words[2], NULL, 10),
	};
	int err = gw_serve_create(&config, ret_serve);

	if (!err)
		err = gw_serve_start(*ret_serve);
	return err ? err : gw_serve_port(*ret_serve);
}

static int put(struct gw_serve *serve, char **words, size_t word_count)
{
	struct gw_serve_region regions[GW_SERVE_REGION_COUNT_MAX] = {0};
	struct gw_serve_image image = {.struct_size = sizeof(image),
				       .image_id = words[1],
				       .vm_id = "vm",
				       .boot_id = "boot",
				       .epoch = strtoull(words[2], NULL, 10),
				       .generation = strtoull(words[3], NULL, 10),
				       .state = (uint32_t)strtoul(words[4], NULL, 10),
				       .regions = regions};
	int err;

	for (size_t i = 6; i < word_count && image.region_count < GW_SERVE_REGION_COUNT_MAX; i++) {
		struct gw_serve_region *region = &regions[image.region_count++];

		CHECK_EQ(sscanf(words[i], "%" SCNu64 ":%" SCNu64 ":%" SCNu64 ":%" SCNu32,
				&region->gpa, &region->size, &region->file_offset,
				&region->page_size),
			 4);
	}
	image.ram_fd = open(words[5], O_RDONLY | O_CLOEXEC);
	err = gw_serve_put_image(serve, &image);
	if (image.ram_fd >= 0)
		close(image.ram_fd);
	return err;
}

static void say_stats(const struct gw_serve *serve)
{
	struct gw_serve_stats stats;

	CHECK_EQ(gw_serve_stats(serve, &stats), 0);
	printf("connection_count=%" PRIu64 " stream_count=%" PRIu64 " connection_total=%" PRIu64
	       " demand_page_total=%" PRIu64 " bulk_page_total=%" PRIu64 " zero_page_total=%" PRIu64
	       " sent_bytes_total=%" PRIu64 " want_total=%" PRIu64 " refused_total=%" PRIu64 "\n",
	       stats.connection_count, stats.stream_count, stats.connection_total,
	       stats.demand_page_total, stats.bulk_page_total, stats.zero_page_total,
	       stats.sent_bytes_total, stats.want_total, stats.refused_total);
}

static void obey(struct gw_serve **serve, char **words, size_t word_count)
{
	if (strcmp(words[0], "start") == 0 && word_count == 3)
		say("port", start(serve, words));
	else if (strcmp(words[0], "put") == 0 && word_count >= 6)
		say(NULL, put(*serve, words, word_count));
	else if (strcmp(words[0], "remove") == 0 && word_count == 2)
		say(NULL, gw_serve_remove_image(*serve, words[1]));
	else if (strcmp(words[0], "drain") == 0)
		say(NULL, gw_serve_drain(*serve));
	else if (strcmp(words[0], "streams") == 0 && word_count == 2)
		say("count", gw_serve_image_stream_count(*serve, words[1]));
	else if (strcmp(words[0], "stats") == 0)
		say_stats(*serve);
	else
		printf("error 22\n");
	fflush(stdout);
}

int main(void)
{
	struct gw_serve *serve = NULL;
	char *line = NULL;
	size_t cap = 0;

	while (getline(&line, &cap, stdin) > 0) {
		char *words[WORD_COUNT_MAX];
		char *rest = NULL;
		size_t count = 0;

		for (char *word = strtok_r(line, " \n", &rest); word && count < WORD_COUNT_MAX;
		     word = strtok_r(NULL, " \n", &rest))
			words[count++] = word;
		if (count > 0)
			obey(&serve, words, count);
	}
	gw_serve_destroy(serve);
	free(line);
	return EXIT_SUCCESS;
}
