"""All code that uses DeepSpeed's private interface, and the DeepSpeed versions with which it was tested.

The public interface consists of the ``deepspeed`` package's top-level names (initialize, init_distributed, DeepSpeedConfig) and of the
members of an engine and its optimizer that tests/unit/test_layering.py lists; their names have no leading underscore. That test detects
any other use outside this folder. Check these files against each new version of DeepSpeed.
"""
