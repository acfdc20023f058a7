"""What a run may change when it goes on, what it may not, and what is left when it is refused."""

from __future__ import annotations

from cfvlm_ds.config import SECTIONS, kinds


def test_every_option_says_what_its_change_means() -> None:
    declared = {name: kind for section, options in SECTIONS.items() for name, kind in kinds(options, f"{section}.").items()}
    undeclared = [name for name, kind in declared.items() if kind is None]
    assert not undeclared, (
        f"{', '.join(undeclared)}: say in cfvlm_ds/config.py what a change of it means when a run goes on, as `NAME: T = meaning(DEFAULT)` "
        "(it decides what is trained: compared on a resume), fixed(DEFAULT) (so it does, and no checkpoint of another value can be "
        "continued), speed(DEFAULT) (the same is trained, faster or in less memory) or bookkeeping(DEFAULT) (names, records, checks, stops)"
    )
    assert declared["model.vision_tower.tuning"] == "fixed" and declared["train.learning_rate"] == "meaning" and len(declared) > 60
