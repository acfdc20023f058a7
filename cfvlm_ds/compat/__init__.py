"""What is used of DeepSpeed beside its public interface, and the versions in which it was read.

Public is what ``import deepspeed`` itself offers (initialize, init_distributed, DeepSpeedConfig), and of an engine and its optimizer what
bears no underscore and is listed in tests/unit/test_layering.py, which finds every other use outside of this folder. A new version of
DeepSpeed is read against these files.
"""
