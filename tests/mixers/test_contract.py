"""Every registered mixer keeps the mixer contract, under its defaults and its other settings."""

import pytest
import torch

from recallzoo.contract import CHECKS, check_mixer
from recallzoo.mixers import Cache, MixerConfig, mixer, registry

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


@pytest.mark.parametrize("name", [*registry])
def test_a_gradient_reaches_every_parameter_of_a_mixer_under_its_defaults(name: str):
    assert "no gradient" not in check_mixer(mixer(name), only=("initialisation",)).summary()


@pytest.mark.unchecked
@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_a_pack_of_a_mixer_compiles(config: MixerConfig):
    require(config, ("compiles",))


@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_a_cache_is_where_the_parameters_are(config: MixerConfig):
    module = config.build(16, 17)
    if module.has_step:
        assert devices(module.to("meta").init_cache(2)) == {"meta"}


def devices(cache: Cache) -> set[str]:
    leaves = [value if isinstance(value, dict) else {"": value} for value in cache.values()]
    return {t.device.type for leaf in leaves for t in leaf.values() if isinstance(t, torch.Tensor)}


def test_the_settings_differ():
    assert len(set(SETTINGS)) == len(SETTINGS)


def test_an_unknown_check_is_refused():
    with pytest.raises(ValueError, match="no check is called 'causality'"):
        check_mixer(SETTINGS[0], only=["causality"])
