"""Devices of a Ray cluster that a sweep has for itself, and the workers that share them.

Each device is reserved as a whole (a placement group of one bundle), and workers take shares of
it. So the driver decides which packs share a device, where Ray would fill one with shares before
it uses the next, and a worker is on the same device from pack to pack.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SHARES_OF_ONE = 10_000
"""Ray counts resources in parts this small."""
PLACING_SECONDS = 5.0
"""Time that a device may take to be reserved before packs share those that are."""


@dataclass
class _Lane:
    """One device."""

    group: Any
    idle: list[Any] = field(default_factory=list)
    """Workers without a pack."""
    costs: list[float] = field(default_factory=list)
    """Of the packs in training."""


@dataclass
class Seat:
    """A worker that has a pack."""

    worker: Any
    cost: float
    _lane: _Lane


def share_of_one(packs_per_device: int) -> float:
    """1 / N, rounded down to what Ray can count, so that N of them fit."""
    return SHARES_OF_ONE // packs_per_device / SHARES_OF_ONE


class Lanes:
    """Devices by need. `start(options)` makes a worker with these resources and this place."""

    def __init__(
        self,
        ray: Any,
        resource: str,
        packs_per_device: int,
        start: Callable[[dict[str, Any]], Any],
    ) -> None:
        self._ray, self._per_device, self._start = ray, packs_per_device, start
        kinds = {"CPU", resource}
        self._bundle = dict.fromkeys(kinds, 1)
        self._share = {f"num_{k.lower()}s": share_of_one(packs_per_device) for k in kinds}
        self._lanes: list[_Lane] = []

    def ask_for(self, number: int) -> None:
        """Have up to `number` devices, as soon as the cluster can spare them."""
        new = [
            _Lane(self._ray.util.placement_group([self._bundle]))
            for _ in range(number - len(self._lanes))
        ]
        self._lanes += new
        until = time.monotonic() + PLACING_SECONDS
        for lane in new:
            lane.group.wait(max(0.0, until - time.monotonic()))

    def take(self, cost: float) -> Seat | None:
        """A worker for a pack of this cost, on the device with the least in training; None if
        all that the cluster has given so far are full."""
        free = [lane for lane in self._lanes if len(lane.costs) < self._per_device]
        for lane in sorted(free, key=lambda lane: sum(lane.costs)):
            if self._is_there(lane):
                lane.costs.append(cost)
                return Seat(lane.idle.pop() if lane.idle else self._worker(lane), cost, lane)
        return None

    def give_back(self, seat: Seat, *, is_alive: bool) -> None:
        """The pack of this worker ended. Where one was lost, others may be lost with it, so all
        that have nothing to do are made anew."""
        lane = seat._lane
        lane.costs.remove(seat.cost)
        lane.idle.append(seat.worker)
        if not is_alive:
            for worker in lane.idle:
                self._ray.kill(worker)
            lane.idle.clear()

    def release(self, *, busy: bool = False) -> None:
        """Leave devices that nothing trains on to others; with `busy`, all of them, at once."""
        for lane in [lane for lane in self._lanes if busy or not lane.costs]:
            self._lanes.remove(lane)
            self._ray.util.remove_placement_group(lane.group)  # which ends its workers

    def _is_there(self, lane: _Lane) -> bool:
        return self._ray.util.placement_group_table(lane.group)["state"] == "CREATED"

    def _worker(self, lane: _Lane) -> Any:
        place = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            lane.group, placement_group_bundle_index=0
        )
        return self._start({**self._share, "scheduling_strategy": place})
