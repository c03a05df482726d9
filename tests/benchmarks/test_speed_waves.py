"""Processes of the speed benchmark measure alone and prepare together."""

# pyright: reportMissingImports=false

import threading

import speed_waves
from speed_cells import choose
from speed_tools import Turn

SECONDS = 20


def test_nothing_is_measured_while_another_process_prepares(tmp_path):
    path = tmp_path / "turns"
    one, two = Turn(path), Turn(path)
    measuring = threading.Event()

    def measure() -> None:
        with one:
            measuring.set()

    other = threading.Thread(target=measure)
    other.start()
    assert not measuring.wait(0.2)
    with two:
        assert not measuring.is_set()
    other.join(SECONDS)
    assert measuring.is_set()


def test_nothing_is_prepared_while_another_process_measures(tmp_path):
    path = tmp_path / "turns"
    one = Turn(path)
    prepared = threading.Event()
    with one:
        other = threading.Thread(target=lambda: (Turn(path), prepared.set()))
        other.start()
        assert not prepared.wait(0.2)
    other.join(SECONDS)
    assert prepared.is_set()


def test_a_process_alone_may_measure_and_prepare_at_any_time():
    turn = Turn(None)
    with turn:
        turn.prepare()


def test_every_wave_has_large_and_small_cells_and_every_cell_is_in_one():
    cells = choose([])
    waves = speed_waves.waves(cells, 10)
    assert [len(wave) for wave in waves] == [10, 10, 10]
    names = [cell.name for wave in waves for cell in wave]
    assert sorted(names) == sorted(cell.name for cell in cells)
    for wave in waves:
        sizes = [cell.seq_len * cell.architecture.d_model for cell in wave]
        assert max(sizes) == 512 * 512
        assert min(sizes) <= 128 * 128
