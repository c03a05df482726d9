"""Packs in this process."""

import shutil
import time
from typing import Literal

from recallzoo.devices import choose_device, is_out_of_memory
from recallzoo.executors._contract import Halve, NamedPack, Watcher
from recallzoo.executors.devices import free_memory, runs_that_fit
from recallzoo.run import Run
from recallzoo.store import Store
from recallzoo.train.packed import Pack, PackOptions


class LocalExecutor:
    """One pack after another on one device. UserError if it is not there."""

    def __init__(
        self,
        device: str,
        compiled: bool | None,
        checkpoint_seconds: float,
        deadline: float | None = None,
    ) -> None:
        self._compiled, self._checkpoint_seconds = compiled, checkpoint_seconds
        self._deadline = deadline
        self._device = choose_device(device)
        self.device, self.num_devices = str(self._device), 1
        self.sharing: Literal["mps", "turns"] | None = None

    def runs_that_fit(self, run: Run) -> int:
        return runs_that_fit(run, self._device)

    def train(self, packs: list[NamedPack], store: Store, watcher: Watcher, halve: Halve) -> None:
        number, waiting, has_time = 0, list(packs), True
        while waiting and has_time:
            if self._deadline is not None and time.monotonic() >= self._deadline:
                return
            name, members = waiting.pop(0)
            number += 1
            watcher.pack_started(members, number, number + len(waiting))
            fits = True
            try:
                has_time = self._train_pack(name, members, store, watcher)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                fits = False
            finally:
                watcher.pack_ended()
            if not fits or self._device.type == "cuda":
                # After the handler, whose traceback holds the pack that did not fit.
                free_memory(self._device)
            if not fits:
                waiting = halve(name, members) + waiting

    def _train_pack(self, name: str, members: list[Run], store: Store, watcher: Watcher) -> bool:
        """Whether it was trained to its end."""
        folder = store.folder / "packs" / name
        pack = Pack(
            members,
            self._device,
            PackOptions(
                compiled=self._compiled,
                checkpoint=folder / "checkpoint.safetensors",
                checkpoint_seconds=self._checkpoint_seconds,
                on_progress=watcher.pack_progressed,
                deadline=self._deadline,
            ),
        )
        for result in pack.train():
            if not store.has(result.hash):
                store.write(result)
                watcher.run_finished(result)
        if pack.is_done:
            shutil.rmtree(folder, ignore_errors=True)
        return pack.is_done
