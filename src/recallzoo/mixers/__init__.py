"""Sequence mixers, one file each."""

from recallzoo.mixers._configure import (
    MixerConfig,
    mixer,
    mixer_class,
    option_types,
    registry,
    that_look_ahead,
)
from recallzoo.mixers._contract import (
    HAS_TRITON,
    Cache,
    Context,
    Mixer,
    ParameterRule,
    cache_parts,
    product_dtype,
    select_positions,
    state_size,
)
from recallzoo.mixers._own import (
    copy_sources,
    located,
    own_copy,
    require_named,
    stored_that_look_ahead,
    use_mixer,
)
from recallzoo.options import OptionValue

__all__ = [
    "HAS_TRITON",
    "Cache",
    "Context",
    "Mixer",
    "MixerConfig",
    "OptionValue",
    "ParameterRule",
    "cache_parts",
    "copy_sources",
    "located",
    "mixer",
    "mixer_class",
    "option_types",
    "own_copy",
    "product_dtype",
    "registry",
    "require_named",
    "select_positions",
    "state_size",
    "stored_that_look_ahead",
    "that_look_ahead",
    "use_mixer",
]
