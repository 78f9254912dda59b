# SPDX-License-Identifier: Apache-2.0
"""A migration as it happens, on stderr: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Self, TextIO

from godwit.models import Migration, MigrationPhase

from services.cli import quantities

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

_BAR_CELLS = 24
_PLAIN_STEP = 0.25
"""Share of the memory after which a plain line is due within a phase."""


class MigrationView:
    """Shows each step it is given; use as a context manager.

    Args:
        shown: False = nothing is shown.
        stream: stderr unless told, so that stdout holds the outcome alone.
    """

    def __init__(self, *, shown: bool = True, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._shown = shown
        self._live: Live | None = None
        self._phase = ""
        self._progress = 0.0

    def __enter__(self) -> Self:
        if self._shown and self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self._stream), refresh_per_second=10)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, migration: Migration) -> None:
        """The migration as it is now."""
        if self._live is not None:
            self._live.update(live_line(migration))
        elif self._shown and self._is_news(migration):
            print(plain_line(migration), file=self._stream, flush=True)
            self._phase, self._progress = migration.phase, migration.progress

    def _is_news(self, migration: Migration) -> bool:
        return migration.phase != self._phase or migration.progress >= self._progress + _PLAIN_STEP


def plain_line(migration: Migration) -> str:
    """One line: who, where, how far."""
    return (
        f"{migration.vm_id} {migration.source_node} -> {migration.destination_node}: "
        f"{migration.phase} {_facts(migration)}"
    ).rstrip()


def live_line(migration: Migration) -> Text:
    """The same with a bar, in colour."""
    from rich.text import Text

    full = int(migration.progress * _BAR_CELLS)
    return Text.assemble(
        f"{migration.vm_id} {migration.source_node} → {migration.destination_node} ",
        (f"{migration.phase:<15} ", _STYLES.get(migration.phase, "bold yellow")),
        ("█" * full, "green"),
        ("░" * (_BAR_CELLS - full), "dim"),
        f" {_facts(migration)}",
    )


def ending(migration: Migration) -> str:
    """What became of it, in a sentence or two."""
    where = f"{migration.vm_id} {migration.source_node} -> {migration.destination_node}"
    if migration.phase == MigrationPhase.SUCCEEDED:
        return (
            f"{where}: succeeded in {quantities.duration(migration.total_ns)}, "
            f"pause {quantities.duration(migration.pause_ns)}"
            + (f" ({migration.reason})" if migration.reason else "")
        )
    why = ": ".join(part for part in (migration.reason, migration.message) if part)
    return f"{where}: {migration.phase}" + (
        f"\n  {why}" + (f"\n  {migration.hint}" if migration.hint else "") if why else ""
    )


def _facts(migration: Migration) -> str:
    parts = []
    counters = migration.counters
    if counters is not None and counters.page_count:
        parts.append(
            f"{quantities.percent(migration.progress)}, pages: {counters.demand_page_count} demand,"
            f" {counters.bulk_page_count} bulk, {counters.zero_page_count} zero"
        )
    if migration.pause_ns:
        parts.append(f"pause {quantities.duration(migration.pause_ns)}")
    if migration.reason:
        parts.append(migration.reason)
    return ", ".join(parts)


_STYLES: dict[str, str] = {
    MigrationPhase.SUCCEEDED: "bold green",
    MigrationPhase.POSTCOPY: "bold cyan",
    MigrationPhase.CANCELLED: "bold red",
    MigrationPhase.FAILED: "bold red",
    MigrationPhase.LOST: "bold red",
    MigrationPhase.NEEDS_ATTENTION: "bold red",
    MigrationPhase.POSTCOPY_PAUSED: "bold red",
}
