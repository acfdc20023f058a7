"""Command-line interface: ``train.py``, which launchers run, and ``cfvlm-ds``, which has all commands. The code in this folder only parses
arguments and prints results.
"""
