"""Every use of DeepSpeed's private interface, and the versions in which it was read.

Public is what ``import deepspeed`` itself offers (initialize, init_distributed, DeepSpeedConfig), and those members of an engine and its
optimizer that have no leading underscore and are listed in tests/unit/test_layering.py, which finds every other use outside of this folder.
A new version of DeepSpeed is read against these files.
"""
