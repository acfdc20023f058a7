"""All code that uses DeepSpeed's private interface, and the DeepSpeed versions that it was tested with.

DeepSpeed's public interface is taken to be the top-level names of the ``deepspeed`` package (initialize, init_distributed, DeepSpeedConfig)
and the members of an engine and its optimizer that tests/unit/test_layering.py lists, all without a leading underscore. That test detects
any other use of DeepSpeed outside this folder. Test this folder with each new version of DeepSpeed.
"""
