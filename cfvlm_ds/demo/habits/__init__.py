"""World with habits: synthetic scenes of things that usually have typical attributes ("habits"), exact edits of these scenes, and a judge
that decides whether a text is true of a scene.
"""

from cfvlm_ds.demo.habits.build import build_habits, is_true, scenes_in
from cfvlm_ds.demo.habits.grammar import judge
