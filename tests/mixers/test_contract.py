"""Every registered mixer keeps the mixer contract, under its defaults and its other settings."""

import pytest

from recallzoo.contract import CHECKS, check_mixer
from recallzoo.mixers import MixerConfig, mixer, registry

SETTINGS: list[MixerConfig] = [
    mixer(name, **options)
    for name, cls in registry.items()
    for options in ({}, *cls.contract_options)
]


ALL_BUT_COMPILING = tuple(check for check in CHECKS if check != "compiles")


def require(config: MixerConfig, checks: tuple[str, ...]) -> None:
    """Every one of these checks was made and passed, but of what looks ahead by definition."""
    report = check_mixer(config, only=checks)
    assert report.passed, report.summary()
    assert {check.name for check in report.checks} >= set(checks)
    if config.build(16, 17).causal:
        assert not report.undecided, report.summary()


@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_a_mixer_keeps_its_contract(config: MixerConfig):
    require(config, ALL_BUT_COMPILING)


@pytest.mark.unchecked
@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_a_pack_of_a_mixer_compiles(config: MixerConfig):
    require(config, ("compiles",))


def test_the_settings_differ():
    assert len(set(SETTINGS)) == len(SETTINGS)


def test_an_unknown_check_is_refused():
    with pytest.raises(ValueError, match="no check is called 'causality'"):
        check_mixer(SETTINGS[0], only=["causality"])
