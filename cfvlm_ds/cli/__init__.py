"""Commands: ``train.py`` for the launcher, ``cfvlm-ds`` for everything else. Parsing and printing only."""
