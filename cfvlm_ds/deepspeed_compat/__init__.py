"""All uses of DeepSpeed's private interface, and the versions against which they were tested.

The public interface consists of the top-level names of the package ``deepspeed`` (initialize, init_distributed, DeepSpeedConfig), and of
the members of an engine and its optimizer that have no leading underscore and are listed in tests/unit/test_layering.py. That test detects
every other use outside this folder. Check these files against each new version of DeepSpeed.
"""
