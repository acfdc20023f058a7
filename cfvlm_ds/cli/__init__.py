"""Commands: ``train.py`` for the launcher, ``cfvlm-ds`` for everything else. This folder only parses and prints."""
