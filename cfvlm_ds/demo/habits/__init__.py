"""World with habits: synthetic scenes whose objects mostly look as usual, exact edits, and a judge of texts about the scenes."""

from cfvlm_ds.demo.habits.build import build_habits, is_true, scenes_in
from cfvlm_ds.demo.habits.grammar import judge
