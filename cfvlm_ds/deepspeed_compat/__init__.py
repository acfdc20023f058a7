"""All uses of DeepSpeed's private interface, with the versions against which they were checked.

The public interface is what ``import deepspeed`` itself offers (initialize, init_distributed, DeepSpeedConfig), and those members of an
engine and its optimizer that have no leading underscore and are listed in tests/unit/test_layering.py. That test detects every other use
outside this folder. A new version of DeepSpeed must be checked against these files.
"""
