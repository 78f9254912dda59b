# SPDX-License-Identifier: Apache-2.0
"""Triggers: they repeat in the store what the code never does.

So that a bug, or a person with a shell, cannot change a decision or revive an epoch. Each rule is
written once and becomes a trigger of the dialect.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A change that is refused."""

    name: str
    on: str
    """When it is looked at: BEFORE what, of which table."""
    refuses: str = ""
    """The condition; `{differs}` is the comparison that knows NULL. Empty: every such change."""
    because: str
    """The error's text: the invariant and what it says."""

    def create(self, dialect: str) -> str:
        """The statement that makes it."""
        if dialect == "sqlite":
            when = f"\n       WHEN {self.refuses.format(differs='IS NOT')}" if self.refuses else ""
            act = f"\n       BEGIN SELECT RAISE(ABORT, '{self.because}'); END"
            return f"CREATE TRIGGER IF NOT EXISTS {self.name} {self.on}{when}{act}"
        when = f" WHEN ({self.refuses.format(differs='IS DISTINCT FROM')})" if self.refuses else ""
        act = f" EXECUTE FUNCTION godwit_refuse('{self.because}')"
        return f"CREATE TRIGGER {self.name} {self.on} FOR EACH ROW{when}{act}"


GIVEN_BACK_IS_FINAL = Rule(
    name="given_back_is_final",
    on="BEFORE UPDATE ON migrations",
    refuses="(OLD.given_back AND NOT NEW.given_back) OR (NEW.given_back"
    " AND (NEW.return_epoch <= NEW.epoch OR NEW.decision {differs} 'committed'))",
    because="I5: what was given back stays so, under a fresh epoch",
)
PHASES_OF_A_RETURN = Rule(
    name="phases_of_a_return",
    on="BEFORE UPDATE OF phase ON migrations",
    refuses="(NEW.phase IN ('given_back', 'returned') AND NOT NEW.given_back)"
    " OR (NEW.phase = 'giving_back' AND NEW.decision {differs} 'committed')"
    " OR (NEW.given_back AND NEW.phase NOT IN ('given_back', 'returned', 'lost'))",
    because="I5: the source owns what was given back, and only that",
)
TERMS_ONLY_GROW = Rule(
    name="terms_only_grow",
    on="BEFORE UPDATE ON leadership",
    refuses="NEW.term < OLD.term",
    because="I13: a term that is over does not come back",
)
LEADERSHIP_STAYS = Rule(
    name="leadership_stays",
    on="BEFORE DELETE ON leadership",
    because="I13: without its row nobody is fenced",
)

RULES = (
    GIVEN_BACK_IS_FINAL,
    PHASES_OF_A_RETURN,
    Rule(
        name="decision_is_final",
        on="BEFORE UPDATE OF decision ON migrations",
        refuses="OLD.decision IS NOT NULL AND NEW.decision {differs} OLD.decision",
        because="I2: a decision is never changed",
    ),
    Rule(
        name="terminal_is_final",
        on="BEFORE UPDATE OF phase ON migrations",
        refuses="OLD.terminal AND NEW.phase {differs} OLD.phase",
        because="I7: a terminal phase is never left",
    ),
    Rule(
        name="epochs_only_grow",
        on="BEFORE UPDATE ON epochs",
        refuses="NEW.last_epoch <= OLD.last_epoch",
        because="I1: an epoch is never reused",
    ),
    Rule(
        name="epochs_stay",
        on="BEFORE DELETE ON epochs",
        because="I1: an epoch is never forgotten",
    ),
    TERMS_ONLY_GROW,
    LEADERSHIP_STAYS,
)

_POSTGRESQL_REFUSE = """CREATE OR REPLACE FUNCTION godwit_refuse() RETURNS trigger
       LANGUAGE plpgsql AS $$ BEGIN
       RAISE EXCEPTION '%', TG_ARGV[0] USING ERRCODE = 'integrity_constraint_violation';
       END $$"""
_POSTGRESQL_TRUNCATE = tuple(
    f"CREATE TRIGGER {table}_stay_whole BEFORE TRUNCATE ON {table}"
    f" FOR EACH STATEMENT EXECUTE FUNCTION godwit_refuse('{because}')"
    for table, because in (
        ("epochs", "I1: an epoch is never forgotten"),
        ("migrations", "I2: a decision is never forgotten"),
        ("leadership", "I13: without its row nobody is fenced"),
    )
)


def create_all(dialect: str) -> tuple[str, ...]:
    """What makes every rule in a new store."""
    made = tuple(rule.create(dialect) for rule in RULES)
    if dialect == "sqlite":
        return made
    return (_POSTGRESQL_REFUSE, *made, *_POSTGRESQL_TRUNCATE)
