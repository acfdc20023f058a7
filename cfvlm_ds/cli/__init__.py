"""Commands: ``train.py`` for launchers, and ``cfvlm-ds`` for everything else. This folder only parses arguments and prints."""
