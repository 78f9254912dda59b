/* SPDX-License-Identifier: Apache-2.0 */
/*
 * replay.c - plays the files of a directory to a fuzz target: the corpus as an ordinary test.
 *
 * Usage: replay_NAME DIR...      exit status 0: every file was played and nothing fell
 */
#include "fuzz.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>

#define PATH_LEN_MAX 4096

static int play(const char *path)
{
	FILE *file = fopen(path, "re");
	uint8_t *data;
	long len;

	if (!file) {
		perror(path);
		return -1;
	}
	fseek(file, 0, SEEK_END);
	len = ftell(file);
	rewind(file);
	/* Exactly as long as the input, so that a read behind it is seen. */
	data = len > 0 ? malloc((size_t)len) : NULL;
	if (len < 0 || (len > 0 && (!data || fread(data, 1, (size_t)len, file) != (size_t)len))) {
		fprintf(stderr, "%s: cannot be read\n", path);
		free(data);
		fclose(file);
		return -1;
	}
	fclose(file);
	/* The last name printed is the one that fell. */
	fprintf(stderr, "- %s\n", path);
	LLVMFuzzerTestOneInput(data, (size_t)len);
	free(data);
	return 0;
}

static int play_directory(const char *name)
{
	DIR *directory = opendir(name);
	const struct dirent *entry;
	int count = 0;

	if (!directory) {
		perror(name);
		return -1;
	}
	while ((entry = readdir(directory))) {
		char path[PATH_LEN_MAX];

		if (entry->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), "%s/%s", name, entry->d_name);
		if (play(path)) {
			closedir(directory);
			return -1;
		}
		count++;
	}
	closedir(directory);
	return count;
}

int main(int argc, char **argv)
{
	int count = 0;

	for (int i = 1; i < argc; i++) {
		const int played = play_directory(argv[i]);

		if (played < 0)
			return EXIT_FAILURE;
		count += played;
	}
	/* A corpus that went missing is no success. */
	if (count == 0) {
		fprintf(stderr, "nothing to play\n");
		return EXIT_FAILURE;
	}
	fprintf(stderr, "%d played\n", count);
	return EXIT_SUCCESS;
}
