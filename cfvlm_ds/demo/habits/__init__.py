"""World with habits: synthetic scenes of things with usual attributes, exact edits of these scenes, and a judge that checks texts against
them.
"""

from cfvlm_ds.demo.habits.build import build_habits, is_true, scenes_in
from cfvlm_ds.demo.habits.grammar import judge
