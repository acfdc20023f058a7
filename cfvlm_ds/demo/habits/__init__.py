"""World with habits: synthetic scenes of things with usual attributes, exact edits of the scenes, and a judge of texts about them."""

from cfvlm_ds.demo.habits.build import build_habits, is_true, scenes_in
from cfvlm_ds.demo.habits.grammar import judge
