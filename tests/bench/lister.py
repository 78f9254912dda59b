# SPDX-License-Identifier: Apache-2.0
"""Lists migrations of an orchestrator and prints how long each answer took; for bench-watchers."""

from __future__ import annotations

import http.client
import json
import random
import sys
import time

PAGE = 100
PATHS = ("list, first page", "list, any page", "list, of a VM")


def main(host: str, port: int, calls: int) -> None:
    """`calls` of each kind, in turns, on one connection."""
    connection = http.client.HTTPConnection(host, port, timeout=60)
    chance, tokens = random.Random(1), [""]
    times: dict[str, list[float]] = {name: [] for name in PATHS}
    for _turn in range(calls):
        paths = (
            f"/v1/migrations?page_size={PAGE}",
            f"/v1/migrations?page_size={PAGE}&page_token={chance.choice(tokens)}",
            f"/v1/migrations?page_size={PAGE}&vm=old-{chance.randrange(1000)}",
        )
        for name, path in zip(PATHS, paths, strict=True):
            began = time.perf_counter()
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
            times[name].append(time.perf_counter() - began)
            if answer.status != 200:
                raise SystemExit(f"{path}: {answer.status} {body!r}")
            if name == PATHS[1]:
                tokens.append(json.loads(body)["next_page_token"])
    sys.stdout.write(json.dumps(times))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
