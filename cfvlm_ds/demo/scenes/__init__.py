"""Embedded world: scenes with exact counterfactual edits, for training and tests without a download."""

from cfvlm_ds.demo.scenes.benchmarks import build_benchmarks
from cfvlm_ds.demo.scenes.build import build_scenes, config_in
from cfvlm_ds.demo.scenes.grammar import all_captions
from cfvlm_ds.demo.scenes.questions import all_texts

__all__ = ["all_captions", "all_texts", "build_benchmarks", "build_scenes", "config_in"]
