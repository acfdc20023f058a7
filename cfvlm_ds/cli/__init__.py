"""Commands: ``train.py`` for launchers, and ``cfvlm-ds`` for everything else. The code in this folder only parses arguments and prints
results.
"""
