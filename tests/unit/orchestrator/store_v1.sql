-- SPDX-License-Identifier: Apache-2.0
-- A store of schema version 1, as it was released. Never changed: test_store_upgrade.py opens it.
CREATE TABLE meta (
    "key" TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY ("key")
);
CREATE TABLE nodes (
    name TEXT NOT NULL,
    agent_address TEXT NOT NULL,
    registered_at_ns BIGINT NOT NULL,
    PRIMARY KEY (name)
);
CREATE TABLE epochs (
    vm_id TEXT NOT NULL,
    last_epoch BIGINT NOT NULL,
    PRIMARY KEY (vm_id)
);
CREATE TABLE migrations (
    migration_id TEXT NOT NULL,
    vm_id TEXT NOT NULL,
    source_node TEXT NOT NULL,
    destination_node TEXT NOT NULL,
    bulk_bytes_per_s_max BIGINT NOT NULL,
    traceparent TEXT NOT NULL,
    phase TEXT NOT NULL,
    terminal BOOLEAN NOT NULL,
    decision TEXT,
    source_epoch BIGINT NOT NULL,
    epoch BIGINT NOT NULL,
    resume_epoch BIGINT NOT NULL,
    source_boot_id TEXT NOT NULL,
    page_size_bytes BIGINT NOT NULL,
    cancel_requested BOOLEAN NOT NULL,
    undo_is_cancel BOOLEAN NOT NULL,
    guest_ended BOOLEAN NOT NULL,
    destination_owed BOOLEAN NOT NULL,
    reason TEXT NOT NULL,
    message TEXT NOT NULL,
    hint TEXT NOT NULL,
    wait_reason TEXT NOT NULL,
    wait_message TEXT NOT NULL,
    wait_hint TEXT NOT NULL,
    created_at_ns BIGINT NOT NULL,
    phase_at_ns BIGINT NOT NULL,
    ended_at_ns BIGINT NOT NULL,
    pause_ns BIGINT NOT NULL,
    progress FLOAT NOT NULL,
    counters BLOB NOT NULL,
    version BIGINT NOT NULL,
    PRIMARY KEY (migration_id),
    CONSTRAINT migrations_decision CHECK (decision IN ('committed', 'aborted')),
    CONSTRAINT migrations_phase_needs_decision CHECK ((phase NOT IN ('failed', 'cancelled', 'aborted') OR decision = 'aborted') AND (phase NOT IN ('committed', 'postcopy', 'postcopy_paused', 'recovering', 'finalizing', 'succeeded', 'needs_attention', 'lost') OR decision = 'committed'))
);
CREATE INDEX migrations_by_vm ON migrations (vm_id, migration_id);
CREATE UNIQUE INDEX migrations_one_active ON migrations (vm_id) WHERE terminal = 0;
CREATE TABLE bitmaps (
    vm_id TEXT NOT NULL,
    epoch BIGINT NOT NULL,
    page_size_bytes BIGINT NOT NULL,
    page_count BIGINT NOT NULL,
    absent_count BIGINT NOT NULL,
    packed BLOB NOT NULL,
    PRIMARY KEY (vm_id)
);
CREATE TABLE idempotency (
    "key" TEXT NOT NULL,
    request_hash TEXT NOT NULL,
    response BLOB NOT NULL,
    created_at_ns BIGINT NOT NULL,
    PRIMARY KEY ("key")
);
CREATE TABLE vms (
    vm_id TEXT NOT NULL,
    node TEXT NOT NULL,
    epoch BIGINT NOT NULL,
    state TEXT NOT NULL,
    spec_json TEXT NOT NULL,
    spec_hash TEXT NOT NULL,
    memory_bytes BIGINT NOT NULL,
    created_at_ns BIGINT NOT NULL,
    PRIMARY KEY (vm_id),
    CONSTRAINT vms_state CHECK (state IN ('starting', 'running', 'stopping')),
    FOREIGN KEY(node) REFERENCES nodes (name)
);
CREATE TABLE transitions (
    migration_id TEXT NOT NULL,
    sequence BIGINT NOT NULL,
    phase TEXT NOT NULL,
    at_ns BIGINT NOT NULL,
    message TEXT NOT NULL,
    PRIMARY KEY (migration_id, sequence),
    FOREIGN KEY(migration_id) REFERENCES migrations (migration_id)
);
CREATE TRIGGER decision_is_final BEFORE UPDATE OF decision ON migrations
       WHEN OLD.decision IS NOT NULL AND NEW.decision IS NOT OLD.decision
       BEGIN SELECT RAISE(ABORT, 'I2: a decision is never changed'); END;
CREATE TRIGGER terminal_is_final BEFORE UPDATE OF phase ON migrations
       WHEN OLD.terminal AND NEW.phase IS NOT OLD.phase
       BEGIN SELECT RAISE(ABORT, 'I7: a terminal phase is never left'); END;
CREATE TRIGGER epochs_only_grow BEFORE UPDATE ON epochs
       WHEN NEW.last_epoch <= OLD.last_epoch
       BEGIN SELECT RAISE(ABORT, 'I1: an epoch is never reused'); END;
CREATE TRIGGER epochs_stay BEFORE DELETE ON epochs
       BEGIN SELECT RAISE(ABORT, 'I1: an epoch is never forgotten'); END;
