"""Every registered mixer keeps the mixer contract, under its defaults and its other settings."""

import pytest

from recallzoo.contract import CHECKS, check_mixer
from recallzoo.mixers import MixerConfig, mixer, registry

SETTINGS: list[MixerConfig] = [
    mixer(name, **options)
    for name, cls in registry.items()
    for options in ({}, *cls.contract_options)
]


@pytest.mark.parametrize(
    "check",
    [pytest.param(c, marks=pytest.mark.unchecked) if c == "compiles" else c for c in CHECKS],
)
@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_mixer_keeps_its_contract(config: MixerConfig, check: str):
    report = check_mixer(config, only=[check])
    (outcome,) = (c for c in report.checks if c.name == check)
    assert report.passed, report.summary()
    assert outcome.passed or not config.build(16, 17).causal, report.summary()


def test_the_settings_differ():
    assert len(set(SETTINGS)) == len(SETTINGS)


def test_an_unknown_check_is_refused():
    with pytest.raises(ValueError, match="no check is called 'causality'"):
        check_mixer(SETTINGS[0], only=["causality"])
