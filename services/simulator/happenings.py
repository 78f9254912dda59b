# SPDX-License-Identifier: Apache-2.0
"""What the happenings of a scenario do to the world, and when each is over."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from services.orchestrator.scheduling.model import NodeView, Priority, Request
from services.orchestrator.scheduling.plan import Plan, Rate, plan
from services.orchestrator.scheduling.schedule import Schedule
from services.simulator.bounds import Capacity, Load, lower_bound_s
from services.simulator.scenario import Cut, Drain, Freeze, Rollout, SetLimits, Storm
from services.simulator.world import World

_GBIT = 1e9 / 8


@dataclass(slots=True)
class Course:
    """How a happening that moves VMs went."""

    what: str
    began_s: float
    lower_bound_s: float
    plan_seconds: float = 0.0
    """Real time that its dry run took."""
    planned_s: float = 0.0
    ended_s: float = 0.0
    asked: int = 0
    moved: int = 0

    @property
    def makespan_ratio(self) -> float:
        """Against a bound that no order and no choice of targets could beat."""
        return (self.ended_s - self.began_s) / self.lower_bound_s if self.lower_bound_s else 1.0


@dataclass(slots=True)
class Director:
    """Makes a scenario happen."""

    world: World
    courses: list[Course] = field(default_factory=list)

    def direct(self) -> None:
        """Put everything on the clock."""
        world = self.world
        for index, each in enumerate(world.scenario.happenings):
            match each:
                case Drain():
                    world.at(each.at_s, partial(self._drain, each, index))
                case Rollout():
                    world.at(each.at_s, partial(self._rollout, each, index))
                case Storm():
                    world.at(each.at_s, partial(self._storm, each, index))
                case Cut():
                    world.at(each.at_s, partial(world.cut, each.rack, down=True))
                    until_s = each.at_s + each.for_s
                    world.at(until_s, partial(world.cut, each.rack, down=False))
                case SetLimits():
                    world.at(each.at_s, partial(world.set_limits, each.values))
                case Freeze():
                    world.at(each.at_s, partial(world.freeze, frozen=True))
                    world.at(each.at_s + each.for_s, partial(world.freeze, frozen=False))

    # --- drains ---

    def _drain(self, drain: Drain, index: int) -> None:
        world = self.world
        names = [
            *drain.nodes,
            *(
                f"r{rack}-n{number}"
                for rack in drain.racks
                for number in range(world.scenario.fleet.nodes_per_rack)
            ),
        ]
        vms = [vm_id for name in names for vm_id in world.on_node[name]]
        vms.sort(key=lambda vm_id: world.vms[vm_id].memory_bytes)
        if drain.order == "largest-first":
            vms.reverse()
        course = Course(f"drain of {len(names)} nodes", world.now_s, self._bound(names, vms))
        self.courses.append(course)
        began = time.perf_counter()
        course.planned_s = self.dry_run(names, vms).ends_s
        course.plan_seconds = time.perf_counter() - began
        world.close(names, closed=True)
        self._ask(vms, index, course, Priority.MAINTENANCE, lambda: None)

    def dry_run(self, names: list[str], vms: list[str]) -> Plan:
        """The plan of a drain, as `godwit drain --dry-run` makes it."""
        world = self.world
        copy = Schedule(world.schedule.limits, world.schedule.rules)
        for node in world.schedule.nodes.values():
            copy.add_node(_copied(node, draining=node.draining or node.name in names))
        for move_id, admission in world.schedule.running.items():
            copy.ledger.take(move_id, admission.keys)
            copy.running[move_id] = admission
        shape, scenario = world.scenario.fleet, world.scenario
        share = scenario.limits.get("node-out", copy.limits.node_out)
        rate = Rate(
            overhead_s=scenario.overhead_s,
            bytes_per_s=shape.node.bandwidth_gbit_s * _GBIT / max(share, 1),
        )
        for number, vm_id in enumerate(vms):
            request = Request(
                request_id=f"plan.{number:06}",
                vm=world.vms[vm_id],
                created_s=0.0,
                priority=Priority.MAINTENANCE,
            )
            copy.put(request)
        return plan(copy, rate)

    def _ask(
        self,
        vms: list[str],
        index: int,
        course: Course,
        priority: Priority,
        done: Callable[[], None],
    ) -> None:
        waiting = set(vms)

        def ended(vm_id: str, moved: bool) -> None:
            course.moved += moved
            course.ended_s = self.world.now_s
            waiting.discard(vm_id)
            if not waiting:
                done()

        for vm_id in vms:
            if self.world.ask(vm_id, index, priority=priority, ended=ended):
                course.asked += 1
            else:
                waiting.discard(vm_id)
        if not waiting:
            done()

    def _bound(self, names: list[str], vms: list[str]) -> float:
        world, shape = self.world, self.world.scenario.fleet
        nodes = world.schedule.nodes
        targets = {each for each in nodes if each not in set(names) and not nodes[each].draining}
        return lower_bound_s(
            [
                Load(
                    node=world.vms[vm_id].node,
                    link=nodes[world.vms[vm_id].node].link,
                    memory_bytes=world.vms[vm_id].memory_bytes,
                )
                for vm_id in vms
            ],
            Capacity(
                limit=world.schedule.limits.of,
                overhead_s=world.scenario.overhead_s,
                node_bytes_per_s=shape.node.bandwidth_gbit_s * _GBIT,
                link_bytes_per_s=shape.uplink_gbit_s * _GBIT,
                targets=targets,
                target_links={nodes[each].link for each in targets},
            ),
        )

    # --- the rest ---

    def _rollout(self, rollout: Rollout, index: int) -> None:
        world = self.world
        names = list(world.schedule.nodes)[: rollout.nodes or None]
        left = names[::-1]
        # Every node once: no bound on the whole is known but the reboots, one behind another.
        rounds = -(-len(names) // rollout.nodes_at_once)
        course = Course(f"rollout over {len(names)} nodes", world.now_s, rounds * rollout.reboot_s)
        self.courses.append(course)

        def begin() -> None:
            if not left:
                return
            name = left.pop()
            world.close([name], closed=True)
            vms = list(world.on_node[name])
            self._ask(vms, index, course, Priority.MAINTENANCE, partial(reboot, name))

        def reboot(name: str) -> None:
            world.at(world.now_s + rollout.reboot_s, partial(back, name))

        def back(name: str) -> None:
            world.close([name], closed=False)
            course.ended_s = world.now_s
            begin()

        for _ in range(rollout.nodes_at_once):
            begin()

    def _storm(self, storm: Storm, index: int) -> None:
        world = self.world
        chance = random.Random(world.scenario.seed + index)  # noqa: S311 - repeatable, not secret
        vms = chance.sample(sorted(world.vms), min(storm.moves, len(world.vms)))
        course = Course(f"storm of {len(vms)} moves", world.now_s, self._bound([], vms))
        course.lower_bound_s = max(course.lower_bound_s, storm.over_s)
        self.courses.append(course)
        priority = Priority[storm.priority.upper()]
        for number, vm_id in enumerate(vms):
            when_s = world.now_s + storm.over_s * number / len(vms)
            ask = partial(self._ask, [vm_id], index, course, priority, lambda: None)
            world.at(when_s, ask)


def _copied(node: NodeView, *, draining: bool) -> NodeView:
    return NodeView(
        name=node.name,
        memory_available_bytes=node.memory_available_bytes,
        memory_total_bytes=node.memory_total_bytes,
        booked_bytes=node.booked_bytes,
        link=node.link,
        labels=node.labels,
        taints=node.taints,
        reachable=node.reachable,
        draining=draining,
        drivers=node.drivers,
        cpus=node.cpus,
        page_sizes=node.page_sizes,
        vm_count=node.vm_count,
        apart=node.apart.copy(),
        near=node.near.copy(),
        failures=node.failures,
        broken_until_s=node.broken_until_s,
    )
