"""World with habits: scenes in which most things look as usual, exact edits of the scenes, and a judge for any text about a scene."""

from cfvlm_ds.demo.habits.build import build_habits, is_true, scenes_in
from cfvlm_ds.demo.habits.grammar import judge
